"""Ranks on two machines that share a disk and a wire: they meet without DNS, train one model, and end together."""

import csv
import re

import numpy as np
import pytest

from support.mpi import ROOT, program
from support.two_nodes import on_two_nodes, why_not
from support.warm import python

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(bool(why_not()), reason=why_not())]

TRAIN = [str(ROOT / "scripts/edm_train.py"), "--data_dir", "digits", "--image_size", "8", "--num_channels", "32",
         "--num_res_blocks", "1", "--channel_mult", "1", "--attention_resolutions", "8", "--lr", "1e-3",
         "--global_batch_size", "16", "--log_interval", "1"]
QUIET = {"OPENAI_LOG_FORMAT": "log,csv"}


def losses(directory):
    with open(directory / "progress.csv") as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file)])


def test_two_nodes_train_as_one_process_does(tmp_path):
    done = on_two_nodes(tmp_path, f"""
        $mpiexec -n 2 -ppn 1 $python {" ".join(TRAIN)} --total_training_steps 6 --log_dir {tmp_path}/two
    """, env=QUIET)
    assert done.rc == 0, done
    assert "on 2 rank(s)" in (tmp_path / "two" / "log.txt").read_text()
    alone = python([*TRAIN, "--total_training_steps", "6", "--log_dir", str(tmp_path / "one")], env=QUIET)
    assert alone.rc == 0, alone
    # The samples and their noise are the same; only the order in which gradients are added differs.
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-5)


HELLO = """
    import os, socket, sys
    import torch as th
    from cm.distributed import setup as dist

    def main():
        dist.setup_dist(timeout_s=20)
        total = int(dist.all_reduce_sum(th.tensor([1])))
        try:
            socket.gethostbyname(socket.gethostname())
            name = "known"
        except OSError:
            name = "unknown"
        facts = [dist.get_rank(), dist.get_local_rank(), socket.gethostname(), name, total]
        sys.stdout.write(",".join(map(str, facts)) + "\\n")
        sys.stdout.flush()

    dist.run(main)
"""
MET = ["0,0,node1,unknown,4", "1,1,node1,unknown,4", "2,0,node2,unknown,4", "3,1,node2,unknown,4"]


@pytest.mark.slow                                          # for its eight ranks on few cores
def test_mpiexec_and_torchrun_meet_where_no_host_has_a_known_name(tmp_path):
    hello = program(tmp_path, HELLO)
    done = on_two_nodes(tmp_path, f"""
        $mpiexec -n 4 $python {hello}
        for n in 1 2; do
            $ssh 10.77.0.$n $python -m torch.distributed.run --nnodes 2 --node-rank $((n - 1)) --nproc-per-node 2 \
                --master-addr 10.77.0.1 --master-port 29500 {hello} &
        done
        wait
    """)
    assert done.rc == 0, done
    assert sorted(done.stdout.split()) == sorted(MET * 2), done


TIMEOUT_S = 4
EVENTS = {
    "link cut": "ip link set port2 down",
    "node killed": "kill -9 $(ip netns pids node2)",
}


# Silence takes longer to notice than a death.
@pytest.mark.parametrize("event", [pytest.param("link cut", marks=pytest.mark.slow), "node killed"])
def test_a_lost_node_ends_the_job_on_both(tmp_path, event):
    words = " ".join(TRAIN)
    done = on_two_nodes(tmp_path, f"""
        ranks() {{ cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -c edm_train.py; }}
        now() {{ date +%s.%N; }}
        $mpiexec -n 2 -ppn 1 $python {words} --total_training_steps 100000 \
            --timeout_seconds {TIMEOUT_S} --log_dir {tmp_path}/run &
        job=$!
        until [ $(cat {tmp_path}/run/progress.csv 2>/dev/null | wc -l) -gt 5 ]; do sleep 0.1; kill -0 $job; done
        {EVENTS[event]}
        echo lost $(now)
        wait $job && status=0 || status=$?
        echo ended $(now) status $status
        while [ $(ranks) -gt 0 ]; do sleep 0.1; done
        echo gone $(now)
    """, env=QUIET, timeout=90)
    assert done.rc == 0, done
    lost, ended, status, gone = map(float, re.findall(r"(?:lost|ended|status|gone) ([\d.]+)", done.stdout))
    assert status != 0, done
    assert ended - lost < TIMEOUT_S + 15 and gone - lost < TIMEOUT_S + 15, done
    if event == "link cut":
        assert re.search("rank 0 of 2 failed waiting; no word from rank 1", done.stderr), done

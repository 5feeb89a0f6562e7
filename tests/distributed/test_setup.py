"""Ranks find each other under every launcher, share out GPUs and cores, and end in good order."""

import os
import socket
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch as th

from cm.distributed import devices, launchers, rendezvous, waiting
from cm.distributed import setup as dist
from cm.errors import UserError
from support import mpi, tf32
from support.hello import HELLO, hellos, lines
from support.mpi import program, start
from support.warm import mpi_program, mpiexec, python

TWO = [["0", "2", "0", "2"], ["1", "2", "1", "2"]]


def test_plain_python_needs_neither_mpi_nor_a_process_group(tmp_path):
    finished = mpi.python([program(tmp_path, HELLO)])
    assert lines(finished) == ["0,1,0,1,1,False,False,None"], finished


GROUP = """
    import sys
    import torch as th
    import torch.distributed
    from cm import dist_util

    dist_util.setup_dist()
    dist_util.setup_dist()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parts = [th.zeros(1) for _ in range(size)]
    torch.distributed.all_gather(parts, th.tensor([float(rank)]))
    torch.distributed.barrier()
    weights = [th.full((2,), float(rank))]
    dist_util.sync_params(weights)
    found = dist_util.all_gather_object(rank)
    model = th.nn.parallel.DistributedDataParallel(th.nn.Linear(1, 1))
    model(th.ones(1, 1)).sum().backward()
    print(rank, size, th.cat(parts).tolist(), weights[0].tolist(), found, "mpi4py" in sys.modules, flush=True)
"""


def test_the_original_setup_dist_leaves_a_process_group_for_one_process(tmp_path):
    finished = python([program(tmp_path, GROUP)])
    assert finished.stdout.split("\n")[0] == "0 1 [0.0] [0.0, 0.0] [0] False" and not finished.stderr, finished
    no_mpi = python([program(tmp_path, GROUP)], env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert no_mpi.stdout == finished.stdout and no_mpi.rc == 0, no_mpi


def test_a_process_group_of_one_costs_little(tmp_path):
    finished = python([program(tmp_path, """
        import os, time
        from cm import dist_util
        from cm.distributed import setup

        setup.setup_dist()
        begun = time.monotonic()
        dist_util.setup_dist()
        print(time.monotonic() - begun, os.environ.get("GLOO_SOCKET_IFNAME"))
    """)])
    seconds, interface = finished.stdout.split()
    assert float(seconds) < 2, finished                     # a host name without an address used to take five seconds
    assert interface == launchers.interface_of("127.0.0.1"), finished


@pytest.mark.slow                                           # the original's scripts on two ranks run in any case
@pytest.mark.mpi
def test_the_original_setup_dist_with_several_ranks(tmp_path):
    # It ends by itself, without dist_util.run: more than half of such programs used to be aborted at their end.
    path = program(tmp_path, GROUP)
    for _ in range(2):
        finished = mpiexec(2, [path])
        assert finished.rc == 0 and not finished.stderr, finished
        assert sorted(finished.stdout.splitlines()) == [
            f"{rank} 2 [0.0, 1.0] [0.0, 0.0] [0, 1] True" for rank in range(2)
        ], finished


@pytest.mark.mpi
def test_one_rank_is_a_plain_process_with_all_the_cores(tmp_path):
    # mpiexec leaves marks by which MKL would take a single thread. A number that the user has set stays.
    for threads, env in ((len(launchers.usable_cores()), {"OMP_NUM_THREADS": None}), (1, {"OMP_NUM_THREADS": "1"})):
        finished = mpi.mpi_program(tmp_path, 1, HELLO, env=env)
        assert lines(finished) == [f"0,1,0,1,{threads},False,False,None"], finished


@pytest.mark.mpi
def test_ranks_share_the_cores(tmp_path):
    finished = mpi.mpi_program(tmp_path, 2, HELLO, env={"OMP_NUM_THREADS": None})
    assert hellos(finished) == TWO, finished
    threads = str(max(1, len(launchers.usable_cores()) // 2))
    assert [line.split(",")[4] for line in lines(finished)] == [threads] * 2, finished
    # gloo is told where; otherwise it looks the host name up, which may lead nowhere or to another machine
    assert [line.split(",")[7] for line in lines(finished)] == [launchers.interface_of("127.0.0.1")] * 2, finished


@pytest.mark.mpi
def test_torchrun(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program(tmp_path, HELLO)]
    assert hellos(mpi.python(command, timeout=90)) == TWO


@pytest.mark.mpi
@pytest.mark.parametrize("address", ["127.0.0.1", *launchers.own_addresses()[:1]])
def test_ranks_on_different_machines_meet_at_an_address_all_can_reach(tmp_path, address):
    # MPICH is told to take the ranks for two machines; what is left to test is the search for the address.
    source = HELLO.replace("    dist.run", f"""
    from cm.distributed import launchers
    launchers.own_addresses = lambda: ["192.0.2.255", "{address}"]
    launchers.PROBE_S = 0.5
    dist.run""")
    finished = mpi_program(tmp_path, 2, source, env={"MPIR_CVAR_NOLOCAL": "1"})
    assert hellos(finished) == [["0", "2", "0", "2"], ["1", "2", "0", "2"]], finished
    assert {line.split(",")[7] for line in lines(finished)} == {launchers.interface_of(address)}, finished


@pytest.mark.mpi
def test_an_explicit_master_address_is_obeyed(tmp_path):
    path = program(tmp_path, HELLO)
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        busy = mpiexec(2, [path], env={"MASTER_PORT": str(port)})
    assert busy.rc == 2 and f"cannot listen at MASTER_PORT={port}" in busy.stderr, busy
    assert busy.stderr.count("error:") == 1, busy
    free = mpiexec(2, [path], env={"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
    assert hellos(free) == TWO, free
    nowhere = mpiexec(2, [path], env={"MASTER_ADDR": "192.0.2.255"})
    assert nowhere.rc == 2 and "cannot reach rank 0 at port" in nowhere.stderr, nowhere


LISTENING = """
    import os
    from cm.distributed import setup as dist

    def listening():
        # Local addresses of this process's sockets in the state LISTEN (0A); /proc/net writes IPv4 in hexadecimal.
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        own = {os.readlink(link) for link in links if os.path.lexists(link)}
        rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/self/net/{name}").readlines()[1:]]
        return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}

    def main():
        if "PMI_RANK" in os.environ:
            import mpi4py.MPI                               # MPI may listen, too, wherever its own settings say
        before = listening()
        dist.setup_dist()
        dist.all_gather_object(0)
        mine = sorted({each.partition(":")[0] for each in listening() - before})
        print(dist.get_rank(), len(dist.all_gather_object(mine)), ",".join(mine), flush=True)

    dist.run(main)
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def listening_addresses(finished):
    assert finished.rc == 0, finished
    return sorted(line for line in finished.stdout.splitlines() if line[:2] in ("0 ", "1 "))


@pytest.mark.mpi
@pytest.mark.skipif(sys.platform != "linux", reason="sockets are counted in /proc")
@pytest.mark.parametrize("env", [{}, {"MASTER_ADDR": socket.gethostname()}])
def test_ranks_of_one_machine_listen_where_no_other_machine_can_connect(tmp_path, env):
    """The store and gloo alike; 0100007F is 127.0.0.1."""
    finished = mpi_program(tmp_path, 2, LISTENING, env=env)
    assert listening_addresses(finished) == ["0 2 0100007F", "1 2 0100007F"], finished


def test_a_port_of_another_job_is_named(monkeypatch):
    """As rank 0 of a second job sees it, whose store cannot be opened."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"MASTER_PORT={port}: address already in use; if another job has this"):
            rendezvous._meet_by_address(timedelta(seconds=5))


def test_gloo_takes_the_interface_that_leads_to_another_machine(monkeypatch):
    """Of a rank that meets the others by an address, some of them elsewhere."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(rendezvous, "_store_at", lambda *_: th.distributed.HashStore())
    monkeypatch.setattr(launchers, "probe", lambda hosts, port: dict.fromkeys(hosts, "127.0.0.1"))
    monkeypatch.setattr(waiting, "await_ranks", lambda *_: None)
    rendezvous._meet_by_address(timedelta(seconds=5))
    assert os.environ["GLOO_SOCKET_IFNAME"] == launchers.interface_of("127.0.0.1")


@pytest.mark.mpi
@pytest.mark.skipif(sys.platform != "linux", reason="sockets are counted in /proc")
def test_ranks_that_were_given_a_loopback_address_listen_there(tmp_path):
    path, port = program(tmp_path, LISTENING), free_port()
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with ThreadPoolExecutor(2) as pool:
        jobs = list(pool.map(lambda rank: python([path], env=env | {"RANK": str(rank)}), range(2)))
    assert sum((listening_addresses(job) for job in jobs), []) == ["0 2 0100007F", "1 2 0100007F"], jobs


@pytest.mark.mpi
def test_jobs_that_start_at_the_same_time_do_not_mix(tmp_path):
    path = program(tmp_path, HELLO)
    with ThreadPoolExecutor(3) as pool:
        jobs = list(pool.map(lambda _: mpiexec(2, [path], timeout=120), range(3)))
    assert [hellos(job) for job in jobs] == [TWO] * 3


@pytest.mark.mpi
def test_a_process_group_that_is_already_there_is_used(tmp_path):
    finished = mpi_program(tmp_path, 2, """
        import os
        import torch as th
        from cm.distributed import setup as dist

        rank = int(os.environ["PMI_RANK"])
        meeting = os.path.dirname(os.path.abspath(__file__)) + "/meeting"
        th.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        assert dist.get_rank() == rank and dist.get_world_size() == 2
        dist.setup_dist()
        print(f"{dist.get_local_rank()},{int(dist.all_reduce_sum(th.tensor([1])))}\\n", end="", flush=True)
        dist.run(dist.barrier)
    """)
    assert lines(finished) == ["0,2", "1,2"], finished


@pytest.mark.parametrize(
    "env, why, remedy",
    [
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "no connection to that mpiexec", "mpiexec that belongs to mpi4py"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "sees one rank only", "mpiexec that belongs to"),
        ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2"}, "sees one rank only", "mpiexec that belongs to"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "sees one rank only", "srun --mpi=pmi2"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "PMIX_RANK": "0"}, "does not speak PMIx",
         "srun --mpi=pmi2"),
        ({"PMIX_RANK": "0"}, "does not speak PMIx", "mpiexec that belongs to mpi4py"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"}, "does not speak PMIx",
         "mpiexec that belongs to"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "MPI4PY_LIBMPI": "/nowhere/libmpi.so"},
         "mpi4py cannot be loaded (cannot load MPI library", "pip install mpi4py mpich"),
    ],
)
def test_a_launcher_that_mpi_does_not_know_is_refused(tmp_path, env, why, remedy):
    finished = python([program(tmp_path, HELLO)], env=env)
    assert finished.rc == 2 and why in finished.stderr and remedy in finished.stderr, finished
    size = "several" if set(env) == {"PMIX_RANK"} else "2"
    assert "Traceback" not in finished.stderr and f"rank 0 of {size}" in finished.stderr, finished


def test_plain_python_without_an_mpi_library(tmp_path):
    env = {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}
    broken = mpi.python(["-c", "from mpi4py import MPI"], env=env)
    assert broken.rc == 1 and "RuntimeError: cannot load MPI library" in broken.stderr, broken
    assert hellos(python([program(tmp_path, HELLO)], env=env)) == [["0", "1", "0", "1"]]


def test_half_of_torchruns_variables_are_refused(tmp_path):
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    finished = python([program(tmp_path, HELLO)], env=env)
    assert finished.rc == 2 and "MASTER_PORT must be set" in finished.stderr, finished


def test_a_batch_script_without_srun_is_a_single_process(tmp_path):
    finished = python([program(tmp_path, HELLO)], env={"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert hellos(finished) == [["0", "1", "0", "1"]]


@pytest.mark.mpi
@pytest.mark.parametrize("launches", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_launch_after_launch_ends_in_good_order(tmp_path, launches):
    # A DDP model that outlives main() used to crash the process in torch's static destructors, now and then.
    path = program(tmp_path, """
        import atexit, threading, time
        from concurrent.futures import ThreadPoolExecutor
        import torch as th
        from cm.distributed import setup as dist

        kept = []

        def main():
            dist.setup_dist()
            kept.append(th.nn.parallel.DistributedDataParallel(th.nn.Linear(4, 4)))
            kept[0](th.ones(2, 4)).sum().backward()
            atexit.register(print, "closed", flush=True)
            threading.Thread(target=lambda: (time.sleep(0.5), print("written", flush=True))).start()
            ThreadPoolExecutor(1).submit(time.sleep, 0)

        dist.run(main)
    """)
    for launch in range(launches):                          # the first with processes of its own
        finished = (mpiexec if launch else mpi.mpiexec)(2, [path])
        assert finished.rc == 0 and not finished.stderr, finished
        assert sorted(finished.stdout.split()) == ["closed", "closed", "written", "written"], finished


@pytest.mark.parametrize("module, name", [("threading", "_shutdown"), ("atexit", "_run_exitfuncs")])
def test_a_python_without_the_private_calls_ends_in_the_ordinary_way(tmp_path, module, name):
    finished = mpi_program(tmp_path, 2, f"""
        import atexit, threading, time
        from cm.distributed import process_exit
        from cm.distributed import setup as dist

        def main():
            dist.setup_dist()
            atexit.register(print, "closed", flush=True)
            threading.Thread(target=lambda: (time.sleep(0.5), print("written", flush=True))).start()

        known = {module}.{name}
        run_early = process_exit.run_interpreter_exit
        def run_without():
            del {module}.{name}
            try:
                return run_early()
            finally:
                {module}.{name} = known
        process_exit.run_interpreter_exit = run_without
        dist.run(main)
    """)
    assert finished.rc == 0 and not finished.stderr, finished
    assert sorted(finished.stdout.split()) == ["closed", "closed", "written", "written"], finished


def test_ranks_that_have_not_met_know_nothing(monkeypatch):
    monkeypatch.setattr(dist, "_job", None)
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "4")
    for ask in (dist.get_rank, dist.get_world_size, dist.dev, dist.is_main):
        with pytest.raises(RuntimeError, match="one of 4 ranks: call dist_util.setup_dist"):
            ask()


# --- devices: no GPU is needed to share them out --------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, and nobody set up yet; returns the devices chosen with th.cuda.set_device."""
    chosen = []
    monkeypatch.setattr(dist, "_job", None)
    monkeypatch.setattr(devices, "_wanted", "auto")
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(th.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=f"gpu{index}"))
    monkeypatch.setattr(th.cuda, "set_device", chosen.append)
    with tf32.at_first(True):
        yield chosen


def rank_of(rank, nodes_and_gpus):
    facts = [{"node": node, "gpus": gpus} for node, gpus in nodes_and_gpus]
    node = facts[rank]["node"]
    return node, sum(fact["node"] == node for fact in facts[:rank]), facts


def test_a_single_process_takes_the_first_gpu(gpus, monkeypatch):
    watching = []
    monkeypatch.setattr(dist.failure, "watch_peers", watching.append)
    assert dist.dev() == th.device("cuda", 0)
    assert gpus == [th.device("cuda", 0)]
    assert tf32.now() == (False, False), "float32 is float32"
    assert [ranks.rank for ranks in watching] == [0], "NCCL does not say that a rank has failed"


def test_the_cpu_can_be_asked_for(gpus):
    dist.set_device("cpu")
    assert dist.dev() == th.device("cpu") and gpus == []
    with pytest.raises(RuntimeError, match="must come before setup_dist"):
        dist.set_device("cuda")


def test_setup_takes_the_device_that_a_command_was_told(gpus):
    dist.setup_dist(device="cpu")
    assert dist.dev() == th.device("cpu") and gpus == []
    dist.setup_dist()                                       # by code that does not know of it
    assert dist.dev() == th.device("cpu")


def test_a_background_thread_begins_at_the_gpu_of_its_rank(gpus):
    devices.background_thread("copies", th.device("cuda", 1)).submit(int).result()
    devices.background_thread("copies", th.device("cpu")).submit(int).result()
    assert gpus == [th.device("cuda", 1)]


def test_ranks_of_each_machine_count_from_its_first_gpu(gpus):
    ranks = [("left", ["a", "b"]), ("left", ["a", "b"]), ("right", ["a", "b"]), ("right", ["a", "b"])]
    assert [devices.choose(*rank_of(rank, ranks)).index for rank in range(4)] == [0, 1, 0, 1]


def test_a_crowded_machine_is_an_error_on_every_rank(gpus):
    ranks = [("left", ["a", "b"]), ("right", ["a"]), ("right", ["a"])]
    for rank in range(3):
        with pytest.raises(UserError, match="2 ranks on .* but 1 visible GPU"):
            devices.choose(*rank_of(rank, ranks))


def test_a_machine_without_gpus_among_others_is_an_error_on_every_rank(gpus):
    for rank in range(2):
        with pytest.raises(UserError, match=r"ranks \[1\] see no GPU"):
            devices.choose(*rank_of(rank, [("left", ["a"]), ("right", [])]))


def test_devices_that_do_not_exist_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "_job", None)
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="choose one of: auto, cuda, cpu"):
        dist.set_device("gpu")
    with pytest.raises(UserError, match="PyTorch sees no GPU"):
        dist.set_device("cuda")
    assert dist.dev() == th.device("cpu")


def test_closing_down_has_a_time_limit(monkeypatch):
    """A communicator of NCCL that hangs in its own end shall not hold the GPUs; waiting for the others' work may."""
    calls = []
    monkeypatch.setattr(dist.process_exit, "run_interpreter_exit", lambda: False)
    monkeypatch.setattr(dist.failure, "exit_after", lambda seconds: calls.append("limit"))
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(dist.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.dist, "destroy_process_group", lambda: calls.append("destroy"))
    monkeypatch.setattr(dist, "_job", rendezvous.Job(0, 1, "here"))
    monkeypatch.setattr(dist.failure, "end_by_itself", lambda: calls.append("end"))
    dist._leave()
    assert calls == ["barrier", "end", "limit", "destroy"]


def test_importing_is_quick_about_mpi():
    finished = start([sys.executable, "-c", "import cm.distributed.setup, sys; print('mpi4py' in sys.modules)"])
    assert finished.stdout.strip() == "False", finished


def test_more_threads_than_cores_are_one_warning(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    warning = devices.overcommitment(8, 2, 4)
    assert "OMP_NUM_THREADS=8" in warning and "each of 4" in warning and "2 a rank would fit" in warning
    assert not devices.overcommitment(2, 2, 4)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert not devices.overcommitment(8, 2, 4)

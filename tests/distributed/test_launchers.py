"""What the environment says, without starting a job."""

import os
import socket

import pytest

from cm.distributed import launchers
from cm.errors import UserError

HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}


@pytest.mark.parametrize(
    "env, launcher, rank, size, by_mpi",
    [
        (HYDRA, "mpiexec", 1, 2, True),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, "mpiexec of Open MPI", 2, 3, True),
        ({"PMIX_RANK": "2"}, "a PMIx launcher", 2, 0, True),
        (TORCHRUN, "torchrun", 3, 4, False),
        ({key: TORCHRUN[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}, "RANK and WORLD_SIZE", 3, 4, False),
        (SRUN, "srun", 5, 8, True),
        (SRUN | TORCHRUN, "torchrun", 3, 4, False),
        (SRUN | HYDRA, "mpiexec", 1, 2, True),
    ],
)
def test_the_innermost_launcher_is_found(env, launcher, rank, size, by_mpi):
    assert launchers.announcements(env)[0] == (launcher, rank, size, by_mpi)
    assert launchers.launcher_rank(env) == rank


@pytest.mark.parametrize("env", [{}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {"MASTER_ADDR": "node1"}])
def test_a_plain_python_has_no_launcher(env):
    assert launchers.announcements(env) == []
    assert (launchers.launcher_rank(env), launchers.launcher_size(env)) == (0, 1)


@pytest.mark.parametrize("env, is_told", [
    ({}, True), ({"RANK": "0", "WORLD_SIZE": "2"}, True), ({"RANK": "1", "WORLD_SIZE": "2"}, False),
    ({"RANK": "3", "WORLD_SIZE": "2"}, True), ({"RANK": "1"}, False),
])
def test_a_rank_that_no_job_has_tells_its_mistake(env, is_told):
    """There may be no rank 0 that tells it."""
    assert launchers.speaks({"MASTER_ADDR": "localhost", **env}) == is_told


def test_mpiexec_without_its_connection_is_seen():
    read_end, write_end = os.pipe()
    os.close(read_end)
    assert launchers.pmi_answers({**HYDRA, "PMI_FD": str(write_end)})
    os.close(write_end)
    assert not launchers.pmi_answers({**HYDRA, "PMI_FD": str(write_end)})
    assert not launchers.pmi_answers(HYDRA)
    assert launchers.pmi_answers({**HYDRA, "PMI_PORT": "host:1234"})
    assert launchers.pmi_answers({})


def test_mpiexec_is_told_that_a_rank_ends_by_itself():
    own, others = socket.socketpair()
    with own, others:
        env = {**HYDRA, "HYDI_CONTROL_FD": "7", "PMI_FD": str(own.fileno())}
        others.send(b"cmd=finalize_ack rc=0\n")
        launchers.finish_by_pmi(env)
        assert others.recv(100) == b"cmd=finalize\n"
        others.close()
        launchers.finish_by_pmi(env)                        # mpiexec is gone
    for other in ({}, HYDRA, env, SRUN | {"PMI_FD": "2"}):  # nobody to tell, or one who speaks otherwise
        launchers.finish_by_pmi(other)


@pytest.mark.parametrize("env, remedy", [(SRUN, "--mpi=pmi2"), (HYDRA, "mpiexec that belongs to mpi4py")])
def test_a_refusal_names_the_remedy(env, remedy):
    found = launchers.announcements(env)[0]
    message = str(launchers.refusal(found, "MPI sees one rank"))
    assert remedy in message and f"rank {found.rank} of {found.size}" in message and "MPI sees one rank" in message


@pytest.mark.parametrize(
    "mine, of_machine, threads",
    [
        (range(8), [range(8)], 8),                                  # alone
        (range(8), [range(8)] * 2, 4),                              # two share eight
        (range(8), [range(8)] * 3, 2),                              # 8/3, rounded down
        (range(2), [range(2)] * 4, 1),                              # never less than one
        (range(4, 8), [range(4), range(4, 8)], 4),                  # bound to cores of their own: nothing to share
        (range(4), [range(4), range(8)], 2),                        # four cores, each used by two
        (range(8), [range(4), range(8)], 6),                        # four of its own, half of the other four
    ],
)
def test_cores_are_shared_among_the_ranks_that_use_them(mine, of_machine, threads):
    assert launchers.share_of_cores(mine, of_machine) == threads


def test_cores_are_not_hardware_threads(monkeypatch):
    monkeypatch.setattr(launchers, "_first_thread_of_core", lambda cpu: cpu % 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert launchers.usable_cores() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "visible, chosen",
    [
        ([["a", "b"], ["a", "b"]], [0, 1]),
        ([["d", "b"], ["d", "b"]], [0, 1]),                         # CUDA_VISIBLE_DEVICES=3,1: order as given
        ([["a"], ["b"], ["c"]], [0, 0, 0]),                         # the launcher has given one to each
        ([["a", "b"], ["b"]], [0, 0]),
        ([["a", "b", "c", "d"]], [0]),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(visible, chosen):
    assert launchers.choose_gpus(visible) == chosen


def test_more_ranks_than_gpus_is_an_error_with_both_numbers(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    with pytest.raises(UserError, match=r"3 ranks on .* but 2 visible GPUs \(CUDA_VISIBLE_DEVICES=3,1\).*--device cpu"):
        launchers.choose_gpus([["a", "b"]] * 3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,1"


def test_loopback_is_found_and_never_offered_to_other_machines():
    assert launchers.interface_of("127.0.0.1") in launchers.interface_addresses()
    assert launchers.interface_of("203.0.113.7") is None
    assert not any(address.startswith("127.") for address in launchers.own_addresses())


def test_an_unknown_host_name_does_not_stop_the_search(monkeypatch):
    def unknown(*args):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(launchers, "interface_addresses", lambda: {"lo": "127.0.0.1", "eth0": "10.1.2.3"})
    assert launchers.own_addresses() == ["10.1.2.3"]


def test_only_addresses_that_answer_are_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert launchers.probe(["127.0.0.1", "not an address"], port) == {"127.0.0.1": "127.0.0.1"}
    assert launchers.probe(["127.0.0.1"], port) == {}
    assert launchers.probe([], port) == {}


def test_machines_have_names_that_processes_share():
    assert launchers.machine() == launchers.machine() and socket.gethostname() in launchers.machine()


@pytest.mark.parametrize("host, address", [
    ("localhost", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("127.0.1.1", "127.0.1.1"), ("node1", None),
    ("127.example.org", None), ("10.0.0.1", None), ("", None),
])
def test_hosts_that_mean_this_machine_alone(host, address):
    assert launchers.loopback_of(host) == address
    assert launchers.loopback_of(socket.gethostname()) is None      # other machines know it by another address


def test_whether_an_address_is_of_this_machine():
    assert launchers.is_own("127.0.0.1") and not launchers.is_own("192.0.2.255")
    assert not launchers.is_own("no-such-host.invalid")

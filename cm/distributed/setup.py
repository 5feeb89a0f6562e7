"""Ranks: how they find each other, which device each has, what they say to each other, and how a job ends.

`setup_dist` works under mpiexec, torchrun and srun, and for a plain `python` without MPI. Everything here holds for a
single process too, which needs no process group. This is the only file that imports mpi4py.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch as th
import torch.distributed as dist

from cm.distributed import failure, launchers, malloc
from cm.distributed.collectives import (
    all_gather_object,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    broadcast_object,
    gather_tensors,
    gather_to_main,
    load_state_dict,
    on_main,
    sync_params,
)
from cm.errors import UserError
from cm.registry import lookup

__all__ = [
    "all_gather_object", "all_reduce_max", "all_reduce_sum", "barrier", "broadcast_object", "dev", "gather_tensors",
    "gather_to_main", "get_local_rank", "get_rank", "get_world_size", "is_main", "load_state_dict", "on_main", "run",
    "set_device", "setup_dist", "sync_params",
]

TIMEOUT_S = 600.0
"""How long a rank waits for another, at the start and in every collective, unless told otherwise."""
LEAVING_S = 60.0
"""For MPI to close down after the last rank has finished its work."""
DEVICES = {"auto": "a GPU if there is one", "cuda": "a GPU", "cpu": "the CPU"}


@dataclass
class _Job:
    rank: int
    size: int
    node: str                                       # the same for all ranks of one machine
    store: dist.Store | None = None                 # the board where ranks leave words for each other
    mpi: Any = None                                 # the module mpi4py.MPI where the ranks met by it
    ready: bool = False
    local_rank: int = 0
    device: th.device = th.device("cpu")


_job: _Job | None = None
_wanted_device = "auto"


def set_device(name: str) -> None:
    """Choose "cpu", "cuda" or "auto", a GPU if there is one. To be called before `setup_dist`."""
    global _wanted_device
    lookup(DEVICES, name, "device")
    if _job is not None and _job.ready and name not in ("auto", _job.device.type):
        raise RuntimeError(f"set_device({name!r}) must come before setup_dist, which has taken {_job.device}")
    if name == "cuda" and not th.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no GPU: check nvidia-smi, CUDA_VISIBLE_DEVICES and the wheel")
    _wanted_device = name


def setup_dist(timeout_s: float = TIMEOUT_S) -> None:
    """Find the other ranks, take a device and a share of the cores, and open the process group. May be called again.

    Tried in this order: a torch.distributed that is already there; MPI, if a launcher of MPI has left its mark;
    torchrun's variables; a single process. gloo carries tensors on the CPU and NCCL those on GPUs.

    :param timeout_s: how long a collective waits for a missing rank before it fails.
    :raises UserError: on every rank, if a launcher speaks of ranks that cannot be reached, if there are more ranks
        than GPUs on a machine, or if only some ranks see a GPU.
    """
    job = _join(timeout_s)
    if job.ready:
        return
    with _limit(timeout_s):
        ranks = _exchange(job, {"node": job.node, "cores": launchers.usable_cores(), "gpus": _visible_gpus()})
        neighbours = [facts["cores"] for facts in ranks if facts["node"] == job.node]
        job.local_rank = sum(facts["node"] == job.node for facts in ranks[: job.rank])
        job.device = _choose_device(job, ranks)
        _set_threads(launchers.share_of_cores(ranks[job.rank]["cores"], neighbours))
        if job.device.type == "cpu":
            malloc.keep_freed_blocks()
        if job.size > 1 and not dist.is_initialized():
            if len(neighbours) == job.size and (loopback := launchers.interface_of("127.0.0.1")):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if job.device.type == "cuda" else "gloo",
                store=dist.PrefixStore("torch", job.store), rank=job.rank, world_size=job.size,
                timeout=timedelta(seconds=timeout_s),
            )
    job.ready = True


def dev() -> th.device:
    """This rank's device: "cuda" with an index into the visible GPUs, or "cpu"."""
    job = _here()
    if not job.ready:
        if job.size > 1:
            raise RuntimeError("call dist_util.setup_dist() before dev(): the ranks share out the GPUs there")
        setup_dist()
    return job.device


def get_rank() -> int:
    """0 .. world size - 1."""
    return _here().rank


def get_world_size() -> int:
    """The number of ranks; 1 for a plain `python`."""
    return _here().size


def get_local_rank() -> int:
    """The place of this rank among those of its machine, from 0; known after `setup_dist`."""
    return _here().local_rank


def is_main() -> bool:
    """True on rank 0, which alone writes files and tables."""
    return get_rank() == 0


def run(main: Callable[[], None]) -> None:
    """Call `main` so that a failure anywhere ends the whole job: `if __name__ == "__main__": dist_util.run(main)`.

    A traceback names its rank and is shown once; an error of the user's (`UserError`, a missing file) is one line.
    All ranks are gone within ten seconds, with status 1, 2 for an error of the user's, 130 for Ctrl-C, or that of
    `sys.exit`. With several ranks this never returns; a single process goes on like any Python program.
    """
    threading.excepthook = _thread_failed
    try:
        _join()
        try:
            main()
        except SystemExit as leaving:
            if leaving.code not in (None, 0):
                raise
        if get_world_size() > 1:
            _leave()
    except BaseException as error:
        if _is_alone():
            failure.exit_process(error)
            raise
        failure.abort_job(error, _ranks())


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """A job must not go on without its data or checkpoint thread."""
    if multiprocessing.parent_process() is not None:
        threading.__excepthook__(failed)           # a worker process, forked with this hook, speaks for itself only
    elif failed.exc_type is not SystemExit:
        name = failed.thread.name if failed.thread else "?"
        failure.abort_job(failed.exc_value or failed.exc_type(), _ranks(), name)


def _is_alone() -> bool:
    return (_job.size if _job else launchers.launcher_size()) == 1


def _ranks() -> failure.Ranks:
    if _job is None:
        return failure.Ranks(launchers.launcher_rank(), launchers.launcher_size(), None, _abort)
    return failure.Ranks(_job.rank, _job.size, _job.store, _abort)


def _abort(status: int) -> None:
    mpi = getattr(sys.modules.get("mpi4py"), "MPI", None)
    if mpi is None:
        launchers.abort_by_pmi(status)
    elif mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.COMM_WORLD.Abort(status)


def _leave() -> None:
    """The orderly end of several ranks.

    torch and MPI close down threads in their static destructors, which crashes now and then after all work is done:
    so the group is destroyed while everybody is here, and the interpreter's own end is skipped.
    """
    gc.collect()                                    # DDP holds the process group in a cycle
    threading._shutdown()                           # as the interpreter's end would: wait for threads still writing,
    atexit._run_exitfuncs()                         # and close what asked to be closed
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
    faulthandler.dump_traceback_later(LEAVING_S, exit=True, file=sys.__stderr__)
    if _job.mpi is not None:
        _job.mpi.COMM_WORLD.Barrier()
        _job.mpi.Finalize()
    failure.flush()
    os._exit(0)


def _here() -> _Job:
    if _job is None and launchers.launcher_size() > 1 and not dist.is_initialized():
        raise RuntimeError(f"this is one of {launchers.launcher_size()} ranks: call dist_util.setup_dist() first")
    return _join()


def _join(timeout_s: float = TIMEOUT_S) -> _Job:
    """Find the other ranks, without opening a process group yet."""
    global _job
    if _job is None:
        with _limit(timeout_s):
            _job = _find_job(timedelta(seconds=timeout_s))
    return _job


@contextlib.contextmanager
def _limit(timeout_s: float) -> Iterator[None]:
    """End this process if the others never come, showing where it waits: MPI's own waits have no limit."""
    several = launchers.launcher_size() > 1
    if several:
        faulthandler.dump_traceback_later(timeout_s + failure.LIMIT_S, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        if several:
            faulthandler.cancel_dump_traceback_later()


def _find_job(timeout: timedelta) -> _Job:
    if dist.is_initialized():
        if "cpu:gloo" not in dist.get_backend_config():
            raise UserError(
                f"torch.distributed was started with {dist.get_backend_config()!r}, and objects and arrays travel by "
                "gloo: start it with 'cpu:gloo,cuda:nccl', or leave it to setup_dist"
            )
        return _Job(dist.get_rank(), dist.get_world_size(), launchers.machine())
    launches, mpi, why = [each for each in launchers.announcements() if each.size != 1], None, ""
    for each in launches:
        if not each.by_mpi:
            return _meet_by_address(timeout)
        mpi, why = _load_mpi()
        if mpi is not None and mpi.COMM_WORLD.size > 1:
            return _meet_by_mpi(mpi, timeout)
    for each in sorted(launches, key=lambda each: each.size == 0):          # PMIx does not say how many there are
        if each.size > 1 or mpi is None:
            raise launchers.refusal(each, why)
    return _Job(0, 1, launchers.machine())


def _load_mpi() -> tuple[Any, str]:
    """mpi4py.MPI, or None; and what to say if it finds no other ranks."""
    if not launchers.pmi_answers():
        return None, "this process has no connection to that mpiexec"
    by_pmix = launchers.started_by_pmix()
    try:
        import mpi4py

        if by_pmix:
            mpi4py.rc.initialize = False            # an MPICH that was built without PMIx would end this process
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:    # RuntimeError: mpi4py is there and its MPI library is not
        return None, f"mpi4py cannot be loaded ({error}; try `pip install mpi4py mpich`)"
    version = MPI.Get_library_version()
    library = f"mpi4py's library ({version.splitlines()[0].strip()})"
    if by_pmix and not MPI.Is_initialized():
        if "MPICH" in version and "pmix" not in version.lower():
            return None, f"{library} does not speak PMIx"
        MPI.Init_thread()
    return MPI, f"{library} sees one rank only"


def _meet_by_mpi(mpi: Any, timeout: timedelta) -> _Job:
    """Rank 0 opens a store on a free port and tells everybody by MPI.

    MASTER_ADDR and MASTER_PORT are obeyed if set. Between machines the address is one that every rank has reached.
    """
    comm = mpi.COMM_WORLD
    machine = comm.Split_type(mpi.COMM_TYPE_SHARED)
    one_machine, node = machine.size == comm.size, str(machine.bcast(comm.rank))
    machine.Free()
    store, offer = None, None
    if comm.rank == 0:
        try:
            host, port = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", 0))
            # The server listens at every address; this one is only how rank 0 itself connects to it.
            store = dist.TCPStore("127.0.0.1", port, None, True, timeout, wait_for_workers=False)
            offer = [host] if host else ["127.0.0.1"] if one_machine else launchers.own_addresses(), store.port, None
        except (RuntimeError, ValueError) as error:
            offer = [], 0, f"rank 0 cannot listen at MASTER_PORT={os.environ.get('MASTER_PORT', '0 (any)')}: {error}"
    addresses, port, problem = comm.bcast(offer)
    if problem:
        raise UserError(problem)
    reached = launchers.probe(addresses, port)
    by_all = set.intersection(*(set(each) for each in comm.allgather(list(reached))))
    if not by_all:
        raise UserError(
            f"some rank cannot reach rank 0 at port {port} of {', '.join(addresses) or 'any address of its machine'}: "
            "set MASTER_ADDR to an address of its machine that all others can reach, and look for a firewall"
        )
    address = next(each for each in addresses if each in by_all)
    if not one_machine:
        _talk_through(reached[address])
    store = store or dist.TCPStore(address, port, None, False, timeout, wait_for_workers=False)
    return _Job(comm.rank, comm.size, node, store, mpi)


def _meet_by_address(timeout: timedelta) -> _Job:
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise UserError(f"{', '.join(missing)} must be set beside the rest of {', '.join(needed)}, as torchrun does")
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        for own_end in launchers.probe([os.environ["MASTER_ADDR"]], int(os.environ["MASTER_PORT"])).values():
            _talk_through(own_end)
    return _Job(rank, size, os.environ.get("GROUP_RANK") or launchers.machine(), store)


def _talk_through(own_address: str) -> None:
    """Let gloo use the interface with this address; by itself it looks the host name up, which may lead nowhere."""
    if interface := launchers.interface_of(own_address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _exchange(job: _Job, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's facts, in the order of ranks."""
    if job.store is None:
        return all_gather_object(facts)             # one process, or a process group that was already there
    board = dist.PrefixStore("facts", job.store)
    board.set(str(job.rank), json.dumps(facts))
    return [json.loads(board.get(str(rank))) for rank in range(job.size)]


def _visible_gpus() -> list[str]:
    if _wanted_device == "cpu" or not th.cuda.is_available():
        return []
    return [str(th.cuda.get_device_properties(index).uuid) for index in range(th.cuda.device_count())]


def _choose_device(job: _Job, ranks: list[dict[str, Any]]) -> th.device:
    """The device of this rank; every rank looks at all machines, so that all find the same fault."""
    blind = [rank for rank, facts in enumerate(ranks) if not facts["gpus"]]
    if len(blind) == len(ranks):
        return th.device("cpu")
    if blind:
        raise UserError(f"ranks {blind} see no GPU and the others do: repair these machines, or use --device cpu")
    chosen = {}
    for node in dict.fromkeys(facts["node"] for facts in ranks):
        chosen[node] = launchers.choose_gpus([facts["gpus"] for facts in ranks if facts["node"] == node])
    device = th.device("cuda", chosen[job.node][job.local_rank])
    th.cuda.set_device(device)
    return device


def _set_threads(count: int) -> None:
    """Launchers leave marks by which MKL takes a single thread even for a single rank, so the number is set here."""
    by_user = "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ
    if launchers.announcements() and not by_user:
        th.set_num_threads(count)

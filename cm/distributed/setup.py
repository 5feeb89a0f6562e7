"""The job that this process belongs to: its ranks, the device of each, and how the job ends.

`setup_dist` works under mpiexec, torchrun and srun, and for a plain `python` without MPI. Everything here also works in
a single process, which needs no process group. The collectives are re-exported, so that callers need one import:
`from cm.distributed import setup as dist`.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta

import torch as th
import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage] (documented, not in __all__)

from cm.distributed import devices, failure, launchers, malloc, process_exit, rendezvous, waiting
from cm.distributed.collectives import (
    all_gather_object,
    all_reduce_max,
    all_reduce_min,
    all_reduce_sum,
    barrier,
    broadcast_object,
    everywhere,
    gather_tensors,
    gather_to_main,
    load_state_dict,
    on_main,
    sync_params,
)
from cm.io import terminal
from cm.registry import lookup

__all__ = [
    "all_gather_object", "all_reduce_max", "all_reduce_min", "all_reduce_sum", "barrier", "broadcast_object", "dev",
    "everywhere", "gather_tensors", "gather_to_main", "get_local_rank", "get_rank", "get_world_size", "is_main",
    "load_state_dict", "on_main", "run", "set_device", "setup_dist", "sync_params",
]

TIMEOUT_S = 600.0
"""Default time that a rank waits for another, at the start and in every collective."""
LEAVING_S = 60.0
"""Time for the process group and MPI to close down after the last rank has finished its work."""

_job: rendezvous.Job | None = None


def set_device(name: str) -> None:
    """Choose "cpu", "cuda" or "auto", a GPU if there is one. Call it before `setup_dist`.

    :raises UserError: for another name, or for "cuda" where PyTorch sees no GPU.
    :raises RuntimeError: if `setup_dist` has already taken another device.
    """
    lookup(launchers.DEVICES, name, "device")
    if _job is not None and _job.ready and name not in ("auto", _job.device.type):
        raise RuntimeError(f"set_device({name!r}) must come before setup_dist, which has taken {_job.device}")
    devices.prefer(name)


def setup_dist(timeout_s: float = TIMEOUT_S, device: str | None = None) -> None:
    """Find the other ranks, take a device and a share of the cores, and open the process group. May be called again.

    Tried in this order: torch.distributed if it is already initialised; MPI, if an MPI launcher started the process;
    torchrun's variables; a single process. gloo sends tensors on the CPU, and NCCL those on GPUs.

    :param timeout_s: how long a collective waits for a missing rank before it fails.
    :param device: see `set_device`, which is called first; None if the device is chosen already, or is "auto".
    :raises UserError: on every rank, if a launcher announces ranks that cannot be reached, if there are more ranks
        than GPUs on a machine, if only some ranks see a GPU, or if there is none and "cuda" is wanted.
    """
    if device is not None:
        set_device(device)
    job = _join(timeout_s)
    if job.ready:
        return
    with rendezvous.time_limit(timeout_s):
        own_facts = {"node": job.node, "cores": launchers.usable_cores(), "gpus": devices.visible_gpus()}
        ranks = rendezvous.exchange(job, own_facts)
        neighbours = [facts["cores"] for facts in ranks if facts["node"] == job.node]
        job.local_rank = sum(facts["node"] == job.node for facts in ranks[: job.rank])
        job.device = devices.choose(job.node, job.local_rank, ranks)
        share = launchers.share_of_cores(ranks[job.rank]["cores"], neighbours)
        devices.set_threads(share)
        if job.rank == 0 and (warning := devices.overcommitment(th.get_num_threads(), share, len(neighbours))):
            failure.say(warning)
        if job.device.type == "cpu":
            malloc.keep_freed_blocks()
        if job.store is not None and not dist.is_initialized():
            if len(neighbours) == job.size and (loopback := launchers.interface_of("127.0.0.1")):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if job.device.type == "cuda" else "gloo",
                store=PrefixStore("torch", job.store), rank=job.rank, world_size=job.size,
                timeout=timedelta(seconds=timeout_s),
            )
    job.ready = True
    if job.device.type == "cuda":
        failure.watch_peers(_ranks())


def dev() -> th.device:
    """This rank's device: "cuda" with an index into the visible GPUs, or "cpu"."""
    job = _known_job()
    if not job.ready:
        if job.size > 1:
            raise RuntimeError("call dist_util.setup_dist() before dev(): it assigns the GPUs to ranks")
        setup_dist()
    return job.device


def get_rank() -> int:
    """0 .. world size - 1."""
    return _known_job().rank


def get_world_size() -> int:
    """The number of ranks; 1 for a plain `python`."""
    return _known_job().size


def get_local_rank() -> int:
    """The index of this rank among those of its machine, from 0; known after `setup_dist`."""
    return _known_job().local_rank


def is_main() -> bool:
    """True on rank 0, which alone writes files and tables."""
    return get_rank() == 0


def run(main: Callable[[], None], timeout_s: float = TIMEOUT_S) -> None:
    """Call `main` so that a failure on any rank ends the job on all: `if __name__ == "__main__": dist_util.run(main)`.

    A traceback names its rank and is shown once; an error of the user (`UserError`, a missing file) is one line.
    All ranks have ended within ten seconds, with status 1, 2 for an error of the user, 130 for Ctrl-C, or that of
    `sys.exit`. A single process continues like any Python program; several ranks end here.

    :param timeout_s: how long this rank waits for the others to start; what it waits for is told after ten seconds.
    """
    terminal.guard()
    threading.excepthook = _thread_failed
    try:
        _join(timeout_s)
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
    """End the job: without its data or checkpoint thread it must not continue."""
    if multiprocessing.parent_process() is not None:
        threading.__excepthook__(failed)           # a worker process, forked with this hook, must end only itself
    elif failed.exc_type is not SystemExit:
        name = failed.thread.name if failed.thread else "?"
        failure.abort_job(failed.exc_value or failed.exc_type(), _ranks(), name)


def _is_alone() -> bool:
    return (_job.size if _job else launchers.launcher_size()) == 1


def _ranks() -> failure.Ranks:
    if _job is None:
        return failure.Ranks(launchers.launcher_rank(), launchers.launcher_size(), None, _abort, _finish)
    return failure.Ranks(_job.rank, _job.size, _job.store, _abort, _finish)


def _abort(status: int) -> None:
    mpi = getattr(sys.modules.get("mpi4py"), "MPI", None)
    if mpi is None:
        launchers.abort_by_pmi(status)
    elif mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.COMM_WORLD.Abort(status)


def _finish() -> None:
    mpi = getattr(sys.modules.get("mpi4py"), "MPI", None)
    if mpi is not None and mpi.Is_initialized():
        launchers.finish_by_pmi()


def _leave() -> None:
    """End a job of several ranks after its work is done.

    torch and MPI close down threads in their static destructors, which sometimes crashes after all work is done.
    So the process group is destroyed while all ranks are still running, and the interpreter's own shutdown is skipped.
    """
    gc.collect()                                    # DDP holds the process group in a cycle
    complete = process_exit.run_interpreter_exit()
    if dist.is_initialized():
        barrier()
    failure.end_by_itself()
    failure.exit_after(LEAVING_S)                   # NCCL, too, closes down together with the other ranks
    if dist.is_initialized():
        dist.destroy_process_group()
    mpi = _join().mpi
    if mpi is not None:
        mpi.COMM_WORLD.Barrier()
        mpi.Finalize()
    failure.flush()
    if complete:
        _finish()
        os._exit(0)


def _known_job() -> rendezvous.Job:
    """The job, for functions that a single process may call before `setup_dist`, but a rank of several may not."""
    if _job is None and launchers.launcher_size() > 1 and not dist.is_initialized():
        raise RuntimeError(f"this is one of {launchers.launcher_size()} ranks: call dist_util.setup_dist() first")
    return _join()


def _join(timeout_s: float = TIMEOUT_S) -> rendezvous.Job:
    """Find the other ranks, without opening a process group yet."""
    global _job
    if _job is None:
        with rendezvous.time_limit(timeout_s), _watch_over_mpi(timeout_s):
            _job = rendezvous.find_job(timedelta(seconds=timeout_s))
    return _job


def _watch_over_mpi(timeout_s: float) -> contextlib.AbstractContextManager[None]:
    """See `waiting.mpi_wait`; nothing for ranks that meet at an address, which watch for themselves."""
    launch = next((each for each in launchers.announcements() if each.size != 1), None)
    if launch is None or not launch.by_mpi:
        return contextlib.nullcontext()
    who = f"rank {launch.rank} of {launch.size or 'several'}"
    return waiting.mpi_wait(who, timeout_s, lambda error: failure.abort_job(error, _ranks()))

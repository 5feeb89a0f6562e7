"""Which device a rank computes on, and how many threads it uses."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch as th

from cm.distributed import launchers
from cm.errors import UserError
from cm.tensors import allow_tf32

_wanted = "auto"


def prefer(name: str) -> None:
    """Set which of `launchers.DEVICES` the next call of `choose` uses.

    :raises UserError: for "cuda" where PyTorch sees no GPU.
    """
    global _wanted
    if name == "cuda" and not th.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no GPU: check nvidia-smi, CUDA_VISIBLE_DEVICES and the wheel")
    _wanted = name


def visible_gpus() -> list[str]:
    """The unique names of the GPUs that this process may use; empty if it uses the CPU."""
    if _wanted == "cpu" or not th.cuda.is_available():
        return []
    return [str(th.cuda.get_device_properties(index).uuid) for index in range(th.cuda.device_count())]


def choose(node: str, local_rank: int, ranks: Sequence[Mapping[str, Any]]) -> th.device:
    """The device of one rank, which becomes torch's current one if it is a GPU.

    Every rank checks all machines, so that all ranks find the same error.

    :param node: the machine of this rank.
    :param local_rank: its place among the ranks of that machine.
    :param ranks: for every rank of the job {"node": its machine, "gpus": see `visible_gpus`}.
    :raises UserError: if only some ranks see a GPU, or there are more ranks than GPUs on a machine.
    """
    without_gpu = [rank for rank, facts in enumerate(ranks) if not facts["gpus"]]
    if len(without_gpu) == len(ranks):
        return th.device("cpu")
    if without_gpu:
        raise UserError(f"ranks {without_gpu} see no GPU and the others do: repair these machines, or use --device cpu")
    chosen = {}
    for each in dict.fromkeys(facts["node"] for facts in ranks):
        chosen[each] = launchers.choose_gpus([facts["gpus"] for facts in ranks if facts["node"] == each])
    device = th.device("cuda", chosen[node][local_rank])
    th.cuda.set_device(device)
    allow_tf32(False)                                       # float32 means float32, unless the run asks for less
    return device


def background_thread(name: str, device: th.device) -> ThreadPoolExecutor:
    """One thread that works beside the main one with tensors of a device.

    Every new thread begins at GPU 0. The first wait or copy there would open a CUDA context of each rank of the
    machine, in that GPU's memory.
    """
    if device.type != "cuda":
        return ThreadPoolExecutor(1, name)
    return ThreadPoolExecutor(1, name, initializer=th.cuda.set_device, initargs=(device,))


def overcommitment(threads: int, fits: int, neighbours: int) -> str:
    """A warning if the ranks of this machine have more threads than it has cores; empty if they fit.

    :param threads: of this rank.
    :param fits: its share of the cores.
    :param neighbours: ranks on this machine.
    """
    names = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    if threads <= fits or not names:
        return ""
    return (f"warning: {names[0]}={os.environ[names[0]]} gives each of {neighbours} rank(s) on this machine {threads} "
            f"threads, more than its cores: training may be many times slower; {fits} a rank would fit")


def set_threads(count: int) -> None:
    """Set torch's number of threads under a launcher, unless the user has set it by OMP_NUM_THREADS or MKL_NUM_THREADS.

    Launchers set variables that make MKL use a single thread, even if the job has a single rank.
    """
    set_by_user = "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ
    if launchers.announcements() and not set_by_user:
        th.set_num_threads(count)

"""openai/consistency_models' `cm.dist_util`: ranks, their device, and files and parameters for all of them.

A compatibility module in front of `cm.distributed.setup`. The one difference: `setup_dist` here leaves a process group
of torch.distributed for a single process too, so that code may call `dist.get_world_size()`, `dist.all_gather` and
`dist.barrier` without asking how many ranks there are. The toolkit's own scripts do without one.
"""

from __future__ import annotations

import atexit
import gc
import os
from datetime import timedelta

import torch.distributed as dist

from cm.distributed import launchers
from cm.distributed import setup as ranks
from cm.distributed.setup import (
    TIMEOUT_S,
    all_gather_object,
    all_reduce_max,
    all_reduce_sum,
    barrier,
    broadcast_object,
    dev,
    gather_tensors,
    gather_to_main,
    get_local_rank,
    get_rank,
    get_world_size,
    is_main,
    load_state_dict,
    on_main,
    run,
    set_device,
    sync_params,
)

__all__ = [
    "all_gather_object", "all_reduce_max", "all_reduce_sum", "barrier", "broadcast_object", "dev", "gather_tensors",
    "gather_to_main", "get_local_rank", "get_rank", "get_world_size", "is_main", "load_state_dict", "on_main", "run",
    "set_device", "setup_dist", "sync_params",
]


def setup_dist(timeout_s: float = TIMEOUT_S) -> None:
    """Find the other ranks, take a device, and open a process group, also for one process. May be called again.

    :param timeout_s: how long a collective waits for a missing rank before it fails.
    :raises UserError: as `cm.distributed.setup.setup_dist`.
    """
    was_open = dist.is_initialized()
    ranks.setup_dist(timeout_s)
    if not dist.is_initialized():
        _open_group_of_one(timeout_s)
    if not was_open:
        atexit.register(_close_group)


def _open_group_of_one(timeout_s: float) -> None:
    """A process group without a network: its store is a table in this process, its only address the machine's own."""
    if loopback := launchers.interface_of("127.0.0.1"):     # else gloo looks the host name up, which may take long
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    store = dist.HashStore()                                # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if dev().type == "cuda" else "gloo",
        store=store, rank=0, world_size=1, timeout=timedelta(seconds=timeout_s),
    )


def _close_group() -> None:
    """Before the interpreter ends, whose order of destruction aborts a process now and then; `run` does it, too."""
    gc.collect()                                            # DDP holds the process group in a cycle
    if dist.is_initialized():
        dist.destroy_process_group()

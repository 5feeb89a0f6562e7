"""How the ranks of a job find each other: by MPI, by torchrun's variables, or as a single process.

No process group is opened here; the result is a `Job` with a store that all ranks can reach. This is the only file that
imports mpi4py.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch as th
import torch.distributed as dist

# They are documented, and only missing from the package's `__all__`.
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from cm.distributed import failure, launchers, restarts, waiting
from cm.distributed.collectives import all_gather_object
from cm.errors import UserError


@dataclass
class Job:
    """The job of this rank, as far as this rank knows it."""

    rank: int
    size: int
    node: str                                       # the same for all ranks of one machine
    store: Store | None = None                 # where ranks set values for each other; None where none is needed
    mpi: Any = None                                 # the module mpi4py.MPI where the ranks met by it
    ready: bool = False                             # whether device, threads and process group are set up
    local_rank: int = 0
    device: th.device = th.device("cpu")


@contextlib.contextmanager
def time_limit(timeout_s: float) -> Iterator[None]:
    """End this process, showing where it waits, if the other ranks never appear: MPI has no time limit of its own."""
    several = launchers.launcher_size() > 1
    if several:
        failure.exit_after(timeout_s + failure.LIMIT_S)
    try:
        yield
    finally:
        if several:
            faulthandler.cancel_dump_traceback_later()


def find_job(timeout: timedelta) -> Job:
    """Connect to the other ranks; `cm.distributed.setup.setup_dist` states which methods are tried in which order.

    :raises UserError: if a launcher announces ranks that cannot be reached.
    """
    if dist.is_initialized():
        if "cpu:gloo" not in dist.get_backend_config():
            raise UserError(
                f"torch.distributed was started with {dist.get_backend_config()!r}, and objects and arrays are sent by "
                "gloo: start it with 'cpu:gloo,cuda:nccl', or leave it to setup_dist"
            )
        return Job(dist.get_rank(), dist.get_world_size(), launchers.machine())
    launchers.check()
    launches, mpi, why = [each for each in launchers.announcements() if each.size != 1], None, ""
    for each in launches:
        if not each.by_mpi:
            return _meet_by_address(timeout)
        mpi, why = _load_mpi()
        if mpi is not None and mpi.COMM_WORLD.size > 1:
            return _meet_by_mpi(mpi, timeout)
    for each in sorted(launches, key=lambda each: each.size == 0):          # PMIx does not announce how many there are
        if each.size > 1 or mpi is None:
            raise launchers.refusal(each, why)
    return Job(0, 1, launchers.machine())


def exchange(job: Job, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of every rank (JSON values), in the order of ranks; needs no process group."""
    if job.store is None:
        return all_gather_object(facts)             # one process, or a process group that was already there
    board = PrefixStore("facts", job.store)
    board.set(str(job.rank), json.dumps(facts))
    return [json.loads(board.get(str(rank))) for rank in range(job.size)]


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


def _meet_by_mpi(mpi: Any, timeout: timedelta) -> Job:
    """Rank 0 opens a store on a free port and sends its address to all by MPI.

    MASTER_ADDR and MASTER_PORT are used if set. Between machines the address is one that every rank has reached; on one
    machine, other machines cannot connect.
    """
    comm = mpi.COMM_WORLD
    machine = comm.Split_type(mpi.COMM_TYPE_SHARED)
    one_machine, node = machine.size == comm.size, str(machine.bcast(comm.rank))
    machine.Free()
    store, offer = None, None
    if comm.rank == 0:
        try:
            host, port = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", 0))
            if one_machine and (not host or launchers.is_own(host)):
                store, addresses = _serve_at(launchers.LOOPBACK, port, None, timeout), [launchers.LOOPBACK]
            else:           # the server listens at every address; this one is only how rank 0 itself connects to it
                store = TCPStore(launchers.LOOPBACK, port, None, True, timeout, wait_for_workers=False)
                addresses = [host] if host else launchers.own_addresses()
            offer = addresses, store.port, None
        except (OSError, RuntimeError, ValueError) as error:
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
        _use_interface_of(reached[address])
    store = store or TCPStore(address, port, None, False, timeout, wait_for_workers=False)
    return Job(comm.rank, comm.size, node, store, mpi)


def _meet_by_address(timeout: timedelta) -> Job:
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them.

    With a fixed port, torchrun's store outlives a failed attempt and still has the addresses of its ranks, which cannot
    be reached any more. Every attempt therefore writes under its own prefix.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise UserError(f"{', '.join(missing)} must be set together with the rest of {', '.join(needed)}, "
                        "as torchrun does")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    wait = waiting.Wait(f"rank {rank} of {size}", timeout.total_seconds())
    store = _store_at(host, port, rank, size, wait, timeout)
    if os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        for own_end in launchers.probe([host], port).values():
            _use_interface_of(own_end)
    store = PrefixStore(f"attempt_{restarts.attempt()}", store)
    waiting.await_ranks(store, rank, size, f"{host}:{port}", wait)
    return Job(rank, size, os.environ.get("GROUP_RANK") or launchers.machine(), store)


def _store_at(host: str, port: int, rank: int, size: int, wait: waiting.Wait, timeout: timedelta) -> TCPStore:
    """The store at MASTER_ADDR, which rank 0 holds unless torchrun's agent does; waits for no rank but that one.

    Where the port is taken, the store may be one of this process, which `multi_tenant` shares.
    """
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        address = launchers.loopback_of(host)
        if address is not None:                     # it can mean this machine alone
            with contextlib.suppress(OSError):
                return _serve_at(address, port, size, timeout)
        try:
            return TCPStore(address or launchers.LOOPBACK, port, size, True, timeout, wait_for_workers=False,
                            multi_tenant=True)
        except RuntimeError as error:                       # torch's own, for a port of another process
            why = str(error).partition("message: ")[2] or str(error)
            raise UserError(f"rank 0 cannot listen at MASTER_PORT={port}: {why.splitlines()[0]}; if another job has "
                            "this port, choose a free one, as torchrun --standalone does by itself") from None
    waiting.await_address(host, port, wait)
    return TCPStore(host, port, size, False, timeout, wait_for_workers=False)


def _serve_at(address: str, port: int, size: int | None, timeout: timedelta) -> TCPStore:
    """A store that listens at one address; torch's own would at every one.

    :param size: number of ranks; None where others than this process do not look for it at this port.
    :raises OSError: if the port is taken.
    """
    descriptor, port = launchers.listen_at(address, port)
    known = size is not None
    return TCPStore(address, port, size, True, timeout, wait_for_workers=False, multi_tenant=known,
                    master_listen_fd=descriptor)


def _use_interface_of(own_address: str) -> None:
    """Let gloo use the interface with this address; otherwise it looks the host name up, which may lead nowhere."""
    if interface := launchers.interface_of(own_address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)

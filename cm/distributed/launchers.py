"""How this process was started, according to its environment: launcher, rank, cores, GPUs, addresses.

Uses neither MPI nor torch, so it is quick to import and every rule in it can be tested without starting a job.
"""

import array
import contextlib
import os
import re
import socket
import struct
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from cm.errors import UserError
from cm.registry import Table

DEVICES = {"auto": "a GPU if there is one", "cuda": "a GPU", "cpu": "the CPU"}
"""What a rank can be told to compute on -> what it then takes."""
LOOPBACK = "127.0.0.1"
BACKLOG = 4096
"""Connections that may wait at once: every rank's may."""
PROBE_S = 3.0
"""Seconds to wait for an address of another machine to answer."""


class Launch(NamedTuple):
    """The facts that a launcher has set in the environment of this process."""

    launcher: str
    rank: int
    size: int                   # ranks in the job; 0 if the launcher does not announce it
    by_mpi: bool                # the ranks meet through MPI, not through MASTER_ADDR and MASTER_PORT


class Launcher(NamedTuple):
    """The environment variables by which a launcher tells a process its rank."""

    evidence: str               # the variable that only this launcher sets
    rank: str
    size: str
    by_mpi: bool                # see `Launch`


LAUNCHERS: Table[Launcher] = Table("launcher", {
    "torchrun": Launcher("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", False),
    "mpiexec": Launcher("PMI_RANK", "PMI_RANK", "PMI_SIZE", True),
    "mpiexec of Open MPI": Launcher("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", True),
    "mpiexec of MVAPICH": Launcher("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", True),
    "a PMIx launcher": Launcher("PMIX_RANK", "PMIX_RANK", "PMIX_SIZE", True),
    "RANK and WORLD_SIZE": Launcher("MASTER_ADDR", "RANK", "WORLD_SIZE", False),
    "srun": Launcher("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", True),
})
"""The first that matches is the innermost: torchrun inside srun is torchrun, mpiexec inside a SLURM job is mpiexec."""


def announcements(env: Mapping[str, str] = os.environ) -> list[Launch]:
    """Every launcher whose variables are in `env`, the innermost first; empty for a plain `python`.

    Variables without a number are ignored here; `check` reports them.
    """
    found = []
    for name, (evidence, rank, size, by_mpi) in LAUNCHERS.items():
        if evidence in env and _is_number(env.get(rank, "")):
            ranks = env.get(size, "")
            found.append(Launch(name, int(env[rank]), int(ranks) if _is_number(ranks) else 0, by_mpi))
    return found


def check(env: Mapping[str, str] = os.environ) -> None:
    """Check the variables of the innermost launcher.

    :raises UserError: naming the variable, its value and what is allowed.
    """
    for name, (evidence, rank, size, by_mpi) in LAUNCHERS.items():
        if evidence not in env or rank not in env:
            continue
        remedy = f"; set it as {name} does, or unset {rank}, {size} and {evidence} for a single process"
        for variable, least in ((rank, 0), (size, 1)):
            value = env.get(variable, str(least))
            if not _is_number(value) or int(value) < least:
                raise UserError(f"{variable}={value!r} must be a whole number of at least {least}{remedy}")
        if size in env and int(env[rank]) >= int(env[size]):
            raise UserError(f"{rank}={env[rank]!r} must be less than {size}={env[size]!r}{remedy}")
        port = env.get("MASTER_PORT", "")
        if "MASTER_PORT" in env and (port or by_mpi) and not (_is_number(port) and int(port) < 2**16):
            others = ", or 0 for any that is free; unset it to let rank 0 choose" if by_mpi else "; choose a free one"
            raise UserError(f"MASTER_PORT={port!r} must be a port from 1 to 65535{others}")
        return


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def launcher_rank(env: Mapping[str, str] = os.environ) -> int:
    """The rank in the job, known before the ranks are connected; 0 for a plain `python`."""
    return next((launch.rank for launch in announcements(env)), 0)


def speaks(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process reports an error that all ranks share: rank 0, or a rank that no job can have."""
    own = next(iter(announcements(env)), None)
    return own is None or own.rank == 0 or 0 < own.size <= own.rank


def launcher_size(env: Mapping[str, str] = os.environ) -> int:
    """The largest job that any launcher announces; 1 for a plain `python`."""
    return max([1, *(launch.size for launch in announcements(env))])


def pmi_answers(env: Mapping[str, str] = os.environ) -> bool:
    """False if mpiexec's variables are set but its connection is closed: MPI would end this process as it starts."""
    if "PMI_RANK" not in env or "PMI_PORT" in env:
        return True
    try:
        os.fstat(int(env["PMI_FD"]))
    except (KeyError, ValueError, OSError):
        return False
    return True


def started_by_pmix(env: Mapping[str, str] = os.environ) -> bool:
    """Whether PMIx is the only way that MPI has to the other ranks: Open MPI's mpiexec, srun --mpi=pmix."""
    return "PMIX_RANK" in env and "PMI_RANK" not in env


def abort_by_pmi(status: int, env: Mapping[str, str] = os.environ) -> None:
    """Ask mpiexec to end every rank, before MPI has started: otherwise the others would wait in MPI forever.

    One line of the PMI-1 wire protocol, which the process managers of MPICH, Intel MPI and MVAPICH read.
    """
    if "PMI_FD" in env and pmi_answers(env):
        os.write(int(env["PMI_FD"]), f"cmd=abort exitcode={status}\n".encode())


def finish_by_pmi(env: Mapping[str, str] = os.environ) -> None:
    """Tell mpiexec that this rank is about to end by itself, before an `os._exit` after MPI has started.

    MPICH does so in an exit handler of the C library, which `os._exit` skips. mpiexec then treats the closed connection
    as a crash and kills the ranks that have not ended yet, and the job ends with their status, 9.
    """
    if "HYDI_CONTROL_FD" in env and "PMI_FD" in env and pmi_answers(env):       # of MPICH's mpiexec, and its kin
        with contextlib.suppress(OSError):
            os.write(int(env["PMI_FD"]), b"cmd=finalize\n")
            os.read(int(env["PMI_FD"]), 1024)               # the answer: it has been heard


def refusal(launch: Launch, why: str) -> UserError:
    """The error for a launcher that announces several ranks that this process cannot reach."""
    if launch.launcher == "srun":
        remedy = (
            "start with `srun --mpi=pmi2`, with `mpiexec` inside the allocation, or with torchrun; "
            "for a single process, unset SLURM_STEP_NUM_TASKS"
        )
    else:
        remedy = (
            f"start with the mpiexec that belongs to mpi4py ({sys.prefix}/bin/mpiexec, if it is there), rebuild mpi4py "
            "for the MPI in use, or start with torchrun; for a process of its own inside a rank, clear the PMI_*, "
            "PMIX_* and OMPI_* variables"
        )
    size = launch.size or "several"
    return UserError(f"{launch.launcher} says this is rank {launch.rank} of {size}, but {why}: {remedy}.")


def machine() -> str:
    """A name of this machine; it includes the boot id, because host names are not always unique."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()} {file.read().strip()}"
    except OSError:
        return socket.gethostname()


def usable_cores() -> list[int]:
    """The cores that this process may run on: one number per core, not per hardware thread."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    return sorted({_first_thread_of_core(cpu) for cpu in os.sched_getaffinity(0)})


def _first_thread_of_core(cpu: int) -> int:
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
            return int(file.read().replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return cpu


def share_of_cores(mine: Collection[int], of_machine: Sequence[Collection[int]]) -> int:
    """Threads a rank may use: its cores, each divided among the ranks that may run on it; at least 1.

    :param mine: the cores of this rank.
    :param of_machine: the cores of every rank on this machine, this one's included. Ranks that the launcher has
        bound to cores of their own keep them all.
    """
    share = sum(1 / sum(core in cores for cores in of_machine) for core in mine)
    return max(1, int(share + 1e-6))


def choose_gpus(visible: Sequence[Sequence[str]]) -> list[int]:
    """One GPU for each rank of a machine, as an index into the GPUs that this rank sees.

    In the order of ranks each takes the first GPU that is still free. So ranks that see the same GPUs spread over them,
    and ranks that a launcher has given one GPU each keep it.

    :param visible: for each rank of this machine, the unique names of the GPUs it sees.
    :raises UserError: if there are more ranks than GPUs.
    """
    taken, chosen = set(), []
    for names in visible:
        free = [index for index, name in enumerate(names) if name not in taken]
        if not free:
            count = len({name for seen in visible for name in seen})
            raise UserError(
                f"{len(visible)} ranks on {socket.gethostname()} but {count} visible GPU{'s' * (count != 1)} "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}): start at most {count} "
                "per machine, make more GPUs visible, or use the CPU with --device cpu."
            )
        chosen.append(free[0])
        taken.add(names[free[0]])
    return chosen


def interface_addresses() -> dict[str, str]:
    """IPv4 address of each network interface, {"lo": "127.0.0.1", ...}; empty on systems other than Linux."""
    if sys.platform != "linux":
        return {}
    import fcntl

    SIOCGIFADDR, found = 0x8915, {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            request = array.array("B", struct.pack("256s", name.encode()[:15]))
            try:
                fcntl.ioctl(sock.fileno(), SIOCGIFADDR, request)
            except OSError:                                         # an interface without an IPv4 address
                continue
            found[name] = socket.inet_ntoa(request[20:24])
    return found


def interface_of(address: str) -> str | None:
    """The network interface with this address; None if there is none."""
    return next((name for name, own in interface_addresses().items() if own == address), None)


def own_addresses() -> list[str]:
    """Addresses at which another machine might reach this one, the most likely first, without loopback."""
    try:
        by_name = [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:                                                 # a host name that cannot be resolved
        by_name = []
    addresses = dict.fromkeys([*by_name, *interface_addresses().values()])
    return [address for address in addresses if not address.startswith("127.")]


def is_own(host: str) -> bool:
    """Whether a name or an IPv4 address leads to this machine; on systems other than Linux only a loopback address."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError:
        return False
    mine = set(interface_addresses().values())
    return bool(found) and all(each in mine or each.startswith("127.") for each in found)


def loopback_of(host: str) -> str | None:
    """The loopback address, if the host is one: 127.x.y.z, or localhost.

    The machine's own name does not, although it often leads to 127.0.1.1 here: others know it by another address.
    """
    if host == "localhost":
        return LOOPBACK
    return host if re.fullmatch(r"127(\.\d{1,3}){3}", host) else None


def listen_at(address: str, port: int) -> tuple[int, int]:
    """Open a socket that listens at one address of this machine; returns its descriptor and its port.

    :param port: 0 for any free port.
    :raises OSError: if the port is taken.
    """
    server = socket.create_server((address, port), backlog=BACKLOG)
    port = server.getsockname()[1]
    return server.detach(), port


def probe(addresses: Sequence[str], port: int) -> dict[str, str]:
    """Which of `addresses` answer at `port`, each with this machine's own address in the connection."""

    def local_end(address: str) -> str | None:
        try:
            with socket.create_connection((address, port), timeout=PROBE_S) as connection:
                return connection.getsockname()[0]
        except OSError:
            return None

    if not addresses:
        return {}
    with ThreadPoolExecutor(len(addresses)) as pool:
        ends = list(pool.map(local_end, addresses))
    return {address: end for address, end in zip(addresses, ends) if end}

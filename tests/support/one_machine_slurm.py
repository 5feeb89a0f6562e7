"""A SLURM cluster of this machine alone, for tests: its own munged, slurmctld and slurmd, and folders for their files.

It needs the programs (Debian: slurm-wlm and munge) and root, as slurmd starts jobs for other users.
"""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("srun", "slurmctld", "slurmd", "munged")
UP_WITHIN, DOWN_WITHIN = 30.0, 10.0                         # seconds


def why_not() -> str:
    """Why no cluster can be started here; empty if it can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"         # where Debian has the daemons
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if missing:
        return f"there is no {', '.join(missing)} here: SLURM is not installed (as root, `make slurm` does that)"
    return "" if os.geteuid() == 0 else "only root can start the daemons of SLURM"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A running cluster of one node with all processors of this machine: the variables that its commands need."""
    munge = Path(f"/run/cm-munge-{os.getpid()}")            # its user cannot look into folders of the tests
    config = folder / "slurm.conf"
    env = {"SLURM_CONF": str(config)}
    try:
        start_munge(munge)
        config.write_text(configuration(folder, munge / "socket"))
        for daemon in ("slurmctld", "slurmd"):
            subprocess.run([daemon, "-f", config], env=os.environ | env, check=True, timeout=UP_WITHIN)
        wait_until(lambda: idle(env), UP_WITHIN, "the node of the SLURM cluster is not idle")
        yield env
    finally:
        for pid_file in (folder / "slurmd.pid", folder / "slurmctld.pid", munge / "pid"):
            stop(pid_file)
        shutil.rmtree(munge, ignore_errors=True)


def start_munge(home: Path) -> None:
    """munged under its own user, with a key of its own and all its files in `home`."""
    user = pwd.getpwnam("munge")
    home.mkdir(mode=0o755)
    key = home / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    for path in (home, key):
        os.chown(path, user.pw_uid, user.pw_gid)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    subprocess.run(
        ["munged", "--force", *(f"--{flag}={home / name}" for flag, name in files.items())],
        user=user.pw_uid, group=user.pw_gid, extra_groups=[], check=True, timeout=UP_WITHIN)


def configuration(folder: Path, socket: Path) -> str:
    """slurm.conf: two daemons on loopback, no accounting, jobs that share the machine.

    The first job has a number that no cluster before had: MPICH names its shared memory by it, and killed jobs leave
    theirs behind.
    """
    host = os.uname().nodename.partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return f"""
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
FirstJobId={1 + secrets.randbelow(60_000_000)}
AuthType=auth/munge
AuthInfo=socket={socket}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory={memory // 2} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE OverSubscribe=FORCE State=UP
"""


def idle(env: dict[str, str]) -> bool:
    """Whether the only node takes jobs."""
    command = ["sinfo", "--noheader", "--format", "%t"]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True).stdout.strip() == "idle"


def wait_until(happened, seconds: float, otherwise: str) -> None:
    """:raises TimeoutError: saying `otherwise`, if it has not happened in time."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"{otherwise} after {seconds:.0f} s")
        time.sleep(0.2)


def stop(pid_file: Path) -> None:
    """End the daemon that wrote this file, by kill -9 where it does not end by itself."""
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), DOWN_WITHIN, "still running")
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return

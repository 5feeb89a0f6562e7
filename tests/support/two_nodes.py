"""Two machines in one: network namespaces with host names and addresses of their own, joined by a switch.

Nothing of it outlives a test: all lies in namespaces of one process, and goes with it. Root is not needed where the
kernel lets users have namespaces. Host names lead nowhere, as in a cluster without DNS.

10.77.0.254 starts the job, 10.77.0.1 and 10.77.0.2 are the nodes; `ip link set port2 down` there cuts node 2 off.
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from support.mpi import Finished, find_mpiexec, start

NAMESPACES = ["unshare", *(["--user", "--map-root-user"] if os.getuid() else []), "--net", "--mount", "--pid", "--uts",
              "--fork", "--kill-child", "--mount-proc"]

WORLD = """
    mount -t tmpfs tmpfs /run
    ip link set lo up
    ip link add switch type bridge
    ip addr add 10.77.0.254/24 dev switch
    ip link set switch up
    for n in 1 2; do
        ip netns add node$n
        ip link add port$n type veth peer name eth0 netns node$n
        ip link set port$n master switch up
        ip -n node$n addr add 10.77.0.$n/24 dev eth0
        ip -n node$n link set eth0 up
        ip -n node$n link set lo up
    done
"""

# Called like ssh: options, an address, a command. A node shares the disk of the other, and neither name nor memory.
SSH = """#!/bin/sh
    while [ "${1#-}" != "$1" ]; do shift; done
    node=node${1##*.}; shift
    exec ip netns exec $node unshare --uts sh -c "hostname $node; mount -t tmpfs tmpfs /dev/shm; exec $*"
"""


@functools.cache
def why_not() -> str:
    """Why this machine cannot be two; empty if it can."""
    missing = [tool for tool in ("unshare", "ip", "mount", "sh") if not shutil.which(tool)]
    if missing:
        return f"two nodes need the tools {', '.join(missing)} (util-linux, iproute2)"
    tried = subprocess.run([*NAMESPACES, "sh", "-euc", WORLD], capture_output=True, text=True, errors="replace")
    return "" if tried.returncode == 0 else f"no network namespaces here, as root or user: {tried.stderr.strip()}"


def on_two_nodes(folder: Path, script: str, timeout: float = 60, env: Mapping[str, str] | None = None) -> Finished:
    """Run a shell script at 10.77.0.254; in it, $ssh reaches a node, and $mpiexec starts ranks on both.

    :param folder: for the files that this needs.
    """
    ssh, hosts, job = folder / "ssh", folder / "hosts", folder / "job.sh"
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    job.write_text(WORLD + script)                          # as a file, so that no process but a rank's names its words
    hosts.write_text("10.77.0.1:2\n10.77.0.2:2\n")
    mpiexec = f"{find_mpiexec()} -launcher ssh -launcher-exec {ssh} -localhost 10.77.0.254 -iface switch -f {hosts}"
    variables = {"ssh": str(ssh), "mpiexec": mpiexec, "python": sys.executable}
    return start([*NAMESPACES, "sh", "-eu", job], timeout, {**variables, **(env or {})})

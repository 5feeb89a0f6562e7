"""A process that has imported torch, and programs forked from it: the two ends of `support.warm`.

`python warm_process.py --serve TESTS < SOCKET` is that process; it ends when the process TESTS does.
`python -S warm_process.py NAME PROGRAM...` is a stand-in for `python PROGRAM...`: it gives its arguments, variables,
folder and open streams to the process that listens at NAME, passes signals on, and ends as the program does. If it is
killed, so is the program.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
from types import ModuleType

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
ABOVE = 1000                                                # streams are kept from there while they change places


def stand_in(name: str, words: list[str]) -> None:
    """Have the program run elsewhere, and end like it."""
    streams = [0, 1, 2, *(int(os.environ[each]) for each in ["PMI_FD"] if each in os.environ)]
    streams = [fd for fd in streams if os.path.exists(f"/proc/self/fd/{fd}")]
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)     # until there is somebody to pass them on to
    for signum in PASSED_ON:
        signal.signal(signum, lambda signum, _: link.send(bytes([signum])))
    link.connect(f"\0{name}{('even', 'odd')[int(os.environ.get('PMI_RANK', 0)) % 2]}")
    request = {"words": words, "variables": dict(os.environ), "folder": os.getcwd(), "streams": streams}
    socket.send_fds(link, [json.dumps(request).encode()], streams)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    status = int(link.recv(100) or 1)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(listener: socket.socket, tests: int) -> list[str]:
    """Fork a keeper for each connection until the process `tests` ends; only the programs return, with their words."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)           # nobody asks how a keeper ended
    end = os.pidfd_open(tests)
    while end not in select.select([listener, end], [], [])[0]:
        link, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            os.close(end)
            return keep(link)
        link.close()
    sys.exit()


def keep(link: socket.socket) -> list[str]:
    """Fork the program that is asked for, and report how it ended; only the program returns."""
    data, received, _, _ = socket.recv_fds(link, 2**20, 10)
    program = os.fork()
    if program == 0:
        link.close()
        return become(received, **json.loads(data))
    for each in received:
        os.close(each)
    end = os.pidfd_open(program)
    while end not in select.select([link, end], [], [])[0]:
        signum = link.recv(1)                               # nothing once the stand-in is gone
        os.kill(program, signum[0] if signum else signal.SIGKILL)
        if not signum:
            os._exit(0)
    link.send(str(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])).encode())
    os._exit(0)


def become(
    received: list[int], words: list[str], variables: dict[str, str], folder: str, streams: list[int],
) -> list[str]:
    """Take over what a new process has from the one that starts it."""
    for fd in received:
        os.dup2(fd, ABOVE + fd)
        os.close(fd)
    for fd, place in zip(received, streams, strict=True):
        os.dup2(ABOVE + fd, place)
        os.close(ABOVE + fd)
    for place, name in enumerate(("stdin", "stdout", "stderr")):
        if place not in streams:
            with contextlib.suppress(OSError):
                os.close(place)
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    return words


def leave_at_the_end(inherited: dict[str, ModuleType]) -> None:
    """Do not take the inherited modules apart at the program's end, which copies their pages and costs 0.2 s.

    Python and C++ end as ever what the program has imported and made itself.
    """
    import atexit
    import ctypes

    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)                          # called before what libraries have registered so far
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
    atexit.register(lambda: [sys.modules.pop(name, None) for name in inherited])


def main() -> None:
    """Import once, and run a program in each fork as `python` does."""
    import gc
    import importlib
    import runpy

    import numpy
    import torch

    for name in ("numpy.ma", "PIL.ImageDraw", "safetensors.torch", "torch._dynamo"):
        importlib.import_module(name)                       # which most programs of the toolkit import
    gc.collect()
    gc.freeze()                                             # pages that a collection does not touch are never copied
    inherited = dict(sys.modules)
    sys.argv = serve(socket.socket(fileno=0), int(sys.argv[2]))
    leave_at_the_end(inherited)
    numpy.random.seed()                                     # numbers of its own; Python's `random` sees to that itself
    torch.seed()
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = ""
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main() if sys.argv[1] == "--serve" else stand_in(sys.argv[1], sys.argv[2:])

"""Several ways of doing one thing, each timed in a process that is as its users have it.

The toolkit's commands change settings of their process, of memory for example. The plain way has none of them, so the
two cannot share a process.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection

import torch as th

from bench.timing import WARM_UP, Times, make_and_take_turns
from cm.distributed import setup as dist

Job = Callable[[], object]


def take_turns_apart(
    makers: Mapping[str, Callable[[], Job]], device: th.device, repeats: int = 5, plain: Collection[str] = ()
) -> dict[str, Times]:
    """Run all contestants in turn, A B C A B C ..., on a CPU each in a process of its own.

    On a GPU they share the process: the settings are of the CPU's memory, and the GPU's would not do for all at once.

    :param makers: functions that make what is timed; they can be pickled.
    :param plain: contestants whose process is left as Python starts it.
    """
    if device.type != "cpu":
        return make_and_take_turns(makers, device, repeats)
    with ExitStack() as stack:
        contestants = {name: stack.enter_context(Contestant(make, name in plain)) for name, make in makers.items()}
        rounds = [{name: each.run() for name, each in contestants.items()} for _ in range(WARM_UP + repeats)]
    return {name: Times(tuple(each[name] for each in rounds[WARM_UP:])) for name in makers}


class Contestant:
    """A process that waits for its turns."""

    def __init__(self, make: Callable[[], Job], plain: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, self.its_end = context.Pipe()
        order = self.its_end, make, plain, th.get_num_threads()
        self.process = context.Process(target=serve, args=order, daemon=True)

    def __enter__(self) -> Contestant:
        self.process.start()
        self.its_end.close()                                # so that the link ends with the process
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()
        self.process.join()

    def run(self) -> float:
        """Seconds of one run.

        :raises RuntimeError: if it fails; its process has told why on stderr.
        """
        try:
            self.link.send("run")
            return self.link.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RuntimeError(f"a contestant ended with status {self.process.exitcode}") from None


def serve(link: Connection, make: Callable[[], Job], plain: bool, threads: int) -> None:
    """The contestant's process: makes a run whenever it is asked, and answers with its seconds."""
    if not plain:
        dist.setup_dist(device="cpu")
    th.set_num_threads(threads)
    job = make()
    with suppress(EOFError):                                # the other end is closed: enough
        while link.recv():
            begun = time.perf_counter()
            job()
            link.send(time.perf_counter() - begun)

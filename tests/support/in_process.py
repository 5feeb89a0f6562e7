"""Commands in this process instead of one of their own, which would import torch again."""

import os
import sys
from pathlib import Path

from cm.logging import logger
from cm.quickstart import measure
from evaluations import evaluator
from support.as_module import as_module


def execute(command, **variables):
    """In place of `cm.quickstart.stages.execute`, for commands without ranks; an error is raised here."""
    _, *words = command
    before = sys.argv, dict(os.environ)
    os.environ.update(variables)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            {"cm.quickstart.measure": lambda: measure.main(*map(Path, words[2:])),
             "evaluations.evaluator": lambda: evaluator.main(words[2:])}[words[1]]()
        else:
            sys.argv = words
            module = as_module(Path(words[0]))
            module.main(module.read_flags())
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])
        logger.reset()
    return 0

"""Runs the commands of a page one after the other in one process, which saves the imports of each.

    python page_commands.py COMMANDS.json        # in the folder that holds the files of the page

`cd FOLDER` changes the folder; `parse python ...` ends when the command has read its arguments. What a plugin has
registered is taken out after its command, as it would be gone with the process.
"""

import argparse
import contextlib
import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

from cm.config import plugins

ROOT = Path(__file__).resolve().parents[2]


def tables():
    from cm.checkpoints.formats import FORMATS as weights
    from cm.data.sources import FORMATS as data
    from cm.distributed.launchers import LAUNCHERS
    from cm.logging import FORMATS as logs
    from cm.networks.edm import EDM_NETWORKS
    from cm.objectives import DENOISING
    from cm.samplers import SAMPLERS
    from evaluations.features import EXTRACTORS
    from evaluations.metrics import METRICS

    return weights, data, LAUNCHERS, logs, EDM_NETWORKS, DENOISING, SAMPLERS, EXTRACTORS, METRICS


def forget_plugins():
    from cm.registry import added

    for table in tables():
        for name in [each.name for each in added(table.what)]:
            table.unregister(name)
    plugins._loaded.clear()
    for name in [name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(".")]:
        del sys.modules[name]


@contextlib.contextmanager
def only_parsed():
    """Commands end when they have read their arguments, which they must."""
    original, read = argparse.ArgumentParser.parse_args, []

    def parse_args(parser, args=None, namespace=None):
        read.append(original(parser, args, namespace))
        raise SystemExit(0)

    argparse.ArgumentParser.parse_args = parse_args
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = original
    assert read, f"{sys.argv} has read no arguments"


def run(command):
    """A `python` command in this process, any other by the shell."""
    words = shlex.split(command)
    if words[0] == "cd":
        return os.chdir(words[1])
    if words[0] == "parse":
        with only_parsed():
            return run(command.removeprefix("parse "))
    variables = [words.pop(0) for _ in range(next(i for i, word in enumerate(words) if "=" not in word))]
    if words[0] != "python":
        subprocess.run(command, shell=True, check=True)
        return
    os.environ.update(word.split("=", 1) for word in variables)
    if words[1] == "-c":
        exec(words[2], {"__name__": "__main__"})
    else:
        sys.argv = words[1:]
        script = ROOT / words[1]
        sys.path[0] = str(script.parent)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            if end.code:                                    # otherwise the next command is to run
                raise
        finally:
            sys.path[0] = ""                                # as it is for `python -c`
    for word in variables:
        del os.environ[word.split("=", 1)[0]]


if __name__ == "__main__":
    sys.path[0] = ""
    for line in json.loads(Path(sys.argv[1]).read_text()):
        print(f"$ {line}", flush=True)
        run(line)
        forget_plugins()

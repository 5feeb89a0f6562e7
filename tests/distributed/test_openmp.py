"""Threads sleep after a short spin: the variables are set before torch is loaded, unless the user has set one."""

import re
from pathlib import Path

import pytest

from cm.distributed import openmp
from support.mpi import ROOT, python

SAID = re.compile(r"GOMP_SPINCOUNT = '(\w+)'")


def test_a_choice_of_the_users_stays():
    for name in openmp.BY_THE_USER:
        env = {name: "x"}
        openmp.wait_shortly(env)
        assert env == {name: "x"}
    env = {}
    openmp.wait_shortly(env)
    assert env == openmp.SHORT_WAIT


@pytest.mark.parametrize("own, count", [({}, "2000"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")])
def test_libgomp_reads_it(own, count):
    """As torch's wheels bring it; an OpenMP of another maker says nothing of the kind."""
    source = "from cm.config import early_exit; early_exit.parse_or_exit(dict); import torch; torch.ones(4)"
    done = python(["-c", source], env={"OMP_DISPLAY_ENV": "VERBOSE", **own})
    assert done.rc == 0, done
    said = SAID.findall(done.stderr)
    assert said == [count] or not said and "GOMP" not in done.stderr, done


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")) + [
    ROOT / "evaluations" / name for name in ("evaluator.py", "fid.py", "th_evaluator.py")
], ids=lambda path: path.name)
def test_every_command_sets_it_before_it_imports_torch(path: Path):
    """At its top a command imports neither torch nor what imports it; then it goes through `early_exit`."""
    source = path.read_text()
    assert re.search(r"early_exit\.(run_script|run_training|parse_or_exit)\(|command\.start\(", source)
    top = source.split("\ndef ")[0].split("if TYPE_CHECKING:")[0]
    assert not re.search(r"^(import|from) torch", top, re.M)

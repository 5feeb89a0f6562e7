"""Files made to take all memory or all time are refused in seconds, and what is no file is not waited for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.mpi import clean_environment
from system import hostile_cases

HERE = Path(__file__).resolve()
SECONDS = 10


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of a single process, whose address space is limited to 1 GiB more than its imports take."""
    environment = clean_environment() | {"PYTHONPATH": f"{HERE.parents[2]}:{HERE.parents[1]}"}
    done = subprocess.run(
        [sys.executable, HERE.with_name("hostile_cases.py"), tmp_path_factory.mktemp("hostile")], env=environment,
        capture_output=True, text=True, timeout=300,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"it died of {rows[-1:]}: {done.stderr[-2000:]}"
    return {name: rest for name, *rest in rows}


@pytest.mark.parametrize("name", hostile_cases.CASES)
def test_it_is_refused_in_time(outcomes, name):
    kind, text, seconds = outcomes[name]
    assert kind == ("read" if name in hostile_cases.HARMLESS else "refused"), text
    assert "allocate memory" not in text and len(text) < 2000
    assert seconds < SECONDS

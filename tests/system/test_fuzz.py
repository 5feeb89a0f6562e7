"""Readers of files, fed with garbage and with damaged files: they read, or say in a UserError why not.

Nothing else may happen: no other exception, no crash, no more memory than LIMIT_BYTES, no more time than LIMIT_S. The
same examples every time; `make fuzz MINUTES=30` feeds others.
"""

import os
import resource
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from cm.errors import UserError
from system.fuzz_formats import READERS

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 40))
LIMIT_BYTES = 2**30                             # over what this process has anyway: the largest file here has 1 MB
LIMIT_S = 10.0
pytestmark = pytest.mark.filterwarnings("ignore")


def limit_memory():
    """Let this process have no more than LIMIT_BYTES besides what it has; returns the limits that it had."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        here = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + LIMIT_BYTES, before[1]))
    return before


def feed(reader, path, examples, start=None):
    """Let a reader read damaged files; how many were read and how many refused.

    :param start: of the random numbers; None for the same examples every time.
    """
    outcomes = Counter()

    def read(data):
        path.write_bytes(data)
        begun = time.monotonic()
        try:
            reader.read(str(path))
            outcomes["read"] += 1
        except UserError as error:
            assert "allocate memory" not in str(error)              # torch's words when LIMIT_BYTES were not enough
            outcomes["refused"] += 1
        assert time.monotonic() - begun < LIMIT_S

    options = settings(max_examples=examples, derandomize=start is None, deadline=None, database=None,
                       suppress_health_check=list(HealthCheck))
    test = options(given(reader.files | st.binary(max_size=300))(read))
    (test if start is None else seed(start)(test))()
    return outcomes


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    before = limit_memory()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", READERS)
def test_a_sound_file_is_read(tmp_path, name):
    """Else the test below would show nothing."""
    path = READERS[name].prepare(tmp_path)
    path.write_bytes(READERS[name].good)
    READERS[name].read(str(path))


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(tmp_path, name):
    reader = READERS[name]
    feed(reader, reader.prepare(tmp_path), max(1, int(EXAMPLES * reader.share)))

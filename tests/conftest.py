"""One thread per test process: the suite runs on as many processes as there are cores. No test writes into a home."""

import gc
import os
import random
import sys
import zlib

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch as th

from cm.io import terminal
from cm.logging import logger

th.set_num_threads(1)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)             # each of hundreds of processes would compile the toolkit
sys.dont_write_bytecode = False

LONGEST = (                                                 # by their CPU seconds, or by how long they wait
    "test_learning.py", "test_wheel.py", "test_resume.py", "test_soak.py", "test_scripts.py", "test_terminals.py",
    "test_signals.py", "test_original_calls.py", "test_readme_commands.py", "test_setup.py", "test_second_device.py",
    "test_suites.py", "test_methods.py", "test_few_step.py", "test_failure.py", "test_compile.py", "test_engine.py",
    "test_sharding.py", "test_two_nodes.py", "test_page.py", "test_guidance.py", "test_orders.py", "test_loop.py",
    "test_fp16.py", "test_memory_estimate.py", "test_ternary_search.py", "test_callbacks.py", "test_tf_graph.py",
    "test_graph_operations.py", "test_png.py", "test_killed_saves.py", "test_start_up.py", "test_restarts.py",
)


def pytest_addoption(parser):
    parser.addoption("--on", choices=("cuda", "cpu"), help="run the tests of the mark `cuda` on this device; the CPU "
                     "can stand in for a GPU, to try the tests; all other tests need a run without this option")


def pytest_configure(config):
    """Without --on, tests find no GPU: they start more ranks than a machine may have, and compare bytes.

    pytest-xdist would begin with the files of many tests, and the longest have few.
    """
    if config.option.on is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""             # torch reads it when it first looks for a GPU
    elif config.option.on == "cuda" and not th.cuda.is_available():
        raise pytest.UsageError("--on cuda: PyTorch sees no GPU; --on cpu (make test-gpu ON=cpu) tries these tests")
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    """The longest files first: whoever gets one last is waited for by all other processes."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if config.option.on is None and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make test-gpu"))


@pytest.fixture(scope="session")
def gpu(pytestconfig):
    """The device of --on."""
    return pytestconfig.option.on


def pytest_collection_finish():
    """What the files of tests have imported is never garbage, and takes a second to look through."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A test that sets no seed draws the same numbers whenever and after whichever others it runs."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    th.manual_seed(seed)


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory):
    """The folder for caches, for programs that tests start too."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(autouse=True)
def stdout_is_for_people():
    """A test that has parsed --dry_run leaves stdout as it was."""
    yield
    terminal.keep_stdout_for_data(False)


@pytest.fixture(autouse=True, scope="module")
def no_log_is_left_open():
    """Which tests run in a process before others is chance."""
    yield
    logger.reset()


@pytest.fixture
def images(tmp_path):
    """The path of twenty small images with labels of three classes; the log that a run opens is closed after it."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels, arr_1=np.arange(20) % 3)
    yield str(tmp_path / "images.npz")
    logger.reset()

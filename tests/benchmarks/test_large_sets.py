"""The large sets of the benchmark, in small: the plain way finds in them what the toolkit finds."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import large_sets

from cm.data.sources import open_source


@pytest.mark.parametrize("title", large_sets.SETS)
def test_both_ways_find_the_same(tmp_path, title):
    name, make, plain = large_sets.SETS[title]
    make(tmp_path / name, 1200)
    source, found = open_source(str(tmp_path / name), large_sets.SIDE), plain(str(tmp_path / name))
    assert len(source) == 1200 and source.num_classes == 1000
    assert np.array_equal(source.labels, found[-1])
    if title != "npz":
        assert [source.name(i) for i in range(1200)] == found[-2]
    assert source.image(1199).shape == (large_sets.SIDE, large_sets.SIDE, 3)

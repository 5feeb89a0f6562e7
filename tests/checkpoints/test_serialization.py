"""Tensors and plain values are written; what no reader takes back is not."""

from pathlib import Path

import numpy as np
import pytest

from cm.checkpoints import manifest


@pytest.mark.parametrize("value", [np.float64(1), Path("ref.npz"), type("Word", (str,), {})("0.9")])
def test_what_no_reader_would_take_back_is_not_written(tmp_path, value):
    """A checkpoint is read as data only: an object in it would be found out when the run is to go on."""
    with pytest.raises(TypeError, match="tensors and plain values, not (float64|PosixPath|Word)"):
        manifest.save(str(tmp_path), 1, {"trainer": {"watchers": {"settings": [value]}}}, {}, 1)
    assert manifest.newest(str(tmp_path)) is None

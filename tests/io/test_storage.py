"""A file appears whole or not at all."""

import pytest
import torch as th

from cm.checkpoints import serialization
from cm.errors import UserError
from cm.io import storage


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    serialization.save_tensors(str(path), {"a": th.ones(2)})

    def breaks(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*x.pt.*No space left.*MiB are free"):
        storage.write_atomically(str(path), breaks)
    assert th.load(path, weights_only=True)["a"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]

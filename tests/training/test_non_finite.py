"""A loss that is not finite stops the run before the update."""

import pytest
import torch as th

from cm.training.loop import NonFiniteError
from support.training import loop


def test_nan_stops_the_run_before_the_update(images, tmp_path):
    training = loop(images, tmp_path, 5)
    batch = next(training.data)
    batch.images[2] = float("nan")
    before = [p.detach().clone() for p in training.trainer.master_params]
    with pytest.raises(NonFiniteError, match=r"step 0: .*not finite for 1 of its 8 samples: image \d+ at .*untouched"):
        training.run_step(batch)
    assert all(th.equal(a, b) for a, b in zip(before, training.trainer.master_params))

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


def test_no_checkpoint_is_promised_before_there_is_one(images, tmp_path):
    training = loop(images, tmp_path, 5)
    batch = next(training.data)
    batch.images[2] = float("nan")
    with pytest.raises(NonFiniteError, match=f"Lower --lr, .*; no checkpoint has been saved in {tmp_path} yet"):
        training.run_step(batch)
    training.save()
    with pytest.raises(NonFiniteError, match=f"the newest checkpoint in {tmp_path} is good"):
        training.run_step(batch)


def test_a_broken_teacher_is_named_instead_of_the_learning_rate(images, tmp_path):
    training = loop(images, tmp_path, 5, mode="consistency_distillation")
    with th.no_grad():
        next(training.teacher_model.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="The weights of teacher_model are not finite: look at the file") as error:
        training.run_step(next(training.data))
    assert "--lr" not in str(error.value)

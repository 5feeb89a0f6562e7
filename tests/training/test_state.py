"""What a checkpoint of training holds goes back to where it came from."""

from dataclasses import replace

import pytest
import torch as th

from cm.checkpoints import manifest
from cm.errors import UserError
from cm.training import state
from support.training import loop, run


def test_going_on_makes_no_second_copy(images, tmp_path):
    """Averages are filled where they are, from the tensors of the file."""
    first = run(images, tmp_path, 1)
    content = state.state_dict(first)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(
        first.trainer.params_in(content["model"]), first.trainer.master_params))
    again = loop(images, tmp_path / "new", 2)
    places = [average.data_ptr() for average in again.ema_params[1]]
    state.load_state_dict(again, manifest.newest(str(tmp_path)))
    assert [average.data_ptr() for average in again.ema_params[1]] == places
    assert all(th.equal(a, b) for a, b in zip(again.ema_params[1], first.ema_params[1]))


@pytest.mark.parametrize(("known", "found", "allowed", "kept"), [
    (("a", "b"), ("a", "b"), False, ("a", "b")), ((), ("a", "b"), False, ("a", "b")),
    (("a", "b"), (), False, ("a", "b")), (("a", "b"), ("b", "c"), True, ("b", "c")),
])
def test_class_names_go_on_where_data_and_checkpoint_agree(images, tmp_path, capsys, known, found, allowed, kept):
    """An older checkpoint has none, nor have all data: then the other's are kept."""
    again = loop(images, tmp_path / "new", 2)
    again.checkpoints.class_names, again.config = found, replace(again.config, allow_other_classes=allowed)
    state.take_class_names(again, manifest.Checkpoint(str(tmp_path), 1, 8, {}, {}, class_names=known))
    assert again.checkpoints.class_names == kept
    if not allowed:
        again.checkpoints.class_names = ("b", "a")
        if known:
            with pytest.raises(UserError, match="checkpoint_000001.json. The checkpoint: a, b; the data: b, a"):
                state.take_class_names(again, manifest.Checkpoint(str(tmp_path), 1, 8, {}, {}, class_names=known))

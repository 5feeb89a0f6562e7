"""What a checkpoint of training holds goes back to where it came from."""


import torch as th

from cm.checkpoints import manifest
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

"""What commands take from the file of weights that a flag names."""

import pytest
import torch as th

from cm.checkpoints import manifest
from cm.checkpoints.formats import safetensor_files
from cm.errors import UserError
from cm.setup.inherit import plain_value
from cm.setup.weights_path import weights_in
from support.nets import plain_state_dict
from support.weights import TINY, adopt, tiny

CONFIG = {**TINY, "training_mode": "edm"}


def save(folder, step=10, names=("model", "ema_0.9"), config=CONFIG):
    weights = {name: plain_state_dict(tiny()) for name in names}
    return manifest.save(str(folder), step, weights, config, 40, initial_weight={"ema_0.9": 0.0})


def test_a_damaged_file_of_weights_is_refused_unless_it_is_not_verified(tmp_path):
    save(tmp_path)
    path = tmp_path / "ema_0.9_000010.pt"
    data = bytearray(path.read_bytes())
    data[data.index(plain_state_dict(tiny())["out.2.bias"].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="ema_0.9_000010.pt is damaged.*--verify_weights False"):
        adopt(path)[1].take()
    adopt(path, "--verify_weights", "False")[1].take()


def test_a_run_folder_means_its_best_average_or_else_its_newest(tmp_path):
    save(tmp_path)
    newest = str(tmp_path / "ema_0.9_000010.pt")
    assert weights_in(str(tmp_path), "model_path") == newest
    (tmp_path / "best.json").write_text('{"step": 4, "file": "best/ema_0.9_000004.pt"}')
    assert weights_in(str(tmp_path), "model_path") == newest, "the best is gone"
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "ema_0.9_000004.pt").touch()
    assert weights_in(str(tmp_path), "model_path") == str(tmp_path / "best/ema_0.9_000004.pt")
    assert weights_in(newest, "model_path") == newest


def test_a_best_that_points_out_of_the_folder_is_not_followed(tmp_path):
    save(tmp_path)
    (tmp_path / "best.json").write_text('{"step": 4, "file": "../../etc/passwd"}')
    assert weights_in(str(tmp_path), "model_path") == str(tmp_path / "ema_0.9_000010.pt")


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="--model_path .* is a folder without a complete checkpoint"):
        weights_in(str(tmp_path), "model_path")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_networks_lose_their_prefix(prefix, tmp_path, capsys):
    """Of DDP and torch.compile, in a file without a manifest."""
    weights = plain_state_dict(tiny())
    th.save({prefix + name: value for name, value in weights.items()}, tmp_path / "mine.pt")
    flags = ("--image_size", 8, "--num_head_channels", 16, "--training_mode", "edm")
    taken = adopt(tmp_path / "mine.pt", *flags)[1].take()
    assert all(th.equal(taken[name], value) for name, value in weights.items())
    told = capsys.readouterr()
    assert "the names of the weights begin with" in told.out + told.err


def test_bare_safetensors(tmp_path):
    weights = plain_state_dict(tiny())
    safetensor_files.write(str(tmp_path / "mine.safetensors"), weights)
    flags = ("--image_size", 8, "--num_head_channels", 16, "--training_mode", "edm")
    taken = adopt(tmp_path / "mine.safetensors", *flags)[1].take()
    assert all(th.equal(taken[name], value) for name, value in weights.items())


@pytest.mark.parametrize("value", [["edm"], {"edm": 1}, None], ids=str)
def test_a_training_mode_that_is_no_word_is_refused(value):
    with pytest.raises(UserError, match=r"x\.pt.*: training_mode=.* is neither a word nor a number"):
        plain_value("training_mode", value, "x.pt")

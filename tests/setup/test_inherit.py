"""What commands take from the file of weights that a flag names."""

import pytest

from cm.checkpoints import manifest
from cm.errors import UserError
from support.nets import plain_state_dict
from support.weights import TINY, adopt, tiny

CONFIG = {**TINY, "training_mode": "edm"}


def save(folder, step=10, names=("model", "ema_0.9"), config=CONFIG):
    return manifest.save(str(folder), step, {name: plain_state_dict(tiny()) for name in names}, config, 40)


def test_a_damaged_file_of_weights_is_refused_unless_it_is_not_verified(tmp_path):
    save(tmp_path)
    path = tmp_path / "ema_0.9_000010.pt"
    data = bytearray(path.read_bytes())
    data[data.index(plain_state_dict(tiny())["out.2.bias"].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="ema_0.9_000010.pt is damaged.*--verify_weights False"):
        adopt(path)[1].take()
    adopt(path, "--verify_weights", "False")[1].take()

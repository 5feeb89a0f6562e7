"""Weights are put into a network, or what does not fit is named."""

import pytest
import torch as th

from cm.checkpoints import loading, manifest
from cm.errors import UserError
from cm.script_util import create_model
from cm.training.state import load_part
from support.nets import plain_state_dict

SMALL = dict(image_size=32, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="16",
             num_head_channels=16)


def test_weights_that_do_not_fit_are_named():
    model = create_model(**SMALL)
    good = plain_state_dict(model)
    loading.fit(model, good, "a.pt")
    odd = dict(good)
    odd["out.2.bias"] = th.zeros(6)
    odd["stranger"] = odd.pop("time_embed.0.bias")
    with pytest.raises(UserError) as error:
        loading.fit(model, odd, "b.pt")
    for words in ("b.pt", "1 missing: time_embed.0.bias", "1 unknown: stranger", "out.2.bias [6] in the file, [3]"):
        assert words in str(error.value)


def test_a_file_that_its_manifest_does_not_describe_is_refused_while_it_is_read(tmp_path):
    saved = manifest.save(str(tmp_path), 10, {"model": {"w": th.arange(6.0)}, "opt": {"state": {}}}, {}, 40)
    path = tmp_path / "model000010.pt"
    good = path.read_bytes()
    place = good.index(th.arange(6.0).numpy().tobytes()) + 5
    facts = saved.facts(str(path))
    assert loading.WeightsFile(str(path), expected=facts).take()["w"][1] == 1
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    for read in (lambda: loading.WeightsFile(str(path), expected=facts).take(), lambda: load_part("model", saved)):
        with pytest.raises(UserError, match="model000010.pt is damaged.*CRC-32.*--verify_weights False"):
            read()
    loading.WeightsFile(str(path)).take()
    load_part("model", saved, verify=False)
    path.write_bytes(good + b"0")
    with pytest.raises(UserError, match="bytes long"):
        load_part("model", saved)

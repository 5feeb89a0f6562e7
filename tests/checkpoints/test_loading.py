"""Weights are put into a network, or what does not fit is named."""

import pytest
import torch as th

from cm.checkpoints import loading
from cm.errors import UserError
from cm.networks.build import create_model
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

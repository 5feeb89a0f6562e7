"""The devices of a run, as its flags want them."""

import pytest
from torch import nn

from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.setup.run import on_device
from support import tf32


@pytest.mark.parametrize("flags, allowed", [([], False), (["--tf32", "True"], True)])
def test_gpus_multiply_in_tf32_only_where_a_flag_says_so(flags, allowed):
    with tf32.at_first(not allowed):
        on_device(parse("", *TRAINING_SECTIONS, argv=flags), nn.Conv2d(1, 1, 1))
        assert tf32.now() == (allowed, allowed)

"""The projections of the embedding as one product: those of the blocks up to rounding, in few operations."""

import pytest
import torch as th
from torch import nn

from cm.networks.edm.layers import UNetBlock
from cm.networks.layers import silu
from cm.networks.modulation import JointModulation, can_join, modulation
from cm.networks.unet_blocks import ResBlock


def blocks_of(has_gain: list[bool]) -> list[ResBlock]:
    th.manual_seed(0)
    blocks = [ResBlock(32, 16, 0.0, 32 * (1 + i % 2), use_scale_shift_norm=gain) for i, gain in enumerate(has_gain)]
    for block in blocks:
        nn.init.normal_(block.modulated_norm.weight)
        nn.init.normal_(block.modulated_norm.bias)
    return blocks


@pytest.mark.parametrize("has_gain", [[True, True], [False, False], [True, False, True, True]])
@pytest.mark.parametrize("autocast", [False, True])
def test_joint_is_each(has_gain, autocast):
    blocks, emb = blocks_of(has_gain), th.randn(3, 16)
    with th.no_grad(), th.autocast("cpu", th.bfloat16, enabled=autocast):
        joint = JointModulation(blocks, silu)(emb)
        for block in blocks:
            gain, shift, whole = modulation(block, joint, emb.dtype)
            right_gain, right_shift, _ = modulation(block, emb, emb.dtype)
            assert (gain is None) == (right_gain is None) == (not block.use_scale_shift_norm) == (not whole)
            digits = {"rtol": 2**-7, "atol": 2**-7} if autocast else {"rtol": 1e-5, "atol": 1e-6}
            if gain is not None:
                norm = block.modulated_norm
                right_shift = norm.bias * right_gain + right_shift
                th.testing.assert_close(gain, norm.weight * right_gain, **digits)
            assert shift.dtype == th.float32 and shift.is_contiguous()
            th.testing.assert_close(shift, right_shift, check_dtype=False, **digits)


def test_gain_is_one_more_than_the_scale_of_the_first_rows():
    block, = blocks_of([True])
    emb = th.randn(3, 16)
    rows = block.emb_layers[1](emb * emb.sigmoid())
    gain, shift, whole = modulation(block, emb, emb.dtype)
    assert not whole
    th.testing.assert_close(gain, 1 + rows[:, :32])
    th.testing.assert_close(shift, rows[:, 32:])


def test_what_is_not_plain_is_not_joined():
    watched, other, plain = blocks_of([True, True, True])
    watched.emb_layers[1].register_forward_hook(lambda *_: None)
    other.emb_layers[1] = nn.Sequential(other.emb_layers[1], nn.Identity())
    assert [can_join(block) for block in (watched, other, plain)] == [False, False, True]
    assert UNetBlock.projection.fget is not None, "EDM's blocks have one, too"


def test_a_product_of_half_precision_weights_is_float32():
    """A network that is stored as autocast would cast it has an embedding in float32 still."""
    block, = blocks_of([True])
    block.emb_layers[1].bfloat16()
    emb = th.randn(3, 16)
    with th.no_grad():
        gain, *_ = modulation(block, JointModulation([block], silu)(emb), emb.dtype)
        expected = block.modulated_norm.weight * (1 + block.emb_layers[1].float()(silu(emb))[:, :32])
    th.testing.assert_close(gain, expected, rtol=1e-5, atol=1e-6)

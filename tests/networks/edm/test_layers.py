"""Layers of the EDM networks: resampling against slow sums, names, and the scales that they start from."""

import pytest
import torch as th

from cm.networks.edm.layers import Conv, ConvDown, Init, Resample
from support import slow_edm
from support.edm_networks import TINY, tiny

F64 = th.float64


# --- against slow sums -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize("direction", ["down", "up"])
def test_resampling(direction, taps):
    x = th.randn(2, 3, 6, 4, dtype=F64, generator=th.Generator().manual_seed(0))
    fast = Resample(direction, taps).to(F64)
    th.testing.assert_close(fast(x), slow_edm.resample(x, direction, taps))
    flat = fast(th.ones_like(x))[:, :, 1:-1, 1:-1]
    th.testing.assert_close(flat, th.ones_like(flat))               # brightness stays, away from the border


@pytest.mark.parametrize("kind", ["down", "up", "", "image"])
@th.no_grad()
def test_resampling_convolutions(kind):
    x, taps = th.randn(2, 3, 8, 8, dtype=F64), (1, 3, 3, 1)
    conv = (ConvDown(3, 5, 3, taps) if kind == "image" else Conv(3, 5, 3, kind, taps)).to(F64)
    state = {f"c.{name}": value for name, value in conv.state_dict().items()}
    if kind == "image":                                             # at full resolution first
        slow = slow_edm.both_ways(slow_edm.down_rows, slow_edm.convolve(state, "c", x, border=2), taps, 0)
    else:
        slow = slow_edm.convolve(state, "c", slow_edm.resample(x, kind, taps))
    th.testing.assert_close(conv(x), slow)


# --- sizes and initialisation ----------------------------------------------------------------------------------------


ATTENTION = {                                                       # of the tiny networks; three blocks on the way up
    "ddpmpp": ["enc.4x4_block0", "enc.4x4_block1", "dec.4x4_in0", "dec.4x4_block2"],
    "ncsnpp": ["enc.4x4_block0", "enc.4x4_block1", "dec.2x2_in0", "dec.4x4_block2"],
    "adm": ["enc.4x4_block0", "enc.4x4_block1", "dec.4x4_in0", *(f"dec.4x4_block{i}" for i in range(3))],
}
WAYS = {                                                            # down / up
    "ddpmpp": """8x8_conv 8x8_block0 8x8_block1 4x4_down 4x4_block0 4x4_block1
                 / 4x4_in0 4x4_in1 4x4_block0 4x4_block1 4x4_block2
                 8x8_up 8x8_block0 8x8_block1 8x8_block2 8x8_aux_norm 8x8_aux_conv""",
    "ncsnpp": """8x8_conv 8x8_block0 8x8_block1 4x4_down 4x4_aux_residual 4x4_block0 4x4_block1
                 2x2_down 2x2_aux_residual 2x2_block0 2x2_block1
                 / 2x2_in0 2x2_in1 2x2_block0 2x2_block1 2x2_block2 4x4_up 4x4_block0 4x4_block1 4x4_block2
                 8x8_up 8x8_block0 8x8_block1 8x8_block2 8x8_aux_norm 8x8_aux_conv""",
    "adm": """8x8_conv 8x8_block0 8x8_block1 4x4_down 4x4_block0 4x4_block1
              / 4x4_in0 4x4_in1 4x4_block0 4x4_block1 4x4_block2 8x8_up 8x8_block0 8x8_block1 8x8_block2""",
}


@pytest.mark.parametrize("arch", TINY)
def test_names_of_layers(arch):
    """In the order of computation, as they stand in published state dicts."""
    state = tiny(arch).state_dict()
    down, up = (dict.fromkeys(name.split(".")[1] for name in state if name.startswith(way)) for way in ("enc.", "dec."))
    assert [*down, "/", *up] == WAYS[arch].split()
    assert [name.removesuffix(".qkv.weight") for name in state if name.endswith("qkv.weight")] == ATTENTION[arch]
    # A change of resolution at equal width: a filter and, in SongUNet, a convolution on the skip path too.
    skip = {name.rpartition(".")[2] for name in state if name.startswith("enc.4x4_down.skip.")}
    assert skip == ({"resample_filter"} if arch == "adm" else {"resample_filter", "weight", "bias"})


def test_init_names_and_scales():
    th.manual_seed(0)
    layer = Init("kaiming_normal", weight=3.0)(th.nn.Linear(400, 300))
    assert layer.weight.std().item() == pytest.approx(3 / 20, rel=0.02) and not layer.bias.any()

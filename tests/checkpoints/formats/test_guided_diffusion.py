"""Guided-diffusion's weights: put into order, they compute the same."""

import pytest
import torch as th

from cm.checkpoints import loading
from cm.checkpoints.formats import guided_diffusion
from cm.networks.attention import qkv_attention
from cm.setup.model import model_from
from support.nets import plain_state_dict
from support.weights import adopt, tiny


def as_guided(state, heads_of, new_order):
    """The file that guided-diffusion would have written: 3 axes and, by default, rows head by head."""
    result = {}
    for name, value in state.items():
        if ".qkv." in name and not new_order:
            h = heads_of(name)
            d = len(value) // (3 * h)
            order = [which * h * d + head * d + c for head in range(h) for which in range(3) for c in range(d)]
            value = value[order]
        result[name] = value[..., 0] if name.endswith(("qkv.weight", "proj_out.weight")) else value
    return result


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("heads", [
    {"num_head_channels": 16}, {"num_heads": 2, "num_head_channels": -1},
    {"num_heads": 2, "num_heads_upsample": 4, "num_head_channels": -1},
])
def test_guided_diffusion_weights_are_put_into_order(tmp_path, new_order, heads):
    model = tiny(**heads)

    def heads_of(name):
        return next(block.num_heads for prefix, block in model.named_modules()
                    if name.startswith(f"{prefix}.qkv.") and hasattr(block, "num_heads"))

    path = tmp_path / "guided.pt"
    th.save(as_guided(plain_state_dict(model), heads_of, new_order), path)
    asked = [word for name, value in heads.items() for word in (f"--{name}", value)]
    settings, source = adopt(path, "--image_size", 8, "--training_mode", "edm", *asked,
                             "--use_new_attention_order", new_order)
    ours = model_from(settings)
    right = source.take()
    loading.fit(ours, right, "guided.pt")
    assert all(th.equal(a, b) for a, b in zip(model.parameters(), ours.parameters()))
    if not new_order:
        _, wrong = adopt(path, "--image_size", 8, "--training_mode", "edm", *asked, "--use_new_attention_order", True)
        assert not th.equal(wrong.take()["middle_block.1.qkv.weight"], right["middle_block.1.qkv.weight"])


def test_reordered_rows_compute_guided_diffusions_attention():
    """Against its rule written out: split by head first, then into q, k, v of d channels each."""
    h, d, t = 2, 4, 5
    c = h * d
    generator = th.Generator().manual_seed(0)
    weight, bias = th.randn(3 * c, c, 1, generator=generator), th.randn(3 * c, generator=generator)
    x = th.randn(1, c, t, generator=generator)
    q, k, v = (weight[..., 0] @ x[0] + bias[:, None]).view(h, 3, d, t).unbind(1)            # each [h,d,T]
    attention = th.softmax(th.einsum("hdt,hds->hts", q, k) / d**0.5, dim=-1)
    expected = th.einsum("hts,hds->hdt", attention, v).reshape(1, c, t)
    converted = guided_diffusion.to_published_layout(
        {"middle_block.1.qkv.weight": weight, "middle_block.1.qkv.bias": bias}, num_heads=h, num_heads_upsample=-1,
        num_head_channels=-1, use_new_attention_order=False,
    )
    ours = converted["middle_block.1.qkv.weight"][..., 0, 0] @ x[0] + converted["middle_block.1.qkv.bias"][:, None]
    th.testing.assert_close(qkv_attention(ours[None], h), expected)

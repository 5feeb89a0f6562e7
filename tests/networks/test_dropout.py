"""--dropout_resolutions: where blocks have dropout, in every network."""

import pytest
import torch as th
from torch.utils._python_dispatch import TorchDispatchMode

from cm.errors import UserError
from cm.networks import layers
from cm.networks.layers import Dropout
from cm.script_util import create_model

SIDES = (16, 8, 4)


def network(arch, resolutions, **options):
    th.manual_seed(0)
    return create_model(16, 32, 1, channel_mult="1,1,1", attention_resolutions="8", num_head_channels=16, arch=arch,
                        dropout=0.5, dropout_resolutions=resolutions, **options)


def sides_with_dropout(model, monkeypatch):
    """The sides of the maps of which a pass in training drops values, counted where torch draws the mask."""
    found, dropout = set(), th.nn.functional.dropout

    def watched(x, p=0.5, training=True, inplace=False):
        found.update({x.shape[-1]} if p > 0 and training else ())
        return dropout(x, p, training, inplace)

    monkeypatch.setattr(th.nn.functional, "dropout", watched)
    model.train()(th.zeros(1, 3, 16, 16), th.ones(1))
    return found


@pytest.mark.parametrize("arch, options", [
    ("unet", {}), ("unet", {"resblock_updown": True}), ("ddpmpp", {}), ("ncsnpp", {}), ("adm", {}), ("edm2", {}),
])
def test_dropout_takes_place_where_it_is_asked_for(arch, options, monkeypatch):
    for resolutions, expected in (("", SIDES), ("8,4", (8, 4)), ("16", (16,))):
        found = sides_with_dropout(network(arch, resolutions, **options), monkeypatch)
        assert found == set(expected)
        monkeypatch.undo()


@pytest.mark.parametrize("arch", ["unet", "edm2"])
def test_a_resolution_of_no_level_is_refused(arch):
    with pytest.raises(UserError, match="no dropout is possible at resolution 2: .* side 16 works at 16, 8, 4"):
        network(arch, "8,2")
    with pytest.raises(UserError, match="--dropout_resolutions 'eight' is not a list of image sides"):
        network(arch, "eight")


# --- the same masks in every pass ------------------------------------------------------------------------------------


class Draws(TorchDispatchMode):
    """Notes what is asked of the random stream: on a GPU, equal masks take equal calls on equal layouts."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if th.Tag.nondeterministic_seeded in func.tags:
            x = args[0]
            self.found.append((str(func), x.shape, x.stride(), x.dtype))
        return func(*args, **(kwargs or {}))


def draws_of(use):
    with Draws() as draws:
        use()
    return draws.found


@pytest.mark.parametrize("arch", ["unet", "ddpmpp", "adm", "edm2"])
def test_passes_with_and_without_gradients_and_derivatives_draw_the_same_masks(arch):
    """"meta" plays the GPU, where the three passes have other memory formats."""
    model = network(arch, "").train().to("meta", memory_format=th.channels_last)
    x, time = (th.empty(*shape, device="meta") for shape in ((2, 3, 16, 16), (2,)))
    online = draws_of(lambda: model(x, time))
    with th.no_grad():
        target = draws_of(lambda: model(x, time))
        tangent = draws_of(lambda: th.func.jvp(model, (x, time), (x, time)))
    assert len(online) >= len(SIDES) and online == target == tangent


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])
@pytest.mark.parametrize("memory_format", [th.contiguous_format, th.channels_last])
def test_a_mask_has_one_layout_and_one_dtype(dtype, memory_format):
    x = th.empty(2, 8, 4, 4, dtype=dtype, device="meta").to(memory_format=memory_format)
    (_, shape, stride, drawn), = draws_of(lambda: Dropout(0.3).train()(x))
    assert (shape, stride, drawn) == ((2, 4, 4, 8), (128, 32, 8, 1), th.bfloat16)


def test_the_values_are_those_of_dropout(monkeypatch):
    monkeypatch.setattr(layers, "_draws_in_order_of_memory", lambda device: True)
    x = th.randn(4, 64, 8, 8, dtype=th.float64, requires_grad=True)
    layer = Dropout(0.25).train()
    th.manual_seed(0)
    y = layer(x)
    kept = y != 0
    assert th.equal(y, x * kept * (1 / 0.75)) and abs(kept.double().mean() - 0.75) < 0.01     # 16,384 draws
    grad, = th.autograd.grad(y.sum(), x)
    assert th.equal(grad, kept.double() * (1 / 0.75))
    th.manual_seed(0)
    value, change = th.func.jvp(layer, (x.detach(),), (th.ones_like(x),))
    assert th.equal(value, y) and th.equal(change, grad)
    for p, expected in ((0.0, x), (1.0, th.zeros_like(x))):
        assert th.equal(Dropout(p).train()(x), expected)
    assert Dropout(0.5).eval()(x) is x


@pytest.mark.cuda
@pytest.mark.parametrize("arch", ["unet", "adm", "edm2"])
def test_a_gpu_drops_the_same_values_with_and_without_gradients_in_any_precision(arch, gpu, monkeypatch):
    dropped, drop = [], layers.dropout
    model = network(arch, "").train().to(gpu, memory_format=th.channels_last)
    for param in model.parameters():
        param.data.normal_(std=0.1)

    def noted(x, p, training):
        dropped.append(drop(th.ones_like(x), p, training) == 0)      # of the format and dtype of x
        return drop(x, 0, training)                         # so that all passes see the same numbers

    monkeypatch.setattr(layers, "dropout", noted)
    monkeypatch.setattr("cm.networks.edm.edm2.dropout", noted)
    x, time, passes = th.randn(2, 3, 16, 16, device=gpu), th.ones(2, device=gpu), []
    for taken, low in ((True, False), (False, False), (False, True)):
        dropped.clear()
        th.manual_seed(0)
        with th.set_grad_enabled(taken), th.autocast(gpu, th.bfloat16, enabled=low):
            model(x, time)
        passes.append([*dropped])
    assert 0.4 < th.cat([each.flatten() for each in passes[0]]).double().mean() < 0.6
    for other in passes[1:]:
        assert all(map(th.equal, passes[0], other))

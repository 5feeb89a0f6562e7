"""In bf16, companions without gradients hold what autocast would make of them at every pass: the same numbers."""

import pytest
import torch as th

from cm.training.master_weights import MasterWeights, store_as_autocast
from support import training
from support.casts import Casts
from support.edm_networks import inputs, tiny


def trained(images, folder, mode, steps=4, **options):
    """A loop after some steps, their losses, and the casts of the weights of its companions in the last of them."""
    loop = training.loop(images, folder, 100, mode=mode, precision="bf16", **options)
    companions = [each.model for each in loop.parts.companions.values()]
    losses = []
    for _ in range(steps):
        batch = next(loop.data)
        with Casts(companions) as casts:
            loop.run_step(batch)
        losses += [terms.loss.tolist() for _, terms in loop.microbatches]
    return loop, losses, casts.count


@pytest.mark.parametrize("mode, options", [
    ("consistency_distillation", {"dropout": 0.2, "microbatch": 4}), ("consistency_training", {}),
    ("progdist", {"curriculum": training.PROGDIST}),
])
def test_the_numbers_are_those_of_casts_at_every_pass(images, tmp_path, monkeypatch, mode, options):
    stored, losses, casts = trained(images, tmp_path / "stored", mode, **options)
    objective = type(stored.objective)
    monkeypatch.setattr(objective, "full_precision_passes", True)
    cast, expected, many = trained(images, tmp_path / "cast", mode, **options)
    assert losses == expected and len(set(map(str, losses))) > 3
    # At most once a step, all of them together: copies into the stored weights are no conversions of them.
    assert casts == 0 and many > 20
    for own, others in ((stored.trainer, cast.trainer), *zip(stored.moving.values(), cast.moving.values())):
        for a, b in zip(own.master_params, others.master_params, strict=True):
            assert a.dtype == th.float32 and th.equal(a, b)
    stored.save(), cast.save()
    files = [training.digest(folder, 4) for folder in (tmp_path / "stored", tmp_path / "cast")]
    assert files[0] == files[1] and len(files[0]) >= 3
    for name, companion in stored.parts.companions.items():
        kinds = {param.dtype for param in companion.model.parameters()}
        assert kinds == {th.bfloat16, th.float32}, "norms and embeddings stay"
        for param, wide in zip(companion.model.parameters(), cast.parts.companions[name].model.parameters()):
            assert th.equal(param, wide.to(param.dtype))


def test_a_resumed_target_is_stored_too(images, tmp_path):
    """The rounded weights are those of the masters of the checkpoint."""
    whole = training.run(images, tmp_path / "whole", 4, mode="consistency_training", precision="bf16")
    training.run(images, tmp_path / "parts", 2, mode="consistency_training", precision="bf16")
    parts = training.run(images, tmp_path / "parts", 4, mode="consistency_training", precision="bf16")
    target = parts.moving["target_model"]
    assert training.digest(tmp_path / "whole", 4) == training.digest(tmp_path / "parts", 4)
    assert any(param.dtype == th.bfloat16 for param in target.model_params)
    for param, master in zip(target.model_params, target.master_params):
        assert th.equal(param, master.to(param.dtype))
    assert whole.step == 4


def test_a_network_of_another_kind_is_cast_at_every_pass():
    model = th.nn.Sequential(th.nn.Linear(2, 2))
    weights = MasterWeights(model, "bf16", stores_casts=True)
    assert model[0].weight.dtype == th.float32 and weights.master_params[0] is model[0].weight


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_edms_networks_give_the_same(arch):
    model, given = tiny(arch).eval(), inputs(arch)
    with th.no_grad(), th.autocast("cpu", dtype=th.bfloat16, cache_enabled=False):
        expected = model(*given)
        store_as_autocast(model)
        with Casts([model]) as casts:
            assert th.equal(model(*given), expected) and casts.count == 0
    assert {param.dtype for param in model.parameters()} == {th.bfloat16, th.float32}

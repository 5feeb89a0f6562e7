"""The mixed-precision trainer: golden training steps, exact masters, the loss scale, and state dicts."""

import math

import pytest
import torch as th
from torch import nn

from cm.networks.precision import convert_module_to_f16
from cm.tensors import append_dims, update_ema
from cm.training.master_weights import PRECISIONS
from cm.training.mixed_precision import LOWEST_LOG_LOSS_SCALE, MixedPrecisionTrainer
from support import golden


class Toy(nn.Module):
    """A half-precision trunk between float32 ends, like the U-Net."""

    def __init__(self) -> None:
        super().__init__()
        th.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 1)

    def convert_to_fp16(self) -> None:
        self.apply(convert_module_to_f16)

    def forward(self, x: th.Tensor) -> th.Tensor:
        h = self.conv(x.to(self.conv.weight.dtype)).to(x.dtype)
        return self.head(self.norm(h).square().mean(dim=(2, 3)))


X = th.randn(4, 3, 6, 6, generator=th.Generator().manual_seed(0))


def trainer_of(precision: str, **options) -> tuple[Toy, MixedPrecisionTrainer]:
    """A toy and its trainer; the toy's gradients, about 1, would overflow at the usual loss scale of 2^20."""
    model = Toy()
    return model, MixedPrecisionTrainer(model=model, precision=precision, **{"initial_lg_loss_scale": 10.0, **options})


def loss_of(model: nn.Module, trainer: MixedPrecisionTrainer, x: th.Tensor = X) -> th.Tensor:
    with trainer.autocast():
        return model(x).square().mean()


# --- golden training -------------------------------------------------------------------------------------------------


def edm_loss(model: nn.Module, x_start: th.Tensor, noise: th.Tensor, sigma: th.Tensor, y: th.Tensor) -> th.Tensor:
    """Karras et al. 2022, equation 8 with their weighting; sigma_data 0.5; the network is told 250 ln(sigma)."""
    s = append_dims(sigma, 4)
    variance = s**2 + 0.25
    x_t = x_start + s * noise
    denoised = 0.25 / variance * x_t + 0.5 * s * variance.rsqrt() * model(x_t * variance.rsqrt(), 250 * sigma.log(), y)
    return ((s**-2 + 4) * (denoised - x_start) ** 2).mean()


def test_eight_golden_steps():
    model = golden.build()
    trainer = MixedPrecisionTrainer(model=model)
    opt = th.optim.RAdam(trainer.master_params, lr=1e-3)
    ema = [p.detach().clone() for p in trainer.master_params]
    batches = [golden.tensor(f"train/{name}") for name in ("x_start", "noise", "edm_sigmas", "y")]
    rows = []
    for step, (x_start, noise, sigma, y) in enumerate(zip(*batches)):
        opt.param_groups[0]["lr"] = 1e-3 * (1 - step / 20)
        trainer.zero_grad()
        loss = edm_loss(model, x_start, noise, sigma, y)
        trainer.backward(loss)
        report = trainer.optimize(opt)
        update_ema(ema, trainer.master_params, 0.5)
        rows.append([loss.detach(), report.grad_norm, report.param_norm])
    for name, column in zip(("loss", "grad_norm", "param_norm"), zip(*rows)):
        golden.assert_close(th.stack(column), f"train/edm/{name}")
    for name, params in (("final_model", trainer.master_params), ("final_ema0.5", ema)):
        norms = th.stack([p.detach().double().norm() for p in params])
        golden.assert_close(norms, f"train/edm/{name}/l2_norm_per_param")
        saved = trainer.master_params_to_state_dict(params)
        golden.assert_close(saved["out.2.weight"], f"train/edm/{name}/param/out.2.weight")
        golden.assert_close(saved["time_embed.0.bias"], f"train/edm/{name}/param/time_embed.0.bias")


# --- a step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_against_plain_float32(precision):
    model, trainer = trainer_of(precision)
    reference = Toy()
    reference(X).square().mean().backward()
    gradients = [p.grad for p in reference.parameters()]
    trainer.backward(loss_of(model, trainer))
    # One matrix product in half precision: about its rounding, 1e-3 and 8e-3, of the largest gradient.
    tolerance = {"fp32": 1e-6, "fp16": 3e-3, "bf16": 3e-2}[precision] * max(g.abs().max() for g in gradients)
    for got, expected in zip(trainer.collect_grads(), gradients):
        assert got.dtype == th.float32
        th.testing.assert_close(got, expected, rtol=0, atol=tolerance.item())
    before = [p.detach().clone() for p in trainer.master_params]
    report = trainer.optimize(th.optim.SGD(trainer.master_params, lr=0.1))
    assert report and report.stepped and not report.fatal and report is trainer.report
    for old, new, p in zip(before, trainer.collect_grads(), trainer.master_params):
        assert th.equal(p.detach(), old.add(new, alpha=-0.1))
    for norm, tensors in ((report.grad_norm, trainer.collect_grads()), (report.param_norm, before)):
        assert norm.item() == pytest.approx(math.sqrt(sum(t.double().square().sum() for t in tensors)), rel=1e-6)
    assert set(report.logs()) == {"grad_norm", "param_norm"} | ({"lg_loss_scale"} if precision == "fp16" else set())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_microbatches_add_up(precision):
    model, trainer = trainer_of(precision)
    trainer.backward(loss_of(model, trainer))
    whole = [g.clone() for g in trainer.collect_grads()]
    trainer.zero_grad()
    for part in X.chunk(2):
        trainer.backward(loss_of(model, trainer, part) / 2)
    scale = max(g.abs().max() for g in whole).item()
    for once, twice in zip(whole, trainer.collect_grads()):
        th.testing.assert_close(once, twice, rtol=0, atol=(1e-6 if precision == "fp32" else 1e-2) * scale)
    trainer.zero_grad()
    assert all(p.grad is None for p in [*model.parameters(), *trainer.master_params])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_looking_at_gradients_between_microbatches_is_harmless(precision):
    model, trainer = trainer_of(precision)
    sums = []
    for part in X.chunk(2):
        trainer.backward(loss_of(model, trainer, part) / 2)
        sums.append((trainer.grad_norm().item(), [g.clone() for g in trainer.collect_grads()]))
    assert sums[0][0] != sums[1][0]
    model, trainer = trainer_of(precision)
    for part in X.chunk(2):
        trainer.backward(loss_of(model, trainer, part) / 2)
    assert trainer.grad_norm().item() == sums[1][0]
    assert all(th.equal(a, b) for a, b in zip(trainer.collect_grads(), sums[1][1]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_changes_to_the_collected_gradients_reach_the_optimiser(precision):
    model, trainer = trainer_of(precision)
    trainer.backward(loss_of(model, trainer))
    th._foreach_zero_(trainer.collect_grads())
    before = [p.detach().clone() for p in trainer.master_params]
    assert trainer.optimize(th.optim.SGD(trainer.master_params, lr=1.0)).grad_norm == 0
    assert all(th.equal(old, new) for old, new in zip(before, trainer.master_params))


def test_a_step_needs_gradients():
    _, trainer = trainer_of("fp32")
    with pytest.raises(RuntimeError, match="call backward"):
        trainer.optimize(th.optim.SGD(trainer.master_params, lr=1.0))


def test_parameters_without_gradient_stay():
    for precision in PRECISIONS:
        model = Toy()
        model.conv.requires_grad_(False)
        trainer = MixedPrecisionTrainer(model=model, precision=precision)
        assert [p.requires_grad for p in trainer.master_params] == [False] * 2 + [True] * 4
        trainer.backward(loss_of(model, trainer))
        assert len(trainer.collect_grads()) == 4
        assert trainer.optimize(th.optim.SGD(trainer.master_params[2:], lr=1.0))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_gradients_change_nothing(precision, bad):
    model, trainer = trainer_of(precision)
    before = [p.detach().clone() for p in trainer.master_params]
    trainer.backward(loss_of(model, trainer) * bad)
    report = trainer.optimize(th.optim.SGD(trainer.master_params, lr=1.0))
    assert not report and not report.stepped and not report.grad_norm.isfinite()
    assert report.fatal == (precision != "fp16")            # fp16 tries again with a smaller scale
    assert all(th.equal(old, new) for old, new in zip(before, trainer.master_params))


class Bounded(Toy):
    """A network whose parameters stay within a box."""

    def constrain(self, params) -> None:
        assert [name for name, _ in self.named_parameters()] == list(params)
        for value in params.values():
            assert value.dtype == th.float32
            value.clamp_(-0.1, 0.1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_network_constrains_its_float32_parameters_after_a_step_that_is_taken(precision):
    model = Bounded()
    trainer = MixedPrecisionTrainer(model=model, precision=precision, initial_lg_loss_scale=10.0)
    trainer.backward(loss_of(model, trainer))
    trainer.step(th.optim.SGD(trainer.master_params, lr=1.0), False)
    assert max(master.abs().max() for master in trainer.master_params) > 0.1
    trainer.step(th.optim.SGD(trainer.master_params, lr=1.0), True)
    for master, param in zip(trainer.master_params, trainer.model_params):
        assert master.abs().max() <= 0.1 and th.equal(master.to(param.dtype), param)


def test_another_rank_can_veto_a_step():
    model, trainer = trainer_of("fp16")
    trainer.backward(loss_of(model, trainer))
    assert trainer.grads_finite()
    before = [p.detach().clone() for p in trainer.master_params]
    assert not trainer.step(th.optim.SGD(trainer.master_params, lr=1.0), finite=False)
    assert trainer.lg_loss_scale == 9
    assert all(th.equal(old, new) for old, new in zip(before, trainer.master_params))


# --- fp16 ------------------------------------------------------------------------------------------------------------


def test_masters_are_not_rounded():
    model = golden.build()
    trainer = MixedPrecisionTrainer(model=model, use_fp16=True)
    assert model.dtype == th.float16 and trainer.precision == "fp16"
    opt = th.optim.RAdam(trainer.master_params, lr=0.0)
    out = model(golden.tensor("forward/x"), golden.tensor("forward/timesteps"), golden.tensor("forward/y"))
    trainer.backward(out.square().mean())
    assert trainer.optimize(opt)
    saved = trainer.master_params_to_state_dict(trainer.master_params)
    original = golden.state("model")
    assert list(saved) == list(original)
    assert all(th.equal(saved[key], original[key]) for key in original)
    assert not th.equal(original["input_blocks.0.0.weight"], original["input_blocks.0.0.weight"].half().float())


def test_a_network_that_is_half_precision_already_gets_float32_masters_of_its_values():
    model = Toy()
    before = model.conv.weight.detach().clone()
    model.convert_to_fp16()
    trainer = MixedPrecisionTrainer(model=model, precision="fp16")
    master = trainer.master_params[0]
    assert master.dtype == th.float32 and th.equal(master, before.half().float())
    assert model.conv.weight.dtype == th.float16


def test_a_half_precision_model_is_refused_in_other_precisions():
    model = Toy()
    model.convert_to_fp16()
    for precision in set(PRECISIONS) - {"fp16"}:
        with pytest.raises(ValueError, match="conv.weight and 1 more parameters are already half precision"):
            MixedPrecisionTrainer(model=model, precision=precision)


def test_small_updates_add_up_in_the_masters():
    model, trainer = trainer_of("fp16")
    opt = th.optim.SGD(trainer.master_params, lr=1e-5)
    for _ in range(100):        # by 1e-7 each, where half-precision weights of size 0.1 are 6e-5 apart
        trainer.zero_grad()
        trainer.backward(1e-2 * model.conv.weight.float().sum())
        assert trainer.optimize(opt)
    moved = (Toy().conv.weight - trainer.master_params[0]).detach()
    th.testing.assert_close(moved, th.full_like(moved, 1e-5), rtol=0.1, atol=0)  # float32 rounds 1e-7 near 0.2 by 4 %
    assert th.equal(model.conv.weight, trainer.master_params[0].half())


def test_small_gradients_survive_by_the_scale():
    model, trainer = trainer_of("fp16", initial_lg_loss_scale=20.0)
    trainer.backward(1e-9 * model.conv.weight.float().sum())        # 1e-9 is zero in half precision
    assert model.conv.weight.grad.dtype == th.float16
    th.testing.assert_close(trainer.collect_grads()[0], th.full((8, 3, 3, 3), 1e-9), rtol=1e-3, atol=0)


def test_loss_scale_grows_by_good_steps_and_falls_by_overflows():
    model, trainer = trainer_of("fp16", initial_lg_loss_scale=20.0, fp16_scale_growth=0.25)
    opt = th.optim.SGD(trainer.master_params, lr=0.0)
    scales = []
    for size in (1.0, 1.0, 1e6, 1.0):       # 1e6 makes gradients of 1e3, at this scale 1e9
        trainer.zero_grad()
        trainer.backward(size * model.conv.weight.float().sum() * 1e-3)
        report = trainer.optimize(opt)
        assert report.stepped == (size == 1.0)
        scales.append(report.lg_loss_scale)
    assert scales == [20.0, 20.25, 20.5, 19.5]
    assert trainer.lg_loss_scale == 19.75


def test_hopeless_overflow_is_fatal():
    model, trainer = trainer_of("fp16", initial_lg_loss_scale=LOWEST_LOG_LOSS_SCALE + 1)
    opt = th.optim.SGD(trainer.master_params, lr=0.0)
    fatal = []
    for _ in range(2):
        trainer.zero_grad()
        trainer.backward(loss_of(model, trainer) * math.inf)
        fatal.append(trainer.optimize(opt).fatal)
    assert fatal == [False, True]


# --- bf16 ------------------------------------------------------------------------------------------------------------


def test_bf16_keeps_a_float32_model():
    model, trainer = trainer_of("bf16")
    assert all(p.dtype == th.float32 for p in model.parameters())
    assert all(a is b for a, b in zip(trainer.master_params, model.parameters()))
    with trainer.autocast():
        assert model.conv(X).dtype == th.bfloat16
    for precision in ("fp32", "fp16"):
        model, trainer = trainer_of(precision)
        with trainer.autocast():
            assert not th.is_autocast_enabled("cpu")


def test_bf16_gradients_survive_a_pass_without_gradients_before():
    model, trainer = trainer_of("bf16")
    with trainer.autocast():
        with th.no_grad():
            target = model(X)
        loss = (model(X) - target - 1).square().mean()
    trainer.backward(loss)
    assert len(trainer.collect_grads()) == len(trainer.master_params)
    assert all(g.any() for g in trainer.collect_grads()[-2:])


# --- state dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("memory_format", [th.contiguous_format, th.channels_last])
def test_state_dict_round_trip(precision, memory_format):
    model = Toy().to(memory_format=memory_format)
    trainer = MixedPrecisionTrainer(model=model, precision=precision)
    values = [th.randn_like(p) for p in trainer.master_params]
    saved = trainer.master_params_to_state_dict(values)
    assert list(saved) == list(Toy().state_dict())
    for value in [*saved.values(), *trainer.master_params_to_state_dict(trainer.master_params).values()]:
        assert type(value) is th.Tensor and value.dtype == th.float32
        assert not value.requires_grad and value.is_contiguous()
    back = trainer.state_dict_to_master_params(saved)
    assert all(th.equal(a, b) and a.stride() == b.stride() for a, b in zip(values, back))
    back[0].zero_()
    assert saved["conv.weight"].any()                   # the list is a copy
    trainer.load_master_params(values)
    assert all(th.equal(a, b) for a, b in zip(values, trainer.master_params))
    for p, value in zip(model.parameters(), values):
        assert th.equal(p, value.to(p.dtype))


def test_buffers_and_tied_parameters_are_saved():
    model = Toy()
    model.twin = model.head
    model.register_buffer("filter", th.ones(2))
    trainer = MixedPrecisionTrainer(model=model, precision="fp16")
    values = [th.randn_like(p) for p in trainer.master_params]
    saved = trainer.master_params_to_state_dict(values)
    assert set(saved) == set(model.state_dict())
    assert th.equal(saved["twin.weight"], saved["head.weight"]) and th.equal(saved["head.weight"], values[4])
    assert th.equal(saved["filter"], th.ones(2))


def test_state_dict_of_another_network():
    _, trainer = trainer_of("fp32")
    saved = trainer.master_params_to_state_dict(trainer.master_params)
    with pytest.raises(ValueError, match="'head.bias'.*another architecture"):
        trainer.state_dict_to_master_params({k: v for k, v in saved.items() if k != "head.bias"})
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(2, 8\) in the state dict and \(1, 8\)"):
        trainer.state_dict_to_master_params({**saved, "head.weight": th.zeros(2, 8)})
    with pytest.raises(ValueError):
        trainer.master_params_to_state_dict(trainer.master_params[:-1])


def test_loss_scale_is_part_of_the_state():
    _, trainer = trainer_of("fp16")
    trainer.lg_loss_scale = 17.125
    _, resumed = trainer_of("fp16")
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.lg_loss_scale == 17.125


# --- options ---------------------------------------------------------------------------------------------------------


def test_precision_is_chosen_by_either_name():
    assert MixedPrecisionTrainer(model=Toy()).precision == "fp32"
    assert MixedPrecisionTrainer(model=Toy(), use_fp16=True).precision == "fp16"
    assert MixedPrecisionTrainer(model=Toy(), use_fp16=True, precision="fp16").use_fp16
    with pytest.raises(ValueError, match="use_fp16=True contradicts precision='bf16'"):
        MixedPrecisionTrainer(model=Toy(), use_fp16=True, precision="bf16")
    with pytest.raises(ValueError, match="Linear cannot be trained in fp16; choose bf16 or fp32"):
        MixedPrecisionTrainer(model=nn.Linear(2, 2), precision="fp16")
    with pytest.raises(ValueError, match="unknown precision 'half'; choose one of: fp32, bf16, fp16"):
        MixedPrecisionTrainer(model=Toy(), precision="half")


# --- clipping --------------------------------------------------------------------------------------------------------


class Kept:
    """An optimizer that keeps the gradients that it was asked to step with."""

    def __init__(self, trainer):
        self.trainer = trainer

    def step(self):
        self.grads = [p.grad.clone() for p in self.trainer.master_params]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_are_scaled_down_to_the_largest_norm_of_all_of_them(precision):
    """Unscaled, in two microbatches; a gradient below the limit keeps its bits."""
    def grads(**options):
        model, trainer = trainer_of(precision, **options)
        for part in X.split(2):
            trainer.backward(loss_of(model, trainer, part) / 2)
        report = trainer.optimize(kept := Kept(trainer))
        return kept.grads, report.logs()

    free, logs = grads()
    norm = th.cat([grad.flatten() for grad in free]).norm().item()
    assert logs["grad_norm"] == pytest.approx(norm, rel=1e-6) and "clipped_grad_norm" not in logs
    clipped, logs = grads(grad_clip=norm / 3)
    assert logs["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert logs["clipped_grad_norm"] == pytest.approx(norm / 3, rel=1e-6)
    for ours, whole in zip(clipped, free):
        th.testing.assert_close(ours, whole / 3, rtol=1e-5, atol=1e-8)
    untouched, logs = grads(grad_clip=2 * norm)
    assert all(th.equal(a, b) for a, b in zip(untouched, free)) and logs["clipped_grad_norm"] == logs["grad_norm"]


def test_a_gradient_of_zero_is_not_clipped():
    model, trainer = trainer_of("fp32", grad_clip=1.0)
    trainer.backward(0 * loss_of(model, trainer))
    trainer.optimize(kept := Kept(trainer))
    assert all((grad == 0).all() for grad in kept.grads)

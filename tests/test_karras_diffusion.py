"""The doors, against numbers made by the original implementation: see golden.py for how far those are to be trusted."""

import pytest
import torch as th
from torch import nn

from cm.diffusion.noise_sampling import UniformSampler
from cm.diffusion.weightings import WEIGHTINGS
from cm.karras_diffusion import KarrasDenoiser
from cm.random_util import SampleStreams
from cm.tensors import update_ema
from cm.types import Batch, Networks
from support import golden
from support.denoisers import Plain, diffusion, net

GRADIENTS = ["input_blocks.0.0.weight", "out.2.weight", "time_embed.0.weight", "middle_block.1.qkv.weight"]


def given(prefix: str) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
    """Images, noise and labels of a golden case."""
    y = golden.tensor(f"{prefix}/y")
    return golden.tensor(f"{prefix}/x_start"), golden.tensor(f"{prefix}/noise"), {"y": y}


def check_gradients(model: nn.Module, loss: th.Tensor, prefix: str) -> None:
    model.zero_grad()
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    golden.assert_close(loss, f"{prefix}/scalar_loss")
    norms = th.stack([grads[name].double().norm() for name in golden.numpy("param_order").tolist()])
    golden.assert_close(norms, f"{prefix}/grad_l2_norm_per_param")
    for name in GRADIENTS:
        golden.assert_close(grads[name], f"{prefix}/grad/{name}")


# --- the denoiser ----------------------------------------------------------------------------------------------------


def test_known_methods():
    denoiser, sigma = diffusion(), th.tensor([0.5, 2.0])
    assert th.equal(denoiser.get_sigmas(sigma), sigma)
    assert denoiser.get_snr(sigma).tolist() == [4.0, 0.25]
    assert all(map(th.equal, denoiser.get_scalings(sigma), denoiser.scaling.scalings(sigma)))
    c_skip, c_out, _ = denoiser.get_scalings_for_boundary_condition(th.tensor([0.002]))
    assert (c_skip.item(), c_out.item()) == (1.0, 0.0)


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@th.no_grad()
def test_golden_denoising_loss(weighting):
    x_start, noise, cond = given("edm_loss")
    sigmas = golden.tensor("edm_loss/sigmas")
    terms = diffusion(weighting=weighting).training_losses(net("model"), x_start, sigmas, cond, noise)
    assert set(terms) == {"loss", "mse", "xs_mse"}
    for name, value in terms.items():
        golden.assert_close(value, f"edm_loss/{weighting}/{name}")


def test_golden_denoising_gradient():
    x_start, noise, cond = given("edm_loss")
    losses = diffusion(weighting="karras").training_losses(
        net("model"), x_start, golden.tensor("edm_loss/sigmas"), cond, noise
    )
    check_gradients(net("model"), losses["loss"].mean(), "edm_loss/karras_backward")


def consistency_loss(case: str, scales: int, teacher: str, norm: str, weighting: str) -> th.Tensor:
    x_start, noise, cond = given(case)
    return diffusion(True, norm, weighting).consistency_losses(
        net("model"), x_start, scales, cond, net("target"),
        net("teacher") if teacher == "distill_heun" else None,
        diffusion() if teacher == "distill_heun" else None,
        noise, golden.tensor(f"{case}/scales{scales}/indices"),
    )["loss"]


def loss_cases(prefix: str) -> list[str]:
    return [name for name in golden.names(prefix) if name.endswith("/loss")]


@pytest.mark.parametrize("name", loss_cases("consistency32") + loss_cases("consistency64"))
@th.no_grad()
def test_golden_consistency_loss(name):
    case, scales, teacher, norm, weighting, _ = name.split("/")
    golden.assert_close(consistency_loss(case, int(scales.removeprefix("scales")), teacher, norm, weighting), name)


@pytest.mark.parametrize("teacher", ["distill_heun", "train_euler"])
def test_golden_consistency_gradient(teacher):
    loss = consistency_loss("consistency32", 18, teacher, "l2", "uniform").mean()
    check_gradients(net("model"), loss, f"consistency32/scales18/{teacher}/l2/uniform_backward")
    assert all(param.grad is None for other in ("target", "teacher") for param in net(other).parameters())


@pytest.mark.parametrize("name", loss_cases("progdist"))
@th.no_grad()
def test_golden_progressive_distillation_loss(name):
    _, scales, norm, weighting, _ = name.split("/")
    x_start, noise, cond = given("progdist")
    losses = diffusion(False, norm, weighting).progdist_losses(
        net("model"), x_start, int(scales.removeprefix("scales")), cond, net("teacher"), diffusion(), noise,
        golden.tensor(f"progdist/{scales}/indices"),
    )
    golden.assert_close(losses["loss"], name)


@th.no_grad()
def test_a_teacher_without_a_denoiser_of_its_own_is_an_edm_of_the_same_levels():
    student = KarrasDenoiser(sigma_data=0.7, sigma_max=50.0, sigma_min=0.01, rho=5.0, distillation=True, loss_norm="l2")
    teacher = KarrasDenoiser(sigma_data=0.7, sigma_max=50.0, sigma_min=0.01, rho=5.0)
    x_start, noise, cond = given("consistency32")
    index = th.tensor([0, 3])
    losses = [
        student.consistency_losses(
            net("model"), x_start, 5, cond, net("target"), net("teacher"), denoiser, noise, index
        )["loss"]
        for denoiser in (teacher, None)
    ]
    assert th.equal(*losses)


def test_everything_optional_may_be_left_out():
    """Noise, indices and conditioning: torch's global stream decides, so a seed repeats them."""
    model, x_start = Plain(), th.zeros(4, 3, 8, 8)
    edm, cm = diffusion(), diffusion(True)

    def losses():
        th.manual_seed(0)
        return [
            edm.training_losses(model, x_start, th.ones(4))["loss"],
            cm.consistency_losses(model, x_start, 5, target_model=model)["loss"],
            cm.consistency_losses(model, x_start, 5, target_model=model, teacher_model=model)["loss"],
            edm.progdist_losses(model, x_start, 5, teacher_model=model)["loss"],
        ]

    for first, second in zip(losses(), losses()):
        assert first.shape == (4,) and first.isfinite().all() and th.equal(first, second)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d, m, x: d.consistency_losses(m, x, 5), "give a target_model"),
        (lambda d, m, x: d.consistency_losses(m, x, 1, target_model=m), "num_scales must be at least 2, got 1"),
        (lambda d, m, x: d.progdist_losses(m, x, 5), "give a teacher_model"),
        (lambda d, m, x: KarrasDenoiser(weight_schedule="kar"), "unknown weight_schedule 'kar'"),
        (lambda d, m, x: KarrasDenoiser(loss_norm="lpisp"), "unknown loss_norm 'lpisp'.*Did you mean 'lpips'"),
        (lambda d, m, x: KarrasDenoiser(sigma_min=1, sigma_max=0.1), "0 < sigma_min < sigma_max, got 1 and 0.1"),
        (lambda d, m, x: d.consistency_objective("edm", None), "unknown training_mode 'edm'; choose one of: consis"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(diffusion(), Plain(), th.zeros(2, 3, 8, 8))


# --- training --------------------------------------------------------------------------------------------------------


def losses_of(mode: str, i: int, model: nn.Module, target: nn.Module) -> th.Tensor:
    x_start, noise, y = (golden.tensor(f"train/{part}")[i] for part in ("x_start", "noise", "y"))
    if mode == "edm":
        sigmas = golden.tensor("train/edm_sigmas")[i]
        return diffusion(weighting="karras").training_losses(model, x_start, sigmas, {"y": y}, noise)["loss"]
    return diffusion(True).consistency_losses(
        model, x_start, 4, {"y": y}, target, net("teacher") if mode == "cd" else None, None, noise,
        golden.tensor("train/cm_indices_scales4")[i],
    )["loss"]


def check_weights(params: dict[str, th.Tensor], initial: dict[str, th.Tensor], prefix: str) -> None:
    """Norms, distances from the start, and some whole tensors."""
    order = golden.numpy("param_order").tolist()
    norms = th.stack([params[name].double().norm() for name in order])
    golden.assert_close(norms, f"{prefix}/l2_norm_per_param")
    moved = th.stack([(params[name].double() - initial[name]).norm() for name in order])
    golden.assert_close(moved, f"{prefix}/l2_dist_from_init_per_param")
    for name in golden.names(f"{prefix}/param/"):
        key = name.removeprefix(f"{prefix}/param/")
        golden.assert_close(params[key], name)


@pytest.mark.parametrize("mode", ["edm", "cd", "ct"])
def test_golden_training_steps(mode):
    """Eight steps of RAdam with two weight averages and, for consistency models, a moving target."""
    model, target = golden.build("model"), golden.build("model").requires_grad_(False)
    params = dict(model.named_parameters())
    initial = {name: param.detach().clone() for name, param in params.items()}
    averages = {rate: {name: value.clone() for name, value in initial.items()} for rate in (0.5, 0.9)}
    optimizer = th.optim.RAdam(model.parameters(), lr=1e-3)
    objective = diffusion(True).consistency_objective("consistency_training", lambda step: (0.95, 4))
    nets = Networks(diffusion(True).bind(model), model, diffusion(True).bind(target), target)
    curves = {"loss": [], "grad_norm": [], "param_norm": [], "lr_after": []}
    for i in range(8):
        optimizer.zero_grad()
        loss = losses_of(mode, i, model, target).mean()
        loss.backward()
        curves["loss"].append(loss.item())
        curves["grad_norm"].append(th.stack([p.grad.double().norm() for p in params.values()]).norm().item())
        curves["param_norm"].append(th.stack([p.detach().double().norm() for p in params.values()]).norm().item())
        optimizer.step()
        for rate, average in averages.items():
            update_ema(average.values(), params.values(), rate)
        if mode == "edm":
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - (i + 1) / 20)
        else:
            objective.after_step(nets, i)
        curves["lr_after"].append(optimizer.param_groups[0]["lr"])
    for name, curve in curves.items():
        golden.assert_close(th.tensor(curve, dtype=th.float64), f"train/{mode}/{name}")
    check_weights(params, initial, f"train/{mode}/final_model")
    for rate, average in averages.items():
        check_weights(average, initial, f"train/{mode}/final_ema{rate}")
    if mode != "edm":
        check_weights(dict(target.named_parameters()), initial, f"train/{mode}/final_target")


@pytest.mark.parametrize("mode", ["edm", "cd", "ct"])
def test_losses_under_autocast(mode):
    """The network runs in bfloat16, everything around it in float32; the loss moves by a percent or so."""
    losses = []
    for enabled in (False, True):
        with th.autocast("cpu", th.bfloat16, enabled=enabled), th.no_grad():
            losses.append(losses_of(mode, 0, net("model"), net("target")))
    assert losses[1].dtype == th.float32 and not th.equal(*losses)
    th.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)


def test_objectives_draw_what_they_report_and_equal_the_doors():
    model, x = Plain(), th.randn(6, 3, 8, 8)
    edm, cm = diffusion(weighting="karras"), diffusion(True)
    batch, streams = Batch(x), lambda: SampleStreams(1, range(6))
    nets = cm.nets(model, model, model, None)

    terms = edm.training_objective()(edm.nets(model, None, None, None), batch, 0, streams())
    rng = streams()
    sigma = (rng.randn(6) * 1.2 - 1.2).exp()
    th.testing.assert_close(terms.sigma, sigma)
    th.testing.assert_close(terms.loss, edm.training_losses(model, x, sigma, noise=rng.randn_like(x))["loss"])

    for mode, teacher in [("consistency_training", None), ("consistency_distillation", model)]:
        terms = cm.consistency_objective(mode, lambda step: (0.0, 5))(nets, batch, 0, streams())
        rng = streams()
        noise, index = rng.randn_like(x), rng.randint(0, 4, (6,))
        losses = cm.consistency_losses(model, x, 5, None, model, teacher, None, noise, index)
        th.testing.assert_close(terms.loss, losses["loss"])
        assert th.equal(terms.sigma, cm.noise_levels(5)[index])


def test_the_law_of_the_noise_levels_can_be_chosen():
    levels = th.tensor([1.5])
    terms = diffusion().training_objective(UniformSampler(levels))(
        diffusion().nets(Plain(), None, None, None), Batch(th.zeros(3, 3, 8, 8)), 0, th
    )
    assert (terms.sigma == 1.5).all()

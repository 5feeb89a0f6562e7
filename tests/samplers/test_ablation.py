"""The sampler of all options: orders on Gaussian data, grids and laws against slow formulas, EDM's own as a case."""

import itertools
import math

import pytest
import torch as th

from cm.config.flags import parse
from cm.config.sampling_schema import AblationConfig, SampleConfig, SolverConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig
from cm.diffusion.schedules import karras_grid
from cm.errors import UserError
from cm.samplers import Churn, integrate
from cm.samplers.ablation import DISCRETIZATIONS, SCALINGS, SCHEDULES, SOLVERS, Ablation
from cm.samplers.heun import Heun
from cm.setup import sampler as sampler_setup
from cm.setup.sample import inherit_model
from support.gaussian import Gaussian, Mixture, Scripted

BED = Gaussian(0.3, 0.5)
SILENT = Scripted()
F64 = th.float64


def noise(n=16, scale=10.0):
    return scale * th.randn(n, 2, generator=th.Generator().manual_seed(0), dtype=F64)


# --- orders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, scaling", list(itertools.product(SCHEDULES, SCALINGS)))
@pytest.mark.parametrize("solver, alpha", [("euler", 1.0), ("heun", 1.0), ("heun", 0.5), ("heun", 2 / 3)])
def test_claimed_orders_on_gaussian_data(solver, alpha, schedule, scaling):
    """Halving the steps divides the error by 2^order, whatever the time and the scaling in which they are taken.

    The midpoint method without scaling is better than its word here: on Gaussian data its leading error vanishes.
    """
    sampler = Ablation(solver, "edm", schedule, scaling, alpha, sigma_min=0.1, sigma_max=10.0)
    x = noise()
    exact = BED.flow(x, 10.0, 0.1)
    errors = []
    for steps in (160, 320):
        end = integrate(sampler, BED.D, x, karras_grid(steps + 1, 0.1, 10.0), SILENT)
        errors.append((end - exact).square().mean().sqrt().item())
    is_lucky = alpha == 0.5 and scaling == "none" and schedule != "vp"
    order = 1 if solver == "euler" else 3 if is_lucky else sampler.order
    # Two terms of nearly the same size cancel in the vp schedule: at 160 steps its order is seen to 0.16 only.
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2 if schedule == "vp" else 0.08)


def test_the_default_is_edms_sampler():
    x, grid = noise(scale=80.0), Ablation().grid(18, 0.002, 80.0, 7.0)
    assert th.equal(grid, Heun().grid(18, 0.002, 80.0, 7.0))
    churn = {"churn": Churn(s_churn=30.0, s_tmin=0.01, s_tmax=1.0, s_noise=1.007)}
    ends = [integrate(sampler, BED.D, x, grid, Scripted(*noises()), **churn) for sampler in (Ablation(), Heun())]
    th.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def noises():
    generator = th.Generator().manual_seed(1)
    return [th.randn(16, 2, generator=generator, dtype=F64) for _ in range(20)]


# --- algorithm 1 as it stands in the paper ---------------------------------------------------------------------------


def laws(schedule, sigma_min, sigma_max):
    """sigma(t), its derivative, its inverse, in plain numbers."""
    if schedule == "linear":
        return (lambda t: t), (lambda t: 1.0), (lambda sigma: sigma)
    if schedule == "ve":
        return math.sqrt, (lambda t: 0.5 / math.sqrt(t)), (lambda sigma: sigma**2)
    eps = 1e-3
    a = math.log(1 + sigma_min**2)                                  # = beta_d eps^2 / 2 + beta_min eps
    b = math.log(1 + sigma_max**2)                                  # = beta_d / 2 + beta_min
    beta_d = 2 * (b - a / eps) / (1 - eps)
    beta_min = b - beta_d / 2

    def sigma(t):
        return math.sqrt(math.exp(beta_d * t**2 / 2 + beta_min * t) - 1)

    def derivative(t):
        return math.exp(beta_d * t**2 / 2 + beta_min * t) * (beta_d * t + beta_min) / (2 * sigma(t))

    def inverse(level):
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log(1 + level**2)) - beta_min) / beta_d

    return sigma, derivative, inverse


def paper(levels, D, x, rngs, solver, schedule, scaling, alpha, sigma_min, sigma_max, churn):
    """Carries the scaled image in time, as the paper does; x is pure noise of deviation 1."""
    sigma, derivative, inverse = laws(schedule, sigma_min, sigma_max)

    def s(t):
        return 1 / math.sqrt(1 + sigma(t) ** 2) if scaling == "vp" else 1.0

    def s_derivative(t):
        return -sigma(t) * derivative(t) * s(t) ** 3 if scaling == "vp" else 0.0

    def slope(x, t):
        denoised = D(x / s(t), sigma(t))
        return (derivative(t) / sigma(t) + s_derivative(t) / s(t)) * x - derivative(t) * s(t) / sigma(t) * denoised

    times = [inverse(level) for level in levels[:-1]] + [0.0]
    x = x * sigma(times[0]) * s(times[0])
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        level = sigma(t)
        gamma = churn.gamma(levels[i], len(times) - 1)
        t_hat = inverse(level * (1 + gamma))
        if gamma > 0:
            extra = math.sqrt(sigma(t_hat) ** 2 - level**2) * s(t_hat) * churn.s_noise
            x = s(t_hat) / s(t) * x + extra * rngs.randn_like(x)
        h = t_next - t_hat
        d = slope(x, t_hat)
        if solver == "heun" and i < len(times) - 2:
            d_prime = slope(x + alpha * h * d, t_hat + alpha * h)
            d = (1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime
        x = x + h * d
    return x


@pytest.mark.parametrize("solver, disc, schedule, scaling, alpha", [
    ("euler", "vp", "vp", "vp", 1.0), ("euler", "ve", "ve", "none", 1.0), ("heun", "edm", "linear", "none", 0.7),
    ("heun", "vp", "vp", "vp", 1.0), ("heun", "iddpm", "linear", "vp", 1.0), ("heun", "ve", "vp", "none", 0.9),
    ("heun", "edm", "vp", "none", 1.0),                             # beta_min < 0: the level is 0 at two times
])
def test_whole_paths_as_in_the_paper(solver, disc, schedule, scaling, alpha):
    """With churn, to the data, in float64; we carry x / s, the paper carries x."""
    bed = Mixture.stored()
    low, high = DISCRETIZATIONS[disc].sigma_min, DISCRETIZATIONS[disc].sigma_max
    sampler = Ablation(solver, disc, schedule, scaling, alpha, low, high)
    churn, z = Churn(s_churn=4.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003), noise(scale=1.0)
    grid = sampler.grid(12, low, high, 7.0)
    ours = integrate(sampler, bed.D, z * grid[0], grid, Scripted(*noises()), churn=churn)
    theirs = paper(grid.tolist(), bed.D, z, Scripted(*noises()), solver, schedule, scaling, alpha, low, high, churn)
    th.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


# --- noise levels ----------------------------------------------------------------------------------------------------


def test_grids():
    steps, shares = 10, [i / 9 for i in range(10)]
    sigma, *_ = laws("vp", 0.01, 100.0)
    vp = [sigma(1 + share * (1e-3 - 1)) for share in shares]
    ve = [math.sqrt(100.0**2 * (0.01**2 / 100.0**2) ** share) for share in shares]
    for disc, expected in (("vp", vp), ("ve", ve), ("edm", karras_grid(10, 0.01, 100.0, 5.0).tolist())):
        grid = Ablation(disc=disc).grid(steps, 0.01, 100.0, 5.0)
        th.testing.assert_close(grid, th.tensor([*expected, 0.0], dtype=F64), rtol=1e-9, atol=0)
        assert grid[0].item() == pytest.approx(100) and grid[-2].item() == pytest.approx(0.01)


def test_iddpms_grid():
    """u of Karras et al., one level after the other; those within the range, as evenly as whole steps allow."""
    u = [0.0] * 1001
    for j in range(1000, 0, -1):
        ratio = (math.sin(math.pi / 2 * (j - 1) / 1000 / 1.008) / math.sin(math.pi / 2 * j / 1000 / 1.008)) ** 2
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(ratio, 0.001) - 1)
    within = [level for level in u if 0.002 <= level <= 81]
    expected = [within[round((len(within) - 1) * i / 17)] for i in range(18)]
    grid = Ablation(disc="iddpm").grid(18, 0.002, 81.0, 7.0)
    th.testing.assert_close(grid, th.tensor([*expected, 0.0], dtype=F64), rtol=1e-9, atol=0)
    with pytest.raises(UserError, match="fewer than 1000 steps: lower --steps"):
        Ablation(disc="iddpm").grid(1000, 0.002, 81.0, 7.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_schedules(schedule):
    c = Ablation(schedule=schedule, sigma_min=0.01, sigma_max=100.0).noise_schedule
    sigma, derivative, inverse = laws(schedule, 0.01, 100.0)
    t = th.linspace(0.05, 0.95, 7, dtype=F64)
    for ours, theirs, at in ((c.sigma, sigma, t), (c.slope, derivative, t), (c.time, inverse, c.sigma(t))):
        th.testing.assert_close(ours(at), th.tensor([theirs(value) for value in at.tolist()], dtype=F64))
    step = 1e-6
    th.testing.assert_close(c.slope(t), (c.sigma(t + step) - c.sigma(t - step)) / (2 * step), rtol=1e-7, atol=0)
    th.testing.assert_close(c.time(c.sigma(t)), t)


@pytest.mark.parametrize("options, message", [
    ({"solver": "heum"}, "unknown solver 'heum'; choose one of: euler, heun. Did you mean 'heun'"),
    ({"disc": "ddpm"}, "unknown disc 'ddpm'; choose one of: vp, ve, iddpm, edm"),
    ({"schedule": "cosine"}, "unknown schedule 'cosine'; choose one of: vp, ve, linear"),
    ({"scaling": "ve"}, "unknown scaling 've'; choose one of: vp, none"),
    ({"alpha": 0.0}, "alpha=0 is not a share of a step"),
    ({"alpha": 1.5}, "alpha=1.5 is not a share of a step"),
])
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        Ablation(**options)


# --- flags -----------------------------------------------------------------------------------------------------------


def sampler_of(*argv):
    """What image_sample.py makes of its flags: the sampler, the ends of its grid."""
    sections = (SampleConfig, SolverConfig, ModelConfig, DiffusionConfig, RunConfig)
    settings = parse("", *sections, argv=["--model_path", "nowhere.pt", *argv])
    settings.dry_run = True                                         # no checkpoint is needed to find out
    inherit_model(settings)
    sampler, grid = sampler_setup.sampler_of(settings)
    return sampler, grid[0].item(), grid[-2].item()


def test_any_of_its_flags_chooses_it_as_in_generate():
    assert sampler_of()[0] == Heun()
    assert sampler_of("--solver", "euler")[0] == Ablation("euler")
    sampler, *ends = sampler_of("--disc", "ve", "--schedule", "ve", "--scaling", "vp", "--alpha", "0.5")
    assert sampler == Ablation("heun", "ve", "ve", "vp", 0.5, 0.02, 100.0)
    assert ends == pytest.approx([100, 0.02])
    _, *ends = sampler_of("--disc", "vp", "--sigma_max", "60")
    assert ends == pytest.approx([60, math.sqrt(math.expm1(19.9 / 2 * 1e-6 + 0.1 * 1e-3))])
    _, *ends = sampler_of("--disc", "edm", "--precond", "ve")       # as low as the network knows
    assert ends == pytest.approx([80, 0.02])
    with pytest.raises(UserError, match="--disc ve belongs to --sampler ablation, not to heun; drop one of them"):
        sampler_of("--disc", "ve", "--sampler", "heun")


def test_choices_are_the_tables():
    fields = AblationConfig.__dataclass_fields__
    tables = {"solver": SOLVERS, "disc": DISCRETIZATIONS, "schedule": SCHEDULES, "scaling": SCALINGS}
    for name, table in tables.items():
        assert fields[name].metadata["choices"] == tuple(table)
    assert all(field.default == getattr(Ablation, name) for name, field in fields.items())

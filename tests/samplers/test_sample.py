"""`karras_sample` against images made by the original implementation: see golden.py for how far to trust them."""

import pytest
import torch as th

from cm.errors import UserError
from cm.karras_diffusion import karras_sample
from cm.random_util import SampleStreams
from cm.samplers import Churn
from cm.samplers.heun import Heun
from cm.samplers.sample import SampleOptions, sample
from support import golden
from support.denoisers import Plain, diffusion, net
from support.gaussian import Scripted

CASES = golden.from_json("sample/cases_json")
BAD_TS = "multistep_0_3_5_notend"                                   # ends with noise in its images: refused here


def options_of(args: dict) -> SampleOptions:
    churn = {name: value for name, value in args.items() if name in ("s_churn", "s_tmin", "s_tmax", "s_noise")}
    return SampleOptions(**{name: args[name] for name in args if name not in churn}, churn=Churn(**churn))


def draws_used(args: dict) -> list[int]:
    """Which entries of the golden noise a sampler needs that draws only what it uses.

    The original draws one entry at the start and one per step, used or not.
    """
    steps, name = args["steps"], args["sampler"]
    if name in ("heun", "dpm"):
        levels = diffusion().noise_levels(steps).tolist()
        churned = args.get("s_churn", 0) > 0
        low, high = args.get("s_tmin", 0.0), args.get("s_tmax", float("inf"))
        return [0] + [1 + i for i, level in enumerate(levels) if churned and low <= level <= high]
    if name == "ancestral":
        return list(range(steps))
    return list(range(len(args["ts"]) - 1)) if name == "multistep" else [0]


@pytest.mark.parametrize("name", [name for name in CASES if name != BAD_TS])
def test_golden_samplers(name):
    case, noise = CASES[name], golden.tensor("sample/noise")
    source = Scripted(*noise[draws_used(case["args"])])
    result = sample(
        diffusion(case["distillation"]), net("model"), (2, 3, 32, 32), options_of(case["args"]), generator=source,
        model_kwargs={"y": golden.tensor("sample/y")},
    )
    golden.assert_close(result.images, f"sample/{name}")
    assert result.evaluations == case["nfe"]
    assert not source.draws


def test_golden_multistep_that_ends_with_noise_is_refused():
    """The original returned images with the noise of level ts[-1] in them."""
    with pytest.raises(UserError, match=r"--ts 0,3,5 with .* must rise from 0 to steps-1 = 9"):
        karras_sample(diffusion(True), net("model"), (2, 3, 32, 32), **CASES[BAD_TS]["args"])


def test_all_defaults():
    """No model_kwargs, no generator: a seed of torch's global stream repeats the images, another one does not."""
    model, images = Plain(), []
    for seed in (0, 0, 1):
        th.manual_seed(seed)
        images.append(karras_sample(diffusion(), model, (2, 3, 8, 8), 3))
    assert images[0].shape == (2, 3, 8, 8) and images[0].abs().max() <= 1
    assert th.equal(images[0], images[1]) and not th.equal(images[0], images[2])
    assert not images[0].requires_grad


def test_positional_arguments_have_their_known_places():
    seen, y = [], golden.tensor("sample/y")
    karras_sample(diffusion(), net("model"), (2, 3, 32, 32), 2, True, False, seen.append, {"y": y}, "cpu", 0.01, 50.0)
    assert [info["sigma"] for info in seen] == [50.0, 0.01]


def test_a_sampler_with_options_of_its_own():
    th.manual_seed(0)
    model = Plain()
    results = []
    for sampler in ("heun", Heun()):
        th.manual_seed(1)
        results.append(karras_sample(diffusion(), model, (1, 3, 8, 8), 4, sampler=sampler))
    assert th.equal(*results)


def test_multistep_knows_the_lowest_level_asked_for():
    seen, draws = [], th.randn(2, 1, 3, 8, 8)
    karras_sample(
        diffusion(True), Plain(), (1, 3, 8, 8), 5, callback=seen.append, sampler="multistep", ts=(0, 3, 4),
        sigma_min=1.0, sigma_max=20.0, generator=Scripted(*draws),
    )
    rise = (seen[1]["sigma"] ** 2 - 1.0**2) ** 0.5
    th.testing.assert_close(seen[1]["x"], seen[0]["denoised"] + rise * draws[1])


def test_the_generator_decides_and_the_batch_does_not():
    th.manual_seed(0)
    model = Plain()
    options = dict(steps=6, sampler="ancestral")
    whole = karras_sample(diffusion(), model, (5, 3, 8, 8), generator=SampleStreams(0, range(5)), **options)
    parts = [
        karras_sample(diffusion(), model, (len(rows), 3, 8, 8), generator=SampleStreams(0, rows), **options)
        for rows in (range(2), range(2, 5))
    ]
    th.testing.assert_close(whole, th.cat(parts), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"sampler": "euller"}, ValueError, "unknown sampler 'euller'.*Did you mean 'euler'"),
        ({"sampler": "multistep"}, UserError, r"needs ts, .* such as --ts 0,22,39"),
        ({"sampler": "ancestral", "s_churn": 1.0}, UserError, "Ancestral takes no churn"),
        ({"steps": 0}, ValueError, "at least 1 noise level, got n=0"),
        ({"sigma_min": 0.0}, ValueError, "0 < sigma_min <= sigma_max"),
        ({"s_chrun": 1.0}, TypeError, "s_chrun"),
    ],
)
def test_sampling_mistakes(options, error, message):
    with pytest.raises(error, match=message):
        karras_sample(diffusion(), Plain(), (1, 3, 8, 8), **{"steps": 4, **options})

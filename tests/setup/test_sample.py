"""What sampling takes from how a model was trained."""

import pytest
import torch as th

from cm.config.flags import parse
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig, SampleConfig, SolverConfig
from cm.samplers.sample import SampleOptions
from cm.setup.sample import level_of_images, sampler_of

FLAGS = ["--sampler", "multistep", "--steps", "40", "--ts", "0,24,39"]


@pytest.mark.parametrize("mode, ends_at", [("consistency_training", 0.002), ("ict", 0.002), ("ect", 0.0)])
def test_the_noise_of_the_next_step_is_added_to_an_image(mode, ends_at):
    """A function that ends at 0 gets all of it."""
    argv = [*FLAGS, "--training_mode", mode]
    settings = parse("", SampleConfig, SolverConfig, ModelConfig, DiffusionConfig, RunConfig, argv=argv, seed=42)
    sampler, sigmas = sampler_of(settings)
    assert level_of_images(settings) == sampler.sigma_min == ends_at
    assert sigmas.tolist() == pytest.approx([80, 0.8232, 0], rel=1e-3)

    class Ones:
        def randn_like(self, x):
            return th.ones_like(x)

    x = sampler.step(lambda x, sigma: 0 * x, th.zeros(1, 1, dtype=th.float64), th.tensor([80.0]), sigmas[1:2], Ones())
    assert x.item() == pytest.approx((sigmas[1].item() ** 2 - ends_at**2) ** 0.5, rel=1e-12)


def test_a_sampler_by_its_name_can_end_elsewhere_than_the_grid():
    options = SampleOptions(steps=40, sampler="multistep", ts=(0, 39))
    assert options.make_sampler().sigma_min == 0.002
    assert SampleOptions(steps=40, sampler="multistep", ts=(0, 39), ends_at=0.0).make_sampler().sigma_min == 0

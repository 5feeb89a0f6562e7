"""The sampler of flow maps: exact for the exact map, in any number of steps."""

import pytest
import torch as th

from cm.config.flags import parse
from cm.config.sampling_schema import SampleConfig, SolverConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig
from cm.errors import UserError
from cm.samplers import CountingDenoiser, integrate
from cm.samplers.flow_map import FlowMapSampler
from cm.setup.sampler import sampler_of
from support.gaussian import Gaussian

BED = Gaussian(0.3, 0.7)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_exact_map_leads_to_the_data(steps):
    sampler, D = FlowMapSampler(), CountingDenoiser(BED.flow_map)
    grid = sampler.grid(steps, 0.002, 80.0, 7.0)
    times = grid / (1 + grid)
    th.testing.assert_close(times, th.linspace(80 / 81, 0, steps + 1, dtype=th.float64))
    x = 80 * th.randn(2, 1, 2, 2, dtype=th.float64, generator=th.Generator().manual_seed(0))
    found = integrate(sampler, D, x, grid, th)
    th.testing.assert_close(found, BED.flow(x, 80.0, 0.0), rtol=1e-9, atol=1e-9)
    assert D.calls == steps


@pytest.mark.parametrize("argv, message", [
    (["--sampler", "flowmap"], "--sampler flowmap is for flow maps.*choose onestep"),
    (["--sampler", "onestep", "--second_time", "True"], "this is a flow map: choose --sampler flowmap"),
])
def test_samplers_that_do_not_go_with_the_network_are_refused(argv, message):
    sections = (SampleConfig, SolverConfig, ModelConfig, DiffusionConfig, RunConfig)
    with pytest.raises(UserError, match=message):
        sampler_of(parse("", *sections, argv=argv, seed=42))

"""`ancestral`: its step is the exponential integrator of the reverse SDE, of strong order one."""

import math

import pytest
import torch as th

from cm.diffusion.schedules import karras_grid
from cm.samplers import integrate
from cm.samplers.ancestral import Ancestral
from support.gaussian import Mixture, Scripted, level, stored

# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(4))
def test_an_ancestral_step_is_the_exponential_integrator_of_the_reverse_sde(i):
    x, t, r = stored("st_x")[i], stored("st_t")[i], stored("st_r")[i]
    moved = Ancestral().step(Mixture.stored().D, x, level(t, x), level(r, x), Scripted(stored("st_z1")))
    th.testing.assert_close(moved, stored("st_exp1")[i], rtol=1e-11, atol=1e-12)


# --- whole paths -----------------------------------------------------------------------------------------------------


def test_ancestral_converges_strongly_with_order_one():
    """The same Brownian path, on coarse and fine grids: A = u' int dW/u, from the sum of dW/u over fine steps."""
    bed, fine_steps = Mixture.stored(), 1024
    grid = karras_grid(fine_steps + 1, 0.2, 2.0)
    u = grid**2
    rng = th.Generator().manual_seed(1)
    x = 2.0 * th.randn(400, 2, generator=rng, dtype=th.float64)
    # int dW/u over one fine step has variance 1/u' - 1/u; these are exactly independent from step to step.
    pieces = th.randn(fine_steps, 400, 2, generator=rng, dtype=th.float64)
    pieces *= (1 / u[1:] - 1 / u[:-1]).sqrt()[:, None, None]

    def run(steps: int) -> th.Tensor:
        stride = fine_steps // steps
        levels = grid[::stride]
        sums = pieces.reshape(steps, stride, 400, 2).sum(1)
        unit = (1 / levels[1:] ** 2 - 1 / levels[:-1] ** 2).sqrt()[:, None, None]
        return integrate(Ancestral(), bed.D, x, levels, Scripted(*(sums / unit)))

    exact = run(fine_steps)
    errors = [(run(steps) - exact).square().mean().sqrt().item() for steps in (32, 64)]
    # Measured against 1024 steps, not infinitely many, order 1 shows as log2((1/32-1/1024) / (1/64-1/1024)). Over
    # seeds the slope of 400 paths varies by 0.06.
    assert math.log2(errors[0] / errors[1]) == pytest.approx(math.log2(31 / 15), abs=0.15)

"""The denoising loss on data whose optimal denoiser is known. Golden losses: test_karras_diffusion.py."""

import torch as th

from cm.diffusion.noise_sampling import LossSecondMomentResampler
from cm.diffusion.preconditioning import EDMPrecond
from cm.diffusion.schedules import karras_grid
from cm.diffusion.weightings import get_weightings
from cm.objectives.edm import EDM
from cm.types import Batch
from support.gaussian import Gaussian, Scripted, stored
from support.objectives import F64, nets_of, orthonormal, plain


def test_the_least_denoising_loss():
    bed, t = Gaussian(0.3, stored("g_s").item()), stored("p_t")
    batch, noise = orthonormal(bed, len(t))

    class Law:
        def draw(self, rng, n, device):
            return t, plain(t), None

    terms = EDM(plain, Law())(nets_of(bed.D), batch, 0, Scripted(noise))
    th.testing.assert_close(terms.loss, stored("p_edm_min_loss"), rtol=1e-10, atol=0)
    assert th.equal(terms.sigma, t)


def test_karras_weights_make_the_least_loss_one_at_every_level():
    bed, sigma = Gaussian(0.3, 0.5), th.logspace(-2.5, 2, 9, dtype=F64)
    batch, noise = orthonormal(bed, 9)

    class Law:
        def draw(self, rng, n, device):
            return sigma, plain(sigma), None

    objective = EDM(lambda sigma: get_weightings("karras", sigma**-2, 0.5), Law())
    terms = objective(nets_of(bed.D), batch, 0, Scripted(noise))
    th.testing.assert_close(terms.loss, th.ones(9, dtype=F64), rtol=1e-9, atol=0)
    th.testing.assert_close(terms.logs["mse"], terms.loss)
    th.testing.assert_close(terms.logs["xs_mse"] / EDMPrecond().scalings(sigma).c_out ** 2, terms.loss)


def test_importance_weights_reach_the_loss_but_not_the_logs():
    law = LossSecondMomentResampler(karras_grid(3, 0.1, 10.0), history_per_term=1)
    law.update_with_losses(th.arange(3), th.tensor([1.0, 2.0, 5.0]))
    bed, rng = Gaussian(0.0, 0.5), th.Generator().manual_seed(0)
    u, noise = th.tensor([0.01, 0.2, 0.99]), th.randn(3, 2, 2, generator=rng, dtype=F64)

    class Source(Scripted):
        rand = Scripted.randn

    terms = EDM(plain, law)(nets_of(bed.D), Batch(th.zeros_like(noise)), 0, Source(u, noise))
    weight = 1 / (3 * law.probabilities())
    th.testing.assert_close(terms.loss, weight.float().double() * terms.logs["mse"])
    th.testing.assert_close(terms.sigma, law.sigmas.double())

"""Loss weightings against golden numbers, and where one is another in disguise."""

import pytest
import torch as th

from cm.config.schema import DiffusionConfig
from cm.diffusion.preconditioning import EDMPrecond
from cm.diffusion.weightings import WEIGHTINGS, get_weightings
from support import golden


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_golden_weights(name):
    snrs = golden.tensor("denoise/sigmas") ** -2
    golden.assert_close(get_weightings(name, snrs, 0.5), f"weightings/{name}")


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_karras_is_the_loss_of_the_bare_network(sigma_data):
    sigma = th.logspace(-2, 2, 9, dtype=th.float64)
    c_out = EDMPrecond(sigma_data).scalings(sigma).c_out
    th.testing.assert_close(get_weightings("karras", sigma**-2, sigma_data), c_out**-2)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="weight_schedule 'karas'; choose one of: karras, snr, .* mean 'karras'"):
        get_weightings("karas", th.ones(1), 0.5)


def test_the_flag_offers_the_table():
    flag = DiffusionConfig.__dataclass_fields__["weight_schedule"]
    assert flag.metadata["choices"] == tuple(WEIGHTINGS)

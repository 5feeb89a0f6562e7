"""The handwritten digits, in grey and in RGB."""

import numpy as np
import pytest

from cm.data.sources import open_source
from cm.errors import UserError


def test_digits_stay_grey_where_one_channel_is_asked_for():
    grey, colour = (open_source("digits", 8, channels=channels) for channels in (1, 3))
    assert grey.image(5).shape == (8, 8, 1) and grey.load(5).mode == "L"
    assert np.array_equal(colour.images(np.arange(9)), grey.images(np.arange(9)).repeat(3, axis=3))
    assert open_source("digits", 16, channels=1).image(5).shape == (16, 16, 1)
    with pytest.raises(UserError, match="digits has images of 1 channels, and --channels is 4"):
        open_source("digits", 8, channels=4)

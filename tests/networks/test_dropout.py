"""--dropout_resolutions: where blocks have dropout, in every network."""

import pytest
import torch as th

from cm.errors import UserError
from cm.script_util import create_model

SIDES = (16, 8, 4)


def network(arch, resolutions, **options):
    th.manual_seed(0)
    return create_model(16, 32, 1, channel_mult="1,1,1", attention_resolutions="8", num_head_channels=16, arch=arch,
                        dropout=0.5, dropout_resolutions=resolutions, **options)


def sides_with_dropout(model, monkeypatch):
    """The sides of the maps of which a pass in training drops values, counted where torch draws the mask."""
    found, dropout = set(), th.nn.functional.dropout

    def watched(x, p=0.5, training=True, inplace=False):
        found.update({x.shape[-1]} if p > 0 and training else ())
        return dropout(x, p, training, inplace)

    monkeypatch.setattr(th.nn.functional, "dropout", watched)
    model.train()(th.zeros(1, 3, 16, 16), th.ones(1))
    return found


@pytest.mark.parametrize("arch, options", [
    ("unet", {}), ("unet", {"resblock_updown": True}), ("ddpmpp", {}), ("ncsnpp", {}), ("adm", {}), ("edm2", {}),
])
def test_dropout_takes_place_where_it_is_asked_for(arch, options, monkeypatch):
    for resolutions, expected in (("", SIDES), ("8,4", (8, 4)), ("16", (16,))):
        found = sides_with_dropout(network(arch, resolutions, **options), monkeypatch)
        assert found == set(expected)
        monkeypatch.undo()


@pytest.mark.parametrize("arch", ["unet", "edm2"])
def test_a_resolution_of_no_level_is_refused(arch):
    with pytest.raises(UserError, match="no dropout is possible at resolution 2: .* side 16 works at 16, 8, 4"):
        network(arch, "8,2")
    with pytest.raises(UserError, match="--dropout_resolutions 'eight' is not a list of image sides"):
        network(arch, "eight")

"""What the channels of a run change in its flags."""

import pytest

from cm.config.flags import parse
from cm.config.sampling_schema import SampleConfig
from cm.config.schema import TRAINING_SECTIONS, ModelConfig
from cm.errors import UserError
from cm.objectives.lpips import check_lpips_channels
from cm.setup.callbacks import check_flags, sampling_settings
from cm.setup.channels import apply_latent_defaults, demand_pictures
from cm.setup.inherit import inherit_flags


def training(*argv):
    settings = parse("", *TRAINING_SECTIONS, argv=argv, training_mode="edm")
    apply_latent_defaults(settings)
    return settings


@pytest.mark.parametrize("channels, on", [(1, True), (3, True), (4, False), (8, False)])
def test_latents_are_neither_mirrored_nor_clipped_unless_a_flag_asks(channels, on):
    settings = training("--channels", str(channels))
    assert settings.values["random_flip"] is on
    assert sampling_settings(settings).values["clip_denoised"] is on
    sampling = parse("", SampleConfig, ModelConfig, argv=["--channels", str(channels), "--clip_denoised", "True"])
    apply_latent_defaults(sampling)
    assert sampling.values["clip_denoised"] is True


def test_an_older_manifest_means_three():
    settings = parse("", ModelConfig, argv=["--channels", "1"])
    with pytest.raises(UserError, match="--channels asks for channels=1, but the checkpoint x.pt was made with .*=3"):
        inherit_flags(settings, {"image_size": 8}, (), "x.pt")
    inherit_flags(settings, {"channels": 1}, (), "x.pt")


def test_networks_that_know_pictures_take_no_latents():
    settings = training("--channels", "4", "--eval_interval", "1", "--eval_ref", "ref.npz")
    with pytest.raises(UserError, match="--eval_interval 1: .* is for pictures.*latents of 4 channels"):
        check_flags(settings)
    with pytest.raises(UserError, match="--outdir is for pictures"):
        demand_pictures(settings, "--outdir")
    with pytest.raises(UserError, match="lpips' compares pictures.*choose another --loss_norm"):
        check_lpips_channels(4)
    check_lpips_channels(1)

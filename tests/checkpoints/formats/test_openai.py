"""Weights without a manifest: the published files, guided-diffusion's, and files that are something else."""

import io
import json
from pathlib import Path

import pytest
import torch as th

from cm.checkpoints import loading
from cm.checkpoints.formats import openai
from cm.checkpoints.loading import WeightsFile
from cm.config.flags import parse
from cm.config.objective_schema import ConsistencyConfig
from cm.config.schema import DiffusionConfig, ModelConfig, TrainConfig
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.script_util import create_model
from cm.setup.inherit import inherit_checkpoint
from cm.setup.model import model_from
from support.nets import plain_state_dict
from support.weights import TINY, adopt, tiny

DATA = Path(__file__).parents[2] / "data"
TOLD = ["--image_size", "8", "--num_head_channels", "16"]
PUBLISHED = {
    "edm_imagenet64_ema.pt": ("edm", 64), "cd_imagenet64_l2.pt": ("consistency_distillation", 64),
    "cd_imagenet64_lpips.pt": ("consistency_distillation", 64), "ct_imagenet64.pt": ("consistency_training", 64),
    "edm_bedroom256_ema.pt": ("edm", 256), "cd_bedroom256_l2.pt": ("consistency_distillation", 256),
    "cd_bedroom256_lpips.pt": ("consistency_distillation", 256), "ct_bedroom256.pt": ("consistency_training", 256),
    "edm_cat256_ema.pt": ("edm", 256), "cd_cat256_l2.pt": ("consistency_distillation", 256),
    "cd_cat256_lpips.pt": ("consistency_distillation", 256), "ct_cat256.pt": ("consistency_training", 256),
}


@pytest.fixture
def bare(tmp_path):
    th.save(plain_state_dict(tiny()), tmp_path / "cd_imagenet64_l2.pt")
    return tmp_path / "cd_imagenet64_l2.pt"


# --- the published files ---------------------------------------------------------------------------------------------


def published_weights(side):
    """Names and shapes of a published family, without memory."""
    if side == 64:
        keys = json.loads((DATA / "unet_keys_imagenet64.json").read_text())
        return {name: th.empty(shape, device="meta") for name, shape in keys}
    with th.device("meta"):
        return create_model(
            image_size=256, num_channels=256, num_res_blocks=2, attention_resolutions="32,16,8", num_head_channels=64,
            resblock_updown=True, use_scale_shift_norm=False,
        ).state_dict()


@pytest.mark.parametrize("url", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_all_published_files_need_no_flags(name, url, monkeypatch):
    mode, side = PUBLISHED[name]
    path = f"https://openaipublic.blob.core.windows.net/consistency/{name}" if url else f"/models/{name}"
    monkeypatch.setattr("cm.io.storage.exists", lambda asked: asked == path)
    monkeypatch.setattr(dist, "load_state_dict", lambda asked, **more: published_weights(side))
    settings, source = adopt(path)
    with th.device("meta"):
        model = model_from(settings)
    found = source.take()
    loading.check(model, found, path)
    tensors, parameters = {64: (541, 295_899_267), 256: (566, 526_304_771)}[side]
    assert len(found) == tensors
    assert sum(param.numel() for param in model.parameters()) == parameters
    assert settings.values["training_mode"] == source.training_mode == mode
    assert {block.num_heads * 64 for block in model.modules() if hasattr(block, "num_heads")} <= {
        block.qkv.in_channels for block in model.modules() if hasattr(block, "qkv")
    }


def test_a_published_file_comes_by_url(bare, monkeypatch):
    """blobfile's part is played by a local file; it is asked for the same URL and opened once."""
    import blobfile

    url = "https://openaipublic.blob.core.windows.net/consistency/" + bare.name
    opened = []

    def blob_file(path, mode, **_):
        opened.append((path, mode))
        return io.BytesIO(bare.read_bytes())

    monkeypatch.setattr(blobfile, "exists", lambda path: path == url)
    monkeypatch.setattr(blobfile, "stat", lambda path: bare.stat() and type("Stat", (), {"size": bare.stat().st_size}))
    monkeypatch.setattr(blobfile, "BlobFile", blob_file)
    settings, source = adopt(url, *TOLD)
    model = model_from(settings)
    loading.fit(model, source.take(), url)
    assert opened == [(url, "rb")]
    assert all(th.equal(a, b) for a, b in zip(model.parameters(), tiny().parameters()))
    with pytest.raises(UserError, match="--model_path https://openai.*/x.pt: no such file"):
        adopt(url.replace(bare.name, "x.pt"))


# --- what is asked, and what contradicts -----------------------------------------------------------------------------


def test_a_file_of_another_name_asks_for_what_weights_do_not_tell(bare):
    other = bare.rename(bare.with_name("mine.pt"))
    with pytest.raises(UserError, match=r"mine.pt has no manifest.*also give --image_size, --num_head_channels \(or "
                                        r"--num_heads\), --training_mode \(edm, consistency_distillation, "):
        adopt(other)
    with pytest.raises(UserError, match=r"also give --num_head_channels \(or --num_heads\)$"):
        adopt(other, "--image_size", 8, "--training_mode", "edm")
    settings, source = adopt(other, *TOLD, "--training_mode", "progdist")
    assert {name: settings.values[name] for name in TINY} == TINY
    assert source.training_mode is None and settings.values["training_mode"] == "progdist"


@pytest.mark.parametrize("argv, message", [
    (["--num_channels", "64"], "--num_channels asks for num_channels=64, but the checkpoint .*l2.pt was made.*=32"),
    (["--training_mode", "edm"], "--training_mode asks for .*'edm', but .*l2.pt was made with .*consistency_dist"),
    (["--class_cond", "False"], "--class_cond asks for class_cond=False"),
    (["--channel_mult", "1,2,2"], "--channel_mult asks for"),
])
def test_contradictions_name_flag_and_file(bare, argv, message):
    with pytest.raises(UserError, match=message):
        adopt(bare, *TOLD, *argv)


def test_what_agrees_is_no_contradiction(bare):
    settings, _ = adopt(bare, *TOLD, "--training_mode", "consistency_training", "--channel_mult", "1, 2",
                        "--dropout", "0.3", "--use_fp16", "True")
    assert settings.values["training_mode"] == "consistency_training"


def test_an_empty_channel_mult_is_the_default_of_the_size(tmp_path):
    th.save(plain_state_dict(tiny(channel_mult="1,2")), tmp_path / "edm_cat256_ema.pt")
    settings, _ = adopt(tmp_path / "edm_cat256_ema.pt", *TOLD, "--channel_mult", "")
    assert settings.values["channel_mult"] == "1,2"


def training(*argv):
    return parse("", ModelConfig, DiffusionConfig, TrainConfig, ConsistencyConfig, argv=[str(word) for word in argv])


def test_a_teacher_gives_its_student_the_architecture(bare, tmp_path):
    th.save(plain_state_dict(tiny(num_channels=64)), tmp_path / "wide.pt")
    settings = training(*TOLD, "--teacher_model_path", bare, "--resume_checkpoint", tmp_path / "wide.pt")
    inherit_checkpoint(settings, "teacher_model_path")
    assert {name: settings.values[name] for name in TINY} == TINY
    assert set(settings.sources) == {"teacher_model_path"}
    with pytest.raises(UserError, match="the checkpoint .*l2.pt asks for num_channels=32, but .*wide.pt was made with"):
        inherit_checkpoint(settings, "resume_checkpoint")


def test_weights_are_read_once(bare, monkeypatch):
    reads = []
    load = dist.load_state_dict
    monkeypatch.setattr(dist, "load_state_dict", lambda path, **more: reads.append(path) or load(path, **more))
    _, source = adopt(bare, *TOLD)
    assert source.take().keys() == tiny().state_dict().keys() and reads == [str(bare)]
    assert source.weights is None
    assert WeightsFile(str(bare)).take().keys() == tiny().state_dict().keys()


# --- other files -----------------------------------------------------------------------------------------------------


def optimizer_state():
    model = th.nn.Linear(2, 2)
    return th.optim.Adam(model.parameters()).state_dict()


CONTENTS = {
    "diffusers": ({"conv_in.weight": th.zeros(1), "down_blocks.0.attentions.0.to_q.weight": th.zeros(1)},
                  "no 'time_embed.0.weight'; its first entries are conv_in.weight, down_blocks.*names of the diffus"),
    "optimizer": (optimizer_state(), "first entries are state, param_groups; this is the state of an optimizer"),
    "wrapped": ({"state_dict": {"a": th.zeros(1)}}, "the weights are wrapped; save its 'state_dict' alone"),
    "a tensor": (th.zeros(2), "it holds a Tensor, not a dict of tensors"),
    "nothing": ({}, "its first entries are none"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_of_torch_that_hold_something_else(tmp_path, name):
    content, message = CONTENTS[name]
    th.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"x.pt is not a U-Net .*{message}"):
        adopt(tmp_path / "x.pt", *TOLD, "--training_mode", "edm")


BYTES = {
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "it is a web page"),
    "error message": (b'<?xml version="1.0"?><Error><Code>BlobNotFound</Code></Error>', "a server's error message"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-LFS pointer: `git lfs"),
    "nothing": (b"", "is empty"),
    "text": (b"hello", "cannot be loaded"),
}


@pytest.mark.parametrize("name", BYTES)
def test_files_that_are_not_of_torch(tmp_path, name):
    content, message = BYTES[name]
    (tmp_path / "cd_imagenet64_l2.pt").write_bytes(content)
    with pytest.raises(UserError, match=f"cd_imagenet64_l2.pt .*{message}"):
        adopt(tmp_path / "cd_imagenet64_l2.pt")


@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
def test_a_truncated_file(bare, part):
    whole = bare.read_bytes()
    bare.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UserError, match="l2.pt cannot be loaded: .*download or write it again"):
        adopt(bare)


@pytest.mark.parametrize("damage, message", [
    (lambda state: state.pop("middle_block.2.in_layers.0.bias"), "1 missing: middle_block.2.in_layers.0.bias"),
    (lambda state: state.update({"out.2.weight": th.zeros(6, 32, 3, 3)}), r"out.2.weight \[6, 32, 3, 3\] in the file"),
    (lambda state: state.update(stranger=th.zeros(1)), "1 unknown: stranger"),
])
def test_what_does_not_fit_is_named(bare, damage, message):
    state = plain_state_dict(tiny())
    damage(state)
    th.save(state, bare)
    with pytest.raises(UserError, match=f"l2.pt does not fit this network: .*{message}"):
        adopt(bare, *TOLD)


def test_modes_by_name():
    assert {name: openai.published_mode(f"a/{name}").get("training_mode") for name in PUBLISHED} == {
        name: mode for name, (mode, _) in PUBLISHED.items()
    }
    assert openai.published_mode("my_cd_imagenet64_l2.pt") == {}


SMALL = dict(image_size=32, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="16",
             num_head_channels=16)


@pytest.mark.parametrize("options", [
    {},
    {"class_cond": True, "num_classes": 10, "use_scale_shift_norm": True},
    {"resblock_updown": True, "num_res_blocks": 2, "attention_resolutions": "32,16"},
    {"channel_mult": "1", "attention_resolutions": "32"},
    {"channels": 1},
    {"channels": 4, "resblock_updown": True},
    {"channel_mult": "1,2,2", "attention_resolutions": "16,8", "resblock_updown": True, "num_res_blocks": 3},
])
def test_architecture_is_read_off_the_weights(options):
    asked = {**SMALL, **options}
    with th.device("meta"):
        flags = openai.model_flags(create_model(**asked).state_dict(), "x.pt", image_size=32)
        again = create_model(**{**SMALL, **flags})
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in create_model(**asked).state_dict().items()
        }
    for name in ("num_channels", "num_res_blocks", "channel_mult", "attention_resolutions"):
        assert flags[name] == asked[name], name
    assert flags["channels"] == asked.get("channels", 3)
    assert flags.get("resblock_updown", False) == (asked.get("resblock_updown", False) and asked["channel_mult"] != "1")


def test_the_row_of_no_class_is_no_class():
    asked = SMALL | {"class_cond": True, "num_classes": 10, "null_class": True}
    with th.device("meta"):
        weights = create_model(**asked).state_dict()
    assert openai.model_flags(weights, "x.pt", 32, null_class=True)["num_classes"] == 10
    assert openai.model_flags(weights, "x.pt", 32)["num_classes"] == 11, "the weights do not show it"


def test_published_imagenet64_is_recognised():
    flags = openai.model_flags(published_weights(64), "cd_imagenet64_l2.pt")
    assert flags == {
        "channels": 3, "num_channels": 192, "channel_mult": "1,2,3,4", "num_res_blocks": 3,
        "use_scale_shift_norm": True, "resblock_updown": True,
        "class_cond": True, "num_classes": 1000, "image_size": 64, "num_head_channels": 64,
        "attention_resolutions": "32,16,8",
    }


def test_foreign_weights_are_refused():
    with pytest.raises(UserError, match="not a U-Net of this toolkit.*time_embed.0.weight.*conv_in.weight"):
        openai.architecture({"conv_in.weight": th.zeros(1)}, "x.pt")

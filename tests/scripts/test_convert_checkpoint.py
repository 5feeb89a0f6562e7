"""convert_checkpoint.py: EDM pickles and guided-diffusion's weights to checkpoints, consistency models to diffusers."""

import json
import sys
from pathlib import Path

import pytest
import torch as th
from PIL import Image

from cm.checkpoints import loading
from cm.checkpoints import manifest as state
from cm.checkpoints.formats import diffusers as diffusers_folder
from cm.checkpoints.formats import safetensor_files
from cm.config.flags import parse
from cm.config.sampling_schema import SampleConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig
from cm.errors import UserError
from cm.io import storage
from cm.io.torchvision_shim import import_torchvision
from cm.karras_diffusion import karras_sample
from cm.script_util import create_model, model_and_diffusion_defaults
from cm.setup.inherit import inherit_checkpoint
from cm.setup.model import create_diffusion, model_from
from support.as_module import as_module
from support.edm_pickles import KWARGS, creates, dump, net_of, network
from support.nets import plain_state_dict

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_checkpoint.py"


def convert(monkeypatch, *words):
    """The script in this process; what it raises, `dist_util.run` would show in one line."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, words)])
    script = as_module(SCRIPT)
    script.main(script.read_flags())


def loaded(path):
    """The network and denoiser that image_sample.py makes of a path without any other flag."""
    settings = parse("", SampleConfig, ModelConfig, DiffusionConfig, RunConfig, argv=["--model_path", str(path)])
    source = inherit_checkpoint(settings, "model_path", also=("training_mode",))
    model = model_from(settings)
    loading.fit(model, source.take(), source.path)
    return settings, model.eval()


def fresh(**flags):
    th.manual_seed(0)
    model = create_model(**flags)
    for param in model.parameters():
        th.nn.init.normal_(param, std=0.08)
    return model.eval()


# --- EDM and guided-diffusion ----------------------------------------------------------------------------------------


def test_an_edm_pickle_becomes_a_checkpoint(tmp_path, monkeypatch, capsys):
    source = creates(tmp_path / "trace")
    pickled = dump(tmp_path / "net.pkl", net_of(network("ncsnpp"), KWARGS["ncsnpp"], "VEPrecond", source), source)
    convert(monkeypatch, pickled, tmp_path / "native", "--dry_run")
    assert '"arch": "ncsnpp"' in capsys.readouterr().out and not (tmp_path / "native").exists()
    convert(monkeypatch, pickled, tmp_path / "native")
    settings, model = loaded(tmp_path / "native" / "model000000.pt")
    assert (settings.values["arch"], settings.values["precond"], settings.values["training_mode"]) == (
        "ncsnpp", "ve", "edm"
    )
    expected = network("ncsnpp").state_dict()
    assert all(th.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert state.newest(str(tmp_path / "native")).images_seen == 0
    assert not (tmp_path / "trace").exists()


GUIDED = dict(image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="4",
              num_head_channels=16, use_scale_shift_norm=True)


def test_guided_diffusions_weights_become_a_checkpoint(tmp_path, monkeypatch):
    model = fresh(**GUIDED)
    published = plain_state_dict(model)
    rows = {}                                                       # head by head, and one axis of positions
    for name, value in published.items():
        if ".qkv." in name:
            value = value.unflatten(0, (3, -1, 16)).transpose(0, 1).flatten(0, 2)
        rows[name] = value[..., 0] if name.endswith(("qkv.weight", "proj_out.weight")) else value
    th.save(rows, tmp_path / "guided.pt")
    with pytest.raises(UserError, match="also give --image_size, --num_head_channels .*--training_mode"):
        convert(monkeypatch, tmp_path / "guided.pt", tmp_path / "native")
    convert(monkeypatch, tmp_path / "guided.pt", tmp_path / "native", "--image_size", 8, "--num_head_channels", 16,
            "--training_mode", "edm")
    settings, again = loaded(tmp_path / "native" / "model000000.pt")
    assert settings.values["num_head_channels"] == 16
    assert all(th.equal(a, b) for a, b in zip(again.state_dict().values(), published.values()))


@pytest.mark.parametrize("words, message", [
    ([], "--source is missing: convert_checkpoint.py SOURCE DEST"),
    (["a.pt"], "--dest is missing"),
    (["a.pt", "b"], "--source a.pt: no such file"),
    (["--source", "a.pt", "--dest", "b"], "--source a.pt: no such file"),
])
def test_wrong_words(monkeypatch, words, message):
    with pytest.raises(UserError, match=message):
        convert(monkeypatch, *words)


# --- diffusers -------------------------------------------------------------------------------------------------------

COMMON = dict(image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="8",
              num_head_channels=16, use_scale_shift_norm=False)
MODELS = {
    "as on ImageNet": COMMON | dict(class_cond=True, num_classes=10, use_scale_shift_norm=True, resblock_updown=True),
    "as on LSUN": COMMON | dict(channel_mult="1,1,2", attention_resolutions="8,4", resblock_updown=True),
    "plain resampling": COMMON | dict(num_res_blocks=2, class_cond=True, num_classes=10, use_scale_shift_norm=True),
    "grey": COMMON | dict(channels=1),
    "one head": COMMON | dict(num_head_channels=-1, num_heads=1),
}


def checkpoint(folder, flags, mode="consistency_distillation", **others):
    """A checkpoint of this toolkit with its manifest, and its network."""
    model = fresh(**flags)
    config = model_and_diffusion_defaults() | flags | {"training_mode": mode, **others}
    folder.mkdir()
    classes = tuple(f"class {number}" for number in range(flags.get("num_classes", 0)))
    state.save(str(folder), 3, {"ema_0.9999": model.state_dict()}, config, 0, classes=classes)
    return folder / "ema_0.9999_000003.pt", model


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_makes_the_same_images_and_the_way_back_the_same_weights(tmp_path, monkeypatch, name):
    import_torchvision()                                            # which diffusers imports
    from diffusers import ConsistencyModelPipeline

    flags = MODELS[name]
    path, model = checkpoint(tmp_path / "run", flags, scale_mode="fixed", start_scales=40)
    convert(monkeypatch, path, tmp_path / "folder", "--format", "diffusers")
    pipeline = ConsistencyModelPipeline.from_pretrained(str(tmp_path / "folder"))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.num_train_timesteps == 40

    labels = th.tensor([1, 7]) if flags.get("class_cond") else None
    diffusion = create_diffusion(distillation=True, loss_norm="l2")
    for theirs, ours in (({"num_inference_steps": 1}, {"sampler": "onestep", "steps": 40}),
                         ({"num_inference_steps": None, "timesteps": [22, 0]},
                          {"sampler": "multistep", "steps": 40, "ts": (0, 22, 39)})):
        expected = pipeline(batch_size=2, class_labels=labels, output_type="pt",
                            generator=th.Generator().manual_seed(5), **theirs).images * 2 - 1
        th.manual_seed(5)
        images = karras_sample(diffusion, model, (2, flags.get("channels", 3), 16, 16), **ours,
                               model_kwargs={} if labels is None else {"y": labels})
        # Both in float32: the same sums in another order. Without the right heads they differ by 0.1 and more.
        th.testing.assert_close(images, expected.float(), rtol=0, atol=2e-5)
        assert images.std() > 0.02                                  # and are no grey images

    settings, again = loaded(tmp_path / "folder")
    assert settings.values["training_mode"] == "consistency_distillation"
    assert settings.values["channels"] == flags.get("channels", 3)
    assert all(th.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    convert(monkeypatch, tmp_path / "folder", tmp_path / "native")
    native = state.newest(str(tmp_path / "native"))
    assert native.config["num_channels"] == 32
    names = tuple(f"class {number}" for number in range(flags.get("num_classes", 0)))
    assert settings.sources["model_path"].class_names == native.class_names == names


@pytest.mark.parametrize("id2label", [["cat"], {"1": "cat"}, {"0": 5}, 3])
def test_a_table_of_class_names_that_is_none(id2label):
    with pytest.raises(UserError, match="id2label in model_index.json is not a table of class names"):
        diffusers_folder._names_of(id2label, "folder")


def test_diffusers_gets_no_label_of_no_class(tmp_path, monkeypatch):
    """Its pipeline draws from all labels that it finds."""
    flags = MODELS["as on ImageNet"] | {"null_class": True}
    path, model = checkpoint(tmp_path / "run", flags, scale_mode="fixed", start_scales=40)
    convert(monkeypatch, path, tmp_path / "folder", "--format", "diffusers")
    settings, again = loaded(tmp_path / "folder")
    assert (settings.values["num_classes"], settings.values["null_class"]) == (10, False)
    assert th.equal(again.label_emb.weight, model.label_emb.weight[:10])
    assert json.loads((tmp_path / "folder/unet/config.json").read_text())["num_class_embeds"] == 10


def test_the_label_of_no_class_comes_along(tmp_path, monkeypatch):
    """From weights alone, where a flag must say so, and from a pickle of a network with label dropout."""
    flags = MODELS["as on ImageNet"] | {"null_class": True}
    th.save(fresh(**flags).state_dict(), tmp_path / "bare.pt")
    convert(monkeypatch, tmp_path / "bare.pt", tmp_path / "native", "--null_class", "True", "--image_size", 16,
            "--num_head_channels", 16, "--training_mode", "edm")
    config = state.newest(str(tmp_path / "native")).config
    assert (config["num_classes"], config["null_class"]) == (10, True)
    assert loaded(tmp_path / "native" / "model000000.pt")[1].label_emb.weight.shape[0] == 11

    source = creates(tmp_path / "trace")
    for p in (0, 0.1):
        net = net_of(network("ddpmpp"), KWARGS["ddpmpp"] | {"label_dropout": p}, "VPPrecond", source)
        convert(monkeypatch, dump(tmp_path / "net.pkl", net, source), tmp_path / f"pickle{p}")
        assert state.newest(str(tmp_path / f"pickle{p}")).config["null_class"] == (p > 0)


def test_the_training_grid_comes_along(tmp_path, monkeypatch):
    path, _ = checkpoint(tmp_path / "run", COMMON, "consistency_training", scale_mode="progressive", end_scales=200)
    convert(monkeypatch, path, tmp_path / "folder", "--format", "diffusers")
    scheduler = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["num_train_timesteps"], scheduler["sigma_max"]) == (201, 80.0)
    path, _ = checkpoint(tmp_path / "other", COMMON, "consistency_training")
    with pytest.raises(UserError, match="give --num_train_timesteps, such as 201"):
        convert(monkeypatch, path, tmp_path / "folder", "--format", "diffusers")
    path, _ = checkpoint(tmp_path / "fixed", COMMON, "consistency_distillation", scale_mode="fixed", start_scales=18)
    with pytest.raises(UserError, match="num_train_timesteps 40: this model was trained with --start_scales 18"):
        convert(monkeypatch, path, tmp_path / "folder", "--format", "diffusers", "--num_train_timesteps", 40)
    with pytest.raises(UserError, match="num_train_timesteps 18 has no effect without --format diffusers"):
        convert(monkeypatch, path, tmp_path / "new", "--num_train_timesteps", 18)


@pytest.mark.parametrize("change, mode, message", [
    ({}, "edm", "contains only consistency models; this model was trained as edm"),
    ({"arch": "adm"}, "consistency_distillation", "have --arch unet and --precond edm"),
    ({"channel_mult": "2,2"}, "consistency_distillation", "needs a first level of num_channels=32"),
    ({"num_head_channels": -1, "num_heads": 2, "attention_resolutions": "16,8"}, "consistency_distillation",
     "heads of one width; num_heads=2 at levels of 32, 64"),
    ({"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4}, "consistency_distillation",
     "equally many heads in encoder and decoder, not 2 and 4"),
])
def test_what_diffusers_cannot_have(tmp_path, monkeypatch, change, mode, message):
    path, _ = checkpoint(tmp_path / "run", COMMON | change, mode)
    with pytest.raises(UserError, match=message):
        convert(monkeypatch, path, tmp_path / "folder", "--format", "diffusers")
    assert not (tmp_path / "folder").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path, _ = checkpoint(tmp_path / "run", COMMON)
    convert(monkeypatch, path, tmp_path / "folder", "--format", "diffusers")
    return tmp_path / "folder"


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_folder_is_told_from_another_by_its_content(folder):
    """As image_sample.py --outdir does, before it goes on with the images of a stopped run."""
    before = storage.checksum(str(folder))
    assert before == storage.checksum(str(folder))
    change(folder / "unet" / "config.json", sample_size=8)
    assert storage.checksum(str(folder)) != before


def test_folders_that_do_not_fit(folder):
    change(folder / "unet" / "config.json", down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"])
    with pytest.raises(UserError, match="CrossAttnDownBlock2D; this toolkit supports AttnDownBlock2D and DownBlock2D"):
        diffusers_folder.read(str(folder))
    change(folder / "model_index.json", _class_name="DDPMPipeline")
    with pytest.raises(UserError, match="holds a DDPMPipeline with a UNet2DModel, not a ConsistencyModelPipeline"):
        diffusers_folder.read(str(folder))
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not a complete folder of diffusers"):
        diffusers_folder.read(str(folder))


def test_other_files_of_weights(folder):
    """A .bin by torch.save, and half precision; both come as float32."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensor_files.read(str(file))
    _, expected = diffusers_folder.read(str(folder))
    th.save(tensors, folder / "unet" / "diffusion_pytorch_model.bin")
    file.unlink()
    _, found = diffusers_folder.read(str(folder))
    assert all(th.equal(found[name], value) for name, value in expected.items())
    halves = {name: value.half() for name, value in tensors.items()}
    safetensor_files.write(str(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"), halves)
    _, found = diffusers_folder.read(str(folder))
    assert all(value.dtype == th.float32 for value in found.values())
    assert all(th.equal(found[name], value.half().float()) for name, value in expected.items())
    for path in (folder / "unet").glob("diffusion*"):
        path.unlink()
    with pytest.raises(UserError, match="has no weights: none of diffusion_pytorch_model.safetensors"):
        diffusers_folder.read(str(folder))


def test_noise_levels_are_the_samplers_for_diffusion_models_and_the_models_for_consistency_models(tmp_path):
    sections = (SampleConfig, ModelConfig, DiffusionConfig, RunConfig)
    for mode in ("edm", "consistency_distillation"):
        path, _ = checkpoint(tmp_path / mode, COMMON, mode, sigma_max=60.0)
        settings = parse("", *sections, argv=["--model_path", str(path)])
        inherit_checkpoint(settings, "model_path", also=("training_mode",))
        assert settings.values["sigma_max"] == 60
        settings = parse("", *sections, argv=["--model_path", str(path), "--sigma_max", "40"])
        if mode == "edm":
            inherit_checkpoint(settings, "model_path", also=("training_mode",))
            assert settings.values["sigma_max"] == 40
        else:
            with pytest.raises(UserError, match="--sigma_max asks for sigma_max=40.0, but .*sigma_max=60.0"):
                inherit_checkpoint(settings, "model_path", also=("training_mode",))


# --- safetensors and model folders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of consistency training, with random weights."""
    folder = tmp_path_factory.mktemp("runs") / "ct"
    config = {**vars(ModelConfig(**GUIDED)), "training_mode": "consistency_training", "scale_mode": "progressive",
              "start_scales": 2, "end_scales": 150, "data_dir": "/secret/digits", "class_cond": True, "num_classes": 2}
    weights = fresh(**GUIDED, class_cond=True, num_classes=2).state_dict()
    state.save(str(folder), 30, {"model": weights, "ema_0.9": weights}, config, 240, classes=("zero", "one"))
    return folder


@pytest.mark.parametrize("kind, dest", [("safetensors", "x.safetensors"), ("hf", "folder")])
def test_a_run_becomes_a_file_or_folder_without_flags(tmp_path, monkeypatch, trained, kind, dest):
    convert(monkeypatch, trained, tmp_path / dest, "--to", kind)
    settings, model = loaded(tmp_path / dest)
    expected = fresh(**GUIDED, class_cond=True, num_classes=2).state_dict()
    assert settings.values["training_mode"] == "consistency_training"
    assert all(th.equal(value, expected[name]) for name, value in model.state_dict().items())
    convert(monkeypatch, tmp_path / dest, tmp_path / "pipe", "--to", "diffusers")       # which needs the noise levels
    scheduler = json.loads((tmp_path / "pipe/scheduler/scheduler_config.json").read_text())
    index = json.loads((tmp_path / "pipe/model_index.json").read_text())
    assert scheduler["num_train_timesteps"] == 151 and index["id2label"] == {"0": "zero", "1": "one"}
    convert(monkeypatch, tmp_path / dest, tmp_path / "native")
    assert state.newest(str(tmp_path / "native")).class_names == ("zero", "one")


def test_the_card_has_what_the_flags_add(tmp_path, monkeypatch, trained):
    (tmp_path / "r.json").write_text('{"metrics": {"kid": {"label": "KID", "value": 0.5, "extractor": "tiny"}}}')
    Image.new("RGB", (9, 9)).save(tmp_path / "p.jpg", comment=b"home address")
    convert(monkeypatch, trained, tmp_path / "m", "--to", "hf", "--license", "cc-by-4.0", "--results",
            tmp_path / "r.json", "--picture", tmp_path / "p.jpg")
    card, picture = (tmp_path / "m/README.md").read_text(), (tmp_path / "m/samples.png").read_bytes()
    assert "license: cc-by-4.0" in card and "| KID | 0.5 | not recorded | tiny |" in card and "zero, one" in card
    assert "Data set: digits." in card and "/secret" not in card and "| steps | 30 |" in card
    assert picture.startswith(b"\x89PNG") and b"address" not in picture


@pytest.mark.parametrize("dest, words, message", [
    ("x.st", ["--to", "safetensors"], "give one that ends in .safetensors"),
    ("m", ["--license", "mit"], "--license mit has no effect without --format hf"),
    ("m", ["--to", "hf", "--picture", "nowhere.png"], "nowhere.png cannot be read as a picture"),
    ("m", ["--to", "hf", "--results", "nowhere.json"], "nowhere.json cannot be read"),
])
def test_what_fits_no_export_is_refused(tmp_path, monkeypatch, trained, dest, words, message):
    with pytest.raises(UserError, match=message):
        convert(monkeypatch, trained, tmp_path / dest, *words)
    assert not (tmp_path / dest).exists()


def test_weights_do_not_get_lost_among_those_of_a_run(tmp_path, monkeypatch, trained):
    other = state.save(str(tmp_path), 10, {"model": {"w": th.ones(1)}}, {"lr": 1.0}, 240)
    with pytest.raises(UserError, match="--dest .* holds checkpoints of a run: choose another folder"):
        convert(monkeypatch, trained, tmp_path)
    assert state.newest(str(tmp_path)) == other and len(list(tmp_path.iterdir())) == 2

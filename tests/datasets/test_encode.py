"""datasets/encode.py: images of every kind to EDM2's zips of mean and standard deviation."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm.data.labelled import open_labelled
from cm.data.latents import EDM2, LatentRecord
from cm.data.loader import load_data
from cm.data.sources import open_source
from cm.errors import UserError
from support.as_module import as_module
from support.published_sets import mnist
from support.shards import write_shards
from support.tiny_vae import moments_of, pictures, tiny_vae

SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "encode.py"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    tiny_vae(tmp_path_factory.mktemp("vae"))
    return tmp_path_factory.getbasetemp() / "vae0"


@pytest.fixture
def tool(monkeypatch):
    """The script, whose parts have five images."""
    script = as_module(SCRIPT)
    monkeypatch.setattr(script, "PART", 5)
    return script


@pytest.fixture
def encode(tool, vae):
    def run(source, dest, *options):
        words = ["--vae", vae, "--source", source, "--dest", dest, "--batch-size", "4", *options]
        tool.encode(tool.parse(list(map(str, words))))
        return dest

    return run


def written(path):
    """The names in a zip, the arrays [N,2C,H,W] and dataset.json."""
    with zipfile.ZipFile(path) as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        arrays = [np.load(io.BytesIO(archive.read(name))) for name in names]
        return names, np.stack(arrays), json.loads(archive.read("dataset.json"))


def test_a_zip_has_edm2s_layout_and_diffusers_numbers(encode, tmp_path, capsys):
    pixels = pictures(tmp_path / "images")
    names, arrays, content = written(encode(tmp_path / "images", tmp_path / "latents.zip"))
    assert names[0] == "00000/img-mean-std-00000000.npy" and len(names) == 12 and names == sorted(names)
    assert arrays.dtype == np.float32 and np.allclose(arrays, moments_of(tiny_vae(), pixels), atol=1e-5)
    assert content["labels"] == [[name, i // 6] for i, name in enumerate(names)]
    assert content["class_names"] == ["cat", "dog"]
    record = content["latents"]
    assert record["vae"] == "vae0" and record["pixels"] == "unit" and len(record["sha256"]) == 64
    mean, std = np.split(arrays.astype(np.float64), 2, axis=1)
    axes = (0, 2, 3)
    assert np.allclose(record["mean"], mean.mean(axes), rtol=1e-5)
    assert np.allclose(record["std"], np.sqrt((mean**2 + std**2).mean(axes) - mean.mean(axes) ** 2), rtol=1e-5)
    assert not (tmp_path / "latents.zip.parts").exists()
    assert "12 latents of 4 channels and side 8" in capsys.readouterr().out


def test_what_training_sees_has_mean_0_and_deviation_one_half(encode, tmp_path):
    pictures(tmp_path / "images", 40)
    path = encode(tmp_path / "images", tmp_path / "latents")       # a folder
    batch = next(load_data(data_dir=str(path), batch_size=40, image_size=8, channels=4, random_flip=False,
                           class_cond=True, num_workers=0))
    assert abs(batch.images.mean((0, 2, 3))).max() < 0.03          # of 2560 numbers in a channel
    assert abs(batch.images.std((0, 2, 3)) - 0.5).max() < 0.03
    assert batch.cond["y"].bincount().tolist() == [20, 20]


def test_pixels_and_scaling(encode, tmp_path):
    pixels = pictures(tmp_path / "images", 3)
    _, arrays, content = written(encode(tmp_path / "images", tmp_path / "a.zip", "--pixels", "symmetric"))
    assert np.allclose(arrays, moments_of(tiny_vae(), pixels, low=-1), atol=1e-5)
    assert content["latents"]["pixels"] == "symmetric"
    _, _, content = written(encode(tmp_path / "images", tmp_path / "b.zip", "--scaling", "edm2"))
    found = LatentRecord(**content["latents"] | {"mean": tuple(content["latents"]["mean"]),
                                                 "std": tuple(content["latents"]["std"])})
    assert (found.mean, found.std) == (EDM2.mean, EDM2.std) and found.sha256
    with pytest.raises(UserError, match="--scaling edm2 is for latents of 4 channels and --pixels unit"):
        encode(tmp_path / "images", tmp_path / "c.zip", "--scaling", "edm2", "--pixels", "symmetric")


# ---- interrupted ----


def test_an_interrupted_command_goes_on(encode, tool, tmp_path, monkeypatch):
    pictures(tmp_path / "images")
    whole = written(encode(tmp_path / "images", tmp_path / "whole.zip"))
    write, made = tool.Parts.write, []

    def killed(self, part, *rest):
        if part.start == 10:
            raise KeyboardInterrupt
        write(self, part, *rest)

    dest = tmp_path / "latents.zip"
    with monkeypatch.context() as patch:
        patch.setattr(tool.Parts, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            encode(tmp_path / "images", dest)
    parts = tmp_path / "latents.zip.parts"
    assert not dest.exists() and sorted(path.name for path in parts.glob("*.zip")) == ["00000000.zip", "00000005.zip"]
    with pytest.raises(UserError, match="parts of another command .*images 12, now 7.*remove the folder"):
        encode(tmp_path / "images", dest, "--max-images", 7)
    monkeypatch.setattr(tool.Parts, "write", lambda self, part, *rest: made.append(part) or write(self, part, *rest))
    names, arrays, content = written(encode(tmp_path / "images", dest))
    assert made == [range(10, 12)] and names == whole[0] and content == whole[2]
    assert np.array_equal(arrays, whole[1])


def test_ranks_share_the_parts(encode, tool, tmp_path, monkeypatch):
    """One rank after the other, as if they were at work at once: together they make all, and no part twice."""
    from cm.distributed import setup as dist

    pictures(tmp_path / "images", 23)
    made, write = [], tool.Parts.write
    monkeypatch.setattr(tool.Parts, "write", lambda self, part, *rest: made.append(part) or write(self, part, *rest))
    missing = [range(start, min(start + 5, 23)) for start in range(0, 23, 5)]
    monkeypatch.setattr(tool.Parts, "missing", lambda self: missing)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with pytest.raises(UserError, match="what was written so far is gone"):     # the parts of the other rank
        encode(tmp_path / "images", tmp_path / "latents.zip")
    assert made == missing[1::2]
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    names, *_ = written(encode(tmp_path / "images", tmp_path / "latents.zip"))
    assert sorted(made, key=lambda part: part.start) == missing and len(names) == 23


# ---- sources ----


def test_every_kind_of_images_is_read(encode, tmp_path):
    pixels = pictures(tmp_path / "images", 4)
    np.savez(tmp_path / "set.npz", arr_0=pixels, arr_1=np.array([2, 0, 1, 0]), class_names=np.array(["a", "b", "c"]))
    images, labels, kinds = moments_of(tiny_vae(), pixels), [2, 0, 1, 0], {}
    _, kinds["npz"], content = written(encode(tmp_path / "set.npz", tmp_path / "a.zip"))
    assert np.allclose(kinds["npz"], images, atol=1e-5)
    assert [label for _, label in content["labels"]] == labels and content["class_names"] == ["a", "b", "c"]
    _, found, content = written(encode(write_shards(tmp_path / "shards", [3, 4]), tmp_path / "b.zip"))
    assert len(found) == 7 and [label for _, label in content["labels"]] == [i % 3 for i in range(7)]
    packed = mnist(tmp_path, np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8), [5, 0, 9])
    _, found, content = written(encode(packed, tmp_path / "c.zip"))
    assert found.shape == (3, 8, 16, 16) and [label for _, label in content["labels"]] == [5, 0, 9], "grey becomes RGB"
    _, found, content = written(encode("digits", tmp_path / "d.zip", "--max-images", 6))
    assert found.shape == (6, 8, 4, 4) and len(content["class_names"]) == 10
    assert len(open_labelled(str(tmp_path / "set.npz"))) == 4


def test_resolution_crops_as_training_does(encode, tmp_path):
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(40, 24), (16, 16), (20, 31)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    _, arrays, content = written(encode(tmp_path / "images", tmp_path / "a.zip", "--resolution", 12))
    seen = open_source(str(tmp_path / "images"), 12).images(np.arange(3))
    assert np.allclose(arrays, moments_of(tiny_vae(), seen), atol=1e-5) and content["labels"] is None


# ---- mistakes ----


def test_mistakes_are_named(encode, tmp_path):
    images = tmp_path / "images"
    pictures(images)
    with pytest.raises(UserError, match="side 13: the VAE vae0 takes multiples of 2; give --resolution 12"):
        encode(images, tmp_path / "a.zip", "--resolution", 13)
    (tmp_path / "there.zip").write_bytes(b"x")
    with pytest.raises(UserError, match="there.zip already exists"):
        encode(images, tmp_path / "there.zip")
    with pytest.raises(UserError, match="lies in the input folder --source"):
        encode(images, images / "a.zip")
    Image.new("RGB", (16, 18)).save(images / "cat" / "001.png")
    with pytest.raises(UserError, match="cat/001.png is 16x18, and the first image has side 16: give --resolution"):
        encode(images, tmp_path / "b.zip")
    (images / "cat" / "001.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cat/001.png cannot be read: it is not an image.*leaves such images out"):
        encode(images, tmp_path / "c.zip")
    with pytest.raises(SystemExit):
        encode(images, tmp_path / "d.zip", "--batch-size", 0)


def test_a_vae_that_makes_no_numbers_is_refused(tool, tmp_path):
    """Its latents would end the training, days later."""
    import torch as th

    model = tiny_vae()
    with th.no_grad():
        model.encoder.conv_in.weight.fill_(th.nan)
    model.save_pretrained(tmp_path / "vae")
    pictures(tmp_path / "images")
    words = ["--vae", tmp_path / "vae", "--source", tmp_path / "images", "--dest", tmp_path / "x.zip"]
    with pytest.raises(UserError, match="the VAE makes NaN or infinite latents of 5 of 5 images, the first is cat/000"):
        tool.encode(tool.parse(list(map(str, words))))
    assert not (tmp_path / "x.zip").exists()


def test_a_destination_that_has_appeared_meanwhile_is_kept(encode, tool, tmp_path, monkeypatch):
    """Of two commands at once that write to one place, the second ends with an error."""
    pictures(tmp_path / "images")
    dest, missing = tmp_path / "x.zip", tool.Parts.missing
    monkeypatch.setattr(tool.Parts, "missing", lambda self: (dest.write_bytes(b"another's"), missing(self))[1])
    with pytest.raises(UserError, match="--dest .*x.zip already exists"):
        encode(tmp_path / "images", dest)
    assert dest.read_bytes() == b"another's"

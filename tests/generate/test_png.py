"""One PNG per seed: names, what may lie in a folder, and image_sample.py --outdir, killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from cm.config.flags import parse
from cm.config.schema import DiffusionConfig, ModelConfig
from cm.errors import UserError
from cm.generate.engine import SamplingPlan, sample_to_pngs
from cm.generate.png import RECIPE, PngFolder, PngWriter
from cm.karras_diffusion import KarrasDenoiser
from cm.samplers.sample import SampleOptions
from cm.setup.model import model_from
from support.command_line import overridden
from support.mpi import clean_environment, descendants, find_mpiexec
from support.warm import mpiexec, python

ROOT = Path(__file__).resolve().parents[2]
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
MADE = {"sampler": "heun", "s_tmax": float("inf"), "weights": {"crc32": 1}}


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.png"))


# ---- the folder ----


@pytest.mark.parametrize(("subdirs", "names"), [
    (False, ["000003.png", "000999.png", "001000.png", "1234567.png"]),
    (True, ["000000/000003.png", "000000/000999.png", "001000/001000.png", "1234000/1234567.png"]),
])
def test_names_are_those_of_edm(tmp_path, subdirs, names):
    folder, seeds = PngFolder(str(tmp_path), subdirs), [3, 999, 1000, 1234567]
    with PngWriter(folder) as writer:
        writer.put(seeds, IMAGES)
    assert written(tmp_path) == names
    np.testing.assert_array_equal(folder.read(seeds), IMAGES)
    assert not list(tmp_path.rglob("*.partial"))


def test_what_is_missing_or_cut_short_is_to_be_made(tmp_path):
    folder = PngFolder(str(tmp_path), False)
    with PngWriter(folder) as writer:
        writer.put([0, 1, 2, 3], IMAGES)
    folder.path(1).write_bytes(folder.path(1).read_bytes()[:-1])
    folder.path(3).write_bytes(b"")
    assert folder.missing([7, 3, 2, 1, 0]) == [7, 3, 1]


def test_a_folder_holds_images_of_one_kind(tmp_path):
    folder = PngFolder(str(tmp_path / "out"), False)
    folder.claim(MADE)
    folder.claim(MADE)
    for name, value in {"sampler": "euler", "weights": {"crc32": 2}, "another": 1}.items():
        with pytest.raises(UserError, match=f"holds images made with {name}=.*this run has {name}=.*choose another"):
            folder.claim(MADE | {name: value})
    (tmp_path / "out" / RECIPE).write_text("{")
    with pytest.raises(UserError, match="sampling.json is damaged"):
        folder.claim(MADE)


@pytest.mark.parametrize("content, message", [
    (b"\xff\xfe", "sampling.json is damaged"),
    (b"[" * 10**5, "sampling.json"),
    (b"[1, 2]", r"sampling.json is damaged \(it holds a list, not an object\)"),
    (b'{"sampler": "\\u001b[2J"}', r"made with sampler='\\x1b\[2J', and this run has sampler='heun'"),
], ids=["no text", "deep", "a list", "control characters"])
def test_a_hostile_recipe_is_one_line(tmp_path, content, message):
    (tmp_path / RECIPE).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        PngFolder(str(tmp_path), False).claim(MADE)
    assert len(str(caught.value).splitlines()) == 1 and "\x1b" not in str(caught.value)


def test_strange_names_are_no_seeds(tmp_path):
    for name in ("000001", "9" * 30, "\N{SUPERSCRIPT TWO}", "cat"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    PngFolder(str(tmp_path), False).write_labels(lambda seeds: seeds % 3, ())
    assert json.loads((tmp_path / "dataset.json").read_text()) == {"labels": [["000001.png", 1]]}


def test_any_changed_byte_of_a_png_is_seen(tmp_path):
    folder = PngFolder(str(tmp_path), False)
    with PngWriter(folder) as writer:
        writer.put([0], IMAGES[:1])
    whole = folder.path(0).read_bytes()
    for place in range(len(whole)):
        folder.path(0).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert folder.missing([0]) == [0], place


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def png(width: int, pixels: bytes) -> bytes:
    header = width.to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content, message", [
    (png(8, b"no pixels"), "000001.png is damaged"),
    (png(60_000, zlib.compress(b"")), "000001.png is damaged"),
    (png(1, zlib.compress(b"\0" * 4)), r"000001.png has shape \(1, 1, 3\), and the images next to it"),
], ids=["pixels", "bomb", "size"])
def test_a_png_that_someone_made_up_is_one_line(tmp_path, content, message):
    folder = PngFolder(str(tmp_path), False)
    with PngWriter(folder) as writer:
        writer.put([0, 2], IMAGES[:2])
    folder.path(1).write_bytes(content)
    with pytest.raises(UserError, match=f"{message}.*remove it, and the same command draws it again"):
        folder.read([0, 1, 2])


def test_a_folder_of_unknown_images_is_refused(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "cat.png")
    with pytest.raises(UserError, match="holds images, such as .*cat.png, and no sampling.json"):
        PngFolder(str(tmp_path), False).claim(MADE)
    with pytest.raises(UserError, match="cannot write .*cat.png"):
        PngFolder(str(tmp_path / "cat.png"), False).claim(MADE)


def test_a_folder_of_seeds_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "001000").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="001000 is a symbolic link"):
        PngFolder(str(tmp_path / "out"), subdirs=True).claim({"seed": 0})
    PngFolder(str(tmp_path / "out"), subdirs=False).claim({"seed": 0})      # which writes nothing there
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_failure_to_write_is_heard_of(tmp_path):
    (tmp_path / "000000.png").mkdir()
    with pytest.raises(UserError, match="cannot write .*000000.png"), PngWriter(PngFolder(str(tmp_path), False)) as out:
        out.put([0], IMAGES)


# ---- the command ----

NETWORK = ["--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1",
           "--attention_resolutions", "8", "--num_head_channels", "32", "--class_cond", "True", "--num_classes", "5"]
PUBLISHED = ["--image_size", "8", "--num_head_channels", "32", "--attention_resolutions", "8"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A network whose weights matter; a fresh one returns zeros."""
    th.manual_seed(0)
    model = model_from(parse("", ModelConfig, DiffusionConfig, argv=NETWORK))
    with th.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.15 if weight.ndim > 1 else 0.05)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    th.save(model.state_dict(), path)
    return path


def command(model_path, tmp_path, *options):
    return [str(ROOT / "scripts/image_sample.py"), *PUBLISHED, "--model_path", str(model_path),
            "--training_mode", "edm", "--sampler", "euler", "--batch_size", "4", "--log_dir", str(tmp_path / "log"),
            *map(str, options)]


@pytest.mark.mpi
def test_killed_and_started_again_every_seed_has_its_image(model_path, tmp_path):
    """kill -9 of a rank of two; the same command goes on, and its images are those of one rank asked in another way."""
    out = tmp_path / "out"
    args = command(model_path, tmp_path, "--steps", 30, "--outdir", out, "--seeds", "0-59,1500", "--class_label", 3,
                   "--subdirs")
    job = subprocess.Popen([find_mpiexec(), "-n", "2", sys.executable, *args], env=clean_environment(),
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(written(out)) < 9:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.005)
    os.kill(descendants(job.pid)[-1], signal.SIGKILL)
    assert job.wait(timeout=15) != 0
    left = {name: (out / name).stat().st_mtime_ns for name in written(out)}
    assert 9 <= len(left) < 61

    done = mpiexec(2, args)
    assert done.rc == 0, str(done)
    assert written(out) == [*(f"000000/{seed:06d}.png" for seed in range(60)), "001000/001500.png"]
    assert all((out / name).stat().st_mtime_ns == time_ns for name, time_ns in left.items())
    assert f"{61 - len(left)} images drawn, {len(left)} were there already" in done.stdout
    assert (tmp_path / "log" / "grid.png").exists()

    alone = tmp_path / "alone"
    some = command(model_path, tmp_path, "--steps", 30, "--outdir", alone, "--seeds", "1500,7,33", "--class_label", 3)
    assert python(some).rc == 0
    for seed in (7, 33, 1500):
        ours, theirs = alone / f"{seed:06d}.png", PngFolder(str(out), True).path(seed)
        assert ours.read_bytes() == theirs.read_bytes()

    other = mpiexec(2, overridden([*args, "--class_label", "2"]))
    assert other.rc == 2 and "holds images made with class_label=3, and this run has class_label=2" in other.stderr
    assert json.loads((out / RECIPE).read_text())["class_label"] == 3


def test_seeds_do_not_depend_on_the_batch(model_path, tmp_path):
    """Batches of other sizes may round differently in the last bit, which can show as one grey level."""
    model = model_from(parse("", ModelConfig, DiffusionConfig, argv=NETWORK))
    model.load_state_dict(th.load(model_path))
    images = {}
    for size in (1, 5):
        folder = PngFolder(str(tmp_path / str(size)), False)
        folder.claim(MADE)
        plan = SamplingPlan(6, size, 8, seed=0, num_classes=5, rounding="nearest")
        result = sample_to_pngs(model, KarrasDenoiser(loss_norm="l2"), plan, folder, "fp32", SampleOptions(3, "euler"))
        assert (result.drawn, result.there, result.evaluations) == (6, 0, 3)
        images[size] = folder.read(range(6)).astype(int)
    assert np.abs(images[1] - images[5]).max() <= 1 and (images[1] != images[5]).mean() < 0.01
    assert len({image.tobytes() for image in images[5]}) == 6

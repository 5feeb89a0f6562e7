"""datasets/dataset_tool.py and cm/data/raw.py: every format in, zips and folders out, read as training does."""

import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from cm.data.cifar10 import _PlainUnpickler
from cm.data.raw import open_raw
from cm.data.sources import open_source
from cm.errors import UserError
from support.as_module import as_module
from support.mpi import clean_environment, descendants
from support.published_sets import cifar10, cifar_batch, mnist

SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "dataset_tool.py"
RNG = np.random.default_rng(0)
CIFAR = RNG.integers(0, 256, (23, 32, 32, 3), dtype=np.uint8)
CLASSES = [i * 7 % 10 for i in range(23)]


@pytest.fixture(scope="module")
def tool():
    return as_module(SCRIPT)


def run(tool, source, dest, *options):
    return tool.main(["--source", str(source), "--dest", str(dest), "--workers", "2", *map(str, options)])


def png(pixels, kind="png", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def put(folder, content):
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else png(data))
    return folder


def made(path, size=32):
    source = open_source(str(path), size)
    return source.images(np.arange(len(source))), source.labels


# ---- formats in ----


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_cifar10_comes_through_with_pixels_and_labels(tool, tmp_path, dest):
    assert run(tool, cifar10(tmp_path, CIFAR, CLASSES), tmp_path / dest) == 0
    pixels, labels = made(tmp_path / dest)
    np.testing.assert_array_equal(pixels, CIFAR)
    assert labels.tolist() == CLASSES


def test_a_batch_pickled_by_python_3_is_read_too(tmp_path):
    content = {"labels": CLASSES, "data": CIFAR.transpose(0, 3, 1, 2).reshape(23, -1)}
    data = pickle.dumps(content, protocol=2)
    source = open_raw(str(cifar10(tmp_path, CIFAR[:10], CLASSES, data_batch_5=data)))
    np.testing.assert_array_equal(source.images[-23:], CIFAR)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_runs_nothing(tool, tmp_path):
    for call in (os.system, exec, eval, open):
        data = pickle.dumps({"labels": [0], "data": call}, protocol=2)
        source = cifar10(tmp_path, CIFAR, CLASSES, data_batch_3=data)
        with pytest.raises(UserError, match="cifar-10-python.tar.gz.*it asks for .*no need of"):
            run(tool, source, tmp_path / "out.zip")
    hidden = pickle.dumps({"labels": [0], "data": Evil(tmp_path / "bad")}, protocol=2)
    with pytest.raises(pickle.UnpicklingError, match="posix.system"):
        _PlainUnpickler(io.BytesIO(hidden), encoding="latin1").load()
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("data", [
    cifar_batch(CIFAR, CLASSES[:-1], "x"), cifar_batch(CIFAR, CLASSES, "x")[:-900], pickle.dumps([], 2), b"",
])
def test_what_is_no_batch_of_cifar10_is_named(tmp_path, data):
    with pytest.raises(UserError, match="is not cifar-10-python.tar.gz, or the download is not complete"):
        open_raw(str(cifar10(tmp_path, CIFAR, CLASSES, data_batch_2=data or b" ")))


def test_a_download_that_broke_off_is_named(tmp_path):
    path = cifar10(tmp_path, CIFAR, CLASSES)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match="download is not complete"):
        open_raw(str(path))
    digits = mnist(tmp_path, np.zeros((3, 28, 28), np.uint8), [1, 2, 3])
    digits.write_bytes(digits.read_bytes()[:-9])
    with pytest.raises(UserError, match="is not a gzip file, or the download is not complete"):
        open_raw(str(digits))


def test_mnist_is_padded_and_stays_grey(tool, tmp_path):
    images = RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8)
    assert run(tool, mnist(tmp_path, images, list(range(10)) + [3, 4]), tmp_path / "out.zip") == 0
    with zipfile.ZipFile(tmp_path / "out.zip") as archive, archive.open("00000/img00000000.png") as file:
        assert Image.open(file).mode == "L"
    pixels, labels = made(tmp_path / "out.zip")
    np.testing.assert_array_equal(pixels[:, 2:30, 2:30, 1], images)
    assert pixels[:, [0, 1, 30, 31]].max() == 0 and pixels[:, :, [0, 1, 30, 31]].max() == 0
    assert labels.tolist() == list(range(10)) + [3, 4]


def test_lmdb_with_corrupt_entries_named_and_counted(tool, tmp_path, capsys):
    pictures = [RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(6)]
    entries = [png(picture, "webp", lossless=True) for picture in pictures]
    entries[2], entries[4] = b"no picture", entries[4][:90]
    with lmdb.open(str(tmp_path / "cat_lmdb"), map_size=2**22) as env, env.begin(write=True) as transaction:
        for i, data in enumerate(entries):
            transaction.put(f"key{i}".encode(), data)
    status = run(tool, tmp_path / "cat_lmdb", tmp_path / "out", "--resolution", "16x16", "--transform", "center-crop")
    told = capsys.readouterr()
    assert status == 3
    assert "4 images written, 0 too small and left out, 2 unreadable and left out" in told.out
    assert "entry 2 (key2) cannot be read: it is not an image" in told.err and "entry 4 (key4)" in told.err
    names = sorted(path.name for path in (tmp_path / "out").rglob("*.png"))
    assert names == [f"img{i:08d}.png" for i in (0, 1, 3, 5)]               # numbers are those of the source
    expected = Image.fromarray(pictures[5]).crop((5, 0, 25, 20)).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(made(tmp_path / "out", 16)[0][3], expected)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == {"labels": None}


def pictures(count, side=8):
    return [RNG.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def test_labels_of_folders(tool, tmp_path):
    """dataset.json, else top-level folders, else the start of the names."""
    a, b, c = pictures(3)
    put(tmp_path / "imagenet", {"n02/x/1.png": a, "n01/2.png": b, "n02/0.png": c})
    run(tool, tmp_path / "imagenet", tmp_path / "1.zip")
    pixels, labels = made(tmp_path / "1.zip", 8)
    np.testing.assert_array_equal(pixels, [b, c, a])
    assert labels.tolist() == [0, 1, 1]
    run(tool, tmp_path / "1.zip", tmp_path / "again.zip")
    for path in (tmp_path / "1.zip", tmp_path / "again.zip"):
        assert open_source(str(path), 8).class_names == ("n01", "n02")
    put(tmp_path / "flat", {"dog_0.png": a, "cat_1.png": b, "dog_2.png": c})
    run(tool, tmp_path / "flat", tmp_path / "2.zip")
    assert made(tmp_path / "2.zip", 8)[1].tolist() == [0, 1, 1]
    assert open_source(str(tmp_path / "2.zip"), 8).class_names == ("cat", "dog")
    put(tmp_path / "flat", {"dataset.json": b'{"labels": [["dog_0.png", 4], ["cat_1.png", 9], ["dog_2.png", 0]]}'})
    run(tool, tmp_path / "flat", tmp_path / "3.zip")
    assert made(tmp_path / "3.zip", 8)[1].tolist() == [9, 4, 0]
    run(tool, tmp_path / "3.zip", tmp_path / "4", "--max-images", 2)        # and from a zip into a folder
    pixels, labels = made(tmp_path / "4", 8)
    assert labels.tolist() == [9, 4] and np.array_equal(pixels, [b, a])
    put(tmp_path / "flat", {"dataset.json": b'{"labels": [["dog_0.png", 4]]}'})
    put(tmp_path / "one", {"a_0.png": a, "a_1.png": b})
    run(tool, tmp_path / "one", tmp_path / "5.zip")
    assert made(tmp_path / "5.zip", 8)[1] is None


def test_a_zip_of_named_images_and_one_without_classes(tool, tmp_path):
    for names, labels in ((["dog_0.png", "cat_0.png"], [0, 1]), (["1.png", "0.png"], None)):
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for name, pixels in zip(names, pictures(2)):
                archive.writestr(name, png(pixels))
        run(tool, tmp_path / "set.zip", tmp_path / "out.zip")
        found = made(tmp_path / "out.zip", 8)[1]
        assert (None if found is None else found.tolist()) == labels


def test_other_bytes_for_labels_are_an_error(tool, tmp_path):
    put(tmp_path / "set", {"0.png": pictures(1)[0], "dataset.json": b"{"})
    with pytest.raises(UserError, match="dataset.json is not of the form"):
        run(tool, tmp_path / "set", tmp_path / "out.zip")


# ---- transforms ----


def test_center_crop_wide_against_its_rule(tool):
    """The middle round(W h / w) rows of a w x h image, to W x H, between black bars."""
    picture = Image.fromarray(RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    result = np.asarray(tool.center_crop_wide(picture, tool.Shape(64, 32)))
    rows = round(64 * 60 / 80)
    middle = np.asarray(picture)[(60 - rows) // 2 : (60 + rows) // 2]
    expected = np.zeros((64, 64, 3), np.uint8)
    expected[16:48] = Image.fromarray(middle).resize((64, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(result, expected)
    assert tool.center_crop_wide(picture, tool.Shape(128, 64)) is None      # narrower than that
    assert tool.center_crop_wide(Image.new("RGB", (200, 40)), tool.Shape(64, 32)) is None


def test_too_small_images_leave_their_number_unused(tool, tmp_path, capsys):
    put(tmp_path / "set", {f"{i}.png": np.full((40, side, 3), i, np.uint8) for i, side in enumerate((40, 20, 50))})
    options = "--resolution", "32x16", "--transform", "center-crop-wide"
    assert run(tool, tmp_path / "set", tmp_path / "out.zip", *options) == 0
    assert "2 images written, 1 too small" in capsys.readouterr().out
    assert "00000/img00000001.png" not in zipfile.ZipFile(tmp_path / "out.zip").namelist()


def test_grey_images_among_others_need_a_transform(tool, tmp_path):
    put(tmp_path / "set", {"0.png": np.zeros((8, 8), np.uint8), "1.png": pictures(1)[0]})
    with pytest.raises(UserError, match=r"0.png is 8x8 grey and 1.png is 8x8 RGB: give --transform center-crop"):
        run(tool, tmp_path / "set", tmp_path / "out.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]            # nothing half done is left
    assert run(tool, tmp_path / "set", tmp_path / "out.zip", "--resolution", 8, "--transform", "center-crop") == 0


@pytest.mark.parametrize("options", [(), ("--resolution", 8, "--transform", "center-crop")])
def test_all_in_grey_or_all_in_rgb(tool, tmp_path, options):
    grey, colour = np.arange(64, dtype=np.uint8).reshape(8, 8), pictures(1)[0]
    put(tmp_path / "set", {"0.png": grey, "1.png": colour})
    for channels, mode in ((1, "L"), (3, "RGB")):
        out = tmp_path / f"{channels}.zip"
        assert run(tool, tmp_path / "set", out, "--channels", channels, *options) == 0
        with zipfile.ZipFile(out) as archive:
            found = [Image.open(archive.open(f"00000/img{i:08d}.png")) for i in range(2)]
            assert [picture.mode for picture in found] == [mode] * 2
            assert np.array_equal(np.asarray(found[0].convert("L")), grey)
        assert open_source(str(out), 8, channels=channels).image(1).shape == (8, 8, channels)


# ---- what comes out ----


def test_the_layout_of_stylegan_and_the_same_bytes_again(tool, tmp_path):
    source = cifar10(tmp_path, CIFAR, CLASSES)
    run(tool, source, tmp_path / "a.zip")
    tool.main(["--source", str(source), "--dest", str(tmp_path / "b.zip"), "--workers", "1"])
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        members = archive.infolist()
        assert [member.filename for member in members] == [
            *(f"00000/img{i:08d}.png" for i in range(23)), "dataset.json"
        ]
        assert all(member.compress_type == zipfile.ZIP_STORED for member in members)
        assert {member.date_time for member in members} == {(1980, 1, 1, 0, 0, 0)}     # not that of the run
        assert len(archive.read(members[0])) > 32 * 32 * 3                  # PNG without compression
        labels = json.loads(archive.read("dataset.json"))["labels"]
    assert labels == [[f"00000/img{i:08d}.png", label] for i, label in enumerate(CLASSES)]
    assert tool.member_name(1_234_567) == "01234/img01234567.png"


@pytest.mark.parametrize(("content", "options", "message"), [
    ({"a.png": np.zeros((8, 12, 3), np.uint8)}, [], "a.png is 12x8, and images must be square: give --transform"),
    ({"a.png": np.zeros((12, 12, 3), np.uint8)}, [], "12x12, and sides must be powers of two: give --resolution"),
    ({"a.png": b"x"}, [], "none of 1 images could be used: 0 images written.*1 unreadable"),
    ({"a.txt": b""}, [], "no images in"),
    ({"a.png": np.zeros((8, 8, 3), np.uint8)}, ["--transform", "center-crop"], "needs --resolution"),
    ({"a.png": np.zeros((8, 8, 3), np.uint8)}, ["--resolution", "8x4"], "8x4: images must be square; only"),
    ({"a.png": np.zeros((8, 8, 3), np.uint8)}, ["--max-images", "0"], "--max-images 0 must be at least 1"),
])
def test_what_cannot_be_converted(tool, tmp_path, content, options, message):
    put(tmp_path / "set", content)
    with pytest.raises(UserError, match=message):
        run(tool, tmp_path / "set", tmp_path / "out.zip", *options)
    assert not list(tmp_path.glob("out*"))


def test_sources_and_destinations_that_are_not_there(tool, tmp_path):
    for name in ("cifar-10-python.tar.gz", "train-images-idx3-ubyte.gz", "x.zip", "folder", "x_lmdb"):
        with pytest.raises(UserError, match=name):
            run(tool, tmp_path / name, tmp_path / "out.zip")
    put(tmp_path / "full", {"a.png": pictures(1)[0]})
    with pytest.raises(UserError, match="full is also the input --source"):
        run(tool, tmp_path / "full", tmp_path / "full")
    with pytest.raises(UserError, match="--dest .*a.png/out.zip lies in the input folder --source"):
        run(tool, tmp_path / "full", tmp_path / "full" / "a.png" / "out.zip")
    with pytest.raises(SystemExit) as ended:
        run(tool, tmp_path / "full", tmp_path / "out", "--resolution", "big")
    assert ended.value.code == 2


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, dest):
    """A limit on the size of files stands for the disk."""
    source = cifar10(tmp_path, CIFAR, CLASSES)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--source", str(source), "--dest", str(tmp_path / dest), "--workers", "1"],
        env=clean_environment(), capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
    )
    assert done.returncode == 1 and done.stderr.startswith("error: --dest") and "File too large" in done.stderr, done
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_what_it_says_may_not_arrive(tmp_path):
    """On a full disk that is one line; a reader who has gone misses nothing."""
    source = cifar10(tmp_path, CIFAR, CLASSES)
    command = [sys.executable, str(SCRIPT), "--source", str(source), "--workers", "1", "--dest"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, str(tmp_path / "a.zip")], env=clean_environment(), stdout=full, text=True,
                              stderr=subprocess.PIPE)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done
    assert done.stderr.splitlines()[-1] == "error: stdout cannot be written: No space left on device", done
    job = subprocess.Popen([*command, str(tmp_path / "b.zip")], env=clean_environment(), stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    job.stdout.close()
    assert "Traceback" not in job.stderr.read() and job.wait() == 0
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_more_processes_than_any_machine_has_are_refused(tool, tmp_path):
    with pytest.raises(UserError, match="--workers 100000: each is a process; at most 256"):
        tool.main(["--source", "x", "--dest", str(tmp_path / "out.zip"), "--workers", "100000"])


def test_killed_it_leaves_no_destination_and_the_next_run_is_whole(tool, tmp_path):
    big = RNG.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    put(tmp_path / "set", {f"{i}.png": png(big, compress_level=0) for i in range(40)})
    command = [sys.executable, str(SCRIPT), "--source", str(tmp_path / "set"), "--dest", str(tmp_path / "out"),
               "--resolution", "256", "--workers", "1"]
    job = subprocess.Popen(command, env=clean_environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.cm-*/00000/*")):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.005)
    workers = descendants(job.pid)
    job.send_signal(signal.SIGKILL)
    job.wait()
    for pid in workers:                                             # orphans of the pool
        os.kill(pid, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()                                      # an empty folder may be there
    assert subprocess.run(command, env=clean_environment(), capture_output=True).returncode == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 40 and not list(tmp_path.glob("*.partial"))


def test_a_source_is_never_its_own_destination(tool, tmp_path):
    put(tmp_path / "d", {f"{i}.png": CIFAR[i] for i in range(3)})
    run(tool, tmp_path / "d", tmp_path / "a.zip")
    before = (tmp_path / "a.zip").read_bytes()
    with pytest.raises(UserError, match="--dest .*a.zip is also the input --source"):
        run(tool, tmp_path / "a.zip", tmp_path / "a.zip", "--max-images", 1)
    assert (tmp_path / "a.zip").read_bytes() == before


@pytest.mark.parametrize("name", ["cifar-10-python.tar", "cifar10.tgz", "train-images.idx3-ubyte"])
def test_renamed_archives_are_told_their_names(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="cifar-10-python.tar.gz or train-images-idx3-ubyte.gz.*as they are downloaded"):
        open_raw(str(tmp_path / name))

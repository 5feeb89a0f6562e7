"""Readers of images: what they find, which classes they see, and what they say when they cannot."""

import importlib.util
import io
import json
import pickle
import re
import sys
import time
import zipfile
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image

from cm.data import image_source, labels, loader, random_access
from cm.data.decode import centre_crop
from cm.data.formats import zip_archive
from cm.data.loader import load_data
from cm.data.sources import open_source
from cm.errors import UserError
from cm.io import storage
from cm.io.names import NameTable
from support.read_images import read_all

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
NAMED = ["cat_0.png", "cat_1.png", "ant_0.png", "dog_0.png", "ant_1.png", "dog_1.png"]      # classes 1 1 0 2 0 2


def encoded(pixels, kind="PNG"):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def files(names, labels="absent"):
    content = {name: encoded(pixels) for name, pixels in zip(names, PIXELS)}
    return content if labels == "absent" else {**content, "dataset.json": json.dumps({"labels": labels}).encode()}


def as_folder(path, content):
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return str(path)


def as_zip(path, content):
    path.mkdir(exist_ok=True)
    with zipfile.ZipFile(path / "images.zip", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return str(path / "images.zip")


def as_npz(path, **arrays):
    np.savez(path / "images.npz", **arrays)
    return str(path / "images.npz")


STORES = pytest.mark.parametrize("store", [as_folder, as_zip])


# ---- what is found ----


@STORES
def test_file_names_carry_the_class(tmp_path, store):
    source = open_source(store(tmp_path, files(NAMED)), 8)
    assert [source.name(i) for i in range(6)] == sorted(NAMED)
    assert source.num_classes == 3
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.label(2) == 1
    for i in range(6):
        np.testing.assert_array_equal(source.image(i), PIXELS[NAMED.index(source.name(i))])


@STORES
def test_dataset_json_wins_over_file_names(tmp_path, store):
    names = [f"{i // 3:05d}/img_{i:08d}.png" for i in range(6)]
    source = open_source(store(tmp_path, files(names, [[name, 5 - i] for i, name in enumerate(names)])), 8)
    assert [source.name(i) for i in range(6)] == names
    assert source.labels.tolist() == [5, 4, 3, 2, 1, 0] and source.num_classes == 6
    np.testing.assert_array_equal(source.images(np.array([4, 0])), PIXELS[[4, 0]])


@STORES
def test_images_lie_at_every_depth_and_other_files_do_not_count(tmp_path, store):
    content = files(["b/y_0.png", "a-b_0.png", "b/x/z_0.PNG"])
    content |= {"readme.txt": b"", "b/._y_0.png": b"", "empty/notes": b""}
    source = open_source(store(tmp_path, content), 8)
    assert [source.name(i) for i in range(len(source))] == ["a-b_0.png", "b/x/z_0.PNG", "b/y_0.png"]


def test_links_to_folders_are_followed(tmp_path):
    as_folder(tmp_path / "elsewhere", files(NAMED))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    assert len(open_source(f"{tmp_path}/set/", 8)) == 6


def test_npz(tmp_path):
    source = open_source(as_npz(tmp_path, arr_0=PIXELS, arr_1=np.array([2, 0, 1, 1, 0, 2], np.int32)), 8)
    assert source.num_classes == 3 and source.label(0) == 2 and source.labels.dtype == np.int64
    np.testing.assert_array_equal(source.images(np.arange(6)), PIXELS)
    assert source.in_memory and "image 4" in source.name(4)


def test_npz_in_grey_or_in_fortran_order_or_of_another_size(tmp_path):
    grey = open_source(as_npz(tmp_path, arr_0=PIXELS[..., :1]), 8).image(3)
    np.testing.assert_array_equal(grey, np.repeat(PIXELS[3, ..., :1], 3, axis=2))
    fortran = open_source(as_npz(tmp_path, arr_0=np.asfortranarray(PIXELS)), 8)
    np.testing.assert_array_equal(fortran.image(3), PIXELS[3])
    np.testing.assert_array_equal(fortran.load(3), PIXELS[3])
    smaller = open_source(as_npz(tmp_path, arr_0=PIXELS), 4)
    np.testing.assert_array_equal(smaller.image(2), centre_crop(Image.fromarray(PIXELS[2]), 4))


def test_digits():
    source = open_source("digits", 8)
    assert len(source) == 1797 and source.num_classes == 10 and source.in_memory
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    assert source.labels.tolist() == labels.tolist()
    expected = [round(value * 255 / 16) for value in grey[5]]
    assert source.image(5)[..., 1].ravel().tolist() == expected
    assert source.images(np.arange(1797)).max() == 255
    assert open_source("digits", 32).image(5).shape == (32, 32, 3)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_kinds_of_pixels_become_rgb(tmp_path, mode):
    Image.fromarray(PIXELS[0]).convert(mode).save(tmp_path / "a_0.tif")
    assert open_source(str(tmp_path), 8).image(0).shape == (8, 8, 3)


def test_addresses_go_through_blobfile(tmp_path, monkeypatch):
    """blobfile reads local paths as well, so its part can be tried without a network."""
    folder = as_folder(tmp_path / "set", files(NAMED))
    archive = as_zip(tmp_path, files(NAMED))
    npz = as_npz(tmp_path, arr_0=PIXELS)
    monkeypatch.setattr(storage, "is_remote", lambda path: True)
    for path in (folder, archive):
        source = open_source(path, 8)
        assert [source.name(i) for i in range(6)] == sorted(NAMED)
        np.testing.assert_array_equal(source.image(2), PIXELS[0])
    np.testing.assert_array_equal(open_source(npz, 8).image(2), PIXELS[2])
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_source(f"{tmp_path}/nowhere", 8)


# ---- what is kept ----


@STORES
def test_small_sets_are_decoded_once(tmp_path, store, monkeypatch):
    path = store(tmp_path, files(NAMED))
    decoded = []
    decode = image_source.decode
    monkeypatch.setattr(image_source, "decode", lambda data: decoded.append(1) or decode(data))
    source = open_source(path, 8)
    first = source.images(np.array([3, 1]))
    first[:] = 0                                                    # the caller's to change
    np.testing.assert_array_equal(source.images(np.array([1, 3]))[1], PIXELS[NAMED.index("cat_1.png")])
    assert source.in_memory and len(decoded) == 2
    monkeypatch.setattr(image_source, "CACHE_BYTES", 6 * 8 * 8 * 3 - 1)
    source = open_source(path, 8)
    np.testing.assert_array_equal(source.image(3), source.image(3))
    assert not source.in_memory and len(decoded) == 4


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_zip_can_be_read_in_other_processes(tmp_path, start):
    source = open_source(as_zip(tmp_path, files(NAMED)), 8)
    source.read(NAMED[0])                                           # open here before the others start
    expected = open_source(source.data_dir, 8).images(np.arange(6))[::-1]
    context = get_context(start)
    results = context.Queue()
    processes = [context.Process(target=read_all, args=(source, results)) for _ in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        np.testing.assert_array_equal(results.get(timeout=60), expected)
    for process in processes:
        process.join()


def test_every_process_opens_the_zip_for_itself(tmp_path, monkeypatch):
    source = open_source(as_zip(tmp_path, files(NAMED)), 8)
    here = source.archive.file()
    assert source.archive.file() is here
    monkeypatch.setattr(random_access.os, "getpid", lambda: -1)
    assert source.archive.file() is not here
    copy = pickle.loads(pickle.dumps(source))
    assert copy.archive._file is None
    np.testing.assert_array_equal(copy.images(np.arange(6)), source.images(np.arange(6)))


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_every_make_are_read(tmp_path, kind):
    """Long names, notes of the writer in the local header, bytes before the archive, sizes that follow the data."""
    path, content = tmp_path / "images.zip", files([f"{'x' * 70}/{'y' * 90}_{i}.png" for i in range(6)])
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in content.items():
            member = zipfile.ZipInfo(name)
            member.compress_type, member.extra = kind, b"\x99\x99\x04\x00abcd"
            archive.writestr(member, data)
    path.write_bytes(b"#!/bin/sh\nsome lines before" + path.read_bytes())
    np.testing.assert_array_equal(open_source(str(path), 8).images(np.arange(6)), PIXELS)

    class Pipe(io.BytesIO):                                         # zipfile then writes sizes after the data
        def seek(self, *place):
            raise io.UnsupportedOperation

        seekable = tell = seek

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", kind) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    path.write_bytes(pipe.getvalue())
    np.testing.assert_array_equal(open_source(str(path), 8).images(np.arange(6)), PIXELS)


def test_members_that_unpack_without_end_are_named(tmp_path, monkeypatch):
    """One that says how large it becomes, and one that lies about it."""
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat_0.png", bytes(10**6))
    monkeypatch.setattr(zip_archive, "IMAGE_BYTES", 10**5)
    with pytest.raises(UserError, match="cat_0.png.* it has 1000000 bytes, more than an image"):
        open_source(str(path), 8).image(0)
    path.write_bytes(path.read_bytes().replace((10**6).to_bytes(4, "little"), (10**4).to_bytes(4, "little")))
    with pytest.raises(UserError, match="cat_0.png.* Bad CRC-32"):
        open_source(str(path), 8).image(0)


def test_members_packed_in_another_way_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("cat_0.png", encoded(PIXELS[0]))
    with pytest.raises(UserError, match="its member 'cat_0.png' is packed otherwise than by deflate"):
        open_source(str(tmp_path / "images.zip"), 8)


def test_a_set_is_kept_decoded_if_it_fits(tmp_path):
    source = open_source(as_folder(tmp_path, files(NAMED)), 8)
    assert source.in_memory
    source.keep_decoded(6 * 8 * 8 * 3 - 1)
    assert not source.in_memory
    source.keep_decoded(6 * 8 * 8 * 3)
    assert source.in_memory
    source.image(0)
    source.keep_decoded(0)
    assert source.in_memory                                         # what is there stays
    array = open_source("digits", 8)
    array.keep_decoded(0)
    assert array.in_memory


# ---- what is said ----


@pytest.mark.parametrize(("data_dir", "message"), [
    ("", "--data_dir is empty: name a folder"),
    ("no/such/folder", "no/such/folder does not exist"),
    ("no/such.zip", "no/such.zip does not exist"),
])
def test_nothing_there(data_dir, message):
    with pytest.raises(UserError, match=message):
        open_source(data_dir, 8)


def test_there_but_no_images(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"no images in .*: looked at every depth for \.jpg"):
        open_source(str(tmp_path), 8)
    with pytest.raises(UserError, match="no images in .*images.zip"):
        open_source(as_zip(tmp_path, {"notes.txt": b""}), 8)


def test_not_what_the_name_says(tmp_path):
    picture = tmp_path / "a_0.png"
    picture.write_bytes(encoded(PIXELS[0]))
    (tmp_path / "set.zip").mkdir()
    with pytest.raises(UserError, match="is a file; expected a folder"):
        open_source(str(picture), 8)
    with pytest.raises(UserError, match="is a folder; expected a file"):
        open_source(str(tmp_path / "set.zip"), 8)
    (tmp_path / "broken.zip").write_text("hello")
    with pytest.raises(UserError, match="broken.zip is not a zip archive of images"):
        open_source(str(tmp_path / "broken.zip"), 8)
    with pytest.raises(UserError, match="--image_size 0"):
        open_source("digits", 0)


@pytest.mark.parametrize(("arrays", "message"), [
    ({"arr_0": np.array([{}, {}], object)}, "not an npz of plain arrays: it holds pickled Python objects"),
    ({"mu": np.zeros(3), "sigma": np.zeros(3)}, "has no images: expected arr_0, found mu, sigma"),
    ({"arr_0": PIXELS.astype(np.float32)}, r"arr_0 is float32 \[6, 8, 8, 3\]; images must be uint8 \[N,H,W,3\]"),
    ({"arr_0": PIXELS.transpose(0, 3, 1, 2)}, r"arr_0 is uint8 \[6, 3, 8, 8\]; images must be"),
    ({"arr_0": PIXELS[:0]}, r"arr_0 is uint8 \[0, 8, 8, 3\]"),
])
def test_npz_of_other_things(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        open_source(as_npz(tmp_path, **arrays), 8)


@pytest.mark.parametrize("content", [b"hello", b"", b"PK\x03\x04", pickle.dumps({"a": 1})])
def test_npz_that_is_none(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="x.npz is not an npz of plain arrays"):
        open_source(str(tmp_path / "x.npz"), 8)


@pytest.mark.parametrize(("labels", "reason"), [
    (None, "no arr_1, so already image 0 has no class"),
    (np.zeros((6, 3), np.int64), r"arr_1 is int64 \[6, 3\], not one class number for each of 6 images"),
    (np.zeros(5, np.int64), r"arr_1 is int64 \[5\]"),
    (np.zeros(6), r"arr_1 is float64"),
])
def test_npz_without_classes(tmp_path, labels, reason):
    source = open_source(as_npz(tmp_path, arr_0=PIXELS, **({} if labels is None else {"arr_1": labels})), 8)
    assert source.labels is None and source.num_classes is None and source.label(0) is None
    assert re.search(reason, source.no_labels)


@STORES
def test_classes_have_names_and_an_origin(tmp_path, store):
    source = open_source(store(tmp_path, files(NAMED)), 8)
    assert (source.class_names, source.labels_from) == (("ant", "cat", "dog"), "file names before the first _")
    folders = open_source(store(tmp_path / "folders", files(["b/x.png", "a/x.png", "a/y.png"])), 8)
    assert (folders.class_names, folders.labels_from) == (("a", "b"), "sub-folders")
    pairs = [[name, 1] for name in NAMED]
    text = json.dumps({"labels": pairs, "class_names": ["cat", "dog", "emu"]}).encode()
    listed = open_source(store(tmp_path / "listed", files(NAMED) | {"dataset.json": text}), 8)
    assert (listed.class_names, listed.labels_from) == (("cat", "dog", "emu"), "dataset.json")
    assert listed.num_classes == 3, "although no image is an emu"
    numbers = open_source(store(tmp_path / "numbers", files(NAMED, pairs)), 8)
    assert numbers.class_names == () and numbers.num_classes == 2


def test_class_names_of_arrays(tmp_path):
    classes = {"arr_0": PIXELS, "arr_1": np.array([2, 0, 1, 1, 0, 2])}
    source = open_source(as_npz(tmp_path, **classes, class_names=np.array(["a", "b", "c"])), 8)
    assert (source.class_names, source.labels_from) == (("a", "b", "c"), "arr_1")
    few = open_source(as_npz(tmp_path, **classes, class_names=np.array(["a", "b"])), 8)
    assert few.labels is None and "class_names has 2 names, and there are 3 classes" in few.no_labels
    assert open_source("digits", 8).class_names == tuple("0123456789")


@STORES
@pytest.mark.parametrize(("content", "reason"), [
    (files(["a_0.png"]) | {"dataset.json": b'{"labels": [["a_0.png", 1]], "class_names": ["a"]}'}, "has 1 names"),
    (files(["a_0.png"]) | {"dataset.json": b'{"labels": [["a_0.png", 0]], "class_names": {"0": "a"}}'}, "not a list"),
    (files(["a_0.png", "b.png"]), "'b.png' has no class before an underscore"),
    (files(["a_0.png"], None), "dataset.json has no labels"),
    (files(["a_0.png", "b_0.png"], [["a_0.png", 1]]), "dataset.json has no label for 'b_0.png'"),
    (files(["a_0.png"], [["a_0.png", [0.0, 1.0]]]), "'a_0.png' the label [0.0, 1.0], which is no class number"),
    (files(["a_0.png"], [["a_0.png", True]]), "which is no class number"),
    (files(["a_0.png"], [["a_0.png", -1]]), "the label -1"),
    (files(["a_0.png"], 5), "dataset.json is not of the form"),
    ({**files(["a_0.png"]), "dataset.json": b"{"}, "dataset.json is not of the form"),
    ({**files(["a_0.png"]), "dataset.json": b"[]"}, "dataset.json is not of the form"),
])
def test_files_without_classes(tmp_path, store, content, reason):
    source = open_source(store(tmp_path, content), 8)
    assert source.labels is None and source.label(0) is None and reason in source.no_labels
    assert source.image(0).shape == (8, 8, 3)


def sixteen_bit():
    data = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(data, "PNG")
    return data.getvalue()


@STORES
@pytest.mark.parametrize(("data", "reason"), [
    (b"hello", "it is not an image"),
    (b"", "it is not an image"),
    (encoded(PIXELS[0])[:100], "[Tt]runcated|broken"),
    (encoded(PIXELS[0], "JPEG")[:300], "[Tt]runcated"),
    (sixteen_bit(), "not 8 bits deep"),
])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, store, data, reason):
    source = open_source(store(tmp_path, {**files(["a/cat_0.png"]), "a/dog_0.png": data}), 8)
    source.image(0)
    with pytest.raises(UserError, match=rf"image 1 \(a/dog_0.png\) cannot be read: .*({reason}).*Replace or remove it"):
        source.image(1)


def test_an_image_that_went_away_is_named(tmp_path):
    source = open_source(as_folder(tmp_path, files(NAMED)), 8)
    (tmp_path / "ant_1.png").unlink()
    with pytest.raises(UserError, match=r"image 1 \(ant_1.png\) cannot be read: .*No such file"):
        source.image(1)


def test_damaged_bytes_in_a_zip_are_noticed(tmp_path):
    content = files(NAMED)
    path = as_zip(tmp_path, content)
    data = bytearray((tmp_path / "images.zip").read_bytes())
    data[data.index(content["cat_1.png"]) + 60] ^= 1
    (tmp_path / "images.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"cat_1.png\) cannot be read: Bad CRC-32"):
        open_source(path, 8).images(np.arange(6))


@pytest.mark.parametrize("limit", [60, 20])                         # PIL warns above its limit, refuses twice that
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_of_unsafe_size_are_refused(tmp_path, monkeypatch, limit):
    source = open_source(as_folder(tmp_path, files(["cat_0.png"])), 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match=r"image 0 \(cat_0.png\) cannot be read: .*(limit of 60|limit of 40)"):
        source.image(0)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        open_source("digits", 8)


def test_digits_do_not_import_scikit_learn(monkeypatch):
    """It would take more than a second of every start."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    open_source("digits", 8)
    assert not any(name.partition(".")[0] == "sklearn" for name in sys.modules)


def test_a_zip_costs_no_more_than_a_folder(tmp_path):
    """Processor time of reading the same files in turns: the zip takes about half, for it opens nothing."""
    rng = np.random.default_rng(0)
    content = {f"{i // 100:03d}/{i:05d}.png": rng.bytes(3200) for i in range(500)}
    sources = [open_source(store(tmp_path, content), 8) for store in (as_folder, as_zip)]
    seconds = [[], []]
    for _ in range(7):
        for source, times in zip(sources, seconds):
            start = time.process_time()
            for i in range(500):
                source.encoded(i)
            times.append(time.process_time() - start)
    assert np.median(np.array(seconds[1]) / seconds[0]) < 1


@pytest.mark.parametrize("rule, expected", [
    ("auto", [0, 0, 1]), ("folders", [0, 0, 1]), ("names", [0, 0, 0]),
])
def test_sub_folders_are_classes_where_there_are_several(tmp_path, rule, expected):
    for name in ("cat/img_0.png", "cat/img_1.png", "dog/img_2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert open_source(str(tmp_path), 8, labels=rule).labels.tolist() == expected
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [
        ["cat/img_0.png", 3], ["cat/img_1.png", 4], ["dog/img_2.png", 5]
    ]}))
    assert open_source(str(tmp_path), 8, labels=rule).labels.tolist() == [3, 4, 5], "dataset.json wins"


def test_folders_that_are_asked_for_and_not_there(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a_0.png")
    source = open_source(str(tmp_path), 8, labels="folders")
    assert source.labels is None and "not in sub-folders" in source.no_labels


# ---- large sets ----


PAIRS = [[f"{i:05d}/img{i}.png", i % 7] for i in range(400)]


@pytest.mark.parametrize("text", [
    json.dumps({"labels": PAIRS}), json.dumps({"labels": PAIRS}, indent=2),
    json.dumps({"labels": PAIRS, "class_names": list("abcdefg")}, separators=(",", ":")),
    json.dumps({"class_names": list("abcdefg"), "labels": PAIRS}), json.dumps({"labels": PAIRS[::-1]}),
    json.dumps({"labels": [*PAIRS, ["another.png", 9]]}), json.dumps({"labels": PAIRS[:-1]}),
    json.dumps({"labels": [*PAIRS[:200], ["00200/img200.png", 1.0], *PAIRS[201:]]}),
    json.dumps({"labels": [*PAIRS[:200], ["00200/img200.png", 10**6], *PAIRS[201:]]}),
    json.dumps({"labels": [*PAIRS[:200], ["00200/img200.png", 4, 4], *PAIRS[201:]]}),
    json.dumps({"labels": PAIRS, "labels ": None}),
    json.dumps({"labels": PAIRS})[:-1], json.dumps({"labels": PAIRS})[:-2],
    json.dumps({"labels": PAIRS}) + "]", json.dumps({"labels": PAIRS, "class_names": ["a"]}),
    json.dumps({"labels": PAIRS}).replace("img3", "],[]]"), json.dumps({"labels": PAIRS}).replace("img3", "\\u0069mg3"),
    '{"labels": [], "labels": ' + json.dumps(PAIRS) + "}", json.dumps({"labels": PAIRS})[:-1] + ', "labels": []}',
])
@pytest.mark.parametrize("part_bytes", [1, 1000, 2**15])
def test_labels_are_read_in_parts_as_at_once(monkeypatch, text, part_bytes):
    """Numbers, names and reasons are those of a reader that parses the file at once."""
    names = NameTable.of(name.encode() for name, _ in PAIRS)
    monkeypatch.setattr(labels, "PART_BYTES", part_bytes)
    found = labels.labels_of_json(text.encode(), names)
    monkeypatch.setattr(labels, "_labels_in_order", lambda text, names: None)
    expected = labels.labels_of_json(text.encode(), names)
    assert found[1:] == expected[1:]
    np.testing.assert_array_equal(found.numbers, expected.numbers)


def test_an_image_with_two_labels_has_none():
    pairs = [["0.png", 0], ["1.png", 1], ["1.png", 0]]
    found = labels.labels_of_json(json.dumps({"labels": pairs}).encode(), ["0.png", "1.png"])
    assert found.numbers is None and "1.png has two labels, 1 and 0" in found.reason
    pairs[2][1] = 1                                         # said twice
    assert labels.labels_of_json(json.dumps({"labels": pairs}).encode(), ["0.png", "1.png"]).numbers.tolist() == [0, 1]


def test_a_file_of_labels_in_order_is_never_parsed_at_once(monkeypatch):
    names = NameTable.of(name.encode() for name, _ in PAIRS)
    monkeypatch.setattr(labels, "parse_json", None)
    for content in ({"labels": PAIRS}, {"labels": PAIRS, "class_names": list("abcdefg")}):
        text = json.dumps(content, indent=1)
        assert labels.labels_of_json(text.encode(), names).numbers.tolist() == [label for _, label in PAIRS]


@STORES
def test_what_is_sent_to_another_process_is_the_index(tmp_path, store):
    source = open_source(store(tmp_path, files(NAMED)), 8)
    expected = source.images(np.arange(6))
    frame = pickle.dumps(source)
    assert len(frame) < 6 * 8 * 8 * 3 + 3000, "not what was decoded"
    copy = pickle.loads(frame)
    assert copy.in_memory and copy.labels.tolist() == source.labels.tolist()
    np.testing.assert_array_equal(copy.images(np.arange(6)), expected)


def test_an_open_set_is_not_opened_again(tmp_path, monkeypatch):
    path = as_zip(tmp_path, files(NAMED))
    expected = next(load_data(data_dir=path, batch_size=6, image_size=8, class_cond=True))
    source = open_source(path, 8)
    monkeypatch.setattr(loader, "open_source", None)
    batch = next(load_data(data_dir=path, batch_size=6, image_size=8, class_cond=True, source=source))
    assert batch.images.equal(expected.images) and batch.cond["y"].equal(expected.cond["y"])

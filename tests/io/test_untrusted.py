"""Files made to do harm: nothing in them is executed, no name leads out of its folder, no size is taken on trust."""

import io
import json
import os
import pickle
import re
import stat
import struct
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch as th
from PIL import Image

from cm.checkpoints import manifest
from cm.checkpoints.formats import guided_diffusion, openai
from cm.config.flags import parse
from cm.config.schema import DataConfig, ModelConfig
from cm.data.formats import folder
from cm.data.sources import open_source
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.generate import edit_inputs
from cm.generate.score_store import open_score_store
from cm.io import untrusted
from cm.logging.csv_rows import CSVWriter
from cm.logging.json_lines import JSONWriter
from cm.setup.inherit import inherit_checkpoint
from evaluations.engine.readers import BatchFile

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
HUGE = 10**15
MEMORY_BYTES = 8 * 2**20                        # no refusal below needs more


@pytest.fixture
def little_memory():
    """The test may not use much memory, nor time."""
    begun = time.monotonic()
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY_BYTES
    assert time.monotonic() - begun < 20


def refused(read, path, message="."):
    with pytest.raises(UserError, match=message) as error:
        read(str(path))
    assert len(str(error.value)) < 2000
    return str(error.value)


# --- data, never code ------------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def as_torch_zip(path, evil):
    th.save({"w": th.ones(2), "x": evil}, path)


def as_torch_legacy(path, evil):
    th.save({"w": th.ones(2), "x": evil}, path, _use_new_zipfile_serialization=False)


def as_pickle(path, evil):
    path.write_bytes(pickle.dumps(evil))


def as_npz(path, evil):
    with open(path, "wb") as file:
        np.savez(file, arr_0=np.array([evil], object), arr_1=np.array([evil], object), mu=np.array([evil], object))


def as_npz_of_pickles(path, evil):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("arr_0.npy", "arr_1.npy", "mu.npy", "sigma.npy"):
            archive.writestr(name, pickle.dumps(evil))


def as_npy(path, evil):
    with open(path, "wb") as file:
        np.save(file, np.array([evil], object))


def as_yaml(path, evil):
    path.write_text(f'data_dir: !!python/object/apply:os.system ["touch {evil.mark}"]\n')


PICKLES = (as_torch_zip, as_torch_legacy, as_pickle, as_npz, as_npz_of_pickles, as_npy, as_yaml)


def statistics(path):
    BatchFile(path).statistics()
    BatchFile(path).labels()
    return list(BatchFile(path).batches(2))


def config(path):
    return parse("test", ModelConfig, DataConfig, argv=["--config", path])


READERS = {
    "weights": ("x.pt", dist.load_state_dict),
    "npz of images": ("x.npz", lambda path: open_source(path, 8)),
    "npz of a batch": ("x.npz", statistics),
    "zip of images": ("x.zip", lambda path: open_source(path, 8).images(np.arange(1))),
    "mask npy": ("x.npy", lambda path: edit_inputs.read_mask(path, 8)),
    "mask picture": ("x.png", lambda path: edit_inputs.read_mask(path, 8)),
    "config": ("x.yaml", config),
    "manifest": ("checkpoint_000010.json", manifest.read),
    "search state": ("x.json", lambda path: open_score_store(path, {})),
}


@pytest.mark.parametrize("write", PICKLES)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_reader_executes_what_it_reads(tmp_path, write):
    evil = Evil(tmp_path / "executed")
    for name, read in READERS.values():
        write(tmp_path / name, evil)
        refused(read, tmp_path / name)
    assert not evil.mark.exists()


def test_the_pickles_of_these_tests_are_live(tmp_path):
    evil = Evil(tmp_path / "executed")
    as_pickle(tmp_path / "x", evil)
    pickle.loads((tmp_path / "x").read_bytes())
    assert evil.mark.exists()
    evil.mark.unlink()
    as_npz(tmp_path / "x.npz", evil)
    assert np.load(tmp_path / "x.npz", allow_pickle=True)["mu"] == 0
    assert evil.mark.exists()


def test_postscript_in_a_png_does_not_start_ghostscript(tmp_path, monkeypatch):
    """PIL goes by the content of a file, and hands PostScript to a program that runs it."""
    (tmp_path / "bin").mkdir()
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a_0.png").write_bytes(script)
    refused(lambda path: open_source(path, 8).image(0), tmp_path / "set", "a_0.png.*it is not an image")
    refused(lambda path: edit_inputs.read_mask(path, 8), tmp_path / "set" / "a_0.png", "cannot be read")
    assert not (tmp_path / "executed").exists()
    with Image.open(io.BytesIO(script)) as picture, pytest.raises(OSError):
        picture.load()                                              # what would have happened
    assert (tmp_path / "executed").exists()


# --- names -----------------------------------------------------------------------------------------------------------


def png(pixels=PIXELS[0], kind="PNG"):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def member(name="a_0.png", **facts):
    info = zipfile.ZipInfo(name)
    for fact, value in facts.items():
        setattr(info, fact, value)
    return info


@pytest.mark.parametrize("name", ["../a_0.png", "x/../../a_0.png", "/etc/a_0.png", "C:/a_0.png", "..\\a_0.png",
                                  "\\\\host\\a_0.png"])
def test_members_that_lead_out_of_the_archive_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("b_0.png", png())
        archive.writestr(member(name), png())
    message = refused(lambda path: open_source(path, 8), tmp_path / "x.zip", "leads out of the archive")
    assert repr(name) in message


def test_names_with_dots_are_no_escape():
    assert not any(map(untrusted.escapes, ["a..b/c.png", "...", "a/.b/c", "a:b.png", "x/C:/y"][:4]))


def test_links_in_an_archive_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(member(external_attr=(stat.S_IFLNK | 0o777) << 16), "/etc/passwd")
    refused(lambda path: open_source(path, 8), tmp_path / "x.zip", "'a_0.png' is a symbolic link")


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_that_cannot_be_bounded_are_refused(tmp_path, packing):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", packing) as archive:
        archive.writestr("a_0.png", png())
    refused(lambda path: open_source(path, 8), tmp_path / "x.zip", "otherwise than by deflate; pack it again")


def test_encrypted_members_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a_0.png", png())
    data = bytearray((tmp_path / "x.zip").read_bytes())
    for place in (data.index(b"PK\3\4") + 6, data.index(b"PK\1\2") + 8):
        data[place] |= 1
    (tmp_path / "x.zip").write_bytes(data)
    refused(lambda path: open_source(path, 8), tmp_path / "x.zip", "is encrypted")


GOOD = {"format": 1, "step": 10, "images_seen": 40, "config": {"image_size": 8},
        "files": {"model000010.pt": {"size": 1, "crc32": 1}}}


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "sub/model000010.pt", "..\\model000010.pt", "",
                                  "C:\\model000010.pt", "x\0.pt"])
def test_a_manifest_speaks_of_its_own_folder_only(tmp_path, name):
    path = tmp_path / "checkpoint_000010.json"
    path.write_text(json.dumps(GOOD | {"files": {name: {"size": 1, "crc32": 1}}}))
    refused(manifest.read, path, "is not the name of a file next to it")
    assert manifest.newest(str(tmp_path)) is None


# --- sizes -----------------------------------------------------------------------------------------------------------


def header(shape, descr="|u1", fortran=False):
    front = io.BytesIO()
    np.lib.format.write_array_header_2_0(front, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return front.getvalue()


HEADERS = {
    "many images": header((HUGE, 8, 8, 3)),
    "large images": header((1, 10**7, 10**8, 3)),
    "fortran order": header((HUGE, 8, 8, 3), fortran=True),
    "wide items": header((4,), "|V1000000000000000"),
    "long words": header((4,), "<U200000000000000"),
    "items of nothing": header((HUGE,), "|V0"),
    "negative": header((-1, 8, 8, 3)),
    "beyond 64 bits": header((2**70, 2**70)),
    "deep dtype": b"\x93NUMPY\1\0" + struct.pack("<H", 6000) + b"{'descr': " + b"[" * 2500 + b" " * 3490,
    "deep number": b"\x93NUMPY\1\0" + struct.pack("<H", 6000) + b"{'shape': " + b"-" * 5990,
    "long header": b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + b"{",
    "no version": b"\x93NUMPY\7\7" + b"x" * 80,
}


@pytest.mark.parametrize("order", ["<", ">"])
def test_arrays_of_characters_that_do_not_exist(order):
    """Python cannot make a text of them, and says so by a SystemError."""
    def read(*numbers):
        stream = io.BytesIO()
        np.save(stream, np.array(numbers, f"{order}u4").view(f"{order}U{len(numbers)}"))
        return untrusted.read_array(io.BytesIO(stream.getvalue()), len(stream.getvalue()))

    assert read(65, 0x10FFFF).tolist() == ["A\U0010ffff"]
    with pytest.raises(ValueError, match="the number 1,114,112 as a character"):
        read(65, 0x110000)


@pytest.mark.parametrize("name", HEADERS)
def test_arrays_that_claim_more_than_there_is(tmp_path, little_memory, name):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for key in ("arr_0", "arr_1", "mu", "sigma"):
            archive.writestr(f"{key}.npy", HEADERS[name] + bytes(200))
    (tmp_path / "x.npy").write_bytes(HEADERS[name] + bytes(200))
    refused(lambda path: open_source(path, 8), tmp_path / "x.npz", "is not an npz of plain arrays")
    refused(statistics, tmp_path / "x.npz", "arr_0")
    refused(lambda path: edit_inputs.read_mask(path, 8), tmp_path / "x.npy", "cannot be read")


def test_an_honest_bomb_is_refused_before_it_swells(tmp_path, little_memory):
    swollen = 2**29
    archive = zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("arr_0.npy", "w") as file:
        file.write(header((swollen // 192, 8, 8, 3)))
        for _ in range(swollen // 2**20):
            file.write(bytes(2**20))
    assert (tmp_path / "x.npz").stat().st_size < swollen / untrusted.BOMB_RATIO
    refused(lambda path: open_source(path, 8), tmp_path / "x.npz", r"would expand from [\d,]+ to 536,")
    refused(BatchFile, tmp_path / "x.npz", "would expand")
    (tmp_path / "x.npz").rename(tmp_path / "x.zip")
    refused(lambda path: open_source(path, 8), tmp_path / "x.zip", "would expand")
    (tmp_path / "x.zip").rename(tmp_path / "x.pt")
    refused(dist.load_state_dict, tmp_path / "x.pt", "would expand")


def lying(data, size, packed=None):
    """An archive of one member whose directory speaks of other sizes."""
    place = data.index(b"PK\1\2")
    patched = bytearray(data)
    patched[place + 24 : place + 28] = struct.pack("<I", size)
    if packed is not None:
        patched[place + 20 : place + 24] = struct.pack("<I", packed)
    return bytes(patched)


def test_a_directory_that_lies_about_sizes(tmp_path, little_memory):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a_0.png", bytes(2**20))
    data = path.read_bytes()
    for size, packed in ((2**31, None), (2**31, 2**30), (100, None)):
        path.write_bytes(lying(data, size, packed))
        refused(lambda path: open_source(path, 8).image(0), path, "claims 2,147|cannot be read: Bad CRC-32")


def test_folders_hold_pipes_devices_and_links_to_themselves(tmp_path, little_memory):
    (tmp_path / "a_0.png").write_bytes(png())
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "b_0.png")
    (tmp_path / "c_0.png").symlink_to("/dev/zero")
    source = open_source(str(tmp_path), 8)
    assert [source.name(i) for i in range(len(source))] == ["a_0.png", "b_0.png", "c_0.png"]
    np.testing.assert_array_equal(source.image(0), PIXELS[0])
    for i in (1, 2):
        message = "is a (named pipe|device), where a file is expected.*Replace or remove it"
        refused(lambda path, i=i: source.image(i), tmp_path, message)


def test_files_and_labels_of_absurd_size(tmp_path, little_memory, monkeypatch):
    monkeypatch.setattr(folder, "IMAGE_BYTES", 2**20)
    (tmp_path / "a_0.png").write_bytes(png())
    with open(tmp_path / "b_0.png", "wb") as file:
        file.truncate(2**40)                                        # a hole: it takes no room on the disk
    read = type(open_source(str(tmp_path), 8)).read
    source = open_source(str(tmp_path), 8)
    monkeypatch.setattr(source, "read", lambda name: read(source, name, 2**20))
    refused(lambda path: source.image(1), tmp_path, "b_0.png.*more than 1,048,576 bytes")
    with open(tmp_path / "dataset.json", "wb") as file:
        file.truncate(2**40)
    refused(lambda path: open_source(path, 8), tmp_path, "dataset.json cannot be read: it has more than")


@pytest.mark.parametrize("label", [10**6, 10**12, 10**30])
def test_labels_that_would_make_a_huge_network(tmp_path, label):
    (tmp_path / "a_0.png").write_bytes(png())
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a_0.png", label]]}))
    assert f"the label {label}, which is no class number" in open_source(str(tmp_path), 8).no_labels
    np.savez(tmp_path / "x.npz", PIXELS, np.full(4, min(label, 2**64 - 1), np.uint64))
    assert open_source(str(tmp_path / "x.npz"), 8).labels is None


# --- pictures --------------------------------------------------------------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, *chunks):
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + b"".join(chunks) + chunk(b"IDAT", zlib.compress(bytes(1000)))


BOMBS = {
    "many pixels": (png_of(60_000, 60_000), "pixels"),
    "more than PIL warns of": (png_of(10_000, 10_000), "safety limit"),
    "a strip": (png_of(2**31 - 1, 1), "pixels"),
    "a thin strip": (png_of(1, 80_000_000), "more than 100 times the other"),
    "much text": (png_of(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26), 9))), "cannot be read"),
    "bmp": (b"BM" + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0), "pixels"),
    "gif": (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\2\2\0\1\0;",
            "pixels"),
    "ppm": (b"P6 99999999 99999999 255\n", "pixels"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_are_refused_by_their_header(tmp_path, little_memory, name):
    data, message = BOMBS[name]
    (tmp_path / "a_0.png").write_bytes(data)
    refused(lambda path: open_source(path, 64).image(0), tmp_path, message)
    refused(lambda path: edit_inputs.read_mask(path, 8), tmp_path / "a_0.png")


def test_an_npz_of_strips_is_refused(tmp_path, little_memory):
    np.savez(tmp_path / "x.npz", np.zeros((1, 1, 10**5, 3), np.uint8))
    refused(lambda path: open_source(path, 512), tmp_path / "x.npz", "one side is more than 100 times the other")


# --- texts -----------------------------------------------------------------------------------------------------------


LAUGHS = "\n".join(["a: &x0 [lol, lol]", *(f"k{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 12))])
MERGES = "\n".join(["- &x0 {a: 1}", *(f"- &x{i} {{<<: [{', '.join([f'*x{i - 1}'] * 9)}]}}" for i in range(1, 12))])
TEXTS = {
    "billion laughs": (LAUGHS, r"aliases \(\*x0\) are not read"),
    "merged laughs": (MERGES, "is neither YAML nor JSON"),
    "deep list": ("data_dir: " + "[" * 50_000, "a value is a word, a number or a list"),
    "deep json": ('{"data_dir": ' * 50_000, "a value is a word, a number or a list"),
    "nested value": ("data_dir: [[a, b]]", "a value is a word, a number or a list"),
    "long number": ("image_size: " + "9" * 6000, "neither YAML nor JSON: line 1: Exceeds the limit"),
    "infinite": ("image_size: .inf", "image_size=inf is not a int"),
    "python": ("data_dir: !!python/name:os.system", "could not determine a constructor"),
    "bytes": ("data_dir: \x00\x01", "neither YAML nor JSON"),
    "long": ("#" * 2**21, "more than 1,048,576 bytes"),
    "key": ("? [a]\n: b", "neither YAML nor JSON"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_configs_that_unfold(tmp_path, little_memory, name):
    text, message = TEXTS[name]
    (tmp_path / "x.yaml").write_text(text)
    refused(config, tmp_path / "x.yaml", message)


def test_configs_of_people_are_read(tmp_path):
    (tmp_path / "x.yaml").write_text("image_size: 32\nchannel_mult: [1, 2, 2]\nrandom_flip: no\ndata_dir: 2001-99-99\n")
    values = config(str(tmp_path / "x.yaml")).values
    assert values["random_flip"] is False
    assert (values["channel_mult"], values["data_dir"]) == ("1,2,2", "2001-99-99"), "a folder, and no date"
    (tmp_path / "x.json").write_text(json.dumps({"image_size": 16, "channel_mult": "1,2"}))
    assert config(str(tmp_path / "x.json")).values["image_size"] == 16


DEEP = "[" * 100_000
MANIFESTS = {
    "deep": (DEEP, "nested too deeply"),
    "deep inside": ('{"step": 1, "files": ' + DEEP, "nested too deeply"),
    "infinite step": (json.dumps(GOOD | {"step": 1e999}), "is not a manifest"),
    "files in a list": (json.dumps(GOOD | {"files": ["model000010.pt"]}), "is not a manifest"),
    "sizes in words": (json.dumps(GOOD | {"files": {"model000010.pt": {"size": "1", "crc32": 1}}}), "no size"),
    "long number": ('{"step": ' + "9" * 6000 + "}", "has 6,000 digits"),
    "a number": ("5", "is not a manifest"),
    "bytes": ("\udcff\udcfe", "is not a manifest"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_are_none(tmp_path, name):
    text, message = MANIFESTS[name]
    path = tmp_path / "checkpoint_000010.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    refused(manifest.read, path, message)
    assert manifest.newest(str(tmp_path)) is None


def test_a_search_state_or_labels_nested_without_end(tmp_path):
    (tmp_path / "x.json").write_text('{"conditions": ' + DEEP)
    refused(lambda path: open_score_store(path, {}), tmp_path / "x.json", "is not the state of a search")
    (tmp_path / "x.json").write_text('{"conditions": {}, "scores": {"0": 1}, "network_evaluations": Infinity}')
    refused(lambda path: open_score_store(path, {}), tmp_path / "x.json", "is not the state of a search")
    (tmp_path / "a_0.png").write_bytes(png())
    (tmp_path / "dataset.json").write_text('{"labels": ' + DEEP)
    assert "nested too deeply" in open_source(str(tmp_path), 8).no_labels


def test_a_log_that_a_power_cut_filled_with_zeros_is_gone_on_with(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"step,loss\n1,2\n2,3\n" + bytes(400))
    CSVWriter(tmp_path / "x.csv").scalars(3, {"step": 3, "loss": 4})
    assert (tmp_path / "x.csv").read_text() == "step,loss\n1,2\n2,3\n3,4\n"
    (tmp_path / "x.json").write_bytes(b'{"step": 1}\n{"step": 2}\n' + bytes(400))
    JSONWriter(tmp_path / "x.json").scalars(3, {"step": 3})
    assert (tmp_path / "x.json").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


# --- weights ---------------------------------------------------------------------------------------------------------


def test_views_that_repeat_without_end_are_refused(tmp_path, little_memory):
    wide = th.zeros(1, 1).expand(10**6, 10**6)
    th.save({"time_embed.0.weight": wide}, tmp_path / "x.pt")
    refused(dist.load_state_dict, tmp_path / "x.pt", r"would take 4,000,000,000,000 bytes, the file has only")
    tied = th.ones(1000)
    th.save({"a": tied, "b": tied}, tmp_path / "x.pt")
    assert dist.load_state_dict(tmp_path / "x.pt")["b"].sum() == 1000


@pytest.mark.parametrize("content", [
    [], 5, th.ones(2), {5: th.ones(2)}, {"time_embed.0.weight": 5}, {"time_embed.0.weight": th.ones(())},
    {"time_embed.0.weight": th.ones(4, 0)}, {(((1,),),): 1}, {"time_embed.0.weight": th.ones(4, 4), "input_blocks": 1},
])
def test_weights_of_no_network(content):
    with pytest.raises(UserError, match="x.pt is not a U-Net of this toolkit"):
        openai.architecture(content, "x.pt")


def test_a_small_file_cannot_ask_for_a_huge_network(tmp_path, little_memory):
    """Every shape alone is small; the network of these widths would take gigabytes."""
    width = 40_000
    shapes = {"time_embed.0.weight": (1, width), "input_blocks.0.0.weight": (1,),
              "input_blocks.1.0.out_layers.3.weight": (width, 1), "input_blocks.1.0.emb_layers.1.weight": (width, 1)}
    th.save({name: th.zeros(shape, dtype=th.uint8) for name, shape in shapes.items()}, tmp_path / "x.pt")
    settings = parse("test", ModelConfig, argv=["--image_size", "8", "--num_heads", "1"])
    settings.replace(resume_checkpoint=str(tmp_path / "x.pt"))
    refused(lambda path: inherit_checkpoint(settings, "resume_checkpoint"), tmp_path, "does not fit this network")


def test_attention_of_odd_shape_is_refused():
    heads = {"num_heads": 1, "num_heads_upsample": -1, "num_head_channels": -1, "use_new_attention_order": False}
    for rows, bias in ((8, 8), (12, 8), (12, None)):
        content = {"middle_block.1.qkv.weight": th.ones(rows, 4, 1)}
        if bias:
            content["middle_block.1.qkv.bias"] = th.ones(bias)
        with pytest.raises(UserError, match="do not belong to an attention layer of guided-diffusion"):
            guided_diffusion.to_published_layout(content, **heads)


@pytest.mark.parametrize("value", ["many", -1, 1e999, None, [1, [2]], {"a": 1}])
def test_flags_in_a_manifest_are_checked_as_flags(tmp_path, value):
    th.save({}, tmp_path / "model000010.pt")
    (tmp_path / "checkpoint_000010.json").write_text(json.dumps(GOOD | {"config": {"num_channels": value}}))
    settings = parse("test", ModelConfig, argv=[])
    settings.replace(resume_checkpoint=str(tmp_path / "model000010.pt"))
    refused(lambda path: inherit_checkpoint(settings, "resume_checkpoint"), tmp_path,
            re.escape(f"the manifest beside {tmp_path}") + ".*num_channels=.*(is not a int|too small)")

"""Readers of files, and sound files of each that are damaged by chance: what test_fuzz.py and fuzz.py feed.

Files are damaged as bytes, and inside: members of archives, values of JSON texts and operations of pickles are changed,
and lengths and checksums are made right again, so that readers get to see the damage.
"""

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import torch as th
import yaml
from hypothesis import strategies as st
from PIL import Image

from cm.checkpoints import loading, manifest
from cm.checkpoints.formats import guided_diffusion, openai
from cm.config.flags import parse
from cm.config.schema import DataConfig, ModelConfig
from cm.data.sources import open_source
from cm.distributed import setup as dist
from cm.generate import edit_inputs
from cm.generate.score_store import open_score_store
from cm.logging.csv_rows import CSVWriter
from cm.logging.json_lines import JSONWriter
from cm.report.page import page
from cm.report.run_records import read_run
from cm.script_util import create_model
from cm.setup.inherit import inherit_checkpoint
from evaluations.engine.readers import BatchFile
from support.nets import plain_state_dict

SIDE = 8
PIXELS = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
HEADS = {"num_heads": 1, "num_heads_upsample": -1, "num_head_channels": -1, "use_new_attention_order": False}


def small_network():
    th.manual_seed(0)
    return create_model(image_size=SIDE, num_channels=32, num_res_blocks=1, channel_mult="1",
                        attention_resolutions="8", class_cond=True, num_classes=10)


NETWORK = small_network()


# --- what is damaged, and how ----------------------------------------------------------------------------------------


def encoded(kind, pixels=PIXELS[0]):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def zipped(members, packing=zipfile.ZIP_STORED):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def npy(array):
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def torch_file(content, **options):
    data = io.BytesIO()
    th.save(content, data, **options)
    return data.getvalue()


PNG = encoded("PNG")
PICTURES = [PNG, *(encoded(kind) for kind in ("JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"))]
ARRAYS = {"arr_0.npy": npy(PIXELS), "arr_1.npy": npy(np.arange(4)), "mu.npy": npy(np.ones(3)),
          "sigma.npy": npy(np.eye(3)), "extractor.npy": npy(np.array("x")), "num_images.npy": npy(np.array(5))}
LABELS = json.dumps({"labels": [["a_0.png", 0], ["b_0.png", 3]]}).encode()
IMAGES = {"a_0.png": PNG, "b_0.png": encoded("JPEG"), "dataset.json": LABELS}
STATE = plain_state_dict(NETWORK)
GUIDED = {"middle_block.1.qkv.weight": th.ones(12, 4, 1), "middle_block.1.qkv.bias": th.ones(12)}
OPTIMIZER = {"state": {0: {"step": th.ones(()), "exp_avg": th.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
MANIFEST = {"format": 1, "step": 10, "images_seen": 40, "files": {"model000010.pt": {"size": 3, "crc32": 4}},
            "config": {"image_size": SIDE, "num_channels": 32, "channel_mult": "1", "training_mode": "edm"}}
LEDGER = {"conditions": {"steps": 40}, "scores": {"0,39": 1.5}, "network_evaluations": 10}
CONFIG = b"base: ''\nimage_size: 8\nchannel_mult: [1, 2]\nclass_cond: yes\ndropout: 0.5\nattention_resolutions: '8'\n"
CSV = b"step,loss\n1,2\n2,3\n9,4\n"
LINES = b'{"step": 1, "loss": 2}\n{"step": 9, "loss": 3}\n'
NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]


@st.composite
def damaged(draw, originals):
    """One of the originals with a few bytes replaced, removed, inserted or repeated, or cut off."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data))) if len(data) < 400 or draw(st.booleans()) else draw(st.integers(0, 200))
        length = draw(st.sampled_from([1, 2, 4, 8, 64, len(data)]))
        fresh = draw(st.one_of(
            st.binary(max_size=8),
            st.sampled_from(NUMBERS).map(lambda number: struct.pack("<I", number)),
            st.sampled_from(NUMBERS).map(lambda number: struct.pack(">I", number)),
            st.just(bytes(data[place : place + length])),
        ))
        data[place : place + draw(st.sampled_from([0, len(fresh), length]))] = fresh
    return bytes(data)


def with_checksums(data):
    """A PNG whose chunks are damaged and whose checksums are right, so that decoders look at what is in them."""
    fixed, place = bytearray(data), 8
    while place + 12 <= len(fixed):
        length = struct.unpack(">I", fixed[place : place + 4])[0]
        end = place + 8 + length
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(fixed[place + 4 : end]))
        place = end + 4
    return bytes(fixed)


@st.composite
def damaged_inside(draw, members, packing=zipfile.ZIP_DEFLATED):
    """A sound archive with damaged members: checksums do not give them away."""
    content = dict(members)
    for name in draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=2, unique=True)):
        content[name] = draw(damaged([content[name]]))
        if name.endswith(".png"):
            content[name] = with_checksums(content[name])
    return zipped(content, packing)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
        ["a_0.png", "../x", "model000010.pt", "10", 1e999, 10**400, -1, "x" * 5000, "\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def other_values(draw, original):
    """A JSON text of the same form with some values replaced by others, of any type."""
    def change(value):
        if draw(st.integers(0, 3)) == 0:
            return draw(PLAIN)
        if isinstance(value, dict):
            return {key: change(item) for key, item in value.items()}
        return [change(item) for item in value] if isinstance(value, list) else value

    return json.dumps(change(original)).encode()


WORDS = (
    "image_size", "channel_mult", "class_cond", "base", ": ", "- ", "[", "]", "{", "}", ",", "\n", "  ", "&a ", "*a",
    "<<", "!!python/name:os.system ", "!!int ", "!!binary ", "'", '"', "|", ">", "? ", "#", "8", "1e999", ".inf",
    "2001-99-99", "0x", "---", "%YAML 9.9", "\0", "é", "yes", "null", "0b2", "1:99",
)
YAML = st.lists(st.sampled_from(WORDS), max_size=20).map(lambda words: "".join(words).encode())


# --- what reads ------------------------------------------------------------------------------------------------------


def read_images(path):
    source = open_source(path, SIDE)
    source.images(np.arange(len(source)))
    assert source.labels is None or source.labels.min() >= 0


def read_batch(path):
    file = BatchFile(path)
    file.labels() if file.has_images else None
    file.statistics(), file.statistics("_s")
    for batch in file.batches(3) if file.has_images else ():
        assert batch.dtype == np.uint8 and batch.shape[3] == 3


def read_weights(path):
    content = dist.load_state_dict(path)
    loading.check(NETWORK, content, path)


def read_bare_weights(path):
    content = dist.load_state_dict(path)
    openai.model_flags(content, path, SIDE)
    guided_diffusion.to_published_layout(content, **HEADS)


def read_guided_weights(path):
    content = dist.load_state_dict(path)
    if isinstance(content, dict) and all(isinstance(value, th.Tensor) for value in content.values()):
        guided_diffusion.to_published_layout({str(name): value for name, value in content.items()}, **HEADS)


def read_manifest(path):
    manifest.read(path)
    assert manifest.newest(os.path.dirname(path)) is None              # its model has another size
    options = parse("fuzz", ModelConfig, argv=[])
    options.replace(resume_checkpoint=path.replace("checkpoint_", "model").replace(".json", ".pt"))
    inherit_checkpoint(options, "resume_checkpoint")


def read_config(path):
    parse("fuzz", ModelConfig, DataConfig, argv=["--config", path])


def read_csv(path):
    CSVWriter(Path(path)).drop_after(5)


def read_json_lines(path):
    JSONWriter(Path(path)).drop_after(5)


def render(path):
    """The page of the run in whose folder a file lies."""
    page([read_run(os.path.dirname(path))], 12, datetime(2026, 1, 1))


@dataclass
class Reader:
    name: str                                   # of the file
    read: Callable
    files: st.SearchStrategy                    # damaged ones
    good: bytes                                 # one that can be read
    beside: Mapping[str, bytes] = field(default_factory=dict)       # other files, sound
    share: float = 1.0                          # of the examples, fewer where one takes long

    def prepare(self, folder: Path) -> Path:
        """Where the file will lie in a new folder that has all others."""
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, content in self.beside.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return path


def both(sound, inside):
    """An archive damaged as a file, and one damaged within its members."""
    return damaged([sound]) | inside


def damaged_json(content):
    text = json.dumps(content).encode()
    return damaged([text]) | other_values(content), text


def members_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


STORED_STATE, LEGACY_STATE = torch_file(STATE), torch_file(STATE, _use_new_zipfile_serialization=False)
TORCH = damaged([STORED_STATE, LEGACY_STATE, torch_file(OPTIMIZER)]) | damaged_inside(
    members_of(torch_file({"a": th.ones(3), "b": [1, {"c": 2.0}]})), zipfile.ZIP_STORED)
READERS = {
    "folder of pictures": Reader("a_0.png", lambda path: read_images(os.path.dirname(path)),
                                 damaged(PICTURES) | damaged([PNG]).map(with_checksums), PNG),
    "zip of pictures": Reader("x.zip", read_images, both(zipped(IMAGES), damaged_inside(IMAGES)), zipped(IMAGES)),
    "labels of a zip": Reader("x.zip", read_images, other_values(json.loads(LABELS)).map(
        lambda text: zipped({**IMAGES, "dataset.json": text})), zipped(IMAGES)),
    "npz of pictures": Reader("x.npz", read_images, both(zipped(ARRAYS), damaged_inside(ARRAYS)), zipped(ARRAYS)),
    "npz of a batch": Reader("x.npz", read_batch, both(zipped(ARRAYS), damaged_inside(ARRAYS)), zipped(ARRAYS)),
    "mask picture": Reader("x.png", lambda path: edit_inputs.read_mask(path, SIDE),
                           damaged(PICTURES) | damaged([PNG]).map(with_checksums), PNG),
    "mask array": Reader("x.npy", lambda path: edit_inputs.read_mask(path, SIDE), damaged([npy(np.eye(SIDE))]),
                         npy(np.eye(SIDE))),
    "weights": Reader("x.pt", read_weights, TORCH, STORED_STATE),
    "weights without manifest": Reader("x.pt", read_bare_weights, TORCH, LEGACY_STATE),
    "weights of guided-diffusion": Reader("x.pt", read_guided_weights, damaged([torch_file(GUIDED)]) | damaged_inside(
        members_of(torch_file(GUIDED)), zipfile.ZIP_STORED), torch_file(GUIDED)),
    "manifest": Reader("checkpoint_000010.json", read_manifest, *damaged_json(MANIFEST),
                       {"model000010.pt": bytes(200_000)}),
    "search state": Reader("x.json", lambda path: open_score_store(path, {"steps": 40}), *damaged_json(LEDGER)),
    "config": Reader("x.yaml", read_config, damaged([CONFIG]) | YAML | other_values(yaml.safe_load(CONFIG)), CONFIG),
    "report of a csv": Reader("progress.csv", render, damaged([CSV]), CSV),
    "report of json": Reader("progress.json", render, damaged([LINES]) | other_values({"step": 1, "loss": 2}), LINES),
    "log as csv": Reader("progress.csv", read_csv, damaged([CSV]), CSV),
    "log as json": Reader("progress.json", read_json_lines, damaged([LINES]), LINES),
}

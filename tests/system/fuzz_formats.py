"""More readers for the fuzz tests: the formats of other tools, and the small files beside weights and samples."""

import gzip
import json
import os
import pickletools
import struct
import tempfile
from pathlib import Path

import lmdb
import numpy as np
from hypothesis import strategies as st
from torch import nn

from cm.checkpoints import manifest
from cm.checkpoints.formats import described, diffusers, edm_pickle, hub_folder, safetensor_files
from cm.config.flags import parse
from cm.config.sampling_schema import GuidanceConfig, SampleConfig, SolverConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig
from cm.data.raw import open_raw
from cm.distributed import setup as dist
from cm.distributed.collectives import read_everywhere
from cm.generate.png import PngFolder
from cm.networks import noisy_classifier
from cm.report.run_facts import Measurement, RunFacts
from cm.setup.run_facts import facts_of
from cm.setup.sample import inherit_model, load_model
from cm.setup.weights_path import weights_in
from evaluations.features.graph_constants import read_constants
from evaluations.features.inception_weights import read_tensors
from evaluations.features.preprocessing import read_preprocessing
from evaluations.features.torchscript import save_torchscript
from evaluations.features.torchscript_tensors import check_archive, is_torchscript, read_extra, read_module_tensors
from support import bombs, edm_pickles
from support.published_sets import cifar10, cifar_batch, mnist
from support.weights import TINY, tiny
from system.fuzz_readers import (
    CSV,
    IMAGES,
    LABELS,
    PLAIN,
    PNG,
    READERS,
    SIDE,
    STORED_STATE,
    TORCH,
    Reader,
    damaged,
    damaged_inside,
    members_of,
    other_values,
    render,
    torch_file,
    with_checksums,
    zipped,
)

PIXELS = np.random.default_rng(1).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
DIGITS = PIXELS[:, :28, :28, 0].copy()


def made(write, *names):
    """The contents of files that `write` puts into a folder; all there are, by path, without names."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        found = names or [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()]
        return {name: (Path(folder) / name).read_bytes() for name in found}


# --- how they are damaged --------------------------------------------------------------------------------------------


@st.composite
def damaged_operations(draw, pickled):
    """A pickle with whole operations removed, repeated or in another place."""
    places = [place for *_, place in pickletools.genops(pickled)]
    parts = [pickled[start:stop] for start, stop in zip(places, [*places[1:], len(pickled)])]
    for _ in range(draw(st.integers(1, 3))):
        here, there = (draw(st.integers(0, len(parts) - 1)) for _ in range(2))
        change = draw(st.sampled_from(["remove", "repeat", "replace", "swap"]))
        if change == "remove":
            del parts[here : here + draw(st.integers(1, 3))]
        elif change == "repeat":
            parts[here:here] = [parts[there]] * draw(st.sampled_from([1, 2, 60]))
        elif change == "replace":
            parts[here] = parts[there]
        else:
            parts[here], parts[there] = parts[there], parts[here]
        if not parts:
            break
    return b"".join(parts)


@st.composite
def damaged_header(draw, data):
    """A safetensors file with other values in its header, and the length of that made right."""
    length = struct.unpack_from("<Q", data)[0]
    header = draw(other_values(json.loads(data[8 : 8 + length])))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


@st.composite
def damaged_pages(draw, data, page=4096):
    """A database with other bytes at the fronts of its pages, where their heads and the places of nodes are."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = page * draw(st.integers(0, len(data) // page - 1)) + draw(st.integers(0, 200))
        fresh = draw(st.binary(min_size=1, max_size=8))
        changed[place : place + len(fresh)] = fresh
    return bytes(changed[: draw(st.sampled_from([len(data)] * 5 + [len(data) // 2, page]))])


@st.composite
def edited_manifest(draw, content):
    """A manifest with other flags and a right checksum, as somebody may have written it on purpose."""
    names = draw(st.lists(st.sampled_from(sorted(content["config"])), min_size=1, max_size=2, unique=True))
    values = {name: draw(PLAIN | st.integers(-1, 64) | st.sampled_from([10**8, 10**12, "1,1", "1,2", "8,4"]))
              for name in names}
    edited = {**content, "config": {**content["config"], **values}}
    edited.pop(manifest.CHECKSUM)
    edited[manifest.CHECKSUM] = manifest.checksum(edited)
    return json.dumps(edited).encode()


@st.composite
def edited_description(draw, content, pack):
    """A description of weights with other flags or facts, as `pack` puts it into a file."""
    edited = json.loads(json.dumps(content))
    part = edited[draw(st.sampled_from(["config", "config", "run"]))]
    for name in draw(st.lists(st.sampled_from(sorted(part)), min_size=1, max_size=2, unique=True)):
        part[name] = draw(PLAIN | st.integers(-1, 64) | st.sampled_from([10**8, 10**12, "1,1", "1,2", "8,4"]))
    return pack(edited)


def with_description(data, text):
    """A safetensors file with another text of ours in its header."""
    length = struct.unpack_from("<Q", data)[0]
    content = json.loads(data[8 : 8 + length])
    content["__metadata__"][described.KEY] = text
    header = json.dumps(content).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def with_config(content):
    """Files of a classifier with other values in its description."""
    texts = other_values(content["config"]).map(json.loads)
    return texts.map(lambda config: torch_file({**content, "config": config}))


def archive_of(batch):
    """CIFAR-10's archive with one batch replaced."""
    return made(lambda folder: cifar10(folder, PIXELS, [0] * 10, data_batch_2=batch or b" "),
                "cifar-10-python.tar.gz")["cifar-10-python.tar.gz"]


# --- what reads ------------------------------------------------------------------------------------------------------


def read_network(path):
    """Everything that sampling does before it samples."""
    path = path.replace("checkpoint_", "model").replace(".json", ".pt")
    settings = parse("", SampleConfig, SolverConfig, GuidanceConfig, ModelConfig, DiffusionConfig, RunConfig,
                     argv=["--model_path", path])
    inherit_model(settings)
    load_model(settings)


def read_weights(path):
    """As `read_network`, and what a card tells of the weights."""
    settings = parse("", SampleConfig, SolverConfig, GuidanceConfig, ModelConfig, DiffusionConfig, RunConfig,
                     argv=["--model_path", path])
    inherit_model(settings)
    load_model(settings)
    facts_of(path)


def read_raw(path):
    raw = open_raw(path)
    for i in range(len(raw)):
        try:
            raw.image(i)
        except MemoryError:
            raise
        except Exception as error:                          # the tool names such an image and goes on
            assert str(error) or type(error), error


def read_script(path):
    if is_torchscript(path):
        check_archive(path)
        read_extra(path, "extractor.json")
        read_module_tensors(path)


def read_pictures(path):
    folder = PngFolder(os.path.dirname(path), False)
    folder.missing(range(5))


# --- sound files -----------------------------------------------------------------------------------------------------

EDM = made(lambda folder: edm_pickles.dump(
    folder / "x", edm_pickles.net_of(edm_pickles.network("ddpmpp"), edm_pickles.KWARGS["ddpmpp"])))["x"]
SMALL = {**TINY, "class_cond": False, "num_classes": 0, "num_head_channels": 32, "channel_mult": "1",
         "attention_resolutions": "8"}
FLAGS = {"sigma_min": 0.002, "sigma_max": 80.0, "training_mode": "consistency_distillation", "precond": "edm",
         "arch": "unet", "augment_dim": 0, "num_heads": 1, "num_heads_upsample": -1, "resblock_updown": False, **SMALL}
PIPE = made(lambda folder: diffusers.write(str(folder), tiny(**SMALL).state_dict(), FLAGS, 40))
UNET = "unet/diffusion_pytorch_model.safetensors"
RUN = made(lambda folder: manifest.save(str(folder), 10, {"model": tiny(**SMALL).state_dict()}, FLAGS, 40))
STEP10 = "checkpoint_000010.json"
HUB = made(lambda folder: hub_folder.write(
    str(folder), tiny(**SMALL).state_dict(),
    described.Description(FLAGS, (), RunFacts("x", 1, 2, 3, 4.0, "cm-train", (Measurement("FID", 1.0),))), "# card\n"))
MODEL = "model.safetensors"
HUB_CONFIG = json.loads(HUB["config.json"])
CIFAR = made(lambda folder: cifar10(folder, PIXELS, [0] * 10))["cifar-10-python.tar.gz"]
NUMBERS = made(lambda folder: mnist(folder, DIGITS, list(range(10))))
IMAGES_GZ, LABELS_GZ = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
RAW_DIGITS = gzip.decompress(NUMBERS[IMAGES_GZ])
BATCH = cifar_batch(PIXELS[2:4], [0, 0], "x")


def write_database(folder):
    with lmdb.open(str(folder), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for i in range(30):
            transaction.put(struct.pack(">I", i), PNG if i % 3 else bytes(5000))


DATABASE = made(write_database, "data.mdb")["data.mdb"]
GRAPH = b"".join(bombs.filled_constant(name, 4) for name in (b"a", b"bc", b"d"))
SIDECAR = {"name": "x", "resize": {"side": 224, "mode": "bicubic", "antialias": True}, "range": [0, 1],
           "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
SCRIPT = members_of(made(lambda folder: save_torchscript(nn.Linear(3, 2), str(folder / "x"), "x", "none"))["x"])
TREE = next(name for name in SCRIPT if name.endswith("data.pkl"))
RECIPE = {"weights": {"size": 3, "crc32": 4}, "classifier": None, "steps": 40, "sampler": "heun"}
BEST = {"metric": "FID", "step": 10, "value": 3.5, "file": "best/ema_0.9_000010.pt", "settings": {"num_samples": 50}}
CONFIG = {"training_mode": "edm", "image_size": 64, "total_training_steps": 1000, "data_dir": "x", "lr": 0.1}
RESULTS = {"metrics": {"fid": {"label": "FID", "value": 3.25, "sample_count": 50}}, "label": "x", "value": 2}
CLASSIFIER = noisy_classifier.to_content(noisy_classifier.NoisyClassifier(
    noisy_classifier.NoisyClassifierConfig(SIDE, 3, channel_mult=(1,))))
LOG = {"progress.csv": CSV}


def text(content):
    return json.dumps(content).encode()


def json_reader(name, content, read, beside=None):
    share = 0.5 if read is render else 1.0
    return Reader(name, read, damaged([text(content)]) | other_values(content), text(content), beside or {}, share)


READERS |= {
    "EDM pickle": Reader("x.pkl", lambda path: edm_pickle.read(read_everywhere(path), path),
                         damaged([EDM]) | damaged_operations(EDM), EDM, share=0.3),
    "diffusers config": Reader("unet/config.json", lambda path: diffusers.read(str(Path(path).parents[1])),
                               damaged([PIPE["unet/config.json"]]) | other_values(json.loads(PIPE["unet/config.json"])),
                               PIPE["unet/config.json"], PIPE),
    "diffusers index": Reader("model_index.json", lambda path: diffusers.read(os.path.dirname(path)),
                              other_values(json.loads(PIPE["model_index.json"])), PIPE["model_index.json"], PIPE, 0.5),
    "diffusers scheduler": Reader(
        "scheduler/scheduler_config.json", lambda path: diffusers.read(str(Path(path).parents[1])),
        other_values(json.loads(PIPE["scheduler/scheduler_config.json"])), PIPE["scheduler/scheduler_config.json"],
        PIPE, 0.5),
    "diffusers weights": Reader(UNET, lambda path: diffusers.read(str(Path(path).parents[1])),
                                damaged([PIPE[UNET]]) | damaged_header(PIPE[UNET]), PIPE[UNET], PIPE, 0.3),
    "safetensors": Reader("x.safetensors", safetensor_files.read, damaged([bombs.overlapping_tensors(1, 4)])
                          | damaged_header(bombs.overlapping_tensors(1, 4)), bombs.overlapping_tensors(1, 4)),
    "described weights": Reader(
        MODEL, read_weights, damaged([HUB[MODEL]]) | damaged_header(HUB[MODEL]) | edited_description(
            HUB_CONFIG, lambda content: with_description(HUB[MODEL], json.dumps(content))) | other_values(
            HUB_CONFIG).map(lambda data: with_description(HUB[MODEL], data.decode(errors="replace"))),
        HUB[MODEL], share=0.3),
    "model folder": Reader(
        "config.json", lambda path: read_weights(os.path.dirname(path)), damaged([HUB["config.json"]])
        | edited_description(HUB_CONFIG, lambda content: json.dumps(content).encode()) | other_values(HUB_CONFIG),
        HUB["config.json"], HUB, 0.3),
    "network of a manifest": Reader(STEP10, read_network, edited_manifest(json.loads(RUN[STEP10])), RUN[STEP10], RUN,
                                    0.5),
    "classifier of noisy images": Reader(
        "x.pt", lambda path: noisy_classifier.from_content(dist.load_state_dict(path), path),
        with_config(CLASSIFIER) | damaged([torch_file(CLASSIFIER)]), torch_file(CLASSIFIER), share=0.3),
    "Inception's weights": Reader("x.pth", read_tensors, TORCH, STORED_STATE, share=0.5),
    "CIFAR-10": Reader("cifar-10-python.tar.gz", read_raw, damaged([CIFAR]), CIFAR, share=0.5),
    "batch of CIFAR-10": Reader("cifar-10-python.tar.gz", read_raw,
                                (damaged([BATCH]) | damaged_operations(BATCH)).map(archive_of), CIFAR, share=0.5),
    "MNIST": Reader(IMAGES_GZ, read_raw, damaged([NUMBERS[IMAGES_GZ]]) | damaged([RAW_DIGITS]).map(gzip.compress),
                    NUMBERS[IMAGES_GZ], NUMBERS),
    "lmdb": Reader("x_lmdb/data.mdb", lambda path: read_raw(os.path.dirname(path)),
                   damaged([DATABASE]) | damaged_pages(DATABASE), DATABASE),
    "zip to convert": Reader("x.zip", read_raw, other_values(json.loads(LABELS)).map(
        lambda labels: zipped({**IMAGES, "dataset.json": labels})) | damaged_inside(IMAGES), zipped(IMAGES)),
    "graph": Reader("x.pb", read_constants, damaged([GRAPH]), GRAPH),
    "sidecar": json_reader("x.ts.json", SIDECAR, lambda path: read_preprocessing(path[:-5])),
    "TorchScript": Reader("x.ts", read_script, damaged([zipped(SCRIPT)]) | damaged_inside(SCRIPT) | damaged_operations(
        SCRIPT[TREE]).map(lambda tree: zipped({**SCRIPT, TREE: tree})), zipped(SCRIPT)),
    "sampling.json": json_reader("sampling.json", RECIPE,
                                 lambda path: PngFolder(os.path.dirname(path), False).claim(RECIPE)),
    "picture of a seed": Reader("000003.png", read_pictures, damaged([PNG]) | damaged([PNG]).map(with_checksums), PNG),
    "best.json": json_reader("best.json", BEST, lambda path: weights_in(os.path.dirname(path), "model_path"),
                             {BEST["file"]: b"abc"}),
    "report with a best": json_reader("best.json", BEST, render, LOG),
    "report with flags": json_reader("config.json", CONFIG, render, LOG),
    "report with results": json_reader("results.json", RESULTS, render, LOG),
    "report with pictures": Reader("samples/samples_000010.png", lambda path: render(os.path.dirname(path)),
                                   damaged([PNG]) | damaged([PNG]).map(with_checksums), PNG,
                                   {"progress.csv": CSV}, 0.5),
}

"""A program that reads files made to do harm, with little memory: a line of JSON for each says how it went.

    python tests/system/hostile_cases.py FOLDER
"""

import json
import os
import resource
import struct
import sys
import time
from datetime import datetime
from pathlib import Path

import torch as th
from torch._utils import _rebuild_tensor_v2

from cm.checkpoints import manifest
from cm.checkpoints.formats import described, diffusers, edm_pickle, safetensor_files
from cm.config.flags import parse
from cm.config.sampling_schema import ConvertConfig, SampleConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig
from cm.data.raw import open_raw
from cm.data.sources import open_source
from cm.distributed import setup as dist
from cm.distributed.collectives import read_everywhere
from cm.errors import UserError
from cm.generate import edit_inputs
from cm.generate.png import PngFolder
from cm.generate.score_store import open_score_store
from cm.logging.csv_rows import CSVWriter
from cm.logging.json_lines import JSONWriter
from cm.networks import noisy_classifier
from cm.report.page import page
from cm.report.run_records import read_run
from cm.setup.inherit import inherit_checkpoint
from cm.setup.weights_path import weights_in
from evaluations.engine.readers import BatchFile
from evaluations.features.graph_constants import read_constants
from evaluations.features.inception_weights import read_tensors
from evaluations.features.preprocessing import read_preprocessing
from evaluations.features.torchscript import open_module
from support import bombs, edm_pickles
from support.nets import plain_state_dict
from support.weights import TINY, tiny

GIB = 2**30
FLAGS = {"sigma_min": 0.002, "sigma_max": 80.0, "training_mode": "consistency_distillation", "precond": "edm",
         "arch": "unet", "augment_dim": 0, "num_heads": 1, "num_heads_upsample": -1, "resblock_updown": False}


def inherited(path, flag="model_path"):
    """What sampling, editing, search, conversion and distillation do first with a file of weights."""
    sections = {"model_path": (SampleConfig, RunConfig), "source": (ConvertConfig,)}[flag]
    settings = parse("", *sections, ModelConfig, DiffusionConfig, argv=[f"--{flag}", str(path)])
    source = inherit_checkpoint(settings, flag, also=("training_mode",))
    return source.take()


def rendered(folder):
    return page([read_run(str(folder))], 12, datetime(2026, 1, 1))


# --- files that ask for much -----------------------------------------------------------------------------------------


def written(name, data):
    """An attack that is one file: a function of a folder that writes it and returns its path."""
    def make(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data() if callable(data) else data)
        return path

    return make


def edm_with(bomb):
    def make(folder):
        net = edm_pickles.net_of(edm_pickles.network("ddpmpp"), edm_pickles.KWARGS["ddpmpp"])
        bomb(net.state_of["_modules"]["model"].state_of)
        return edm_pickles.dump(folder / "x.pkl", net)

    return make


def shared_modules(state):
    inner = edm_pickles.Persistent("Linear", {"_parameters": {}, "_modules": {}}, "")
    for _ in range(60):
        inner = edm_pickles.Persistent("Linear", {"_parameters": {}, "_modules": {"a": inner, "b": inner}}, "")
    state["_modules"]["bomb"] = inner


def inner_zip(state):
    names = [f"archive/data/{number}" for number in range(10)]
    state["_parameters"]["bomb"] = bombs.LoadsBytes(bombs.swelling_zip(names, 200))


def diffusers_folder(folder, **changes):
    model = tiny(class_cond=False, num_classes=0, num_head_channels=32)
    flags = {**FLAGS, **TINY, "class_cond": False, "num_classes": 0, "num_head_channels": 32}
    diffusers.write(str(folder), model.state_dict(), flags, 40)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def checkpoint(folder, **changes):
    config = {**FLAGS, **TINY, **changes}
    saved = manifest.save(str(folder), 10, {"model": plain_state_dict(tiny())}, config, 40)
    return saved.path("model")


def described_weights(folder, **changes):
    path = str(folder / "x.safetensors")
    described.write(path, plain_state_dict(tiny()), described.Description({**FLAGS, **TINY, **changes}))
    return path


def classifier(folder, **changes):
    config = noisy_classifier.NoisyClassifierConfig(8, 3)
    content = noisy_classifier.to_content(noisy_classifier.NoisyClassifier(config))
    content["config"] |= changes
    th.save(content, folder / "x.pt")
    return folder / "x.pt"


def enlarged(state):
    """A tensor of a billion numbers in the storage of three, for which torch would make room."""
    state["_parameters"]["bomb"] = Enlarged()


class Enlarged:
    def __reduce__(self):
        return _rebuild_tensor_v2, (th.ones(3).storage(), 0, (10**9,), (1,), False, {})


def mnist_bomb(folder):
    count = 4 * GIB // 784
    header = struct.pack(">iiii", 0x803, count, 28, 28)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(bombs.gzip_of(struct.pack(">ii", 0x801, count), 8))
    return written("train-images-idx3-ubyte.gz", bombs.gzip_of(header, 4096))(folder)


def logged(folder, **files):
    (folder / "progress.csv").write_text("step,loss\n1,2\n2,3\n")
    for name, make in files.items():
        make(folder / name.replace("_json", ".json").replace("_csv", ".csv"))
    return folder


ATTACKS = {
    "EDM pickle: tuple in tuple as a key": (written("x.pkl", bombs.nested_key()), inherited),
    "EDM pickle: large memo": (written("x.pkl", bombs.large_memo()), inherited),
    "EDM pickle: shared modules": (edm_with(shared_modules), inherited),
    "EDM pickle: numbers that are not there": (edm_with(enlarged), inherited),
    "EDM pickle: inner archive": (edm_with(inner_zip), inherited),
    "weights: tuple in tuple as a key": (written("x.pt", bombs.torch_zip(bombs.nested_key())), dist.load_state_dict),
    "older weights: tuple in tuple as a key": (written("x.pt", bombs.nested_key()), dist.load_state_dict),
    "weights: large memo": (written("x.pt", bombs.torch_zip(bombs.large_memo())), dist.load_state_dict),
    "weights: swelling archive": (
        written("x.pt", lambda: bombs.swelling_zip([f"a/{i}" for i in range(10)], 200)), dist.load_state_dict),
    "Inception's weights: swelling archive": (
        written("x.pth", lambda: bombs.swelling_zip([f"a/{i}" for i in range(10)], 200)),
        lambda path: read_tensors(str(path))),
    "safetensors: overlapping names": (written("x.safetensors", bombs.overlapping_tensors),
                                       lambda path: safetensor_files.read(str(path))),
    "safetensors: header of empty lists": (
        written("x.safetensors", struct.pack("<Q", 15 * bombs.MIB) + b"[" + b"[]," * (5 * bombs.MIB)),
        lambda path: safetensor_files.read(str(path))),
    "diffusers: many blocks": (lambda folder: diffusers_folder(folder, layers_per_block=10**9), inherited),
    "diffusers: wide levels": (
        lambda folder: diffusers_folder(folder, block_out_channels=[10**7, 10**7]), inherited),
    "diffusers: large images": (lambda folder: diffusers_folder(folder, sample_size=10**9), inherited),
    "manifest: many blocks": (lambda folder: checkpoint(folder, num_res_blocks=10**8), inherited),
    "manifest: many blocks, converted": (
        lambda folder: checkpoint(folder, num_res_blocks=10**8), lambda path: inherited(path, "source")),
    "manifest: wide levels": (lambda folder: checkpoint(folder, num_channels=10**6), inherited),
    "manifest: many classes": (lambda folder: checkpoint(folder, num_classes=10**12), inherited),
    "manifest: large images": (lambda folder: checkpoint(folder, image_size=10**9), inherited),
    "description: many blocks": (lambda folder: described_weights(folder, num_res_blocks=10**8), inherited),
    "description: wide levels": (lambda folder: described_weights(folder, num_channels=10**6), inherited),
    "classifier: many blocks": (
        lambda folder: classifier(folder, depth=10**9),
        lambda path: noisy_classifier.from_content(dist.load_state_dict(str(path)), str(path))),
    "classifier: wide": (
        lambda folder: classifier(folder, width=2**20),
        lambda path: noisy_classifier.from_content(dist.load_state_dict(str(path)), str(path))),
    "MNIST": (mnist_bomb, lambda path: open_raw(str(path))),
    "CIFAR-10": (
        written("cifar-10-python.tar.gz", lambda: bombs.gzip_of(bombs.tar_of("x", 8000), 4096)),
        lambda path: open_raw(str(path))),
    "CIFAR-10: a long head": (
        written("cifar-10-python.tar.gz", lambda: bombs.gzip_of(
            bombs.tar_of("x", 2000).replace(b"\x000\x00", b"\x00x\x00", 1), 2048)),
        lambda path: open_raw(str(path))),
    "graph: a filled constant": (written("x.pb", bombs.filled_constant()), lambda path: read_constants(str(path))),
    "graph: many fields": (
        written("x.pb", b"\x0a" + bombs.varint(20_000_000) + b"\x08\x01" * 10_000_000),
        lambda path: read_constants(str(path))),
    "TorchScript: a text that swells": (
        written("x.ts", lambda: bombs.swelling_zip(["x/extra/extractor.json"], 250, **{"x/constants.pkl": b"N."})),
        lambda path: open_module(str(path), "cpu", False)),
    "report: a sparse log": (lambda folder: bombs.sparse(folder / "progress.csv", GIB, b"step,loss\n1,2\n").parent,
                             rendered),
    "report: many cells": (
        lambda folder: written("progress.csv", lambda: b"a," * 16_000_000 + b"\n")(folder).parent, rendered),
    "log: sparse": (lambda folder: bombs.sparse(folder / "progress.csv", GIB),
                    lambda path: CSVWriter(path).drop_after(1)),
    "JSON log: sparse": (lambda folder: bombs.sparse(folder / "progress.json", 3 * GIB), JSONWriter),
    "sidecar: sparse": (lambda folder: bombs.sparse(folder / "x.ts.json", 3 * GIB),
                        lambda path: read_preprocessing(str(path)[:-5])),
    "config: sparse": (lambda folder: bombs.sparse(folder / "x.yaml", 3 * GIB),
                       lambda path: parse("", ModelConfig, argv=["--config", str(path)])),
    "best.json: sparse": (lambda folder: bombs.sparse(folder / "best.json", 3 * GIB).parent,
                          lambda path: weights_in(str(path), "model_path")),
    "sampling.json: sparse": (lambda folder: bombs.sparse(folder / "sampling.json", 3 * GIB).parent,
                              lambda path: PngFolder(str(path), False).claim({"a": 1})),
    "sampling.json: deep": (lambda folder: written("sampling.json", b"[" * 10**5)(folder).parent,
                            lambda path: PngFolder(str(path), False).claim({"a": 1})),
    "search state: many values": (written("x.json", lambda: b"[" + b"[]," * (10 * bombs.MIB)),
                                  lambda path: open_score_store(str(path), {})),
}
HARMLESS = {
    "report: sparse flags": (
        lambda folder: logged(folder, config_json=lambda path: bombs.sparse(path, 3 * GIB)), rendered),
    "report: numbers that no axis holds": (
        lambda folder: logged(folder, progress_csv=lambda path: path.write_text(
            "step,loss,fid\n1,1e308,-1e308\n2,-1e308,1e308\n3,5e-324,1\n1e300,1,2\n4,1e16,3\n5,10000000000000002,3\n")),
        rendered),
    "report: long numbers": (
        lambda folder: logged(folder, config_json=lambda path: path.write_text(
            '{"total_training_steps": 1' + "0" * 400 + "}")), rendered),
}


# --- what is no file -------------------------------------------------------------------------------------------------

PIPES = {
    "weights": ("x.pt", lambda path: dist.load_state_dict(path)),
    "EDM pickle": ("x.pkl", lambda path: edm_pickle.read(read_everywhere(path), path)),
    "safetensors": ("x.safetensors", safetensor_files.read),
    "description of weights": ("x.safetensors", described.description),
    "manifest": ("checkpoint_000010.json", manifest.read),
    "config": ("x.yaml", lambda path: parse("", ModelConfig, argv=["--config", path])),
    "zip of pictures": ("x.zip", lambda path: open_source(path, 8)),
    "npz of pictures": ("x.npz", lambda path: open_source(path, 8)),
    "npz of a batch": ("x.npz", BatchFile),
    "mask": ("x.npy", lambda path: edit_inputs.read_mask(path, 8)),
    "search state": ("x.json", lambda path: open_score_store(path, {})),
    "log": ("progress.csv", lambda path: CSVWriter(Path(path)).drop_after(1)),
    "JSON log": ("progress.json", lambda path: JSONWriter(Path(path))),
    "report": ("progress.csv", lambda path: read_run(os.path.dirname(path))),
    "best.json": ("best.json", lambda path: weights_in(os.path.dirname(path), "model_path")),
    "sampling.json": ("sampling.json", lambda path: PngFolder(os.path.dirname(path), False).claim({"a": 1})),
    "picture of a seed": ("000003.png", lambda path: PngFolder(os.path.dirname(path), False).missing([3])),
    "MNIST": ("train-images-idx3-ubyte.gz", open_raw),
    "CIFAR-10": ("cifar-10-python.tar.gz", open_raw),
    "lmdb": ("x_lmdb/data.mdb", lambda path: open_raw(os.path.dirname(path))),
    "graph": ("x.pb", read_constants),
    "TorchScript": ("x.ts", lambda path: open_module(path, "cpu", False)),
    "Inception's weights": ("x.pth", read_tensors),
    "sidecar": ("x.ts.json", lambda path: read_preprocessing(path[:-5])),
}


def as_pipe(path):
    os.mkfifo(path)


def as_device(path):
    path.symlink_to("/dev/zero")


def as_folder(path):
    path.mkdir()


def no_file(place, make):
    def prepare(folder):
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        return str(path)

    return prepare


CASES = {
    **ATTACKS, **HARMLESS,
    **{f"{name}: {make.__name__[3:]}": (no_file(place, make), read)
       for name, (place, read) in PIPES.items() for make in (as_pipe, as_device, as_folder)},
}


def outcome(read, path):
    try:
        read(path)
    except UserError as error:
        return "refused", str(error)
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"[:300]
    return "read", ""


def main(folder):
    with open("/proc/self/statm") as file:
        here = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + GIB, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for number, (name, (make, read)) in enumerate(CASES.items()):
        place = folder / str(number)
        place.mkdir()
        path = make(place)
        begun = time.monotonic()
        print(json.dumps([name, None]), flush=True)         # in case nothing follows
        kind, text = outcome(read, path)
        print(json.dumps([name, kind, text, time.monotonic() - begun]), flush=True)


if __name__ == "__main__":
    th.set_num_threads(1)
    main(Path(sys.argv[1]))

"""A bit of a checkpoint that has changed is noticed, or changes nothing, whatever reads it.

The readers here are the functions that the commands call between their flags and their network.
"""

import copy

import numpy as np
import pytest
import torch as th

from cm.checkpoints import manager, manifest
from cm.config.flags import parse
from cm.config.sampling_schema import (
    ConvertConfig,
    EditConfig,
    GuidanceConfig,
    SampleConfig,
    SolverConfig,
    TernarySearchConfig,
)
from cm.config.schema import TRAINING_SECTIONS, DiffusionConfig, ModelConfig, RunConfig
from cm.errors import UserError
from cm.setup.inherit import inherit_checkpoint, inherit_resumed
from cm.setup.rules import inherit_teacher
from cm.setup.sample import inherit_model
from cm.training.state import load_part
from support.nets import plain_state_dict
from support.weights import TINY, tiny

FLIPS = 100                                                 # of each file, spread over it
SMALL = {"channel_mult": "1", "attention_resolutions": "", "num_classes": 3}
PARTS = {"model": "model000010.pt", "ema": "ema_0.9_000010.pt", "opt": "opt000010.pt", "trainer": "trainer000010.pt",
         "manifest": "checkpoint_000010.json"}
SOLVING = (SolverConfig, GuidanceConfig, ModelConfig, DiffusionConfig, RunConfig)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    weights = plain_state_dict(tiny(**SMALL))
    moments = {0: {"step": th.tensor(10.0), "exp_avg": th.ones(300)}}
    content = {"model": weights, "ema_0.9": weights, "opt": {"state": moments, "param_groups": [{"lr": 0.1}]},
               "trainer": {"lg_loss_scale": 20.0, "memory": None}}
    diffusion = {"sigma_min": 0.002, "sigma_max": 80.0, "training_mode": "edm", "precond": "edm"}
    flags = diffusion | {name: getattr(ModelConfig, name) for name in ModelConfig.__dataclass_fields__}
    manifest.save(str(folder), 10, content, {**flags, **TINY, **SMALL}, 40)
    return folder


# --- what reads ------------------------------------------------------------------------------------------------------


def flags_of(*sections, **given):
    """Parsed once: the parser takes longer than the reader."""
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return parse("", *sections, argv=words, seed=42) if RunConfig in sections else parse("", *sections, argv=words)


def of_weights(flag, inherit, sections, **given):
    def prepare(folder, part):
        settings = flags_of(*sections, **{flag: folder / PARTS["ema"]}, **given)

        def read():
            own = copy.deepcopy(settings)
            inherit(own)
            return own.sources[flag].take(), own.values

        return read

    return prepare


def resumed(folder, part):
    """By the loop, which reads part by part; all of them are looked at before, which the next reader shows."""
    def read():
        found = manager.resolve_resume(str(folder), "auto", verify=False)
        if found is None:
            raise UserError("nothing to resume")
        name = {"ema": "ema_0.9", "manifest": "trainer"}.get(part, part)
        return load_part(name, found), [found.step, found.images_seen, found.config, found.seconds]

    return read


def resumed_whole(folder, part):
    return lambda: manifest.find(str(folder / PARTS["manifest"]))


def convert(settings):
    inherit_checkpoint(settings, "source", also=("training_mode",))


TEACHING = {"training_mode": "consistency_distillation"}
READERS = {
    "sampling": (of_weights("model_path", inherit_model, (SampleConfig, *SOLVING)), ("ema", "manifest")),
    "editing": (of_weights("model_path", inherit_model, (EditConfig, *SOLVING)), ("ema", "manifest")),
    "search": (of_weights("model_path", inherit_model, (TernarySearchConfig, SampleConfig, *SOLVING)),
               ("ema", "manifest")),
    "conversion": (of_weights("source", convert, (ConvertConfig, ModelConfig, DiffusionConfig)), ("ema", "manifest")),
    "teacher": (of_weights("teacher_model_path", inherit_teacher, TRAINING_SECTIONS, **TEACHING), ("ema", "manifest")),
    "start": (of_weights("resume_checkpoint", inherit_resumed, TRAINING_SECTIONS), ("ema", "manifest")),
    "resume": (resumed, PARTS),
    "resume from a path": (resumed_whole, PARTS),
}


# --- what changes ----------------------------------------------------------------------------------------------------


def flipped(path, seed):
    """The bytes of a file with one bit changed, FLIPS times: one in each part of so many equal ones."""
    whole, rng = path.read_bytes(), np.random.default_rng(seed)
    edges = np.linspace(0, 8 * len(whole), FLIPS + 1).astype(int)
    for low, high in zip(edges, edges[1:]):
        bit, data = int(rng.integers(low, max(high, low + 1))), bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        yield bytes(data)


def same(a, b):
    if isinstance(a, th.Tensor):
        return isinstance(b, th.Tensor) and a.dtype == b.dtype and th.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, (_, parts) in READERS.items() for part in parts])
def test_every_flipped_bit_is_noticed_or_harmless(folder, name, part):
    path = folder / PARTS[part]
    whole, read = path.read_bytes(), READERS[name][0](folder, part)
    before, noticed = read(), 0
    try:
        for data in flipped(path, seed=len(name)):
            path.write_bytes(data)
            try:
                after = read()
            except UserError:
                noticed += 1
            else:
                assert same(before, after)
    finally:
        path.write_bytes(whole)
    assert noticed >= FLIPS // 2, "white space and names in a manifest are harmless, and little else"
    assert part == "manifest" or noticed == FLIPS


def test_without_verification_flipped_weights_are_loaded(folder):
    """Else the tests above would show nothing."""
    path = folder / PARTS["ema"]
    whole = path.read_bytes()
    settings = flags_of(SampleConfig, *SOLVING, model_path=path, verify_weights=False)
    read = 0
    try:
        for data in list(flipped(path, seed=1))[::5]:
            path.write_bytes(data)
            own = copy.deepcopy(settings)
            try:
                inherit_model(own)
                own.sources["model_path"].take()
                read += 1
            except UserError:
                pass
    finally:
        path.write_bytes(whole)
    assert read > FLIPS // 5 // 2


@pytest.mark.parametrize("verify", [True, False])
def test_weights_without_a_manifest_are_compared_with_their_own_checksums(folder, tmp_path, verify):
    whole = (folder / PARTS["ema"]).read_bytes()
    path, data = tmp_path / "bare.pt", bytearray(whole)
    place = whole.index(th.load(folder / PARTS["ema"])["out.2.weight"].numpy().tobytes())
    data[place + 10] ^= 1
    path.write_bytes(data)
    given = {"image_size": 8, "num_head_channels": 16, "training_mode": "edm", "verify_weights": verify}
    settings = flags_of(SampleConfig, *SOLVING, model_path=path, **given)
    if verify:
        with pytest.raises(UserError, match="bare.pt.*does not match its own checksum.*--verify_weights False"):
            inherit_model(settings)
    else:
        inherit_model(settings)

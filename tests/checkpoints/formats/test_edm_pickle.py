"""EDM's pickles: every tensor arrives, nothing runs, and hostile or damaged files are one clear error."""

import io
import pickle
import struct
import sys
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch as th
from torch import nn

from cm.checkpoints import loading
from cm.checkpoints.formats import edm_pickle
from cm.config.flags import parse
from cm.config.objective_schema import ConsistencyConfig
from cm.config.sampling_schema import SampleConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig, TrainConfig
from cm.data.latents import EDM2
from cm.data.latents import parse as parse_record
from cm.errors import UserError
from cm.setup.inherit import inherit_checkpoint
from cm.setup.model import diffusion_from, model_from
from support import edm_pickles
from support.edm_pickles import EDM2_KWARGS, KWARGS, network


def pickled(path, arch="ddpmpp", precond="EDMPrecond", changes=(), **attributes):
    """A pickle that would leave `path`.ran if any of its code ran."""
    source = edm_pickles.creates(f"{path}.ran")
    kwargs = {**KWARGS[arch], **dict(changes)}
    return edm_pickles.dump(path, edm_pickles.net_of(network(arch), kwargs, precond, source, **attributes), source)


def sampling(*argv):
    return parse("", SampleConfig, ModelConfig, DiffusionConfig, RunConfig, argv=list(map(str, argv)))


def read(path):
    with open(path, "rb") as file:
        return edm_pickle.read(file, str(path))


# --- what is in it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, precond, name", [
    ("ddpmpp", "EDMPrecond", "edm"), ("ncsnpp", "EDMPrecond", "edm"), ("adm", "EDMPrecond", "edm"),
    ("ddpmpp", "VPPrecond", "vp"), ("ncsnpp", "VEPrecond", "ve"),
])
def test_every_tensor_arrives_and_no_flag_is_needed(tmp_path, arch, precond, name):
    path = pickled(tmp_path / "net.pkl", arch, precond)
    settings = sampling("--model_path", path)
    source = inherit_checkpoint(settings, "model_path", also=("training_mode",))
    assert (settings.values["arch"], settings.values["precond"]) == (arch, name)
    assert settings.values["training_mode"] == source.training_mode == "edm"
    model = model_from(settings)
    loading.fit(model, source.take(), source.path)
    expected = network(arch)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(map(th.equal, model.state_dict().values(), expected.state_dict().values()))
    x, y = th.randn(2, 3, 8, 8), th.tensor([0, 3])
    denoise = diffusion_from(settings, distillation=False).bind(model.eval())
    assert denoise(x, th.tensor([0.5, 3.0]), y=y).isfinite().all()
    assert not (tmp_path / "net.pkl.ran").exists()


def edm2_pickled(path, changes=(), **attributes):
    """A pickle in the layout of NVlabs/edm2, with the encoder of latents, that would leave `path`.ran if it ran."""
    source = edm_pickles.creates(f"{path}.ran")
    net = edm_pickles.edm2_net_of(edm_pickles.edm2_network(), {**EDM2_KWARGS, **dict(changes)}, source, **attributes)
    return edm_pickles.dump(path, net, source, encoder=edm_pickles.latent_encoder(source))


@th.no_grad()
def test_edm2s_pickles_give_the_same_images(tmp_path):
    path = edm2_pickled(tmp_path / "net.pkl")
    settings = sampling("--model_path", path)
    source = inherit_checkpoint(settings, "model_path", also=("training_mode",))
    flags = {"arch": "edm2", "channels": 4, "num_classes": 4, "num_head_channels": 16, "precond": "edm",
             "training_mode": "edm", "null_class": False, "attention_resolutions": "4"}
    assert flags.items() <= settings.values.items()
    model = model_from(settings)
    loading.fit(model, source.take(), source.path)
    expected = edm_pickles.edm2_network()
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(map(th.equal, model.state_dict().values(), expected.state_dict().values()))
    x, sigma, y = th.randn(2, 4, 8, 8), th.tensor([0.5, 3.0]), th.tensor([0, 3])
    denoise = diffusion_from(settings, distillation=False).bind(model.eval())
    c_skip, c_out, c_in = (c[:, None, None, None] for c in (  # arXiv 2206.00364, table 1, with sigma_data 0.5
        0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt(), 1 / (sigma**2 + 0.25).sqrt()))
    by_hand = c_skip * x + c_out * expected.eval()(c_in * x, sigma.log() / 4, y)
    assert (by_hand - c_skip * x).abs().max() > 0.1
    th.testing.assert_close(denoise(x, sigma, y=y), by_hand)
    assert not (tmp_path / "net.pkl.ran").exists()


@pytest.mark.parametrize("encoder, known", [
    (dict(), True), (dict(class_name="StandardRGBEncoder"), False), (dict(scale=np.float32([1, 2])), False),
    (dict(scale=np.array([1, 2, 3, 4])), False), (dict(scale="x"), False),
])
def test_how_edm2s_latents_are_scaled_is_read_off_the_encoder(tmp_path, encoder, known):
    beside = edm_pickles.latent_encoder()
    beside.class_name = encoder.pop("class_name", beside.class_name)
    beside.state_of.update(encoder)
    net = edm_pickles.edm2_net_of(edm_pickles.edm2_network(), EDM2_KWARGS)
    flags = read(edm_pickles.dump(tmp_path / "net.pkl", net, encoder=beside)).flags
    if not known:
        assert "latents" not in flags
        return
    record = parse_record(flags["latents"], "")
    assert record == replace(EDM2, vae="stabilityai/sd-vae-ft-mse"), "the constants as published, to the digit"


@pytest.mark.parametrize("options, message", [
    (dict(changes={"clip_act": None}), "clip_act=None; this toolkit supports only 256"),
    (dict(changes={"res_balance": 0.5}), "res_balance=0.5; this toolkit supports only 0.3"),
    (dict(changes={"channel_mult_emb": 8}), "channel_mult_emb=8; this toolkit supports only None"),
    (dict(changes={"use_flash": True}), r"that differs from EDM's: unknown arguments \['use_flash'\]"),
    (dict(sigma_data=1.0), "sigma_data=1.0; this toolkit supports only 0.5"),
])
def test_an_edm2_network_of_another_kind_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=f"net.pkl.*{message}"):
        read(edm2_pickled(tmp_path / "net.pkl", **options))


def test_the_pickles_of_these_tests_do_run_code_in_the_usual_reader(tmp_path, monkeypatch):
    path = pickled(tmp_path / "net.pkl")
    monkeypatch.setitem(sys.modules, "torch_utils", type(sys)("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", edm_pickles.stand_in())
    with pytest.raises(AssertionError, match="ran the source code"):
        pickle.loads(path.read_bytes())
    assert (tmp_path / "net.pkl.ran").exists()


def test_what_these_pickles_ask_for(tmp_path):
    """The globals that the published files were found to ask for, under the names of the installed numpy."""
    asked = set()

    class Recorder(edm_pickle.Reader):
        def find_class(self, module, name):
            asked.add(f"{module}.{name}")
            return super().find_class(module, name)

    Recorder(io.BytesIO(pickled(tmp_path / "net.pkl").read_bytes())).load()
    scalar = {f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")}
    assert len(asked & scalar) == 1
    assert asked - scalar == {
        "torch_utils.persistence._reconstruct_persistent_obj", "torch.nn.modules.container.ModuleDict", "numpy.dtype",
        "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
        "torch.storage._load_from_bytes",
    }


@pytest.mark.parametrize("channels", [1, 4])
def test_the_channels_are_those_of_the_network(tmp_path, channels):
    sides = {"in_channels": channels, "out_channels": channels}
    kwargs = KWARGS["ddpmpp"] | sides
    path = edm_pickles.dump(tmp_path / "net.pkl", edm_pickles.net_of(network("ddpmpp", **sides), kwargs, "EDMPrecond"))
    net = read(path)
    assert net.flags["channels"] == channels
    network("ddpmpp", **sides).load_state_dict(net.weights)


def test_iddpms_variances_are_left_out(tmp_path):
    """Its network has six output channels; the last three are of no use to a sampler."""
    model = network("adm", out_channels=6)
    kwargs = KWARGS["adm"] | {"out_channels": 6}
    path = edm_pickles.dump(tmp_path / "net.pkl", edm_pickles.net_of(model, kwargs, "iDDPMPrecond"))
    net = read(path)
    ours = network("adm")
    ours.load_state_dict(net.weights)
    x, t, y = th.randn(2, 3, 8, 8), th.tensor([10.0, 900.0]), th.tensor([0, 3])
    assert net.flags["precond"] == "iddpm"
    th.testing.assert_close(ours.eval()(x, t, y), model.eval()(x, t, y)[:, :3])


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("kind, content, value", [
    ("f8", struct.pack("<d", 0.25), 0.25), ("f4", struct.pack("<f", 0.25), 0.25), ("i8", struct.pack("<q", -3), -3),
])
def test_numpy_numbers_of_both_spellings(module, kind, content, value):
    assert load(call(f"{module}.scalar", NumpyType(kind), content)) == value


def test_it_serves_as_a_teacher_and_as_a_start(tmp_path):
    path = pickled(tmp_path / "net.pkl", "ncsnpp")
    sections = (ModelConfig, DiffusionConfig, TrainConfig, ConsistencyConfig, RunConfig)
    settings = parse("", *sections, argv=["--teacher_model_path", str(path)])
    inherit_checkpoint(settings, "teacher_model_path")
    assert (settings.values["arch"], settings.values["augment_dim"], settings.values["num_classes"]) == ("ncsnpp", 9, 4)
    with pytest.raises(UserError, match="--arch asks for arch='ddpmpp', but the checkpoint .*net.pkl was made with"):
        inherit_checkpoint(
            parse("", *sections, argv=["--resume_checkpoint", str(path), "--arch", "ddpmpp"]), "resume_checkpoint"
        )


# --- networks that are not here --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    (dict(changes={"decoder_type": "skip"}), "decoder_type='skip'; this toolkit supports only 'standard'"),
    (dict(changes={"channel_mult_emb": 2}), "channel_mult_emb=2; this toolkit supports only 4"),
    (dict(changes={"resample_filter": [1, 2, 1]}), "neither DDPM.. nor NCSN.."),
    (dict(changes={"use_flash": True}), r"that differs from EDM's: unknown arguments \['use_flash'\]"),
    (dict(sigma_data=1.0), "sigma_data=1.0; this toolkit supports only 0.5"),
    (dict(precond="VPPrecond", beta_d=19.1), "beta_d=19.1; this toolkit supports only 19.9"),
])
def test_a_network_of_another_kind_is_refused(tmp_path, options, message):
    path = pickled(tmp_path / "net.pkl", **options)
    with pytest.raises(UserError, match=f"net.pkl.*{message}"):
        read(path)


def test_arguments_by_position(tmp_path):
    """EDM's order: resolution, channels in and out, classes, augmentation labels, width, multipliers."""
    kwargs = dict(KWARGS["adm"])
    names = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim", "model_channels")
    args = tuple(kwargs.pop(name) for name in names)
    net = edm_pickles.net_of(network("adm"), kwargs, args=args)
    assert read(edm_pickles.dump(tmp_path / "net.pkl", net)).flags["num_channels"] == KWARGS["adm"]["model_channels"]
    too_many = edm_pickles.net_of(network("adm"), {}, args=(*args, [1, 2], 4, 1, [4], 0.1, 0.2))
    with pytest.raises(UserError, match=r"unknown arguments \['number 11'\]"):
        read(edm_pickles.dump(tmp_path / "too_many.pkl", too_many))


def test_other_classes_are_refused(tmp_path):
    record = edm_pickles.Persistent("Generator", {"_modules": {"model": edm_pickles.Persistent("G", {}, "")}}, "")
    with pytest.raises(UserError, match="unknown preconditioning in .*'Generator'; choose one of: EDMPrecond"):
        read(edm_pickles.dump(tmp_path / "stylegan.pkl", record))
    record.class_name = "EDMPrecond"
    with pytest.raises(UserError, match="unknown network in .*'G'; choose one of: SongUNet, DhariwalUNet"):
        read(edm_pickles.dump(tmp_path / "other.pkl", record))


# --- hostile and damaged files ---------------------------------------------------------------------------------------


class Ask:
    """Pickles as a call of a global; only its text is written, nothing is imported to write it."""

    def __init__(self, name, *args):
        self.name, self.args = name, args


class NumpyType(Ask):
    def __init__(self, kind):
        super().__init__("numpy.dtype", kind, False, True)
        self.state = (3, "<", None, None, None, -1, -1, 0)


class Writer(pickle._Pickler):
    """Writes `Ask`s."""

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, Ask):
            return super().save(obj, save_persistent_id)
        module, _, name = obj.name.rpartition(".")
        self.write(b"c" + f"{module}\n{name}\n".encode())
        super().save(obj.args)
        self.write(b"R")
        if hasattr(obj, "state"):
            super().save(obj.state)
            self.write(b"b")
        return None


def call(name, *args):
    buffer = io.BytesIO()
    Writer(buffer, 4).dump(Ask(name, *args))
    return buffer.getvalue()


def load(content):
    return edm_pickle.Reader(io.BytesIO(content)).load()


ATTACKS = {
    "a shell": lambda trace: call("os.system", f"touch {trace}"),
    "posix": lambda trace: call("posix.system", f"touch {trace}"),
    "exec": lambda trace: call("builtins.exec", edm_pickles.creates(trace)),
    "eval": lambda trace: call("builtins.eval", f"open({str(trace)!r}, 'w')"),
    "a process": lambda trace: call("subprocess.call", ["touch", str(trace)]),
    "the usual reader": lambda trace: call("pickle.loads", call("os.system", f"touch {trace}")),
    "torch's usual reader": lambda trace: call("torch.storage._load_from_bytes", call("os.system", f"touch {trace}")),
    "a function by its path": lambda trace: call("torch_utils.persistence.os.system", f"touch {trace}"),
    "attributes of a module": lambda trace: call("builtins.getattr", "os", "system"),
    "a type of numpy with objects": lambda trace: call("numpy.core.multiarray.scalar", NumpyType("O8"),
                                                       call("os.system", f"touch {trace}")),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_pickle_runs_nothing(tmp_path, name):
    trace, path = tmp_path / "trace", tmp_path / "net.pkl"
    path.write_bytes(ATTACKS[name](trace))
    with pytest.raises(UserError, match="net.pkl cannot be read as an EDM pickle: .*Nothing in it was run"):
        read(path)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["a shell", "posix", "exec", "eval", "a process", "the usual reader"])
def test_these_pickles_are_hostile(tmp_path, name):
    pickle.loads(ATTACKS[name](tmp_path / "trace"))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", [name for name in edm_pickle.ALLOWED if name != "collections.OrderedDict"])
def test_a_pickle_cannot_change_what_it_is_given(name):
    """A BUILD on a global sets its attributes: a way to leave something behind for the next reader."""
    module, _, what = name.rpartition(".")
    given, before = edm_pickle.ALLOWED[name], None
    before = dict(vars(given)) if isinstance(given, type) else given.function.__dict__.copy()
    for state in ({"poison": 1}, (None, {"poison": 1})):
        content = b"\x80\x04c" + f"{module}\n{what}\n".encode() + pickle.dumps(state, 4)[2:-1] + b"b."
        with pytest.raises((pickle.UnpicklingError, TypeError, AttributeError)):
            load(content)
    assert (dict(vars(given)) if isinstance(given, type) else given.function.__dict__) == before


def test_tensors_stay_within_their_storage():
    storage = th.zeros(4).untyped_storage()
    with pytest.raises(RuntimeError):
        edm_pickle.ALLOWED["torch._utils._rebuild_tensor_v2"](
            th.storage.TypedStorage(wrap_storage=storage, dtype=th.float32, _internal=True), -8, (4,), (1,), False,
            OrderedDict(),
        )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file(tmp_path, share):
    path = pickled(tmp_path / "net.pkl")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="net.pkl cannot be read as an EDM pickle"):
        read(path)


def test_flipped_bytes_are_at_worst_an_error(tmp_path):
    """25 files with one bit changed each: a network, or one clear error, and never a trace."""
    path = pickled(tmp_path / "net.pkl")
    content = path.read_bytes()
    places = th.randint(0, len(content), (25,), generator=th.Generator().manual_seed(0)).tolist()
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        try:
            edm_pickle.read(io.BytesIO(bytes(damaged)), "net.pkl")
        except UserError:
            continue
    assert not (tmp_path / "net.pkl.ran").exists()


@pytest.mark.parametrize("content, message", [
    (pickle.dumps({"a": 1}), "contains no EDM network: it has no 'ema' with a 'model', only a"),
    (pickle.dumps([1]), "only list"),
    (pickle.dumps({"ema": 3}), "only ema"),
    (pickle.dumps({"net": {}, "optimizer_state": {}}), "only net, optimizer_state"),   # a training-state file
    (b"hello", "cannot be read as an EDM pickle"),
])
def test_other_pickles(content, message):
    with pytest.raises(UserError, match=message):
        edm_pickle.read(io.BytesIO(content), "net.pkl")


def test_containers_of_torch_are_records():
    """As they come out of EDM's files: a ModuleDict is never built."""
    record = load(pickle.dumps(nn.ModuleDict({})))
    assert type(record) is edm_pickle.Record and record.state["_modules"] == {}

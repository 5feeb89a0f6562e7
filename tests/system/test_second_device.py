"""Training, sampling, editing and features on a device of their own: nothing is mixed with the CPU, nobody waits.

A training step waits once, for three integers; every other wait would stop a GPU. Where there is none, "meta" plays it.
"""

import contextlib
from functools import partial

import numpy as np
import pytest
import torch as th

from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.distributed import setup as dist
from cm.generate.editing import EDITS, Between, run_edit
from cm.logging import logger
from cm.random_util import SampleStreams
from cm.samplers import SAMPLERS, Churn, make_sampler
from cm.samplers.sample import SampleOptions, sample
from cm.setup.model import diffusion_from
from cm.training.optimizer import OPTIMIZERS
from evaluations.features.base import as_rows
from evaluations.features.classifier import Classifier
from evaluations.features.inception_v3 import InceptionV3
from support.every_objective import DENOISERS, OBJECTIVE_FLAGS, SHAPE, loop_of, network
from support.fake_device import MixedDevicesError, WatchedDevice

HAS_GPU = th.cuda.is_available()
DEVICES = ["meta", pytest.param("cuda", marks=[
    pytest.mark.cuda, pytest.mark.skipif(not HAS_GPU, reason="this machine has no GPU")
])]
STEP = "cm/training/loop.py: agree_on_finite_and_stop"      # the wait that a training step declares
HISTORY = "cm/training/loop.py: update_loss_history"        # twice, where an objective learns from its losses
pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def quiet_log():
    """No test opens a log of its own, and none of another file finds this one."""
    logger.configure(None, format_strs=[])
    yield
    logger.reset()


def waits_of_a_step(loop, batch):
    """The waits of the second step: the first makes the optimizer's state, and tables that are kept."""
    with WatchedDevice(loop.device.type) as watch:
        loop.run_step(batch)
        watch.waits.clear()
        loop.run_step(batch)
    return watch.waits


def streams():
    return SampleStreams(0, range(4), "sample")


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVE_FLAGS)
def test_a_step_of_every_objective_waits_once(device, name):
    assert waits_of_a_step(*loop_of(device, *OBJECTIVE_FLAGS[name])) == [STEP]


@pytest.mark.parametrize("options", [
    *[{"optimizer": name, "grad_clip": 1.0} for name in OPTIMIZERS], {"microbatch": 2}, {"use_fp16": True},
    {"ema_rate": "power0.05,0.9"}, {"ema_rate": ""},
], ids=str)
def test_a_step_of_every_optimizer_precision_and_average_waits_once(device, options):
    assert waits_of_a_step(*loop_of(device, *DENOISERS["edm, edm"], **options)) == [STEP]


@pytest.mark.parametrize("law", ["lognormal", "uniform", "vp", "ve", "iddpm", "ddpm"])
def test_drawing_noise_levels_does_not_wait(device, law):
    assert waits_of_a_step(*loop_of(device, *DENOISERS["edm, edm"], "--schedule_sampler", law)) == [STEP]


def test_only_what_learns_from_losses_fetches_them(device):
    loop, batch = loop_of(device, *DENOISERS["edm, edm"], "--schedule_sampler", "loss-second-moment")
    assert waits_of_a_step(loop, batch) == [STEP, HISTORY, HISTORY]


def test_a_row_of_the_log_reads_sums_and_two_norms(device):
    loop, batch = loop_of(device, *DENOISERS["edm, edm"])
    with WatchedDevice(device) as watch:
        loop.run_step(batch)
        watch.waits.clear()
        loop.meter.means()
        loop.report.logs()
    assert watch.waits == ["cm/training/meters.py: means", *["cm/training/mixed_precision.py: logs"] * 2]


def test_the_message_of_a_step_lies_on_the_device(device, monkeypatch):
    loop, batch = loop_of(device, *DENOISERS["edm, edm"])
    sent = []
    monkeypatch.setattr(dist, "all_reduce_min", lambda tensor: sent.append(tensor) or tensor)
    with WatchedDevice(device):
        loop.run_step(batch)
    assert [(tensor.device.type, tensor.shape) for tensor in sent] == [(device, (3,))] and not loop.stop_signal


# --- sampling and editing --------------------------------------------------------------------------------------------


def sampled(device, name, options, steps=4):
    settings = parse("", *TRAINING_SECTIONS, argv=DENOISERS["edm, edm"])
    diffusion = diffusion_from(settings, name in ("onestep", "multistep"))
    model = network(device, second_time=name == "flowmap").eval()
    sampler = make_sampler(name, {"ts": (0, 2, 3)} | options)
    churn = Churn(10.0) if sampler.accepts_churn else Churn()
    with WatchedDevice(device) as watch:
        labels = th.zeros(4, dtype=th.long, device=device)
        images = sample(
            diffusion, model, SHAPE, SampleOptions(steps, sampler, churn=churn), model_kwargs={"y": labels},
            generator=streams(),
        ).images
    assert images.device.type == device and images.shape == SHAPE
    return watch.waits


@pytest.mark.parametrize("name, options", [
    *[(name, {}) for name in SAMPLERS], ("sde", {"s_tmin": 0.1, "s_tmax": 10.0}),
    ("ito", {"s_tmin": 0.1, "s_tmax": 10.0, "eta": 0.5}), ("ito", {"ito_form": "taylor"}), ("ddim", {"eta": 1.0}),
    ("pc", {"pc_sde": "vp"}),
], ids=str)
def test_no_sampler_waits(device, name, options):
    assert sampled(device, name, options) == []


EDIT_OPTIONS = {"superres": {"factor": 2}, "stroke": {"sigma": 2.0}, "denoise": {"sigma": 2.0}}


@pytest.mark.parametrize("name", EDITS)
def test_no_edit_waits(device, name):
    """Only inpainting does, before it begins: it looks whether its mask is one."""
    images = (th.rand(SHAPE) * 2 - 1).to(device)
    sampler = make_sampler("multistep", {"ts": (0, 2, 3)})
    rng = Between(streams(), streams(), th.full((4,), 0.5)) if name == "interpolate" else streams()
    options = {"mask": images[0, 0] > 0} if name == "inpaint" else EDIT_OPTIONS.get(name, {})
    with WatchedDevice(device) as watch:
        edit = EDITS[name](images, **options)
        ready = watch.waits.copy()
        out = run_edit(lambda x, sigma: x / 2, edit, sampler, sampler.grid(4, 0.002, 80.0, 7.0), rng)
    assert out.device.type == device and out.shape == SHAPE
    assert ready == (["cm/generate/editing.py: __init__"] if name == "inpaint" else [])
    assert watch.waits == ready


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build, images", [
    (InceptionV3, th.zeros(2, 3, 32, 32, dtype=th.uint8)), (partial(Classifier, 10), th.zeros(2, 3, 8, 8)),
], ids=["Inception-v3", "classifier"])
def test_features_wait_only_to_be_read(device, build, images):
    with th.device("meta"):
        model = build()
    model = model.to_empty(device=device).eval()
    with th.inference_mode(), WatchedDevice(device) as watch:
        parts = [part for part in model(images.to(device, non_blocking=True)) if part is not None]
        assert watch.waits == []
        rows = [as_rows(part, 2, "features", "weights") for part in parts]
    assert watch.waits == ["evaluations/features/base.py: as_rows"] * len(parts)
    assert all(isinstance(part, np.ndarray) for part in rows)


# --- the watch itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.tolist(), lambda x: x.cpu(),
    lambda x: th.equal(x, x), lambda x: th.zeros(4).copy_(x), lambda x: x.copy_(th.zeros(4)),
    lambda x: th.zeros(4).to(x.device),
], ids=range(8))
def test_the_watch_sees_every_wait(device, wait):
    x = th.ones(4, device=device)
    with WatchedDevice(device) as watch:
        x.copy_(th.zeros(4), non_blocking=True)
        _ = (x * 2 + 1).sum() * th.tensor(2.0)              # a number of the CPU is passed along
        assert watch.waits == []
        with contextlib.suppress(NotImplementedError):      # what has no value on "meta"
            wait(x)
    assert len(watch.waits) == 1


@pytest.mark.parametrize("asks", [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.masked_select(x > 0)],
                         ids=["nonzero", "mask", "masked_select"])
def test_the_watch_sees_shapes_that_depend_on_values(device, asks):
    with WatchedDevice(device) as watch:
        try:
            asks(th.ones(4, device=device))
        except (NotImplementedError, RuntimeError):
            assert device == "meta"
    assert watch.waits


@pytest.mark.parametrize("mix", [lambda x, y: x + y, lambda x, y: x[y.long()], lambda x, y: th.cat([x, y]),
                                 lambda x, y: x.mul_(y), lambda x, y: y @ x], ids=range(5))
def test_the_watch_refuses_mixed_devices(device, mix):
    with WatchedDevice(device), pytest.raises(MixedDevicesError, match="takes tensors of"):
        mix(th.ones(4, device=device), th.ones(4))

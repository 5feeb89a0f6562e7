"""On a GPU: the numbers of the CPU, and the commands from training to evaluation. `make test-gpu` runs this."""

import json
import sys

import numpy as np
import pytest
import torch as th

import cm
from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.logging import logger
from cm.networks.layers import full_float32
from cm.random_util import SampleStreams
from cm.samplers import SAMPLERS, make_sampler
from cm.samplers.sample import SampleOptions, sample
from cm.setup.model import diffusion_from
from support.commands import NETWORK, TRAIN, curve
from support.every_objective import DENOISERS, OBJECTIVE_FLAGS, SHAPE, loop_of, network
from support.mpi import ROOT, find_mpiexec, start
from support.tiny_evaluation import write_files

pytestmark = pytest.mark.cuda
STEPS, COUNT = 8, 40
CONSISTENCY = ["--loss_norm", "l2", "--weight_schedule", "uniform", "--start_ema", 0.9, "--start_scales", 6]
VARIANTS = {
    "bf16": ("edm_train", "--precision", "bf16"),
    "fp16": ("edm_train", "--precision", "fp16"),
    "averages on the CPU": ("edm_train", "--ema_device", "cpu"),
    "recomputed activations": ("edm_train", "--use_checkpoint", True, "--microbatch", 8),
    "TF32": ("edm_train", "--tf32", True),
    "EDM2": ("edm_train", "--arch", "edm2", "--objective", "uncertainty"),
    "every rank writes": ("edm_train", "--checkpoint_format", "dcp", "--async_save", True),
    "tangents in bf16": ("cm_train", "--training_mode", "sct", "--precision", "bf16"),
    "consistency training": ("cm_train", *CONSISTENCY, "--training_mode", "consistency_training"),
}


# --- the numbers of the CPU -----------------------------------------------------------------------------------------


@pytest.fixture
def exact(gpu):
    """No TF32, whose 10 bits would hide a mistake."""
    logger.configure(None, format_strs=[])
    with full_float32(gpu):
        yield
    logger.reset()


def trained(device, flags, **options):
    """The losses of three steps, and the parameters after them."""
    loop, batch = loop_of(device, *flags, **options)
    losses = []
    for _ in range(3):
        loop.run_step(batch)
        losses.append(loop.meter.means()["loss"])
    return losses, [param.detach().cpu() for param in loop.model.parameters()]


@pytest.mark.parametrize("name", OBJECTIVE_FLAGS)
def test_every_objective_has_the_losses_of_the_cpu(gpu, name, exact):
    losses, params = trained(gpu, OBJECTIVE_FLAGS[name])
    expected, on_cpu = trained("cpu", OBJECTIVE_FLAGS[name])
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    distance = sum((param - other).abs().sum() for param, other in zip(params, on_cpu))
    assert distance / sum(param.numel() for param in params) < 3e-4     # three steps move a parameter by up to 3e-3


def drawn(device, name, precision):
    """Images of a sampler, of a network whose last layers are not zero."""
    settings = parse("", *TRAINING_SECTIONS, argv=DENOISERS["edm, edm"])
    diffusion = diffusion_from(settings, name in ("onestep", "multistep"))
    model = network("cpu", second_time=name == "flowmap").eval()
    for param in model.parameters():
        if not param.any():
            th.nn.init.normal_(param, std=0.02)
    model = model.to(device)
    with th.no_grad(), th.autocast(device, th.bfloat16, enabled=precision == "bf16"):
        return sample(
            diffusion, model, SHAPE, SampleOptions(4, make_sampler(name, {"ts": (0, 2, 3)})),
            model_kwargs={"y": th.zeros(4, dtype=th.long, device=device)},
            generator=SampleStreams(0, range(4), "sample"),
        ).images.float().cpu()


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 0.1)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_has_the_images_of_the_cpu(gpu, name, precision, tolerance, exact):
    images, expected = drawn(gpu, name, precision), drawn("cpu", name, "fp32")
    assert expected.std() > 0.01
    assert (images - expected).abs().mean() < tolerance


# --- the commands -----------------------------------------------------------------------------------------------------


def command(device, name, *args, ranks=0):
    words = [sys.executable, ROOT / f"scripts/{name}.py", *args, "--device", device]
    done = start([find_mpiexec(), "-n", ranks, *words] if ranks else words, timeout=400)
    assert done.rc == 0, done
    return done.stdout


def train(device, folder, name, *args, steps=STEPS, **options):
    command(device, name, *NETWORK, *TRAIN, "--global_batch_size", 16, "--save_interval", 4, "--total_training_steps",
            steps, "--log_dir", folder, *args, **options)
    losses = curve(folder)
    assert len(losses) == steps and np.isfinite(losses).all()
    return losses


@pytest.fixture(scope="module")
def run(gpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edm")
    train(gpu, folder, "edm_train")
    return folder


def test_the_cpu_trains_the_same(run, tmp_path):
    np.testing.assert_allclose(train("cpu", tmp_path, "edm_train"), curve(run), rtol=1e-3)


def test_a_run_resumes(gpu, run, tmp_path):
    train(gpu, tmp_path, "edm_train", steps=4)
    np.testing.assert_allclose(train(gpu, tmp_path, "edm_train"), curve(run), rtol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_with_other_flags(gpu, name, tmp_path):
    train(gpu, tmp_path, *VARIANTS[name])


def test_distillation(gpu, run, tmp_path):
    train(gpu, tmp_path, "cm_train", *CONSISTENCY, "--teacher_model_path", run)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_one_rank_on_each_gpu(gpu, run, tmp_path, engine):
    """Two ranks where the CPU stands in. The noise does not depend on the number of ranks."""
    ranks = th.cuda.device_count() if gpu == "cuda" else 2
    if ranks == 1:
        pytest.skip("one GPU: no second rank can have one")
    losses = train(gpu, tmp_path, "edm_train", "--parallel", engine, ranks=ranks)
    np.testing.assert_allclose(losses, curve(run), rtol=0.02)


def images_of(folder):
    return np.load(next(folder.glob("samples_*.npz")))["arr_0"].astype(float)


@pytest.mark.parametrize("options, difference", [
    (("--precision", "fp32"), 1), (("--precision", "bf16"), 8), (("--compile", True), 1),
], ids=["fp32", "bf16", "compiled"])
def test_sampling(gpu, run, tmp_path, options, difference):
    """Images of 256 levels."""
    common = ["--model_path", run, "--num_samples", COUNT, "--batch_size", 16, "--sampler", "heun", "--steps", 5]
    command(gpu, "image_sample", *common, "--log_dir", tmp_path / "gpu", *options)
    command("cpu", "image_sample", *common, "--log_dir", tmp_path / "cpu", "--precision", "fp32")
    on_gpu, on_cpu = images_of(tmp_path / "gpu"), images_of(tmp_path / "cpu")
    assert on_gpu.shape == on_cpu.shape and np.abs(on_gpu - on_cpu).mean() < difference


def test_editing(gpu, run, tmp_path):
    command(gpu, "image_edit", "--model_path", run, "--images", "digits", "--num_samples", 4, "--task", "inpaint",
            "--mask_box", "0,0,4,4", "--steps", 3, "--log_dir", tmp_path)


def test_evaluation(gpu, tmp_path):
    write_files(tmp_path)
    found = []
    for device in (gpu, "cpu"):
        done = start([sys.executable, "-m", "evaluations.evaluator", tmp_path / "ref.npz", tmp_path / "sample.npz",
                      "--inception", tmp_path / "two.ts", "--trust_extractor", "--device", device, "--json",
                      tmp_path / "found.json"], timeout=200)
        assert done.rc == 0, done
        metrics = json.loads((tmp_path / "found.json").read_text())["metrics"]
        found.append([fields["value"] for fields in metrics.values()])
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-6)


def test_a_classifier(gpu, tmp_path):
    assert "held-out accuracy" in command(gpu, "classifier_train", "--epochs", 1, "--out", tmp_path / "classifier.ts")


def test_from_python(gpu, run):
    model = cm.load(run, device=gpu)
    assert model.device.type == gpu
    assert len(model.sample(4, seed=0)) == 4

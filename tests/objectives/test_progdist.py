"""Progressive distillation from end to end: stages, restarts, resuming inside a stage, the commands."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch as th
from torch import nn

from cm.errors import UserError
from cm.objectives.curricula import ema_and_scales
from cm.objectives.distances import l2
from cm.objectives.progdist import ProgressiveDistillation
from cm.samplers.euler import Euler
from cm.samplers.network_guidance import Guidance, NetworkGuidedDenoiser
from cm.script_util import create_model
from cm.training.loop import as_batch
from cm.types import Networks
from support.gaussian import Gaussian, Scripted
from support.nets import plain_state_dict
from support.objectives import F64, levels, nets_of, orthonormal, plain
from support.training import digest, loop, run
from support.warm import mpiexec

ROOT = Path(__file__).resolve().parents[2]
HALVING = ema_and_scales("fixed", 0.0, "progdist", 8, 8, 12, 2)


def test_halves_to_one_step_and_restarts_optimizer_and_averages(images, tmp_path):
    training = loop(images, tmp_path, 12, mode="progdist", curriculum=HALVING)
    stages, fresh = [], []
    for _ in range(12):
        stages.append(HALVING(training.step)[1])
        training.run_step(as_batch(next(training.data), training.step, 0, 1))
        masters = training.trainer.master_params
        restarted = [all(th.equal(a, b) for a, b in zip(masters, average)) for average in training.ema_params]
        assert restarted[0] == restarted[1] == (not training.opt.state)
        fresh.append(restarted[0])
    assert stages == [8, 8, 4, 4, 2, 2, 2, 2, 1, 1, 1, 1]           # the stage of 2 is twice as long, and that of 1
    assert [step for step, is_fresh in enumerate(fresh) if is_fresh] == [1, 3, 7]


@pytest.mark.parametrize("stop", [5, 8])                            # inside the stage of 2, and just after its end
def test_resuming_is_the_same_run_to_the_last_bit(images, tmp_path, stop):
    options = {"mode": "progdist", "curriculum": HALVING}
    run(images, tmp_path / "straight", 9, **options)
    run(images, tmp_path / "stopped", stop, **options)
    run(images, tmp_path / "stopped", 9, **options)
    assert digest(tmp_path / "straight", 9) == digest(tmp_path / "stopped", 9)


def test_only_the_first_teacher_is_guided():
    """Later ones are students of it, which have learnt the guidance."""
    bed, bad = Gaussian(0.3, 0.5), Gaussian(-0.2, 0.9)
    objective = ProgressiveDistillation(ema_and_scales("fixed", 0.0, "progdist", 4, 4, 30, 10), levels, plain, l2)
    batch, noise = orthonormal(bed, 1)

    def loss(teacher, step):
        return objective(nets_of(bed.D, teacher=teacher), batch, step, Scripted(noise, th.tensor([0]))).loss

    def formula(x, sigma):
        return bad.D(x, sigma) + 3 * (bed.D(x, sigma) - bad.D(x, sigma))

    guided = NetworkGuidedDenoiser(bed.D, Guidance(lambda D: bad.D, 3.0))
    th.testing.assert_close(loss(guided, 9), loss(formula, 9), rtol=1e-9, atol=0)
    assert loss(guided, 9) > 2 * loss(bed.D, 9)
    calls = guided.extra_calls
    assert calls == 2 * 2 and all(th.equal(loss(guided, step), loss(bed.D, step)) for step in (10, 29))
    assert guided.extra_calls == calls


def test_curricula_that_leave_no_interval_are_refused_at_the_start(images, tmp_path):
    with pytest.raises(UserError, match="num_scales must be at least 2, got 1"):
        loop(images, tmp_path, 12, mode="consistency_training", curriculum=HALVING)


def script(name, *args):
    done = mpiexec(2, [str(ROOT / "scripts" / name), *map(str, args)], timeout=120, env={"OPENAI_LOG_FORMAT": "csv"})
    assert done.rc == 0, done
    return done


@pytest.mark.mpi
def test_distil_and_sample_on_two_ranks(tmp_path):
    """From a teacher without a manifest, in half precision, to one step; then exactly the seeds that were asked for."""
    teacher, run_dir = tmp_path / "edm_imagenet64_ema.pt", tmp_path / "pd"
    model = create_model(
        8, 32, 1, "1", class_cond=True, attention_resolutions="8", num_head_channels=32, num_classes=10
    )
    th.save(plain_state_dict(model), teacher)
    script("cm_train.py", "--training_mode", "progdist", "--teacher_model_path", teacher, "--image_size", 8,
           "--num_head_channels", 32, "--data_dir", "digits", "--scale_mode", "progdist", "--start_scales", 4,
           "--distill_steps_per_iter", 1, "--total_training_steps", 5, "--lr_anneal_steps", 0, "--loss_norm", "l2-32",
           "--use_fp16", "True", "--global_batch_size", 8, "--log_interval", 1, "--log_dir", run_dir)
    with open(run_dir / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["num_scales"] for row in rows] == ["4", "2", "2", "1", "1"]
    assert all(np.isfinite(float(row["loss"])) and float(row["lr"]) == 1e-4 for row in rows)
    config = json.loads((run_dir / "checkpoint_000005.json").read_text())["config"]
    assert (config["class_cond"], config["num_classes"], config["channel_mult"]) == (True, 10, "1")
    student = th.load(run_dir / "model000005.pt", weights_only=True)
    assert all(value.dtype == th.float32 for value in student.values())
    script("image_sample.py", "--model_path", run_dir / "ema_0.9999_000005.pt", "--sampler", "progdist", "--steps", 1,
           "--seeds", "3,0-2", "--batch_size", 1, "--log_dir", tmp_path / "samples")
    samples = np.load(tmp_path / "samples" / "samples_4x8x8x3.npz")
    assert samples["seeds"].tolist() == [3, 0, 1, 2] and samples["arr_0"].shape == (4, 8, 8, 3)
    assert json.loads((tmp_path / "samples" / "samples_4x8x8x3.json").read_text())["network_evaluations"] == 1


# --- progressive distillation ----------------------------------------------------------------------------------------


class Table(nn.Module):
    """D(x, sigma) = mu + a(sigma) (x - mu), with a looked up among the noise levels it has been taught."""

    def __init__(self, grid: th.Tensor, slopes: th.Tensor, mu: float):
        super().__init__()
        self.mu = mu
        self.register_buffer("grid", grid)
        self.slopes = nn.Parameter(slopes)

    def forward(self, x, sigma):
        nearest = (self.grid.log() - sigma[:, None].log()).abs().argmin(1)
        return self.mu + self.slopes[nearest][:, None, None] * (x - self.mu)


def test_stages_end_in_one_step_that_does_all_the_steps_of_the_first_teacher():
    """8 Euler steps become 4, 2, 1. In each stage the loss has a zero, found here by two gradients per level."""
    bed = Gaussian(0.3, 0.5)
    curriculum = ema_and_scales("fixed", 0.0, "progdist", 4, 4, 100, 10)
    objective = ProgressiveDistillation(curriculum, levels, plain, l2)
    batch, noise = orthonormal(bed, 1)
    fine = levels(9)                                                # every level that any stage asks about
    exact = 0.25 / (0.25 + fine**2)
    student, teacher = (Table(fine, exact.clone(), bed.mu) for _ in range(2))
    nets = Networks(student, student, None, None, teacher, teacher)
    stages = []
    for step in range(60):
        n = curriculum(step)[1]
        if step % 10 == 9:                                          # the stage has been trained to the end
            for index in range(n):
                slot = index * (8 // n)
                gradients = []
                for trial in (0.0, 1.0):
                    student.slopes.data[slot] = trial
                    loss = objective(nets, batch, step, Scripted(noise, th.tensor([index]))).loss
                    gradients.append(th.autograd.grad(loss.sum(), student.slopes)[0][slot].item())
                student.slopes.data[slot] = -gradients[0] / (gradients[1] - gradients[0])
                assert objective(nets, batch, step, Scripted(noise, th.tensor([index]))).loss.item() < 1e-18
        holder = teacher.slopes
        if objective.after_step(nets, step):
            stages.append(step)
            assert teacher.slopes is holder                         # in place: nobody has to bind it anew
            assert th.equal(teacher.slopes, student.slopes)
    assert stages == [9, 29]                                        # the stage of 2 lasts twice as long

    x = th.tensor([[[80.0, -30.0]]], dtype=F64)
    once = Euler().step(student, x, levels(2)[:1], levels(2)[1:], None)
    for t, r in zip(fine, fine[1:]):
        x = Euler().step(bed.D, x, t[None], r[None], None)
    th.testing.assert_close(once, x, rtol=1e-8, atol=1e-8)


def test_stages_that_do_not_halve_exactly_are_announced(capsys):
    for first, stages in ((8, None), (7, "7, 3, 2, 1 steps"), (6, "6, 3, 2, 1 steps")):
        objective = ProgressiveDistillation(lambda step, first=first: (0.0, first), levels, plain, l2)
        objective.check(10)
        told = "".join(capsys.readouterr())
        assert (stages in told and "8 or 4 halve exactly" in told) if stages else not told

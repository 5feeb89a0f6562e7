"""The training loop: its gradients, its end, its averages, its checkpoints, in one process."""

import dataclasses

import numpy as np
import pytest
import torch as th

from cm.checkpoints import file_names
from cm.data.loader import load_data
from cm.diffusion.noise_sampling import create_named_schedule_sampler
from cm.errors import UserError
from cm.karras_diffusion import KarrasDenoiser
from cm.logging import logger
from cm.script_util import create_model
from cm.train_util import TrainLoop
from cm.training.loop import as_batch
from cm.types import Batch
from support.commands import curve
from support.mpi import program
from support.training import BATCH, MODES, PROGDIST, digest, loop, network, run, second_moment, stream
from support.warm import mpiexec


@pytest.mark.parametrize("microbatch", [1, 3, 4])
def test_microbatches_change_nothing_but_memory(images, tmp_path, microbatch):
    whole = run(images, tmp_path / "whole", 3)
    parts = run(images, tmp_path / "parts", 3, microbatch=microbatch)
    for a, b in zip(whole.trainer.master_params, parts.trainer.master_params):
        # RAdam's first steps divide nothing by small numbers, so weights differ by rounding of gradients times lr.
        assert th.allclose(a, b, rtol=0, atol=2e-6)


def test_dropout_masks_are_drawn_for_each_microbatch(images, tmp_path):
    whole, parts = (run(images, tmp_path / str(size), 1, dropout=0.3, microbatch=size) for size in (-1, 2))
    assert not all(th.allclose(a, b, rtol=0, atol=2e-6)
                   for a, b in zip(whole.trainer.master_params, parts.trainer.master_params))


UNEQUAL = """
    import sys

    from cm.data.loader import load_data
    from cm.distributed import setup as dist
    from support.training import loop

    def main():
        dist.setup_dist()
        share = 3 - dist.get_rank()

        def stream(start):
            return load_data(data_dir=sys.argv[1], batch_size=share, global_batch=5, image_size=8, class_cond=True,
                             seed=3, start=start, num_workers=0, rank=dist.get_rank(), world_size=2)

        for microbatch in (-1, 2):
            loop(sys.argv[1], f"{sys.argv[2]}/microbatch {microbatch}", 3, data=stream, batch_size=share,
                 global_batch_size=5, microbatch=microbatch).run_loop()

    dist.run(main)
"""


@pytest.mark.mpi
def test_a_batch_that_the_ranks_cannot_share_evenly_is_still_one_batch(images, tmp_path):
    """Five images a step: 3 and 2 on two ranks, each of which counts for a fifth. Losses and weights of one process."""
    done = mpiexec(2, [program(tmp_path, UNEQUAL), images, tmp_path], timeout=120)
    assert done.rc == 0, done
    alone = run(images, tmp_path / "alone", 3, batch_size=5, data=lambda start: load_data(
        data_dir=images, batch_size=5, image_size=8, class_cond=True, seed=3, start=start, num_workers=0
    ))
    weights = alone.model.state_dict()
    assert len(curve(tmp_path / "alone")) == 3
    for together in (tmp_path / "microbatch -1", tmp_path / "microbatch 2"):
        saved = th.load(together / "model000003.pt", weights_only=True)
        assert saved.keys() == weights.keys()
        for name, value in saved.items():
            # As above: RAdam's first steps hand on the rounding of gradients times lr.
            th.testing.assert_close(value, weights[name], rtol=0, atol=2e-6, msg=lambda why: f"{name}: {why}")  # noqa: B023
        np.testing.assert_allclose(curve(together), curve(tmp_path / "alone"), rtol=1e-5)


def test_a_run_that_ended_before_its_first_checkpoint_starts_its_log_again(images, tmp_path):
    logger.configure(str(tmp_path / "run"), format_strs=["csv"])
    for step in (1, 2, 3):
        logger.logkvs({"step": step, "loss": 9.0})
        logger.dumpkvs()
    logger.reset()
    run(images, tmp_path / "run", 2)
    rows = (tmp_path / "run" / "progress.csv").read_text().splitlines()
    assert len(rows) == 3 and not any("9.0" in row.split(",") for row in rows)


@pytest.mark.parametrize("name", MODES)
def test_a_resumed_run_is_the_same_run_to_the_last_bit(images, tmp_path, name):
    options = MODES[name] | {"mode": name.split(" ")[0]}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    fresh = dict(options)

    def start(directory, steps):
        if "schedule_sampler" in fresh:                     # each run has a memory of its own
            fresh["schedule_sampler"] = second_moment()
        run(images, directory, steps, **fresh)

    start(straight, 7)
    start(stopped, 2)
    start(stopped, 5)
    start(stopped, 7)
    assert digest(straight, 7) == digest(stopped, 7)
    assert len(digest(straight, 7)) >= 5
    rows = (stopped / "progress.csv").read_text().splitlines()
    assert len(rows) == 1 + 7                               # the log goes on and counts nothing twice


@pytest.mark.parametrize("stepped", [True, False])
def test_only_steps_that_were_taken_are_remembered(images, tmp_path, monkeypatch, stepped):
    training = loop(images, tmp_path, 2, schedule_sampler=second_moment())
    take = training.trainer.step
    monkeypatch.setattr(
        training.trainer, "step", lambda opt, finite: dataclasses.replace(take(opt, finite), stepped=stepped)
    )
    training.run_step(next(training.data))
    assert training.objective.history.counts.sum() == (BATCH if stepped else 0)


def test_another_seed_is_another_run(images, tmp_path):
    run(images, tmp_path / "a", 2, seed=0)
    run(images, tmp_path / "b", 2, seed=1)
    assert digest(tmp_path / "a", 2)["model000002.pt"] != digest(tmp_path / "b", 2)["model000002.pt"]


def test_the_last_state_is_saved_once_and_training_ends_there(images, tmp_path):
    run(images, tmp_path, 5, save_interval=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint_*")) == [f"checkpoint_{k:06d}.json" for k in (2, 4, 5)]
    assert run(images, tmp_path, 5, save_interval=2).step == 5              # nothing left to do


def test_learning_rate_falls_to_zero_and_never_below(images, tmp_path):
    training = loop(images, tmp_path, 10, lr_anneal_steps=4)
    rates = []
    for _ in range(training.total_training_steps):
        training.run_step(as_batch(next(training.data), training.step, 0, 1))
        rates.append(training.opt.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_checkpoints_are_plain_float32_state_dicts(images, tmp_path):
    run(images, tmp_path, 1)
    saved = th.load(tmp_path / "ema_0.9_000001.pt", weights_only=True)
    assert list(saved) == list(network().state_dict())
    assert all(type(v) is th.Tensor and v.dtype == th.float32 and not v.requires_grad for v in saved.values())


def test_progressive_distillation_moves_student_into_teacher(images, tmp_path):
    training = loop(images, tmp_path, 8, mode="progdist", curriculum=PROGDIST)
    teacher = {k: v.clone() for k, v in training.teacher_model.state_dict().items()}
    optimizers, stages = [], []
    for _ in range(6):
        optimizers.append(training.opt)
        stages.append(PROGDIST(training.step)[1])
        training.run_step(as_batch(next(training.data), training.step, 0, 1))
        changed = any(not th.equal(teacher[k], v) for k, v in training.teacher_model.state_dict().items())
        assert changed == (PROGDIST(training.step)[1] < 4)
    assert stages[0] == 4 and stages[2] == 2
    assert optimizers[0] is optimizers[1] and optimizers[1] is not optimizers[2]


def test_guided_diffusion_iterators_are_welcome(images, tmp_path):
    def pairs():
        while True:
            yield th.zeros(BATCH, 3, 8, 8), {"y": th.zeros(BATCH, dtype=th.long)}

    training = loop(images, tmp_path, 2, data=pairs())
    training.run_loop()
    assert training.step == 2


def test_positions_of_plain_pairs_are_those_of_the_run():
    batch = as_batch((th.zeros(4, 3, 8, 8), {}), images_seen=40, rank=1, world_size=2)
    assert isinstance(batch, Batch) and batch.positions.tolist() == [41, 43, 45, 47]


def test_start_from_weights_of_another_run(images, tmp_path):
    first = run(images, tmp_path / "first", 2)
    ema = tmp_path / "first" / "ema_0.5_000002.pt"
    second = loop(images, tmp_path / "second", 2, resume_checkpoint=str(ema))
    assert second.step == 0
    assert all(th.equal(a, b) for a, b in zip(first.ema_params[0], second.trainer.master_params))
    third = loop(images, tmp_path / "third", 4, resume_checkpoint=str(tmp_path / "first" / "model000002.pt"))
    assert third.step == 2
    assert all(th.equal(a, b) for a, b in zip(first.ema_params[1], third.ema_params[1]))


def test_a_run_that_goes_on_in_another_folder_is_the_same_run(images, tmp_path):
    """--resume_checkpoint counts steps, learning rate and file names from where that run was."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(images, first, 5, save_interval=2, lr_anneal_steps=6)
    run(images, second, 5, lr_anneal_steps=6, resume_checkpoint=str(first / "model000002.pt"))
    assert digest(second, 5) == digest(first, 5)
    assert [path.name for path in second.glob("checkpoint_*")] == ["checkpoint_000005.json"]
    rows = (second / "progress.csv").read_text().splitlines()
    column = rows[0].split(",").index("step")
    assert [row.split(",")[column] for row in rows[1:]] == ["3", "4", "5"]


@pytest.mark.parametrize("name", ["model", "ema_0.5"])
def test_a_fresh_optimizer_is_never_silent(images, tmp_path, name):
    """Weights alone, or an average, begin a new run, and the log says so."""
    run(images, tmp_path / "first", 2)
    path = tmp_path / "first" / file_names.file_name(name, 2)
    if name == "model":
        (tmp_path / "first" / "checkpoint_000002.json").unlink()
    with logger.scoped_configure(str(tmp_path / "second"), format_strs=["log"]):
        said = tmp_path / "second" / "log.txt"
        second = TrainLoop(
            model=network(), diffusion=KarrasDenoiser(loss_norm="l2"), data=iter(()), batch_size=BATCH, lr=1e-3,
            ema_rate="0.5", log_interval=1, save_interval=1, resume_checkpoint=str(path),
        )
    assert second.step == 0 and not second.opt.state
    message = f"starting at step 0 from the weights of {path}, with a new optimizer and new averages"
    assert message in said.read_text()


@pytest.mark.parametrize("name", ["opt", "ema_0.9"])
def test_a_checkpoint_without_one_of_its_files_is_refused(images, tmp_path, name):
    run(images, tmp_path / "first", 2)
    (tmp_path / "first" / file_names.file_name(name, 2)).unlink()
    with pytest.raises(OSError, match=file_names.file_name(name, 2)):
        loop(images, tmp_path / "second", 4, resume_checkpoint=str(tmp_path / "first" / "model000002.pt"))


def test_an_average_that_was_never_made_is_named(images, tmp_path):
    run(images, tmp_path, 1, ema_rate="0.5")
    with pytest.raises(UserError, match="no 'ema_0.9': .*--ema_rate.*start a new run.*another --log_dir"):
        loop(images, tmp_path, 2, ema_rate="0.5,0.9")


@pytest.mark.parametrize("schedule_sampler", ["lognormal", "uniform"])
def test_the_log_has_all_its_columns_from_the_first_row_on(images, tmp_path, schedule_sampler):
    """Four quarters of the noise range, none of them named after noise levels that happened to be drawn."""
    training = loop(images, tmp_path, 3, log_interval=1, data=stream(0, images),
                    schedule_sampler=create_named_schedule_sampler(schedule_sampler, KarrasDenoiser(loss_norm="l2")))
    headers = []
    for _ in range(3):
        training.total_training_steps = training.step + 1
        training.run_loop()
        headers.append((tmp_path / "progress.csv").read_text().splitlines()[0].split(","))
    assert headers[0] == headers[1] == headers[2]
    quarters = [name for name in headers[0] if name.startswith("loss_q")]
    assert sorted(quarters) == ["loss_q0", "loss_q1", "loss_q2", "loss_q3"]


def test_every_save_has_a_row(images, tmp_path):
    run(images, tmp_path, 5, save_interval=2, log_interval=1000)
    names, *rows = [line.split(",") for line in (tmp_path / "progress.csv").read_text().splitlines()]
    assert [float(row[names.index("step")]) for row in rows] == [2, 4, 5]


def test_a_target_starts_from_the_weights_the_student_starts_from(images, tmp_path):
    run(images, tmp_path / "first", 2)
    second = loop(images, tmp_path / "second", 2, mode="consistency_training",
                  resume_checkpoint=str(tmp_path / "first" / "ema_0.5_000002.pt"))
    for a, b in zip(second.trainer.master_params, second.target_model.parameters()):
        assert th.equal(a, b)


def test_resume_never_refuses_a_used_directory(images, tmp_path):
    run(images, tmp_path, 1)
    with pytest.raises(UserError, match="already holds a checkpoint of step 1.*--resume auto"):
        loop(images, tmp_path, 2, resume="never")


def test_a_checkpoint_of_another_network_is_named(images, tmp_path):
    run(images, tmp_path, 1)
    wide = create_model(8, 64, 1, "1", class_cond=True, num_classes=3, attention_resolutions="8", num_head_channels=32)
    with pytest.raises(UserError, match="model000001.pt does not fit this network: .*of another shape"):
        loop(images, tmp_path, 2, model=wide)

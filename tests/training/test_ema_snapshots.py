"""Power-function averages of a real run against averages written out; their snapshots, and what is made of them."""

import numpy as np
import pytest
import torch as th

from cm.checkpoints import file_names, manifest
from cm.errors import UserError
from cm.logging import logger
from cm.objectives.curricula import ema_and_scales
from cm.training.ema_snapshots import FOLDER, Combination, EmaSnapshots, combine, find_snapshots
from cm.training.loop import as_batch
from cm.training.power_ema import Profile, gamma_of, mix
from support.training import BATCH, digest, loop, run

RATES = "power0.05,power0.1"


def flat(params):
    return th.cat([param.detach().double().flatten() for param in params])


def written_out(weights, std):
    """The average over steps, counted from the first of them."""
    average, gamma = None, gamma_of(std)
    for step, each in enumerate(weights, 1):
        beta = (1 - 1 / step) ** (gamma + 1)
        average = each if average is None else beta * average + (1 - beta) * each
    return average


def steps_of(training, count):
    """The weights after each of some steps of a run."""
    for _ in range(count):
        training.run_step(as_batch(next(training.data), training.step, 0, 1))
        yield flat(training.trainer.master_params)


def test_the_loop_averages_by_power_functions_and_resumes_them_to_the_last_bit(images, tmp_path):
    training = loop(images, tmp_path / "a", 6, ema_rate=f"{RATES},0.5")
    weights = list(steps_of(training, 6))
    for ours, std in zip(training.ema_params, (0.05, 0.1)):
        th.testing.assert_close(flat(ours), written_out(weights, std), rtol=0, atol=1e-6)
    logger.reset()
    run(images, tmp_path / "whole", 6, ema_rate=RATES)
    for steps in (2, 6):
        run(images, tmp_path / "parts", steps, ema_rate=RATES)
    assert digest(tmp_path / "whole", 6) == digest(tmp_path / "parts", 6)
    assert {"ema_power0.05", "ema_power0.1"} < {*manifest.newest(str(tmp_path / "whole")).names()}


def test_a_step_that_is_skipped_counts_for_power_functions_alone(images, tmp_path):
    """Its images have been seen with the weights of before."""
    training = loop(images, tmp_path, 6, ema_rate="power0.25,0.5")
    first, second = steps_of(training, 2)
    before = [flat(params) for params in training.ema_params]
    training.update_averages(moved=False)
    after = [flat(params) for params in training.ema_params]
    th.testing.assert_close(after[0], written_out([first, second, second], 0.25), rtol=0, atol=1e-6)
    assert th.equal(after[1], before[1])


def test_a_stage_of_progressive_distillation_begins_its_averages_anew(images, tmp_path):
    """Two steps a stage; stopped just after a stage's end, it resumes with the images since then."""
    options = {"mode": "progdist", "curriculum": ema_and_scales("fixed", 0.0, "progdist", 8, 8, 12, 2)}
    training = loop(images, tmp_path / "a", 6, ema_rate="power0.1", **options)
    stages = list(steps_of(training, 4))
    assert flat(training.ema_params[0]).equal(stages[3]), "the second stage has just ended"
    third = list(steps_of(training, 2))
    th.testing.assert_close(flat(training.ema_params[0]), written_out(third, 0.1), rtol=0, atol=1e-6)
    logger.reset()
    run(images, tmp_path / "whole", 6, ema_rate="power0.1", **options)
    for steps in (4, 5, 6):
        run(images, tmp_path / "parts", steps, ema_rate="power0.1", **options)
    assert digest(tmp_path / "whole", 6) == digest(tmp_path / "parts", 6)
    with pytest.raises(UserError, match="is a run of --training_mode progdist, which restarts its averages"):
        manifest.save(str(tmp_path), 1, {"ema_power0.1": {}}, {"training_mode": "progdist"}, 8)
        find_snapshots(str(tmp_path))


# --- snapshots -------------------------------------------------------------------------------------------------------


def test_snapshots_stay_where_checkpoints_are_pruned(images, tmp_path):
    run(images, tmp_path, 7, ema_rate=RATES, save_interval=2, keep_checkpoints=1, callbacks=[EmaSnapshots(3)])
    assert file_names.steps(str(tmp_path)) == [7] and file_names.steps(str(tmp_path / FOLDER)) == [3, 6, 7]
    found = find_snapshots(str(tmp_path))
    assert [(each.checkpoint.step, each.std) for each in found] == [
        (step, std) for step in (3, 6, 7) for std in (0.05, 0.1)
    ]
    assert found[0].profile == Profile(3 * BATCH, gamma_of(0.05)) and found[0].checkpoint.problem() is None
    assert not found[0].checkpoint.can_resume()
    run(images, tmp_path, 8, ema_rate=RATES)                # the run itself resumes from its checkpoint
    assert file_names.steps(str(tmp_path)) == [7, 8]


def test_a_run_that_goes_back_sets_later_snapshots_aside(images, tmp_path):
    run(images, tmp_path, 6, ema_rate=RATES, save_interval=2, callbacks=[EmaSnapshots(1)])
    manifest_4 = tmp_path / "checkpoint_000004.json"
    run(images, tmp_path, 5, ema_rate=RATES, resume=str(manifest_4), callbacks=[EmaSnapshots(3)])
    assert file_names.steps(str(tmp_path / FOLDER)) == [1, 2, 3, 4, 5]
    assert (tmp_path / FOLDER / "checkpoint_000006.json.aside").exists()


def test_a_snapshot_that_cannot_be_written(images, tmp_path):
    (tmp_path / FOLDER).write_text("in the way")
    with pytest.raises(UserError, match="checkpoint of step 2"):
        run(images, tmp_path, 3, ema_rate=RATES, callbacks=[EmaSnapshots(2)])
    run(images, tmp_path, 3, ema_rate=RATES, on_save_error="continue", callbacks=[EmaSnapshots(2)])
    assert (tmp_path / "checkpoint_000003.json").exists()


def test_any_width_of_a_run_is_made_from_its_snapshots(images, tmp_path):
    """Against the average over all steps, which the snapshots give to their own measure of error."""
    training, snapshot = loop(images, tmp_path, 20, ema_rate=RATES), EmaSnapshots(1)
    weights = []
    for each in steps_of(training, 20):
        weights.append(each)
        snapshot.after_step(training)
    snapshots = find_snapshots(str(tmp_path))
    assert len(snapshots) == 40
    names = [name for name, _ in training.model.named_parameters()]
    spread = (weights[-1] - flat(training.ema_params[1])).norm()
    for std in (0.05, 0.07, 0.15):
        made = mix([each.profile for each in snapshots], Profile.of(20 * BATCH, std))
        combined = combine(snapshots, made.coefficients, ())
        assert all(value.dtype == th.float32 for value in combined.values())
        error = (flat(combined[name] for name in names) - written_out(weights, std)).norm()
        print(std, (error / spread).item())
        assert error < 0.005 * spread, std                  # steps are coarse for integrals


def test_buffers_are_copied_and_parameters_are_summed_in_float64():
    total = Combination({"table"})
    for coefficient, value in ((1e8, 1.0), (-1e8 + 1, 1.0)):
        total.add(coefficient, {"weight": th.tensor([value]), "table": th.tensor([7 + value])})
    assert total.weights()["weight"].tolist() == [1] and total.weights()["table"].tolist() == [8]
    assert np.float32(1e8) + np.float32(-1e8 + 1) != 1, "float32 would not do"


def test_snapshots_that_are_missing_or_damaged(images, tmp_path):
    with pytest.raises(UserError, match="has no power-function averages: train with --ema_rate power0.05,power0.10"):
        find_snapshots(str(tmp_path))
    run(images, tmp_path, 2, ema_rate=RATES, callbacks=[EmaSnapshots(1)])
    snapshots = find_snapshots(str(tmp_path))
    path = tmp_path / FOLDER / "ema_power0.05_000001.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="ema_power0.05_000001.pt is damaged"):
        combine(snapshots, [1.0] * 4, ())
    path.unlink()
    with pytest.raises(UserError, match="ema_power0.05_000001.pt, which checkpoint_000001.json lists, is missing"):
        combine(snapshots, [1.0] * 4, ())

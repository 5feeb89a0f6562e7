"""What is measured of a machine: memory as --dry_run estimates it, times of real steps, and no longer than asked."""

import gc
import weakref

import pytest

from cm.logging import logger
from cm.quickstart import measure
from cm.quickstart.look import Findings
from cm.quickstart.plan import Wish

DIGITS = Findings("digits", 1797, 1797, (8, 8, 8), 8, True, dict.fromkeys("0123456789", 180))


@pytest.fixture(autouse=True)
def log(tmp_path):
    logger.configure(str(tmp_path), [])
    yield
    logger.reset()


def test_a_network_and_its_speed(monkeypatch):
    monkeypatch.setattr(measure, "STEPS", 1)
    machine = measure.measure(DIGITS, Wish(hours=1.0), 1e-3)
    speed, = machine.speeds
    assert (machine.device, machine.ranks, speed.name, speed.image_size) == ("cpu", 1, "tiny", 8)
    assert speed.held >= 5 * 4 * speed.parameters           # with gradients, two moments and an average
    assert [batch for batch, _ in speed.steps] == [32], "the time was over"
    assert speed.steps[0][1] > 0 and 0 < speed.forward < speed.steps[0][1]
    assert machine.free and machine.free > 2**20


def test_one_network_is_there_at_a_time(monkeypatch):
    """A loop is a cycle of references, and the collector has no reason to run beside a GPU's memory."""
    models, make = [], measure.make_loop

    def noting(*args):
        assert not any(model() for model in models), "the one before is still there"
        loop, data = make(*args)
        models.append(weakref.ref(loop.model))
        return loop, data

    monkeypatch.setattr(measure, "make_loop", noting)
    monkeypatch.setattr(measure, "STEPS", 1)
    flags = {"data_dir": "digits", "image_size": 8, "num_channels": 32, "channel_mult": "1", "num_res_blocks": 1,
             "attention_resolutions": "8", "global_batch_size": 2, "total_training_steps": 9, "training_mode": "edm"}
    gc.disable()
    try:
        for _ in range(2):
            measure.timed(dict(flags), 0.0)
    finally:
        gc.enable()
    assert len(models) == 2


def test_memory_counts_the_companions_of_distillation():
    flags = {"image_size": 8, "num_channels": 32, "channel_mult": "1", "num_res_blocks": 1, "training_mode": "edm",
             "global_batch_size": 32, "attention_resolutions": "8", "ema_rate": "0.9"}
    teacher, per_image, parameters = measure.memory(flags, {})
    student, *_ = measure.memory(flags, {"training_mode": "consistency_distillation"})
    assert student == teacher + 2 * 4 * parameters          # the teacher and the target
    assert per_image > 4 * 32 * 64


def test_a_network_that_does_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(measure, "free_of_a_rank", lambda: 1)
    monkeypatch.setattr(measure, "timed", lambda *_: pytest.fail("it was started"))
    machine = measure.measure(DIGITS, Wish(hours=1.0), 10)
    assert [speed.name for speed in machine.speeds] == ["tiny"] and machine.free == 1

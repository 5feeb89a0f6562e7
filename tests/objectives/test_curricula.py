"""N(step) and the target's decay against golden tables and the papers' own numbers, and combinations that are none."""

import json
import math
from functools import cache
from pathlib import Path

import pytest

from cm.config.objective_schema import ConsistencyConfig
from cm.objectives.base import last_step
from cm.objectives.consistency import ConsistencyTraining
from cm.objectives.curricula import EMA_MODES, SCALE_MODES, ema_and_scales
from cm.objectives.ect import ECT
from cm.objectives.flow_map import AlphaFlow
from cm.objectives.ict import ICT
from support.gaussian import stored
from support.objectives import objective_of


@cache
def tables() -> dict:
    return json.loads((Path(__file__).parents[1] / "data" / "ema_scales.json").read_text())


CASES = tables()["cases"]
VALID = dict(
    target_ema_mode="fixed", start_ema=0.95, scale_mode="fixed", start_scales=2, end_scales=40, total_steps=100,
    distill_steps_per_iter=10,
)


@pytest.mark.parametrize("name", CASES)
def test_golden_tables(name):
    """N exactly; the decay rate to the last bit but one, because exp of two libraries may differ in the last."""
    case = CASES[name]
    curriculum = ema_and_scales(**case["args"])
    clamped = case["args"]["scale_mode"] == "progressive"
    checked = 0
    for step, target_ema, num_scales in case["values"]:
        if clamped and step > case["args"]["total_steps"]:
            continue
        ema, n = curriculum(step)
        assert (n, type(n)) == (num_scales, int), step
        assert ema == pytest.approx(target_ema, rel=3e-16, abs=0), step
        checked += 1
    assert checked > 35


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["args"]["scale_mode"] == "progressive"])
def test_n_stays_after_the_last_step(name):
    args = CASES[name]["args"]
    curriculum = ema_and_scales(**args)
    assert curriculum(args["total_steps"])[1] == args["end_scales"] + 1
    assert curriculum(10 * args["total_steps"]) == curriculum(args["total_steps"])


def test_paper_schedule():
    total = stored("sch_ct_K").item()
    curriculum = ema_and_scales("adaptive", 0.9, "progressive", 2, 150, total, 1)
    for k, n, mu in zip(*(stored(f"sch_ct_{name}").tolist() for name in ("k", "N", "mu_code"))):
        assert curriculum(k)[1] == n
        assert curriculum(k)[0] == pytest.approx(mu, rel=1e-14)


def test_step_zero_stands_alone():
    curriculum = ema_and_scales("adaptive", 0.95, "progressive", 2, 200, 800_000, 1)
    assert [curriculum(step)[1] for step in range(3)] == [2, 3, 3]


def test_halvings_of_a_whole_run():
    """8, 4 for one stage each; 2 for two; then 1."""
    curriculum = ema_and_scales(**{**VALID, "scale_mode": "progdist", "start_scales": 8})
    assert [curriculum(step)[1] for step in range(0, 60, 10)] == [8, 4, 2, 2, 1, 1]
    assert [curriculum(step)[1] for step in (9, 10, 19, 20, 39, 40)] == [8, 4, 4, 2, 2, 1]
    assert curriculum(0)[0] == 1.0


@pytest.mark.parametrize("combination, verdict", tables()["mode_combinations"].items())
def test_combinations_of_modes(combination, verdict):
    ema_mode, scale_mode = combination.split("/")
    changes = {**VALID, "target_ema_mode": ema_mode, "scale_mode": scale_mode}
    if verdict == "ok":
        ema_and_scales(**changes)
    else:
        with pytest.raises(ValueError, match=f"'adaptive' does not go with scale_mode '{scale_mode}'"):
            ema_and_scales(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scale_mode": "halving"}, "unknown scale_mode 'halving'; choose one of: fixed, progressive, progdist"),
        ({"target_ema_mode": "adaptiv"}, "unknown target_ema_mode 'adaptiv'.*Did you mean 'adaptive'"),
        ({"start_ema": 1.5}, "decay rate in \\[0, 1\\], got 1.5"),
        ({"start_ema": math.nan}, "decay rate in \\[0, 1\\], got nan"),
        (
            {"target_ema_mode": "adaptive", "scale_mode": "progressive", "start_ema": 0.0},
            "needs a start_ema above 0, got 0.0; the paper uses 0.9 and 0.95",
        ),
        ({"start_scales": 0}, "start_scales must be at least 1, got 0"),
        ({"scale_mode": "progressive", "end_scales": 1}, "end_scales must be at least start_scales=2, got 1"),
        ({"scale_mode": "progressive", "total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"scale_mode": "progdist", "distill_steps_per_iter": 0}, "distill_steps_per_iter must be at least 1, got 0"),
    ],
)
def test_errors_come_at_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        ema_and_scales(**{**VALID, **changes})


def test_where_training_ends():
    assert [last_step(*case) for case in [(5, 0), (0, 7), (0, 0), (15, 5), (5, 15)]] == [5, 7, 600_000, 5, 5]


SHORT, LONG = ("--lr_anneal_steps", "4000"), ("--total_training_steps", "0")


@pytest.mark.parametrize("kind, name, argv, shares, expected", [
    (ECT, "ect", SHORT, (0, 0.5, 1), [{"stage": 0}, {"stage": 4}, {"stage": 7}]),
    (ECT, "ect", LONG, (0, 0.5, 1), [{"stage": 0}, {"stage": 4}, {"stage": 7}]),
    (ICT, "ict", SHORT, (0, 0.5, 1), [{"num_scales": 11}, {"num_scales": 161}, {"num_scales": 1281}]),
    (ICT, "ict", LONG, (0, 0.5, 1), [{"num_scales": 11}, {"num_scales": 161}, {"num_scales": 1281}]),
    (AlphaFlow, "alphaflow", SHORT, (0.5, 1), [{"alpha": 0.5}, {"alpha": 0.005}]),
    (AlphaFlow, "alphaflow", LONG, (0.5, 1), [{"alpha": 0.5}, {"alpha": 0.005}]),
    (ConsistencyTraining, "consistency_training",
     (*SHORT, "--scale_mode", "progressive", "--start_scales", "2", "--end_scales", "150", "--loss_norm", "l2"),
     (0, 1), [{"target_ema": 0, "num_scales": 2}, {"target_ema": 0, "num_scales": 151}]),
])
def test_a_schedule_fits_into_the_steps_that_the_run_takes(kind, name, argv, shares, expected):
    """It ends with the learning rate, or with the endless run that no length stands for."""
    objective, values = objective_of(kind, "--training_mode", name, *argv)
    end = 4000 if argv is not LONG else 600_000
    assert last_step(values["total_training_steps"], values["lr_anneal_steps"]) == end
    assert [objective.logs(int(share * end)) for share in shares] == expected


def test_the_flags_offer_the_tables():
    fields = ConsistencyConfig.__dataclass_fields__
    assert fields["scale_mode"].metadata["choices"] == tuple(SCALE_MODES)
    assert fields["target_ema_mode"].metadata["choices"] == tuple(EMA_MODES)

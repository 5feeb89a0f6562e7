"""Who takes part in `compare_methods.py`: data sets, trainings, samplers.

All trainings of a data set have one network and see as many images. All samplers of diffusion models get about as many
evaluations of the network as Heun's 18 steps, 35.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Flags = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Stage:
    """A data set, the network and the length of a training."""

    network: Flags
    training: Flags                                         # batch, rates; what all trainings share
    steps: int


@dataclass(frozen=True)
class Training:
    """A method; `teacher` names the training whose result it starts from."""

    script: str
    flags: Flags
    samplers: tuple[str, ...]
    teacher: str | None = None


@dataclass(frozen=True)
class Way:
    """A sampler and its options."""

    name: str
    flags: Flags = field(default_factory=dict)


STAGES = {
    "digits": Stage(
        {"image_size": 8, "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1,
         "attention_resolutions": "4", "num_head_channels": 32},
        {"global_batch_size": 64, "random_flip": "False", "ema_rate": "0.98", "lr": 2e-3, "class_cond": "True"}, 200,
    ),
    "images": Stage(
        {"image_size": 16, "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1,
         "attention_resolutions": "8", "num_head_channels": 32},
        {"global_batch_size": 32, "random_flip": "True", "ema_rate": "0.98", "lr": 1e-3, "class_cond": "True"}, 200,
    ),
    "images32": Stage(
        {"image_size": 32, "num_channels": 32, "channel_mult": "1,2,2", "num_res_blocks": 1,
         "attention_resolutions": "8", "num_head_channels": 32},
        {"global_batch_size": 64, "random_flip": "True", "ema_rate": "0.995", "lr": 1e-3, "class_cond": "True"}, 1500,
    ),
}

WAYS = {
    "Heun 18": Way("heun", {"steps": 18}),
    "Heun 18, churn 10": Way("heun", {"steps": 18, "s_churn": 10}),
    "Euler 35": Way("euler", {"steps": 35}),
    "midpoint 18": Way("dpm", {"steps": 18}),
    "ancestral 35": Way("ancestral", {"steps": 35}),
    "DDIM 35": Way("ddim", {"steps": 35}),
    "DDPM 35": Way("ddim", {"steps": 35, "eta": 1}),
    "predictor-corrector 18": Way("pc", {"steps": 18}),
    "Euler-Maruyama 35": Way("sde", {"steps": 35}),
    "Ito 12": Way("ito", {"steps": 12}),
    "one step": Way("onestep", {}),
    "two steps": Way("multistep", {"steps": 18, "ts": "0,8,17"}),
    "flow map, one step": Way("flowmap", {"steps": 1}),
    "flow map, two steps": Way("flowmap", {"steps": 2}),
}
DIFFUSION = tuple(name for name, way in WAYS.items() if way.name not in ("onestep", "multistep", "flowmap"))
CONSISTENCY = ("one step", "two steps")
FLOW_MAP = ("flow map, one step", "flow map, two steps")

DISTIL = {
    "training_mode": "consistency_distillation", "teacher_dropout": 0, "target_ema_mode": "fixed", "start_ema": 0.9,
    "scale_mode": "fixed", "start_scales": 18, "end_scales": 18, "loss_norm": "l2", "weight_schedule": "uniform",
}
ALONE = {
    "training_mode": "consistency_training", "target_ema_mode": "fixed", "start_ema": 0.0,
    "scale_mode": "progressive", "start_scales": 4, "end_scales": 12, "loss_norm": "pseudo-huber",
    "weight_schedule": "uniform",
}
SLOW = {"time_scale": 1}
"""The clock of EDM's networks, which methods need that compare neighbouring noise levels: docs/few-step.md."""
TRAININGS = {
    "EDM": Training("edm_train.py", {}, DIFFUSION),
    "CDM": Training("edm_train.py", {"objective": "cdm"}, DIFFUSION),
    "STF": Training("edm_train.py", {"objective": "stf", "num_references": 1024}, DIFFUSION),
    "SA-DPM": Training("edm_train.py", {"objective": "sadpm"}, DIFFUSION),
    "CD of EDM": Training("cm_train.py", DISTIL, CONSISTENCY, teacher="EDM"),
    "CD of STF": Training("cm_train.py", DISTIL, CONSISTENCY, teacher="STF"),
    "CD of slow clock": Training("cm_train.py", DISTIL, CONSISTENCY, teacher="EDM, slow clock"),
    "CT": Training("cm_train.py", ALONE, CONSISTENCY),
    "EDM, slow clock": Training("edm_train.py", SLOW, ("Heun 18", "ancestral 35")),
    "ECT of EDM": Training(
        "cm_train.py", {"training_mode": "ect", "stages": 4}, CONSISTENCY, teacher="EDM, slow clock",
    ),
    "sCD of EDM": Training(
        "cm_train.py", {"training_mode": "scd", "teacher_dropout": 0, "tangent_warmup": 50}, CONSISTENCY,
        teacher="EDM, slow clock",
    ),
    "alpha-Flow of EDM": Training(
        "cm_train.py",                                      # whose gradient falls with alpha in some dozens of steps
        {"training_mode": "alphaflow", "pair_path": "teacher", "teacher_dropout": 0, "adam_beta2": 0.95}, FLOW_MAP,
        teacher="EDM, slow clock",
    ),
    "MeanFlow": Training("cm_train.py", {"training_mode": "meanflow", **SLOW}, FLOW_MAP),
    "iCT": Training("cm_train.py", {"training_mode": "ict", **SLOW, "start_scales": 4, "end_scales": 32}, CONSISTENCY),
    "sCT": Training("cm_train.py", {"training_mode": "sct", **SLOW, "tangent_warmup": 50}, CONSISTENCY),
}

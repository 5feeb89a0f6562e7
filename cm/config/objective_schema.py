"""The names of the training methods and their flags; a new method adds its own here."""

from __future__ import annotations

from dataclasses import dataclass

from cm.config.flags import option

OBJECTIVE_NAMES = ("edm", "cdm", "stf", "sadpm", "uncertainty")
TRAINING_MODES = ("edm", "consistency_distillation", "consistency_training", "progdist", "ict", "ect", "scd", "sct",
                  "meanflow", "alphaflow")


@dataclass(frozen=True)
class ObjectiveConfig:
    """objective"""

    objective: str = option("edm", "training loss", choices=OBJECTIVE_NAMES, table="objective")
    noise_mean: float = option(-0.4, "uncertainty: mean of ln sigma")
    noise_std: float = option(1.0, "uncertainty: standard deviation of ln sigma", minimum=1e-6)
    martingale_lambda: float = option(10.0, "cdm: weight of the martingale regulariser", minimum=0)
    martingale_steps: int = option(6, "cdm: noise levels of a backward walk, including both ends", minimum=2)
    martingale_sde: str = option(
        "t", "cdm: variable in which the walk takes its steps: the noise level t, or u = t^2, which has less bias",
        choices=("t", "u"),
    )
    num_references: int = option(
        4096, "stf: number of reference images, including the batch of the step", minimum=1, aliases=("rbatch",)
    )
    augment_references: bool = option(
        True, "stf with augment: the reference images are augmented as the batch is, and all of them count, as in the "
        "published code; False: they are not augmented, and an augmented image has no references but itself"
    )
    num_consecutive_steps: int = option(
        2, "sadpm: number of neighbouring noise levels whose errors are summed; 0, with sa_lambda 0: DDPM's loss",
        minimum=0,
    )
    sa_lambda: float = option(0.2, "sadpm: weight of the squared sum of errors", minimum=0, aliases=("lamda",))


@dataclass(frozen=True)
class ConsistencyConfig:
    """consistency models"""

    training_mode: str = option(
        "consistency_distillation", "training method; edm: a diffusion model, by the method that objective names",
        choices=TRAINING_MODES, table="training_mode",
    )
    teacher_model_path: str = option("", "diffusion checkpoint to distil and to initialise the student from")
    teacher_dropout: float = option(0.1, "dropout probability of the teacher", minimum=0, below=1)
    teacher_solver: str = option(
        "heun", "consistency distillation: solver of the teacher's step; euler takes one evaluation of the teacher "
        "instead of two and needs more noise levels", choices=("heun", "euler"),
    )
    teacher_guide_scale: float = option(
        1.0, "strength w of the guidance that is distilled into the student, see guide_scale; 1: none", minimum=0
    )
    teacher_guide_path: str = option(
        "", "worse diffusion checkpoint that guides the teacher; empty: the teacher itself, without its class"
    )
    teacher_guide_interval: str = option(
        "", "noise levels lo,hi at which the teacher is guided: lo < sigma <= hi; empty: all"
    )
    loss_norm: str = option(
        "lpips", "distance between the denoised images in the loss",
        choices=("l1", "l2", "l2-32", "lpips", "pseudo-huber"),
    )
    target_ema_mode: str = option("fixed", "schedule of the target's EMA decay rate", choices=("fixed", "adaptive"))
    scale_mode: str = option(
        "fixed", "schedule of the number of noise levels N(step)",
        choices=("fixed", "progressive", "progdist", "doubling"),
    )
    start_ema: float = option(
        0.0, "EMA decay rate of the target; with target_ema_mode adaptive, at the start", minimum=0, maximum=1
    )
    start_scales: int = option(40, "number of noise levels N at the start", minimum=1)
    end_scales: int = option(40, "number of noise levels N at the end", minimum=1)
    distill_steps_per_iter: int = option(50000, "training steps per halving in progressive distillation", minimum=1)


@dataclass(frozen=True)
class FewStepConfig:
    """consistency losses; see docs/few-step.md"""

    pairs: str = option(
        "", "how the two noise levels of a consistency loss are drawn; empty: as training_mode does",
        choices=("", "grid", "lognormal-grid", "shrinking"),
    )
    pair_path: str = option(
        "", "from the noisier to the cleaner image along the teacher's ODE, or with the same noise; empty: as "
        "training_mode does", choices=("", "teacher", "noise"),
    )
    pair_weight: str = option(
        "", "weight of a pair of levels: weight_schedule's of the noisier level, or that over their gap; empty: as "
        "training_mode does", choices=("", "level", "gap"),
    )
    pair_target: str = option(
        "", "weights of the network that makes the target: a moving average, or the online ones; empty: as "
        "training_mode does", choices=("", "ema", "online"),
    )
    huber_c: float = option(0.0, "loss_norm pseudo-huber: its c; 0: 0.00054 sqrt(CHW); ect: 1e-8", minimum=0)
    p_mean: float = option(-1.1, "mean of ln sigma")
    p_std: float = option(2.0, "standard deviation of ln sigma", minimum=0)
    shrink_q: float = option(2.0, "pairs shrinking: factor by which 1 - r/t falls from stage to stage", minimum=0)
    shrink_k: float = option(8.0, "pairs shrinking: k of n(t) = 1 + k sigmoid(-b t)", minimum=0)
    shrink_b: float = option(1.0, "pairs shrinking: b of n(t)", minimum=0)
    tangent_c: float = option(0.1, "scd, sct: number added to the size by which the tangent is divided", minimum=0)
    tangent_norm: str = option(
        "rms", "scd, sct: size of a sample's tangent: root mean square, or root of the sum of squares",
        choices=("rms", "norm"),
    )
    tangent_warmup: int = option(
        10000, "scd, sct: steps over which the network's own part of the tangent grows from 0", minimum=0
    )
    bin_weights: bool = option(
        False, "scd, sct: divide the loss by its running mean at the noise level, over all ranks"
    )
    r_mean: float = option(-4.0, "flow maps: mean of ln sigma where a step ends")
    r_std: float = option(1.6, "flow maps: standard deviation of ln sigma where a step ends", minimum=0)
    equal_share: float = option(
        0.25, "flow maps: share of the samples whose step ends where it starts", minimum=0, maximum=1
    )
    adapt_p: float = option(0.75, "flow maps: the loss is divided by its own size to this power", minimum=0)
    adapt_e: float = option(1e-3, "flow maps: number added to that size", minimum=0)
    alpha_steps: int = option(
        0, "alphaflow: steps over which alpha falls from 1 along a sigmoid; 0: the whole training", minimum=0
    )
    alpha_end: float = option(
        0.005, "alphaflow: least alpha, the share of a step after which the target is evaluated", minimum=1e-6,
        maximum=1,
    )
    stages: int = option(8, "pairs shrinking: number of stages", minimum=1)
    stage_steps: int = option(
        0, "steps of a stage, for pairs shrinking and scale_mode doubling; 0: stages of equal length fill the training",
        minimum=0,
    )
    stage_kimg: float = option(
        0.0, "length of a stage in thousands of images, instead of stage_steps; 0: use steps", minimum=0
    )

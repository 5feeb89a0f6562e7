"""Training methods, by the names that --objective and --training_mode give them."""

from cm.objectives.base import Objective
from cm.objectives.cdm import CDM
from cm.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from cm.objectives.ect import ECT
from cm.objectives.edm import EDM
from cm.objectives.flow_map import AlphaFlow, MeanFlow
from cm.objectives.ict import ICT
from cm.objectives.progdist import ProgressiveDistillation
from cm.objectives.sadpm import SADPM
from cm.objectives.scm import SCD, SCT
from cm.objectives.stf import STF
from cm.objectives.uncertainty import Uncertainty
from cm.registry import Table

__all__ = ["DENOISING", "OBJECTIVES"]

DENOISING: Table[type[Objective]] = Table("objective", {
    "edm": EDM,
    "cdm": CDM,
    "stf": STF,
    "sadpm": SADPM,
    "uncertainty": Uncertainty,
})
"""--objective: the ways to train a diffusion model."""

OBJECTIVES: Table[type[Objective]] = Table("training_mode", {
    "edm": EDM,
    "consistency_distillation": ConsistencyDistillation,
    "consistency_training": ConsistencyTraining,
    "progdist": ProgressiveDistillation,
    "ict": ICT,
    "ect": ECT,
    "scd": SCD,
    "sct": SCT,
    "meanflow": MeanFlow,
    "alphaflow": AlphaFlow,
})
"""--training_mode: what kind of model is trained; "edm" stands for all of `DENOISING`."""

"""Training methods, by the name that --training_mode gives them."""

from cm.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from cm.objectives.edm import EDM
from cm.objectives.progdist import ProgressiveDistillation

__all__ = ["OBJECTIVES"]

OBJECTIVES = {
    "edm": EDM,
    "consistency_distillation": ConsistencyDistillation,
    "consistency_training": ConsistencyTraining,
    "progdist": ProgressiveDistillation,
}

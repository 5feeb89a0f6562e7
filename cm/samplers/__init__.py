"""Samplers: they generate images with a denoiser. Each module has one solver; `integrate` has the loop.

A sampler is a frozen dataclass whose fields are its options, see `cm.samplers.base.Sampler`. To add one, write its
module and add a line to SAMPLERS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cm.registry import Table, lookup
from cm.samplers.ablation import Ablation
from cm.samplers.ancestral import Ancestral
from cm.samplers.base import Sampler
from cm.samplers.ddim import DDIM
from cm.samplers.dpm import DPM
from cm.samplers.euler import Euler
from cm.samplers.euler_maruyama import EulerMaruyama
from cm.samplers.flow_map import FlowMapSampler
from cm.samplers.heun import Heun
from cm.samplers.integrate import Churn, CountingDenoiser, integrate
from cm.samplers.ito_taylor import ItoTaylor
from cm.samplers.multistep import Multistep
from cm.samplers.onestep import OneStep
from cm.samplers.predictor_corrector import PredictorCorrector
from cm.samplers.progdist import ProgDist

__all__ = ["SAMPLERS", "Churn", "CountingDenoiser", "Sampler", "integrate", "make_sampler"]

SAMPLERS: Table[type[Sampler]] = Table("sampler", {
    "heun": Heun,
    "euler": Euler,
    "dpm": DPM,
    "ancestral": Ancestral,
    "onestep": OneStep,
    "multistep": Multistep,
    "progdist": ProgDist,
    "ddim": DDIM,
    "pc": PredictorCorrector,
    "sde": EulerMaruyama,
    "ito": ItoTaylor,
    "ablation": Ablation,
    "flowmap": FlowMapSampler,
})


def make_sampler(name: str, options: Mapping[str, Any]) -> Sampler:
    """The sampler `name`, with the options that it has as fields.

    :param options: the options of all samplers by name, as on a command line.
    :raises UserError: for a name that is not in SAMPLERS; the message lists the choices.
    """
    kind = lookup(SAMPLERS, name, "sampler")
    return kind(**{field.name: options[field.name] for field in fields(kind) if field.name in options})

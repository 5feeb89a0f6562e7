"""Load a pipeline from a path: the network with its weights, and the diffusion around it."""

from __future__ import annotations

import os

import torch as th

from cm.config.flags import resolve
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.pipeline.pipeline import SECTIONS, Pipeline
from cm.setup.model import choose_precision
from cm.setup.sample import inherit_model, load_model, sampling_diffusion


def load_pipeline(
    path: str | os.PathLike[str], *, precision: str = "auto", device: str | th.device | None = None, **flags: object
) -> Pipeline:
    """Load a model in any format that the toolkit reads; `cm.load` describes the arguments.

    :raises UserError: if there is no such file, it is damaged, or a flag of the network is missing.
    """
    dist.setup_dist()
    settings = resolve({"model_path": os.fspath(path), "precision": precision, **flags}, *SECTIONS)
    inherit_model(settings)
    where = dist.dev() if device is None else _device(device)
    model = load_model(settings, where)
    arithmetic = choose_precision(settings.values["precision"], settings.values["use_fp16"], where)
    return Pipeline(model, sampling_diffusion(settings), settings, where, arithmetic)


def _device(device: str | th.device) -> th.device:
    """:raises UserError: if there is no such device here."""
    try:
        found = th.device(device)
        if found.type != "meta":
            th.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:         # the second without CUDA
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"device={str(device)!r} cannot be used: {reason}. Give cpu, cuda or cuda:0, or leave it "
                        "out") from None
    return found

"""Checks that a resumed run keeps the meaning of its weights, and the method that trains them.

Most differences between two networks change the names or shapes of their weights. Some do not: with another number of
attention heads, or another embedding of the time, the same weights load without an error, but are another function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cm.checkpoints.manifest import Checkpoint
from cm.errors import UserError
from cm.objectives import OBJECTIVES

UNSEEN = ("image_size", "num_heads", "num_heads_upsample", "num_head_channels", "precond", "time_scale")
"""Flags that change the function of a network, but not the names and shapes of its weights."""
LEVELS = ("sigma_min", "sigma_max")                         # such flags of networks that make an image in one step
METHOD = ("training_mode", "objective")


def require_same_run(checkpoint: Checkpoint, flags: Mapping[str, Any], resume: str) -> None:
    """Refuse to resume from a checkpoint with flags of another run.

    :param flags: the flags of this run; only flags that the checkpoint has, too, are compared.
    :param resume: "auto", or the path that the user gave; then the method may change to another of the same kind.
    :raises UserError: naming the flags, with both values.
    """
    before = checkpoint.config
    is_few_step = getattr(OBJECTIVES.get(str(before.get("training_mode"))), "few_step", False)
    names = (*UNSEEN, *LEVELS) if is_few_step else UNSEEN
    if changed := [name for name in names if name in before and name in flags and _differs(name, before, flags)]:
        was, now = (" ".join(f"--{name} {values[name]}" for name in changed) for values in (before, flags))
        raise UserError(f"{checkpoint.manifest} was made with {was}, and this run has {now}: with the same weights "
                        f"it would be a different network. Give {was}, or choose another --log_dir for a new run")
    if _kind(before) != _kind(flags) or resume == "auto" and _method(before, flags) != _method(flags, before):
        was, now = (" ".join(f"--{name} {values[name]}" for name in METHOD if name in values)
                    for values in (before, flags))
        other = "" if _kind(before) != _kind(flags) else f"; --resume {checkpoint.manifest} continues anyway"
        raise UserError(f"{checkpoint.directory} holds a run with {was}, and this command has {now}. It would continue "
                        "with the weights of that run and remove its checkpoints one by one: choose another --log_dir. "
                        f"To start there from these weights, give --resume_checkpoint or --teacher_model_path{other}")


def _differs(name: str, before: Mapping[str, Any], flags: Mapping[str, Any]) -> bool:
    if name.startswith("num_head"):
        return before[name] != flags[name] and _heads(before) != _heads(flags)
    if name == "time_scale":
        return _time_scale(before) != _time_scale(flags)
    return before[name] != flags[name]


def _heads(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values that determine the attention heads of a network."""
    width = values.get("num_head_channels", -1)
    if width != -1 or values.get("arch", "unet") != "unet":
        return (width,)
    down, up = values.get("num_heads"), values.get("num_heads_upsample", -1)
    return down, down if up == -1 else up


def _time_scale(values: Mapping[str, Any]) -> float:
    return values["time_scale"] or (1000.0 if values.get("arch", "unet") == "unet" else 1.0)


def _kind(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """The kind of network that a method trains: denoiser, consistency function, flow map or student."""
    kind = OBJECTIVES.get(str(values.get("training_mode")))
    return () if kind is None else (kind.few_step, kind.distillation, kind.second_time, kind.sampler)


def _method(values: Mapping[str, Any], others: Mapping[str, Any]) -> list[Any]:
    """The method, as far as both sides know it; --objective has none to choose but for a diffusion model."""
    mode = values.get("training_mode")
    return [values[name] for name in METHOD if name in values and name in others
            and (name != "objective" or mode == "edm")]

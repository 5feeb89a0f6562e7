"""The arguments of a training loop: plain settings, and the objects of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cm.checkpoints.loading import WeightsFile
from cm.data.class_names import ClassNames
from cm.diffusion.denoiser import Diffusion
from cm.objectives.base import Objective
from cm.samplers.sample import BindsNetworks
from cm.types import Callback

DataSource = Iterator[Any] | Callable[[int], Iterator[Any]]


@dataclass(frozen=True)
class LoopConfig:
    """The plain settings of a loop.

    :param batch_size: images per step on this rank.
    :param lr: learning rate.
    :param ema_rate: decay rates of the weight averages, a number or a comma-separated string; see `ema_rates`.
    :param log_interval, save_interval: steps between two rows of the log, and two checkpoints.
    :param microbatch: images per forward pass; -1 for all at once.
    :param global_batch_size: images per step over all ranks, if the ranks' shares differ; None: `batch_size` on each.
    :param lr_anneal_steps: steps over which the learning rate falls linearly to 0; 0 for never.
    :param lr_rampup_kimg: thousand images over which the learning rate rises from 0.
    :param lr_decay_steps: after so many steps the learning rate falls as 1 / sqrt(step); 0 for never.
    :param total_training_steps: the last step; 0: lr_anneal_steps, or 600000 if that is 0 too.
    :param ema_rampup_ratio: see `EmaRate`.
    :param resume_checkpoint: model file to start from, with its optimizer and averages if they are in the same folder.
    :param resume: "auto" resumes from the newest checkpoint of the run, "never" refuses to; or the path of a
        checkpoint to resume from: a manifest, its folder or one of its files.
    :param allow_other_classes: only warn, if the classes of the checkpoint are not those of the data.
    :param precision: "fp32", "bf16" or "fp16"; None: set by `use_fp16`.
    :param checkpoint_dir: folder or blobfile URL of the checkpoints; empty for the log directory.
    :param keep_checkpoints, milestone_interval, on_save_error: see `CheckpointManager`.
    :param verify_weights: compare the checksums of the files that the run starts from with their manifest.
    :param ema_device: where the averages are kept; see `EMA`.
    :param grad_clip: see `MixedPrecisionTrainer`.
    :param shard_ema, shard_optimizer: divide averages, and the optimizer's state, among the ranks.
    :param parallel: "ddp", "hsdp" or "fsdp"; see `engine`.
    :param shard_size: hsdp: ranks among which a copy of the networks is divided; 0 for those of a machine.
    :param checkpoint_format: "files", or "dcp" for folders into which every rank writes; see `share_writer`.
    :param async_save: dcp: train on while a checkpoint is written.
    :param with_ticks: rows of the log are ticks, with a status line.
    """

    batch_size: int
    lr: float
    ema_rate: str | float
    log_interval: int
    save_interval: int
    microbatch: int = -1
    global_batch_size: int | None = None
    weight_decay: float = 0.0
    optimizer: str = "radam"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    lr_anneal_steps: int = 0
    lr_rampup_kimg: float = 0.0
    lr_decay_steps: int = 0
    total_training_steps: int = 0
    ema_rampup_ratio: float = 0.0
    use_fp16: bool = False
    fp16_scale_growth: float = 1e-3
    precision: str | None = None
    seed: int = 0
    resume_checkpoint: str = ""
    resume: str = "auto"
    allow_other_classes: bool = False
    checkpoint_dir: str = ""
    keep_checkpoints: int | None = 0
    milestone_interval: int = 0
    on_save_error: str = "stop"
    verify_weights: bool = True
    ema_device: str = "same"
    grad_clip: float = 0.0
    shard_ema: bool = False
    shard_optimizer: bool = False
    with_ticks: bool = False
    parallel: str = "ddp"
    shard_size: int = 0
    checkpoint_format: str = "files"
    async_save: bool = False


@dataclass
class CompanionNetwork:
    """A companion of the online network, with the scalings that make it a denoiser."""

    model: nn.Module
    diffusion: BindsNetworks


@dataclass
class RunParts:
    """The objects of a run.

    :param model: the online network, in float32, on its device.
    :param diffusion: the scalings around it.
    :param objective: what to minimise.
    :param data: an iterator of batches (`Batch`, or guided-diffusion's pairs of images and conditioning), or a
        function from the number of samples already consumed by the entire run to such an iterator.
    :param companions: the networks that the objective declares, by name.
    :param callbacks: called after each step; their state is part of a checkpoint.
    :param start: the file `resume_checkpoint`, if it has been read already.
    :param flags: resolved flags, saved with every checkpoint.
    :param class_names: the names of the classes in the data, saved with every checkpoint; empty if they are not known
        or the network is not conditioned on classes.
    """

    model: nn.Module
    diffusion: Diffusion
    objective: Objective
    data: DataSource
    companions: Mapping[str, CompanionNetwork] = field(default_factory=dict)
    callbacks: Sequence[Callback] = ()
    start: WeightsFile | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    class_names: ClassNames = ()

"""The training loop: data in, objective, gradients averaged over ranks, optimizer, averages, checkpoints.

The loop never names an objective: what is minimised, and what happens to target and teacher after a step, is the
objective's own affair. B is the batch over all ranks; a step uses the next B samples of the run, whose positions count
on over restarts, and rank r has those with position r, r + W, r + 2W ... of the step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch as th
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from cm.checkpoints import manifest
from cm.checkpoints.loading import WeightsFile
from cm.checkpoints.manager import CheckpointManager
from cm.distributed import setup as dist
from cm.distributed import signals
from cm.distributed.sharding import partition
from cm.logging import logger
from cm.random_util import SampleStreams, stream_seed
from cm.training import non_finite, state
from cm.training.durations import parse_rates, rampup
from cm.training.ema import EMA
from cm.training.meters import LossMeter
from cm.training.mixed_precision import MasterWeights, MixedPrecisionTrainer
from cm.training.non_finite import NonFiniteError
from cm.training.optimizer import OPTIMIZERS, make_optimizer
from cm.training.throughput import Ticks, status_line
from cm.types import Batch, Callback, LossTerms, Networks, Objective

ENDLESS = 600_000

DataSource = Iterator[Any] | Callable[[int], Iterator[Any]]


__all__ = ["OPTIMIZERS", "NonFiniteError", "TrainLoop", "as_batch", "last_step", "parse_rates"]


class TrainLoop:
    """Train one network.

    :param data: an iterator of batches (`Batch`, or guided-diffusion's pairs of images and conditioning), or a
        function from the number of samples already consumed by the whole run to such an iterator.
    :param batch_size: images per step on this rank.
    :param microbatch: images per forward pass; -1 for all at once.
    :param ema_rate: decay rates of the weight averages, a number or a comma-separated string; see `durations`.
    :param ema_rampup_ratio: of those that are half-lives.
    :param lr_rampup_kimg: thousand images over which the learning rate rises from 0.
    :param with_ticks: rows of the log are ticks, with a status line.
    :param resume_checkpoint: model file to start from, with its optimizer and averages where they lie beside it.
    :param resume: "auto" goes on from the newest checkpoint of the run, "never" refuses to; or the path of a
        checkpoint to go on from: a manifest, its folder or one of its files.
    :param total_training_steps: where training ends; 0 for lr_anneal_steps, or 600000 where that is 0 too.
    :param objective: what to minimise; None for the diffusion's own denoising loss.
    :param config: resolved flags, saved with every checkpoint.
    :param start: the file `resume_checkpoint`, where it has been looked into already.
    :param global_batch_size: B, where the ranks' shares differ; None for `batch_size` on each.
    :param checkpoint_dir: folder or blobfile URL of the checkpoints; empty for the log directory.
    :param keep_checkpoints, milestone_interval, on_save_error: see `Shelf`.
    :param ema_device: where the averages live; see `EMA`.
    :param shard_ema, shard_optimizer: keep averages, and the state of the optimizer, in shares over the ranks.
    :param callbacks: what looks at the run after each step; their state is part of a checkpoint.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: Any,
        data: DataSource,
        batch_size: int,
        microbatch: int = -1,
        lr: float,
        ema_rate: str | float,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str = "",
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: Any = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
        total_training_steps: int = 0,
        optimizer: str = "radam",
        precision: str | None = None,
        seed: int = 0,
        resume: str = "auto",
        objective: Objective | None = None,
        config: Mapping[str, Any] | None = None,
        start: WeightsFile | None = None,
        global_batch_size: int | None = None,
        checkpoint_dir: str = "",
        keep_checkpoints: int = 0,
        milestone_interval: int = 0,
        on_save_error: str = "stop",
        ema_device: str = "same",
        shard_ema: bool = False,
        shard_optimizer: bool = False,
        callbacks: Sequence[Callback] = (),
        lr_rampup_kimg: float = 0.0,
        ema_rampup_ratio: float = 0.0,
        with_ticks: bool = False,
    ):
        self.model, self.diffusion = model, diffusion
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.batch_size = batch_size
        self.global_batch = global_batch_size or batch_size * self.world_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr, self.lr_anneal_steps, self.lr_rampup_kimg = lr, lr_anneal_steps, lr_rampup_kimg
        self.total_training_steps = last_step(total_training_steps, lr_anneal_steps)
        self.log_interval, self.save_interval, self.with_ticks = log_interval, save_interval, with_ticks
        self.seed, self.config = seed, dict(config or {})
        self.checkpoints = CheckpointManager(
            checkpoint_dir or logger.get_dir(), keep_checkpoints, milestone_interval, on_save_error
        )
        self.start = start or WeightsFile(resume_checkpoint)
        self.callbacks = callbacks
        self.device = next(model.parameters()).device

        self.trainer = MixedPrecisionTrainer(
            model=model, use_fp16=use_fp16, fp16_scale_growth=fp16_scale_growth, precision=precision
        )
        masters = self.trainer.master_params
        shares = partition([param.numel() for param in masters], self.rank, self.world_size)
        self.make_optimizer = lambda: make_optimizer(
            optimizer, masters, lr, weight_decay, shares if shard_optimizer else None
        )
        self.opt = self.make_optimizer()
        self.ema_rate = parse_rates(ema_rate, ema_rampup_ratio)
        self.averages = EMA(masters, self.ema_rate, ema_device, shares if shard_ema else None)

        self.moving = self.companions()
        self.objective = objective or diffusion.training_objective(schedule_sampler)
        self.parts: list[tuple[Batch, LossTerms]] = []              # the microbatches of the latest step
        self.step = self.images_seen = 0
        self.seconds_before = 0.0                               # trained before this start
        self.stop_signal = 0                                    # on which all ranks have agreed to stop
        self.resume(resume, resume_checkpoint)
        self.start.weights = None                               # not needed where a newer checkpoint was found
        self.ddp_model = self.distribute(model)
        self.ddp_warmed_up = self.world_size <= 2
        self.nets = self.make_nets()
        self.meter = LossMeter(diffusion.sigma_min, diffusion.sigma_max, dist.all_reduce_sum)
        self.data = data(self.images_seen) if callable(data) else data
        self.close_data = getattr(self.data, "close", None) if callable(data) else None
        self.begun = time.monotonic()

    # --- what the networks are -------------------------------------------------------------------------------------

    def make_nets(self) -> Networks:
        return Networks(
            online=self.diffusion.bind(self.ddp_model),
            online_model=self.model,
            online_params=self.trainer.master_params,
        )

    def companions(self) -> dict[str, MasterWeights]:
        """The other networks that change during training, and so belong into a checkpoint."""
        return {}

    def distribute(self, model: nn.Module) -> nn.Module:
        """Average the gradients of all ranks while the backward pass runs."""
        if self.world_size == 1:
            return model
        shared = DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        # Buffers are constants, the same on every rank from the start. (As an argument, newer torch deprecates it.)
        shared.broadcast_buffers = False
        return shared

    @property
    def ema_params(self) -> list[list[Tensor]]:
        """For each rate the averages that this rank keeps: all, unless they are in shares."""
        return self.averages.local

    # --- the loop --------------------------------------------------------------------------------------------------

    def run_loop(self) -> None:
        """Train until `total_training_steps`, or until a signal asks to stop; the last state is always saved, once."""
        self.clock, self.logged_step = time.monotonic(), self.step
        self.ticks = Ticks(self.step, self.log_interval, self.device, self.seconds_before)
        state.write_status(self)
        bar = tqdm(
            total=self.total_training_steps, initial=self.step, unit="step", desc="training",
            disable=not dist.is_main(), dynamic_ncols=True,
        )
        with bar:
            while self.step < self.total_training_steps and not self.stop_signal:
                self.run_step(as_batch(next(self.data), self.images_seen, self.rank, self.world_size))
                bar.update()
                ends = self.step == self.total_training_steps or bool(self.stop_signal)
                saves = self.step % self.save_interval == 0 or ends
                with self.ticks.maintenance():
                    found = self.run_callbacks()
                # A resumed run cannot log what came before its start, so each save has a row.
                if self.step % self.log_interval == 0 or saves or found:
                    bar.clear()                                 # the table gets lines of its own
                    bar.set_postfix(loss=f"{self.log_row(found)['loss']:.4g}")
                if saves:
                    with self.ticks.maintenance():
                        self.save(ends)
        if self.close_data:
            self.close_data()
        state.write_status(self)
        if self.stop_signal:
            logger.log(f"{signals.name_of(self.stop_signal)}: stopped after step {self.step} of "
                       f"{self.total_training_steps} and saved; the same command goes on from there")

    def run_step(self, batch: Batch) -> None:
        """One optimizer step. Raises NonFiniteError on every rank before a bad update."""
        if not self.ddp_warmed_up:
            self.warm_up(batch)
        self.set_learning_rate()
        th.manual_seed(stream_seed(self.seed, f"dropout of rank {self.rank}", self.step))
        self.trainer.zero_grad()
        self.forward_backward(batch)
        self.report = self.trainer.step(self.opt, self.agree_on_finite_and_stop())
        if self.report.fatal:
            raise self.non_finite_error()
        if self.report.stepped:                                 # a step that overflowed has nothing to teach
            self.update_loss_history()
            self.averages.update([rate.decay(self.images_seen, self.global_batch) for rate in self.ema_rate])
        if self.objective.after_step(self.nets, self.step):
            self.reset_optimizer_and_ema()
        for network in self.moving.values():
            network.master_params_to_model_params()
        self.step += 1
        self.images_seen += self.global_batch

    def forward_backward(self, batch: Batch) -> None:
        """Gradients of the mean loss over the global batch, whatever the microbatch and the number of ranks."""
        self.parts.clear()
        for start in range(0, len(batch), self.microbatch):
            part = batch.rows(start, start + self.microbatch)
            is_last = start + self.microbatch >= len(batch)
            wait = contextlib.nullcontext() if is_last or self.world_size == 1 else self.ddp_model.no_sync()
            with wait:
                terms = self.forward_backward_micro(part)
            self.meter.add(terms)
            self.parts.append((part, LossTerms(terms.loss.detach(), terms.sigma.detach(), {
                name: value.detach() for name, value in terms.logs.items()
            })))

    def forward_backward_micro(self, part: Batch) -> LossTerms:
        """Add the gradient of a microbatch's share of the mean loss."""
        rng = SampleStreams(self.seed, part.positions, stream="train")
        with self.trainer.autocast():
            terms = self.objective(self.nets, part.to(self.device), self.step, rng)
        # The ranks' gradients are averaged: with W ranks a sum over the samples of one counts 1/W.
        self.trainer.backward(terms.loss.sum() / (self.global_batch / self.world_size))
        return terms

    def warm_up(self, batch: Batch) -> None:
        """Two passes that are thrown away: after its first, DDP regroups its messages, and with them the order in
        which three or more ranks add up their gradients. So a resumed run adds in the same order from its first step.
        """
        for _ in range(2):
            self.forward_backward_micro(batch.rows(0, self.microbatch))
            self.trainer.zero_grad()
        self.ddp_warmed_up = True

    def agree_on_finite_and_stop(self) -> bool:
        """Whether every loss on every rank and every gradient is finite; hears of requests to stop, too.

        One message a step between the ranks, and the only time that a step waits for its device.
        """
        losses, gradients = th.stack([non_finite.all_finite(self.parts), self.trainer.grads_finite()]).tolist()
        heard = dist.all_reduce_max(th.tensor([signals.requested(), int(not losses)]))
        self.stop_signal, bad = heard.tolist()
        if self.stop_signal:
            signals.agreed()
        return gradients and not bad                        # the ranks' gradients are averages, so the same

    def update_loss_history(self) -> None:
        """Hand the losses of all ranks to the objective's memory, in the order of the samples."""
        if self.objective.history is None:
            return
        rows = [(part.positions, terms.sigma.cpu(), terms.logs["mse"].cpu()) for part, terms in self.parts]
        mine = [th.cat(column) for column in zip(*rows)]
        positions, sigma, loss = (th.cat(column) for column in zip(*dist.all_gather_object(mine)))
        order = positions.argsort()
        self.objective.history.update_loss_history(sigma[order], loss[order])

    def set_learning_rate(self) -> None:
        done = self.step / self.lr_anneal_steps if self.lr_anneal_steps else 0.0
        for group in self.opt.param_groups:
            group["lr"] = self.lr * max(0.0, 1.0 - done) * rampup(self.images_seen, self.lr_rampup_kimg)

    def reset_optimizer_and_ema(self) -> None:
        """A new stage: a fresh optimizer, averages that start from the present weights."""
        self.opt = self.make_optimizer()
        self.averages.restart()

    def non_finite_error(self) -> NonFiniteError:
        skips = f" after {self.trainer.skipped_steps} steps skipped in fp16" if self.trainer.use_fp16 else ""
        return non_finite.explain(
            self.step, self.parts, skips,
            f"Lower --lr, or look at these images; the newest checkpoint in {self.checkpoints.directory} is good.",
        )

    # --- the log ---------------------------------------------------------------------------------------------------

    def run_callbacks(self) -> dict[str, float]:
        """What they have found after this step, for the log; their time is not the training's."""
        begun, found = time.monotonic(), {}
        with signals.unhurried():                              # a measurement may take longer than any step
            for callback in self.callbacks:
                found |= callback.after_step(self)
        self.clock += time.monotonic() - begun
        return found

    def log_row(self, found: Mapping[str, float]) -> dict[str, float]:
        """Write a row of the log, with what callbacks have found; returns the averages of the losses."""
        means = self.meter.means()
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        images, self.logged_step = (self.step - self.logged_step) * self.global_batch, self.step
        tick = self.ticks.end(self.step, self.global_batch) if self.with_ticks else {}
        logger.logkvs({
            "step": self.step,
            "samples": self.images_seen,
            **means,
            **self.report.logs(),
            **({"skipped_steps": self.trainer.skipped_steps} if self.trainer.use_fp16 else {}),
            "lr": self.opt.param_groups[0]["lr"],
            "images_per_second": images / max(seconds, 1e-9),
            "elapsed_seconds": self.elapsed_seconds(),
            **self.extra_logs(),
            **found,
            **tick,
        })
        logger.dumpkvs()
        if tick:
            logger.log(status_line(tick))
        return means

    def elapsed_seconds(self) -> float:
        """That the run has trained, over all its starts."""
        return self.seconds_before + time.monotonic() - self.begun

    def extra_logs(self) -> dict[str, float]:
        return {}

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, is_last: bool = True) -> None:
        """Write a checkpoint of this step; see `Shelf.save` for what happens if that fails."""
        with signals.unhurried():
            self.checkpoints.save(
                self.step, state.state_dict(self), self.config, self.images_seen, self.elapsed_seconds(), is_last
            )

    def resume(self, resume: str, resume_checkpoint: str) -> None:
        """Go on from the newest checkpoint of the run or the one asked for, else start from `resume_checkpoint`."""
        found = self.checkpoints.find(resume)
        if found:
            state.load_state_dict(self, found)
        elif resume_checkpoint:
            self.start_from(resume_checkpoint)
        logger.drop_after(self.step)                            # rows of steps that are about to be done again

    def start_from(self, path: str) -> None:
        """Weights of a file of another run; optimizer, averages and step where they lie beside it."""
        beside = dist.on_main(manifest.beside, path)
        if beside and manifest.parse_name(path) == ("model", beside.step) and "opt" in beside.names():
            state.load_state_dict(self, beside)
            return
        logger.log(f"starting at step 0 from the weights of {path}; optimizer and averages start afresh")
        self.trainer.load_master_params(state.read_params(self.trainer, self.start.take(), path))
        self.averages.restart()


def last_step(total_training_steps: int, lr_anneal_steps: int) -> int:
    """Where training ends: never after the learning rate has reached 0."""
    total = total_training_steps or lr_anneal_steps or ENDLESS
    return min(total, lr_anneal_steps) if lr_anneal_steps else total


def as_batch(item: Any, images_seen: int, rank: int, world_size: int) -> Batch:
    """A batch with positions, also from guided-diffusion's pairs of images and conditioning."""
    batch = item if isinstance(item, Batch) else Batch(*item)
    if batch.positions is None:
        batch.positions = images_seen + rank + world_size * th.arange(len(batch))
    return batch

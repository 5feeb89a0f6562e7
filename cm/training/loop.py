"""The training loop: data, objective, gradients averaged over ranks, optimizer, weight averages, checkpoints.

The loop names no objective. The objective declares the loss, the networks that it needs, and what happens to them after
a step. A step uses the next B samples of the run, where B is the global batch size. Positions of samples are counted
from the start of the run, also after a restart. Of W ranks, rank r has the positions r, r + W, r + 2W, ... of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from math import ceil
from typing import Any

import torch as th
from torch import Tensor

from cm.checkpoints import file_names, manifest
from cm.checkpoints.loading import WeightsFile
from cm.checkpoints.manager import CheckpointManager
from cm.checkpoints.share_writer import ShareWriter
from cm.distributed import setup as dist
from cm.distributed import signals
from cm.distributed.core_share import CoreWatch
from cm.distributed.sharding import Sharding, partition
from cm.io.progress import progress
from cm.logging import logger
from cm.objectives.base import ONLINE, last_step
from cm.random_util import SampleStreams, stream_seed
from cm.training import non_finite, state
from cm.training.config import LoopConfig, RunParts
from cm.training.ema import EMA
from cm.training.ema_rates import parse_rates
from cm.training.engine import make_engine
from cm.training.master_weights import MasterWeights
from cm.training.meters import LossMeter
from cm.training.mixed_precision import MixedPrecisionTrainer, StepReport
from cm.training.non_finite import NonFiniteError
from cm.training.optimizer import Optimizer, learning_rate
from cm.training.run_networks import RunNetworks
from cm.training.same_run import require_same_run
from cm.training.throughput import Ticks, status_line
from cm.training.trained_network import TrainedNetwork
from cm.types import Batch, LossTerms


class TrainLoop:
    """Train the networks of an objective.

    Call `resume` before `run_loop`: it loads the newest checkpoint, or the weights to start from, and opens the data at
    the position of the run.

    :raises UserError: if a step of the run is impossible, see `Objective.check`.
    :raises ValueError: if a companion network that the objective declares is missing.
    """

    # Set when `run_loop` starts.
    clock: float                                            # time of the latest row of the log, without callbacks since
    logged_step: int                                        # of that row
    ticks: Ticks
    cores: CoreWatch

    def __init__(self, config: LoopConfig, parts: RunParts):
        self.config, self.parts, self.flags = config, parts, dict(parts.flags)
        self.model, self.diffusion, self.objective = parts.model, parts.diffusion, parts.objective
        self.callbacks = parts.callbacks
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = next(parts.model.parameters()).device
        self.batch_size, self.save_interval = config.batch_size, config.save_interval
        self.global_batch = config.global_batch_size or config.batch_size * self.world_size
        self.microbatch = config.microbatch if config.microbatch > 0 else config.batch_size
        self.total_training_steps = last_step(config.total_training_steps, config.lr_anneal_steps)
        self.objective.check(self.total_training_steps)
        self.checkpoints = CheckpointManager(
            config.checkpoint_dir or logger.get_dir(), config.keep_checkpoints, config.milestone_interval,
            config.on_save_error, config.verify_weights, class_names=parts.class_names,
        )
        self.writer = ShareWriter(self.checkpoints, config.async_save) if config.checkpoint_format == "dcp" else None
        self.is_written = False                             # whether all ranks have written their shares of it
        self.start = parts.start or WeightsFile(config.resume_checkpoint)
        self.engine = make_engine(config, self.device, self.objective.full_precision_passes)
        self.engine.check_passes(ceil(config.batch_size / self.microbatch))
        self.nets = RunNetworks(config, parts, self.engine)
        self.ema_rate = parse_rates(config.ema_rate, config.ema_rampup_ratio)
        self.averages = self._make_averages()
        self.meter = LossMeter(
            parts.diffusion.sigma_min, parts.diffusion.sigma_max, dist.all_reduce_sum, dist.all_reduce_max
        )

        self.microbatches: list[tuple[Batch, LossTerms]] = []  # of the latest step
        self.report: StepReport | None = None               # of the latest step of the online network
        self.step = self.images_seen = 0
        self.averages_began: int | None = None              # images seen when they began; None: they begin next step
        self.seconds_before = 0.0                           # of training, in earlier starts of the run
        self.stop_signal = 0                                # the signal at which all ranks have agreed to stop
        self.data: Iterator[Any] = iter(())                 # opened by `resume`
        self.close_data: Callable[[], None] | None = None
        self.is_open = False
        self.start_time = time.monotonic()

    # --- the networks ----------------------------------------------------------------------------------------------

    @property
    def trained(self) -> dict[str, TrainedNetwork]:
        """Role -> a network with an optimizer; the online network is one of them."""
        return self.nets.trained

    @property
    def moving(self) -> dict[str, MasterWeights]:
        """Role -> a network that the objective updates after a step."""
        return self.nets.moving

    @property
    def trainer(self) -> MixedPrecisionTrainer:
        """The trainer of the online network."""
        return self.nets.trainer

    @property
    def opt(self) -> Optimizer:
        """The optimizer of the online network."""
        return self.trained[ONLINE].opt

    def sharding(self, sizes: list[int]) -> Sharding:
        """Which rank keeps, or writes, which of the tensors with these numbers of elements."""
        return partition(sizes, self.rank, self.world_size)

    @property
    def ema_params(self) -> list[list[Tensor]]:
        """For each rate, the averaged tensors that this rank keeps: all, unless the averages are sharded."""
        return self.averages.local

    def _make_averages(self) -> EMA:
        config, masters, layout = self.config, self.trainer.master_params, self.trainer.layout
        sharding = self.sharding(layout.whole_sizes(masters)) if config.shard_ema else None
        return EMA(masters, [rate.name for rate in self.ema_rate], config.ema_device, sharding, layout)

    # --- the loop --------------------------------------------------------------------------------------------------

    def run_loop(self) -> None:
        """Train until `total_training_steps`, or until a signal asks to stop. The last state is always saved."""
        if not self.is_open:
            self.resume()
        self.clock, self.logged_step = time.monotonic(), self.step
        self.ticks = Ticks(self.step, self.config.log_interval, self.device, self.seconds_before)
        self.cores = CoreWatch.of(self.device)
        state.write_status(self)
        total, main = self.total_training_steps, dist.is_main()
        bar = progress(title="training", total=total, initial=self.step, unit="step", shown=main)
        with bar:
            while self.step < self.total_training_steps and not self.stop_signal:
                self.run_step(as_batch(next(self.data), self.images_seen, self.rank, self.world_size))
                bar.update()
                self._after_step(bar)
        if self.close_data:
            self.close_data()
        state.write_status(self)
        if self.stop_signal:
            logger.log(f"{signals.name_of(self.stop_signal)}: stopped after step {self.step} of "
                       f"{self.total_training_steps} and saved; the same command resumes from there")

    def _after_step(self, bar: Any) -> None:
        """Run the callbacks, write a row of the log and save a checkpoint, each if it is due."""
        ends = self.step == self.total_training_steps or bool(self.stop_signal)
        saves = self.step % self.save_interval == 0 or ends
        with self.ticks.maintenance():
            if self.writer and self.is_written:
                self.writer.finish()
            found = self.run_callbacks()
        # A resumed run cannot log what came before its start, so each save has a row.
        if self.step % self.config.log_interval == 0 or saves or found:
            bar.clear()                                     # the table gets lines of its own
            bar.set_postfix(loss=f"{self.log_row(found)['loss']:.4g}")
        if saves:
            with self.ticks.maintenance():
                self.save(ends)

    def run_step(self, batch: Batch) -> None:
        """One optimizer step.

        :raises NonFiniteError: on every rank, before the update, if a loss or a gradient is not finite.
        """
        role = self.objective.trains(self.step)
        network = self.trained[role]
        if not network.ddp_warmed_up:
            self._warm_up(batch, network)
        self.set_learning_rate(network)
        th.manual_seed(stream_seed(self.seed, f"dropout of rank {self.rank}", self.step))
        network.trainer.zero_grad()
        self.forward_backward(batch, network=network)
        report = network.trainer.step(network.opt, self.agree_on_finite_and_stop(network))
        if report.fatal:
            raise self.non_finite_error(network)
        if report.stepped:                                  # not after an overflow in fp16
            self.update_loss_history()
        if role == ONLINE:
            self.report = report
        self.update_averages(role == ONLINE and report.stepped)
        if self.objective.after_step(self.nets.of_step(role), self.step):
            self.reset_optimizer_and_ema()
        for moving in self.moving.values():
            moving.master_params_to_model_params()
        self.step += 1
        self.images_seen += self.global_batch
        signals.stepping()

    def update_averages(self, moved: bool) -> None:
        """Update the weight averages.

        :param moved: whether the step changed the online network. Otherwise only power-function averages are updated:
            their decay depends on the images seen.
        """
        if self.averages_began is None:
            self.averages_began = self.images_seen
        decays = [
            rate.decay(self.images_seen, self.global_batch, self.averages_began)
            if moved or rate.power_std is not None else 1.0 for rate in self.ema_rate
        ]
        if any(decay != 1 for decay in decays):
            self.averages.update(decays)

    @property
    def seed(self) -> int:
        return self.config.seed

    def forward_backward(self, batch: Batch, *, network: TrainedNetwork) -> None:
        """Compute the gradients of the mean loss over the global batch, in microbatches."""
        self.microbatches.clear()
        for start in range(0, len(batch), self.microbatch):
            part = batch.rows(start, start + self.microbatch)
            is_last = start + self.microbatch >= len(batch)
            if is_last:
                terms = self.forward_backward_micro(part, network)
            else:
                with network.no_sync():
                    terms = self.forward_backward_micro(part, network)
            self.meter.add(terms)
            self.microbatches.append((part, LossTerms(terms.loss.detach(), terms.sigma.detach(), {
                name: value.detach() for name, value in terms.logs.items()
            })))

    def forward_backward_micro(self, part: Batch, network: TrainedNetwork) -> LossTerms:
        """Add the gradient of one microbatch's part of the mean loss."""
        rng = SampleStreams(self.seed, part.positions, stream="train")
        with network.trainer.autocast():
            nets = self.nets.of_step(self.objective.trains(self.step))
            terms = self.objective(nets, part.to(self.device), self.step, rng)
        # The gradients of W ranks are averaged, so the sum over one rank's samples has the weight 1/W.
        network.trainer.backward(terms.loss.sum() / (self.global_batch / self.world_size))
        return terms

    def _warm_up(self, batch: Batch, network: TrainedNetwork) -> None:
        """Run two passes and discard their gradients.

        After its first pass, DDP regroups its messages, which changes the order in which three or more ranks add their
        gradients. With these passes, a resumed run uses the final order from its first step, as the original run did.
        """
        for _ in range(2):
            self.forward_backward_micro(batch.rows(0, self.microbatch), network)
            network.trainer.zero_grad()
        network.ddp_warmed_up = True

    def agree_on_finite_and_stop(self, network: TrainedNetwork) -> bool:
        """Whether every loss and every gradient on every rank is finite; the ranks also agree on requests to stop.

        This is one all-reduce per step, and the only place where a step waits for its device. Each number is 1 if all
        is well, and the minimum over the ranks is used.
        """
        going_on = th.full((1,), 1 - signals.requested(), dtype=th.int32, device=self.device)
        finite = th.stack([non_finite.all_finite(self.microbatches), network.trainer.grads_finite()])
        known = [going_on, finite.int()]
        if self.writer:
            known.append(th.full((1,), int(not self.writer.is_writing()), dtype=th.int32, device=self.device))
        going_on, losses, gradients, *written = dist.all_reduce_min(th.cat(known)).tolist()
        self.stop_signal, self.is_written = 1 - going_on, all(written)
        if self.stop_signal:
            signals.agreed()
        return bool(losses and gradients)

    def update_loss_history(self) -> None:
        """Pass the losses of all ranks to the objective's history, in the order of the samples."""
        history = self.objective.history
        if history is None:
            return
        rows = [(part.positions, terms.sigma.cpu(), terms.logs["mse"].cpu()) for part, terms in self.microbatches]
        own = [th.cat(column) for column in zip(*rows)]
        positions, sigma, loss = (th.cat(column) for column in zip(*dist.all_gather_object(own)))
        order = positions.argsort()
        history.update_loss_history(sigma[order], loss[order])

    def set_learning_rate(self, network: TrainedNetwork) -> None:
        """Give the optimizer the learning rate of this step."""
        for group in network.opt.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.images_seen)

    def reset_optimizer_and_ema(self) -> None:
        """Start a new stage: new optimizer states, and averages that start from the current weights."""
        for network in self.trained.values():
            network.reset_optimizer()
        self.averages.restart()
        self.averages_began = None

    def non_finite_error(self, network: TrainedNetwork) -> NonFiniteError:
        """The error for the latest step. All ranks must call this."""
        if self.writer:
            self.writer.finish()                            # complete a save that is under way
        trainer = network.trainer
        skips = f" after {trainer.skipped_steps} steps skipped in fp16" if trainer.use_fp16 else ""
        return non_finite.explain(
            self.step, self.microbatches, skips,
            f"{self._suspect()}; {dist.on_main(self._saved_so_far)}.",
        )

    def _suspect(self) -> str:
        """What to do about a loss that is not finite."""
        for each in self.objective.companions:
            if each.origin == "teacher" and not self.engine.is_finite(self.parts.companions[each.name].model):
                return f"The weights of {each.name} are not finite: look at the file that they come from"
        return "Lower --lr, or look at these images"

    def _saved_so_far(self) -> str:
        """The state of the checkpoints if the run ends now; call it on one rank."""
        directory = self.checkpoints.directory
        if file_names.steps(directory):
            return f"the newest checkpoint in {directory} is good"
        return f"no checkpoint has been saved in {directory} yet"

    # --- the log ---------------------------------------------------------------------------------------------------

    def run_callbacks(self) -> dict[str, float]:
        """Run the callbacks after this step; returns values for the log. Their time does not count as training."""
        start_time, found = time.monotonic(), {}
        with signals.unhurried():                           # a measurement may take longer than a step may
            for callback in self.callbacks:
                found |= callback.after_step(self)
        self.clock += time.monotonic() - start_time
        return found

    def log_row(self, found: Mapping[str, float]) -> dict[str, float | None]:
        """Write a row of the log; returns the averages of the losses.

        :param found: further values of the row, from callbacks.
        """
        means = self.meter.means()
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        images, self.logged_step = (self.step - self.logged_step) * self.global_batch, self.step
        tick = self.ticks.end(self.step, self.global_batch) if self.config.with_ticks else {}
        logger.logkvs({
            "step": self.step,
            "samples": self.images_seen,
            **means,
            **(self.report.logs() if self.report else {}),
            **({"skipped_steps": self.trainer.skipped_steps} if self.trainer.use_fp16 else {}),
            "lr": self.opt.param_groups[0]["lr"],
            "images_per_second": images / max(seconds, 1e-9),
            "elapsed_seconds": self.elapsed_seconds(),
            **self.objective.logs(self.step - 1),
            **found,
            **tick,
        })
        logger.dumpkvs()
        if tick:
            logger.log(status_line(tick))
        if warning := self.cores.warning():
            logger.log(warning)
        return means

    def elapsed_seconds(self) -> float:
        """Seconds of training so far, over all starts of the run."""
        return self.seconds_before + time.monotonic() - self.start_time

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, is_last: bool = True) -> None:
        """Write a checkpoint of this step; see `CheckpointManager.save` for what happens if that fails."""
        with signals.unhurried():
            if self.writer:
                return state.save_in_shares(self, is_last)
            self.checkpoints.save(state.checkpoint_of(self), state.state_dict(self), is_last)

    def resume(self) -> None:
        """Load the newest checkpoint of the run, or the one that the flag `resume` names. Without one, load the weights
        of `resume_checkpoint`, if it is given. Then open the data at the position of the run.
        """
        found = self.checkpoints.find(self.config.resume)
        if "keep_checkpoints" in self.flags:
            self.flags["keep_checkpoints"] = self.checkpoints.keep
        if found:
            require_same_run(found, self.flags, self.config.resume)
            state.load_state_dict(self, found)
        elif self.config.resume_checkpoint:
            self._start_from(self.config.resume_checkpoint)
        logger.drop_after(self.step)                        # rows of steps that are about to be repeated
        self.start.weights = None                           # not needed if a newer checkpoint was found
        self.nets.distribute()
        data = self.parts.data
        self.data, self.is_open = data(self.images_seen) if callable(data) else data, True
        self.close_data = getattr(self.data, "close", None) if callable(data) else None
        self.start_time = time.monotonic()

    def _start_from(self, path: str) -> None:
        """Load the weights of another run, and also its optimizer, averages and step if the same folder holds them."""
        beside = dist.on_main(manifest.beside, path)
        if beside and file_names.parse_name(path) == ("model", beside.step) and "opt" in beside.names():
            state.load_state_dict(self, beside)
            return
        logger.log(f"starting at step 0 from the weights of {path}, with a new optimizer and new averages")
        if beside:
            state.take_class_names(self, beside)
        if beside and self.config.verify_weights:
            self.start.expected = beside.facts(path)
        self.trainer.load_master_params(state.read_params(self.trainer, self.start.take(), path))
        self.averages.restart()
        for each in self.objective.companions:
            if each.origin == ONLINE and each.name in self.moving:
                self.moving[each.name].copy_masters(self.trainer)


def as_batch(item: Any, images_seen: int, rank: int, world_size: int) -> Batch:
    """A batch with positions, from a `Batch` or from a pair (images, conditioning) as guided-diffusion has it."""
    batch = item if isinstance(item, Batch) else Batch(*item)
    if batch.positions is None:
        batch.positions = images_seen + rank + world_size * th.arange(len(batch))
    return batch

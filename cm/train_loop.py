"""The training loop: data in, objective, gradients averaged over ranks, optimizer, averages, checkpoints.

The loop never names an objective: what is minimised, and what happens to target and teacher after a step, is the
objective's own affair. B is the batch over all ranks; step k uses the samples kB .. kB+B-1 of the run.
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

from cm import dist_util, logger
from cm.checkpoints import state, weights
from cm.checkpoints.weights_file import WeightsFile
from cm.durations import parse_rates, rampup
from cm.fp16_util import MasterWeights, MixedPrecisionTrainer
from cm.interfaces import Batch, Nets, Objective, Watcher
from cm.meters import LossMeter
from cm.nn import update_ema
from cm.random_util import SampleStreams, stream_seed
from cm.registry import UserError, lookup
from cm.ticks import Ticks, status_line

OPTIMIZERS = {"radam": th.optim.RAdam, "adam": th.optim.Adam, "adamw": th.optim.AdamW}
ENDLESS = 600_000

DataSource = Iterator[Any] | Callable[[int], Iterator[Any]]


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; raised on every rank before the weights are touched."""


class TrainLoop:
    """Train one network.

    :param data: an iterator of batches (`Batch`, or guided-diffusion's pairs of images and conditioning), or a
        function from the number of samples already consumed by the whole run to such an iterator.
    :param batch_size: images per step on this rank.
    :param microbatch: images per forward pass; -1 for all at once.
    :param ema_rate: decay rates of the weight averages, a number or a comma-separated string; see `cm.durations`.
    :param ema_rampup_ratio: of those that are half-lives.
    :param lr_rampup_kimg: thousand images over which the learning rate rises from 0.
    :param with_ticks: rows of the log are ticks, with a status line.
    :param resume_checkpoint: model file to start from, with its optimizer and averages where they lie beside it.
    :param resume: "auto" goes on from the newest checkpoint in the log directory, "never" refuses to.
    :param total_training_steps: where training ends; 0 for lr_anneal_steps, or 600000 where that is 0 too.
    :param objective: what to minimise; None for the diffusion's own denoising loss.
    :param config: resolved flags, saved with every checkpoint.
    :param start: the file `resume_checkpoint`, where it has been looked into already.
    :param watchers: what looks at the run after each step; their state is part of a checkpoint.
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
        watchers: Sequence[Watcher] = (),
        lr_rampup_kimg: float = 0.0,
        ema_rampup_ratio: float = 0.0,
        with_ticks: bool = False,
    ):
        self.model, self.diffusion = model, diffusion
        self.rank, self.world_size = dist_util.get_rank(), dist_util.get_world_size()
        self.batch_size = batch_size
        self.global_batch = batch_size * self.world_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr, self.lr_anneal_steps, self.lr_rampup_kimg = lr, lr_anneal_steps, lr_rampup_kimg
        self.total_training_steps = last_step(total_training_steps, lr_anneal_steps)
        self.log_interval, self.save_interval, self.with_ticks = log_interval, save_interval, with_ticks
        self.seed, self.config = seed, dict(config or {})
        self.start = start or WeightsFile(resume_checkpoint)
        self.watchers = watchers
        self.device = next(model.parameters()).device

        self.trainer = MixedPrecisionTrainer(
            model=model, use_fp16=use_fp16, fp16_scale_growth=fp16_scale_growth, precision=precision
        )
        self.make_optimizer = lambda: lookup(OPTIMIZERS, optimizer, "optimizer")(
            self.trainer.master_params, lr=lr, weight_decay=weight_decay
        )
        self.opt = self.make_optimizer()
        self.ema_rate = parse_rates(ema_rate, ema_rampup_ratio)
        self.ema_params = [self.copy_of_masters() for _ in self.ema_rate]

        self.moving = self.moving_networks()
        self.objective = objective or diffusion.training_objective(schedule_sampler)
        self.to_remember: list[tuple[Tensor, ...]] = []
        self.step = 0
        self.resume(resume, resume_checkpoint)
        self.start.weights = None                               # not needed where a newer checkpoint was found
        self.ddp_model = self.distribute(model)
        self.nets = self.make_nets()
        self.meter = LossMeter(diffusion.sigma_min, diffusion.sigma_max, dist_util.all_reduce_sum)
        self.data = data(self.step * self.global_batch) if callable(data) else data

    # --- what the networks are -------------------------------------------------------------------------------------

    def make_nets(self) -> Nets:
        return Nets(
            online=self.diffusion.bind(self.ddp_model),
            online_model=self.model,
            online_params=self.trainer.master_params,
        )

    def moving_networks(self) -> dict[str, MasterWeights]:
        """The other networks that change during training, and so belong into a checkpoint."""
        return {}

    def distribute(self, model: nn.Module) -> nn.Module:
        """Average the gradients of all ranks while the backward pass runs."""
        if self.world_size == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,                            # constants, the same on every rank from the start
        )

    def copy_of_masters(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.trainer.master_params]

    # --- the loop --------------------------------------------------------------------------------------------------

    def run_loop(self) -> None:
        """Train until `total_training_steps`; the last state is always saved, once."""
        self.clock, self.logged_step = time.monotonic(), self.step
        self.ticks = Ticks(self.step, self.log_interval, self.device)
        bar = tqdm(
            total=self.total_training_steps, initial=self.step, unit="step", desc="training",
            disable=not dist_util.is_main(), dynamic_ncols=True,
        )
        with bar:
            while self.step < self.total_training_steps:
                self.run_step(as_batch(next(self.data), self.step, self.rank, self.world_size))
                bar.update()
                last = self.step == self.total_training_steps
                with self.ticks.maintenance():
                    found = self.ask_watchers()
                if self.step % self.log_interval == 0 or last or found:
                    bar.clear()                                 # the table gets lines of its own
                    bar.set_postfix(loss=f"{self.log_row(found)['loss']:.4g}")
                if self.step % self.save_interval == 0 or last:
                    with self.ticks.maintenance():
                        self.save()

    def run_step(self, batch: Batch) -> None:
        """One optimizer step. Raises NonFiniteError on every rank before a bad update."""
        self.set_learning_rate()
        th.manual_seed(stream_seed(self.seed, f"dropout of rank {self.rank}", self.step))
        self.trainer.zero_grad()
        self.forward_backward(batch)
        self.report = self.trainer.optimize(self.opt)
        self.check_finite(batch)
        if self.report.stepped:                                 # a step that overflowed has nothing to teach
            self.remember()
            self.update_averages()
        if self.objective.after_step(self.nets, self.step):
            self.start_afresh()
        for network in self.moving.values():
            network.publish_masters()
        self.step += 1

    def forward_backward(self, batch: Batch) -> None:
        """Gradients of the mean loss over the global batch, whatever the microbatch and the number of ranks."""
        self.to_remember.clear()
        for start in range(0, len(batch), self.microbatch):
            part = batch.rows(start, start + self.microbatch)
            rng = SampleStreams(self.seed, part.positions, stream="train")
            is_last = start + self.microbatch >= len(batch)
            wait = contextlib.nullcontext() if is_last or self.world_size == 1 else self.ddp_model.no_sync()
            with wait:
                with self.trainer.autocast():
                    terms = self.objective(self.nets, part.to(self.device), self.step, rng)
                self.trainer.backward(terms.loss.sum() / len(batch))
            self.meter.add(terms)
            if self.objective.memory is not None:
                self.to_remember.append((part.positions, terms.sigma.detach().cpu(), terms.logs["mse"].detach().cpu()))

    def remember(self) -> None:
        """Hand the losses of all ranks to the objective's memory, in the order of the samples."""
        if self.objective.memory is None:
            return
        mine = [th.cat(column) for column in zip(*self.to_remember)]
        positions, sigma, loss = (th.cat(column) for column in zip(*dist_util.all_gather_object(mine)))
        order = positions.argsort()
        self.objective.memory.remember(sigma[order], loss[order])

    def set_learning_rate(self) -> None:
        done = self.step / self.lr_anneal_steps if self.lr_anneal_steps else 0.0
        for group in self.opt.param_groups:
            group["lr"] = self.lr * max(0.0, 1.0 - done) * rampup(self.step * self.global_batch, self.lr_rampup_kimg)

    def update_averages(self) -> None:
        for rate, params in zip(self.ema_rate, self.ema_params):
            update_ema(params, self.trainer.master_params, rate.decay(self.step * self.global_batch, self.global_batch))

    def start_afresh(self) -> None:
        """A new stage: a fresh optimizer, averages that start from the present weights."""
        self.opt = self.make_optimizer()
        self.ema_params = [self.copy_of_masters() for _ in self.ema_rate]

    def check_finite(self, batch: Batch) -> None:
        if self.report.fatal:
            raise NonFiniteError(
                f"step {self.step}: loss or gradient is not finite; the weights were not touched. "
                f"Images of this rank's batch: {batch.indices.tolist() if batch.indices is not None else 'unknown'}. "
                f"Lower --lr, or look at these images; the newest checkpoint in {logger.get_dir()} is good."
            )

    # --- the log ---------------------------------------------------------------------------------------------------

    def ask_watchers(self) -> dict[str, float]:
        """What they have found after this step, for the log; their time is not the training's."""
        begun, found = time.monotonic(), {}
        for watcher in self.watchers:
            found |= watcher.after_step(self)
        self.clock += time.monotonic() - begun
        return found

    def log_row(self, found: Mapping[str, float]) -> dict[str, float]:
        """Write a row of the log, with what watchers have found; returns the averages of the losses."""
        means = self.meter.means()
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        images, self.logged_step = (self.step - self.logged_step) * self.global_batch, self.step
        tick = self.ticks.end(self.step, self.global_batch) if self.with_ticks else {}
        logger.logkvs({
            "step": self.step,
            "samples": self.step * self.global_batch,
            **means,
            **self.report.logs(),
            **({"skipped_steps": self.trainer.skipped_steps} if self.trainer.use_fp16 else {}),
            "lr": self.opt.param_groups[0]["lr"],
            "images_per_second": images / max(seconds, 1e-9),
            **self.extra_logs(),
            **found,
            **tick,
        })
        logger.dumpkvs()
        if tick:
            logger.log(status_line(tick))
        return means

    def extra_logs(self) -> dict[str, float]:
        return {}

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds: name -> state dict."""
        averages = {
            f"ema_{rate}": self.trainer.master_params_to_state_dict(params)
            for rate, params in zip(self.ema_rate, self.ema_params)
        }
        memory = {} if self.objective.memory is None else {"memory": self.objective.memory.state_dict()}
        watchers = {"watchers": {each.name: each.state_dict() for each in self.watchers}} if self.watchers else {}
        others = {name: own.master_params_to_state_dict(own.master_params) for name, own in self.moving.items()}
        return {
            "model": self.trainer.master_params_to_state_dict(self.trainer.master_params),
            **others,
            **averages,
            "opt": self.opt.state_dict(),
            "trainer": self.trainer.state_dict() | memory | watchers,
        }

    def save(self) -> None:
        """Write a checkpoint of this step on rank 0; every rank hears of a failure."""
        dist_util.on_main(self.write_checkpoint)

    def write_checkpoint(self) -> None:
        state.save(logger.get_dir(), self.step, self.content(), self.config, self.step * self.global_batch)

    def resume(self, resume: str, resume_checkpoint: str) -> None:
        """Go on from the newest checkpoint of the log directory, else start from `resume_checkpoint`."""
        directory = logger.get_dir()
        found = dist_util.on_main(find_checkpoint, directory)
        if found and resume == "never":
            raise UserError(
                f"{directory} already holds a checkpoint of step {found.step}, and --resume never was given: "
                "choose another --log_dir, or --resume auto to go on"
            )
        if found:
            logger.log(f"going on from step {found.step} in {directory}")
            self.step = found.step
            self.restore(lambda name: found.path(name))
        elif resume_checkpoint:
            self.start_from(resume_checkpoint)

    def start_from(self, path: str) -> None:
        """Weights of a file of another run; optimizer, averages and step where they lie beside it."""
        beside = dist_util.on_main(state.beside, path)
        name = state.parse_name(path)
        if beside and name == ("model", beside.step) and "opt" in beside.names():
            logger.log(f"going on from step {beside.step} of {path}")
            self.step = beside.step
            self.restore(lambda name: beside.path(name))
            return
        logger.log(f"starting at step 0 from the weights of {path}; optimizer and averages start afresh")
        self.trainer.load_master_params(self.read_params(self.trainer, self.start.take(), path))
        self.ema_params = [self.copy_of_masters() for _ in self.ema_rate]

    def restore(self, path_of: Callable[[str], str | None]) -> None:
        """Take over the state of a checkpoint.

        :raises UserError: if the checkpoint lacks a part or does not fit the network.
        """
        def params(name: str, owner: MasterWeights) -> list[Tensor]:
            return self.read_params(owner, load_part(name, path_of), path_of(name))

        for name, owner in {"model": self.trainer, **self.moving}.items():
            owner.load_master_params(params(name, owner))
        self.ema_params = [params(f"ema_{rate}", self.trainer) for rate in self.ema_rate]
        self.opt.load_state_dict(load_part("opt", path_of))
        trainer = load_part("trainer", path_of)
        self.trainer.load_state_dict(trainer)
        if self.objective.memory is not None:
            self.objective.memory.load_state_dict(trainer["memory"])
        for watcher in self.watchers:
            if watcher.name in trainer.get("watchers", {}):
                watcher.load_state_dict(trainer["watchers"][watcher.name])
        logger.drop_after(self.step)                            # rows of steps that are about to be done again

    def read_params(self, owner: MasterWeights, saved: Mapping[str, Tensor], source: str) -> list[Tensor]:
        """A saved state dict as one tensor per parameter of a network, on its device."""
        weights.check(owner.model, saved, source)
        weights.copy_buffers(owner.model, saved)
        return owner.state_dict_to_master_params(saved)


def last_step(total_training_steps: int, lr_anneal_steps: int) -> int:
    """Where training ends: never after the learning rate has reached 0."""
    total = total_training_steps or lr_anneal_steps or ENDLESS
    return min(total, lr_anneal_steps) if lr_anneal_steps else total


def as_batch(item: Any, step: int, rank: int, world_size: int) -> Batch:
    """A batch with positions, also from guided-diffusion's pairs of images and conditioning."""
    batch = item if isinstance(item, Batch) else Batch(*item)
    if batch.positions is None:
        first = step * len(batch) * world_size
        batch.positions = first + rank + world_size * th.arange(len(batch))
    return batch


def find_checkpoint(directory: str) -> state.Checkpoint | None:
    state.sweep(directory)
    return state.newest(directory)


def load_part(name: str, path_of: Callable[[str], str | None]) -> Any:
    path = path_of(name)
    if path is None:
        raise UserError(
            f"the checkpoint has no {name!r}: give the flags that it was made with (--ema_rate names its averages), "
            "or begin a new run from its weights: --resume_checkpoint with one of its ema files, and another --log_dir"
        )
    return dist_util.load_state_dict(path, map_location="cpu")

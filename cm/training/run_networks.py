"""The networks of a run: those that are trained, those that the objective updates, and those of a step."""

from __future__ import annotations

from functools import partial

from torch import nn

from cm.distributed import setup as dist
from cm.distributed.sharding import partition
from cm.objectives.base import ONLINE, roles
from cm.training.config import LoopConfig, RunParts
from cm.training.engine import Engine
from cm.training.master_weights import MasterWeights, store_as_computed
from cm.training.mixed_precision import MixedPrecisionTrainer
from cm.training.optimizer import make_optimizer
from cm.training.trained_network import TrainedNetwork
from cm.types import BoundNetwork, Networks


class RunNetworks:
    """The online network and the companions of an objective, ready for training.

    :raises ValueError: if a companion that the objective declares is missing.
    """

    trained: dict[str, TrainedNetwork]
    """Role -> a network with an optimizer; the online network is one of them."""
    moving: dict[str, MasterWeights]
    """Role -> a network that the objective updates after a step, such as a target."""

    def __init__(self, config: LoopConfig, parts: RunParts, engine: Engine):
        self.config, self.parts, self.engine = config, parts, engine
        declared = parts.objective.companions
        for each in declared:
            if each.name not in parts.companions:
                raise ValueError(f"{type(parts.objective).__name__} needs a network named {each.name!r}; "
                                 f"given are {', '.join(parts.companions) or 'none'}")
        models = {name: companion.model for name, companion in parts.companions.items()}
        self.trained = {ONLINE: self._trained(parts.model)}
        self.trained |= {name: self._trained(models[name]) for name in roles(declared, "trained")}
        layouts = {name: engine.lay_out(model) for name, model in models.items() if name not in self.trained}
        stores_casts, precision = not parts.objective.full_precision_passes, self.trainer.precision
        self.moving = {name: MasterWeights(models[name], precision, layouts[name], stores_casts)
                       for name in roles(declared, "by_objective")}
        for name in roles(declared, "never"):               # a frozen network needs no master weights
            store_as_computed(models[name], precision, stores_casts and not layouts[name].is_sharded)
        self._of_step: dict[str, Networks] = {}             # by the role that is trained

    def _trained(self, model: nn.Module) -> TrainedNetwork:
        config = self.config
        trainer = MixedPrecisionTrainer(
            model=model, use_fp16=config.use_fp16, fp16_scale_growth=config.fp16_scale_growth,
            precision=config.precision, grad_clip=config.grad_clip, layout=self.engine.lay_out(model),
        )
        sizes = trainer.layout.whole_sizes(trainer.master_params)
        shares = partition(sizes, dist.get_rank(), dist.get_world_size()) if config.shard_optimizer else None
        make = partial(
            make_optimizer, config.optimizer, lr=config.lr, weight_decay=config.weight_decay, shares=shares,
            layout=trainer.layout, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
        )
        return TrainedNetwork(trainer, make, self.engine)

    @property
    def trainer(self) -> MixedPrecisionTrainer:
        """The trainer of the online network."""
        return self.trained[ONLINE].trainer

    @property
    def other_trainers(self) -> dict[str, MixedPrecisionTrainer]:
        """Role -> the trainer of a trained network besides the online one."""
        return {name: network.trainer for name, network in self.trained.items() if name != ONLINE}

    @property
    def saved(self) -> dict[str, MasterWeights]:
        """Name in a checkpoint -> the weights of every network that changes; "model" is the online network."""
        return {"model": self.trainer, **self.moving, **self.other_trainers}

    def of_step(self, role: str) -> Networks:
        """The networks of a step that trains this role; the gradients of its network are averaged over the ranks."""
        if role not in self._of_step:
            bound = {}
            for name, companion in self.parts.companions.items():
                trained = self.trained.get(name)
                module = trained.ddp_model if trained and name == role else companion.model
                masters = trained.trainer if trained else self.moving.get(name)
                params = masters.master_params if masters else ()
                bound[name] = BoundNetwork(companion.diffusion.bind(module), companion.model, params)
            module = self.trained[ONLINE].ddp_model if role == ONLINE else self.parts.model
            online = BoundNetwork(self.parts.diffusion.bind(module), self.parts.model, self.trainer.master_params)
            self._of_step[role] = Networks.of(online, bound)
        return self._of_step[role]

    def distribute(self) -> None:
        """Average the gradients of trained networks over the ranks from now on; all ranks must have equal weights."""
        for network in self.trained.values():
            network.distribute()
        self._of_step.clear()

"""Runs whose memory is planned and measured."""

from support.training import network

CASES = {
    "edm": {"lr_anneal_steps": 9, "weight_decay": 0.1},
    "consistency_training": {"mode": "consistency_training", "use_fp16": True, "optimizer": "adamw",
                             "grad_clip": 0.01},
    "progdist": {"mode": "progdist", "use_fp16": True},
}


def meta_network():
    return network().to("meta")


def held_bytes(training):
    """What a loop really holds on this rank, by the names of the plan."""
    trainer, moving = training.trainer, training.moving

    def size(tensors):
        """Of the memory behind them on this rank, each piece once."""
        tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def network_of(name):
        own = moving[name]
        return size(own.model_params) + (size(own.master_params) if own.use_fp16 else 0)

    held = {
        "parameters": size(trainer.model_params),
        "gradients": size(param.grad for param in trainer.model_params),
        "optimizer": size(value for entry in training.opt.state.values() for value in entry.values()),
        **{f"average {rate}": size(own) for rate, own in zip(training.ema_rate, training.ema_params)},
    }
    if trainer.use_fp16:
        held["float32 masters"] = size(trainer.master_params)
        held["gradients of the masters"] = size(param.grad for param in trainer.master_params)
    return held | {name.removesuffix("_model"): network_of(name) for name in moving}

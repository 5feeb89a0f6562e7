"""What ranks do in the tests of networks in shards: the same runs with and without shards. `python sharded_runs.py DATA
FOLDER NAME...` on several ranks.
"""

import json
import sys
from pathlib import Path

import torch as th

from cm.data.loader import load_data
from cm.distributed import setup as dist
from cm.karras_diffusion import KarrasDenoiser
from cm.networks.build import NetworkConfig, build_network, to_device
from cm.objectives.scm import SCT
from cm.objectives.uncertainty import Uncertainty
from cm.training.loop import as_batch
from cm.training.memory_estimate import PlannedRun, plan
from cm.training.non_finite import NonFiniteError
from support.memory_cases import held_bytes, meta_network
from support.training import loop

EDM = {"dropout": 0.3, "microbatch": 2, "grad_clip": 0.01}
DISTILLED = {"mode": "consistency_distillation", "dropout": 0.2}


def train(images, folder, steps, **options):
    """A run of this rank, whose ranks share batches of 8."""
    ranks = dist.get_world_size()

    def stream(start):
        return load_data(data_dir=images, batch_size=8 // ranks, image_size=8, class_cond=True, seed=3, start=start,
                         num_workers=0, rank=dist.get_rank(), world_size=ranks)

    training = loop(images, folder, steps, **{"data": stream, "batch_size": 8 // ranks, "save_interval": 2, **options})
    training.run_loop()
    return training


def edm2():
    """EDM2's network with parameters that count, also the gains that start at 0, whose parameters have no axes."""
    th.manual_seed(0)
    config = NetworkConfig(8, 32, 1, "1", class_cond=True, num_classes=3, attention_resolutions="8", arch="edm2",
                           num_head_channels=32)
    model = build_network(config)
    with th.no_grad():
        for param in model.parameters():
            if param.ndim == 0:
                param.fill_(0.5)
    return to_device(model, th.device("cpu"))


def few_step():
    return {"objective": SCT(KarrasDenoiser(loss_norm="l2", distillation=True), "noise", warmup=0)}


def uncertainty():
    options = {"noise_mean": -0.4, "noise_std": 1.0}
    return {"model": edm2(), "objective": Uncertainty.of(KarrasDenoiser(loss_norm="l2"), None, options),
            "ema_rate": "power0.1"}


def in_pairs(images, root):
    """Runs on two ranks that the test compares; memory that was held and planned."""
    for parallel in ("ddp", "fsdp"):
        how = {"parallel": parallel}
        training = train(images, root / f"edm {parallel}", 3, **EDM, **how)
        train(images, root / f"scm {parallel}", 2, **few_step(), **how)
        train(images, root / f"scm bf16 {parallel}", 1, precision="bf16", **few_step(), **how)
        train(images, root / f"edm2 {parallel}", 2, **uncertainty(), **how)
        distilling = train(images, root / f"cd {parallel}", 2, **DISTILLED, **how)
        train(images, root / f"bf16 {parallel}", 1, precision="bf16", optimizer="adamw", **how)
    in_shares(images, root)
    for before, after in (("fsdp", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")):
        resume = str(root / f"edm {before}" / "checkpoint_000002.json")
        train(images, root / f"edm {before} then {after}", 3, resume=resume, parallel=after, **EDM)
    memory = {"edm": memory_of(training, {}), "cd": memory_of(distilling, {
        "target_model": "by_objective", "teacher_model": "never"})}
    say(root / "memory.json", memory)
    say(root / "errors.json", errors(images, root, training))


def in_shares(images, root):
    """Runs that leave folders into which all ranks wrote, and runs that go on from them."""
    split = {"shard_ema": True, "shard_optimizer": True}
    dcp = {"checkpoint_format": "dcp", "async_save": True, **EDM}
    for name, how in (("fsdp", {"parallel": "fsdp"}), ("ddp", split)):
        train(images, root / f"dcp {name}", 3, **how, **dcp)
    for before, after, how in (("fsdp", "fsdp", {"parallel": "fsdp"}), ("fsdp", "ddp", split), ("ddp", "ddp", {})):
        resume = str(root / f"dcp {before}" / "checkpoint_000002.json")
        train(images, root / f"dcp {before} then {after}", 3, resume=resume, **how, **EDM)


def memory_of(training, companions):
    held = held_bytes(training)
    if "teacher_model" in companions:
        held["teacher"] = sum(p.to_local().untyped_storage().nbytes()
                              for p in training.parts.companions["teacher_model"].model.parameters())
    run = PlannedRun("fp32", "radam", ["0.5", "0.9"], ranks=2, shards=2, companions=companions, on_gpu=False)
    return held, plan(meta_network(), run).device


def errors(images, root, training):
    """What this rank hears of a gradient that is infinite on the other, and of ranks with unequal passes."""
    said = {}
    network = training.trained["online"]
    backward = network.trainer.backward

    def spoilt(loss):
        backward(loss * (float("inf") if dist.get_rank() else 1.0))

    network.trainer.backward, before = spoilt, training.trainer.master_params[0].clone()
    try:
        item = th.zeros(4, 3, 8, 8), {"y": th.zeros(4, dtype=th.long)}
        training.run_step(as_batch(item, training.images_seen, dist.get_rank(), 2))
    except NonFiniteError as error:
        said["non-finite"] = str(error)
    said["untouched"] = bool((training.trainer.master_params[0] == before).all())
    try:
        loop(images, root / "passes", 1, parallel="fsdp", batch_size=3 - dist.get_rank(), global_batch_size=5,
             microbatch=2 if dist.get_rank() else 1)
    except Exception as error:
        said["passes"] = f"{type(error).__name__}: {error}"
    return said


def on_four(images, root):
    """Two replicas of two shards."""
    training = train(images, root / "hsdp", 2, parallel="hsdp", shard_size=2, grad_clip=0.01)
    say(root / "memory.json", memory_of(training, {}))


def say(path, own):
    everybody = dist.all_gather_object(own)
    if dist.is_main():
        path.write_text(json.dumps(everybody))


def main():
    dist.setup_dist()
    {"in_pairs": in_pairs, "on_four": on_four}[sys.argv[3]](sys.argv[1], Path(sys.argv[2]))


if __name__ == "__main__":
    dist.run(main)

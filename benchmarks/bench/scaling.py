"""A model of training on many GPUs: the time of a step, the cost of saves and restarts, and the goodput.

It computes with published rates, for numbers of GPUs that have not been measured. Sizes are in bytes, rates in
bytes or operations per second, times in seconds. A ring passes each byte of a message (n - 1)/n times for an all-gather
or a reduce-scatter and twice as often for an all-reduce (Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FLOAT, HALF = 4, 2                                          # bytes of a float32 and of a bfloat16
ENGINES = ("ddp", "hsdp", "fsdp")
FORWARD, BACKWARD = 1.0, 2.0                                # passes: the backward pass has two products for each one
OPTIMIZER_BYTES = 7 * FLOAT                                 # Adam reads weight, gradient, both moments; writes three
AVERAGE_BYTES = 3 * FLOAT                                   # an average is read and written, the weight is read


@dataclass(frozen=True)
class Cluster:
    """Machines with GPUs. Rates are those of one GPU unless stated otherwise.

    :param utilisation: share of `flops` that a step reaches where each GPU has many images.
    :param half_flops: operations of a forward pass at which half of that share is reached, because kernels are small.
    :param bus: rate of a collective inside a machine; `network` between machines. Both are rates of one GPU's link.
    :param latency: of one message between machines.
    :param writes: rate at which one process writes a checkpoint; `storage` limits all of them together.
    :param failure_hours: GPU hours between two interruptions.
    :param restart: from an interruption to the first step, without loading.
    :param shortest_interval: least time between two saves, so that they do not overload the storage.
    """

    flops: float = 989e12                                   # NVIDIA H100 SXM: bf16 without sparsity
    utilisation: float = 0.45
    half_flops: float = 200e9
    memory: float = 80e9
    memory_rate: float = 3.35e12
    per_node: int = 8
    bus: float = 450e9                                      # NVLink 4, one direction
    network: float = 50e9                                   # 400 Gbit/s for each GPU
    latency: float = 10e-6
    to_host: float = 25e9
    writes: float = 1.5e9
    storage: float = 100e9
    failure_hours: float = 50_000.0                         # arXiv 2407.21783, 3.3.4: 419 in 54 days on 16,384 GPUs
    restart: float = 180.0
    shortest_interval: float = 600.0


@dataclass(frozen=True)
class Workload:
    """A network, and how it is trained.

    :param flops: of a forward pass on one image.
    :param passes: network passes of a step in units of a forward pass: 3 for one that learns, 1 for a teacher.
    :param activations: bytes that an image keeps for the backward pass.
    :param averages: moving averages of the weights.
    :param messages: into which the weights are divided on their way, one for each residual block.
    """

    name: str
    parameters: int
    flops: float
    batch: int
    activations: float
    passes: float = FORWARD + BACKWARD
    averages: int = 2
    messages: int = 37


ADM64 = Workload("ADM ImageNet-64", 295_899_267, 219.3e9, 4096, 0.46e9)
XXL = Workload("EDM2-XXL ImageNet-512", 1_523_164_773, 1093.8e9, 2048, 1.33e9)
GPUS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Step:
    """The parts of a step, in seconds, and the bytes that a GPU holds.

    :param microbatch: images of a GPU that pass through the network at a time.
    :param compute: of the passes.
    :param update: of the weights, their optimizer and averages.
    :param exposed: communication that nothing hides.
    """

    microbatch: int
    compute: float
    update: float
    exposed: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.compute + self.update + self.exposed


def bus_of(cluster: Cluster, gpus: int) -> float:
    """The rate of a ring through all GPUs: one ring per link to the network runs through a machine at the same time."""
    if gpus <= cluster.per_node:
        return cluster.bus
    return min(cluster.bus, cluster.per_node * cluster.network)


def gather(size: float, ranks: int, rate: float, latency: float) -> float:
    """Seconds of an all-gather, or of a reduce-scatter.

    :param size: of what is gathered on every rank.
    :param latency: of the messages that it is divided into, all together; each goes up a tree of the ranks.
    """
    return size * (ranks - 1) / ranks / rate + latency * math.log2(ranks)


def all_reduce(size: float, ranks: int, rate: float, latency: float) -> float:
    """Seconds of an all-reduce: a reduce-scatter and an all-gather."""
    return 2 * gather(size, ranks, rate, latency)


def step(work: Workload, cluster: Cluster, gpus: int, engine: str = "ddp") -> Step:
    """The model's step, in as few microbatches as the memory allows.

    `ddp` divides the optimizer among all GPUs, as `--shard_optimizer True` does; `hsdp` divides weights, optimizer and
    averages within a machine, `fsdp` among all GPUs.

    :raises ValueError: for an engine that is unknown, more GPUs than images, or a network that does not fit.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r}; choose one of {', '.join(ENGINES)}")
    images = work.batch / gpus
    if images < 1:
        raise ValueError(f"{gpus} GPUs for a batch of {work.batch} images: each needs at least one")
    shard = {"ddp": 1, "hsdp": min(gpus, cluster.per_node), "fsdp": gpus}[engine]
    optimizer_shard = max(shard, gpus if engine == "ddp" else 1)
    held = FLOAT * work.parameters * ((2 + work.averages) / shard + 2 / optimizer_shard)
    microbatch = min(int(images), int((cluster.memory - held) / work.activations))
    if microbatch < 1:
        raise ValueError(f"{work.name} takes {held:.3g} bytes of {cluster.memory:.3g} and leaves no room for an image")
    parts = math.ceil(images / microbatch)
    reached = cluster.utilisation / (1 + cluster.half_flops / (work.flops * microbatch))
    compute = work.passes * work.flops * images / (cluster.flops * reached)
    update = OPTIMIZER_BYTES / optimizer_shard + work.averages * AVERAGE_BYTES / shard
    exposed = agreement(cluster, gpus) + exposed_by(engine, work, cluster, gpus, parts, compute)
    return Step(microbatch, compute, work.parameters * update / cluster.memory_rate, exposed,
                held + microbatch * work.activations)


def exposed_by(engine: str, work: Workload, cluster: Cluster, gpus: int, parts: int, compute: float) -> float:
    """Seconds of an engine's messages that computation does not hide.

    :param parts: microbatches.
    :param compute: seconds of all of them.
    """
    weights, latency = work.parameters, work.messages * cluster.latency
    if engine == "ddp":                                     # gradients, in the last backward pass; then new weights
        bus, window = bus_of(cluster, gpus), compute / parts * BACKWARD / work.passes
        gradients = all_reduce(FLOAT * weights, gpus, bus, latency)
        return max(0.0, gradients - window) + gather(FLOAT * weights, gpus, bus, latency)
    ring = gpus if engine == "fsdp" else min(gpus, cluster.per_node)
    bus = bus_of(cluster, ring)
    each = 2 * gather(HALF * weights, ring, bus, latency)   # weights for the forward and for the backward pass
    gradients = gather(FLOAT * weights, ring, bus, latency)
    across = all_reduce(FLOAT * weights / ring, gpus // ring, cluster.network, latency)
    return max(0.0, parts * each + gradients + across - compute)


def agreement(cluster: Cluster, gpus: int) -> float:
    """Seconds of the message by which the ranks agree that a step is finite: three numbers."""
    return all_reduce(3 * FLOAT, gpus, bus_of(cluster, gpus), cluster.latency)


# --- saving, failures, and what is left ------------------------------------------------------------------------------

SAVES = ("one writer", "every rank", "in the background")


def checkpoint_bytes(work: Workload) -> float:
    """Weights, both moments of Adam, and the averages, in float32."""
    return FLOAT * work.parameters * (3 + work.averages)


def save_stall(work: Workload, cluster: Cluster, gpus: int, save: str) -> float:
    """Seconds for which a save interrupts training.

    :raises ValueError: for an unknown way to save.
    """
    size = checkpoint_bytes(work)
    if save == "one writer":
        return size / cluster.writes
    if save == "every rank":
        return size / min(gpus * cluster.writes, cluster.storage)
    if save == "in the background":
        return size / gpus / cluster.to_host
    raise ValueError(f"way of saving {save!r}; choose one of {', '.join(SAVES)}")


def failure_interval(cluster: Cluster, gpus: int) -> float:
    """Seconds between two interruptions of a run."""
    return 3600 * cluster.failure_hours / gpus


def save_interval(work: Workload, cluster: Cluster, gpus: int, save: str) -> float:
    """The best interval between saves in seconds: sqrt(2 stall M), if a failure occurs every M seconds.

    Source: Young 1974 (doi 10.1145/361147.361115). The cluster sets a lower bound.
    """
    best = math.sqrt(2 * save_stall(work, cluster, gpus, save) * failure_interval(cluster, gpus))
    return max(best, cluster.shortest_interval)


def goodput(work: Workload, cluster: Cluster, gpus: int, save: str) -> float:
    """Share of the time spent on steps that count: without saves, lost steps, loading and restarts."""
    stall, between = save_stall(work, cluster, gpus, save), failure_interval(cluster, gpus)
    interval = save_interval(work, cluster, gpus, save)
    loading = checkpoint_bytes(work) / cluster.writes       # read once, then sent to the others
    lost = interval / 2 + cluster.restart + loading
    return max(0.0, 1 - stall / interval - lost / between)


def efficiency(work: Workload, cluster: Cluster, gpus: int, engine: str = "ddp") -> float:
    """Images per second and GPU, relative to one machine with the same global batch size."""
    alone = step(work, cluster, cluster.per_node, engine)
    return alone.seconds * cluster.per_node / (step(work, cluster, gpus, engine).seconds * gpus)


def limit(parts: Step) -> str:
    """The largest part of a step besides its passes, if it is more than a tenth of the step; else "compute"."""
    costs = {"communication": parts.exposed, "update": parts.update}
    name = max(costs, key=lambda key: costs[key])
    return name if costs[name] > 0.1 * parts.seconds else "compute"

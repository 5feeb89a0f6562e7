"""Random numbers that depend on the sample and not on the batch.

Every row of a draw comes from the stream of one sample, and a stream is a function of (seed, stream name, key of the
sample). So the values are the same whatever the batch size, the rank, the number of ranks or the device: draws are
made on the CPU and copied.

Shapes: N rows, one per sample; the other axes are free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist
from torch import Tensor
from torch.types import Device

from cm.registry import lookup
from cm.types import NoiseSource

GOLDEN_GAMMA = 0x9E3779B97F4A7C15                                   # odd integer nearest 2^64 / golden ratio
TWISTER_WORDS = 624                                                 # 32-bit words in a Mersenne Twister's state
TWISTER_OFFSET = 3                                                  # 64-bit fields before them in torch's state tensor


def stream_seeds(seed: int, stream: str, keys: Any) -> np.ndarray:
    """64 well mixed bits for each key: uint64 [N].

    Distinct keys of one (seed, stream) never share a value; values of different seeds or streams coincide with
    probability 2^-64 per pair.

    :param seed: any integer, the run's seed.
    :param stream: what the numbers are for, such as "train" or "flip"; streams are independent of each other.
    :param keys: integers [N], such as positions in the run or indices of samples.
    """
    digest = hashlib.blake2b(f"{stream}:{int(seed)}".encode(), digest_size=8).digest()
    start = np.frombuffer(digest, np.uint64)
    keys = np.asarray(keys, np.int64).reshape(-1).view(np.uint64)
    return _mix64(_mix64(keys * np.uint64(GOLDEN_GAMMA)) ^ start)


def stream_seed(seed: int, stream: str, key: int = 0) -> int:
    """`stream_seeds` for one key, as an integer that `th.manual_seed` and numpy's Philox accept."""
    return int(stream_seeds(seed, stream, [key])[0])


def _mix64(bits: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, a bijection on 64 bits (Steele, Lea and Flood 2014, figure 16)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _generators(seeds: np.ndarray) -> list[th.Generator]:
    """A CPU generator for each seed, uint64 [N].

    `manual_seed` on the CPU uses 32 bits only, so that among 100,000 samples one pair would be expected to have the
    same numbers. The complete state is therefore written, from the SplitMix64 sequence that starts at the seed.
    """
    steps = np.arange(1, TWISTER_WORDS // 2 + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    words = _mix64(seeds[:, None] + steps).view(np.uint32)          # [N,624]
    fresh = th.Generator().manual_seed(0).get_state().numpy().view(np.uint64)
    states = np.tile(fresh, (len(seeds), 1))
    states[:, TWISTER_OFFSET : TWISTER_OFFSET + TWISTER_WORDS] = words
    # Each row is its own numpy array: torch reads a state that has a storage offset from a wrong address.
    return [th.Generator().set_state(th.from_numpy(state)) for state in states.view(np.uint8)]


class SampleStreams:
    """A `NoiseSource` whose row i is drawn from the stream of `keys[i]`.

    Successive draws continue the streams. Numbers are drawn in float32 (float64 where asked for), whatever precision
    they are returned in. torch draws rows of fewer than 16 normal numbers by another algorithm, so the values depend
    on the shape of a row, too.

    :param seed: any integer, the run's seed.
    :param keys: integers [N], one for each row.
    :param stream: separates different uses of the same seed and keys.
    :param device: of the results when a draw does not name one; the CPU by default.
    """

    def __init__(self, seed: int, keys: Any, stream: str = "train", device: Device = None):
        self._seeds = stream_seeds(seed, stream, keys)
        self._device = th.device(device or "cpu")
        self._rows: list[th.Generator] | None = None                # made by the first draw

    def __len__(self) -> int:
        return len(self._seeds)

    def randn(self, *shape: int, dtype: th.dtype | None = None, device: Device = None) -> Tensor:
        """Standard normal numbers of a shape [N, ...]."""
        dtype = dtype or th.get_default_dtype()
        return self._draw(shape, _drawn_as(dtype), device, lambda row, own: row.normal_(generator=own)).to(dtype)

    def randn_like(self, tensor: Tensor) -> Tensor:
        """Standard normal numbers with the shape, dtype and device of `tensor` [N, ...]."""
        return self.randn(*tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def rand(self, *shape: int, dtype: th.dtype | None = None, device: Device = None) -> Tensor:
        """Uniform numbers in [0, 1) of a shape [N, ...]."""
        dtype = dtype or th.get_default_dtype()
        return self._draw(shape, _drawn_as(dtype), device, lambda row, own: row.uniform_(generator=own)).to(dtype)

    def randint(
        self, low: int, high: int, size: tuple[int, ...], dtype: th.dtype = th.long, device: Device = None
    ) -> Tensor:
        """Integers in low..high-1 of a shape [N, ...]."""
        return self._draw(size, th.long, device, lambda row, own: row.random_(low, high, generator=own)).to(dtype)

    def _draw(
        self, shape: tuple, dtype: th.dtype, device: Device, fill: Callable[[Tensor, th.Generator], Any]
    ) -> Tensor:
        shape = _flat_shape(shape)
        if not shape or shape[0] != len(self):
            raise ValueError(
                f"a draw of shape {list(shape)} from streams of {len(self)} samples: the first axis must be {len(self)}"
            )
        if self._rows is None:
            self._rows = _generators(self._seeds)
        device = self._device if device is None else th.device(device)
        # Pinned memory lets the one copy to a GPU overlap with the computation there.
        buffer = th.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        for row, generator in zip(buffer.unbind(), self._rows):
            fill(row, generator)
        return buffer.to(device, non_blocking=True)


def _flat_shape(shape: tuple) -> tuple[int, ...]:
    """Shapes come as `randn(2, 3)` or, as torch allows, `randn((2, 3))`."""
    return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)


def _drawn_as(dtype: th.dtype) -> th.dtype:
    return th.float64 if dtype == th.float64 else th.float32


class DummyGenerator:
    """Torch's global random stream with the interface of the deterministic generator.

    The arguments are those of DeterministicGenerator, so that one table builds both, and they have no effect.
    """

    def __init__(
        self, num_samples: int = 0, seed: int = 0, rank: int | None = None, world_size: int | None = None
    ):
        pass

    def set_done_samples(self, done_samples: int) -> None:
        """Does nothing: the global stream continues."""

    def for_samples(self, indices: Any) -> NoiseSource:
        """The global stream itself, which does not depend on the samples."""
        return self

    def randn(self, *shape: int, dtype: th.dtype | None = None, device: Device = None) -> Tensor:
        """Standard normal numbers of any shape."""
        return th.randn(*shape, dtype=dtype, device=device)

    def randn_like(self, tensor: Tensor) -> Tensor:
        """Standard normal numbers with the shape, dtype and device of `tensor`."""
        return th.randn_like(tensor)

    def rand(self, *shape: int, dtype: th.dtype | None = None, device: Device = None) -> Tensor:
        """Uniform numbers in [0, 1) of any shape."""
        return th.rand(*shape, dtype=dtype, device=device)

    def randint(
        self, low: int, high: int, size: tuple[int, ...], dtype: th.dtype = th.long, device: Device = None
    ) -> Tensor:
        """Integers in low..high-1 of any shape."""
        return th.randint(low, high, size, dtype=dtype, device=device)


class DeterministicGenerator:
    """Random numbers that depend only on the seed and the index of the sample.

    Row k of a batch on rank r is sample `done + r + k * world_size`, where `set_done_samples(done)` is called before
    each batch; `for_samples` takes the indices directly. Rows past the last sample of a run have streams of their own
    and do not affect the others.

    :param num_samples: has no effect; it keeps its place in the published signature.
    :param rank, world_size: by default those of torch.distributed, or 0 and 1 where it is not initialised.
    """

    def __init__(
        self, num_samples: int = 0, seed: int = 0, rank: int | None = None, world_size: int | None = None
    ):
        own_rank, own_world_size = _place_of_this_process()
        self.num_samples = num_samples
        self.seed = seed
        self.rank = own_rank if rank is None else rank
        self.world_size = own_world_size if world_size is None else world_size
        self.set_done_samples(0)

    def set_done_samples(self, done_samples: int) -> None:
        """Start the next batch: `done_samples` samples of the run are finished, over all ranks."""
        self.done_samples = done_samples
        self._batch: SampleStreams | None = None                    # its size is known at its first draw

    def get_seed(self) -> int:
        """The seed of all streams."""
        return self.seed

    def set_seed(self, seed: int) -> None:
        """Another seed; the streams of the present batch begin again."""
        self.seed = seed
        self.set_done_samples(self.done_samples)

    def for_samples(self, indices: Any) -> SampleStreams:
        """New streams of the samples with these indices, integers [N]."""
        return SampleStreams(self.seed, indices, stream="sample")

    def randn(self, *shape: int, dtype: th.dtype | None = None, device: Device = None) -> Tensor:
        """Standard normal numbers of a shape [N, ...], N being the size of the batch."""
        return self._streams(_flat_shape(shape)).randn(*shape, dtype=dtype, device=device)

    def randn_like(self, tensor: Tensor) -> Tensor:
        """Standard normal numbers with the shape, dtype and device of `tensor` [N, ...]."""
        return self._streams(tensor.shape).randn_like(tensor)

    def rand(self, *shape: int, dtype: th.dtype | None = None, device: Device = None) -> Tensor:
        """Uniform numbers in [0, 1) of a shape [N, ...]."""
        return self._streams(_flat_shape(shape)).rand(*shape, dtype=dtype, device=device)

    def randint(
        self, low: int, high: int, size: tuple[int, ...], dtype: th.dtype = th.long, device: Device = None
    ) -> Tensor:
        """Integers in low..high-1 of a shape [N, ...]."""
        return self._streams(size).randint(low, high, size, dtype=dtype, device=device)

    def _streams(self, shape: tuple[int, ...]) -> SampleStreams:
        rows = shape[0] if shape else 0
        if self._batch is None:
            first = self.done_samples + self.rank
            self._batch = self.for_samples(first + self.world_size * np.arange(rows))
        elif len(self._batch) != rows:
            raise ValueError(
                f"a draw of {rows} rows in a batch of {len(self._batch)} samples; "
                "call set_done_samples before a batch of another size"
            )
        return self._batch


def _place_of_this_process() -> tuple[int, int]:
    """Rank and world size."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


# One stream per sample serves both names: it is as independent as the one promises and as small as the other.
DeterministicIndividualGenerator = DeterministicGenerator

GENERATORS = {
    "dummy": DummyGenerator,
    "determ": DeterministicGenerator,
    "determ-indiv": DeterministicIndividualGenerator,
}


def get_generator(
    generator: str, num_samples: int = 0, seed: int = 0, rank: int | None = None, world_size: int | None = None
) -> DummyGenerator | DeterministicGenerator:
    """The generator with this name in `GENERATORS`.

    :raises UserError: if the name is unknown; the message lists the choices.
    """
    return lookup(GENERATORS, generator, "generator")(num_samples, seed, rank, world_size)


def labels_for(indices: Any, seed: int, num_classes: int) -> Tensor:
    """The class of each sample, drawn from its own stream: int64 [N] in 0..num_classes-1.

    :param indices: indices of the samples, integers [N].
    :raises ValueError: if num_classes is below 1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: class labels need at least one class")
    return th.from_numpy((stream_seeds(seed, "label", indices) % np.uint64(num_classes)).astype(np.int64))


def rng_state(device: th.device | str) -> Tensor:
    """The state of torch's random stream on a device, the CPU or one GPU: uint8."""
    device = th.device(device)
    return th.cuda.get_rng_state(device) if device.type == "cuda" else th.get_rng_state()


def set_rng_state(device: th.device | str, state: Tensor) -> None:
    """Restore a state from `rng_state`."""
    device = th.device(device)
    if device.type == "cuda":
        th.cuda.set_rng_state(state, device)
    else:
        th.set_rng_state(state)


def undisturbed(device: th.device | str) -> AbstractContextManager:
    """A context after which torch's random streams are where they were: the CPU's, and that of a GPU if it is one.

    torch's own context would take the streams of all GPUs that it sees, with a warning.
    """
    device = th.device(device)
    return th.random.fork_rng([device] if device.type == "cuda" else [])


class SharedDropout:
    """Every `with` block of one object starts from the same random state, so its networks use the same dropout masks:

        masks = SharedDropout(x.device)
        with masks:
            online = D(x, sigma)
        with masks:
            target = D_target(x_next, sigma_next)

    Afterwards the device's random stream is where the first block left it, so later draws are new even if the later
    networks drew nothing.
    """

    def __init__(self, device: th.device | str):
        self._device = th.device(device)
        self._start: Tensor | None = None                           # where the first block began
        self._resume: Tensor | None = None                          # where to resume after a later block

    def __enter__(self) -> None:
        now = rng_state(self._device)
        if self._start is None:
            self._start = now
        else:
            self._resume = now
            set_rng_state(self._device, self._start)

    def __exit__(self, *exception: Any) -> None:
        if self._resume is not None:
            set_rng_state(self._device, self._resume)

"""Collectives: the ranks exchange objects, sums, arrays, parameters and files.

Every function must be called by all ranks; in a single process it needs no process group and sends nothing.
`cm.distributed.setup` re-exports them, and its `setup_dist` opens the process group that they use.
"""

import mmap
import os
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar, cast

import numpy as np
import torch as th
import torch.distributed as dist
from torch import Tensor

from cm.distributed.launchers import launcher_size
from cm.errors import UserError
from cm.io import storage, torch_files

Result = TypeVar("Result")

MESSAGE_BYTES = 256 * 2**20
"""Bytes of the largest single broadcast: this bounds the copies that messages need, not what can be sent."""
READ_BYTES = 2**20
"""Bytes of a file that are read at a time."""
CPU = th.device("cpu")


LOOKALIKES = {
    b"<!doctype html": "it is a web page, not the file that a link on it leads to",
    b"<html": "it is a web page, not the file that a link on it leads to",
    b"<?xml": "it is an XML text, perhaps a server's error message",
    b"version https://git-lfs": "it is a git-LFS pointer: `git lfs pull` fetches the file it stands for",
}


class Content(mmap.mmap):
    """The bytes of a file in memory, with the file methods that zipfile needs."""

    def seekable(self) -> bool:
        return True


def ranks() -> int:
    """The number of ranks in the process group; 1 for a single process.

    :raises RuntimeError: if this is one of several ranks and the process group has not been opened yet.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    if launcher_size() > 1:
        raise RuntimeError(f"this is one of {launcher_size()} ranks: call dist_util.setup_dist() first")
    return 1


def _on_rank(rank: int) -> bool:
    """Whether this is that rank, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == rank


def barrier() -> None:
    """Wait until every rank has called this."""
    if ranks() > 1:
        dist.all_reduce(th.zeros(1))                # on the CPU, so by gloo, whatever the GPUs are doing


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Send the object of rank `src` to every rank; it must be picklable."""
    if ranks() == 1:
        return obj
    held = [obj if _on_rank(src) else None]
    dist.broadcast_object_list(held, src, device=CPU)
    return obj if _on_rank(src) else held[0]


def all_gather_object(obj: Any) -> list[Any]:
    """The objects of all ranks, in the order of ranks, on every rank."""
    if ranks() == 1:
        return [obj]
    held = [None] * ranks()
    dist.all_gather_object(held, obj)
    return held


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over all ranks; returns it."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its elementwise maximum over all ranks; returns it."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def all_reduce_min(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its elementwise minimum over all ranks; returns it."""
    return _all_reduce(tensor, dist.ReduceOp.MIN)


def _all_reduce(tensor: Tensor, operation: Any) -> Tensor:
    if ranks() > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def gather_to_main(array: np.ndarray) -> list[np.ndarray] | None:
    """Every rank's array in the order of ranks, on rank 0; None elsewhere.

    Shapes and dtypes may differ between ranks. Only rank 0 needs the memory.

    :raises TypeError: for an array of Python objects.
    """
    array = np.require(array, requirements=["C", "W"])    # torch warns of arrays that cannot be written
    if array.dtype.hasobject:
        raise TypeError("gather_to_main sends plain numbers; use all_gather_object for Python objects")
    if ranks() == 1:
        return [array]
    forms = all_gather_object((array.shape, array.dtype.str))
    if not _on_rank(0):
        if array.size:
            dist.send(th.from_numpy(array.reshape(-1).view(np.uint8)), dst=0)
        return None
    gathered = [array, *(np.empty(shape, dtype) for shape, dtype in forms[1:])]
    for rank, part in enumerate(gathered):
        if rank > 0 and part.size:
            dist.recv(th.from_numpy(part.reshape(-1).view(np.uint8)), src=rank)
    return gathered


@th.no_grad()
def gather_tensors(tensors: Sequence[Tensor]) -> list[list[Tensor]] | None:
    """Every rank's tensors in the order of ranks, on rank 0 and its CPU; None elsewhere.

    Ranks may hold different numbers and kinds of them. They are sent one at a time, and keep their strides.
    """
    if ranks() == 1:
        return [[tensor.detach().to(CPU) for tensor in tensors]]
    forms = all_gather_object([(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors])
    if not _on_rank(0):
        for tensor in tensors:
            if tensor.numel():
                dist.send(tensor.detach().to(CPU).reshape(-1).view(th.uint8), dst=0)
        return None
    gathered = [[tensor.detach().to(CPU) for tensor in tensors]]
    for rank, theirs in enumerate(forms[1:], 1):
        gathered.append([th.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in theirs])
        for tensor in gathered[-1]:
            if tensor.numel():
                flat = th.empty(tensor.numel(), dtype=tensor.dtype)
                dist.recv(flat.view(th.uint8), src=rank)
                tensor.copy_(flat.view_as(tensor))
    return gathered


@th.no_grad()
def sync_params(params: Iterable[Tensor], src: int = 0) -> None:
    """Give every rank the values of rank `src`, in place and in few messages."""
    if ranks() == 1:
        return
    for bucket in _buckets(params):
        flat = th.cat([param.detach().reshape(-1) for param in bucket])
        dist.broadcast(flat, src)
        pieces = flat.split([param.numel() for param in bucket])
        for param, piece in zip(bucket, pieces):
            param.detach().copy_(piece.view_as(param))


def _buckets(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype and device, at most MESSAGE_BYTES together unless a single one is larger."""
    bucket, size = [], 0
    for param in params:
        alike = bucket and (param.dtype, param.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and size + param.nbytes <= MESSAGE_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(param)
        size += param.nbytes
    if bucket:
        yield bucket


def on_main(function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`, called on rank 0 only; every rank returns its result or raises its exception.

    The result must be picklable.
    """
    if ranks() == 1:
        return function(*args)
    result = error = None
    if _on_rank(0):
        try:
            result = function(*args)
        except Exception as caught:
            error = caught
    result, received = broadcast_object((result, _portable(error)))
    if error is not None or received is not None:
        raise error or received
    return result


def on_main_arrays(function: Callable[..., Result], *args: Any) -> Result:
    """`on_main` that sends the arrays in the result directly from memory, without the copies of pickling."""
    if ranks() == 1:
        return function(*args)
    made: list[Result] = []
    buffers: list[pickle.PickleBuffer] = []

    def pickled() -> tuple[bytes, list[int]]:
        made.append(function(*args))
        frame = pickle.dumps(made[0], protocol=5, buffer_callback=buffers.append)
        return frame, [buffer.raw().nbytes for buffer in buffers]

    frame, sizes = on_main(pickled)
    own = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
    arrays = own or [np.empty(size, np.uint8) for size in sizes]
    for array in arrays:
        for start in range(0, len(array), MESSAGE_BYTES):
            part = array[start : start + MESSAGE_BYTES]             # torch warns of arrays that cannot be written
            dist.broadcast(th.from_numpy(part if part.flags.writeable else part.copy()), 0)
    return made[0] if made else pickle.loads(frame, buffers=arrays)


def everywhere(function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)` on every rank; if it fails on one, all raise: their own exception, or that of the first."""
    result: Any = None
    error = None
    try:
        result = function(*args)
    except Exception as caught:
        error = caught
    failed = [each for each in all_gather_object(_portable(error)) if each is not None]
    if failed:
        raise error or failed[0]
    return result


def _portable(error: Exception | None) -> Exception | None:
    """The exception, or one with the same message if it cannot be pickled."""
    try:
        same = pickle.loads(pickle.dumps(error))
    except Exception:
        same = None
    return error if type(same) is type(error) else RuntimeError(f"rank 0: {type(error).__name__}: {error}")


def load_state_dict(
    path: str | os.PathLike, map_location: Any = "cpu", expected: Mapping[str, int] | None = None, verify: bool = False,
) -> Any:
    """Load a file of `torch.save` on every rank; only rank 0 reads the file. No code in it is executed.

    :param path: a local path, or a URL that blobfile knows (gs://, az://, https://...blob.core.windows.net).
    :param expected: see `read_everywhere`.
    :param verify: if nothing is expected, compare the parts of the file with its own checksums.
    :raises FileNotFoundError: on every rank, if rank 0 does not find it.
    :raises UserError: on every rank, if it is not such a file, is damaged, or has more than tensors and plain values.
    """
    content = read_everywhere(path, expected)
    stream = cast(IO[bytes], content)               # an mmap has the methods of a file, but not the type
    try:
        return torch_files.load(stream, len(content), map_location, verify and expected is None)
    except th.OutOfMemoryError:
        raise
    except Exception as error:                      # damaged or forged pickles and archives raise many kinds
        why = _kind_of(content) or str(error).strip().split("\n")[0] or "it ends too early"
        raise UserError(
            f"{path} cannot be loaded: {why} ({type(error).__name__}). It must be a file by torch.save that holds "
            "tensors and plain values only; if it should be one, download or write it again"
        ) from error


def _kind_of(content: mmap.mmap) -> str:
    """The kind of a file that is often mistaken for weights, from its first bytes; empty for anything else."""
    start = content[:200].lstrip().lower()
    return next((kind for mark, kind in LOOKALIKES.items() if start.startswith(mark)), "")


def read_everywhere(path: str | os.PathLike, expected: Mapping[str, int] | None = None) -> mmap.mmap:
    """The bytes of a file on every rank, read once by rank 0, as a memory map that torch reads without a copy.

    :param expected: the "size" and "crc32" that a manifest lists for the file, compared with what is read; None if
        they are unknown or are not to be compared.
    :raises UserError: on every rank, if the file is empty, ends too early, or is not the one that the manifest lists.
    """
    read: list[mmap.mmap] = []

    def read_here() -> int:
        read.append(_read(path, expected))
        return len(read[0])

    size = on_main(read_here)
    content = read[0] if read else Content(-1, size)
    if ranks() > 1:
        for part in th.frombuffer(content, dtype=th.uint8).split(MESSAGE_BYTES):
            dist.broadcast(part, 0)
    return content


def _read(path: str | os.PathLike, expected: Mapping[str, int] | None) -> mmap.mmap:
    path = str(path)
    size, source = storage.size(path), storage.open_file(path)
    with source:
        if size == 0:
            raise UserError(f"{path} is empty")
        if expected is not None and size != expected["size"]:
            raise _mismatch(path, f"{size:,} bytes long", f"{expected['size']:,} bytes")
        content = Content(-1, size)
        with ThreadPoolExecutor(1) as beside:               # the checksum of a part is taken while the next is read
            running = beside.submit(int)
            while content.tell() < size and (part := source.read(min(READ_BYTES, size - content.tell()))):
                content.write(part)
                if expected is not None:
                    running = beside.submit(zlib.crc32, part, running.result())
            crc32 = running.result()
    if content.tell() < size:
        raise UserError(f"{path} ended after {content.tell()} of {size} bytes: it is still being written, or damaged")
    if expected is not None and crc32 != expected["crc32"]:
        raise _mismatch(path, f"of CRC-32 {crc32:08x}", f"{expected['crc32']:08x}")
    content.seek(0)
    return content


def _mismatch(path: str, found: str, listed: str) -> UserError:
    return UserError(
        f"{path} is damaged or was replaced: it is {found}, its manifest (checkpoint_*.json) lists {listed}. Copy the "
        "file again or take another checkpoint; --verify_weights False loads it without this check"
    )

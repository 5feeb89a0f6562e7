"""Small data sets in the formats of their makers, written byte by byte here."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np


def py2_string(data: bytes) -> bytes:
    """A `str` of Python 2 in pickle protocol 2."""
    return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data


def py2_int(value: int) -> bytes:
    return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)


def py2_array(array: np.ndarray) -> bytes:
    """A matrix of bytes as numpy under Python 2 pickled it: `_reconstruct(ndarray, (0,), 'b')`, then its state."""
    dtype = (b"cnumpy\ndtype\n" + py2_string(b"u1") + b"K\x00K\x01\x87R"
             + b"(K\x03" + py2_string(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb")
    shape = py2_int(array.shape[0]) + py2_int(array.shape[1]) + b"\x86"
    return (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + py2_string(b"b") + b"\x87R"
            + b"(K\x01" + shape + dtype + b"\x89" + py2_string(array.tobytes()) + b"tb")


def cifar_batch(images: np.ndarray, labels: list[int], name: str) -> bytes:
    """The pickle of a CIFAR-10 batch: images uint8 [n,32,32,3]."""
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    entries = {
        b"batch_label": py2_string(name.encode()),
        b"labels": b"](" + b"".join(map(py2_int, labels)) + b"e",
        b"data": py2_array(rows),
    }
    return b"\x80\x02}(" + b"".join(py2_string(key) + value for key, value in entries.items()) + b"u."


def cifar10(folder: Path, images: np.ndarray, labels: list[int], **replaced: bytes) -> Path:
    """cifar-10-python.tar.gz of images [N,32,32,3] in five batches and a test batch; `replaced` members by name."""
    path = folder / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        parts = [(f"data_batch_{i + 1}", part) for i, part in enumerate(np.array_split(np.arange(len(images)), 5))]
        for name, part in [*parts, ("test_batch", np.arange(2))]:
            data = replaced.get(name) or cifar_batch(images[part], [labels[i] for i in part], name)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def mnist(folder: Path, images: np.ndarray, labels: list[int]) -> Path:
    """The two idx files of images uint8 [N,28,28]; returns that of the images."""
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">iiii", 0x803, *images.shape) + images.tobytes()))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(struct.pack(">ii", 0x801, len(labels)) + bytes(labels))
    )
    return path

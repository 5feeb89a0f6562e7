"""Small files that ask for much: archives that swell, pickles that unfold, and texts that name large networks."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import torch as th

MIB = 2**20


def deflated_zeros(mebibytes):
    """A deflate stream of zeros; made of copies, so at once."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * mebibytes + packer.flush(zlib.Z_FINISH)


def gzip_of(start, mebibytes):
    """A gzip file of some bytes and very many zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + head + deflated_zeros(mebibytes) + struct.pack("<II", 0, 0)


def swelling_zip(names, mebibytes, **sound):
    """A zip whose members `names` swell to so much each."""
    data, directory = io.BytesIO(), []
    packed = deflated_zeros(mebibytes)
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in sound.items():
            archive.writestr(name, content)
        for name in names:
            info = zipfile.ZipInfo(name)
            info.header_offset, info.compress_size, info.file_size = data.tell(), len(packed), mebibytes * MIB
            info.compress_type, info.CRC = zipfile.ZIP_DEFLATED, 0
            data.write(info.FileHeader() + packed)
            directory.append(info)
        archive.start_dir = data.tell()
        archive.filelist += directory
        archive._didModify = True
    return data.getvalue()


def nested_key():
    """A pickle of a dict whose key is a tuple of twice the same tuple, sixty levels deep: its hash has no end."""
    key = ()
    for _ in range(60):
        key = (key, key)
    return b"\x80\x02}" + pickle.dumps(key, 2)[2:-1] + b"K\x01s."


def large_memo():
    """A pickle of ten bytes, for which Python's reader makes a table of four billion places."""
    return b"\x80\x02Nr\xfe\xff\xff\xff."


def torch_zip(pickled, **members):
    """A file by torch.save whose content is another pickle."""
    data = io.BytesIO()
    th.save({"a": th.ones(3)}, data)
    with zipfile.ZipFile(data) as old:
        content = {name: old.read(name) for name in old.namelist()}
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else value)
    return new.getvalue()


class LoadsBytes:
    """Is pickled as a call of what torch reads storages with."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return th.storage._load_from_bytes, (self.data,)


def tar_of(name, mebibytes):
    """The head of a tar archive with a member of so much."""
    info = tarfile.TarInfo(name)
    info.size = mebibytes * MIB
    return info.tobuf()


def sparse(path, size, start=b""):
    """A file of zeros that takes no space on the disk."""
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def overlapping_tensors(count=2000, numbers=250_000):
    """A safetensors file all of whose names share one range of bytes."""
    place = {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}
    header = json.dumps({f"t{number}": place for number in range(count)}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4 * numbers)


def filled_constant(name=b"x", numbers=2 * 10**9):
    """A TensorFlow graph of one float that stands for a constant of 8 GB."""
    def field(number, data):
        return bytes([number << 3 | 2]) + varint(len(data)) + data

    shape = field(2, b"\x08" + varint(numbers))
    tensor = b"\x08\x01" + field(2, shape) + field(5, np.float32(1).tobytes())
    node = field(1, name) + field(2, b"Const") + field(5, field(1, b"value") + field(2, field(8, tensor)))
    return field(1, node)


def varint(number):
    data = b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])

"""safetensors files hold what was written, and damaged ones are refused with a message."""

import json
import struct

import pytest
import torch as th
from safetensors.torch import load_file

from cm.checkpoints.formats import safetensor_files
from cm.errors import UserError
from support.warm import mpi_program


def made_up(header, count):
    """A file with this header, an object or text, and `count` bytes of numbers."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + bytes(count)


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_what_is_written_is_read_with_its_types_and_shapes(tmp_path):
    qkv = th.randn(6, 2)
    tensors = {"a": th.randn(3, 4), "b.half": th.randn(5).half(), "c": th.tensor([[1, -2]]), "d": th.zeros(0, 3),
               "e": th.randn(2, 2).bfloat16(), "f": th.randn(4, 3).double().T, "g": th.tensor(2.5),
               "q": qkv[:2], "k": qkv[2:4], "again": qkv[2:4]}
    path = str(tmp_path / "x.safetensors")
    safetensor_files.write(path, tensors)
    for found in (safetensor_files.read(path), load_file(path)):
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            assert th.equal(found[name], value) and found[name].dtype == value.dtype, name
    safetensor_files.read(path)["a"].zero_()                # the caller's own memory
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


FIRST, SECOND = json.dumps(entry([4], 0, 16)), json.dumps(entry([4], 16, 32))
DAMAGES = {
    "cut": lambda content: content[:-1],
    "cut in the header": lambda content: content[:40],
    "cut in the length": lambda content: content[:4],
    "a longer file": lambda content: content + b"\0",
    "a header of 2^64 bytes": lambda content: b"\xff" * 8 + content[8:],
    "no object": lambda content: content[:8] + b"[" + content[9:],
    "moved": lambda content: content.replace(b"[0,48]", b"[9,57]"),
    "unknown type": lambda content: content.replace(b"F32", b"F31"),
    "another shape": lambda content: content.replace(b"[3,4]", b"[3,5]"),
    "HTML": lambda content: b"<!doctype html><title>404</title>",
    "overlap": lambda content: made_up({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, 24),
    "the same place twice": lambda content: made_up({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, 16),
    "a gap": lambda content: made_up({"a": entry([4], 0, 16), "b": entry([4], 20, 36)}, 36),
    "a negative size": lambda content: made_up({"a": entry([-4], 0, 16)}, 16),
    "4 TiB": lambda content: made_up({"a": entry([2**40], 0, 2**42)}, 16),
    "one name twice": lambda content: made_up(f'{{"a": {FIRST}, "a": {FIRST}}}', 16),
    "one name for two": lambda content: made_up(f'{{"a": {FIRST}, "a": {SECOND}}}', 32),
    "nested": lambda content: made_up("[" * 100_000, 0),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_and_made_up_files_are_refused(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    safetensor_files.write(str(path), {"a": th.randn(3, 4)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"x.safetensors is not a complete safetensors file \([\d,]+ bytes\): .*again"):
        safetensor_files.read(str(path))


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(UserError, match="x.safetensors is empty"):
        safetensor_files.read(str(tmp_path / "x.safetensors"))


@pytest.mark.mpi
def test_only_rank_0_needs_the_file_and_all_ranks_hear_of_damage(tmp_path):
    safetensor_files.write(str(tmp_path / "x.safetensors"), {"a": th.arange(5.0)})
    (tmp_path / "bad.safetensors").write_bytes(b"no such file")
    done = mpi_program(tmp_path, 2, f"""
        from cm.checkpoints.formats import safetensor_files
        from cm.distributed import setup as dist
        from cm.errors import UserError

        def main():
            dist.setup_dist()
            folder = {str(tmp_path)!r} if dist.get_rank() == 0 else "/nowhere"
            found = safetensor_files.read(folder + "/x.safetensors")["a"].tolist()
            try:
                safetensor_files.read(folder + "/bad.safetensors")
            except UserError as error:
                found.append("not a complete safetensors file" in str(error))
            print(found, flush=True)

        dist.run(main)
    """)
    assert done.rc == 0 and done.stdout.count("[0.0, 1.0, 2.0, 3.0, 4.0, True]") == 2, done

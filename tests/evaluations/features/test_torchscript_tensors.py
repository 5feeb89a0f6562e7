"""Tensors of TorchScript files as data: those that torch.jit would load, and files that are made to do harm."""

import io
import pickle
import pickletools
import zipfile
from pathlib import Path

import pytest
import torch as th
from torch import nn

from cm.errors import UserError
from evaluations.features.torchscript import quiet_torchscript
from evaluations.features.torchscript_tensors import is_torchscript, read_extra, read_module_tensors, tensor_names


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("beta", th.arange(4.0))
        self.sizes, self.words = [1, 2], {"a": 1.5}

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.conv(x) + self.beta[None, :, None, None] * self.words["a"] * self.sizes[0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.output = Inner(), nn.Linear(4, 2)
        self.shared = self.output.weight                    # one storage under two names
        self.small = nn.Parameter(th.randn(3, 2).bfloat16())
        self.register_buffer("turned", th.randn(2, 3).T)    # strides of its own
        self.register_buffer("part", th.arange(6)[2:4])     # an offset of its own
        self.register_buffer("count", th.tensor(7))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.output(self.layers(x).mean((2, 3)))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    th.manual_seed(0)
    path = str(tmp_path_factory.mktemp("module") / "net.ts")
    with quiet_torchscript():
        th.jit.save(th.jit.script(Net().eval()), path, _extra_files={"extractor.json": "{}"})
    return path


def test_they_are_those_of_the_state_dict(path):
    with quiet_torchscript():
        expected = th.jit.load(path).state_dict()
    found = read_module_tensors(path)
    assert set(found) == set(expected) == tensor_names(path) and len(found) == 10
    for name, tensor in expected.items():
        assert th.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    assert is_torchscript(path) and read_extra(path, "extractor.json") == b"{}" and read_extra(path, "other") == b""


def with_member(path, out, name, content):
    """A copy of an archive with another content of a member."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for each in old.namelist():
            new.writestr(each, content if each.endswith(f"/{name}") else old.read(each))
    return str(out)


class Calls:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("tree, message", [
    (pickle.dumps(Calls(print, "run"), 2), "asks for __builtin__.print, which"),
    (pickle.dumps(Calls(getattr, "", "format"), 2), "asks for __builtin__.getattr, which"),
    (b"ctorch.jit._pickle\nbuild_intlist\n}X\x01\x00\x00\x00aK\x01sb.", "tries to change _nothing"),
    (b"no pickle", "cannot be read"),
    (b"", "cannot be read"),
    (b"K\x01.", "has no attribute 'state'"),
])
def test_a_hostile_tree_is_refused_and_not_run(path, tmp_path, tree, message, capsys):
    with pytest.raises(UserError, match=f"{message}.*Nothing in it was run"):
        read_module_tensors(with_member(path, tmp_path / "odd.ts", "data.pkl", tree))
    assert capsys.readouterr().out == ""


def tree_of(shape, strides, offset=0, count=8, dtype="FloatStorage", key="0"):
    """The pickle of a module with one tensor, opcode by opcode."""
    class Writer(pickle._Pickler):
        def persistent_id(self, obj):
            return obj[1] if isinstance(obj, tuple) and obj[:1] == ("pid",) else None

    def numbers(values):
        return b"(" + b"".join(pickle.dumps(value, 2)[2:-1] for value in values) + b"t"

    text = pickle.dumps(key, 2)[2:-1]
    storage = b"(X\x07\x00\x00\x00storagectorch\n" + dtype.encode() + b"\n" + text + b"X\x03\x00\x00\x00cpu"
    storage += pickle.dumps(count, 2)[2:-1] + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + pickle.dumps(offset, 2)[2:-1] + numbers(shape)
    tensor += numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    tree = b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00w" + tensor + b"sb."
    pickletools.dis(tree, io.StringIO())
    return tree


def test_a_tree_written_by_hand_is_read(path, tmp_path):
    (name,) = tensor_names(with_member(path, tmp_path / "hand.ts", "data.pkl", tree_of([2], [1], count=2)))
    assert name == "w"


@pytest.mark.parametrize("tree, message", [
    (tree_of([10**6, 10**6], [0, 0]), "1,000,000,000,000 values has a storage of"),    # one value, repeated
    (tree_of([2], [1], offset=10**9), "out of bounds"),
    (tree_of([-2], [1]), "a tensor of shape"),
    (tree_of([2], [-1]), "a tensor of shape"),
    (tree_of([1], [1], count=10**12), "has a storage of"),
    (tree_of([1] * 65, [1] * 65), "a tensor of shape"),
    (tree_of([1], [1], key="../../constants.pkl"), "KeyError|no item named"),
    (tree_of([1], [1], dtype="QInt8Storage"), "asks for torch.QInt8Storage"),
])
def test_a_tensor_that_its_storage_does_not_hold_is_refused(path, tmp_path, tree, message):
    with pytest.raises(UserError, match=message):
        read_module_tensors(with_member(path, tmp_path / "odd.ts", "data.pkl", tree))


def test_a_module_that_stands_in_itself_over_and_over_ends(path, tmp_path):
    tree = b"\x80\x02c__torch__\nM\nq\x00)\x81"
    for level in range(1, 61):                              # each holds the one before twice: 2^60 places
        tree += b"q" + bytes([level]) + b"0h\x00)\x81}(X\x01\x00\x00\x00ah" + bytes([level])
        tree += b"X\x01\x00\x00\x00bh" + bytes([level]) + b"ub"
    with pytest.raises(UserError, match="more than 2,000,000 values"):
        tensor_names(with_member(path, tmp_path / "deep.ts", "data.pkl", tree + b"."))


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.95])
def test_what_is_cut_off_is_no_torchscript(path, tmp_path, keep):
    content = Path(path).read_bytes()
    (tmp_path / "cut.ts").write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    assert not is_torchscript(str(tmp_path / "cut.ts")) and not is_torchscript(str(tmp_path / "missing.ts"))
    with pytest.raises(UserError, match="cannot be read"):
        read_module_tensors(str(tmp_path / "cut.ts"))

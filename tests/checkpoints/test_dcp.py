"""Folders into which several ranks write: read in rows, by torch too, and refused where they are damaged or forged."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch as th
import torch.distributed.checkpoint

from cm.checkpoints import dcp
from cm.checkpoints.dcp import Piece
from cm.errors import UserError

WEIGHT, BIAS, COUNT = th.randn(7, 3), th.randn(4, dtype=th.float64), th.tensor(3.0)


@pytest.fixture
def folder(tmp_path):
    """(folder, facts) of a matrix in three shares, a vector and a number."""
    path = str(tmp_path / "model000001.dcp")
    os.makedirs(path)
    rows = [dcp.write_share(path, rank, {"weight": Piece(WEIGHT[start:start + 3], WEIGHT.shape, start)})
            for rank, start in enumerate((0, 3, 6))]
    rest = dcp.write_share(path, 3, {"bias": Piece(BIAS, BIAS.shape), "count": Piece(COUNT, COUNT.shape)})
    nothing = dcp.write_share(path, 4, {})
    return path, dcp.complete(path, [*rows, rest, nothing])


def test_any_rows_are_those_of_the_whole(folder):
    parts = dcp.open_part(*folder)
    assert {name: stored.shape for name, stored in parts.items()} == {"weight": (7, 3), "bias": (4,), "count": ()}
    for start in range(8):
        for stop in range(8):
            assert th.equal(parts["weight"][start:stop], WEIGHT[start:stop])
    assert all(th.equal(value, {"weight": WEIGHT, "bias": BIAS, "count": COUNT}[key])
               and value.dtype == parts[key].dtype for key, value in dcp.whole(parts))


def test_reading_rows_does_not_read_the_others(folder):
    path, facts = folder
    os.remove(os.path.join(path, "__2_0.distcp"))
    weight = dcp.open_part(path, facts)["weight"]
    assert th.equal(weight[:6], WEIGHT[:6])
    with pytest.raises(FileNotFoundError):
        weight[5:7]


def test_torch_reads_it_too(folder):
    found = {"weight": th.zeros(7, 3), "bias": th.zeros(4, dtype=th.float64), "count": th.zeros(())}
    th.distributed.checkpoint.load(found, checkpoint_id=folder[0], no_dist=True)
    assert th.equal(found["weight"], WEIGHT) and th.equal(found["bias"], BIAS) and th.equal(found["count"], COUNT)


def test_the_pickle_for_torch_is_never_read(folder, tmp_path):
    """A stranger's could run anything."""
    path, facts = folder
    with open(os.path.join(path, ".metadata"), "wb") as file:
        file.write(b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "ran") + b"'\ntR.")
    assert th.equal(dcp.open_part(path, verify=False)["weight"][...], WEIGHT)
    assert ".metadata is truncated or damaged" in dcp.problem(path, facts, True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["__0_0.distcp", "index.json", ".metadata"])
def test_a_damaged_file_is_seen(folder, name):
    path, facts = folder
    assert dcp.problem(path, facts, True) is None
    file = Path(path, name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert dcp.problem(path, facts, False) is None
    assert f"model000001.dcp/{name} is truncated or damaged" in dcp.problem(path, facts, True)
    file.write_bytes(content[:-1])
    assert f"model000001.dcp/{name} is truncated or damaged" in dcp.problem(path, facts, False)
    os.remove(file)
    assert f"model000001.dcp/{name} is missing" in dcp.problem(path, facts, False)


def test_a_flipped_bit_is_seen_while_it_is_read(folder):
    path, facts = folder
    file = Path(path, "__0_0.distcp")
    content = file.read_bytes()
    place = content.index(WEIGHT[:3].numpy().tobytes())
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
    with pytest.raises(UserError, match="__0_0.distcp is damaged: 'weight' in it does not match"):
        dcp.open_part(path, facts)["weight"][:2]
    assert not th.equal(dcp.open_part(path, facts, verify=False)["weight"][:2], WEIGHT[:2])


def test_an_index_that_is_not_the_manifests_is_refused(folder):
    path, facts = folder
    with open(os.path.join(path, "index.json"), "a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="index.json is damaged or was replaced"):
        dcp.open_part(path, facts)
    dcp.open_part(path, facts, verify=False)


FORGED = {
    "rows twice": ("chunks", [[0, 3, 0, 0, 9999, 0]] * 2 + [[3, 4, 0, 0, 9999, 0]], "rows of 'weight' are missing"),
    "rows missing": ("chunks", [[0, 3, 0, 0, 9999, 0]], "rows of 'weight' are missing"),
    "more than its bytes": ("chunks", [[0, 7, 0, 0, 10, 0]], "would be larger than its bytes"),
    "before the file": ("chunks", [[0, 7, 0, -5, 9999, 0]], "is no tensor"),
    "another rank's name": ("chunks", [[0, 7, "../0", 0, 9999, 0]], "is no tensor"),
    "an object": ("dtype", "Generator", "is no tensor"),
    "no list": ("chunks", 5, "is not an index of tensors"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_index_is_refused(folder, name):
    path, _ = folder
    key, value, words = FORGED[name]
    file = Path(path, "index.json")
    content = json.loads(file.read_bytes())
    content["tensors"]["weight"][key] = value
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        dcp.open_part(path)


def test_an_index_cannot_ask_for_more_than_the_file_has(folder):
    path, _ = folder
    file = Path(path, "index.json")
    content = json.loads(file.read_bytes())
    content["tensors"]["weight"] = {"dtype": "float32", "shape": [2**40], "chunks": [[0, 2**40, 0, 0, 2**43, 0]]}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="ends too early"):
        dcp.open_part(path)["weight"][:2]


def test_other_content_than_a_tensor_is_refused(folder):
    path, _ = folder
    data = b"cos\nsystem\n(S'true'\ntR."
    Path(path, "__0_0.distcp").write_bytes(data + bytes(99))
    file = Path(path, "index.json")
    content = json.loads(file.read_bytes())
    content["tensors"] = {"x": {"dtype": "uint8", "shape": [9],
                                "chunks": [[0, 9, 0, 0, len(data), zlib.crc32(data)]]}}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="cannot be loaded"):
        dcp.open_part(path)["x"][...]


def test_a_share_that_rank_0_does_not_see_is_told(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    os.makedirs(elsewhere)
    share = dcp.write_share(str(elsewhere), 1, {"bias": Piece(BIAS, BIAS.shape)})
    with pytest.raises(UserError, match="must lie on a disk that all machines share"):
        dcp.complete(str(tmp_path), [share])


def test_only_what_was_written_is_removed(folder):
    path, _ = folder
    Path(path, "notes.txt").touch()
    dcp.remove(path)
    assert os.listdir(path) == ["notes.txt"]
    os.remove(os.path.join(path, "notes.txt"))
    dcp.remove(path)
    assert not os.path.exists(path)

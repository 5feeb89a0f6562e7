"""What ranks say to each other: on three real ranks, and for a single process that has no process group."""

import io
import types

import numpy as np
import pytest
import torch as th

from cm.distributed import collectives
from cm.distributed import setup as dist
from cm.errors import UserError
from support.warm import mpi_program

CONVERSATION = """
    import numpy as np, os, pytest, sys, zipfile
    import torch as th
    from PIL import Image
    from cm.data import sources
    from cm.distributed import collectives
    from cm.distributed import setup as dist
    from cm.registry import UserError

    class Untransportable(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    def reductions(rank):
        x = th.tensor([rank + 1.0, -rank], dtype=th.float64)
        assert dist.all_reduce_sum(x) is x and x.tolist() == [6, -3]
        y = th.tensor([rank, -rank])
        assert dist.all_reduce_max(y) is y and y.tolist() == [2, 0]
        z = th.tensor([rank, -rank])
        assert dist.all_reduce_min(z) is z and z.tolist() == [0, -2]

    def objects(rank):
        assert dist.broadcast_object({"from": rank}) == {"from": 0}
        assert dist.broadcast_object({"from": rank}, src=2) == {"from": 2}
        assert dist.all_gather_object("x" * rank) == ["", "x", "xx"]

    def arrays(rank):
        # Row counts 5, 0, 2; every kind of number that samples, labels and features come in.
        rows = [5, 0, 2]
        for dtype in (np.uint8, np.bool_, np.float16, np.float32, np.float64, np.int64):
            whole = (np.arange(7 * 6) % 2).astype(dtype).reshape(7, 2, 3)
            start = sum(rows[:rank])
            parts = dist.gather_to_main(whole[start : start + rows[rank]])
            if rank == 0:
                assert [len(part) for part in parts] == rows and all(part.dtype == dtype for part in parts)
                assert np.array_equal(np.concatenate(parts), whole)
            else:
                assert parts is None
        strided = dist.gather_to_main(np.arange(12.0).reshape(3, 4).T[rank : rank + 1] + rank)
        if rank == 0:
            assert np.array_equal(np.concatenate(strided), [[0, 4, 8], [2, 6, 10], [4, 8, 12]])
        with pytest.raises(TypeError, match="all_gather_object"):
            dist.gather_to_main(np.array([object()]))

    def parameters(rank):
        collectives.MESSAGE_BYTES = 64                  # several messages, some for one tensor alone
        shapes = [(3, 4), (2,), (), (5, 2, 4, 4), (1,), (0,), (7,)]
        kinds = [th.float32, th.float32, th.float64, th.float32, th.int64, th.float32, th.float16]
        def fill(seed):
            g = th.Generator().manual_seed(seed)
            made = [(th.randn(shape, generator=g, dtype=th.float64) * 9).to(kind) for shape, kind in zip(shapes, kinds)]
            made[3] = made[3].to(memory_format=th.channels_last)
            return [m.requires_grad_() if m.is_floating_point() else m for m in made]
        params, wanted = fill(rank), fill(0)
        dist.sync_params(iter(params))
        assert all(th.equal(a, b) and a.stride() == b.stride() for a, b in zip(params, wanted))
        assert all(p.requires_grad and p.is_leaf for p in params if p.is_floating_point())

    def main_only(rank):
        calls = []
        assert dist.on_main(lambda a, b: (calls.append(1), a + b)[1], 2, 3) == 5
        assert len(calls) == (rank == 0)
        def fail(error):
            raise error
        for error in (UserError("no such flag"), FileNotFoundError(2, "gone", "x")):
            with pytest.raises(type(error)) as caught:
                dist.on_main(fail, error)
            assert str(caught.value) == str(error)
        def fail_oddly():
            raise Untransportable("this", "that")
        with pytest.raises(Untransportable if rank == 0 else RuntimeError, match="this and that"):
            dist.on_main(fail_oddly)

    def arrays_of_main(rank):
        collectives.MESSAGE_BYTES = 100
        made = {"a": np.arange(1000), "none": np.empty(0), "words": ["x"], "fixed": np.frombuffer(b"1234", np.uint8)}
        made["again"] = made["a"]
        found = collectives.on_main_arrays(lambda: made if rank == 0 else None)
        assert found["a"].tolist() == list(range(1000)) and found["again"] is found["a"]
        assert found["none"].size == 0 and found["words"] == ["x"] and found["fixed"].tobytes() == b"1234"
        assert (found is made) == (rank == 0)
        with pytest.raises(UserError, match="no such set"):
            def fail():
                raise UserError("no such set")
            collectives.on_main_arrays(fail)

    def image_sets(rank, folder):
        # Rank 0 alone looks for the images; the others read them by what it found.
        pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
        names = [f"{'ab'[i % 2]}/{i}.png" for i in range(6)]
        if rank == 0:
            np.savez(folder + "/set.npz", arr_0=pixels, arr_1=np.arange(6))
            with zipfile.ZipFile(folder + "/set.zip", "w") as archive:
                for name, image in zip(names, pixels):
                    os.makedirs(folder + "/set/" + name[0], exist_ok=True)
                    Image.fromarray(image).save(folder + "/set/" + name)
                    archive.write(folder + "/set/" + name, name)
        else:
            sources.open_source = None
        order = [0, 2, 4, 1, 3, 5]                      # a before b
        for name, expected in (("set.npz", range(6)), ("set.zip", order), ("set", order)):
            source = sources.open_everywhere(f"{folder}/{name}", 8)
            assert (source.images(np.arange(6)) == pixels[list(expected)]).all()
            assert source.labels.tolist() == ([*range(6)] if name == "set.npz" else [0, 0, 0, 1, 1, 1])
        with pytest.raises(UserError, match="set.tar.gz does not exist"):
            sources.open_everywhere(folder + "/set.tar.gz", 8)

    def files(rank, folder):
        collectives.MESSAGE_BYTES = 1000
        state = {"weight": th.arange(3000.0), "step": 7, "name": "x"}
        dist.on_main(th.save, state, folder + "/good.pt")
        if rank == 0:
            opened = []
            real = collectives._read
            collectives._read = lambda path, expected: (opened.append(path), real(path, expected))[1]
        else:
            collectives._read = None                    # only rank 0 may touch the file
        loaded = dist.load_state_dict(folder + "/good.pt", map_location="cpu")
        assert th.equal(loaded["weight"], state["weight"]) and loaded["step"] == 7
        if rank == 0:
            assert opened == [folder + "/good.pt"]
        with pytest.raises(FileNotFoundError, match="missing.pt"):
            dist.load_state_dict(folder + "/missing.pt")

    def main():
        dist.setup_dist(timeout_s=30)
        dist.setup_dist()
        rank = dist.get_rank()
        assert dist.get_world_size() == 3 and dist.is_main() == (rank == 0)
        assert dist.get_local_rank() == rank and str(dist.dev()) == "cpu"
        for talk in (reductions, objects, arrays, parameters, main_only, arrays_of_main):
            talk(rank)
            dist.barrier()
        image_sets(rank, sys.argv[0].rpartition("/")[0])
        files(rank, sys.argv[0].rpartition("/")[0])
        print(f"rank {rank} is content", flush=True)

    dist.run(main)
"""


@pytest.mark.mpi
def test_three_ranks_understand_each_other(tmp_path):
    finished = mpi_program(tmp_path, 3, CONVERSATION)
    assert finished.rc == 0, finished
    assert sorted(finished.stdout.split("\n"))[1:] == [f"rank {rank} is content" for rank in range(3)], finished


def test_a_single_process_talks_to_itself():
    x = th.tensor([1.0, 2.0])
    assert dist.all_reduce_sum(x) is x and dist.all_reduce_max(x) is x and dist.all_reduce_min(x) is x
    assert x.tolist() == [1, 2]
    item = object()
    assert dist.broadcast_object(item) is item and dist.all_gather_object(item) == [item]
    assert np.array_equal(dist.gather_to_main(np.arange(3))[0], [0, 1, 2])
    assert dist.on_main(divmod, 7, 2) == (3, 1)
    dist.sync_params([x])
    dist.barrier()
    assert not th.distributed.is_initialized()


def test_ranks_that_have_not_met_do_not_take_themselves_for_the_whole_job(monkeypatch):
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(RuntimeError, match="one of 4 ranks: call dist_util.setup_dist"):
        collectives.all_reduce_sum(th.ones(1))


@pytest.mark.parametrize("zipped", [True, False], ids=["new format", "old format"])
def test_a_state_dict_is_loaded(tmp_path, zipped):
    state = {"a": th.randn(4, 5), "b": th.ones(2, dtype=th.float16), "step": 3}
    th.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    loaded = dist.load_state_dict(tmp_path / "x.pt")
    assert loaded["step"] == 3 and all(th.equal(loaded[key], state[key]) for key in "ab")


def test_a_loaded_state_dict_can_be_written_to(tmp_path):
    th.save({"a": th.zeros(3)}, tmp_path / "x.pt")
    loaded = dist.load_state_dict(str(tmp_path / "x.pt"))
    loaded["a"] += 1
    assert loaded["a"].tolist() == [1, 1, 1]
    assert dist.load_state_dict(str(tmp_path / "x.pt"))["a"].tolist() == [0, 0, 0]


def truncated() -> bytes:
    file = io.BytesIO()
    th.save({"a": th.randn(1000)}, file)
    return file.getvalue()[:-200]


def code() -> bytes:
    file = io.BytesIO()
    th.save({"a": th.device, "b": io.BytesIO}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"version https://git-lfs", truncated(), code()],
    ids=["empty", "html", "lfs", "truncated", "code"],
)
def test_a_file_that_cannot_be_loaded_is_named(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(UserError, match="bad.pt"):
        dist.load_state_dict(str(tmp_path / "bad.pt"))


def test_urls_are_read_through_blobfile(tmp_path, monkeypatch):
    blobfile = pytest.importorskip("blobfile", reason="no blobfile, through which URLs are read")
    th.save({"a": th.ones(3)}, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    monkeypatch.setattr(blobfile, "stat", lambda path: types.SimpleNamespace(size=len(content)))
    monkeypatch.setattr(blobfile, "BlobFile", lambda path, mode, **_: io.BytesIO(content))
    assert dist.load_state_dict("gs://bucket/x.pt")["a"].tolist() == [1, 1, 1]
    monkeypatch.setattr(blobfile, "BlobFile", lambda path, mode, **_: io.BytesIO(content[:-1]))
    with pytest.raises(UserError, match=f"ended after {len(content) - 1} of {len(content)} bytes"):
        dist.load_state_dict("gs://bucket/x.pt")

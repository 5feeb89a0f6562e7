"""Inception's published files: found in the cache, downloaded, refused when they are not the expected file.

The files are stand-ins, served by a real web server on this machine.
"""

import functools
import hashlib
import http.server
import threading
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch as th
from torch import nn

from cm.errors import UserError
from cm.io.downloads import WeightFile, path_of
from evaluations.evaluator import evaluate
from evaluations.features import inception_files as inception_files
from evaluations.features import load_extractor, save_torchscript
from evaluations.features.inception_files import FILES, GRAPH, PYTORCH_FID, find_weights
from support.warm import mpi_program

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """torch.hub's folder for files of weights, empty, and no word of another extractor."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("CM_INCEPTION", raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def no_network(monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", urlopen)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.asked.append(self.path)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "weights-here.pth").write_bytes(CONTENT)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def served(server, monkeypatch):
    """A file that `torch` is made of, of any hash."""
    def serve(prefix, name="weights-here.pth"):
        file = WeightFile(name, f"http://127.0.0.1:{server.server_port}/{name}", prefix)
        monkeypatch.setitem(FILES, "torch", (file, GRAPH))
        server.asked.clear()
        return file

    return serve


def test_a_missing_file_is_downloaded_once(cache, server, served):
    served(SHA256[:8])
    path = find_weights("torch")
    assert Path(path) == cache / "weights-here.pth" and Path(path).read_bytes() == CONTENT
    assert find_weights("torch") == path and len(server.asked) == 1
    assert [each.name for each in cache.iterdir()] == ["weights-here.pth"]


def test_a_download_of_another_hash_is_refused_and_leaves_nothing(cache, served):
    file = served("0000")
    with pytest.raises(UserError, match="weights-here.pth cannot be downloaded .*invalid hash value") as refusal:
        find_weights("torch")
    assert f"{file.url} -> {path_of(file)}" in str(refusal.value) and list(cache.iterdir()) == []


def test_a_file_that_the_server_does_not_have(served, cache):
    served(None, "gone.pth")
    with pytest.raises(UserError, match="gone.pth cannot be downloaded .*404"):
        find_weights("torch")


def test_a_file_in_the_cache_of_another_hash_is_refused(cache, no_network):
    cache.mkdir(parents=True)
    (cache / PYTORCH_FID.name).write_bytes(CONTENT[:100])   # half a download of another program
    with pytest.raises(UserError, match="is not the published file: its SHA-256 does not begin with 6726825d.*Delete"):
        load_extractor("torch")


def test_files_of_other_programs_serve(cache, no_network):
    """In the order of the table; TensorFlow's graph serves both."""
    cache.mkdir(parents=True)
    (cache / GRAPH.name).write_bytes(CONTENT)
    assert find_weights("torch") == find_weights("tf") == str(cache / GRAPH.name)
    (cache / "inception-2015-12-05.pt").write_bytes(CONTENT)
    assert find_weights("torch") == str(cache / "inception-2015-12-05.pt")
    assert find_weights("tf") == str(cache / GRAPH.name)


@pytest.mark.parametrize("kind", FILES)
def test_without_a_network_every_file_and_its_place_is_named(kind, cache, no_network):
    with pytest.raises(UserError, match="Name or service not known") as refusal:
        load_extractor(kind)
    for file in FILES[kind]:
        assert f"{file.url} -> {cache / file.name}" in str(refusal.value)
    assert "--inception PATH or CM_INCEPTION=PATH" in str(refusal.value)


class Colours(nn.Module):
    def forward(self, images: th.Tensor) -> th.Tensor:
        return images.float().mean((2, 3))


def test_the_flag_goes_before_the_variable_and_that_before_the_cache(tmp_path, monkeypatch, no_network):
    for name in ("flag", "variable"):
        save_torchscript(Colours(), f"{tmp_path}/{name}.ts", name, "none")
    monkeypatch.setenv("CM_INCEPTION", f"{tmp_path}/variable.ts")
    assert load_extractor(f"{tmp_path}/flag.ts", trusted=True).name == "flag"
    assert load_extractor(trusted=True).name == "variable"
    monkeypatch.delenv("CM_INCEPTION")
    with pytest.raises(UserError, match="pt_inception-2015-12-05-6726825d.pth cannot be downloaded"):
        load_extractor()


@pytest.mark.parametrize("recorded, wanted", [("torch-0123", PYTORCH_FID), ("tf-0123", GRAPH)])
def test_the_evaluator_takes_the_kind_that_the_reference_names(recorded, wanted, tmp_path, no_network):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32), extractor=recorded)
    np.savez(tmp_path / "sample.npz", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=f"{wanted.name} cannot be downloaded"):
        evaluate(tmp_path / "ref.npz", tmp_path / "sample.npz", metrics=["fid"])


def test_published_hashes_stand_in_the_names():
    for file in {file for files in FILES.values() for file in files}:
        assert file.url.startswith("https://") and file.url.endswith(f"/{file.name}")
        assert file.sha256_prefix is None or f"-{file.sha256_prefix}." in file.name
    assert inception_files.FILES["tf"] == (GRAPH,)


@pytest.mark.mpi
def test_two_ranks_download_once(tmp_path, cache, server):
    server.asked.clear()
    done = mpi_program(tmp_path, 2, f"""
        from cm.distributed import setup as dist
        from cm.io.downloads import WeightFile
        from evaluations.features.inception_files import FILES, find_weights

        def main():
            dist.setup_dist()
            FILES["torch"] = (WeightFile("weights-here.pth", "http://127.0.0.1:{server.server_port}/weights-here.pth",
                                         "{SHA256}"),)
            paths = dist.all_gather_object(find_weights("torch"))
            assert paths == ["{cache}/weights-here.pth"] * 2, paths
            FILES["torch"] = (WeightFile("gone.pth", "http://127.0.0.1:{server.server_port}/gone.pth", None),)
            find_weights("torch")

        dist.run(main)
        """)
    assert done.rc == 2 and "error: no weights of Inception-v3 were found" in done.stderr, done
    assert server.asked.count("/weights-here.pth") == 1

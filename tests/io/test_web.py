"""Files by address: downloaded once, whole, of the right hash and size, from a real web server on this machine."""

import hashlib
import http.server
import os
import threading
import time

import pytest

from cm.config.flags import parse
from cm.config.sampling_schema import SampleConfig
from cm.config.schema import RunConfig
from cm.errors import UserError
from cm.io import web
from cm.setup.weights_path import fetch_inputs

CONTENT = bytes(range(256)) * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT under any name but those that begin with the way in which they go wrong."""

    def do_GET(self):
        self.server.asked.append(self.path)
        name = os.path.basename(self.path)
        if name.startswith("gone"):
            return self.send_error(404)
        self.send_response(200)
        if not name.startswith("endless"):
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if name.startswith("slow"):
            time.sleep(1)
        self.wfile.write(CONTENT[:1000] if name.startswith("short") else CONTENT)
        return None

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def address(server, tmp_path, monkeypatch):
    """From a name to its address; the cache is empty."""
    monkeypatch.setenv("CM_CACHE", str(tmp_path / "cache"))
    server.asked.clear()
    return lambda name: f"http://127.0.0.1:{server.server_port}/folder/{name}"


def left(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock")


def test_a_file_is_downloaded_once_and_its_hash_is_told(address, server, tmp_path):
    said = []
    path = web.local_copy(address("model.pkl"), said.append)
    assert path.endswith("/model.pkl") and path.startswith(str(tmp_path))
    with open(path, "rb") as file:
        assert file.read() == CONTENT
    assert web.local_copy(address(f"model.pkl#sha256={SHA256}"), said.append) == path
    assert server.asked == ["/folder/model.pkl"] and len(said) == 1 and f"#sha256={SHA256}" in said[0]
    os.truncate(path, 10)                                           # damaged: fetched again
    web.local_copy(address("model.pkl"), said.append)
    assert len(server.asked) == 2 and os.path.getsize(path) == len(CONTENT)


def test_another_file_than_the_one_that_was_meant(address):
    with pytest.raises(UserError, match=f"has the SHA-256 {SHA256}, not 00000000...: it is not the expected file"):
        web.local_copy(address("model.pkl#sha256=00000000"), print)
    with pytest.raises(UserError, match="what follows # must be sha256= and at least 8"):
        web.local_copy(address("model.pkl#sha256=00"), print)


@pytest.mark.parametrize("name, options, message", [
    ("gone.npz", {}, "cannot be downloaded .status 404"),
    ("slow.npz", {"timeout_s": 0.2}, "cannot be downloaded .*timed out"),
    ("short.npz", {}, "ended after 1,000 of 25600 bytes|IncompleteRead"),
    ("large.npz", {"limit": 1000}, "has 25,600 bytes; the limit is 1,000"),
    ("endless.npz", {"limit": 1000}, "sends more than the limit of 1,000 bytes"),
])
def test_what_goes_wrong_is_one_error_and_leaves_nothing(name, options, message, address, tmp_path):
    with pytest.raises(UserError, match=message):
        web.local_copy(address(name), print, **options)
    assert left(tmp_path) == []


def test_no_server():
    with pytest.raises(UserError, match="cannot be downloaded .*refused"):
        web.local_copy("http://127.0.0.1:9/x", print)


def test_which_paths_are_addresses():
    assert web.is_address("https://host/x.pkl") and web.is_address("HTTP://host/x")
    for path in ("runs/x.pt", "az://account/x", "https://openaipublic.blob.core.windows.net/x.npz", "", "https"):
        assert not web.is_address(path)
    with pytest.raises(UserError, match="anybody on the network can change a download over plain http"):
        web.local_copy("http://example.org/x.pkl", print)


def test_flags_name_the_copies(address):
    settings = parse("", SampleConfig, RunConfig, argv=["--model_path", address("model.pkl")])
    fetch_inputs(settings, "model_path", "log_dir")
    assert settings.values["model_path"].endswith("/model.pkl") and os.path.exists(settings.values["model_path"])
    dry = parse("", SampleConfig, RunConfig, argv=["--model_path", address("other.pkl"), "--dry_run"])
    fetch_inputs(dry, "model_path")
    assert dry.values["model_path"] == address("other.pkl")

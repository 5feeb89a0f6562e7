"""Strangers' TorchScript: nothing of it runs before the user has named it, on any command; the word, and the list."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch as th
from torch import Tensor, nn

from cm.config.flags import Origin, Provenance, Settings
from cm.errors import UserError
from cm.setup.run import trusts_extractor
from evaluations import evaluator, fid, th_evaluator
from evaluations.features import TorchScriptExtractor, load_extractor, save_torchscript
from evaluations.features.classifier import Classifier
from evaluations.features.torchscript import quiet_torchscript
from evaluations.features.trust import list_of_hashes, trusted_hashes
from evaluations.in_training import open_metric

VICTIM = b"a month of work"
WITH_THE_WORD = Settings(
    {"trust_extractor": True}, {"trust_extractor": Origin(Provenance.COMMAND_LINE, "--trust_extractor")}
)


@pytest.fixture
def victim(tmp_path):
    (tmp_path / "victim").write_bytes(VICTIM)
    return tmp_path / "victim"


@pytest.fixture
def hostile(tmp_path, victim):
    """A module that overwrites the victim when it is loaded, and again when it is called."""

    class Hostile(nn.Module):
        def __init__(self, path: str):
            super().__init__()
            self.path = path
            self.zeros = th.zeros(1)

        @th.jit.export
        def __getstate__(self) -> tuple[str, bool]:
            return self.path, self.training

        @th.jit.export
        def __setstate__(self, state: tuple[str, bool]) -> None:
            self.path, self.training = state
            self.zeros = th.from_file(self.path, shared=True, size=4, dtype=th.uint8).zero_()

        def forward(self, images: Tensor) -> Tensor:
            zeros = th.from_file(self.path, shared=True, size=8, dtype=th.uint8).zero_()
            return images.float().mean((2, 3)) + zeros.sum()

    with quiet_torchscript():
        th.jit.save(th.jit.script(Hostile(str(victim))), str(tmp_path / "net.ts"))
    victim.write_bytes(VICTIM)
    return tmp_path / "net.ts"


@pytest.fixture(autouse=True)
def trusted_list(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CM_INCEPTION", raising=False)
    return list_of_hashes()


@pytest.fixture
def sets(tmp_path):
    np.savez(tmp_path / "set.npz", arr_0=np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))
    return str(tmp_path / "set.npz")


def test_the_attack_works_on_those_who_trust_it(hostile, victim):
    extractor = load_extractor(str(hostile), trusted=True)
    assert victim.read_bytes() == bytes(4) + VICTIM[4:]
    extractor.extract(np.zeros((1, 8, 8, 3), np.uint8))
    assert victim.read_bytes() == bytes(8) + VICTIM[8:]


@pytest.mark.parametrize("spec", ["{}", "torchscript:{}", "torch:{}"])
def test_nothing_runs_before_the_word(hostile, victim, spec, monkeypatch):
    monkeypatch.setattr(th.jit, "load", None)               # calling it would be a TypeError
    with pytest.raises(UserError) as refusal:
        load_extractor(spec.format(hostile))
    assert victim.read_bytes() == VICTIM
    if not spec.startswith("torch:"):
        words = (hashlib.sha256(hostile.read_bytes()).hexdigest(), "--trust_extractor", str(list_of_hashes()),
                 "can read and write your files, and it was not run")
        assert all(word in str(refusal.value) for word in words)
    with pytest.raises(UserError, match="--trust_extractor"):
        TorchScriptExtractor(str(hostile))


@pytest.mark.parametrize("main, arguments", [
    (evaluator.main, ["{set}", "{set}", "--cache", "off"]),
    (th_evaluator.main, ["{set}", "{set}", "--cache", "off"]),
    (fid.main, ["calc", "--images", "{set}", "--ref", "{set}", "--num", "6", "--cache", "off"]),
    (fid.main, ["ref", "--data", "{set}", "--dest", "{set}.ref.npz"]),
])
@pytest.mark.parametrize("by", ["flag", "environment"])
def test_every_evaluation_command_asks_for_it(hostile, victim, sets, main, arguments, by, monkeypatch):
    flags = [each.format(set=sets) for each in arguments]
    if by == "flag":
        flags += ["--inception", str(hostile)]
    else:
        monkeypatch.setenv("CM_INCEPTION", str(hostile))
    with pytest.raises(UserError, match="--trust_extractor"):
        main(flags)
    assert victim.read_bytes() == VICTIM and not Path(f"{sets}.ref.npz").exists()
    main([*flags, "--trust_extractor"])
    assert victim.read_bytes() != VICTIM


def test_training_asks_for_it(hostile, victim, sets):
    with pytest.raises(UserError, match="was not run.*--trust_extractor"):
        open_metric(sets, str(hostile), 8, 4, 6)
    assert victim.read_bytes() == VICTIM
    open_metric(sets, str(hostile), 8, 4, 6, trusts_extractor(WITH_THE_WORD))
    assert victim.read_bytes() != VICTIM


def test_the_word_counts_on_the_command_line_only():
    assert trusts_extractor(WITH_THE_WORD) and not trusts_extractor(Settings({"trust_extractor": False}, {}))
    from_file = Settings({"trust_extractor": True}, {"trust_extractor": Origin(Provenance.FILE, "run.yaml")})
    with pytest.raises(UserError, match="run.yaml sets trust_extractor, which counts on the command line only"):
        trusts_extractor(from_file)


# --- the list --------------------------------------------------------------------------------------------------------


def test_a_hash_in_the_list_is_the_word_for_that_file_alone(hostile, victim, trusted_list):
    trusted_list.parent.mkdir(parents=True)
    trusted_list.write_text(f"# extractors\n\n{hashlib.sha256(hostile.read_bytes()).hexdigest()}  {hostile}\n")
    load_extractor(str(hostile))
    assert victim.read_bytes() != VICTIM
    victim.write_bytes(VICTIM)
    hostile.write_bytes(hostile.read_bytes() + b"\0")       # another file under the trusted name
    with pytest.raises(UserError, match="--trust_extractor"):
        load_extractor(str(hostile))
    assert victim.read_bytes() == VICTIM


@pytest.mark.parametrize("text", ["net.ts", "0" * 63, f"{'0' * 64}x", "0" * (2**20 + 1)])
def test_a_damaged_list_is_an_error(trusted_list, text):
    trusted_list.parent.mkdir(parents=True)
    trusted_list.write_text(text)
    with pytest.raises(UserError, match="trusted_extractors.*(line 1: .* does not begin with a SHA-256|more than)"):
        trusted_hashes()


# --- what needs no word ----------------------------------------------------------------------------------------------


def test_the_toolkits_own_classifier_is_read_and_not_run(tmp_path, monkeypatch):
    th.manual_seed(0)
    model = Classifier(3, width=8).eval()
    save_torchscript(model, f"{tmp_path}/classifier.ts", "bars", "none")
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    with quiet_torchscript():
        scripted = th.jit.load(f"{tmp_path}/classifier.ts")
    monkeypatch.setattr(th.jit, "load", None)
    read = load_extractor(f"{tmp_path}/classifier.ts")
    assert isinstance(read, TorchScriptExtractor) and isinstance(read.module, Classifier) and read.name == "bars"
    found = read.extract(images)
    for ours, theirs in zip((found.pool, found.logits), scripted(th.from_numpy(images).permute(0, 3, 1, 2))):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_who_only_claims_to_be_the_classifier_is_not_run_either(hostile, victim, tmp_path):
    with quiet_torchscript():
        module = th.jit.load(str(hostile))
        extra = {"extractor.json": '{"network": "classifier"}'}
        th.jit.save(module, f"{tmp_path}/claims.ts", _extra_files=extra)
    victim.write_bytes(VICTIM)
    with pytest.raises(UserError, match="does not hold a classifier of scripts/classifier_train.py"):
        load_extractor(f"{tmp_path}/claims.ts")
    assert victim.read_bytes() == VICTIM

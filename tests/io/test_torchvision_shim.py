"""torchvision beside a PyTorch without CUDA: a healthy one is left alone, and only that very error is mended."""

import sys

import pytest

from cm.io import torchvision_shim


@pytest.fixture
def fake_torchvision(tmp_path, monkeypatch):
    """Write a torchvision of one file, which the next import finds; the real one comes back afterwards."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    declared = []
    monkeypatch.setattr(torchvision_shim, "declare_operators", lambda: declared.append(True))
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> list:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(source)
        (tmp_path / "torchvision" / "part.py").write_text("")
        return declared

    yield write
    torchvision_shim.forget_half_imported()


def test_a_healthy_torchvision_is_left_alone(fake_torchvision):
    declared = fake_torchvision("healthy = True")
    torchvision_shim.import_torchvision()
    assert sys.modules["torchvision"].healthy and declared == []


def test_only_that_very_error_is_mended(fake_torchvision):
    declared = fake_torchvision("raise RuntimeError('the disk is on fire')")
    with pytest.raises(RuntimeError, match="on fire"):
        torchvision_shim.import_torchvision()
    assert declared == []


def test_the_error_is_mended_by_declaring_and_importing_anew(fake_torchvision, tmp_path):
    declared = fake_torchvision(
        "import os\n"
        "import torchvision.part\n"
        f"if not os.path.exists({str(tmp_path / 'declared')!r}):\n"
        f"    open({str(tmp_path / 'declared')!r}, 'w').close()\n"
        f"    raise RuntimeError({torchvision_shim.MISSING!r})\n"
        "fresh = not hasattr(torchvision.part, 'seen')\n"
        "torchvision.part.seen = True\n"
    )
    torchvision_shim.import_torchvision()
    assert declared == [True] and sys.modules["torchvision"].fresh

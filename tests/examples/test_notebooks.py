"""The notebooks of examples/ run as they stand, one after the other, with fewer steps and images of training."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from cm.logging import logger

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
FEWER = {"teacher_steps": 3, "student_steps": 2, "batch": 16}


def cells(path, kind="code"):
    """Tags and text of the cells of a kind."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [(cell["metadata"].get("tags", []), "".join(cell["source"])) for cell in content["cells"]
            if cell["cell_type"] == kind]


def execute(path, **parameters):
    """Run the code of a notebook in this process; returns its names and what it printed."""
    names, printed = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, (tags, text) in enumerate(cells(path)):
            exec(compile(text, f"{path.name}, cell {number}", "exec"), names)
            if "parameters" in tags:
                names |= parameters
    return names, printed.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder in which training.ipynb has run, its names, and what it printed."""
    folder = tmp_path_factory.mktemp("notebooks")
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else pytest.MonkeyPatch.context() as patch:
        if patch is not None:
            patch.chdir(folder)
        with logger.scoped_configure(str(folder / "log"), format_strs=[]):
            return folder, *execute(EXAMPLES / "training.ipynb", **FEWER)


def test_training(trained):
    folder, names, printed = trained
    assert names["teacher"].few_steps is False and names["student"].few_steps is True
    assert names["student"].config["num_channels"] == 32 and len(names["images"]) == 16
    assert "finished: True" in printed and (folder / "runs/ect/progress.csv").exists()


def test_sampling_and_editing(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    names, printed = execute(EXAMPLES / "sampling_and_editing.ipynb")
    assert "<Pipeline" in printed and names["array"].shape == (4, 8, 8, 1)
    assert {path.name for path in (trained[0] / "model_for_a_hub").iterdir()} == {
        "model.safetensors", "config.json", "README.md", "samples.png"}


def test_the_same_call_trains_no_more(trained, monkeypatch):
    import cm

    monkeypatch.chdir(trained[0])
    before = sorted(path.name for path in Path("runs/edm").glob("*.pt"))
    names = trained[1]
    cm.train("runs/edm", total_training_steps=FEWER["teacher_steps"], **names["network"], **names["run"])
    assert sorted(path.name for path in Path("runs/edm").glob("*.pt")) == before


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_results(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and content["cells"][0]["cell_type"] == "markdown"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in content["cells"])
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])

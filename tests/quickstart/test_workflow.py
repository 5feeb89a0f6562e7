"""The one command from images to a few-step generator: its stages, going on, and what it says.

The commands run in this process; that they run on their own, and on ranks, is what the tests of the demo and of each
command show.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from cm.config.flags import parse, resolve
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.quickstart import measure, stages, workflow
from cm.quickstart.look import look
from cm.quickstart.plan import Machine, Speed, Wish, make_plan
from cm.setup import rules
from cm.setup.data import open_data
from cm.setup.model import model_from
from evaluations.features import save_torchscript
from evaluations.features.classifier import Classifier
from support import in_process
from support.as_module import as_module
from support.photos import cifar_zip, grey_folder, mixed_folder

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = as_module(ROOT / "scripts" / "quickstart.py")
TINY = ["--hours", "1", "--image_size", "8", "--max_steps", "4", "--num_samples", "6",
        "--train_options", "--sample_interval 0"]


def quickstart(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["quickstart.py", *map(str, words)])
        flags = QUICKSTART.read_flags()
    QUICKSTART.main(flags)


@pytest.fixture
def started(monkeypatch):
    """The commands that were started, in this process."""
    commands = []

    def run(command, **variables):
        commands.append(command)
        return in_process.execute(command, **variables)

    for module in (stages, workflow):
        monkeypatch.setattr(module, "execute", run)
    monkeypatch.setattr(measure, "STEPS", 1)
    monkeypatch.setattr(measure, "BATCHES", (32, 32, 64))
    return commands


def test_from_photos_to_the_table_the_picture_and_the_report(started, tmp_path, capsys):
    out, photos = tmp_path / "out", mixed_folder(tmp_path / "My photos")
    order = ["--data_dir", photos, *TINY, "--out", out]

    quickstart(*order, "--plan")
    text = capsys.readouterr().out
    assert len(started) == 1, "nothing but the measuring"
    assert f"60 images in {photos} (all opened)" in text and "classes: 3, from sub-folders: Aunt Mary 20" in text
    assert "network: tiny, " in text and "student: ECT, 4 steps; the teacher has " in text
    assert "memory of a rank: about " in text and " of 1 h 00 min\n    looking and measuring: " in text
    assert text.count(" --config ") == 2 and "Start the same command again with --inception FILE" in text
    for name in ("teacher", "student"):                     # a file for --config
        assert parse("", *TRAINING_SECTIONS, argv=["--config", str(out / f"{name}.yaml")]).values["image_size"]

    quickstart(*order)
    text = capsys.readouterr().out
    assert [Path(words[1]).stem for words in started[1:]] == [
        "edm_train", "cm_train", "image_sample", "image_sample", "image_sample", "report"]
    assert "The plan of an earlier start" in text and "\nEDM teacher, Heun 18  35 " in text
    assert "\nECT, one step         1 " in text and "\nECT, two steps        2 " in text
    assert "Left out: no Frechet distance" in text and "cm-classifier --data_dir '" in text
    assert (out / "report.html").stat().st_size > 1000
    with Image.open(out / "samples.png") as picture:
        assert picture.height > 4 * 64
    with np.load(out / "samples_onestep" / "samples_6x8x8x3.npz") as one:
        assert one["arr_0"].shape == (6, 8, 8, 3) and set(one["arr_1"]) <= {0, 1, 2}
    model = json.loads((out / "samples_onestep" / "config.json").read_text())["model_path"]
    assert "ema_500kimg_000004.pt" in model or Path(model) == out / "student"

    (out / "student" / "finished").unlink()                 # interrupted: it resumes, the others are reused
    started.clear()
    save_torchscript(Classifier(3).eval(), str(tmp_path / "features.ts"), "test", "none")
    quickstart(*order, "--inception", tmp_path / "features.ts")
    text = capsys.readouterr().out
    assert [Path(words[2 if words[1] == "-m" else 1]).stem for words in started] == ["cm_train"] + 3 * ["evaluations"]
    assert "[training student] resuming" in text and "[training teacher] reusing" in text
    assert "Frechet distance*" in text and "* in the features of " in text and "Left out" not in text
    quickstart(*order)
    assert "* in the features of " in capsys.readouterr().out, "the numbers are there, so they are shown"
    with pytest.raises(UserError, match="was evaluated with .*features.ts: give the same --inception"):
        quickstart(*order, "--inception", photos / "the dog" / "IMG 001.jpg")


@pytest.mark.parametrize("change, words", [
    (["--hours", "2"], "--hours 1.0 instead of 2.0"), (["--method", "cd"], "--method ect instead of cd"),
    (["--ranks", "2"], "--ranks 0 instead of 2"),
])
def test_another_order_in_the_same_folder_is_refused(tmp_path, change, words):
    out = tmp_path / "out"
    out.mkdir()
    first = order_of(["--data_dir", "digits", "--hours", "1", "--out", out])
    (out / "plan.json").write_text(json.dumps({"order": first.remembered()}))
    workflow.Workflow(first)
    flags = dict(zip(["--data_dir", "--hours", "--out"], ["digits", "1", out])) | dict([change])
    with pytest.raises(UserError, match=f"was started with other flags \\({words}\\).*another --out"):
        workflow.Workflow(order_of([word for pair in flags.items() for word in pair]))
    for text in ("{", "[]", json.dumps({"order": first.remembered(), "found": {"images": 3}})):
        (out / "plan.json").write_text(text)
        with pytest.raises(UserError, match="plan.json is damaged: remove it to plan again"):
            workflow.Workflow(first).prepare()


def order_of(words):
    """What the script would order."""
    orders = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "Workflow", lambda order: orders.append(order) or pytest.fail("stop"))
        with pytest.raises(pytest.fail.Exception):
            quickstart(*words)
    return orders[0]


def test_mistakes_are_found_before_the_work(tmp_path):
    with pytest.raises(UserError, match="--inception nowhere.ts: there is no such file"):
        workflow.Workflow(order_of(["--data_dir", "digits", "--hours", 1, "--out", tmp_path / "o", "--inception",
                                    "nowhere.ts"]))
    workflow.check_extractor("torch")
    workflow.check_extractor("https://example.org/inception.pt")
    photos = mixed_folder(tmp_path / "photos", 3)
    with pytest.raises(UserError, match="--out .* lies in the input folder --data_dir"):
        workflow.Workflow(order_of(["--data_dir", photos, "--hours", 1, "--out", photos / "out"]))


@pytest.mark.parametrize("word", ["0", "-1", "nan", "inf", "soon"])
def test_hours_that_are_none(word, capsys):
    with pytest.raises(SystemExit) as ended:
        quickstart("--data_dir", "digits", f"--hours={word}")
    assert ended.value.code == 2 and "--hours" in capsys.readouterr().err


def test_for_digits_the_demos_classifier(tmp_path):
    planned = workflow.Workflow(order_of(["--data_dir", "digits", "--hours", 1, "--out", tmp_path / "out"]))
    planned.plan = plan_with(image_size=8, num_samples=9, method="cd", teacher={"channels": 1})
    names = [stage.name for stage in planned.stages()]
    assert names[:2] == ["training teacher", "training student"] and names[5] == "classifier" and len(names) == 10
    evaluation = planned.stages()[6].command
    assert str(tmp_path / "out" / "samples_teacher" / "samples_9x8x8x1.npz") in evaluation
    assert "--class_accuracy" in evaluation and "CD, one step" in planned.methods["samples_onestep"][0]
    assert planned.order.wish.evaluates


@pytest.mark.parametrize("name, shape, classes", [
    ("digits", (1, 8, 8), 10), ("photos", (3, 32, 32), 3), ("zip", (3, 32, 32), 10), ("grey", (1, 28, 28), 0),
])
def test_what_is_planned_for_each_set_can_be_trained(tmp_path, name, shape, classes):
    """From the look over the plan to the first batch and a pass through the network."""
    make = {"photos": mixed_folder, "zip": lambda path: cifar_zip(path.with_suffix(".zip")),
            "grey": lambda path: grey_folder(path, True)}
    place = str(make[name](tmp_path / name)) if name in make else name
    found = look(place)
    machine = Machine("cpu", "fp32", 1, 2**33, 1.0, (Speed("tiny", shape[1], 10**6, 10**8, 10**6, ((32, 0.1),), 1e-3),))
    plan = make_plan(found, machine, Wish(hours=0.2))
    settings = resolve(plan.teacher | {"training_mode": "edm"}, *TRAINING_SECTIONS)
    rules.resolve(settings, rules.TRAINING)
    batch = next(open_data(settings).stream(0))
    assert batch.images.shape == (plan.batch, *shape)
    assert settings.values["num_classes"] == classes and ("y" in batch.cond) == (classes > 0)
    with th.no_grad():
        out = model_from(settings)(batch.images[:2], th.zeros(2), *(y[:2] for y in batch.cond.values()))
    assert out.shape == (2, *shape)


def plan_with(**fields):
    return workflow.Plan(**{name: fields.get(name) for name in workflow.Plan.__dataclass_fields__})


@pytest.mark.parametrize("seconds, text", [(12.4, "12 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")])
def test_times_for_people(seconds, text):
    assert workflow.clock(seconds) == text

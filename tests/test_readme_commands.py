"""Every command of README, features and tutorial in tiny form: small, without mpiexec, and all in one process."""

import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch as th
from PIL import Image

from support import edm_pickles
from support.mpi import ROOT, start
from support.nets import plain_state_dict
from support.weights import tiny as small

PAGES = [(ROOT / name).read_text() for name in ("README.md", "docs/features.md", "docs/tutorial.md")]
ELSEWHERE = {                                               # first words -> the test that runs the command
    "make demo": "tests/scripts/test_demo.py", "make test": "all of them",
    "python scripts/quickstart.py": "tests/quickstart/test_workflow.py",
    "scripts/launch.sh": "tests/scripts/test_launch_recipes.py",
    "RANKS=8 scripts/launch.sh": "tests/scripts/test_launch_recipes.py",
}
SMALLER = {
    "--image_size": "8", "--global_batch_size": "8", "--total_training_steps": "2", "--batch_size": "4",
    "--images": "20", "--num_samples": "12", "--seeds": "0-3", "--num_ts": "1", "--resolution": "8x8",
    "--total_kimg": "0.016", "--config": "size/tiny", "--epochs": "1",
}
MORE = {                                                    # what a small run needs besides, unless the command says so
    "edm_train.py": {"--num_channels": "32", "--num_res_blocks": "1", "--channel_mult": "1",
                     "--attention_resolutions": "8", "--global_batch_size": "8"},
    "fid.py": {"--inception": "classifier.ts"}, "evaluator.py": {"--inception": "classifier.ts"},
    "ternary_search.py": {"--inception": "classifier.ts", "--num_samples": "12", "--batch_size": "4"},
    "classifier_train.py": {"--epochs": "1"},
    "cd_imagenet64_lpips.pt": {"--image_size": "8", "--num_head_channels": "16"},   # known of the published file itself
    "--start_ema": {"--start_scales": "4", "--end_scales": "4"},
}


def commands():
    """The commands of all blocks: one line each, without comments and mpiexec."""
    for page in PAGES:
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if not kind:
                    yield re.sub(r"\s+# .*| +$|^mpiexec -n 8 ", "", line)


def tiny(command):
    """The command with small numbers."""
    words = shlex.split(re.sub(r"samples_\d+x\d+x\d+x3", f"samples_{SMALLER['--num_samples']}x8x8x3", command))
    for place, word in enumerate(words[:-1]):
        if word in SMALLER and words[place + 1] != "IMAGES":
            words[place + 1] = SMALLER[word]
    for name in [word if word in MORE else word.rpartition("/")[2] for word in words]:
        for flag, value in MORE.get(name, {}).items():
            words += [] if flag in words else [flag, value]
    return shlex.join(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the commands name, in which they have run."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "IMAGES").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / "IMAGES" / f"{'ab'[number % 2]}_{number}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    kwargs = edm_pickles.KWARGS["ddpmpp"] | {"label_dim": 0}
    network = edm_pickles.network("ddpmpp", label_dim=0)
    edm_pickles.dump(folder / "edm-cifar10-32x32-uncond-vp.pkl", edm_pickles.net_of(network, kwargs))
    for name in ("scripts", "configs"):
        (folder / name).symlink_to(ROOT / name)
    lines = ["python scripts/classifier_train.py --data_dir IMAGES --image_size 8 --epochs 1 --out classifier.ts"]
    for command in commands():
        if not command.startswith(tuple(ELSEWHERE)):
            lines.append(tiny(command))
    th.save(plain_state_dict(small()), folder / "cd_imagenet64_lpips.pt")
    (folder / "commands.json").write_text(json.dumps(lines))
    command = [sys.executable, str(ROOT / "tests/support/page_commands.py"), "commands.json"]
    done = start(command, cwd=folder, timeout=300, env={"OPENAI_LOG_FORMAT": "log,csv", "PYTHON": sys.executable})
    assert done.rc == 0 and [line for line in done.stdout.splitlines() if line.startswith("$ ")] == [
        f"$ {line}" for line in lines], done.stderr
    return folder


def test_every_command_ran(folder):
    assert (folder / "report.html").stat().st_size > 10_000
    assert np.load(folder / "runs/cd_samples/samples_12x8x8x3.npz")["arr_0"].shape == (12, 8, 8, 3)
    assert len(list((folder / "out").rglob("*.png"))) == 4 and (folder / "runs/inpaint").is_dir()
    assert (folder / "runs/search").is_dir() and (folder / "runs/teacher/samples").is_dir()
    assert Image.open(folder / "sample.png").size == (8, 8) and (folder / "student/README.md").is_file()


def test_what_runs_elsewhere_is_in_readme():
    assert all(any(command.startswith(words) for command in commands()) for words in ELSEWHERE)
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values() if test != "all of them")

"""Every command of README.md in tiny form: as it stands there, but small, without mpiexec, and in one process."""

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

README = (ROOT / "README.md").read_text()
ELSEWHERE = {                                               # first words -> the test that runs the command
    "make demo": "tests/scripts/test_demo.py", "make test": "all of them",
    "python scripts/quickstart.py": "tests/quickstart/test_workflow.py",
    "scripts/launch.sh": "tests/scripts/test_launch_recipes.py",
    "RANKS=8 scripts/launch.sh": "tests/scripts/test_launch_recipes.py",
}
SMALLER = {
    "--image_size": "8", "--global_batch_size": "8", "--total_training_steps": "2", "--batch_size": "4",
    "--images": "20", "--num_samples": "12", "--seeds": "0-3", "--num_ts": "1",
}
EXTRA = {
    "edm_train.py": "--num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 8",
    "cm_train.py": "--start_scales 4 --end_scales 4",
    "fid.py": "--inception classifier.ts", "evaluator.py": "--inception classifier.ts",
    "ternary_search.py": "--inception classifier.ts --num_samples 12 --batch_size 4",
    "cd_imagenet64_lpips.pt": "--image_size 8 --num_head_channels 16",      # what is known of the published file itself
}


def commands():
    """The commands of all blocks: one line each, without comments, mpiexec and the folder's interpreter."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if not kind:
                yield re.sub(r"\s+# .*| +$|^mpiexec -n 8 ", "", line)


def tiny(command):
    """The command with small numbers, and what a small run needs besides."""
    words = shlex.split(command.replace("50000x64x64", f"{SMALLER['--num_samples']}x8x8"))
    for place, word in enumerate(words[:-1]):
        if word in SMALLER and words[place + 1] != "IMAGES":
            words[place + 1] = SMALLER[word]
    extra = [EXTRA[name] for name in (word.rpartition("/")[2] for word in words) if name in EXTRA]
    return " ".join([shlex.join(words), *extra])


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
    done = start(command, cwd=folder, timeout=150, env={"OPENAI_LOG_FORMAT": "log,csv", "PYTHON": sys.executable})
    assert done.rc == 0, done.stderr
    return folder


def test_every_command_ran(folder):
    assert (folder / "report.html").stat().st_size > 10_000
    assert np.load(folder / "runs/cd_samples/samples_12x8x8x3.npz")["arr_0"].shape == (12, 8, 8, 3)
    assert len(list((folder / "out").rglob("*.png"))) == 4 and (folder / "runs/inpaint").is_dir()
    assert (folder / "runs/search").is_dir()


def test_what_runs_elsewhere_is_in_readme():
    assert all(any(command.startswith(words) for command in commands()) for words in ELSEWHERE)
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values() if test != "all of them")

"""Every command of README and the pages of docs/ in tiny form: small, without mpiexec, and all in one process."""

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
from support.page_lines import commands
from support.warm import python_words
from support.weights import tiny as small

TOGETHER = ("README.md", "docs/features.md", "docs/tutorial.md")
"""Pages that go on with what the ones before them have made; every other page has a folder of its own."""
ALONE = sorted({f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {*TOGETHER, "docs/extending.md"})
PAGES = (*TOGETHER, *ALONE, "datasets/README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")

ELSEWHERE = {                                               # first words -> the test that runs the command
    "make ": "tests/test_doc_facts.py",
    "python scripts/quickstart.py": "tests/quickstart/test_workflow.py",
    "scripts/launch.sh": "tests/scripts/test_launch_recipes.py",
    "RANKS=8 scripts/launch.sh": "tests/scripts/test_launch_recipes.py",
    "python datasets/dataset_tool.py --source cifar-10-python.tar.gz": "tests/datasets/test_dataset_tool.py",
    "python tests/system/soak.py": "tests/system/test_soak.py",
}
NOT_HERE = {                                                # first words -> why nothing runs the command
    "pip ": "installs packages", "python -m pip ": "installs packages",
    "hf ": "is of the hub, and sends files to it", "tensorboard ": "is another tool, which runs until it is stopped",
    "python datasets/dataset_tool.py --source SOURCE": "is a synopsis",
    "python scripts/edm_train.py$": "stands for any command",
}
ONLY_PARSED = {"python benchmarks/": "minutes; tests/benchmarks has their parts"}
"""First words of commands whose arguments are read, and which then end."""

SMALLER = {
    "--image_size": "8", "--global_batch_size": "8", "--total_training_steps": "2", "--batch_size": "4",
    "--images": "20", "--num_samples": "12", "--seeds": "0-3", "--num_ts": "1", "--resolution": "8x8",
    "--total_kimg": "0.016", "--epochs": "1", "--eval_interval": "2", "--eval_samples": "12", "--sample_interval": "2",
    "--ema_snapshot_interval": "1", "--std": "0.05,0.07", "--mask_box": "2,2,4,4", "--inception": "classifier.ts",
    "--attention_resolutions": "8",
}
AS_IT_IS = ("IMAGES", "digits", "photos", "SAMPLES", "-1")
TINY_EDM = {"--num_channels": "32", "--num_res_blocks": "1", "--channel_mult": "1", "--attention_resolutions": "8"}
MORE = {                                                    # what a small run needs besides, unless the command says so
    r"edm_train\.py(?!.*(resume_checkpoint|digits/|edm2/))": TINY_EDM,
    r"edm_train\.py --data_dir IMAGES --log_dir": {"--image_size": "8"},
    r"edm2/": {"--num_channels": "32", "--channel_mult": "1", "--num_res_blocks": "1", "--attention_resolutions": "4",
               "--image_size": "4", "--num_classes": "2", "--num_head_channels": "32", "--total_kimg": "0.016",
               "--use_fp16": "False"},
    r"(edm|cm)_train\.py": {"--global_batch_size": "8"},
    r"(edm|cm)_train\.py(?!.*(total_kimg|edm2/))": {"--total_training_steps": "2"},
    r"(edm|cm)_train\.py --log_dir|edm_train\.py --resume_checkpoint edm-ffhq": {"--data_dir": "IMAGES"},
    r"cm_train\.py --log_dir": {"--teacher_model_path": "runs/edm", "--loss_norm": "l2"},
    r"image_sample\.py(?!.*seeds)": {"--num_samples": "4"},
    r"image_edit\.py(?!.*pairs)": {"--num_samples": "4"},
    r"fid\.py|evaluator\.py|ternary_search\.py|posthoc_ema\.py": {"--inception": "classifier.ts"},
    r"ternary_search\.py": {"--num_samples": "12", "--batch_size": "4"},
    r"posthoc_ema\.py": {"--extrapolate": "True"},          # two steps determine an average badly
    r"classifier_train\.py": {"--epochs": "1"},
    r"fid\.py calc": {"--num": "12"},
    r"cd_imagenet64_lpips\.pt": {"--image_size": "8", "--num_head_channels": "16"},   # known of the published file
    r"--start_ema": {"--start_scales": "4", "--end_scales": "4"},
    r"cifar10/cd\.yaml": {"--image_size": "8", "--num_channels": "16", "--num_res_blocks": "1", "--channel_mult": "1,2",
                          "--attention_resolutions": "4", "--loss_norm": "l2"},
    r"sample_cifar10": {"--seeds": "0-3"},
}
SAVED = re.compile(r"(?<=_)\d{6}(?=\.(pt|json))")           # the step of a file of a run
PICKLES = {"edm-cifar10-32x32-uncond-vp.pkl": "ddpmpp", "edm-cifar10-32x32-uncond-ve.pkl": "ncsnpp",
           "edm-ffhq-64x64-uncond-vp.pkl": "ddpmpp", "edm-imagenet-64x64-cond-adm.pkl": "adm"}
GIVEN = {                                                   # page -> a file or folder that it names: where it is from
    "docs/edm.md": {**{name: name for name in PICKLES}, "CIFAR10": "IMAGES"},
    "docs/evaluation.md": {"REF.npz": "ref.npz", "SAMPLES.npz": "runs/cd_samples/samples_12x8x8x3.npz",
                           "SAMPLES": "IMAGES", "REF": "IMAGES"},
    "docs/interop.md": {"SOURCE": "runs/cd", "runs/cd": "runs/cd", "samples.png": "sample.png"},
    "docs/latents.md": {"imagenet/train": "IMAGES", "photos": "IMAGES"},
    "docs/posthoc_ema.md": {"ref.npz": "ref.npz"},
    "docs/reports.md": {"runs/edm": "runs/edm", "runs/ct": "runs/student", "ref.npz": "ref.npz"},
    "docs/runs.md": {"runs/cd": "runs/cd"},
    "docs/training.md": {"cifar10-32x32.zip": "mine.zip"},
}
BEFORE = {                                                  # page -> a command that makes what the page does not
    "docs/few-step.md": "python scripts/edm_train.py --config configs/digits/edm.yaml --log_dir runs/old",
    "docs/interop.md": "python evaluations/fid.py calc --images IMAGES --ref ../ref.npz --num 12 --json fid.json",
    "docs/latents.md": f"python -c \"import sys; sys.path.append('{ROOT / 'tests'}'); from support.tiny_vae import "
                       "tiny_vae; tiny_vae('sd-vae-ft-mse')\"",
}


def begins(command, with_any):
    return any(re.match(re.escape(words).replace(r"\$", "$"), command) for words in with_any)


def tiny(command):
    """The command with small numbers."""
    command = re.sub(r"samples_\d+x\d+x\d+x3", f"samples_{SMALLER['--num_samples']}x8x8x3", command)
    command = SAVED.sub("000002", command).replace("size/small", "size/tiny")
    words = shlex.split(command.replace("runs/*", "runs/cd runs/ct"))
    for place, word in enumerate(words[:-1]):
        if word in SMALLER and words[place + 1] not in AS_IT_IS:
            words[place + 1] = SMALLER[word]
    for name, options in MORE.items():
        for flag, value in options.items() if re.search(name, command) else ():
            words += [] if flag in words else [flag, value]
    return shlex.join(words)


def lines_of(page):
    """What runs for a page, in its folder."""
    text = (ROOT / page).read_text()
    own = [("parse " if begins(each, ONLY_PARSED) else "") + tiny(each) for each in dict.fromkeys(commands(text))
           if not begins(each, {**ELSEWHERE, **NOT_HERE})]
    before = [tiny(BEFORE[page])] if page in BEFORE else []
    return [f"cd {folder_of(page)}", *before, *own, "cd .."] if own and page not in TOGETHER else own


def folder_of(page):
    return "page_" + page.removeprefix("docs/").removesuffix(".md").replace("/", "_")


def provide(folder, page):
    """Make the folder of a page with the files that it names; some are made by the pages before it."""
    for name in ("scripts", "configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    given = {} if page in TOGETHER else {"IMAGES": "IMAGES", "classifier.ts": "classifier.ts", **GIVEN.get(page, {})}
    for name, source in given.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(folder.parent / source)


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
    for name, arch in PICKLES.items():
        network, kwargs = edm_pickles.network(arch, label_dim=0), edm_pickles.KWARGS[arch] | {"label_dim": 0}
        edm_pickles.dump(folder / name, edm_pickles.net_of(network, kwargs))
    th.save(plain_state_dict(small()), folder / "cd_imagenet64_lpips.pt")
    provide(folder, TOGETHER[0])
    for page in PAGES[len(TOGETHER):]:
        (folder / folder_of(page)).mkdir()
        provide(folder / folder_of(page), page)
    lines = ["python scripts/classifier_train.py --data_dir IMAGES --image_size 8 --epochs 1 --out classifier.ts"]
    lines += [line for page in PAGES for line in lines_of(page)]
    (folder / "commands.json").write_text(json.dumps(lines))
    command = [*python_words(), str(ROOT / "tests/support/page_commands.py"), "commands.json"]
    done = start(command, cwd=folder, timeout=300, env={"OPENAI_LOG_FORMAT": "log,csv", "PYTHON": sys.executable})
    assert done.rc == 0 and [line for line in done.stdout.splitlines() if line.startswith("$ ")] == [
        f"$ {line}" for line in lines], f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return folder


def test_every_command_ran(folder):
    assert (folder / "report.html").stat().st_size > 10_000
    assert np.load(folder / "runs/cd_samples/samples_12x8x8x3.npz")["arr_0"].shape == (12, 8, 8, 3)
    assert len(list((folder / "out").rglob("*.png"))) == 4 and (folder / "runs/inpaint").is_dir()
    assert (folder / "runs/search").is_dir() and (folder / "runs/teacher/samples").is_dir()
    assert Image.open(folder / "sample.png").size == (8, 8) and (folder / "student/README.md").is_file()


def test_every_list_is_as_short_as_possible():
    """What runs elsewhere or nowhere is on a page, and so is every file that the test makes for one."""
    found = [command for page in PAGES for command in commands((ROOT / page).read_text())]
    for words in (*ELSEWHERE, *NOT_HERE, *ONLY_PARSED):
        assert any(begins(command, [words]) for command in found), words
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())
    assert all(any(re.search(name, command) for command in found) for name in MORE)
    for page, files in GIVEN.items():
        text = " ".join(lines_of(page))
        assert not [name for name in files if name not in text], page


@pytest.mark.parametrize("page", ALONE)
def test_every_page_left_what_its_commands_write(folder, page):
    """The folder, or the file, that the flags of a command name."""
    named = {value for line in lines_of(page) if not line.startswith("parse ")
             for value in re.findall(r"--(?:log_dir|out|outdir|dest) (\S+)", line)}
    assert not [name for name in named if not (folder / folder_of(page) / name).exists()]

"""What happens before the first image and before the first step: files are read once, nothing grows with the plan."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch as th

from cm.checkpoints import loading
from cm.errors import UserError
from cm.generate.engine import SamplingPlan, collect_to_npz
from cm.script_util import create_model
from cm.training.throughput import resident_bytes
from evaluations import defaults
from evaluations.features import inception_files
from support.mpi import mpi_program, mpiexec, python

ROOT = Path(__file__).resolve().parents[2]
NETWORK = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8",
           "num_head_channels": 32}


def network():
    th.manual_seed(0)
    return create_model(**NETWORK)


@pytest.mark.mpi
def test_weights_are_read_once_by_rank_0(tmp_path):
    """image_sample.py on two ranks; every opening of the file of weights is counted."""
    th.save(network().state_dict(), tmp_path / "model.pt")
    flags = [word for name, value in NETWORK.items() for word in (f"--{name}", str(value))]
    argv = ["image_sample.py", "--model_path", str(tmp_path / "model.pt"), "--training_mode", "edm", "--steps", "2",
            "--num_samples", "4", "--batch_size", "2", "--log_dir", str(tmp_path / "out"), *flags]
    done = mpi_program(tmp_path, 2, f"""
        import runpy, sys
        opened = []
        sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
        sys.argv = {argv!r}
        from cm.distributed import setup as dist
        leave = dist._leave
        def report():
            count = sum(str(path).endswith("model.pt") for path in opened)
            print(f"rank {{dist.get_rank()}} opened it {{count}} times", flush=True)
            leave()
        dist._leave = report
        runpy.run_path({str(ROOT / "scripts" / "image_sample.py")!r}, run_name="__main__")
    """)
    assert done.rc == 0, done
    assert "rank 0 opened it 1 times" in done.stdout and "rank 1 opened it 0 times" in done.stdout, done
    assert np.load(tmp_path / "out" / "samples_4x8x8x3.npz")["arr_0"].shape == (4, 8, 8, 3)


def test_a_network_of_a_file_takes_its_tensors_as_they_are():
    plain = network()
    content = {name: value.half() if name == "out.0.weight" else value for name, value in plain.state_dict().items()}
    with th.device("meta"):
        model = create_model(**NETWORK)
    before = th.get_rng_state()
    loading.make(model, content, "file")
    assert th.equal(th.get_rng_state(), before)
    assert {value.dtype for value in model.state_dict().values()} == {th.float32}
    assert model.time_embed[0].weight.data_ptr() == content["time_embed.0.weight"].data_ptr(), "no copy"
    x, t = th.randn(2, 3, 8, 8), th.ones(2)
    assert th.equal(model(x, t), plain(x, t)) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="file does not fit this network: 1 missing: out.2.bias"):
        loading.make(model, {name: value for name, value in content.items() if name != "out.2.bias"}, "file")


class FirstImage(Exception):
    pass


@pytest.mark.parametrize("num_samples", [50, 50_000])
def test_nothing_before_the_first_image_grows_with_their_number(tmp_path, num_samples):
    """At 256x256, where 50,000 images are 9.8 GB."""
    plan = SamplingPlan(num_samples, 4, 256, seed=0, num_classes=1000)
    before, begun = resident_bytes(), time.monotonic()

    def make(indices):
        assert indices.tolist() == [0, 1, 2, 3]
        assert resident_bytes() - before < 2**23
        assert time.monotonic() - begun < 5
        raise FirstImage

    with pytest.raises(FirstImage):
        collect_to_npz(make, plan, str(tmp_path))
    used = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    assert used < 2**23, "the file's space is taken as its images come"


# --- before torch is imported ----------------------------------------------------------------------------------------

REQUIRED = {                                                # words without which a command has more to complain of
    **{f"scripts/{name}": () for name in ("edm_train", "cm_train", "image_sample", "image_edit", "ternary_search",
                                          "convert_checkpoint", "classifier_train", "demo", "posthoc_ema")},
    "scripts/report": ("run",), "scripts/quickstart": ("--data_dir", "digits", "--hours", "1"),
    **{f"evaluations/{name}": ("ref.npz", "samples.npz") for name in ("evaluator", "th_evaluator")},
    "evaluations/fid": ("calc", "--images", "a", "--ref", "b"),
    "datasets/dataset_tool": ("--source", "a", "--dest", "b"),
    "datasets/encode": ("--vae", "a", "--source", "b", "--dest", "c"),
    "datasets/lsun_bedroom": ("a", "b"),
}
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; import runpy; sys.argv[1:] = {args!r}; " \
                "runpy.run_path({path!r}, run_name='__main__')"


def without_torch(command, *args):
    """A command where importing torch is an error."""
    path = str(ROOT / f"{command}.py")
    return python(["-c", WITHOUT_TORCH.format(args=list(args), path=path)])


@pytest.mark.parametrize("command", REQUIRED)
def test_help_and_mistakes_need_no_torch(command):
    done = without_torch(command, "--help")
    assert done.rc == 0 and "usage:" in done.stdout and not done.stderr, done
    configured = command.startswith("scripts/") and command not in (
        "scripts/demo", "scripts/report", "scripts/quickstart")
    assert ("--config FILE" in done.stdout, "--dry_run" in done.stdout) == (configured, configured)
    done = without_torch(command, *REQUIRED[command], "--batch_sise", "3")
    assert done.rc == 2 and "Traceback" not in done.stderr, done
    assert "unrecognized arguments: --batch_sise" in done.stderr


def test_every_script_is_asked():
    scripts = {f"scripts/{path.stem}" for path in (ROOT / "scripts").glob("*.py")}
    assert {name for name in REQUIRED if name.startswith("scripts/")} == scripts


def test_a_misspelt_flag_of_a_subcommand_gets_a_suggestion():
    done = without_torch("evaluations/fid", "calc", "--images", "a", "--ref", "b", "--nmu", "3")
    assert done.rc == 2 and "--nmu 3. Did you mean --num?" in done.stderr, done


def test_values_are_looked_at_before_torch_and_files_after():
    done = without_torch("scripts/image_sample", "--steps", "0")
    assert done.rc == 2 and done.stderr == "error: --steps: steps=0 is too small; the least is 1\n", done
    assert "torch" in without_torch("scripts/image_sample", "--config", "no-such-file").stderr
    assert "torch" in without_torch("scripts/image_sample").stderr, "good flags go on to the imports"


@pytest.mark.mpi
def test_a_mistake_is_told_once_and_every_rank_leaves_with_status_2():
    done = mpiexec(3, [ROOT / "scripts" / "image_sample.py", "--sampler", "huen"])
    assert done.rc == 2 and done.stderr.count("Did you mean 'heun'?") == 1, done
    done = mpiexec(3, [ROOT / "scripts" / "image_sample.py", "--help"])
    assert done.rc == 0 and done.stdout.count("usage:") == 1, done


def test_the_parsers_know_the_published_weights():
    """They name them without importing what reads them; metrics come from the table itself."""
    assert set(inception_files.FILES) == set(defaults.WITH_PUBLISHED_WEIGHTS)

"""From CIFAR-10's own archive to a distance, as a user of NVlabs/edm types it: convert, train, sample, score."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch as th

from cm.data.sources import open_source
from evaluations.features import save_torchscript
from support.published_sets import cifar10
from support.warm import mpiexec, python

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.mpi


class TinyExtractor(th.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = th.nn.Conv2d(3, 4, 32)

    def forward(self, images):
        return self.conv(images.float() / 255).flatten(1)


def succeeds(done):
    assert done.rc == 0, str(done)
    return done


@pytest.mark.slow                                           # each of its commands has tests of its own
def test_from_the_archive_to_a_distance(tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (10, 1, 1, 3))                           # each class has one
    labels = [i % 10 for i in range(120)]
    pixels = np.clip(colours[labels] + rng.normal(0, 20, (120, 32, 32, 3)), 0, 255).astype(np.uint8)
    archive, data = cifar10(tmp_path, pixels, labels), tmp_path / "cifar10-32x32.zip"
    succeeds(python([str(ROOT / "datasets/dataset_tool.py"), "--source", str(archive), "--dest", str(data)]))
    source = open_source(str(data), 32)
    assert source.labels.tolist() == labels
    np.testing.assert_array_equal(source.images(np.arange(120)), pixels)

    run = tmp_path / "run"
    succeeds(mpiexec(2, [
        str(ROOT / "scripts/edm_train.py"), "--data_dir", str(data), "--image_size", "32", "--class_cond",
        "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1,1", "--attention_resolutions", "16",
        "--num_head_channels", "32", "--optimizer", "adam", "--lr", "1e-3", "--global_batch_size", "16",
        "--microbatch", "4", "--total_kimg", "0.06", "--lr_rampup_kimg", "0.03", "--ema_halflife_kimg", "0.02",
        "--tick", "0.03", "--snap", "1", "--dump", "2", "--log_dir", str(run),
    ], timeout=120))
    ticks = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [tick["Progress/kimg"]["mean"] for tick in ticks] == [0.032, 0.064]
    assert "sec/kimg" in (run / "log.txt").read_text()
    assert sorted(path.name for path in run.glob("ema*")) == ["ema_0.02kimg_000002.pt", "ema_0.02kimg_000004.pt"]

    out = tmp_path / "out"
    succeeds(mpiexec(2, [
        str(ROOT / "scripts/image_sample.py"), "--model_path", str(run / "ema_0.02kimg_000004.pt"), "--steps", "2",
        "--seeds", "0-15,2000", "--outdir", str(out), "--subdirs", "--class_label", "3", "--batch_size", "8",
        "--log_dir", str(tmp_path / "log"),
    ]))
    assert len(list(out.glob("000000/*.png"))) == 16 and (out / "002000" / "002000.png").exists()

    th.manual_seed(0)
    save_torchscript(TinyExtractor(), str(tmp_path / "features.ts"), "tiny", "none")
    extractor = ["--inception", str(tmp_path / "features.ts"), "--trust_extractor"]
    fid = str(ROOT / "evaluations/fid.py")
    succeeds(python([fid, "ref", "--data", str(data), "--dest", str(tmp_path / "ref.npz"), *extractor]))
    done = succeeds(mpiexec(2, [fid, "calc", "--images", str(out), "--ref", str(tmp_path / "ref.npz"), "--num", "17",
                                *extractor]))
    assert float(done.stdout.split()[-1]) > 0, done

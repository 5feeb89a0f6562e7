"""What a dry run says of a run."""

import json
import sys

from cm.setup.dry_run import dry_run
from cm.setup.train import loop_config
from support.mpi import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from memory_table import settings_of


def test_a_dry_run_says_what_a_rank_will_hold(capsys):
    settings = settings_of("configs/digits/cd.yaml", "--dry_run_ranks", "4", "--shard_ema", "True", "--microbatch", "3",
                           "--ema_rate", "0.9,0.99", "--precision", "fp16")
    config = loop_config(settings)
    assert (config.shard_ema, config.shard_optimizer, config.ema_device) == (True, False, "same"), "as the run itself"
    dry_run(settings)
    said = capsys.readouterr()
    memory, parameters = json.loads(said.out)["memory"], json.loads(said.out)["parameters"]
    assert memory["ranks"] == 4 and memory["images_per_pass"] == 3 and memory["activations_estimate"] > 0
    device = memory["device"]
    assert device["float32 masters"] == 4 * parameters and device["optimizer"] > 8 * parameters
    assert parameters < device["average 0.99"] < 1.2 * parameters, "four bytes each, of a quarter"
    assert device["target"] == device["parameters"] + device["float32 masters"]
    assert device["teacher"] == device["parameters"] < 4 * parameters, "nobody needs the masters of a teacher"
    assert memory["device_total"] == sum(device.values()) and memory["host"] == {}
    for name in (*device, "a checkpoint (disk)", "estimate: 3 images at a time"):
        assert name in said.err

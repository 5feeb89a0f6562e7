"""The devices of a run, as its flags want them."""

import pytest
import torch as th
from torch import nn

from cm.config.flags import parse
from cm.config.schema import TRAINING_SECTIONS
from cm.logging import logger
from cm.setup.run import on_device, open_log
from support import tf32


@pytest.mark.parametrize("flags, device, slow", [
    ([], "cuda", True), ([], "cpu", False), (["--precision", "fp32"], "cuda", False),
    (["--tf32", "True"], "cuda", False), (["--use_fp16", "True"], "cuda", False),
])
def test_float32_on_a_gpu_is_told_unless_it_was_asked_for(flags, device, slow, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("cm.setup.run.dist.dev", lambda: th.device(device))
    try:
        open_log(parse("", *TRAINING_SECTIONS, argv=[*flags, "--log_dir", str(tmp_path), "--log_formats", "stdout"]))
    finally:
        logger.reset()
    assert ("--precision auto (bf16) or --tf32 True" in capsys.readouterr().out) == slow


@pytest.mark.parametrize("flags, allowed", [([], False), (["--tf32", "True"], True)])
def test_gpus_multiply_in_tf32_only_where_a_flag_says_so(flags, allowed):
    with tf32.at_first(not allowed):
        on_device(parse("", *TRAINING_SECTIONS, argv=flags), nn.Conv2d(1, 1, 1))
        assert tf32.now() == (allowed, allowed)

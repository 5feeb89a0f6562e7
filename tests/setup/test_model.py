"""The precision of a network: what `auto` chooses, and flags that contradict each other."""

from pathlib import Path

import pytest
import torch as th

from cm.errors import UserError
from cm.setup import model

CPU = th.device("cpu")


@pytest.mark.parametrize("flags, chosen", [
    ("fpu avx512f avx512_bf16 amx_tile", "bf16"), ("fpu amx_bf16", "bf16"), ("fpu avx512f avx512_bf16x", "fp32"),
])
def test_auto_is_bf16_where_the_processor_has_instructions_for_it(monkeypatch, flags, chosen):
    monkeypatch.setattr(Path, "read_text", lambda path: f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n")
    assert model.choose_precision("auto", False, CPU) == chosen


def test_auto_is_bf16_on_a_gpu_that_computes_in_it(monkeypatch):
    for able, chosen in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(th.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        assert model.choose_precision("auto", False, th.device("cuda")) == chosen


def test_a_machine_that_does_not_tell_its_processor_has_float32(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "nothing of that kind")
    assert model.choose_precision("auto", False, CPU) == "fp32"


def test_precision_and_its_older_flag():
    assert model.choose_precision("", False, CPU) == "fp32" and model.choose_precision("", True, CPU) == "fp16"
    assert model.choose_precision("fp16", True, CPU) == "fp16"
    with pytest.raises(UserError, match="--use_fp16 True contradicts --precision bf16"):
        model.choose_precision("bf16", True, CPU)

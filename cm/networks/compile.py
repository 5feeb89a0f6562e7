"""--compile: networks that run as generated code, by torch.compile.

A network is compiled in place and at its first pass, for each shape of batch on its own: its weights, their names and
whatever holds it stay as they are. The noise level and N(k) reach it as tensors, so they compile nothing anew.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch as th
from torch import nn

from cm.errors import UserError

# Online, target and teacher, with and without gradients, whole and last batches. Beyond it torch would raise an error.
GRAPHS = 64


def compile_network(model: nn.Module, device: th.device, backend: str = "inductor") -> None:
    """Let the network's calls run as compiled code; dropout draws the masks that it draws without.

    Forward-mode differentiation does not see through it.

    :raises UserError: if there is no compiler on this machine.
    """
    options = None
    if backend == "inductor":
        check_compiler(device)
        options = {"fallback_random": True}                 # torch's own random numbers, so masks can be shared
    th._dynamo.config.recompile_limit = max(GRAPHS, th._dynamo.config.recompile_limit)
    model.compile(backend=backend, dynamic=False, fullgraph=True, options=options)


def check_compiler(device: th.device) -> None:
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UserError(f"--compile needs a C++ compiler on this machine, and there is no {compiler}: install one, "
                            "name another by the variable CXX, or drop --compile")
    elif importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs Triton for the GPU: `pip install triton`, or drop --compile")

"""--compile: networks that run as generated code, by torch.compile.

A network is compiled in place at its first pass, once for each shape of a batch; its weights, their names and all
references to it are unchanged. The noise level and N(k) are tensors, so new values do not cause another compilation.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch as th
from torch import nn

from cm.errors import UserError

# Online, target and teacher, with and without gradients, full and last batches. Above this limit torch raises.
GRAPHS = 64


def compile_network(model: nn.Module, device: th.device, backend: str = "inductor") -> None:
    """Compile the calls of a network; dropout draws the same masks as without.

    A compiled network cannot be differentiated in forward mode.

    :param backend: of torch.compile.

    :raises UserError: if there is no compiler on this machine.
    """
    options = None
    if backend == "inductor":
        _check_compiler(device)
        options = {"fallback_random": True}                 # torch's own random numbers, so masks can be shared
    th._dynamo.config.recompile_limit = max(GRAPHS, th._dynamo.config.recompile_limit)
    model.compile(backend=backend, dynamic=False, fullgraph=True, options=options)


def _check_compiler(device: th.device) -> None:
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UserError(f"--compile needs a C++ compiler on this machine, and there is no {compiler}: install it, "
                            "set the variable CXX to another, or drop --compile")
    elif importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs Triton for the GPU: `pip install triton`, or drop --compile")

"""torchvision beside a PyTorch without CUDA.

The torchvision wheels on PyPI for x86-64 are linked to CUDA. Beside a CPU build of PyTorch their compiled operators do
not load, which torchvision passes over, and then it trips over two of them that it takes for granted: every version
from 0.17 on fails with "operator torchvision::nms does not exist". Its networks, which are plain PyTorch, need none.
"""

from __future__ import annotations

import sys

import torch as th

MISSING = "operator torchvision::nms does not exist"
TAKEN_FOR_GRANTED = ("nms", "qnms")

_declarations: th.library.Library | None = None             # the operators vanish with this object


def import_torchvision() -> None:
    """Import torchvision; where its operators are missing, without them: calling one raises NotImplementedError.

    :raises ImportError: if torchvision is not installed.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if MISSING not in str(error):
            raise
        forget_half_imported()
        declare_operators()                                 # only now: a healthy torchvision declares them itself
        import torchvision  # noqa: F401


def forget_half_imported() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def declare_operators() -> None:
    """Give the operators their signatures, without which nothing can be registered for them."""
    global _declarations
    if _declarations is None:
        _declarations = th.library.Library("torchvision", "FRAGMENT")
        for name in TAKEN_FOR_GRANTED:
            _declarations.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

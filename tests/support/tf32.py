"""Whether GPUs multiply in TensorFloat-32: flags of the process, that exist without a GPU, too."""

import contextlib

import torch as th


def now():
    """Of convolutions, and of matrix products."""
    return th.backends.cudnn.allow_tf32, th.backends.cuda.matmul.allow_tf32


@contextlib.contextmanager
def at_first(allowed):
    """Both at the beginning of a test; whatever it sets is undone at the end."""
    before = now()
    th.backends.cudnn.allow_tf32 = th.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        th.backends.cudnn.allow_tf32, th.backends.cuda.matmul.allow_tf32 = before

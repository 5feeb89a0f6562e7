"""Label dropout: some training images lose their class, so the network also learns to denoise without one.

Source: Ho and Salimans 2022 (Classifier-free diffusion guidance, arXiv 2207.12598), algorithm 1.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch as th

from cm.data.mapped import Batches, mapped
from cm.random_util import stream_seeds
from cm.types import Batch


def drop_labels(batch: Batch, p: float, seed: int, null_class: int) -> Batch:
    """The batch with each class y [N] replaced by `null_class` with probability p.

    Which samples lose theirs depends on (seed, position), so it is the same on any number of ranks and in any
    microbatch. Reference images keep their classes.

    :raises ValueError: for a batch without positions.
    """
    if batch.positions is None:
        raise ValueError("label dropout is drawn for the positions of samples: give the batch some")
    uniform = stream_seeds(seed, "label dropout", batch.positions) / np.float64(2**64)          # [N], in [0, 1]
    y = batch.cond["y"]
    dropped = th.from_numpy(uniform < p).to(y.device)
    return replace(batch, cond={**batch.cond, "y": y.masked_fill(dropped, null_class)})


def with_label_dropout(data: Batches, p: float, seed: int, null_class: int) -> Batches:
    """A version of `data` whose batches have lost some labels, see `drop_labels`."""
    return mapped(data, partial(drop_labels, p=p, seed=seed, null_class=null_class))

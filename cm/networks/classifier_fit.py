"""The training of the small classifiers: in memory, by AdamW, with one cycle of the learning rate."""

from __future__ import annotations

from collections.abc import Callable

import torch as th
from torch import Tensor, nn

from cm.io.progress import progress


def fit(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    shown: bool,
) -> None:
    """Train a network on its device on `count` samples in batches drawn with torch's global generator.

    :param loss_of: from the indices of a batch's samples, int64 [B], to their mean loss, a scalar tensor.
    :param shown: whether a bar shows the progress.
    :param lr: the highest learning rate of the cycle.
    """
    device = next(model.parameters()).device
    optimizer = th.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    batches = max(count // batch_size, 1)
    schedule = th.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    with progress(title="training the classifier", total=epochs * batches, shown=shown) as bar:
        for _ in range(epochs):
            # tensor_split makes all batches about equally long, as batch normalisation needs
            for rows in th.randperm(count).to(device).tensor_split(batches):
                loss = loss_of(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")

"""A small convolutional classifier, whose features replace Inception's where images are tiny and no photos.

Shapes: N images, B of a batch, H and W height and width, K classes, D = FEATURES.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch as th
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cm.errors import UserError
from cm.networks.classifier_fit import fit
from cm.random_util import undisturbed

FEATURES = 64
LABEL_SMOOTHING = 0.05                                      # keeps the logits, and so the score, from saturating


class Classifier(nn.Module):
    """uint8 [N,3,H,W] in 0..255 -> features [N,64], which are averages of ReLUs, and logits [N,K].

    The last layer has no bias, so the logits serve the Inception Score and the class alike.
    """

    def __init__(self, num_classes: int, width: int = 24, dropout: float = 0.2):
        super().__init__()
        self.body = nn.Sequential(
            *conv(3, width),
            *conv(width, 2 * width, stride=2),
            *conv(2 * width, 2 * width),
            *conv(2 * width, FEATURES, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(FEATURES, num_classes, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N,3,H,W] -> features [N,D] and logits [N,K]."""
        features = self.body(images.float() / 127.5 - 1)    # [N,D]
        return features, self.head(self.dropout(features))


def classifier_of(weights: Mapping[str, Tensor], path: str) -> Classifier:
    """The classifier with these weights, in evaluation mode.

    :param path: what messages call the file of the weights.
    :raises UserError: if they are not those of a `Classifier`.
    """
    try:
        width, num_classes = len(weights["body.0.weight"]), len(weights["head.weight"])
        with th.device("meta"):
            model = Classifier(num_classes, width)
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} does not hold a classifier of scripts/classifier_train.py: {reason}") from None
    return model.eval().requires_grad_(False)


def conv(channels_in: int, channels_out: int, stride: int = 1) -> list[nn.Module]:
    """A 3x3 convolution, its normalisation and a ReLU."""
    return [
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    ]


def stratified_split(labels: NDArray[np.integer], holdout: float, seed: int) -> tuple[NDArray, NDArray]:
    """Indices (kept, held out); the share `holdout` of every class, at random, is held out.

    :raises ValueError: if the share is not between 0 and 1, or leaves a class without images on one side.
    """
    if not 0 < holdout < 1:
        raise ValueError(f"holdout={holdout} must lie between 0 and 1")
    rng = np.random.default_rng(seed)
    held = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(holdout * len(members))
        if not 0 < count < len(members):
            raise ValueError(f"holdout={holdout} of the {len(members)} images of class {label} leaves one side empty")
        held.append(members[:count])
    held_out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def train_classifier(
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    num_classes: int,
    *,
    epochs: int = 15,
    batch_size: int = 64,
    lr: float = 1e-2,
    weight_decay: float = 1e-2,
    seed: int = 0,
    device: th.device | str = "cpu",
    progress: bool = True,
) -> Classifier:
    """Train on images [N,H,W,3] and labels [N]; returns the classifier in evaluation mode.

    On a CPU the same seed gives the same weights whatever the number of cores. Torch's global generator and number of
    threads are left as they were.

    :raises ValueError: if there are fewer than two images, or epochs or batch_size are not positive.
    """
    if len(images) < 2 or epochs < 1 or batch_size < 2:
        raise ValueError(f"{len(images)} images, epochs={epochs}, batch_size={batch_size}: need at least 2, 1 and 2")
    x, y = as_tensor(images).to(device), th.as_tensor(labels, dtype=th.int64).to(device)
    with one_thread(), undisturbed(device):
        th.manual_seed(seed)
        model = Classifier(num_classes).to(device)

        def loss_of(rows: Tensor) -> Tensor:
            return F.cross_entropy(model(x[rows])[1], y[rows], label_smoothing=LABEL_SMOOTHING)

        fit(model, loss_of, len(x), epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay,
            shown=progress)
    return model.eval()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Layers this small gain nothing from more threads, and lose tenfold where the cores are shared with others."""
    threads = th.get_num_threads()
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(threads)


@th.inference_mode()
def accuracy(model: Classifier, images: NDArray[np.uint8], labels: NDArray[np.integer], batch_size: int = 512) -> float:
    """Share of images [N,H,W,3] whose largest logit is their label's [N]."""
    device = model.head.weight.device
    guesses = [model(batch.to(device))[1].argmax(1).cpu() for batch in as_tensor(images).split(batch_size)]
    return float((th.cat(guesses).numpy() == labels).mean())


def as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """[N,H,W,3] -> [N,3,H,W]."""
    return th.from_numpy(images).permute(0, 3, 1, 2).contiguous()

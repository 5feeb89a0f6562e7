"""Inception-v3 in PyTorch as an extractor, from any file of its weights."""

from __future__ import annotations

import os

import numpy as np
import torch as th
from numpy.typing import NDArray

from cm.networks.layers import full_float32
from evaluations.features.base import Features, as_rows, hash_weights
from evaluations.features.inception_v3 import SIDE
from evaluations.features.inception_weights import holds_inception, read_inception
from evaluations.features.preprocessing import sidecar_of
from evaluations.features.torchscript_tensors import is_torchscript, tensor_names


class InceptionExtractor:
    """The FID Inception-v3: 2048 pooled features, 2023 spatial ones, 1008 logits without bias.

    :param path: weights as `inception_weights` lists them; the same weights have the same `id` whatever file they come
        from.
    :raises UserError: if the file is missing or does not hold them.
    """

    name, resize, is_inception = "Inception-v3 on PyTorch", f"TF1 bilinear to {SIDE}x{SIDE}", True

    def __init__(self, path: str, device: th.device | str = "cpu"):
        self.path, self.device = path, device
        network = read_inception(path)
        self.id = f"torch-{hash_weights(network.state_dict())}"
        self.network = network.to(device)

    @staticmethod
    def recognizes(path: str) -> bool:
        """Whether a file is read as these weights: TorchScript if it has their names and no description of another way
        to treat images; any other file always, since its reader says best what is wrong with it.
        """
        if not is_torchscript(path):
            return True
        described = os.path.exists(sidecar_of(path))
        return not described and holds_inception(tensor_names(path))

    @th.inference_mode()
    def extract(self, images: NDArray[np.uint8]) -> Features:
        """Features of images [N,H,W,3] uint8."""
        x = th.from_numpy(images).to(self.device).permute(0, 3, 1, 2)                     # [N,3,H,W]
        with full_float32(self.device):
            output = self.network(x)
        return Features(*(as_rows(part, len(x), name, self.path) for name, part in output._asdict().items()))

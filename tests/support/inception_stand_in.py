"""Random weights of Inception-v3 in the spellings of the published files."""

import numpy as np
import torch as th

from evaluations.features.inception_v3 import InceptionV3
from evaluations.features.inception_weights import conv_names


def random_tensors(seed=0):
    """Weights of Inception-v3 under the graph's names, of a size that keeps activations near 1."""
    rng = np.random.default_rng(seed)
    shapes = {name: tuple(tensor.shape) for name, tensor in InceptionV3().state_dict().items()}
    tensors = {}
    for names in conv_names():
        out, inside, height, width = shapes[f"layers.{names['ours']}.weight"]
        scale = (2 / (inside * height * width)) ** 0.5
        weight = rng.standard_normal((height, width, inside, out), np.float32) * np.float32(scale)
        tensors[f"{names['tf']}/conv2d_params"] = weight
        for part, low, high in (("beta", -0.1, 0.3), ("moving_mean", -0.2, 0.2), ("moving_variance", 0.5, 1.5)):
            tensors[f"{names['tf']}/batchnorm/{part}"] = rng.uniform(low, high, out).astype(np.float32)
        tensors[f"{names['tf']}/batchnorm/gamma"] = rng.uniform(0.8, 1.2, out).astype(np.float32)
    tensors["softmax/weights"] = rng.standard_normal((2048, 1008), np.float32) / 45
    tensors["softmax/biases"] = rng.standard_normal(1008).astype(np.float32)
    return tensors


def as_pytorch_fid(tensors, with_gamma=False):
    """The same weights as a state dict in the spelling of pytorch-fid, with the counters that such files have.

    :param with_gamma: whether its factors are those in the graph, which the graph does not use, or ones.
    """
    state = {}
    for names in conv_names():
        ours = {part: th.from_numpy(tensors[f"{names['tf']}/{part}"]) for part in (
            "conv2d_params", "batchnorm/gamma", "batchnorm/beta", "batchnorm/moving_mean", "batchnorm/moving_variance"
        )}
        weight, gamma, beta, mean, variance = ours.values()
        state |= {
            f"{names['fid']}.conv.weight": weight.permute(3, 2, 0, 1).contiguous(),
            f"{names['fid']}.bn.weight": gamma if with_gamma else th.ones_like(gamma),
            f"{names['fid']}.bn.bias": beta,
            f"{names['fid']}.bn.running_mean": mean, f"{names['fid']}.bn.running_var": variance,
            f"{names['fid']}.bn.num_batches_tracked": th.tensor(0),
        }
    return state | {
        "fc.weight": th.from_numpy(tensors["softmax/weights"]).T.contiguous(),
        "fc.bias": th.from_numpy(tensors["softmax/biases"]),
    }

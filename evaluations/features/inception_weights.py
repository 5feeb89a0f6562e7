"""The weights of Inception-v3 in the files that exist of them: three naming schemes for one network's 378 tensors.

state dict      OpenAI's (layers.conv.weight), pytorch-fid's and torch-fidelity's (Conv2d_1a_3x3.conv.weight)
TorchScript     NVIDIA's, spelt like OpenAI's; its tensors are read, and its code does not run
frozen graph    TensorFlow's classify_image_graph_def.pb (conv/conv2d_params), read without TensorFlow
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch as th
from torch import Tensor

from cm.errors import UserError
from cm.io import torch_files
from cm.io.budget import open_regular
from evaluations.features.graph_constants import read_constants
from evaluations.features.inception_v3 import Conv, InceptionV3
from evaluations.features.torchscript_tensors import is_torchscript, read_module_tensors


def read_inception(path: str) -> InceptionV3:
    """The network in evaluation mode with the weights of a file.

    :raises UserError: if the file is missing, is of another kind, or does not hold all of this network.
    """
    with th.device("meta"):
        network = InceptionV3()
    weights = canonical_weights(read_tensors(path), path)
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} does not hold the FID Inception-v3: {problem}") from None
    return network.eval().requires_grad_(False)


def read_tensors(path: str) -> Mapping[str, Tensor]:
    """The tensors of a frozen graph, a TorchScript module or a state dict, by their names in the file.

    :raises UserError: if it is none of these.
    """
    if path.endswith(".pb"):
        return {name: th.from_numpy(array) for name, array in read_constants(path).items()}
    if is_torchscript(path):
        return read_module_tensors(path)
    try:
        with open_regular(path) as stream:
            state = torch_files.load(stream, os.path.getsize(path))
    except FileNotFoundError:
        raise UserError(f"the weights {path} do not exist") from None
    except UserError:
        raise
    except Exception as error:                              # readers of archives and pickles raise many kinds
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{path} is neither TorchScript, nor a state dict, nor a graph (.pb): {reason}") from None
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not the state dict of a network")
    return state


def holds_inception(names: set[str]) -> bool:
    """Whether tensors of these names can be the weights of Inception-v3."""
    first = conv_names()[0]
    return any({each.output_weight, each.weight.format(first[each.conv])} <= names for each in SPELLINGS.values())


# --- spellings -----------------------------------------------------------------------------------------------------

STEM = {"conv": "Conv2d_1a_3x3", "conv_1": "Conv2d_2a_3x3", "conv_2": "Conv2d_2b_3x3", "conv_3": "Conv2d_3b_1x1",
        "conv_4": "Conv2d_4a_3x3"}
BLOCKS = {"mixed": "Mixed_5b", "mixed_1": "Mixed_5c", "mixed_2": "Mixed_5d", "mixed_3": "Mixed_6a",
          "mixed_4": "Mixed_6b", "mixed_5": "Mixed_6c", "mixed_6": "Mixed_6d", "mixed_7": "Mixed_6e",
          "mixed_8": "Mixed_7a", "mixed_9": "Mixed_7b", "mixed_10": "Mixed_7c"}
# pytorch-fid's and torchvision's names inside a block, in the order in which the convolutions are made above
SMALL = ("branch1x1", "branch5x5_1", "branch5x5_2", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3",
         "branch_pool")
MIDDLE = ("branch1x1", "branch7x7_1", "branch7x7_2", "branch7x7_3", "branch7x7dbl_1", "branch7x7dbl_2",
          "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5", "branch_pool")
LARGE = ("branch1x1", "branch3x3_1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_1", "branch3x3dbl_2",
         "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool")
INSIDE = {
    **dict.fromkeys(("mixed", "mixed_1", "mixed_2"), SMALL),
    "mixed_3": ("branch3x3", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    **dict.fromkeys(("mixed_4", "mixed_5", "mixed_6", "mixed_7"), MIDDLE),
    "mixed_8": ("branch3x3_1", "branch3x3_2", "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"),
    **dict.fromkeys(("mixed_9", "mixed_10"), LARGE),
}


class Spelling(NamedTuple):
    """How a kind of file calls the tensors of the convolution `conv`, and of the last layer."""

    conv: str                                               # "ours", "fid" or "tf": which name of the convolution
    weight: str
    beta: str
    mean: str
    var: str
    gamma: str | None                                       # a factor, which neither OpenAI's files nor the graph use
    output_weight: str
    output_bias: str


SPELLINGS = {
    "openai": Spelling("ours", "layers.{}.weight", "layers.{}.beta", "layers.{}.mean", "layers.{}.var", None,
                       "output.weight", "output.bias"),
    "pytorch-fid": Spelling("fid", "{}.conv.weight", "{}.bn.bias", "{}.bn.running_mean", "{}.bn.running_var",
                            "{}.bn.weight", "fc.weight", "fc.bias"),
    "tensorflow": Spelling("tf", "{}/conv2d_params", "{}/batchnorm/beta", "{}/batchnorm/moving_mean",
                           "{}/batchnorm/moving_variance", None, "softmax/weights", "softmax/biases"),
}


def conv_names() -> list[dict[str, str]]:
    """The names of the 94 convolutions: here ("ours"), in pytorch-fid ("fid") and in the TensorFlow graph ("tf")."""
    with th.device("meta"):
        ours = [name for name, module in InceptionV3().layers.named_modules() if isinstance(module, Conv)]
    names, position = [], dict.fromkeys(BLOCKS, 0)
    for name in ours:
        block, _, inside = name.partition(".")
        fid = STEM.get(name)
        if inside:
            fid = f"{BLOCKS[block]}.{INSIDE[block][position[block]]}"
            position[block] += 1
        names.append({"ours": name, "fid": fid, "tf": tensorflow_name(name)})
    return names


def tensorflow_name(name: str) -> str:
    """The name in the TensorFlow graph of the convolution that is called `name` here."""
    forks = re.sub(r"\.(tower(?:_\d)?)_(mixed_)?conv", lambda m: f".{m[1]}.{'mixed.' if m[2] else ''}conv", name)
    return forks.replace(".", "/")


def canonical_weights(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The 378 tensors of `InceptionV3` as float32 from those of a file in any of the `SPELLINGS`.

    :param path: what messages call the file.
    :raises UserError: if tensors are missing or of other shapes, with the first of them.
    """
    spelling = next((each for each in SPELLINGS.values() if each.output_weight in state and
                     each.weight.format(conv_names()[0][each.conv]) in state), None)
    if spelling is None:
        raise UserError(
            f"{path} holds no weights of the FID Inception-v3, in none of the spellings {', '.join(SPELLINGS)}; an "
            "extractor of another kind must be a TorchScript file (torch.jit.save)"
        )

    def take(name: str) -> Tensor:
        if name not in state:
            raise UserError(f"{path}: the weights of Inception-v3 lack the tensor {name}")
        return state[name].detach().float()

    weights = {}
    for names in conv_names():
        found = {part: take(getattr(spelling, part).format(names[spelling.conv]))
                 for part in ("weight", "beta", "mean", "var")}
        if spelling.conv == "tf":
            found["weight"] = found["weight"].permute(3, 2, 0, 1)              # HWIO -> OIHW
        if spelling.gamma and spelling.gamma.format(names[spelling.conv]) in state:
            gamma = take(spelling.gamma.format(names[spelling.conv]))
            # gamma (Wx - mean) / sd = ((gamma W) x - gamma mean) / sd
            found["weight"], found["mean"] = found["weight"] * gamma[:, None, None, None], found["mean"] * gamma
        weights |= {f"layers.{names['ours']}.{part}": value.contiguous() for part, value in found.items()}
    last = take(spelling.output_weight)
    weights["output.weight"] = (last.T if spelling.conv == "tf" else last).contiguous()
    weights["output.bias"] = take(spelling.output_bias)
    return weights

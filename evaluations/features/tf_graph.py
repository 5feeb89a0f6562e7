"""TensorFlow's frozen Inception-v3 as an extractor: the graph behind guided-diffusion's published numbers.

TensorFlow is an extra (`pip install '.[tf]'`) and is imported when a graph is opened.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from cm.errors import UserError
from cm.io.budget import GRAPH, read_bytes
from cm.io.downloads import sha256
from evaluations.features.base import ID_DIGITS, INCEPTION_HEAD, Features
from evaluations.features.graph_operations import check_operations

INPUT, POOL, SPATIAL, LAST_LAYER = "ExpandDims", "pool_3", "mixed_6/conv", "softmax/logits/MatMul"
SPATIAL_CHANNELS = 7                                        # of the 192 of `SPATIAL`


class FrozenGraphExtractor:
    """`classify_image_graph_def.pb`, or a graph with its tensor names: the resize and the scaling are nodes in it.

    Pooled features are `pool_3:0`; spatial ones the first 7 channels of `mixed_6/conv:0`, flattened in the order
    height, width, channel; logits the pooled features times the second input of `softmax/logits/MatMul`, so without
    the bias that the graph adds later.

    A graph is a program, too: it is imported if it uses none but the operations of `graph_operations`.

    :raises UserError: if TensorFlow or the file is missing, the file is no such graph, or does more than compute.
    """

    resize = "TF1 bilinear to 299x299, in the graph"

    def __init__(self, path: str, device: th.device | str = "cpu"):
        tf = import_tensorflow(path)
        self.path = path
        with tf.Graph().as_default() as graph:
            self.images = tf.compat.v1.placeholder(tf.float32, (None, None, None, 3))
            pool, spatial, last = tf.import_graph_def(
                read_graph(tf, path), {f"{INPUT}:0": self.images}, [f"{POOL}:0", f"{SPATIAL}:0", LAST_LAYER]
            )
        self.session = tf.compat.v1.Session(graph=graph, config=session_config(tf, th.device(device)))
        self.outputs = pool, spatial
        self.weight = self.session.run(last.inputs[1])      # [D,K]
        self.is_inception = self.weight.T.shape == INCEPTION_HEAD
        self.name = f"{'Inception-v3' if self.is_inception else os.path.basename(path)} on TensorFlow"
        self.id = f"tf-{sha256(path)[:ID_DIGITS]}"

    @staticmethod
    def recognizes(path: str) -> bool:
        """Whether a file is a graph, by its name."""
        return path.endswith(".pb")

    def extract(self, images: NDArray[np.uint8]) -> Features:
        """Features of images [N,H,W,3] uint8."""
        pool, spatial = self.session.run(self.outputs, {self.images: images.astype(np.float32)})
        pool = pool.reshape(len(images), -1)                # [N,1,1,D] -> [N,D]
        spatial = spatial[..., :SPATIAL_CHANNELS].reshape(len(images), -1)
        return Features(pool, spatial, pool @ self.weight)


def import_tensorflow(path: str) -> Any:
    """The package, with full float32.

    :param path: of the graph, for the message.
    :raises UserError: if it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")      # it greets with a page of notes otherwise
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(
            f"{path} is a TensorFlow graph, and TensorFlow is not installed ({error}): run `pip install "
            "'.[tf]'` in the repository, or give `--inception torch:PATH`, which reads the weights from the same file"
        ) from None
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return tf


def read_graph(tf: Any, path: str) -> Any:
    """The GraphDef in a file; its operations are harmless.

    :raises UserError: if it is missing, no graph, uses an operation that is not allowed, or lacks one of the tensors.
    """
    definition = tf.compat.v1.GraphDef()
    try:
        definition.ParseFromString(read_bytes(path, GRAPH))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"the graph {path} cannot be read: {error.strerror}") from None
    except Exception as error:                              # protobuf's DecodeError, whose package is TensorFlow's
        raise UserError(f"{path} is not a frozen TensorFlow graph, or is damaged ({error})") from None
    check_operations(definition, path)
    missing = {INPUT, POOL, SPATIAL, LAST_LAYER} - {node.name for node in definition.node}
    if missing:
        raise UserError(f"the graph {path} lacks {', '.join(sorted(missing))}: it is not the Inception-v3 of FID "
                        "(classify_image_graph_def.pb)")
    return definition


def session_config(tf: Any, device: th.device) -> Any:
    """This rank's device and share of the cores; of a GPU's memory only what is used, since torch is there too."""
    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=th.get_num_threads(), inter_op_parallelism_threads=1,
    )
    if device.type == "cuda":
        config.gpu_options.allow_growth = True
        config.gpu_options.visible_device_list = str(device.index or 0)
    else:
        config.device_count["GPU"] = 0
    return config

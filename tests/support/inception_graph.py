"""TensorFlow graphs with the tensor names of classify_image_graph_def.pb: the whole Inception-v3, and a tiny one.

The network is written down a second time, in TensorFlow's own operations and paddings.
"""

import os

import numpy as np

from support.later import Later

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = Later("tensorflow")


def write_inception(path, tensors):
    """The whole graph as a frozen file."""
    def constant(name):
        return tf.constant(tensors[name], name=name)

    def conv(x, name, stride=1, padding="SAME"):
        y = tf.nn.conv2d(x, constant(f"{name}/conv2d_params"), stride, padding, name=f"{name}/Conv2D")
        beta, _, mean, variance = (
            constant(f"{name}/batchnorm/{part}") for part in ("beta", "gamma", "moving_mean", "moving_variance")
        )
        # gamma is in the graph and takes no part, as OpenAI's state dict of the same network has none
        y = tf.nn.batch_normalization(y, mean, variance, beta, None, 1e-3, name=f"{name}/batchnorm_1")
        return tf.nn.relu(y, name=name)

    def chain(x, *names):
        for name in names:
            x = conv(x, name)
        return x

    def max_pool(x):
        return tf.nn.max_pool2d(x, 3, 2, "VALID")

    def small(x, name):
        return tf.concat([
            conv(x, f"{name}/conv"),
            chain(x, f"{name}/tower/conv", f"{name}/tower/conv_1"),
            chain(x, f"{name}/tower_1/conv", f"{name}/tower_1/conv_1", f"{name}/tower_1/conv_2"),
            conv(tf.nn.avg_pool2d(x, 3, 1, "SAME"), f"{name}/tower_2/conv"),
        ], 3)

    def middle(x, name):
        return tf.concat([
            conv(x, f"{name}/conv"),
            chain(x, f"{name}/tower/conv", f"{name}/tower/conv_1", f"{name}/tower/conv_2"),
            chain(x, f"{name}/tower_1/conv", *(f"{name}/tower_1/conv_{i}" for i in range(1, 5))),
            conv(tf.nn.avg_pool2d(x, 3, 1, "SAME"), f"{name}/tower_2/conv"),
        ], 3)

    def large(x, name, pooled):
        fork, fork_1 = conv(x, f"{name}/tower/conv"), chain(x, f"{name}/tower_1/conv", f"{name}/tower_1/conv_1")
        return tf.concat([
            conv(x, f"{name}/conv"),
            conv(fork, f"{name}/tower/mixed/conv"), conv(fork, f"{name}/tower/mixed/conv_1"),
            conv(fork_1, f"{name}/tower_1/mixed/conv"), conv(fork_1, f"{name}/tower_1/mixed/conv_1"),
            conv(pooled, f"{name}/tower_2/conv"),
        ], 3)

    with tf.Graph().as_default() as graph:
        x = scaled_input()
        x = conv(x, "conv", 2, "VALID")
        x = conv(x, "conv_1", 1, "VALID")
        x = max_pool(conv(x, "conv_2"))
        x = conv(x, "conv_3", 1, "VALID")
        x = max_pool(conv(x, "conv_4", 1, "VALID"))
        for name in ("mixed", "mixed_1", "mixed_2"):
            x = small(x, name)
        before = chain(x, "mixed_3/tower/conv", "mixed_3/tower/conv_1")
        x = tf.concat([
            conv(x, "mixed_3/conv", 2, "VALID"), conv(before, "mixed_3/tower/conv_2", 2, "VALID"), max_pool(x)
        ], 3)
        for name in ("mixed_4", "mixed_5", "mixed_6", "mixed_7"):
            x = middle(x, name)
        before = chain(x, "mixed_8/tower_1/conv", "mixed_8/tower_1/conv_1", "mixed_8/tower_1/conv_2")
        x = tf.concat([
            conv(conv(x, "mixed_8/tower/conv"), "mixed_8/tower/conv_1", 2, "VALID"),
            conv(before, "mixed_8/tower_1/conv_3", 2, "VALID"),
            max_pool(x),
        ], 3)
        x = large(x, "mixed_9", tf.nn.avg_pool2d(x, 3, 1, "SAME"))
        x = large(x, "mixed_10", tf.nn.max_pool2d(x, 3, 1, "SAME"))
        pool = tf.nn.avg_pool2d(x, 8, 1, "VALID", name="pool_3")
        classify(pool, constant("softmax/weights"), constant("softmax/biases"))
    write(graph, path)


def write_tiny(path, dim=24, classes=10, seed=0):
    """A graph of a few operations, for images [1,H,W,3]; returns its weights for a calculation beside it."""
    rng = np.random.default_rng(seed)
    weights = {
        "spatial": rng.standard_normal((3, 9)).astype(np.float32),
        "pool": rng.standard_normal((9, dim)).astype(np.float32),
        "last": rng.standard_normal((dim, classes)).astype(np.float32),
        "bias": rng.standard_normal(classes).astype(np.float32),
    }
    with tf.Graph().as_default() as graph:
        x = tf.nn.avg_pool2d(scaled_input(), 11, 18, "VALID")                   # 17x17
        spatial = tf.nn.relu(tf.nn.conv2d(x, weights["spatial"][None, None], 1, "VALID"), name="mixed_6/conv")
        pool = tf.nn.relu(tf.nn.conv2d(
            tf.nn.avg_pool2d(spatial, 17, 1, "VALID"), weights["pool"][None, None], 1, "VALID"
        ), name="pool_3")
        classify(pool, tf.constant(weights["last"]), weights["bias"])
    write(graph, path)
    return weights


def scaled_input():
    image = tf.compat.v1.placeholder(tf.uint8, (None, None, 3), name="DecodeJpeg")
    batch = tf.expand_dims(tf.cast(image, tf.float32), 0, name="ExpandDims")
    resized = tf.compat.v1.image.resize_bilinear(batch, (299, 299), name="ResizeBilinear")
    return tf.multiply(tf.subtract(resized, 128.0, name="Sub"), 1 / 128, name="Mul")


def classify(pool, weight, bias):
    flat = tf.reshape(pool, (1, -1), name="pool_3/_reshape")                    # for the one image of the graph
    tf.nn.softmax(tf.matmul(flat, weight, name="softmax/logits/MatMul") + bias, name="softmax")


def write(graph, path):
    with open(path, "wb") as file:
        file.write(graph.as_graph_def().SerializeToString())

"""The operations that a TensorFlow graph may use. A graph is a program: others read and write files, or run Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cm.errors import UserError
from cm.io.untrusted import shown

PUBLISHED = frozenset((
    "AvgPool", "BatchNormWithGlobalNormalization", "BiasAdd", "Cast", "CheckNumerics", "Concat", "Const", "Conv2D",
    "DecodeJpeg", "ExpandDims", "Identity", "MatMul", "MaxPool", "Mul", "Relu", "Reshape", "ResizeBilinear", "Softmax",
    "Sub",
))
"""What `classify_image_graph_def.pb` is made of."""
ARITHMETIC = frozenset((
    "Add", "AddV2", "ConcatV2", "FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3", "Maximum", "Mean", "Minimum",
    "NoOp", "Pack", "Pad", "Placeholder", "RealDiv", "Relu6", "Rsqrt", "Shape", "Sqrt", "Square", "Squeeze",
    "StridedSlice", "Sum", "Transpose",
))
"""What other exports of such networks use instead."""
ALLOWED = PUBLISHED | ARITHMETIC
"""All compute their outputs from their inputs and have no other effect; none calls a function, branches or repeats."""


def check_operations(graph: Any, path: str) -> None:
    """Refuse a graph before it is imported.

    :param graph: a GraphDef.
    :param path: what messages call its file.
    :raises UserError: if a node, of the graph or of a function in its library, is of another operation, or takes a
        function.
    """
    for node, place in _nodes(graph):
        if node.op not in ALLOWED:
            raise UserError(
                f"{path}: the node {shown(node.name)}{place} has the operation {shown(node.op)}, which is not one of "
                "those that a network for images needs. A graph is a program that could read and write your files, and "
                "it was not run. An Inception graph can be read as weights alone: --inception torch:PATH"
            )
        for name, value in node.attr.items():
            if value.HasField("func") or value.list.func:
                raise UserError(f"{path}: the node {shown(node.name)}{place} calls a function by its attribute "
                                f"{shown(name)}; the graph was not run. Give a frozen graph without functions")


def _nodes(graph: Any) -> Iterator[tuple[Any, str]]:
    """Every node, and where it stands if not in the graph itself."""
    for node in graph.node:
        yield node, ""
    for function in graph.library.function:
        for node in function.node_def:
            yield node, f" of the function {shown(function.signature.name)}"

"""Graphs of TensorFlow that would do more than compute: refused by operation and node, before anything is imported."""

import numpy as np
import pytest

from cm.errors import UserError
from evaluations.features import load_extractor
from evaluations.features.graph_operations import ALLOWED, check_operations
from support.inception_graph import tf, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A graph that may run."""
    path = tmp_path_factory.mktemp("graph") / "tiny.pb"
    write_tiny(path)
    definition = tf.compat.v1.GraphDef()
    definition.ParseFromString(path.read_bytes())
    return definition


def refused(graph, tmp_path, monkeypatch, message):
    """Load it as an extractor: the error, and nothing imported."""
    (tmp_path / "graph.pb").write_bytes(graph.SerializeToString())
    with monkeypatch.context() as patch:
        patch.setattr("tensorflow.import_graph_def", None)        # calling it would be a TypeError
        with pytest.raises(UserError, match=message):
            load_extractor(f"{tmp_path}/graph.pb")


def joined(tiny, write):
    """The tiny graph, and what `write` adds to another."""
    with tf.Graph().as_default() as graph:
        write()
    both = tf.compat.v1.GraphDef()
    both.CopyFrom(tiny)
    added = graph.as_graph_def()
    both.node.extend(added.node)
    both.library.CopyFrom(added.library)
    return both


def test_files_are_neither_written_nor_read(tiny, tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("a month of work")

    def write():
        with tf.control_dependencies([tf.io.write_file(str(victim), "", name="evil/write")]):
            tf.identity(tf.io.read_file(str(victim), name="evil/read"), name="evil/out")

    graph = joined(tiny, write)
    refused(graph, tmp_path, monkeypatch, "the node 'evil/write' has the operation 'WriteFile'.*it was not run")
    graph.node.remove(next(node for node in graph.node if node.op == "WriteFile"))
    refused(graph, tmp_path, monkeypatch, "the node 'evil/read' has the operation 'ReadFile'")
    assert victim.read_text() == "a month of work"


def test_functions_loops_and_python_are_refused(tiny, tmp_path, monkeypatch):
    def function():
        @tf.function
        def inside(x):
            return tf.io.read_file(x)

        inside(tf.constant("/etc/passwd"))

    def loop():
        tf.while_loop(lambda x: x < 2, lambda x: x + 1, [tf.constant(0)])

    def branch():
        tf.cond(tf.compat.v1.placeholder(tf.bool, ()), lambda: tf.constant(1), lambda: tf.constant(2))

    refused(joined(tiny, function), tmp_path, monkeypatch, "(StatefulPartitionedCall|PartitionedCall)")
    refused(joined(tiny, loop), tmp_path, monkeypatch, "the operation '(StatelessWhile|While|Enter|Less)'")
    refused(joined(tiny, branch), tmp_path, monkeypatch, "the operation '(StatelessIf|If|Switch)'")
    python = joined(tiny, lambda: tf.compat.v1.py_func(lambda: np.float32(0), [], tf.float32, name="evil/python"))
    refused(python, tmp_path, monkeypatch, "'evil/python' has the operation 'PyFunc'")


def test_a_function_that_nobody_calls_yet_is_looked_through(tiny, tmp_path, monkeypatch):
    graph = joined(tiny, lambda: None)
    function = graph.library.function.add()
    function.signature.name = "hidden"
    function.node_def.add(name="inside", op="WriteFile")
    refused(graph, tmp_path, monkeypatch, "the node 'inside' of the function 'hidden' has the operation 'WriteFile'")
    del function.node_def[:]
    graph.node.add(name="call", op="hidden")                # a function is called by its name, as an operation
    refused(graph, tmp_path, monkeypatch, "the node 'call' has the operation 'hidden'")
    graph.node[-1].op = "Identity"
    graph.node[-1].attr["f"].func.name = "hidden"
    refused(graph, tmp_path, monkeypatch, "the node 'call' calls a function by its attribute 'f'")


def test_what_may_run_is_stateless(tiny):
    """TensorFlow marks the operations that have an effect; that of CheckNumerics is an error for NaN."""
    from tensorflow.python.framework import op_def_registry

    check_operations(tiny, "tiny.pb")
    for name in ALLOWED:
        definition = op_def_registry.get(name)
        assert definition is not None and (not definition.is_stateful or name == "CheckNumerics"), name
        assert not any(argument.type in ("func", "list(func)") for argument in definition.attr), name

"""The frozen part in LiteRT (XNNPACK), which TensorFlow brings: its converter and its interpreter."""

from __future__ import annotations

import hashlib
import queue
import warnings
from typing import Any, Final

import numpy as np
import tensorflow as tf

from kubegraft.modeling.engines.interface import IMAGES_AT_ONCE, FrozenGraph
from kubegraft.processors import usable_processors
from kubegraft.tensorflow_setup import quiet_stderr

# Each interpreter packs the weights for itself.
_MOST_WEIGHT_BYTES: Final = 2**29
_MOST_WORKERS: Final = 8


class LiteRtForward:
    """A flatbuffer and its interpreters, one for each worker; see `FrozenForward`.

    Workers of one thread each don't wait for one another, so that decoding beside them costs no more than its
    own time. The rows do not depend on the number of workers or threads, nor on which images come together.
    """

    name = "litert"
    batch_size = 8 * IMAGES_AT_ONCE

    def __init__(self, flatbuffer: bytes, input_size: int, num_threads: int = 0) -> None:
        """Make the interpreters.

        Args:
            flatbuffer: Made by `convert`.
            input_size: Side of the images in pixels.
            num_threads: Threads of all workers together; 0 for every processor that this process may use.

        Raises:
            ValueError: If it is none, or this build lacks one of its operations.
            RuntimeError: If it can't be prepared.
        """
        processors = num_threads or usable_processors()
        fit = max(1, _MOST_WEIGHT_BYTES // max(len(flatbuffer), 1))
        self.num_workers = min(processors, fit, _MOST_WORKERS)
        self.digest = hashlib.sha256(f"litert {tf.__version__} ".encode() + flatbuffer).hexdigest()
        self._shape = (IMAGES_AT_ONCE, input_size, input_size, 3)
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self.num_workers):
            self._idle.put(_interpreter(flatbuffer, self._shape, processors // self.num_workers))

    def forward(self, images: np.ndarray) -> np.ndarray:
        """See `FrozenForward`."""
        interpreter = self._idle.get()
        try:
            parts = [
                self._few(interpreter, images[start : start + IMAGES_AT_ONCE])
                for start in range(0, len(images), IMAGES_AT_ONCE)
            ]
        finally:
            self._idle.put(interpreter)
        return np.concatenate(parts)

    def _few(self, interpreter: Any, images: np.ndarray) -> np.ndarray:
        given = images
        if len(images) < IMAGES_AT_ONCE:
            given = np.zeros(self._shape, np.float32)
            given[: len(images)] = images
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], given)
        interpreter.invoke()
        rows: np.ndarray = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        return rows[: len(images)]


def convert(graph: FrozenGraph) -> bytes:
    """Return the flatbuffer of a graph, in float32.

    Raises:
        Exception: Whatever the converter raises for what it can't convert.
    """
    traced = graph.traced
    constant = _with_constants(traced)
    with quiet_stderr():
        if constant is None:
            converter = tf.lite.TFLiteConverter.from_concrete_functions([traced])
        else:
            # From a graph without variables, which the older class takes, an equal flatbuffer comes in a quarter of the
            # time: the newer one first rebuilds the whole graph in Python.
            converter = tf.compat.v1.lite.TFLiteConverter(constant, traced.inputs[:1], traced.outputs)
        flatbuffer: bytes = converter.convert()
    return flatbuffer


def _with_constants(traced: Any) -> Any:
    """Return a concrete function's graph with the values of its variables in it.

    None for one that calls others, or does anything with a variable but read it.
    """
    described = traced.graph.as_graph_def()
    if described.library.function:
        return None
    handles = {id(variable.handle): variable for variable in traced.variables}
    captured = {inner.op.name: outer for outer, inner in traced.graph.captures}
    constant = tf.compat.v1.GraphDef(versions=described.versions)
    for node in described.node:
        given = [captured.get(name.removeprefix("^")) for name in node.input]
        if node.op == "ReadVariableOp":
            variable = handles.get(id(captured.get(node.input[0])))
            if variable is None:
                return None
            _add_constant(constant, node.name, variable)
        elif any(each is not None and each.dtype == tf.resource for each in given):
            return None
        elif node.name not in captured:
            constant.node.add().CopyFrom(node)
        elif captured[node.name].dtype != tf.resource:
            _add_constant(constant, node.name, captured[node.name])
    return constant


def _add_constant(graph: Any, name: str, value: Any) -> None:
    node = graph.node.add(name=name, op="Const")
    node.attr["dtype"].type = value.dtype.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value.numpy()))


def _interpreter(flatbuffer: bytes, shape: tuple[int, ...], num_threads: int) -> Any:
    with quiet_stderr(), warnings.catch_warnings():
        # TensorFlow 2.21, which we pin, still has it; the ADR says what follows it.
        warnings.filterwarnings("ignore", message=r"\s*Warning: tf.lite.Interpreter is deprecated")
        interpreter = tf.lite.Interpreter(model_content=flatbuffer, num_threads=num_threads)
        interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], shape)
        interpreter.allocate_tensors()
    return interpreter

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from kubegraft.training import xla_on_cpu
from kubegraft.training.xla_on_cpu import clipped, dense, tracing_for_xla_on_cpu

DIM, UNITS = 24, 5


def gradients_of(layer, inputs, ours):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = dense(layer, inputs) if ours else layer(inputs)
        loss = tf.reduce_sum(tf.sin(outputs))
    return outputs, *tape.gradient(loss, [layer.kernel.value, layer.bias.value, inputs])


@pytest.fixture
def layer():
    keras.utils.set_random_seed(1)
    made = keras.layers.Dense(UNITS, activation="relu", bias_initializer="random_normal")
    made.build((None, DIM))
    return made


def examples(number):
    return tf.random.stateless_normal([number, DIM], [0, 1])


def compiled(function):
    """The function as XLA compiles it for a CPU."""

    @tf.function(jit_compile=True)
    def traced(*arguments):
        with tracing_for_xla_on_cpu():
            return function(*arguments)

    return traced


def compiled_gradients_of(layer):
    return compiled(lambda inputs: gradients_of(layer, inputs, ours=True))


@pytest.mark.parametrize("num_examples", [1, 63, 64, 200])
def test_a_dense_layer_and_its_gradients_are_those_of_keras(layer, num_examples):
    inputs = examples(num_examples)
    ours, usual = compiled_gradients_of(layer)(inputs), gradients_of(layer, inputs, ours=False)
    for found, expected in zip(ours, usual, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_examples", "apart"), [(63, False), (64, True)])
def test_the_inputs_of_many_examples_are_transposed_before_they_are_multiplied(layer, num_examples, apart):
    program = compiled_gradients_of(layer).experimental_get_compiler_ir(examples(num_examples))(
        "optimized_hlo"
    )
    of_kernel = re.findall(rf"f32\[{DIM},{UNITS}\]\S* dot\(.*lhs_contracting_dims={{(\d)}}", program)
    assert of_kernel == ["1" if apart else "0"]


def test_elsewhere_keras_computes_it(layer, monkeypatch):
    monkeypatch.setattr(xla_on_cpu, "_product", lambda *_: pytest.fail("not to be called"))
    tf.function(lambda: gradients_of(layer, examples(200), ours=True))()


def test_where_precision_is_mixed_keras_casts(layer):
    """The last layer of a head computes in float32 from what hidden layers said in bfloat16."""
    inputs = tf.cast(examples(200), tf.bfloat16)
    found, expected = compiled_gradients_of(layer)(inputs), gradients_of(layer, inputs, ours=False)
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(tf.cast(one, tf.float32), tf.cast(other, tf.float32), rtol=1e-2, atol=1e-3)


def clipped_by_xla(gradients, limit):
    return compiled(lambda *each: clipped(each, limit))(*gradients)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_gradients_are_clipped_as_tensorflow_clips_them(limit):
    shapes = [(16, 10), (7, 3), (5,), (3, 3, 4, 6), (1,), (24, 1)]
    gradients = [tf.random.stateless_normal(shape, [1, n]) for n, shape in enumerate(shapes)]
    expected = tf.clip_by_global_norm(gradients, limit)[0]
    for one, other in zip(clipped_by_xla(gradients, limit), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_gradients_without_a_norm_become_nan(bad):
    """So that the loop sees that it diverged, as with TensorFlow's."""
    wrong = np.ones((16, 10), np.float32)
    wrong[9, 4] = bad
    gradients = [tf.ones((8, 3)), tf.constant(wrong)]
    for ours, usual in zip(
        clipped_by_xla(gradients, 1.0), tf.clip_by_global_norm(gradients, 1.0)[0], strict=True
    ):
        assert np.isnan(ours).all()
        assert np.isnan(usual).all()

"""The optimizer's one-kernel update, held against Keras's own AdamW."""

import keras
import numpy as np

from kubegraft.training.optimizer import GlobalAdamW


def test_the_update_is_that_of_keras_adamw():
    random = np.random.default_rng(0)
    start = random.standard_normal((5, 3)).astype(np.float32)
    ours, theirs = keras.Variable(start), keras.Variable(start)
    optimizer = GlobalAdamW(0.1, variables=[ours], rate_multipliers=[1.0], weight_decay=0.2)
    reference = keras.optimizers.AdamW(0.1, weight_decay=0.2)
    for _ in range(5):
        gradient = random.standard_normal((5, 3)).astype(np.float32)
        optimizer.apply([gradient], [ours])
        reference.apply([gradient], [theirs])
        # The kernel takes 1 - beta in float32, Keras in float64: a few parts in 1e5 of a step of 0.1.
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=0, atol=3e-5)


def test_a_multiplier_acts_on_the_update_and_biases_do_not_decay():
    kernel, bias, slow = keras.Variable([[1.0]]), keras.Variable([1.0]), keras.Variable([1.0])
    optimizer = GlobalAdamW(
        0.1, variables=[kernel, bias, slow], rate_multipliers=[1.0, 1.0, 0.5], weight_decay=1.0
    )
    optimizer.apply([np.ones((1, 1), np.float32), *[np.ones(1, np.float32)] * 2], [kernel, bias, slow])
    np.testing.assert_allclose(
        [kernel.numpy()[0, 0], bias.numpy()[0], slow.numpy()[0]], [0.8, 0.9, 0.95], rtol=1e-5
    )

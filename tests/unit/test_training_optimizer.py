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


def test_averages_forget_the_start_and_then_follow_about_ten_steps():
    weight = keras.Variable([1.0])
    optimizer = GlobalAdamW(
        0.1, variables=[weight], rate_multipliers=[1.0], weight_decay=0.0, average_decay=0.9
    )
    expected = 1.0
    for step in range(1, 101):
        optimizer.apply([np.ones(1, np.float32)], [weight])
        optimizer.update_averages([weight])
        past = min(0.9, step / (step + 9))
        expected = past * expected + (1 - past) * float(weight.numpy()[0])
        np.testing.assert_allclose(optimizer.averages[0].numpy(), [expected], rtol=1e-5)
    # Nine steps behind a weight that falls by 0.1 a step.
    np.testing.assert_allclose(expected - weight.numpy()[0], 0.9, atol=0.02)


def test_a_gradient_far_below_epsilon_moves_a_weight_in_proportion_to_itself():
    weak, weaker = keras.Variable([0.0]), keras.Variable([0.0])
    optimizer = GlobalAdamW(
        0.1, variables=[weak, weaker], rate_multipliers=[1.0, 1.0], weight_decay=0.0, epsilon=1e-2
    )
    optimizer.apply([np.full(1, 2e-6, np.float32), np.full(1, 1e-6, np.float32)], [weak, weaker])
    assert -1e-4 < weak.numpy()[0] < 0
    np.testing.assert_allclose(weak.numpy(), 2 * weaker.numpy(), rtol=1e-3)

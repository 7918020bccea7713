"""AdamW with a rate of its own for each variable, for a loop that reduces gradients itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf


class WarmUpCosine(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """Linear rise to a peak, then half a cosine down to zero.

    Source:
        Loshchilov & Hutter 2017, "SGDR", eq. 5 with one cycle; the warm-up of Goyal et al. 2017,
        "Accurate, Large Minibatch SGD", section 2.2.
    """

    def __init__(self, peak: float, num_steps: int, num_warmup_steps: int) -> None:
        self.peak = peak
        self.num_steps = max(num_steps, 1)
        self.num_warmup_steps = num_warmup_steps

    def __call__(self, step: Any) -> Any:
        """Return the rate at `step`, a scalar from 0 to `num_steps`."""
        step = keras.ops.cast(step, "float32")
        rising = self.peak * (step + 1) / max(self.num_warmup_steps, 1)
        done = (step - self.num_warmup_steps) / max(self.num_steps - self.num_warmup_steps, 1)
        falling = 0.5 * self.peak * (1 + keras.ops.cos(np.pi * keras.ops.clip(done, 0.0, 1.0)))
        return keras.ops.where(step < self.num_warmup_steps, rising, falling)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"peak": self.peak, "num_steps": self.num_steps, "num_warmup_steps": self.num_warmup_steps}


class GlobalAdamW(keras.optimizers.Adam):  # type: ignore[misc]
    """AdamW for gradients that are already summed over all replicas.

    Keras's own optimizers sum gradients across replicas when they apply them, after clipping: each replica
    would clip its part. Here the loop sums first, so that clipping sees the global gradient, as on one
    device. Learning-rate multipliers act on the update, since scaling gradients does nothing to Adam.

    Source:
        Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; discriminative rates
        after Howard & Ruder 2018, "Universal Language Model Fine-tuning", section 3.2.
    """

    def __init__(
        self,
        learning_rate: Any,
        *,
        variables: Sequence[Any],
        rate_multipliers: Sequence[float],
        weight_decay: float,
        epsilon: float = 1e-7,
        average_decay: float = 0.0,
    ) -> None:
        """Build the optimizer for `variables`.

        Args:
            learning_rate: A rate or schedule.
            variables: Trainable variables, in the order in which gradients are applied.
            rate_multipliers: Factor on the learning rate of each variable.
            weight_decay: Decay of kernels (variables with more than one axis), not of biases or scales.
            epsilon: Added to the root of the squared gradients' mean. Gradients far below it move a weight in
                proportion to themselves, not by a whole rate.
            average_decay: Share in [0, 1) of the past in the variables' moving averages; 0 keeps none.
        """
        super().__init__(learning_rate, epsilon=epsilon)
        self._rate_multipliers = list(rate_multipliers)
        self._decays = [weight_decay if len(variable.shape) > 1 else 0.0 for variable in variables]
        self._average_decay = average_decay
        self.averages: list[Any] = []
        self.build(list(variables))

    def build(self, variables: Any) -> None:
        """Make the moments, and the averages if they are wanted; called once."""
        super().build(variables)
        if self._average_decay:
            self.averages = [
                self.add_variable_from_reference(each, name="average", initializer="zeros")
                for each in variables
            ]
            for average, variable in zip(self.averages, variables, strict=True):
                average.assign(variable)

    def update_averages(self, variables: Sequence[Any]) -> None:
        """Move the averages towards the variables; to be called after `apply`.

        The decay rises to its value, so that the first steps' averages are not the start.

        Source:
            Polyak & Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; the rising decay is that of
            TensorFlow's `ExponentialMovingAverage`.
        """
        if not self.averages:
            return
        step = keras.ops.cast(self.iterations, "float32")
        past = keras.ops.minimum(self._average_decay, step / (step + 9.0))
        for average, variable in zip(self.averages, variables, strict=True):
            self.assign_sub(average, (average - variable) * keras.ops.cast(1 - past, average.dtype))

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        return grads_and_vars

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Apply one update to one variable; called by Keras."""
        place = self._get_variable_index(variable)
        rate = learning_rate * self._rate_multipliers[place]
        if self._decays[place]:
            self.assign_sub(variable, variable * keras.ops.cast(rate * self._decays[place], variable.dtype))
        # One kernel that reads and writes each number once; as Keras writes Adam, it is a dozen.
        step = keras.ops.cast(self.iterations + 1, variable.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[place].value.handle,
            v=self._velocities[place].value.handle,
            beta1_power=tf.pow(self.beta_1, step),
            beta2_power=tf.pow(self.beta_2, step),
            lr=keras.ops.cast(rate, variable.dtype),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=keras.ops.cast(gradient, variable.dtype),
        )

"""Which examples form which batch: a pure function of seed, epoch and step.

Everything random about an epoch is decided here, in numpy, from its number. So training can start at any
step of any epoch, as a resumed run does, and see exactly what an undisturbed run would have seen; and the
global batch is the same on one device or on many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class EpochBatches:
    """The global batches of one epoch; arrays of shape `[num_steps, batch_size]`.

    Attributes:
        index: `int64`, example numbers in the split.
        partner: `int64`, examples that mixup mixes in.
        share: `float32` in [0, 1], share of `index` against `partner`; 1 without mixup.
        weight: `float32`, weight of the example's loss divided by the number of real examples in its batch,
            0 for padding; the weighted sum over a global batch is its mean loss.
        real: `float32`, 1 for a real example and 0 for padding.
        position: `int32`, place in the global batch; keys the dropout masks.
        key: `int32`, key of the example's augmentation in this epoch.
        epoch: Number of the epoch, from 0.
    """

    index: np.ndarray
    partner: np.ndarray
    share: np.ndarray
    weight: np.ndarray
    real: np.ndarray
    position: np.ndarray
    key: np.ndarray
    epoch: int = 0

    @property
    def num_steps(self) -> int:
        """Number of global batches."""
        return int(self.index.shape[0])


def epoch_batches(
    labels: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    class_weights: np.ndarray | None = None,
    mixup_alpha: float = 0.0,
) -> EpochBatches:
    """Return the batches of one epoch.

    The last batch is filled up with examples of the same epoch at weight 0, so that every replica always
    gets the same number of examples.

    Args:
        labels: `int32[num_examples]`.
        batch_size: Global batch size, over all replicas.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        shuffle: Whether the order is random; False for evaluation.
        class_weights: `float32[num_classes]`, or None for 1 each.
        mixup_alpha: Parameter of mixup's Beta distribution; 0 turns mixup off. Zhang et al. 2018,
            "mixup: Beyond Empirical Risk Minimization".
    """
    num_examples = len(labels)
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(num_examples) if shuffle else np.arange(num_examples)
    num_steps = -(-num_examples // batch_size)
    shape = (num_steps, batch_size)
    filled = np.resize(order, num_steps * batch_size)
    real = (np.arange(filled.size) < num_examples).astype(np.float32).reshape(shape)
    example_weight = np.ones(num_examples) if class_weights is None else class_weights[labels]
    share = generator.beta(mixup_alpha, mixup_alpha, filled.size) if mixup_alpha else np.ones(filled.size)
    # Each key is drawn for the example, not for its place, so that padding never shifts another's key.
    keys = generator.integers(0, 2**31 - 1, num_examples, dtype=np.int32)
    return EpochBatches(
        index=filled.reshape(shape).astype(np.int64),
        partner=np.roll(filled, 1).reshape(shape).astype(np.int64),
        share=np.maximum(share, 1 - share).astype(np.float32).reshape(shape),
        weight=(example_weight[filled].reshape(shape) * real / real.sum(1, keepdims=True)).astype(np.float32),
        real=real,
        position=np.broadcast_to(np.arange(batch_size, dtype=np.int32), shape),
        key=keys[filled].reshape(shape),
        epoch=epoch,
    )


def balanced_class_weights(class_counts: np.ndarray) -> np.ndarray:
    """Return `float32[num_classes]` weights that let every class count the same, with a mean of 1 over images.

    Args:
        class_counts: `int[num_classes]`, images of each class, each at least 1.
    """
    counts = np.asarray(class_counts, np.float64)
    weights: np.ndarray = (counts.sum() / (len(counts) * counts)).astype(np.float32)
    return weights

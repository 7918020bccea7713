"""Boundary activations: what the frozen blocks make of each image and view, computed once and trained from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from kubegraft.modeling.splitting import Boundary
from kubegraft.training.batches import EpochBatches
from kubegraft.training.frozen_pass import FrozenPass
from kubegraft.training.sources import ImageSource, as_it_is, steady


class ActivationSource:
    """Examples of one split as boundary activations, of one view or of several in turn.

    In epoch e an image is seen in view (number of the image + e) modulo the number of views: each epoch mixes
    all views, and each image comes round to each of its own.
    """

    def __init__(
        self, labels: np.ndarray, boundary: Boundary, num_views: int, rows: Callable[[], np.ndarray]
    ) -> None:
        """Take where the activations come from; nothing is computed before they are asked for.

        Args:
            labels: `int32[num_examples]`.
            boundary: What the activations are.
            num_views: Views of each image, at least 1.
            rows: Returns `[num_views * num_examples, boundary.row_length]`, all first views before all second ones;
                may be memory-mapped. bfloat16 comes as its bits, uint16.
        """
        self.labels = labels
        self._boundary, self._num_views, self._make_rows = boundary, num_views, rows

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The activations, computed now if they are not yet; see `__init__`."""
        return self._make_rows()

    def prepare(self) -> None:
        """See `steps.RowSource`."""
        _ = self.rows

    def inputs(self, batches: EpochBatches, rows: slice, columns: slice, batch_size: int) -> Any:
        """Return batches of activations, `[batch_size, boundary.row_length]`; see `sources.Source`."""
        kept = self.rows
        wanted = self._wanted(batches)[rows, columns].reshape(-1, batch_size)

        def load(numbers: Any) -> Any:
            found = tf.numpy_function(
                lambda numbers: kept.take(numbers, axis=0), [numbers], tf.as_dtype(kept.dtype), stateful=False
            )
            return tf.ensure_shape(self._as_computed(found), (batch_size, self._boundary.row_length))

        return steady(tf.data.Dataset.from_tensor_slices(wanted).map(as_it_is(load)))

    def batch(self, batches: EpochBatches, step: int, columns: slice = slice(None)) -> Any:
        """Return the activations of one batch, `[batch_size, boundary.row_length]`; see `steps.RowSource`."""
        return self._as_computed(tf.constant(self.rows.take(self._wanted(batches)[step, columns], axis=0)))

    def _wanted(self, batches: EpochBatches) -> np.ndarray:
        """Return the numbers of the rows of an epoch's batches, `int[num_steps, batch_size]`."""
        view = (batches.index + batches.epoch) % self._num_views
        numbers: np.ndarray = view * len(self.labels) + batches.index
        return numbers

    def _as_computed(self, stored: Any) -> Any:
        return tf.bitcast(stored, tf.bfloat16) if self._boundary.dtype == "bfloat16" else stored


def image_activations(
    frozen_pass: FrozenPass, boundary: Boundary, images: ImageSource, path: Path
) -> ActivationSource:
    """Return the activations of a split's images, and of each view if `images` has several.

    Args:
        frozen_pass: The blocks before the cut.
        boundary: What crosses the cut.
        images: The split, in views.
        path: File that keeps the activations.
    """
    rows = functools.partial(frozen_pass.rows, images, path)
    return ActivationSource(images.reader.labels, boundary, max(images.num_views, 1), rows)

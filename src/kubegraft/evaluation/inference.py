"""What a classifier says about every image of a split: its frozen part from the feature cache where that has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorflow as tf

from kubegraft.cache import FeatureCache
from kubegraft.data.shards import SplitReader
from kubegraft.evaluation.metrics import Answers
from kubegraft.modeling.backbones import get_backbone
from kubegraft.modeling.classifier import LoadedClassifier, parts
from kubegraft.modeling.splitting import split_backbone
from kubegraft.training.frozen_pass import FrozenPass, PassCounts
from kubegraft.training.sources import ImageSource
from kubegraft.training.trainables import HeadOnFeatures

_BATCH_SIZE: Final = 32


def answer_split(
    loaded: LoadedClassifier, reader: SplitReader, directory: Path, counts: PassCounts, next_cut: int = 0
) -> Answers:
    """Return the model's answers to every image, in inference mode and in the reader's order.

    The blocks that training left frozen are computed as they were for training (`frozen_pass`), so that what the
    cache holds of them is not computed again; all behind them is Keras's.

    Args:
        loaded: Classifier.
        reader: Split with at least one image.
        directory: For the rows that are computed.
        counts: Is added to.
        next_cut: Blocks that training unfroze of the model that is asked next, on the same backbone: what it needs is
            on the way, and the cache takes it. 0 for none.

    Raises:
        DataError: If an image can't be read or decoded.
        EvaluationError: If the model's outputs are no probabilities.
    """
    frozen_pass, behind = _halves(loaded, counts, next_cut)
    rows = frozen_pass.rows(ImageSource(reader, loaded.metadata["input_size"]), directory / "rows.npy")

    @tf.function(input_signature=[tf.TensorSpec([None, rows.shape[1]], tf.float32)], autograph=False)
    def answer(some: Any) -> Any:
        return tf.nn.softmax(behind(some))

    answers = []
    for start in range(0, len(rows), _BATCH_SIZE):
        part = slice(start, start + _BATCH_SIZE)
        answers.append(Answers.of(answer(np.asarray(rows[part])).numpy(), reader.labels[part]))
    return Answers.joined(answers)


def _halves(
    loaded: LoadedClassifier, counts: PassCounts, next_cut: int
) -> tuple[FrozenPass, Callable[[Any], Any]]:
    """Return the pass through the frozen blocks, and a function from its rows to logits `float32[batch, classes]`.

    Where all blocks were trained, the pass goes through them all: the model's own, which no other model shares.
    """
    model_parts, backbone = parts(loaded.model), get_backbone(loaded.metadata["backbone"])
    head, num_unfrozen = HeadOnFeatures(model_parts), loaded.metadata["num_unfrozen_blocks"]
    how = {
        "strategy": tf.distribute.get_strategy(),
        "policy": "float32",
        "cache": FeatureCache.open(),
        "counts": counts,
    }
    if not 0 < num_unfrozen < backbone.num_blocks:
        beside = None
        if how["cache"].enabled and 0 < next_cut < backbone.num_blocks:
            beside = split_backbone(model_parts.backbone, backbone, next_cut)
        return FrozenPass.to_pooled(model_parts, backbone, beside, **how), head.logits
    split = split_backbone(model_parts.backbone, backbone, num_unfrozen)
    return (
        FrozenPass.to_boundary(split, backbone, **how),
        lambda rows: head.logits(model_parts.pool(split.outputs(rows))),
    )

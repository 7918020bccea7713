"""From a resolved config to the numbers the loop takes."""

from __future__ import annotations

import numpy as np

from kubegraft.config import TrainingConfig
from kubegraft.data.manifest import Manifest
from kubegraft.recipes import MIXUP_ALPHA
from kubegraft.training.batches import balanced_class_weights
from kubegraft.training.loop import LoopConfig


def transforms_of(augmentation: str) -> tuple[tuple[str, ...], float]:
    """Return the transforms of single images, and mixup's alpha (0 for none), of a resolved `augmentation`."""
    names = () if augmentation == "none" else tuple(name.strip() for name in augmentation.split(","))
    return tuple(name for name in names if name != "mixup"), MIXUP_ALPHA if "mixup" in names else 0.0


def loop_config(
    config: TrainingConfig, manifest: Manifest, *, phase: str, warmup_fraction: float, mixup_alpha: float
) -> LoopConfig:
    """Return the loop's config; `config` has no automatic value left."""
    return LoopConfig(
        phase=phase,
        num_classes=len(manifest.classes),
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        learning_rate=config.learning_rate,
        warmup_fraction=warmup_fraction,
        weight_decay=config.weight_decay,
        label_smoothing=config.label_smoothing,
        gradient_clip_norm=config.gradient_clip_norm,
        patience=config.patience,
        time_budget_seconds=config.time_budget_seconds,
        checkpoint_interval_seconds=config.checkpoint_interval_seconds,
        seed=config.seed,
        mixup_alpha=mixup_alpha,
        class_weights=class_weights_of(manifest) if config.class_weights == "balanced" else None,
    )


def class_weights_of(manifest: Manifest) -> np.ndarray:
    """Return `float32[classes]` weights by which every class counts the same."""
    return balanced_class_weights(np.asarray(manifest.splits["train"].class_counts))

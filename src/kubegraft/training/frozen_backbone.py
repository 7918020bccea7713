"""The frozen backbone that a head is trained on, and the pass through it.

The stage `train_head` makes them, and before it, while images are still ingested, whoever prepares its engine: alike to
the last weight, since an engine is known by the digest of what it computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from kubegraft import tensorflow_setup
from kubegraft.cache import FeatureCache
from kubegraft.config import FineTuneConfig, HeadConfig
from kubegraft.modeling.backbones import Backbone, get_backbone
from kubegraft.modeling.classifier import ClassifierParts, build_classifier, parts
from kubegraft.modeling.freezing import freeze_backbone
from kubegraft.modeling.splitting import SplitBackbone, boundary_of, split_backbone
from kubegraft.modeling.weights import weights_are_here
from kubegraft.recipes import Choice, DatasetFacts, resolve_fine_tune, resolve_head
from kubegraft.training.distribution import divisible_batch_size, make_strategy, precision_policy
from kubegraft.training.frozen_pass import FrozenPass, PassCounts
from kubegraft.training.plans import transforms_of
from kubegraft.training.sources import FeatureSource

# Of the cache's room, for what fine-tuning may or may not ask for.
_ROOM_SHARE: Final = 0.25


def resolved_head(
    config: HeadConfig, facts: DatasetFacts, backbone: Backbone, strategy: Any
) -> tuple[HeadConfig, tuple[Choice, ...]]:
    """Return the config with every open value chosen, and why.

    What a search finds is said as if the user had: the resolved config trains one head, without a search.

    Raises:
        ConfigError: If the backbone does not take the input size.
    """
    resolved, choices = resolve_head(
        dataclasses.replace(config, search_seconds=0),
        facts,
        native_input_size=backbone.native_input_size,
        accepted_input_size=backbone.accepted_input_size,
        num_replicas=strategy.num_replicas_in_sync,
    )
    backbone.check_input_size(resolved.input_size)
    batch_size = divisible_batch_size(resolved.batch_size, strategy.num_replicas_in_sync)
    return dataclasses.replace(resolved, batch_size=batch_size), choices


def frozen_classifier(config: HeadConfig, classes: Sequence[str], backbone: Backbone, strategy: Any) -> Any:
    """Return a new classifier whose backbone does not train.

    Args:
        config: Resolved.
        classes: Class names, in order.
        backbone: Its backbone.
        strategy: The `tf.distribute` strategy in whose scope it is built.
    """
    with strategy.scope():
        model = build_classifier(
            backbone, config.input_size, classes, config, policy=precision_policy(config.mixed_precision)
        )
    freeze_backbone(model)
    return model


def pass_to_features(
    model_parts: ClassifierParts,
    backbone: Backbone,
    configs: tuple[HeadConfig, FineTuneConfig],
    facts: DatasetFacts,
    *,
    strategy: Any,
    cache: FeatureCache,
    counts: PassCounts,
) -> FrozenPass:
    """Return the pass through the backbone to what the head sees, and to what fine-tuning will want on the way.

    Args:
        model_parts: Of the classifier.
        backbone: Its backbone.
        configs: Of the head, resolved, and of fine-tuning, as far as it is known.
        facts: What recipes choose from.
        strategy: A `tf.distribute` strategy.
        cache: The cache.
        counts: Is added to.
    """
    config, next_config = configs
    return FrozenPass.to_pooled(
        model_parts,
        backbone,
        _split_for_fine_tuning(model_parts, backbone, next_config, facts, cache),
        strategy=strategy,
        policy=precision_policy(config.mixed_precision),
        cache=cache,
        counts=counts,
    )


def _split_for_fine_tuning(
    model_parts: ClassifierParts,
    backbone: Backbone,
    config: FineTuneConfig,
    facts: DatasetFacts,
    cache: FeatureCache,
) -> SplitBackbone | None:
    """Return the backbone cut where fine-tuning will cut it first.

    What crosses the cut is on the way to the features. Kept now, it spares fine-tuning a pass through the frozen
    blocks. None where much of the cache's room would go to it, it has another number format, or images will be
    mixed, so that the whole network must train.
    """
    fine_tuning, _ = resolve_fine_tune(
        config,
        facts,
        num_backbone_blocks=backbone.num_blocks,
        num_backbone_parameters=backbone.num_parameters,
    )
    _, mixup_alpha = transforms_of(fine_tuning.augmentation)
    if not 0 < fine_tuning.num_blocks < backbone.num_blocks or not cache.enabled or mixup_alpha:
        return None
    boundary = boundary_of(model_parts.backbone, backbone, fine_tuning.num_blocks)
    num_bytes = (facts.num_train + facts.num_validation) * boundary.row_bytes
    if boundary.dtype != "float32" or num_bytes > _ROOM_SHARE * cache.room_bytes():
        return None
    return split_backbone(model_parts.backbone, backbone, fine_tuning.num_blocks)


def prepare_engine(
    configs: tuple[HeadConfig, FineTuneConfig],
    facts: DatasetFacts,
    images: Callable[[int], np.ndarray],
) -> None:
    """Make, prove and keep the engine that `train_head` will look for, in a process of its own.

    Where it is known already nothing is kept. Nothing is downloaded.

    Args:
        configs: Of the head and of fine-tuning.
        facts: What is known of the images. Where those of the dataset choose otherwise this is work for nothing.
        images: An input size to a few images `float32[num_images, size, size, 3]` in [0, 255].

    Raises:
        KubegraftError: What `train_head` would raise.
    """
    config, next_config = configs
    tensorflow_setup.setup(config.seed)
    strategy, backbone = make_strategy(), get_backbone(config.backbone)
    config, _ = resolved_head(config, facts, backbone, strategy)
    if not weights_are_here(backbone, config.weights, config.input_size):
        return
    classes = [str(number) for number in range(facts.num_classes)]
    frozen_pass = pass_to_features(
        parts(frozen_classifier(config, classes, backbone, strategy)),
        backbone,
        (config, next_config),
        facts,
        strategy=strategy,
        cache=FeatureCache.open(),
        counts=PassCounts(),
    )
    few = images(config.input_size)
    source = FeatureSource(few, np.zeros(len(few), np.int32))
    frozen_pass.prepare(source, config.input_size, undisturbed=False)

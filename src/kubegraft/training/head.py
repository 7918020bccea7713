"""Stage `train_head`: a new head on a pretrained backbone that does not move."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from kubegraft import tensorflow_setup
from kubegraft.config import HeadConfig
from kubegraft.data.manifest import Manifest, load_manifest
from kubegraft.data.shards import SplitReader
from kubegraft.modeling.backbones import Backbone, get_backbone
from kubegraft.modeling.classifier import ClassifierParts, build_classifier, parts
from kubegraft.modeling.freezing import freeze_backbone
from kubegraft.modeling.weights import check_weights
from kubegraft.recipes import resolve_head
from kubegraft.reporting.events import log_event
from kubegraft.stage import Outcome, StageResult, Workspace, read_result, run_stage
from kubegraft.storage import public_uri
from kubegraft.training.distribution import divisible_batch_size, make_strategy, precision_policy
from kubegraft.training.features import extract_features, frozen_forward
from kubegraft.training.loop import History, train
from kubegraft.training.outputs import digest_of_variables, require_images, require_unmoved, write_model
from kubegraft.training.plans import loop_config, transforms_of
from kubegraft.training.sources import FeatureSource, ImageSource
from kubegraft.training.trainables import HeadOnBackbone, HeadOnFeatures


def train_head(
    dataset_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str], config: HeadConfig
) -> StageResult:
    """Train a head on the frozen backbone and write a model directory.

    The backbone runs in inference mode and does not change by one bit; this is checked. Without
    augmentation its forward pass is computed once per image, and the head trains on the pooled features.

    Args:
        dataset_dir: Output of `ingest`.
        output_dir: Directory to make.
        config: What to train and how; open values are chosen by the recipe.

    Returns:
        The result; its metrics hold `validation_accuracy` of the model that was kept.

    Raises:
        ConfigError: If the backbone does not take the input size.
        WeightsError: If the pretrained weights can't be had.
        TrainingError: If training can't go on.
    """
    backbone = get_backbone(config.backbone)
    weights_digest = check_weights(backbone, config.weights, config.weights_sha256)
    manifest = load_manifest(dataset_dir)
    require_images(manifest)
    inputs = {"dataset": read_result(dataset_dir).digest, "weights": weights_digest}

    def body(workspace: Workspace) -> Outcome:
        return _HeadTraining(dataset_dir, manifest, backbone, config, workspace, weights_digest).run()

    return run_stage("train_head", output_dir, inputs=inputs, config=config, body=body)


class _HeadTraining:
    """One head training, from the resolved config to the written model."""

    def __init__(
        self,
        dataset_dir: str | os.PathLike[str],
        manifest: Manifest,
        backbone: Backbone,
        config: HeadConfig,
        workspace: Workspace,
        weights_digest: str,
    ) -> None:
        tensorflow_setup.setup(config.seed)
        self.weights_digest = weights_digest
        self.dataset_dir, self.manifest, self.backbone, self.workspace = (
            dataset_dir,
            manifest,
            backbone,
            workspace,
        )
        self.strategy = make_strategy()
        self.forward: Any = None  # how the frozen pass is computed; chosen with the first images
        resolved, self.choices = resolve_head(
            config,
            manifest.facts,
            native_input_size=backbone.native_input_size,
            accepted_input_size=backbone.accepted_input_size,
        )
        backbone.check_input_size(resolved.input_size)
        batch_size = divisible_batch_size(resolved.batch_size, self.strategy.num_replicas_in_sync)
        self.config = dataclasses.replace(resolved, batch_size=batch_size)
        for choice in self.choices:
            log_event("train_head", "choice", name=choice.name, value=choice.value, reason=choice.reason)

    def run(self) -> Outcome:
        with self.strategy.scope():
            model = build_classifier(
                self.backbone,
                self.config.input_size,
                self.manifest.classes,
                self.config,
                policy=precision_policy(self.config.mixed_precision),
            )
        freeze_backbone(model)
        model_parts = parts(model)
        frozen = digest_of_variables(model_parts.backbone.variables)
        history = self._train(model_parts)
        require_unmoved(frozen, model_parts.backbone.variables)
        facts = {
            "backbone": self.backbone.name,
            "weights": public_uri(self.config.weights),
            "weights_digest": self.weights_digest,
            "input_size": self.config.input_size,
            "head": {
                name: getattr(self.config, name) for name in ("head", "hidden_units", "dropout", "batch_norm")
            },
            "num_unfrozen_blocks": 0,
            "frozen_digest": frozen,
        }
        return write_model(
            self.workspace.staging,
            model,
            self.manifest,
            history,
            self.config,
            phase="train_head",
            choices=self.choices,
            facts=facts,
        )

    def _train(self, model_parts: ClassifierParts) -> History:
        train_features = self._features("train", model_parts)
        _standardise(model_parts, train_features.features)
        transforms, mixup_alpha = transforms_of(self.config.augmentation)
        trainable: HeadOnFeatures | HeadOnBackbone
        if transforms:
            trainable = HeadOnBackbone(model_parts, self.config.batch_size)
            sources: tuple[Any, Any] = (self._images("train", transforms), self._images("validation"))
        else:
            trainable = HeadOnFeatures(model_parts, self.config.batch_size)
            sources = (train_features, self._features("validation", model_parts))
        plan = loop_config(
            self.config, self.manifest, phase="train_head", warmup_fraction=0.05, mixup_alpha=mixup_alpha
        )
        return train(self.strategy, trainable, sources, plan, self.workspace.scratch / "last.ckpt")

    def _images(self, split: str, transforms: tuple[str, ...] = ()) -> ImageSource:
        reader = SplitReader(self.dataset_dir, self.manifest, split)
        return ImageSource(reader, self.config.input_size, transforms, self.config.augmentation_strength)

    def _features(self, split: str, model_parts: ClassifierParts) -> FeatureSource:
        source = self._images(split)
        if self.forward is None:
            pooled = HeadOnBackbone(model_parts, self.config.batch_size).pooled
            self.forward = frozen_forward(self.strategy, pooled, source)
        features = extract_features(
            self.strategy,
            self.forward,
            source,
            dim=int(model_parts.backbone.output_shape[-1]),
            batch_size=self.config.batch_size,
            directory=self.workspace.scratch,
            split=split,
        )
        return FeatureSource(features, source.labels)


def _standardise(model_parts: ClassifierParts, features: np.ndarray) -> None:
    """Give the head the mean and variance of the training features, in float64 and in chunks."""
    count, total, squares = len(features), np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for start in range(0, count, 4096):
        chunk = np.asarray(features[start : start + 4096], np.float64)
        total, squares = total + chunk.sum(0), squares + (chunk**2).sum(0)
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0.0)
    model_parts.set_standardisation(mean, variance)

"""Stage `fine_tune`: the last blocks of the backbone trained further, never to a worse model."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from kubegraft import tensorflow_setup
from kubegraft.accelerators import require_accelerators
from kubegraft.config import FineTuneConfig
from kubegraft.data.manifest import Manifest, load_manifest
from kubegraft.data.shards import SplitReader
from kubegraft.errors import ModelError
from kubegraft.modeling.backbones import get_backbone
from kubegraft.modeling.classifier import load_classifier, parts
from kubegraft.modeling.freezing import rate_multipliers, unfreeze_last_blocks
from kubegraft.recipes import resolve_fine_tune
from kubegraft.reporting.events import log_event
from kubegraft.stage import Outcome, StageResult, Workspace, read_result, run_stage
from kubegraft.training.distribution import divisible_batch_size, make_strategy, precision_policy
from kubegraft.training.loop import History, train
from kubegraft.training.outputs import (
    HEAD_HISTORY_FILE,
    HISTORY_FILE,
    digest_of_variables,
    require_images,
    require_unmoved,
    write_model,
)
from kubegraft.training.plans import loop_config, transforms_of
from kubegraft.training.sources import ImageSource
from kubegraft.training.trainables import HeadOnBackbone


def fine_tune(
    dataset_dir: str | os.PathLike[str],
    model_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    config: FineTuneConfig,
) -> StageResult:
    """Train the last blocks of the backbone with its head, at lower rates the earlier the block.

    Batch norm stays frozen with its statistics. The epoch that is best on validation is kept; if none
    beats the model that came in, that model is what comes out, and `kept` in the metadata says so.

    Args:
        dataset_dir: Output of `ingest`.
        model_dir: Output of `train_head` on the same classes.
        output_dir: Directory to make.
        config: What to unfreeze and how to train; open values are chosen by the recipe.

    Returns:
        The result; its metrics hold the validation accuracy before (`start_validation_accuracy`) and after.

    Raises:
        ConfigError: If more blocks are to be unfrozen than there are.
        ModelError: If the model knows other classes than the dataset.
        TrainingError: If training can't go on.
        EnvironmentFault: If accelerators were asked for that are not there; see `require_accelerators`.
    """
    require_accelerators()
    manifest = load_manifest(dataset_dir)
    require_images(manifest)
    inputs = {"dataset": read_result(dataset_dir).digest, "model": read_result(model_dir).digest}

    def body(workspace: Workspace) -> Outcome:
        return _FineTuning(dataset_dir, Path(model_dir), manifest, config, workspace).run()

    return run_stage("fine_tune", output_dir, inputs=inputs, config=config, body=body)


class _FineTuning:
    """One fine-tuning, from the loaded model to the written one."""

    def __init__(
        self,
        dataset_dir: str | os.PathLike[str],
        model_dir: Path,
        manifest: Manifest,
        config: FineTuneConfig,
        workspace: Workspace,
    ) -> None:
        tensorflow_setup.setup(config.seed)
        self.dataset_dir, self.model_dir = dataset_dir, model_dir
        self.manifest, self.workspace = manifest, workspace
        self.strategy = make_strategy()
        with self.strategy.scope():
            loaded = load_classifier(model_dir, policy=precision_policy(config.mixed_precision))
        self.model, self.metadata = loaded.model, loaded.metadata
        _require_same_classes(self.metadata["classes"], manifest.classes)
        self.backbone = get_backbone(self.metadata["backbone"])
        resolved, self.choices = resolve_fine_tune(
            config,
            manifest.facts,
            num_backbone_blocks=self.backbone.num_blocks,
            num_backbone_parameters=self.backbone.num_parameters,
        )
        self.backbone.check_num_blocks(resolved.num_blocks)
        batch_size = divisible_batch_size(resolved.batch_size, self.strategy.num_replicas_in_sync)
        self.config = dataclasses.replace(resolved, batch_size=batch_size)
        for choice in self.choices:
            log_event("fine_tune", "choice", name=choice.name, value=choice.value, reason=choice.reason)

    def run(self) -> Outcome:
        unfreeze_last_blocks(self.model, self.backbone, self.config.num_blocks)
        frozen_variables = parts(self.model).backbone.non_trainable_variables
        frozen = digest_of_variables(frozen_variables)
        history = self._train()
        require_unmoved(frozen, frozen_variables)
        kept = "fine_tuned" if history.best_epoch >= 0 else "head"
        if kept == "head":
            log_event("fine_tune", "kept the model that came in", reason="no epoch beat it on validation")
        outcome = self._write(history, kept)
        shutil.copyfile(self.model_dir / HISTORY_FILE, self.workspace.staging / HEAD_HISTORY_FILE)
        return outcome

    def _train(self) -> History:
        transforms, mixup_alpha = transforms_of(self.config.augmentation)
        plan = loop_config(
            self.config,
            self.manifest,
            phase="fine_tune",
            warmup_fraction=self.config.warmup_fraction,
            mixup_alpha=mixup_alpha,
        )
        if not self.config.num_blocks:
            plan = dataclasses.replace(plan, num_epochs=0)
        multipliers = rate_multipliers(
            self.model, self.backbone, self.config.num_blocks, self.config.rate_decay
        )
        trainable = HeadOnBackbone(
            parts(self.model),
            self.config.batch_size,
            {v.path: factor for v, factor in zip(self.model.trainable_variables, multipliers, strict=True)},
        )
        sources = (self._images("train", transforms), self._images("validation", ()))
        return train(self.strategy, trainable, sources, plan, self.workspace.scratch / "last.ckpt")

    def _images(self, split: str, transforms: tuple[str, ...]) -> ImageSource:
        reader = SplitReader(self.dataset_dir, self.manifest, split)
        return ImageSource(reader, self.metadata["input_size"], transforms, self.config.augmentation_strength)

    def _write(self, history: History, kept: str) -> Outcome:
        facts: dict[str, Any] = {
            "backbone": self.backbone.name,
            **{name: self.metadata[name] for name in ("weights", "weights_digest", "input_size", "head")},
            "head_config": self.metadata["config"],
            "num_unfrozen_blocks": self.config.num_blocks,
            "kept": kept,
            "parent_digest": self.metadata["model_digest"],
            "baseline": history.start,
            "head_choices": self.metadata["choices"],
        }
        return write_model(
            self.workspace.staging,
            self.model,
            self.manifest,
            history,
            self.config,
            phase="fine_tune",
            choices=self.choices,
            facts=facts,
        )


def _require_same_classes(model_classes: list[str], dataset_classes: tuple[str, ...]) -> None:
    if tuple(model_classes) != dataset_classes:
        differing = sorted(set(model_classes) ^ set(dataset_classes))
        raise ModelError(
            f"`model` must know the classes of the dataset, in the same order. Received: model={model_classes!r}, "
            f"dataset={list(dataset_classes)!r}, differing in {differing!r}. Train a head on this dataset first."
        )

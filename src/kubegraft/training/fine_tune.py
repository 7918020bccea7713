"""Stage `fine_tune`: the last blocks of the backbone trained further, never to a worse model.

Where the plan allows it (`kubegraft.activation_plan`), the frozen blocks run once for each image and view, and
only what is behind the cut trains, from kept activations; else the whole graph runs in every epoch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from kubegraft import tensorflow_setup
from kubegraft.accelerators import require_accelerators
from kubegraft.activation_plan import ActivationPlan, Cut, Limits, plan_activations
from kubegraft.cache import FeatureCache
from kubegraft.config import FineTuneConfig
from kubegraft.data.manifest import Manifest, load_manifest
from kubegraft.data.shards import SplitReader
from kubegraft.errors import ModelError
from kubegraft.machine_limits import free_disk_bytes, usable_memory_bytes
from kubegraft.modeling.backbones import get_backbone
from kubegraft.modeling.classifier import load_classifier, parts
from kubegraft.modeling.freezing import rate_multipliers, unfreeze_last_blocks
from kubegraft.modeling.splitting import boundary_of
from kubegraft.recipes import Choice, fine_tune_wish, resolve_fine_tune
from kubegraft.reporting.events import log_event
from kubegraft.stage import Outcome, StageResult, Workspace, read_result, write_atomically
from kubegraft.training.block_trials import Trial, reason_of, try_depths
from kubegraft.training.distribution import (
    divisible_batch_size,
    has_gpu,
    make_strategy,
    precision_policy,
    workers_of,
)
from kubegraft.training.frozen_pass import PassCounts, work_of
from kubegraft.training.loop import LoopConfig, train
from kubegraft.training.outputs import (
    HEAD_HISTORY_FILE,
    HISTORY_FILE,
    log_choices,
    require_images,
    write_model,
)
from kubegraft.training.plans import loop_config, transforms_of
from kubegraft.training.shared_stage import run_shared_stage
from kubegraft.training.sources import ImageSource, Source
from kubegraft.training.suffix_data import SuffixData
from kubegraft.training.trainables import HeadOnBackbone, HeadOnSuffix
from kubegraft.training.variables import digest_of_variables, require_unmoved

# A head that is solved for leaves gradients of little more than noise, which Adam would blow up to whole steps: the
# first epoch then unlearns what the head knew. This lets a weight move by its rate only if its gradient is well above.
_EPSILON: Final = 1e-4
# What is validated and kept is an average of the weights over about ten steps (ADR 14).
_AVERAGE_DECAY: Final = 0.9


def fine_tune(
    dataset_dir: str | os.PathLike[str],
    model_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    config: FineTuneConfig,
) -> StageResult:
    """Train the last blocks of the backbone with its head, at lower rates the earlier the block.

    Where the number of blocks is open, deeper cuts are tried while they pay on validation.
    Batch norm stays frozen with its statistics. The epoch that is best on validation is kept; if none
    beats the model that came in by more than luck, that model is what comes out, and `kept` in the metadata says so.

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

    return run_shared_stage("fine_tune", output_dir, inputs=inputs, config=config, body=body)


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
        self.workers = workers_of(self.strategy)
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
            num_replicas=self.strategy.num_replicas_in_sync,
        )
        self.backbone.check_num_blocks(resolved.num_blocks)
        batch_size = divisible_batch_size(resolved.batch_size, self.strategy.num_replicas_in_sync)
        self.config = dataclasses.replace(resolved, batch_size=batch_size)
        self.wish = fine_tune_wish(config, resolved, manifest.facts, self.backbone.num_blocks)
        self.plan = self._plan()
        varied = self.config.augmentation != "none"
        if varied and self.plan.way == "activations" and self.plan.num_views == 1:
            # What is recorded is what was done.
            self.config = dataclasses.replace(self.config, augmentation="none")
            self._rechoose("augmentation", "none", "one view of each image is kept: the image as it is")
        self.choices += plan_choices(self.plan, self.config.augmentation)
        log_choices("fine_tune", self.choices)
        self.start = self.model.get_weights()
        self.counts, self.readers = PassCounts(), dict[str, SplitReader]()
        self.suffix_data = SuffixData(
            self.strategy,
            self.model,
            self.backbone,
            workspace.scratch,
            policy=precision_policy(config.mixed_precision),
            cache=FeatureCache.open(),
            counts=self.counts,
        )

    def run(self) -> Outcome:
        best, trials, ended = try_depths(
            self.plan.trials,
            self._try,
            num_validation=self.manifest.splits["validation"].num_images,
            time_budget_seconds=self.config.time_budget_seconds,
        )
        self._use(best)
        if len(self.plan.trials) > 1:
            reason = reason_of(trials, self.plan.trials, ended)
            log_choices("fine_tune", [Choice("num_blocks", best.num_blocks, reason)])
            self._rechoose("num_blocks", best.num_blocks, reason)
        kept = "fine_tuned" if best.history.best_epoch >= 0 else "head"
        if kept == "head":
            log_event("fine_tune", "kept the model that came in", reason="no epoch beat it by more than luck")
        outcome = self._write(best, trials, kept)
        if self.workers.is_chief:
            shutil.copyfile(self.model_dir / HISTORY_FILE, self.workspace.staging / HEAD_HISTORY_FILE)
        return outcome

    def _rechoose(self, name: str, value: Any, reason: str) -> None:
        """Replace what the recipe chose; what the user set stays."""
        self.choices = tuple(
            Choice(name, value, reason)
            if choice.name == name and choice.reason != "set by the user"
            else choice
            for choice in self.choices
        )

    def _plan(self) -> ActivationPlan:
        """Return the chief's plan, which depends on its memory and disk."""
        kept = self.workers.share(dataclasses.asdict(self._own_plan()) if self.workers.is_chief else None)
        return ActivationPlan(**{**kept, "trials": tuple(kept["trials"])})

    def _own_plan(self) -> ActivationPlan:
        """Return the plan; an interrupted call's own is kept to, whatever is free now that its files are there."""
        path = self.workspace.scratch / "plan.json"
        if path.exists():
            kept = json.loads(path.read_text())
            return ActivationPlan(**{**kept, "trials": tuple(kept["trials"])})
        core = parts(self.model).backbone
        boundaries = [
            boundary_of(core, self.backbone, number) for number in range(1, self.backbone.num_blocks)
        ]
        cuts = [Cut(each.num_blocks, each.row_bytes, each.shown) for each in boundaries]
        limits = Limits(
            usable_memory_bytes(),
            free_disk_bytes(self.workspace.scratch),
            has_gpu=has_gpu(),
        )
        plan = plan_activations(self.wish, cuts, limits)
        write_atomically(path, json.dumps(dataclasses.asdict(plan)))
        return plan

    def _try(self, num_blocks: int, seconds_left: float) -> Trial:
        """Train with so many blocks unfrozen, from the model that came in."""
        self.model.set_weights(self.start)
        unfreeze_last_blocks(self.model, self.backbone, num_blocks)
        frozen_variables = parts(self.model).backbone.non_trainable_variables
        frozen = digest_of_variables(frozen_variables)
        multipliers = rate_multipliers(self.model, self.backbone, num_blocks, self.config.rate_decay)
        by_path = {
            v.path: factor for v, factor in zip(self.model.trainable_variables, multipliers, strict=True)
        }
        trainable, sources = self._way(num_blocks, by_path)
        checkpoint = self.workspace.scratch / f"last-{num_blocks}.ckpt"
        history = train(
            self.strategy, trainable, sources, self._loop_config(num_blocks, seconds_left), checkpoint
        )
        require_unmoved(frozen, frozen_variables)
        self.suffix_data.forget(num_blocks)
        return Trial(num_blocks, history, self.model.get_weights())

    def _use(self, trial: Trial) -> None:
        self.model.set_weights(trial.weights)
        unfreeze_last_blocks(self.model, self.backbone, trial.num_blocks)
        self.config = dataclasses.replace(self.config, num_blocks=trial.num_blocks)

    def _way(
        self, num_blocks: int, multipliers: dict[str, float]
    ) -> tuple[HeadOnSuffix | HeadOnBackbone, tuple[Source, Source]]:
        transforms, _ = transforms_of(self.config.augmentation)
        if self.plan.way != "activations":
            whole = HeadOnBackbone(parts(self.model), multipliers)
            return whole, (self._images("train", transforms), self._images("validation"))
        images = (
            self._images("train", transforms, self.plan.num_views),
            self._images("validation", num_views=1),
        )
        split, sources = self.suffix_data.sources(num_blocks, images)
        return HeadOnSuffix(parts(self.model), split, multipliers), sources

    def _loop_config(self, num_blocks: int, seconds_left: float) -> LoopConfig:
        plan = loop_config(
            self.config,
            self.manifest,
            phase="fine_tune",
            warmup_fraction=self.config.warmup_fraction,
            mixup_alpha=transforms_of(self.config.augmentation)[1],
        )
        num_epochs = plan.num_epochs if num_blocks else 0
        return dataclasses.replace(
            plan,
            num_epochs=num_epochs,
            time_budget_seconds=seconds_left,
            epsilon=_EPSILON,
            average_decay=_AVERAGE_DECAY,
        )

    def _images(self, split: str, transforms: tuple[str, ...] = (), num_views: int = 0) -> ImageSource:
        if split not in self.readers:
            self.readers[split] = SplitReader(self.dataset_dir, self.manifest, split)
        strength = self.config.augmentation_strength
        return ImageSource(self.readers[split], self.metadata["input_size"], transforms, strength, num_views)

    def _write(self, best: Trial, trials: list[dict[str, Any]], kept: str) -> Outcome:
        facts: dict[str, Any] = {
            "backbone": self.backbone.name,
            **{name: self.metadata[name] for name in ("weights", "weights_digest", "input_size", "head")},
            "head_config": self.metadata["config"],
            "num_unfrozen_blocks": best.num_blocks,
            "trials": trials,
            "frozen_blocks": self.plan.way,
            "num_views": self.plan.num_views,
            "kept": kept,
            "parent_digest": self.metadata["model_digest"],
            "baseline": best.history.start,
            "head_choices": self.metadata["choices"],
        }
        return write_model(
            self.workspace.staging,
            self.model,
            self.manifest,
            best.history,
            self.config,
            phase="fine_tune",
            choices=self.choices,
            facts=facts,
            work=work_of("fine_tune", self.counts, self.readers.values(), self.workers),
            workers=self.workers,
        )


def plan_choices(plan: ActivationPlan, augmentation: str) -> tuple[Choice, ...]:
    """Return what the plan says about the frozen blocks and the augmentation, as the report shows it."""
    transforms, mixup_alpha = transforms_of(augmentation)
    shown, why = (
        f"{plan.num_views} cached views",
        "each epoch takes another view of an image, whose activations are kept",
    )
    if plan.way != "activations":
        shown, why = "full graph", "each epoch draws new variants, which pass the frozen blocks"
    elif plan.num_views == 1:
        shown, why = "one view", "the image as it is, whose activations are kept"
    if plan.way == "features only" or not (transforms or mixup_alpha or plan.way == "activations"):
        shown, why = "none", "images are not varied"
    way = {
        "activations": "computed once",
        "full graph": "run in every epoch",
        "features only": "not trained",
    }[plan.way]
    return Choice("frozen_blocks", way, plan.reason), Choice("augmentation_views", shown, why)


def _require_same_classes(model_classes: list[str], dataset_classes: tuple[str, ...]) -> None:
    if tuple(model_classes) != dataset_classes:
        differing = sorted(set(model_classes) ^ set(dataset_classes))
        raise ModelError(
            f"`model` must know the classes of the dataset, in the same order. Received: model={model_classes!r}, "
            f"dataset={list(dataset_classes)!r}, differing in {differing!r}. Train a head on this dataset first."
        )

"""Stage `train_head`: a new head on a pretrained backbone that does not move."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Final

import numpy as np

from kubegraft import tensorflow_setup
from kubegraft.accelerators import require_accelerators
from kubegraft.cache import FeatureCache
from kubegraft.config import AUTO, FineTuneConfig, HeadConfig
from kubegraft.data.manifest import Manifest, load_manifest
from kubegraft.data.shards import SplitReader
from kubegraft.modeling.backbones import Backbone, get_backbone
from kubegraft.modeling.classifier import ClassifierParts, parts
from kubegraft.modeling.weights import check_weights
from kubegraft.recipes import Choice
from kubegraft.stage import Outcome, StageResult, Workspace, read_result, write_atomically
from kubegraft.storage import public_uri
from kubegraft.training.distribution import make_strategy, workers_of
from kubegraft.training.frozen_backbone import frozen_classifier, pass_to_features, resolved_head
from kubegraft.training.frozen_pass import FrozenPass, PassCounts, work_of
from kubegraft.training.head_search import SearchData, search_head
from kubegraft.training.history import History
from kubegraft.training.linear_head import DECAYS, LinearProblem, fit_linear_head, history_of, measure
from kubegraft.training.loop import LoopConfig, train
from kubegraft.training.outputs import log_choices, require_images, write_model
from kubegraft.training.plans import class_weights_of, loop_config, transforms_of
from kubegraft.training.shared_stage import run_shared_stage
from kubegraft.training.sources import FeatureSource, ImageSource
from kubegraft.training.standardisation import feature_moments
from kubegraft.training.trainables import HeadOnBackbone, HeadOnFeatures
from kubegraft.training.variables import digest_of_variables, require_unmoved

_WARMUP_FRACTION: Final = 0.05


def train_head(
    dataset_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    config: HeadConfig,
    next_config: FineTuneConfig | None = None,
) -> StageResult:
    """Train a head on the frozen backbone and write a model directory.

    The backbone runs in inference mode and does not change by one bit; this is checked. Without
    augmentation its forward pass is computed once per image, and the head trains on the pooled features: a
    linear one is solved for (`linear_head`), others go through the loop.

    Args:
        dataset_dir: Output of `ingest`.
        output_dir: Directory to make.
        config: What to train and how; open values are chosen by the recipe.
        next_config: How it will be fine-tuned, as far as it is known. The head does not depend on it: what fine-tuning
            needs of the frozen blocks is on the way to what the head needs, and is kept in the cache.

    Returns:
        The result; its metrics hold `validation_accuracy` of the model that was kept.

    Raises:
        ConfigError: If the backbone does not take the input size.
        WeightsError: If the pretrained weights can't be had.
        TrainingError: If training can't go on.
        EnvironmentFault: If accelerators were asked for that are not there; see `require_accelerators`.
    """
    require_accelerators()
    backbone = get_backbone(config.backbone)
    weights_digest = check_weights(backbone, config.weights, config.weights_sha256)
    manifest = load_manifest(dataset_dir)
    require_images(manifest)
    inputs = {"dataset": read_result(dataset_dir).digest, "weights": weights_digest}

    def body(workspace: Workspace) -> Outcome:
        configs = config, next_config or FineTuneConfig()
        return _HeadTraining(dataset_dir, manifest, backbone, configs, workspace, weights_digest).run()

    return run_shared_stage("train_head", output_dir, inputs=inputs, config=config, body=body)


class _HeadTraining:
    """One head training, from the resolved config to the written model."""

    def __init__(
        self,
        dataset_dir: str | os.PathLike[str],
        manifest: Manifest,
        backbone: Backbone,
        configs: tuple[HeadConfig, FineTuneConfig],
        workspace: Workspace,
        weights_digest: str,
    ) -> None:
        self.given, self.next_config = configs
        tensorflow_setup.setup(self.given.seed)
        self.weights_digest = weights_digest
        self.dataset_dir, self.manifest, self.backbone, self.workspace = (
            dataset_dir,
            manifest,
            backbone,
            workspace,
        )
        self.strategy = make_strategy()
        self.workers = workers_of(self.strategy)
        self.cache, self.counts = FeatureCache.open(), PassCounts()
        self.readers: dict[str, SplitReader] = {}
        self.frozen_pass: FrozenPass | None = None
        self.config, self.choices = self._resolved(self.given)
        log_choices("train_head", self.choices)

    def _resolved(self, config: HeadConfig) -> tuple[HeadConfig, tuple[Choice, ...]]:
        return resolved_head(config, self.manifest.facts, self.backbone, self.strategy)

    def run(self) -> Outcome:
        model = self._built()
        if self.given.search_seconds:
            self._search(parts(model))
            model = self._built()
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
                name: getattr(self.config, name)
                for name in ("head", "features", "hidden_units", "dropout", "batch_norm")
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
            work=work_of("train_head", self.counts, self.readers.values(), self.workers),
            workers=self.workers,
        )

    def _built(self) -> Any:
        return frozen_classifier(self.config, self.manifest.classes, self.backbone, self.strategy)

    def _search(self, model_parts: ClassifierParts) -> None:
        """Replace the head of the config by the one that cross-validation prefers."""
        train_features = self._features("train", model_parts)
        self._standardise(model_parts, train_features.features)
        mean, variance = (np.asarray(each, np.float64) for each in model_parts.standardise.get_weights())
        with_layers, _ = self._resolved(_with_hidden_layers(self.given))
        plan = loop_config(
            with_layers, self.manifest, phase="head_search", warmup_fraction=_WARMUP_FRACTION, mixup_alpha=0.0
        )
        data = SearchData(
            train=train_features,
            mean=mean,
            variance=variance,
            num_classes=len(self.manifest.classes),
            class_weights=plan.class_weights,
        )
        found, searched = self._found(data, plan)
        log_choices("train_head", searched)
        self.config, choices = self._resolved(found)
        names = {choice.name for choice in searched}
        self.choices = (*searched, *(choice for choice in choices if choice.name not in names))

    def _found(self, data: SearchData, plan: LoopConfig) -> tuple[HeadConfig, tuple[Choice, ...]]:
        """Return what the chief finds, on a device of its own while others wait: it depends on the clock."""
        # An interrupted call's own is kept to: its checkpoint is of that head.
        path = self.workspace.scratch / "search.json"
        if self.workers.is_chief and not path.exists():
            strategy = self.strategy if self.workers.alone else make_strategy(["CPU:0"])
            head, searched = search_head(strategy, data, self.given, plan, self.workspace.scratch)
            chosen = {name: getattr(head, name) for name in ("head", "hidden_units", "dropout")}
            found = [chosen, [dataclasses.asdict(choice) for choice in searched]]
            write_atomically(path, json.dumps(found))
        values, choices = self.workers.share(json.loads(path.read_text()) if self.workers.is_chief else None)
        values["hidden_units"] = tuple(values["hidden_units"])
        read = [{**each, "value": _tuple_if_list(each["value"])} for each in choices]
        return dataclasses.replace(self.given, **values), tuple(Choice(**each) for each in read)

    def _train(self, model_parts: ClassifierParts) -> History:
        train_features = self._features("train", model_parts)
        self._standardise(model_parts, train_features.features)
        if self.config.solver == "lbfgs":
            return self._solve(model_parts, train_features, self._features("validation", model_parts))
        transforms, mixup_alpha = transforms_of(self.config.augmentation)
        trainable: HeadOnFeatures | HeadOnBackbone
        if transforms:
            trainable = HeadOnBackbone(model_parts)
            sources: tuple[Any, Any] = (self._images("train", transforms), self._images("validation"))
            self._choose(
                Choice(
                    "augmentation_views",
                    "full graph",
                    "each epoch draws new variants, which pass the whole backbone; none are cached",
                )
            )
        else:
            trainable = HeadOnFeatures(model_parts)
            sources = (train_features, self._features("validation", model_parts))
        plan = loop_config(
            self.config,
            self.manifest,
            phase="train_head",
            warmup_fraction=_WARMUP_FRACTION,
            mixup_alpha=mixup_alpha,
        )
        return train(self.strategy, trainable, sources, plan, self.workspace.scratch / "last.ckpt")

    def _solve(
        self, model_parts: ClassifierParts, train_features: FeatureSource, validation_features: FeatureSource
    ) -> History:
        mean, variance = (np.asarray(each, np.float64) for each in model_parts.standardise.get_weights())
        weighted = self.config.class_weights == "balanced"
        problem = LinearProblem(
            train=train_features,
            validation=validation_features,
            num_classes=len(self.manifest.classes),
            mean=mean,
            variance=variance,
            label_smoothing=self.config.label_smoothing,
            class_weights=class_weights_of(self.manifest) if weighted else None,
        )
        given = self.config.weight_decay
        logits = model_parts.head_layers[-1]
        said: dict[str, Any] = {}
        if self.workers.is_chief:
            fit = fit_linear_head(
                problem,
                decays=DECAYS if given == AUTO else (given,),
                time_budget_seconds=self.config.time_budget_seconds,
                directory=self.workspace.scratch,
            )
            history, solution = history_of(fit, measure(problem, *logits.get_weights())), fit.chosen.solution
            logits.set_weights([solution.kernel.astype(np.float32), solution.bias.astype(np.float32)])
            said = {"history": dataclasses.asdict(history), "decay": solution.decay, "reason": fit.reason}
        said = self.workers.share(said)
        weights = self.workers.spread({str(n): each for n, each in enumerate(logits.get_weights())})
        logits.set_weights(list(weights.values()))
        reason = "set by the user" if given != AUTO else said["reason"]
        self._choose(Choice("weight_decay", said["decay"], reason))
        self.config = dataclasses.replace(self.config, weight_decay=said["decay"])
        return History(**said["history"])

    def _choose(self, choice: Choice) -> None:
        log_choices("train_head", [choice])
        self.choices = (*self.choices, choice)

    def _images(self, split: str, transforms: tuple[str, ...] = ()) -> ImageSource:
        if split not in self.readers:
            self.readers[split] = SplitReader(self.dataset_dir, self.manifest, split)
        strength = self.config.augmentation_strength
        return ImageSource(self.readers[split], self.config.input_size, transforms, strength)

    def _features(self, split: str, model_parts: ClassifierParts) -> FeatureSource:
        if self.frozen_pass is None:
            self.frozen_pass = pass_to_features(
                model_parts,
                self.backbone,
                (self.config, self.next_config),
                self.manifest.facts,
                strategy=self.strategy,
                cache=self.cache,
                counts=self.counts,
            )
        source = self._images(split)
        return FeatureSource(
            self.frozen_pass.rows(source, self.workspace.scratch / f"{split}-features.npy"), source.labels
        )

    def _standardise(self, model_parts: ClassifierParts, features: np.ndarray) -> None:
        """Give the head the mean and variance of the training features, as the chief's processor adds them up."""
        moments = dict(zip("mv", feature_moments(features), strict=True)) if self.workers.is_chief else None
        model_parts.set_standardisation(*self.workers.spread(moments).values())


def _tuple_if_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _with_hidden_layers(config: HeadConfig) -> HeadConfig:
    return dataclasses.replace(
        config, head="mlp", hidden_units=config.hidden_units or HeadConfig().hidden_units
    )

"""The activations of each cut that fine-tuning tries: at the deepest from images, at the others from the deepest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kubegraft.activation_plan import ActivationPlan
from kubegraft.cache import OFF, FeatureCache
from kubegraft.modeling.backbone import Backbone
from kubegraft.modeling.classifier import parts
from kubegraft.modeling.splitting import SplitBackbone, between, split_backbone
from kubegraft.training.activations import ActivationSource, image_activations, later_activations
from kubegraft.training.frozen_pass import FrozenPass, PassCounts
from kubegraft.training.sources import ImageSource

_SPLITS = ("train", "validation")


class SuffixData:
    """Activations of the training and validation images, in files of one directory.

    The frozen blocks see every image and view once, at the deepest cut of the plan. Shallower cuts, which are
    tried first, are computed from there, and their files go when their trial is done.
    """

    def __init__(
        self,
        strategy: Any,
        model: Any,
        backbone: Backbone,
        plan: ActivationPlan,
        directory: Path,
        *,
        policy: str = "float32",
        cache: FeatureCache | None = None,
        counts: PassCounts | None = None,
    ) -> None:
        """Take where the activations are computed and kept.

        Args:
            strategy: A `tf.distribute` strategy.
            model: Classifier on `backbone`. Activations are those of its weights when a trial starts.
            backbone: Says where its blocks end.
            plan: Says which cuts are tried, and how many views are kept.
            directory: For the files.
            policy: Keras dtype policy of `model`.
            cache: Where the activations at the deepest cut are looked for and kept; None for nowhere.
            counts: Is added to.
        """
        self._strategy, self._core, self._backbone = strategy, parts(model).backbone, backbone
        self._deepest, self._directory = plan.trials[-1], directory
        self._policy = policy
        self._cache, self._counts = cache or FeatureCache.open(OFF), counts or PassCounts()
        self._deep: dict[str, ActivationSource] = {}

    def sources(
        self, num_blocks: int, images: tuple[ImageSource, ImageSource]
    ) -> tuple[SplitBackbone, tuple[ActivationSource, ActivationSource]]:
        """Return the backbone cut before its last `num_blocks` blocks, and the activations at the cut.

        Nothing is computed before the activations are asked for.

        Args:
            num_blocks: One of the plan's trials.
            images: Training images in the plan's views, and validation images as they are.
        """
        deepest = split_backbone(self._core, self._backbone, self._deepest)
        if not self._deep:
            frozen_pass = self._frozen_pass(deepest)
            self._deep = {
                split: image_activations(
                    frozen_pass, deepest.boundary, source, self._path(split, self._deepest)
                )
                for split, source in zip(_SPLITS, images, strict=True)
            }
        if num_blocks == self._deepest:
            return deepest, (self._deep["train"], self._deep["validation"])
        wanted = split_backbone(self._core, self._backbone, num_blocks)
        convert = between(self._core, self._backbone, self._deepest, num_blocks)
        train, validation = (
            later_activations(
                self._strategy, convert, self._deep[split], wanted.boundary, self._path(split, num_blocks)
            )
            for split in _SPLITS
        )
        return wanted, (train, validation)

    def forget(self, num_blocks: int) -> None:
        """Remove the files of a trial that is done, unless others are computed from them."""
        if num_blocks != self._deepest:
            for split in _SPLITS:
                path = self._path(split, num_blocks)
                path.with_suffix(".done").unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    def _frozen_pass(self, split: SplitBackbone) -> FrozenPass:
        block = self._backbone.blocks[self._backbone.num_blocks - self._deepest - 1]
        return FrozenPass(
            strategy=self._strategy,
            network=split.prefix,
            forward=split.activations,
            kind=f"boundary:{block}",
            row_length=split.boundary.row_length,
            dtype=split.boundary.dtype,
            policy=self._policy,
            backbone=self._backbone.name,
            cache=self._cache,
            counts=self._counts,
            all_or_nothing=True,
            phase="activations",
        )

    def _path(self, split: str, num_blocks: int) -> Path:
        return self._directory / f"{split}-{num_blocks}-blocks.npy"

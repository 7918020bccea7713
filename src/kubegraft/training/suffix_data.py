"""The activations at each cut that fine-tuning tries, in files of one directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from kubegraft.cache import OFF, FeatureCache
from kubegraft.modeling.backbone import Backbone
from kubegraft.modeling.classifier import parts
from kubegraft.modeling.splitting import SplitBackbone, split_backbone
from kubegraft.training.activations import ActivationSource, image_activations
from kubegraft.training.distribution import workers_of
from kubegraft.training.frozen_pass import FrozenPass, PassCounts
from kubegraft.training.sources import ImageSource

_SPLITS: Final = ("train", "validation")


class SuffixData:
    """Activations of the training and validation images; those of one cut at a time.

    Each cut's come from the images, by as many blocks as are frozen for it: a deeper trial's pass is the shorter one.
    """

    def __init__(
        self,
        strategy: Any,
        model: Any,
        backbone: Backbone,
        directory: Path,
        *,
        policy: str = "float32",
        cache: FeatureCache | None = None,
        counts: PassCounts | None = None,
    ) -> None:
        """Take where the activations are computed and kept.

        Args:
            strategy: A `tf.distribute` strategy.
            model: Classifier on `backbone`.
            backbone: Says where its blocks end.
            directory: For the files.
            policy: Keras dtype policy of `model`.
            cache: Where activations are looked for and kept; None for nowhere.
            counts: Is added to.
        """
        self._core, self._backbone, self._directory = parts(model).backbone, backbone, directory
        self._how = {
            "strategy": strategy,
            "policy": policy,
            "cache": cache or FeatureCache.open(OFF),
            "counts": counts or PassCounts(),
        }

    def sources(
        self, num_blocks: int, images: tuple[ImageSource, ImageSource]
    ) -> tuple[SplitBackbone, tuple[ActivationSource, ActivationSource]]:
        """Return the backbone cut before its last `num_blocks` blocks, and the activations at the cut.

        Nothing is computed before the activations are asked for.

        Args:
            num_blocks: Blocks behind the cut.
            images: Training images in the plan's views, and validation images as they are.
        """
        split = split_backbone(self._core, self._backbone, num_blocks)
        frozen_pass = FrozenPass.to_boundary(split, self._backbone, **self._how)
        train, validation = (
            image_activations(frozen_pass, split.boundary, source, self._path(name, num_blocks))
            for name, source in zip(_SPLITS, images, strict=True)
        )
        return split, (train, validation)

    def forget(self, num_blocks: int) -> None:
        """Remove the files of a trial that is done."""
        if workers_of(self._how["strategy"]).is_chief:
            for path in self._directory.glob(f"*-{num_blocks}-blocks*"):
                path.unlink()

    def _path(self, split: str, num_blocks: int) -> Path:
        return self._directory / f"{split}-{num_blocks}-blocks.npy"

"""The frozen part of a network, its engine and the shared feature cache, as the training stages use them together.

Rows always end in a file of the stage's work directory, which training reads: the cache fills it as far as it can,
and takes what had to be computed. So nothing that happens to the cache later can reach a training that has begun.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from kubegraft.cache import OFF, FeatureCache, FeatureReader, FeatureSpace, FeatureWriter, first_of_each
from kubegraft.data.shards import SplitReader
from kubegraft.modeling.backbone import Backbone
from kubegraft.modeling.classifier import ClassifierParts
from kubegraft.modeling.identity import network_digest
from kubegraft.modeling.splitting import SplitBackbone
from kubegraft.reporting.events import log_event
from kubegraft.stage import WORK_METRICS
from kubegraft.training.distribution import has_gpu
from kubegraft.training.features import extract_rows, frozen_forward
from kubegraft.training.sources import ImageSource
from kubegraft.training.workers import ALONE, Workers

# Decoding, resizing and the views of images. Whoever changes a pixel that comes out of them changes the number.
PREPROCESSING: Final = "rgb-bilinear-antialias-1"


@dataclass(slots=True)
class PassCounts:
    """What frozen passes of a stage came to; rows that an interrupted call left count as neither.

    Attributes:
        num_found: Rows that were in the cache.
        num_computed: Rows that were computed.
    """

    num_found: int = 0
    num_computed: int = 0


def work_of(
    stage: str, counts: PassCounts, readers: Iterable[SplitReader], workers: Workers = ALONE
) -> dict[str, float]:
    """Return, and log, how much of the frozen part's work this call did itself, with all its workers.

    Args:
        stage: Name of the stage.
        counts: Of its frozen passes.
        readers: All that read images for it.
        workers: Those who share the work.
    """
    num_decoded = sum(reader.num_read for reader in readers)
    own = np.array([num_decoded, counts.num_found, counts.num_computed], np.int64)
    work = dict(zip(WORK_METRICS, map(int, workers.sums(own)), strict=True))
    log_event(stage, "frozen passes", **work)
    return {name: float(value) for name, value in work.items()}


@dataclass(kw_only=True)
class FrozenPass:
    """A frozen network whose rows are wanted for splits.

    Attributes:
        strategy: A `tf.distribute` strategy.
        network: Functional Keras model whose layers and weights decide the rows.
        forward: Images to rows, by `network`.
        kind: `pooled` or `boundary:<block>`, as in `FeatureSpace`.
        row_length: Numbers in a row.
        dtype: Number format of the rows.
        policy: Keras dtype policy of the network.
        backbone: Registry name.
        cache: The cache.
        counts: Is added to.
        all_or_nothing: Whether the cache takes the rows of a split only if it has room for all that it lacks.
        phase: What progress and messages call it.
    """

    strategy: Any
    network: Any
    forward: Callable[[Any], Any]
    kind: str
    row_length: int
    dtype: str
    policy: str
    backbone: str
    cache: FeatureCache
    counts: PassCounts
    all_or_nothing: bool = False
    phase: str = "features"
    _engine: Any = field(default=None, init=False)

    @classmethod
    def to_pooled(cls, model_parts: ClassifierParts, backbone: Backbone, **how: Any) -> Self:
        """Return the pass through a whole frozen backbone, to pooled features `float32[num_images, dim]`.

        Args:
            model_parts: Of a classifier.
            backbone: Its backbone.
            how: `strategy`, `policy`, `cache` and `counts`.
        """
        core = model_parts.backbone

        def pooled(pixels: Any) -> Any:
            return model_parts.pool(core(pixels, training=False))

        length = int(core.output_shape[-1])
        return cls(
            network=core,
            forward=pooled,
            kind="pooled",
            row_length=length,
            dtype="float32",
            backbone=backbone.name,
            **how,
        )

    @classmethod
    def to_boundary(cls, split: SplitBackbone, backbone: Backbone, **how: Any) -> Self:
        """Return the pass through the blocks before a cut, to boundary activations.

        Args:
            split: The backbone's two halves.
            backbone: The backbone.
            how: `strategy`, `policy`, `cache` and `counts`.
        """
        block = backbone.blocks[backbone.num_blocks - split.boundary.num_blocks - 1]
        return cls(
            network=split.prefix,
            forward=split.activations,
            kind=f"boundary:{block}",
            row_length=split.boundary.row_length,
            dtype=split.boundary.dtype,
            backbone=backbone.name,
            all_or_nothing=True,
            phase="activations",
            **how,
        )

    def rows(self, images: ImageSource, path: Path) -> np.ndarray:
        """Return the rows of a split, each view of an image a row of its own; see `extract_rows`.

        Args:
            images: The split.
            path: Name of a file in the work directory.

        Raises:
            DataError: If an image can't be read.
        """
        with images.reading():
            return self._rows(images, path)

    def _rows(self, images: ImageSource, path: Path) -> np.ndarray:
        if self._engine is None:
            identity = hashlib.sha256(f"{self.kind} {images.input_size} {self._digest}".encode()).hexdigest()
            self._engine = frozen_forward(self.strategy, self.forward, images, images.input_size, identity)
        spaces = self._spaces(images, getattr(self._engine, "name", "tensorflow"))
        return extract_rows(
            self.strategy,
            self._engine,
            images,
            row_length=self.row_length,
            path=path,
            dtype=self.dtype,
            phase=self.phase,
            known=_CachedRows(self, spaces, images),
        )

    @functools.cached_property
    def _digest(self) -> str:
        return network_digest(self.network)

    def _spaces(self, images: ImageSource, engine: str) -> Sequence[FeatureSpace]:
        """Return the spaces of images as they are, and of their further views."""
        where = "-gpu" if has_gpu() else ""
        plain = FeatureSpace(
            model_digest=self._digest,
            preprocessing=PREPROCESSING,
            input_size=images.input_size,
            kind=self.kind,
            shape=(self.row_length,),
            dtype=self.dtype,
            engine=f"{engine}-{self.policy}{where}",
            backbone=self.backbone,
        )
        varied = json.dumps([list(images.transforms), images.strength])
        return plain, replace(plain, augmentation=hashlib.sha256(varied.encode()).hexdigest())


class _CachedRows:
    """The rows of one split in the cache; see `features.KnownRows`."""

    def __init__(self, owner: FrozenPass, spaces: Sequence[FeatureSpace], images: ImageSource) -> None:
        num_views = max(images.num_views, 1)
        self._owner, self._spaces = owner, spaces
        self._keys = np.tile(images.reader.digests, (num_views, 1))
        self._views = np.repeat(np.arange(num_views, dtype=np.uint32), len(images.reader.labels))
        self._readers: dict[int, FeatureReader] = {}

    def first_of_each(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return first_of_each(self._keys, self._views, np.arange(len(self._keys)))

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        space = self._spaces[0]
        rows = np.zeros((len(numbers), *space.shape), space.stored_dtype)
        found = np.zeros(len(numbers), bool)
        for which, part in self._by_space(numbers):
            if which not in self._readers:
                self._readers[which] = self._owner.cache.reader(self._spaces[which])
            wanted = numbers[part]
            rows[part], found[part] = self._readers[which].read(self._keys[wanted], self._views[wanted])
        self._owner.counts.num_found += int(found.sum())
        return rows, found

    @contextlib.contextmanager
    def keeping(self, num_missing: int) -> Iterator[Callable[[np.ndarray, np.ndarray], None]]:
        cache = self._owner.cache
        wanted_bytes = num_missing * self._spaces[0].value_bytes
        if self._owner.all_or_nothing and cache.enabled and wanted_bytes > cache.room_bytes():
            log_event("cache", "no room", kind=self._owner.kind, bytes=wanted_bytes, room=cache.room_bytes())
            cache = FeatureCache.open(OFF)
        with contextlib.ExitStack() as stack:
            writers: dict[int, FeatureWriter] = {}

            def keep(numbers: np.ndarray, rows: np.ndarray) -> None:
                for which, part in self._by_space(numbers):
                    if which not in writers:
                        writers[which] = stack.enter_context(cache.writer(self._spaces[which]))
                    chosen = numbers[part]
                    writers[which].append(self._keys[chosen], rows[part], self._views[chosen])
                self._owner.counts.num_computed += len(numbers)

            yield keep

    def _by_space(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield which space some of `numbers` are in, and the places of these."""
        later = self._views[numbers] > 0
        for which, chosen in enumerate((~later, later)):
            if chosen.any():
                yield which, np.flatnonzero(chosen)

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
import tensorflow as tf

from kubegraft.cache import OFF, FeatureCache, FeatureReader, FeatureSpace, FeatureWriter, first_of_each
from kubegraft.data.shards import SplitReader
from kubegraft.modeling.backbone import Backbone
from kubegraft.modeling.classifier import ClassifierParts
from kubegraft.modeling.engines import recallable
from kubegraft.modeling.identity import network_digest
from kubegraft.modeling.levels import groups_of
from kubegraft.modeling.splitting import SplitBackbone
from kubegraft.reporting.events import log_event
from kubegraft.stage import WORK_METRICS
from kubegraft.training.distribution import has_gpu, num_local_replicas, workers_of
from kubegraft.training.features import extract_rows, frozen_forward, recall_rows
from kubegraft.training.sources import FixedSource, ImageSource
from kubegraft.training.workers import ALONE, Workers

# Decoding, resizing and the views of images. Whoever changes a pixel that comes out of them changes the number.
PREPROCESSING: Final = "rgb-bilinear-antialias-2"


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
        groups: How many numbers of a row stand together, in order: of a level, or of a tensor that crosses a cut.
        dtype: Number format of the rows.
        policy: Keras dtype policy of the network.
        backbone: Registry name.
        cache: The cache.
        counts: Is added to.
        all_or_nothing: Whether the cache takes the rows of a split only if it has room for all that it lacks.
        phase: What progress and messages call it.
        on_the_way: A pass through part of `network` whose rows come out as well, after those of this one, and go to the
            cache; None for none.
    """

    strategy: Any
    network: Any
    forward: Callable[[Any], Any]
    kind: str
    groups: tuple[int, ...]
    dtype: str
    policy: str
    backbone: str
    cache: FeatureCache
    counts: PassCounts
    all_or_nothing: bool = False
    phase: str = "features"
    on_the_way: FrozenPass | None = None
    _engine: Any = field(default=None, init=False)

    @classmethod
    def to_pooled(
        cls, model_parts: ClassifierParts, backbone: Backbone, split: SplitBackbone | None = None, **how: Any
    ) -> Self:
        """Return the pass through a whole frozen backbone, to pooled features `float32[num_images, dim]`.

        Args:
            model_parts: Of a classifier.
            backbone: Its backbone.
            split: A cut whose boundary activations, `float32`, the cache takes from the same pass; None for none.
            how: `strategy`, `policy`, `cache` and `counts`.
        """
        core = model_parts.backbone
        both = split.on_the_way(core) if split else None

        def pooled(pixels: Any) -> Any:
            if both is None:
                return model_parts.pool(core(pixels, training=False))
            last, crossing = both(pixels)
            return tf.concat([model_parts.pool(last), crossing], 1)

        return cls(
            network=core,
            forward=pooled,
            kind="pooled",
            groups=groups_of(core),
            dtype="float32",
            backbone=backbone.name,
            on_the_way=cls.to_boundary(split, backbone, **how) if split else None,
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
            groups=split.boundary.lengths,
            dtype=split.boundary.dtype,
            backbone=backbone.name,
            all_or_nothing=True,
            phase="activations",
            **how,
        )

    @property
    def row_length(self) -> int:
        """Numbers in a row."""
        return sum(self.groups)

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
        recalled = self._recalled(images, path)
        if recalled is not None:
            return recalled
        self.prepare(images, images.input_size)
        engine = getattr(self._engine, "name", "tensorflow")
        return extract_rows(
            self.strategy,
            self._engine,
            images,
            row_length=self.row_length,
            path=path,
            dtype=self.dtype,
            phase=self.phase,
            known=_CachedRows(self, images, engine),
        )

    def prepare(self, images: FixedSource, input_size: int, *, undisturbed: bool = True) -> None:
        """Choose what computes the rows, unless that is done; see `frozen_forward`.

        Args:
            images: Some of them prove an engine.
            input_size: Side of the images in pixels.
            undisturbed: See `choose_engine`.
        """
        if self._engine is None:
            self._engine = frozen_forward(
                self.strategy,
                self.forward,
                images,
                input_size,
                self._identity(input_size),
                (*self.groups, *(self.on_the_way.groups if self.on_the_way else ())),
                undisturbed=undisturbed,
            )

    def _recalled(self, images: ImageSource, path: Path) -> np.ndarray | None:
        """Return the rows if the cache has them all, without an engine: to convert and try one takes seconds.

        Several workers or devices go the usual way, together.
        """
        alone = workers_of(self.strategy).alone and num_local_replicas(self.strategy) == 1
        if self._engine is not None or not self.cache.enabled or not alone or has_gpu():
            return None
        for engine in recallable(self._identity(images.input_size)):
            known = _CachedRows(self, images, engine)
            if not known.are_all_there():
                continue
            num_found = self.counts.num_found
            rows = recall_rows(
                known,
                shape=(known.num_rows, self.row_length),
                path=path.with_name(f"{path.stem}-{engine}.npy"),
                dtype=self.dtype,
                phase=self.phase,
            )
            if rows is not None:
                return rows
            self.counts.num_found = num_found  # they are looked for once more
        return None

    def _identity(self, input_size: int) -> str:
        """Return the digest of what `forward` computes."""
        kinds = "+".join([self.kind, *([self.on_the_way.kind] if self.on_the_way else [])])
        return hashlib.sha256(f"{kinds} {input_size} {self._digest}".encode()).hexdigest()

    @functools.cached_property
    def _digest(self) -> str:
        return network_digest(self.network)

    def spaces(self, images: ImageSource, engine: str) -> Sequence[FeatureSpace]:
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

    def __init__(self, owner: FrozenPass, images: ImageSource, engine: str) -> None:
        """Take whose rows they are, of which images, and what computes or computed them."""
        num_views = max(images.num_views, 1)
        self._owner, self._spaces = owner, owner.spaces(images, engine)
        self._keys = np.tile(images.reader.digests, (num_views, 1))
        self._views = np.repeat(np.arange(num_views, dtype=np.uint32), len(images.reader.labels))
        self._readers: dict[int, FeatureReader] = {}
        on_the_way = owner.on_the_way
        self._space_on_the_way = on_the_way.spaces(images, engine)[0] if on_the_way else None

    @property
    def num_rows(self) -> int:
        """Images times views."""
        return len(self._keys)

    def are_all_there(self) -> bool:
        """Return whether the cache has them all, as far as can be told without reading them."""
        return all(
            self._reader(which).lookup(self._keys[part], self._views[part]).all()
            for which, part in self._by_space(np.arange(self.num_rows))
        )

    def first_of_each(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return first_of_each(self._keys, self._views, np.arange(len(self._keys)))

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        space = self._spaces[0]
        rows = np.zeros((len(numbers), *space.shape), space.stored_dtype)
        found = np.zeros(len(numbers), bool)
        for which, part in self._by_space(numbers):
            wanted = numbers[part]
            rows[part], found[part] = self._reader(which).read(self._keys[wanted], self._views[wanted])
        self._owner.counts.num_found += int(found.sum())
        return rows, found

    @contextlib.contextmanager
    def keeping(self, num_missing: int) -> Iterator[Callable[[np.ndarray, np.ndarray, np.ndarray], None]]:
        owner, on_the_way = self._owner, self._space_on_the_way
        cache = self._cache_for(num_missing, self._spaces[0]) if owner.all_or_nothing else owner.cache
        with contextlib.ExitStack() as stack:
            writers: dict[int, FeatureWriter] = {}
            beside: FeatureWriter | None = None
            if on_the_way and num_missing:
                writer = self._cache_for(num_missing, on_the_way).writer(on_the_way)
                beside = stack.enter_context(writer)

            def keep(numbers: np.ndarray, rows: np.ndarray, more: np.ndarray) -> None:
                for which, part in self._by_space(numbers):
                    if which not in writers:
                        writers[which] = stack.enter_context(cache.writer(self._spaces[which]))
                    chosen = numbers[part]
                    writers[which].append(self._keys[chosen], rows[part], self._views[chosen])
                if beside:
                    beside.append(self._keys[numbers], more, self._views[numbers])
                owner.counts.num_computed += len(numbers)

            yield keep

    def _cache_for(self, num_rows: int, space: FeatureSpace) -> FeatureCache:
        """Return the cache if it has room for so many rows, else one that keeps nothing."""
        cache = self._owner.cache
        wanted_bytes = num_rows * space.value_bytes
        if cache.enabled and wanted_bytes > cache.room_bytes():
            log_event("cache", "no room", kind=space.kind, bytes=wanted_bytes, room=cache.room_bytes())
            return FeatureCache.open(OFF)
        return cache

    def _reader(self, which: int) -> FeatureReader:
        if which not in self._readers:
            self._readers[which] = self._owner.cache.reader(self._spaces[which])
        return self._readers[which]

    def _by_space(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield which space some of `numbers` are in, and the places of these."""
        later = self._views[numbers] > 0
        for which, chosen in enumerate((~later, later)):
            if chosen.any():
                yield which, np.flatnonzero(chosen)

"""The cache as the training stages use it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kubegraft.cache.bucket import BucketMirror
from kubegraft.cache.folder import SpaceFolder
from kubegraft.cache.keys import Keys, Views, checked, first_of_each
from kubegraft.cache.location import OFF, default_budget, default_location, mirror_root
from kubegraft.cache.reader import FeatureReader
from kubegraft.cache.space_on_disk import DiskBudget, file_system_time_ns
from kubegraft.cache.spaces import FeatureSpace
from kubegraft.cache.writer import FeatureWriter
from kubegraft.errors import ConfigError
from kubegraft.reporting.events import log_event
from kubegraft.storage import is_remote, local_path
from kubegraft.storage.fetching import folder_scheme

Compute = Callable[[NDArray[np.intp]], Iterable[NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class Filled:
    """What `FeatureCache.fill` did.

    Attributes:
        values: `[n, *shape]`, one for each key.
        num_found: Keys whose value was in the cache.
        num_computed: Values that were computed; an image that comes twice is computed once.
    """

    values: NDArray[Any]
    num_found: int
    num_computed: int


@dataclass(frozen=True, slots=True)
class Ensured:
    """What `FeatureCache.ensure` did.

    Attributes:
        reader: Reads the values, batch by batch. Close it at the end.
        num_found: Keys whose value was in the cache, and right.
        num_computed: Values that were computed.
        complete: Whether all values are there now; if not, the budget or the disk had no room for them.
    """

    reader: FeatureReader
    num_found: int
    num_computed: int
    complete: bool


class FeatureCache:
    """Values of frozen backbones, shared by runs, backbones and users.

    Example:
        cache = FeatureCache.open()
        space = FeatureSpace(model_digest=..., preprocessing="rgb-bilinear-1", input_size=224, kind="pooled",
                             shape=(1280,), engine="onnxruntime-float32", backbone="efficientnet_lite0")
        filled = cache.fill(space, image_keys(digests), lambda missing: forward_in_batches(missing))
        filled.values  # float32[n, 1280]; forward_in_batches saw only the images that nobody had seen
    """

    def __init__(
        self, root: Path | None, budget: DiskBudget | None = None, mirror: BucketMirror | None = None
    ) -> None:
        """Use `open`."""
        self._root, self._budget, self._mirror = root, budget, mirror

    @classmethod
    def open(
        cls, location: str | os.PathLike[str] | None = None, budget_bytes: int | None = None
    ) -> FeatureCache:
        """Open a cache; it is made when something is written.

        Args:
            location: Directory, `gs://` or `s3://` URI of a folder, `none` for no cache, or None for
                `$KUBEGRAFT_CACHE` or else the user's cache directory.
            budget_bytes: Most bytes of the directory, or, behind a bucket, of this machine's part of it. None
                for `$KUBEGRAFT_CACHE_BUDGET`, or else 50 GiB or a fifth of the file system, what is less.

        Raises:
            ConfigError: If the location is a file, or of a scheme without folders, or the budget is negative.
        """
        text = os.fspath(location) if location is not None else default_location()
        if budget_bytes is None:
            budget_bytes = default_budget()
        if budget_bytes is not None and budget_bytes < 0:
            raise ConfigError(
                f"`budget_bytes` must not be negative. Received: budget_bytes={budget_bytes!r}. "
                "For no cache say 'none' as its location."
            )
        if text == OFF:
            return cls(None)
        folder_scheme(text)
        root = mirror_root(text) if is_remote(text) else local_path(text)
        if not _is_there(root):
            return cls(None)
        budget = DiskBudget(root, budget_bytes, file_system_time_ns(root))
        return cls(root, budget, BucketMirror(text, budget) if is_remote(text) else None)

    @property
    def enabled(self) -> bool:
        """Whether there is a cache at all."""
        return self._root is not None

    def reader(self, space: FeatureSpace) -> FeatureReader:
        """Return a reader of what is there now."""
        return FeatureReader(space, self._folder(space), self._mirror)

    def writer(self, space: FeatureSpace) -> FeatureWriter:
        """Return a writer, to be used in a `with` statement."""
        return FeatureWriter(space, self._folder(space), self._budget, self._mirror)

    def fill(
        self,
        space: FeatureSpace,
        keys: Keys,
        compute: Compute,
        *,
        views: int | Views = 0,
        out: NDArray[Any] | None = None,
    ) -> Filled:
        """Return the value of every key: read where it is there, otherwise computed and kept.

        Args:
            space: What decides the values.
            keys: `uint8[n, 32]`.
            compute: Called once with the indices of the keys to compute, `int[m]`, unless there are none. It
                yields their values in this order, batch by batch: `[batch, *shape]`. What it has yielded when it
                raises, or the process is asked to stop, is kept.
            views: Number of the view, or one for each key.
            out: Array to fill, such as a `numpy.memmap`; or None for a new one.

        Raises:
            ConfigError: If an argument has another shape or dtype, or `compute` yields another number of values.
        """
        keys, views = checked(keys, views)
        with self.reader(space) as reader:
            values, found = reader.read(keys, views, out)
        missing, repeated, source = first_of_each(keys, views, np.flatnonzero(~found))
        if len(missing):
            with self.writer(space) as writer:
                for part, batch in _computed(missing, compute):
                    writer.append(keys[part], batch, views[part])
                    values[part] = (
                        batch if batch.dtype == values.dtype else batch.view(values.dtype)
                    )  # bfloat16
        values[repeated] = values[source]
        log_event("cache", "filled", kind=space.kind, found=int(found.sum()), computed=len(missing))
        return Filled(values, int(found.sum()), len(missing))

    def ensure(self, space: FeatureSpace, keys: Keys, compute: Compute, *, views: int | Views = 0) -> Ensured:
        """Make every value be in the cache, for values that don't fit in memory together.

        Those that are there are read once, so that damage is found now and not in the middle of training.

        Args:
            space: What decides the values.
            keys: `uint8[n, 32]`.
            compute: As in `fill`.
            views: Number of the view, or one for each key.

        Raises:
            ConfigError: As in `fill`.
        """
        keys, views = checked(keys, views)
        reader = self.reader(space)
        found = reader.verify(keys, views)
        missing, _, _ = first_of_each(keys, views, np.flatnonzero(~found))
        if len(missing):
            with self.writer(space) as writer:
                for part, batch in _computed(missing, compute):
                    writer.append(keys[part], batch, views[part])
            reader.refresh()
        log_event("cache", "ensured", kind=space.kind, found=int(found.sum()), computed=len(missing))
        return Ensured(reader, int(found.sum()), len(missing), bool(reader.lookup(keys, views).all()))

    def room_bytes(self) -> int:
        """Return how many bytes of new values the cache can take; for plans that are made before any work."""
        if self._budget is None:
            return 0
        try:
            return self._budget.room_bytes() if os.access(self._budget.root, os.W_OK) else 0
        except OSError:
            return 0

    def _folder(self, space: FeatureSpace) -> SpaceFolder | None:
        return None if self._root is None else SpaceFolder(self._root, space.digest)


def _is_there(root: Path) -> bool:
    """Make the directory, and return whether there is one."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(
            f"The cache must be a directory, a gs:// or s3:// URI, or 'none'. Received: {str(root)!r}, which is "
            "a file. Name another place."
        ) from error
    except OSError as error:
        if not os.path.isdir(root):  # noqa: PTH112 - `Path.is_dir` raises where it may not look
            reason = f"{type(error).__name__}: {error}"
            log_event("cache", "off", reason=reason, remedy="set KUBEGRAFT_CACHE or XDG_CACHE_HOME")
            return False
    return True


def _computed(missing: NDArray[np.intp], compute: Compute) -> Iterator[tuple[NDArray[np.intp], NDArray[Any]]]:
    """Yield indices with their values, as they are computed."""
    num_done = 0
    for computed in compute(missing):
        batch = np.asarray(computed)
        part = missing[num_done : num_done + len(batch)]
        if len(part) != len(batch):
            raise _wrong_number(len(missing), f"more than {len(missing)}")
        yield part, batch
        num_done += len(batch)
    if num_done != len(missing):
        raise _wrong_number(len(missing), str(num_done))


def _wrong_number(expected: int, received: str) -> ConfigError:
    return ConfigError(
        f"`compute` must yield a value for each index. Received: {received} values for {expected} indices. "
        "Yield them in the order of the indices, without padding."
    )

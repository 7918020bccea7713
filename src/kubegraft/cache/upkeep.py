"""Looking into a cache, verifying and pruning it: what `kubegraft cache` does. Safe while others read and write."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from kubegraft.cache.shelves import Shelf, Stored
from kubegraft.errors import ConfigError
from kubegraft.reporting.events import log_event
from kubegraft.reporting.progress import Progress


@dataclass(frozen=True, slots=True)
class SpaceStats:
    """What a cache holds of one space.

    Attributes:
        digest: Name of the space.
        backbone: Its name, or "" if unknown, as are the next six then.
        entries: Number of values, repetitions included.
        bytes: Size of its shards.
        last_used: When one of them was last read or written, ISO 8601 in UTC; in a bucket, when last written.
    """

    digest: str
    backbone: str
    kind: str
    input_size: int
    dtype: str
    engine: str
    preprocessing: str
    augmentation: str
    shards: int
    entries: int
    bytes: int
    last_used: str


@dataclass(slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        shards: Shards that were read.
        rows: Values that were read and are right.
        bytes: Bytes of these shards.
        damaged_shards: Shards that can't be used at all, those that readers had set aside included.
        damaged_rows: Values with a wrong checksum in other shards.
        unreadable: Shards that the system would not read; they are not removed.
        removed: Damaged shards that were removed, or replaced by their good rows.
        damage: A line for each.
    """

    shards: int = 0
    rows: int = 0
    bytes: int = 0
    damaged_shards: int = 0
    damaged_rows: int = 0
    unreadable: int = 0
    removed: int = 0
    damage: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was damaged."""
        return not (self.damaged_shards or self.damaged_rows or self.unreadable)

    def to_values(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"ok": self.ok, **asdict(self)}


@dataclass(slots=True)
class Pruning:
    """What `prune` removed, or would remove.

    Attributes:
        removed_shards: Shards removed for their age, for room, or by name.
        removed_bytes: Their bytes.
        leftover_files: Files of killed writers, and damaged ones.
        leftover_bytes: Their bytes.
        duplicate_rows: Rows whose value is elsewhere too.
        merged_shards: Shards whose rows were written into fewer, larger ones.
        kept_bytes: Bytes of what stays.
        dry_run: Whether nothing was changed.
    """

    removed_shards: int = 0
    removed_bytes: int = 0
    leftover_files: int = 0
    leftover_bytes: int = 0
    duplicate_rows: int = 0
    merged_shards: int = 0
    kept_bytes: int = 0
    dry_run: bool = False

    def to_values(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def stats(shelf: Shelf) -> list[SpaceStats]:
    """Return what a cache holds, by space, the largest first."""
    found = []
    for digest in shelf.spaces():
        stored = shelf.shards(digest)
        space = shelf.space(digest)
        found.append(
            SpaceStats(
                digest=digest,
                backbone=space.backbone if space else "",
                kind=space.kind if space else "",
                input_size=space.input_size if space else 0,
                dtype=space.dtype if space else "",
                engine=space.engine if space else "",
                preprocessing=space.preprocessing if space else "",
                augmentation=space.augmentation if space else "",
                shards=len(stored),
                entries=sum(shelf.num_rows(item) for item in stored),
                bytes=sum(item.size for item in stored),
                last_used=_iso(max((item.used for item in stored), default=0)),
            )
        )
    return sorted(found, key=lambda each: -each.bytes)


def verify(shelf: Shelf, *, remove: bool = True) -> Verification:
    """Read every value of a cache, and remove what is damaged; the good rows of a damaged shard stay.

    Args:
        shelf: The cache.
        remove: Whether to remove; otherwise only report.
    """
    result = Verification()
    stored = {digest: shelf.shards(digest) for digest in shelf.spaces()}
    with Progress("cache", sum(map(len, stored.values())), "shards") as progress:
        for item in itertools.chain.from_iterable(stored.values()):
            _verify(shelf, item, result, remove)
            progress.update()
    for digest in stored:
        for name in shelf.set_aside(digest, remove):
            result.damaged_shards += 1
            result.removed += remove
            result.damage.append(f"{digest[:12]}/{name}: set aside by a reader")
    return result


def _verify(shelf: Shelf, item: Stored, result: Verification, remove: bool) -> None:
    checked = shelf.check(item)
    where = f"{item.space[:12]}/{item.stem}"
    if checked.gone:
        return
    result.shards += 1
    result.bytes += item.size
    result.rows += checked.num_good
    if checked.unreadable:
        result.unreadable += 1
        result.damage.append(f"{where}: can't be read: {checked.reason}")
        return
    if checked.reason:
        result.damaged_shards += 1
        result.damage.append(f"{where}: {checked.reason}")
    elif checked.num_bad:
        result.damaged_rows += checked.num_bad
        result.damage.append(f"{where}: {checked.num_bad} of {checked.num_bad + checked.num_good} rows")
    else:
        return
    log_event("cache", "damaged", file=item.stem, reason=result.damage[-1])
    if remove and shelf.mend(item, whole=not checked.reason):
        result.removed += 1


def prune(
    shelf: Shelf,
    *,
    max_bytes: int | None = None,
    older_than_seconds: float | None = None,
    spaces: Sequence[str] = (),
    everything: bool = False,
    dry_run: bool = False,
) -> Pruning:
    """Remove what is not wanted, what killed writers left, and repetitions; merge small shards.

    Args:
        shelf: The cache.
        max_bytes: Remove the least recently used shards until the cache, or the named spaces, are no larger.
        older_than_seconds: Remove shards that were not used for so long.
        spaces: Beginnings of digests: only these spaces. Named without another limit, they go as a whole.
        everything: Remove all shards.
        dry_run: Only say what would be removed.

    Raises:
        ConfigError: If a beginning names no space, or several.
    """
    result = Pruning(dry_run=dry_run)
    digests = _named(shelf.spaces(), spaces)
    whole = everything or bool(spaces and max_bytes is None and older_than_seconds is None)
    before = time.time() - older_than_seconds if older_than_seconds is not None else 0.0
    kept: list[Stored] = []
    for digest in digests:
        num_files, num_bytes = shelf.remove_leftovers(digest, dry_run=dry_run)
        result.leftover_files += num_files
        result.leftover_bytes += num_bytes
        unwanted = {item.stem: item for item in shelf.shards(digest) if whole or item.used < before}
        _remove(shelf, unwanted.values(), result)
        if not whole:
            num_repeated, num_merged = shelf.compact(digest, dry_run=dry_run)
            result.duplicate_rows += num_repeated
            result.merged_shards += num_merged
        kept += [item for item in shelf.shards(digest) if item.stem not in unwanted]
    if max_bytes is not None:
        kept = _within(shelf, kept, max_bytes, result)
    result.kept_bytes = sum(item.size for item in kept)
    if not dry_run:
        for digest in digests:
            shelf.tidy(digest)
    return result


def _within(shelf: Shelf, stored: list[Stored], max_bytes: int, result: Pruning) -> list[Stored]:
    excess = sum(item.size for item in stored) - max_bytes
    oldest_first = sorted(stored, key=lambda item: item.used)
    count = 0
    while excess > 0:
        excess -= oldest_first[count].size
        count += 1
    _remove(shelf, oldest_first[:count], result)
    return oldest_first[count:]


def _remove(shelf: Shelf, stored: Iterable[Stored], result: Pruning) -> None:
    for item in stored:
        if result.dry_run or shelf.remove(item):
            result.removed_shards += 1
            result.removed_bytes += item.size


def _named(digests: Sequence[str], beginnings: Sequence[str]) -> list[str]:
    if not beginnings:
        return list(digests)
    found = []
    for beginning in beginnings:
        matching = [digest for digest in digests if digest.startswith(beginning.casefold())]
        if len(matching) != 1:
            raise ConfigError(
                f"`space` must be the beginning of one space's digest. Received: space={beginning!r}, which "
                f"{len(matching)} spaces have. `kubegraft cache stats --json` lists them."
            )
        found += matching
    return list(dict.fromkeys(found))


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else ""

"""Repeated rows and small shards: the rest of concurrent writers and of many short runs.

Rows are copied into a new shard, verified on the way; then the old ones are removed. A kill in between leaves rows
twice, which the next call mends; two calls at once do the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kubegraft.cache.folder import SHARD, CacheFile, SpaceFolder, remove
from kubegraft.cache.index import KeyIndex
from kubegraft.cache.shard_file import DamagedShard, OpenShard, ShardWriter, Table, verified_parts
from kubegraft.reporting.events import log_event

SHARD_BYTES: Final = 256 * 2**20
_SMALLEST_BYTES: Final = 8 * 2**20
_MANY: Final = 64


@dataclass(frozen=True, slots=True)
class _Source:
    file: CacheFile
    first: NDArray[np.bool_]  # which rows are the first with their key

    @property
    def num_repeated(self) -> int:
        return int((~self.first).sum())


def merge_if_many(folder: SpaceFolder) -> None:
    """Merge the smallest shards when there are many, as short runs leave them: each costs every reader an opening."""
    if sum(file.size < _SMALLEST_BYTES for file in folder.files(SHARD)) > _MANY:
        compact(folder, small_bytes=_SMALLEST_BYTES)


def compact(
    folder: SpaceFolder, *, dry_run: bool = False, small_bytes: int = SHARD_BYTES // 2
) -> tuple[int, int]:
    """Drop repeated rows and merge small shards.

    Args:
        folder: The shards.
        dry_run: Whether only to count.
        small_bytes: Shards of less are merged.

    Returns:
        Number of repeated rows, and of shards that were rewritten.
    """
    sources = _sources(folder)
    small = [source for source in sources if source.file.size < small_bytes]
    merging = {source.file.stem for source in small} if len(small) > 1 else set()
    chosen = [source for source in sources if source.num_repeated or source.file.stem in merging]
    num_repeated = sum(source.num_repeated for source in chosen)
    num_rewritten = 0
    for group in _groups(chosen):
        if dry_run or _rewrite(folder, group):
            num_rewritten += len(group)
    return num_repeated, num_rewritten


def rewrite(folder: SpaceFolder, files: list[CacheFile]) -> bool:
    """Put the good rows of some shards into a new one in their place; return whether that was done."""
    stems = {file.stem for file in files}
    return _rewrite(
        folder, [source for source in _sources(folder) if source.file.stem in stems], salvage=True
    )


def _sources(folder: SpaceFolder) -> list[_Source]:
    files, tables = [], []
    for file in folder.files(SHARD):
        try:
            tables.append(OpenShard(file.path).table())
            files.append(file)
        except (OSError, DamagedShard):
            continue  # gone meanwhile, or for `verify` to judge
    index = KeyIndex()
    index.add(tables)
    sources, start = [], 0
    for file, table in zip(files, tables, strict=True):
        own = np.arange(start, start + len(table))
        sources.append(_Source(file, index.find(table["key"], table["view"]) == own))
        start += len(table)
    return sources


def _groups(sources: list[_Source]) -> list[list[_Source]]:
    groups: list[list[_Source]] = []
    num_bytes = SHARD_BYTES
    for source in sources:
        if num_bytes + source.file.size > SHARD_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(source)
        num_bytes += source.file.size
    return [group for group in groups if len(group) > 1 or group[0].num_repeated]


def _rewrite(folder: SpaceFolder, group: list[_Source], *, salvage: bool = False) -> bool:
    """Copy the rows of a group into one new shard, then remove the group."""
    if not group:
        return False
    writer: ShardWriter | None = None
    try:
        value_bytes = OpenShard(group[0].file.path).header.value_bytes
        writer = ShardWriter(folder.new_aside(), folder.digest, value_bytes)
        for source in group:
            _copy(source, writer, keep_all=salvage)
        final = folder.final_path(writer.aside)
        if writer.num_rows:
            writer.finish(final)
            used_ns = max(source.file.used_ns for source in group)
            os.utime(final, ns=(used_ns, used_ns))
        else:
            writer.discard()
    except (OSError, DamagedShard) as error:
        log_event("cache", "not merged", shards=len(group), reason=f"{type(error).__name__}: {error}")
        if writer is not None:
            writer.discard()
        return False
    for source in group:
        remove(source.file)
    return True


def _copy(source: _Source, writer: ShardWriter, *, keep_all: bool) -> None:
    shard = OpenShard(source.file.path)
    start = 0
    for part, values, good in verified_parts(shard, shard.table()):
        kept = good if keep_all else good & source.first[start : start + len(part)]
        rows: Table = part[kept]
        if len(rows):
            writer.append(rows["key"].copy(), rows["view"].copy(), np.ascontiguousarray(values[kept]))
        start += len(part)

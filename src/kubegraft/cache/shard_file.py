"""One file of values: written once, aside, renamed when whole, never changed.

    page      4,096 bytes: magic, counts, digest of the space, SHA-256 of the table, SHA-256 of the page itself
    values    num_rows x value_bytes, without gaps, little-endian
    table     num_rows x 40 bytes: SHA-256 of the image, view, CRC-32 of these two and the value

The page and the table are small and read when a shard is opened; a wrong bit in them condemns the whole file. A
value is compared with its CRC-32 when a process first reads it; a wrong one condemns its row. The values begin at a
multiple of 4,096 and have no gaps, so that `numpy.memmap` can look at them too.

zlib's CRC-32 is the fastest checksum in the standard library (measured: 3.9 GB/s; SHA-256 1.7, BLAKE2b 0.9), and a
hole in a file does not pass it. It is against accidents: who may write to the cache is trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kubegraft.cache.keys import Keys, Views

PAGE_BYTES: Final = 4096
ROW_DTYPE: Final = np.dtype([("key", "u1", 32), ("view", "<u4"), ("crc", "<u4")])
_MAGIC: Final = b"KGFEATS1"
_FIELDS: Final = struct.Struct("<8sQQ32s32s")
_SEALED_BYTES: Final = PAGE_BYTES - 32
_NAME_BYTES: Final = 36  # key and view
_MOST_TARGETS: Final = 1024  # IOV_MAX of Linux and macOS
_LOCK_TRIES: Final = 5
_LOCK_WAIT_SECONDS: Final = 0.01
Table = NDArray[np.void]


class DamagedShard(Exception):
    """A file is not what a writer renamed; its content must not be used."""


@dataclass(frozen=True, slots=True)
class Header:
    """The first page.

    Attributes:
        num_rows: Number of values.
        value_bytes: Bytes of each.
        space: Digest of the space, 64 hex digits.
        table_sha256: SHA-256 of the table, 64 hex digits.
    """

    num_rows: int
    value_bytes: int
    space: str
    table_sha256: str

    @property
    def table_offset(self) -> int:
        """Where the table begins."""
        return PAGE_BYTES + self.num_rows * self.value_bytes

    @property
    def file_bytes(self) -> int:
        """Size that the file must have."""
        return self.table_offset + self.num_rows * ROW_DTYPE.itemsize

    def to_page(self) -> bytes:
        """Return the page."""
        digests = bytes.fromhex(self.space), bytes.fromhex(self.table_sha256)
        fields = _FIELDS.pack(_MAGIC, self.num_rows, self.value_bytes, *digests)
        sealed = fields.ljust(_SEALED_BYTES, b"\0")
        return sealed + hashlib.sha256(sealed).digest()

    @classmethod
    def from_page(cls, page: bytes) -> Header:
        """Return what a page says.

        Raises:
            DamagedShard: If it is not one.
        """
        if len(page) != PAGE_BYTES or page[:8] != _MAGIC:
            raise DamagedShard("it does not begin as a shard")
        if hashlib.sha256(page[:_SEALED_BYTES]).digest() != page[_SEALED_BYTES:]:
            raise DamagedShard("its first page has another checksum")
        _, num_rows, value_bytes, space, table_sha256 = _FIELDS.unpack_from(page)
        return cls(num_rows, value_bytes, space.hex(), table_sha256.hex())


def bytes_of(array: NDArray[Any]) -> memoryview:
    """Return the bytes of a contiguous array, without a copy."""
    return memoryview(array.reshape(-1).view(np.uint8).data)


def rows_of(content: memoryview, row_bytes: int, positions: Iterable[int]) -> Iterator[memoryview]:
    """Yield the rows at some positions of an array's bytes, without a copy."""
    return (content[row_bytes * position : row_bytes * (position + 1)] for position in positions)


def row_crcs(keys: Keys, views: Views, rows: Iterable[memoryview]) -> NDArray[np.uint32]:
    """Return the checksum of each row: `uint32[n]`.

    It covers the key, so that a value that was written to another image's row is not taken for that image's.

    Args:
        keys: `uint8[n, 32]`.
        views: `uint32[n]`.
        rows: Bytes of the n values.
    """
    names = np.empty((len(keys), _NAME_BYTES), np.uint8)
    names[:, :32] = keys
    names[:, 32:] = views.astype("<u4").view(np.uint8).reshape(-1, 4)
    named = zip(rows_of(bytes_of(names), _NAME_BYTES, range(len(keys))), rows, strict=True)
    return np.fromiter((zlib.crc32(row, zlib.crc32(name)) for name, row in named), np.uint32, len(keys))


class OpenShard:
    """A shard that is open for reading; it stays readable when its name is removed.

    Values are read with `preadv`, not through a mapping: a file that is gone or can't be read is then an error that
    can be caught, where a mapping ends the process (SIGBUS). It is as fast, and nothing is held in memory.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            OSError: If it can't be opened or read.
            DamagedShard: If it is not a whole shard.
        """
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.header = Header.from_page(self._bytes(PAGE_BYTES, 0))
        size = os.fstat(self._fd).st_size
        if size != self.header.file_bytes:
            raise DamagedShard(f"it has {size} of {self.header.file_bytes} bytes")

    def __del__(self) -> None:
        # Closed by the last who uses it, and not before: another thread may be reading.
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._fd)

    def table(self) -> Table:
        """Return the rows' keys, views and checksums.

        Raises:
            OSError: If it can't be read.
            DamagedShard: If the table is not the one that was written.
        """
        content = self._bytes(self.header.num_rows * ROW_DTYPE.itemsize, self.header.table_offset)
        return table_of(self.header, content)

    def read(self, row: int, targets: list[memoryview]) -> None:
        """Fill `targets`, one after the other, with the values from `row` on. They are not verified.

        Raises:
            OSError: If they can't be read.
        """
        offset = PAGE_BYTES + row * self.header.value_bytes
        for start in range(0, len(targets), _MOST_TARGETS):
            some = targets[start : start + _MOST_TARGETS]
            num_bytes = sum(map(len, some))
            if (
                os.preadv(self._fd, some, offset) != num_bytes
            ):  # so many at once that the kernel stops in between
                self._read_in_parts(some, offset)
            offset += num_bytes

    def _read_in_parts(self, targets: list[memoryview], offset: int) -> None:
        for target in targets:
            rest = target
            while rest:
                count = os.preadv(self._fd, [rest], offset)
                if count == 0:
                    raise OSError("the file has become shorter")
                rest, offset = rest[count:], offset + count

    def _bytes(self, count: int, offset: int) -> bytes:
        parts = []
        while count and (part := os.pread(self._fd, count, offset)):
            parts.append(part)
            count, offset = count - len(part), offset + len(part)
        return b"".join(parts)


def table_of(header: Header, content: bytes) -> Table:
    """Return the table from its bytes.

    Raises:
        DamagedShard: If it is not the one that `header` speaks of.
    """
    if hashlib.sha256(content).hexdigest() != header.table_sha256:
        raise DamagedShard("its table of keys has another checksum")
    return np.frombuffer(content, ROW_DTYPE)


class ShardWriter:
    """Writes one file under a name of its own, and gives it its final name when it is whole and on the disk."""

    def __init__(self, aside: Path, space: str, value_bytes: int) -> None:
        """Make the file `aside`, which must not exist.

        Raises:
            OSError: If it can't be made.
        """
        self.aside, self._space, self._value_bytes = aside, space, value_bytes
        self._tables: list[Table] = []
        self.num_rows = 0
        # Not mkstemp: a cache is shared, and the umask says with whom.
        self._fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.mark_as_used()

    @property
    def num_bytes(self) -> int:
        """Bytes of the values so far."""
        return self.num_rows * self._value_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of the table that `finish` will write after the values."""
        return self.num_rows * ROW_DTYPE.itemsize

    def mark_as_used(self) -> None:
        """Hold the kernel's lock, by which others see that the writer lives; without locks its age says so."""
        import fcntl

        for _ in range(_LOCK_TRIES):  # somebody may be asking just now whether the file is abandoned
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOCK_WAIT_SECONDS)
            except OSError:
                return
            else:
                return

    def append(self, keys: Keys, views: Views, values: NDArray[Any]) -> None:
        """Write rows.

        Raises:
            OSError: If the system refuses.
        """
        table = np.empty(len(keys), ROW_DTYPE)
        content = bytes_of(values)
        rows = rows_of(content, self._value_bytes, range(len(keys)))
        table["key"], table["view"], table["crc"] = keys, views, row_crcs(keys, views, rows)
        self._write(content, PAGE_BYTES + self.num_bytes)
        self._tables.append(table)
        self.num_rows += len(keys)

    def finish(self, final: Path) -> Header:
        """Write the table and the page, sync, and rename to `final`.

        Raises:
            OSError: If the system refuses; nothing is at `final` then.
        """
        content = np.concatenate(self._tables).tobytes()
        header = Header(self.num_rows, self._value_bytes, self._space, hashlib.sha256(content).hexdigest())
        self._write(memoryview(content), header.table_offset)
        self._write(memoryview(header.to_page()), 0)
        os.fsync(self._fd)
        self.aside.rename(final)
        self.close()
        sync_directory(final.parent)
        return header

    def discard(self) -> None:
        """Remove the file."""
        self.close()
        with contextlib.suppress(OSError):
            self.aside.unlink()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1

    def _write(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count


def sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def verified_parts(
    shard: OpenShard, table: Table, *, part_bytes: int = 8 * 2**20
) -> Iterator[tuple[Table, NDArray[np.uint8], NDArray[np.bool_]]]:
    """Yield all rows of a shard part by part: their table, values `uint8[n, value_bytes]`, and which are right.

    Raises:
        OSError: If the file can't be read.
    """
    num_rows = max(part_bytes // shard.header.value_bytes, 1)
    for start in range(0, len(table), num_rows):
        part = table[start : start + num_rows]
        values = np.empty((len(part), shard.header.value_bytes), np.uint8)
        content = bytes_of(values)
        shard.read(start, [content])
        rows = rows_of(content, shard.header.value_bytes, range(len(part)))
        yield part, values, row_crcs(part["key"], part["view"], rows) == part["crc"]

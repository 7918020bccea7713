"""Rows in a mapped file, and in a file beside it which of them are done: what a frozen pass leaves for training."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from kubegraft.errors import EnvironmentFault
from kubegraft.stage import write_atomically

_SAVE_SECONDS: Final = 5.0
_READ_BYTES: Final = 16 * 2**20


def stored_dtype(dtype: str) -> Any:
    """Return the numpy dtype in which rows of a Keras dtype are kept."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


class RowFile:
    """Rows that are computed one after the other, over several calls if need be.

    Attributes:
        num_rows: How many there are.
        rows: `[num_rows, row_length]`, mapped and writable.
        done: `bool[num_rows]`, which of them are there.
        rows_at_once: Rows that are worth reading or copying together.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: str) -> None:
        """Open the file, or make it with its space on disk.

        Args:
            path: The file.
            shape: Rows, and numbers in each.
            dtype: Keras dtype.

        Raises:
            EnvironmentFault: If the disk has no room.
        """
        self._path, self._done_path = path, path.with_suffix(".done")
        self.num_rows, row_length = shape
        self._saved = time.monotonic()
        done = _done_rows(path, self.num_rows)
        if done is None:
            _reserve(path, shape, stored_dtype(dtype))
            done = np.zeros(self.num_rows, bool)
        self.done = done
        self.rows: Any = np.load(path, mmap_mode="r+")
        self.rows_at_once = max(_READ_BYTES // (row_length * self.rows.dtype.itemsize), 1)

    @property
    def name(self) -> str:
        """Name of the file, without its ending."""
        return self._path.stem

    def put(self, numbers: np.ndarray, rows: np.ndarray) -> None:
        """Write rows; they are safe after `save`."""
        self.rows[numbers] = rows if rows.dtype == self.rows.dtype else rows.view(self.rows.dtype)
        self.done[numbers] = True

    def repeat(self, repeated: np.ndarray, origin: np.ndarray) -> None:
        """Copy rows `origin` to the places `repeated`."""
        for start in range(0, len(repeated), self.rows_at_once):
            part = slice(start, start + self.rows_at_once)
            self.put(repeated[part], self.rows[origin[part]])

    def remove(self) -> None:
        """Remove the file."""
        self._done_path.unlink(missing_ok=True)
        self._path.unlink()

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved > _SAVE_SECONDS or bool(self.done.all())

    def save(self) -> None:
        """Make sure the rows are on disk before the bits that say so are."""
        self.rows.flush()
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        write_atomically(self._done_path, np.packbits(self.done).tobytes())
        self._saved = time.monotonic()


def is_whole(path: Path, num_rows: int) -> bool:
    """Return whether all rows of a file are there."""
    done = _done_rows(path, num_rows)
    return done is not None and bool(done.all())


def read_rows(path: Path) -> np.ndarray:
    """Return the rows of a whole file, mapped and read-only."""
    rows: np.ndarray = np.load(path, mmap_mode="r")
    return rows


def _done_rows(path: Path, num_rows: int) -> np.ndarray | None:
    """Return which rows are there, or None where no file of so many rows is."""
    done_path = path.with_suffix(".done")
    bits = done_path.read_bytes() if done_path.exists() and path.exists() else b""
    if not num_rows or len(bits) != -(-num_rows // 8):
        return None
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=num_rows).astype(bool)


def _reserve(path: Path, shape: tuple[int, int], dtype: Any) -> None:
    """Make the file, with its space on disk: writing to a mapped hole on a full disk would end the process."""
    np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink()
        raise EnvironmentFault(
            f"`{path.name}` needs {size:,} bytes of disk. Received: {error.strerror} at {str(path.parent)!r}. "
            "Make room, or put the work directory elsewhere."
        ) from error

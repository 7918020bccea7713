"""The values of variables as a digest, to prove that they are equal or did not change."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from kubegraft.errors import TrainingError


def digest_of_variables(variables: Sequence[Any]) -> str:
    """Return the SHA-256 of the values of these variables, in this order; equal only if every bit is."""
    digest = hashlib.sha256()
    for variable in variables:
        digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return digest.hexdigest()


def require_unmoved(before: str, variables: Sequence[Any]) -> None:
    """Raise TrainingError if any bit of what was frozen has changed."""
    if digest_of_variables(variables) != before:
        raise TrainingError(
            "Frozen variables must not change in training, but their digest did. This is a defect of kubegraft: "
            "please report it with the model's metadata."
        )

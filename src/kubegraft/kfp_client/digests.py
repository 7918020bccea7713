"""Names that content gives itself, by which the same call is recognised."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

_DIGITS: Final = 12


def content_digest(values: Any) -> str:
    """Return 12 hex digits that equal JSON values share, whatever the order of their keys."""
    text = json.dumps(values, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]

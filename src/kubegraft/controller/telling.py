"""The objects by which people are told: a status as it is applied, and an event."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from typing import Any, Final

from kubegraft.controller.actions import Event
from kubegraft.controller.watching import Object

_NAME_DIGITS: Final = 16


def with_status(about: Object, status: Mapping[str, Any]) -> Object:
    """Return what is applied to the status of an object, over the version that was looked at and no other."""
    metadata = {name: about["metadata"][name] for name in ("name", "namespace", "uid", "resourceVersion")}
    return {"apiVersion": about["apiVersion"], "kind": about["kind"], "metadata": metadata, "status": status}


def event_object(about: Object, event: Event) -> Object:
    """Return the object; its name derives from what it says, so that it is not said twice."""
    metadata = about["metadata"]
    words = "\0".join((metadata["uid"], event.type, event.reason, event.message))
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{metadata['name']}.{hashlib.sha256(words.encode()).hexdigest()[:_NAME_DIGITS]}",
            "namespace": metadata["namespace"],
        },
        "involvedObject": {
            "apiVersion": about["apiVersion"],
            "kind": about["kind"],
            **{name: metadata[name] for name in ("name", "namespace", "uid", "resourceVersion")},
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:1024],
        "source": {"component": "kubegraft-operator"},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }

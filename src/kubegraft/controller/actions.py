"""What the pure functions want done: in this order, and any prefix of it may be all that is done before a crash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kubegraft.rendering.pods import Manifest


@dataclass(frozen=True, slots=True)
class Apply:
    """Server-side apply of an object, by the operator's field manager, with force.

    Attributes:
        manifest: What the operator wants of the object. With `metadata.uid` and `resourceVersion` the object must
            exist, as it was read: 409 only means that the read was stale.
        create: The object must not exist yet: a plain create (POST), not an apply, so that a later apply of one
            field takes nothing else away. 409 (AlreadyExists) means that the read was stale; the object is left as
            it is, since others may have changed it.
    """

    manifest: Manifest
    create: bool = False


@dataclass(frozen=True, slots=True)
class Delete:
    """Deletion, of a JobSet in the foreground: its name is free only when its pods are gone; else in the background.

    404 is fine, and so is 409: another uid or version, the read was stale.

    Attributes:
        kind: `JobSet`, `ConfigMap`, `Job`, `TransferJob`.
        name: Name of the object.
        namespace: Its namespace.
        uid: What must be deleted, as the deletion's precondition; "" for whatever has the name.
        resource_version: Likewise: an object that has changed since it was read stays. "" for any.
    """

    kind: str
    name: str
    namespace: str
    uid: str = ""
    resource_version: str = ""


@dataclass(frozen=True, slots=True)
class PatchStatus:
    """Server-side apply of the `status` of the TransferJob or TransferSchedule that was observed.

    With the `metadata.resourceVersion` that was observed as its precondition: 409 means that the read was stale. Then
    nothing is written, nothing is wrong, and no action after it is carried out; the object is observed again. So a
    stale read never undoes an end.

    Attributes:
        status: The whole status: what is absent is removed.
    """

    status: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Event:
    """An event about the observed object, for people.

    Attributes:
        type: `Normal` or `Warning`.
        reason: CamelCase, as in the conditions.
        message: At most 1024 characters.
    """

    type: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Requeue:
    """Look again after this time, though nothing changes in the API.

    Attributes:
        seconds: Above 0.
    """

    seconds: float


Action = Apply | Delete | PatchStatus | Event | Requeue

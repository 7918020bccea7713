"""What every rendered pod has: nothing that Pod Security `restricted` would refuse, bounds, and its volumes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from kubegraft.cluster_inputs import check_bucket_folder
from kubegraft.errors import ConfigError

Manifest = dict[str, Any]

USER: Final = 65532  # the numeric non-root user of the image
_NAME: Final = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_EXISTING: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")  # of objects that others made
_QUANTITY: Final = re.compile(r"(?=.*[1-9])\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_UNITS: Final = {
    "": 1.0,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where rendered objects go, and what exists there already (manifests/base makes it).

    Attributes:
        name: Name of what is rendered, also the directory on the volume.
        namespace: Namespace; "" leaves it to kubectl.
        image: Image of the container.
        claim: PersistentVolumeClaim of the work directory; "" for the pod's own disk, where `publish_uri` is given.
        publish_uri: Folder in a bucket, or path on the volume, that the results are published to; "" for none.
        service_account: Account of the pods.
        cpu: CPU limit; a quarter of it is requested.
        memory: Memory limit; half of it is requested.
        secret: Secret whose keys become environment variables, for credentials of a bucket; "" for none.
        metrics: Whether a task serves metrics for Prometheus, on port 9090.
    """

    name: str
    namespace: str = ""
    image: str
    claim: str = "kubegraft-work"
    publish_uri: str = ""
    service_account: str = "kubegraft-task"
    cpu: str = "4"
    memory: str = "8Gi"
    secret: str = ""
    metrics: bool = False

    def __post_init__(self) -> None:
        """Check what Kubernetes would refuse.

        Raises:
            ConfigError: If a name or an amount has a form that Kubernetes does not take.
        """
        if self.publish_uri and not (self.claim and self.publish_uri.startswith("/")):
            check_bucket_folder("publish", self.publish_uri)
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                "`name` must be at most 40 lower-case letters, digits and dashes, and begin with a letter. "
                f"Received: name={self.name!r}."
            )
        for name in ("namespace", "claim", "service_account", "secret"):
            value = getattr(self, name)
            if value and not _EXISTING.fullmatch(value):
                raise ConfigError(
                    f"`{name}` must be a name that Kubernetes takes: lower-case letters, digits, dashes and dots. "
                    f"Received: {name}={value!r}."
                )
        for name in ("cpu", "memory"):
            if not _QUANTITY.fullmatch(getattr(self, name)):
                raise ConfigError(
                    f"`{name}` must be a Kubernetes quantity above 0. Received: {name}={getattr(self, name)!r}. "
                    "For example 4 or 500m of CPU, 8Gi of memory."
                )

    def require_claim(self, otherwise: str = "") -> None:
        """Raise unless there is a volume.

        Args:
            otherwise: What else the user may give, for the message.

        Raises:
            ConfigError: If there is none.
        """
        if not self.claim:
            raise ConfigError(
                "`claim` must name the PersistentVolumeClaim that a run left its results on. Received: claim=''. "
                f"Give --claim NAME{otherwise}."
            )

    def metadata(self, component: str, name: str = "") -> Manifest:
        """Return the metadata of an object; `component` is `task` or `serving`."""
        found: Manifest = {"name": name or self.name}
        if self.namespace:
            found["namespace"] = self.namespace
        return {**found, "labels": labels(component, self.name)}


def labels(component: str, name: str) -> Manifest:
    """Return the labels by which the network policies and selectors of manifests/ find pods."""
    return {
        "app.kubernetes.io/name": "kubegraft",
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/part-of": "kubegraft",
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerators:
    """What a training pod asks its node for.

    Attributes:
        resource: Kubernetes resource name.
        count: How many; 0 for none.
        node_selector: Labels of the node.
        tolerations: Taints of the node.
    """

    resource: str = "nvidia.com/gpu"
    count: int = 0
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, str], ...] = ()


def pod_security() -> Manifest:
    """Return a pod's security context."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Manifest:
    """Return a container's security context."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def at_most(quantity: str, limit: str) -> str:
    """Return the smaller of two Kubernetes quantities; a request above its limit would be refused."""
    return min(quantity, limit, key=_amount)


def _amount(quantity: str) -> float:
    number, unit = _split(quantity)
    return number * _UNITS[unit]


def _split(quantity: str) -> tuple[float, str]:
    number = quantity.rstrip("".join(_UNITS))
    return float(number), quantity.removeprefix(number)


def scaled(quantity: str, fraction: float) -> str:
    """Return a fraction of a Kubernetes quantity, in whole thousandths of CPU or whole Mi of memory."""
    number, unit = _split(quantity)
    if unit in ("", "m"):
        thousandths = number * fraction * (1 if unit else 1000)
        return f"{thousandths:.0f}m" if thousandths % 1000 else f"{thousandths / 1000:.0f}"
    smaller = {"Ti": ("Gi", 1024), "Gi": ("Mi", 1024), "T": ("G", 1000), "G": ("M", 1000)}
    if (number * fraction) % 1 and unit in smaller:
        unit, factor = smaller[unit]
        number *= factor
    return f"{max(number * fraction, 1):.0f}{unit}"

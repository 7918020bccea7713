"""One replica works, the others stand by: a Lease of coordination.k8s.io, as Kubernetes' own controllers have it."""

from __future__ import annotations

import asyncio
import datetime
import time
from dataclasses import dataclass, field
from typing import Any, Final

from kubegraft.controller.api import Api, ApiError
from kubegraft.reporting.events import log_event

_MOMENT_SECONDS: Final = 0.05
_FORMAT: Final = "%Y-%m-%dT%H:%M:%S.%fZ"


@dataclass(slots=True, kw_only=True)
class Leader:
    """Takes the lease, renews it, and gives it back.

    Clocks of replicas need not agree: a lease is over when this process has not seen it change for its whole duration.
    The holder stops a third of the duration before that, so that no two work at once. Were it so for a moment, names
    that derive from uids, and the resource versions of status writes, would keep the outcome right.

    Attributes:
        api: Session.
        namespace: Of the lease.
        identity: Of this replica; the pod's name.
        name: Of the lease.
        seconds: For how long a lease holds after its last renewal.
    """

    api: Api
    namespace: str
    identity: str
    name: str = "kubegraft-operator"
    seconds: float = 15.0
    _seen: tuple[str, float] = field(default=("", 0.0), init=False)
    _lease: dict[str, Any] = field(default_factory=dict, init=False)
    _renewed: float = field(default=0.0, init=False)

    async def acquire(self) -> None:
        """Return when this replica holds the lease."""
        waits_for = ""
        while not await self._try():
            holder = self._lease.get("spec", {}).get("holderIdentity", "")
            if holder != waits_for:
                log_event("operator", "standing by", leader=holder)
                waits_for = holder
            await asyncio.sleep(self.seconds / 8)
        log_event("operator", "leading", identity=self.identity)

    async def keep(self) -> None:
        """Renew the lease until that fails for too long, or somebody else has it; then return."""
        while (left := self._renewed + self.seconds * 2 / 3 - time.monotonic()) > 0:
            pause = min(self.seconds / 5, left)
            await asyncio.sleep(pause)
            try:
                held = await asyncio.wait_for(self._try(), timeout=max(left - pause, _MOMENT_SECONDS))
            except TimeoutError:
                continue  # whoever does not answer in time may have given the lease to somebody
            if not held and self._lease.get("spec", {}).get("holderIdentity") != self.identity:
                break

    async def give_back(self) -> None:
        """Let the next replica lead at once."""
        if self._lease.get("spec", {}).get("holderIdentity") != self.identity:
            return
        spec = {**self._lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
        try:
            await self.api.update({**self._lease, "spec": spec})
        except ApiError as error:
            log_event("operator", "warning", text=f"the lease was not given back, and runs out: {error}")

    async def _try(self) -> bool:
        """Take or renew the lease; return whether this replica has it."""
        asked = time.monotonic()
        try:
            found = await self.api.get("Lease", self.namespace, self.name)
            if found is None:
                self._hold(await self.api.create(self._manifest({})), asked)
                return True
            self._lease = found
            if not self._may_take(found):
                return False
            self._hold(await self.api.update(self._manifest(found)), asked)
        except ApiError as error:
            if not error.conflict:
                log_event("operator", "warning", text=f"lease: {error}")
            return False
        return True

    def _hold(self, lease: dict[str, Any], asked: float) -> None:
        self._lease, self._renewed = lease, asked

    def _may_take(self, lease: dict[str, Any]) -> bool:
        spec = lease.get("spec", {})
        if spec.get("holderIdentity") in ("", None, self.identity):
            return True
        version = lease["metadata"]["resourceVersion"]
        if self._seen[0] != version:
            self._seen = (version, time.monotonic())
        return time.monotonic() - self._seen[1] > float(spec.get("leaseDurationSeconds") or self.seconds)

    def _manifest(self, found: dict[str, Any]) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.UTC).strftime(_FORMAT)
        spec = dict(found.get("spec", {}))
        if spec.get("holderIdentity") != self.identity:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + bool(found)
        spec |= {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": max(int(self.seconds), 1),
            "renewTime": now,
        }
        metadata = found.get("metadata") or {"name": self.name, "namespace": self.namespace}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": spec,
        }

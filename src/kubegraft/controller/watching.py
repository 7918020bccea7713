"""A copy of the objects that carry our label, kept up to date by a list and a watch.

kopf watches what people write. What is made for them is watched here: a deletion that happened while a watch was
broken is noticed by the list that follows, and only the parts that decisions need are kept in memory.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from kubegraft.controller.api import Api, ApiError
from kubegraft.reporting.events import log_event

_FIRST_SECONDS: Final = 1.0
_MOST_SECONDS: Final = 30.0

Object = dict[str, Any]
Place = tuple[str, str]  # namespace and name


class Copies:
    """Objects of one kind by namespace and name, and by what they belong to.

    Attributes:
        kind: Of the objects.
    """

    def __init__(
        self, kind: str, *, prune: Callable[[Object], Object], owner_of: Callable[[Object], str]
    ) -> None:
        self.kind, self._prune, self._owner_of = kind, prune, owner_of
        self._objects: dict[Place, Object] = {}
        self._of_owner: dict[str, set[Place]] = defaultdict(set)

    def __len__(self) -> int:
        """Return how many objects there are."""
        return len(self._objects)

    def __iter__(self) -> Iterator[Object]:
        """Return an iterator over the objects."""
        return iter(list(self._objects.values()))

    def get(self, namespace: str, name: str) -> Object | None:
        """Return an object, or None."""
        return self._objects.get((namespace, name))

    def of(self, owner: str) -> tuple[Object, ...]:
        """Return the objects that belong to an owner, the oldest first."""
        found = (self._objects[place] for place in self._of_owner.get(owner, ()))
        return tuple(
            sorted(found, key=lambda one: (one["metadata"]["creationTimestamp"], one["metadata"]["name"]))
        )

    def put(self, found: Object) -> bool:
        """Keep an object unless a newer one is there; return whether it was kept."""
        place = place_of(found)
        known = self._objects.get(place)
        if known is not None and _older(found, known):
            return False
        self._forget(place)
        self._objects[place] = self._prune(found)
        if owner := self._owner_of(found):
            self._of_owner[owner].add(place)
        return True

    def drop(self, found: Object) -> None:
        """Forget an object, unless another of the same name has come."""
        place = place_of(found)
        known = self._objects.get(place)
        if known is not None and known["metadata"]["uid"] == found["metadata"]["uid"]:
            self._forget(place)

    def owner_of(self, found: Object) -> str:
        """Return what an object belongs to; "" for nothing."""
        return self._owner_of(found)

    def replace(self, found: Iterable[Object], version: str) -> list[Object]:
        """Keep exactly these objects; return those that are new, changed or gone.

        Args:
            found: All objects of the kind.
            version: Resource version of the list; what is known to be newer stays.
        """
        places = {place_of(one): one for one in found}
        gone = [
            known
            for place, known in self._objects.items()
            if place not in places and not _is_newer(known, version)
        ]
        for known in gone:
            self._forget(place_of(known))
        return gone + [one for one in places.values() if self.put(one)]

    def _forget(self, place: Place) -> None:
        known = self._objects.pop(place, None)
        if known is None:
            return
        owner = self._owner_of(known)
        self._of_owner[owner].discard(place)
        if not self._of_owner[owner]:
            del self._of_owner[owner]


def place_of(found: Object) -> Place:
    """Return an object's namespace and name."""
    return found["metadata"].get("namespace", ""), found["metadata"]["name"]


def _is_newer(known: Object, version: str) -> bool:
    own = known["metadata"].get("resourceVersion", "")
    return own.isdecimal() and version.isdecimal() and int(own) > int(version)


def _older(found: Object, known: Object) -> bool:
    """Whether `found` is not newer: what a watch tells late of what this process has written itself."""
    if found["metadata"].get("uid") != known["metadata"].get("uid"):
        return False
    versions = found["metadata"].get("resourceVersion", ""), known["metadata"].get("resourceVersion", "")
    return all(version.isdecimal() for version in versions) and int(versions[0]) <= int(versions[1])


class Watch:
    """Keeps copies up to date, and says whose objects have changed.

    Attributes:
        copies: What is kept.
        ready: Set once the first list is there.
    """

    def __init__(
        self, api: Api, copies: Copies, *, namespace: str, selector: str, notify: Callable[[str], None]
    ) -> None:
        self.copies, self.ready = copies, asyncio.Event()
        self._api, self._namespace, self._selector, self._notify = api, namespace, selector, notify

    async def run(self) -> None:
        """List and watch until cancelled; what fails is tried again, each time later."""
        seconds = _FIRST_SECONDS
        while True:
            try:
                version = await self._list()
                seconds = _FIRST_SECONDS
                await self._follow(version)
            except ApiError as error:
                if not error.gone:
                    log_event("operator", "warning", watch=self.copies.kind, text=str(error))
                    await asyncio.sleep(seconds)
                    seconds = min(seconds * 2, _MOST_SECONDS)

    async def _list(self) -> str:
        found = await self._api.list(self.copies.kind, self._namespace, labelSelector=self._selector)
        for changed in self.copies.replace(found.items, found.version):
            self._tell(changed)
        self.ready.set()
        return found.version

    async def _follow(self, version: str) -> None:
        """Watch from a version; when the server ends a watch go on from where it was."""
        while True:
            try:
                async for change, found in self._api.watch(
                    self.copies.kind, self._namespace, version, labelSelector=self._selector
                ):
                    version = found["metadata"]["resourceVersion"]
                    self._take(change, found)
            except ApiError as error:
                if error.status:
                    raise
                await asyncio.sleep(_FIRST_SECONDS)  # a connection that broke

    def _take(self, change: str, found: Object) -> None:
        if change == "DELETED":
            self.copies.drop(found)
        elif change == "BOOKMARK" or not self.copies.put(found):
            return
        self._tell(found)

    def _tell(self, changed: Object) -> None:
        if owner := self.copies.owner_of(changed):
            self._notify(owner)

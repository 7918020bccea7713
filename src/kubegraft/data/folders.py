"""Walking a tree of files that may hold anything: links that lead back, pipes, names that are not UTF-8."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SYSTEM_NAMES: Final = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "__pycache__"}
)


@dataclass(frozen=True, slots=True)
class FoundFile:
    """One file of the source.

    Attributes:
        location: Where to open it.
        path: Path below the root for people, valid UTF-8, `/` between folders.
        label: Class that its folder names, or None outside class folders.
        split: Split that its folder names, or None where ingest carves the splits.
        size: Bytes.
        modified: Time of the last change, nanoseconds since 1970.
        reason: Why it can't be an image of the dataset, or "" if it must be decoded to know.
        detail: More about the reason.
    """

    location: str
    path: str
    label: str | None
    split: str | None
    size: int = 0
    modified: int = 0
    reason: str = ""
    detail: str = ""


def shown(name: str) -> str:
    r"""Return a file name as valid UTF-8; bytes that are not UTF-8 show as `\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_system_name(name: str) -> bool:
    """Return whether a file or folder belongs to an operating system or tool: dotfiles, Thumbs.db, ..."""
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


def child_folders(folder: Path, ancestors: tuple[Path, ...] = ()) -> list[Path]:
    """Return the folders in `folder`, sorted, without system folders and links to a folder that it lies in.

    Args:
        folder: Directory to read.
        ancestors: Folders that lead to it by way of a link, which it need not lie in itself.
    """
    back = {identity for above in (folder, *ancestors) for identity in _lineage(above)}
    found = []
    for path in sorted(folder.iterdir()):
        try:
            status = path.stat()
        except OSError:  # a broken link is no folder; `walk` reports it
            continue
        if stat.S_ISDIR(status.st_mode) and not is_system_name(path.name) and _identity(status) not in back:
            found.append(path)
    return found


def walk(root: Path, class_folders: Mapping[Path, tuple[str | None, str]]) -> Iterator[FoundFile]:
    """Yield every file below `root`, once for each class that it is in.

    Args:
        root: Directory to read.
        class_folders: Folder -> (split, class name) of everything in it.
    """
    lineage = _lineage(root)  # a link may lead above the root too, and from there to everything beside it
    yield from _walk(_Folder(str(root), "", None, None, False, lineage, {lineage[0]}), class_folders)


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder while it is read: `ancestors` end a loop of links, `seen` holds the folders of one class."""

    location: str
    path: str
    label: str | None
    split: str | None
    is_system: bool
    ancestors: tuple[tuple[int, int], ...]
    seen: set[tuple[int, int]]


def _walk(folder: _Folder, class_folders: Mapping[Path, tuple[str | None, str]]) -> Iterator[FoundFile]:
    try:
        names = sorted(os.listdir(folder.location))  # noqa: PTH208 - fast; see below
    except OSError as error:
        yield FoundFile(
            folder.location, folder.path, folder.label, folder.split, reason="unreadable", detail=str(error)
        )
        return
    for name in names:
        # Millions of files: a Path for each would take most of the time.
        location = os.path.join(folder.location, name)  # noqa: PTH118
        path = f"{folder.path}/{shown(name)}" if folder.path else shown(name)
        is_system = folder.is_system or is_system_name(name)
        try:
            # Nothing of a system folder is used, so its links are not followed either.
            status = os.stat(location, follow_symlinks=not is_system)  # noqa: PTH116
        except OSError as error:
            yield _unreachable(folder, location, path, error)
            continue
        if not stat.S_ISDIR(status.st_mode):
            yield _file(folder, location, path, status, is_system)
            continue
        identity = _identity(status)
        split, label = class_folders.get(Path(location), (folder.split, folder.label))
        seen = set() if Path(location) in class_folders else folder.seen
        if identity in folder.ancestors:
            detail = "a link to a folder that it lies in"
            yield FoundFile(location, path, label, split, reason="symlink_loop", detail=detail)
        elif identity in seen:
            detail = "the same folder is in this class under another name"
            yield FoundFile(location, path, label, split, reason="repeated_folder", detail=detail)
        else:
            seen.add(identity)
            ancestors = (*folder.ancestors, identity)
            yield from _walk(_Folder(location, path, label, split, is_system, ancestors, seen), class_folders)


def _unreachable(folder: _Folder, location: str, path: str, error: OSError) -> FoundFile:
    reason = {errno.ELOOP: "symlink_loop", errno.ENOENT: "broken_link"}.get(error.errno or 0, "unreadable")
    detail = os.strerror(error.errno) if error.errno else str(error)
    return FoundFile(location, path, folder.label, folder.split, reason=reason, detail=detail)


def _file(folder: _Folder, location: str, path: str, status: os.stat_result, is_system: bool) -> FoundFile:
    reason = detail = ""
    if is_system:
        reason, detail = "system_file", "hidden, or made by an operating system"
    elif not stat.S_ISREG(status.st_mode):
        reason, detail = "not_a_file", "a pipe, socket or device"
    elif folder.label is None:
        reason, detail = "outside_classes", "not in the folder of any class"
    return FoundFile(
        location, path, folder.label, folder.split, status.st_size, status.st_mtime_ns, reason, detail
    )


def _lineage(folder: Path) -> tuple[tuple[int, int], ...]:
    """Return the identity of a folder and of every folder that it lies in."""
    resolved = folder.resolve()
    return tuple(_identity(above.stat()) for above in (resolved, *resolved.parents))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino

"""Which files a source has, and which class and split each one's folder names.

Two layouts are accepted (`LAYOUTS`). Nothing is decoded here; every file is found exactly once, so that
accepted and quarantined files add up to what is in the tree.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kubegraft.data.folders import FoundFile, child_folders, is_system_name, shown, walk
from kubegraft.errors import DataError, suggestion

LAYOUTS: Final = (
    "Accepted are train/<class>/*.jpg, with validation/<class>/ and test/<class>/ where you have them, "
    "or one folder that holds a folder of images for each of two or more classes."
)
_SPLIT_FOLDERS: Final = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
    "testing": "test",
}
_MOST_NAMES_SHOWN: Final = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """What the folders of a source say.

    Attributes:
        classes: Class names in order of code points, so that it is the same in every locale.
        given: Splits that have their own folder of classes; empty for one folder of classes.
        files: Every file of the tree, in order of path.
        warnings: What a user should know about the folders.
    """

    classes: tuple[str, ...]
    given: frozenset[str]
    files: tuple[FoundFile, ...]
    warnings: tuple[str, ...]


def read_layout(root: str | os.PathLike[str], *, strip_top_folder: bool = False) -> Layout:
    """Return the classes, given splits and files of a source directory.

    Symbolic links are followed, except those that lead back into a folder that is being read.

    Args:
        root: Directory to read.
        strip_top_folder: Whether a single folder at the top, as archives have it, is looked through.

    Raises:
        DataError: If the folders fit neither layout, or validation or test has a class that train lacks.
    """
    root = Path(root)
    top = _top_folder(root) if strip_top_folder else root
    split_folders = _split_folders(top)
    parents: dict[str | None, Path] = {None: top} if not split_folders else dict(split_folders.items())
    class_folders = {
        folder: (split, _class_name(folder.name))
        for split, parent in parents.items()
        for folder in child_folders(parent, ancestors=(root, top))
    }
    classes = sorted({name for split, name in class_folders.values() if split in (None, "train")})
    _require_two_classes(top, classes)
    _require_classes_of_train(class_folders, classes)
    files = sorted(walk(root, class_folders), key=lambda file: (file.path, file.location))
    given = frozenset(split for split, _ in class_folders.values() if split is not None)
    return Layout(
        classes=tuple(classes),
        given=given,
        files=tuple(files),
        warnings=tuple(_warnings(class_folders, classes, given, files)),
    )


def _class_name(folder_name: str) -> str:
    """Return a folder's name as a class name: macOS and Linux spell an umlaut by different code points."""
    return unicodedata.normalize("NFC", shown(folder_name))


def _top_folder(root: Path) -> Path:
    entries = [entry for entry in root.iterdir() if not is_system_name(entry.name)]
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else root


def _split_folders(top: Path) -> dict[str, Path]:
    """Return the folder of each given split; {} where `top` is a folder of classes."""
    folders = child_folders(top)
    by_split: dict[str, list[Path]] = {}
    for folder in folders:
        if split := _SPLIT_FOLDERS.get(folder.name.casefold()):
            by_split.setdefault(split, []).append(folder)
    # "train" may well be a class, beside "car" and "plane": a split's folder holds folders of classes.
    has_classes = any(child_folders(folder) for folder in by_split.get("train", ()))
    if not has_classes and (not by_split or len(folders) > sum(map(len, by_split.values()))):
        return {}
    if not has_classes:
        raise _no_layout(top, "No train folder with a folder for each class is among them.")
    for split, named in by_split.items():
        if len(named) > 1:
            names = " and ".join(folder.name for folder in named)
            raise _no_layout(top, f"Both {names} would be the {split} split; keep one.")
    return {split: named[0] for split, named in by_split.items()}


def _require_two_classes(top: Path, classes: list[str]) -> None:
    if len(classes) >= 2:
        return
    hint = f"It has {len(classes)} class folder{'' if len(classes) == 1 else 's'}; a classifier needs two."
    deeper = [folder for folder in child_folders(top) if child_folders(folder)]
    if deeper and not _SPLIT_FOLDERS.get(deeper[0].name.casefold()):
        hint += f" Did you mean {shown(str(deeper[0]))!r}?"
    raise _no_layout(top, hint)


def _no_layout(top: Path, hint: str) -> DataError:
    folders = sorted(shown(folder.name) for folder in child_folders(top))
    num_files = sum(1 for entry in top.iterdir() if not entry.is_dir())
    listed = ", ".join(folders[:_MOST_NAMES_SHOWN]) + (", ..." if len(folders) > _MOST_NAMES_SHOWN else "")
    found = f"{len(folders)} folder{'' if len(folders) == 1 else 's'}{f' ({listed})' if folders else ''}"
    return DataError(
        f"`source` must hold images in folders named by class. Received: {shown(str(top))!r} with {found} "
        f"and {num_files} file{'' if num_files == 1 else 's'} directly in it. {hint} {LAYOUTS}"
    )


def _require_classes_of_train(
    class_folders: Mapping[Path, tuple[str | None, str]], classes: list[str]
) -> None:
    for folder, (split, name) in class_folders.items():
        if name not in classes:
            raise DataError(
                f"`{split}` must have no class that train lacks. Received: {shown(str(folder))!r}, but train "
                f"has only {', '.join(map(repr, classes[:_MOST_NAMES_SHOWN]))}"
                f"{', ...' if len(classes) > _MOST_NAMES_SHOWN else ''}.{suggestion(name, classes)} "
                "Rename or remove the folder, or add training images of the class."
            )


def _warnings(
    class_folders: Mapping[Path, tuple[str | None, str]],
    classes: list[str],
    given: frozenset[str],
    files: list[FoundFile],
) -> Iterator[str]:
    for split in sorted(given - {"train"}):
        missing = sorted(set(classes) - {name for other, name in class_folders.values() if other == split})
        if missing:
            yield (
                f"The {split} folder lacks {_listed(missing)}, so the {split} metrics say nothing about "
                f"{'it. Add images of it' if len(missing) == 1 else 'them. Add images of each'}."
            )
    outside = Counter(file.path.rpartition("/")[0] for file in files if file.reason == "outside_classes")
    for folder, number in sorted(outside.items()):
        if folder:
            yield (
                f"{number} file{'' if number == 1 else 's'} directly in {folder!r} can't be used, because no "
                "folder says their class. Move them into class folders, or remove them."
            )


def _listed(names: list[str]) -> str:
    listed = ", ".join(map(repr, names[:_MOST_NAMES_SHOWN]))
    more = len(names) - _MOST_NAMES_SHOWN
    return f"class{'' if len(names) == 1 else 'es'} {listed}" + (f" and {more} more" if more > 0 else "")

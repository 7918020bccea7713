"""Which split each accepted image goes to, and what is odd about the images as a whole.

A carved split is a pure function of the seed and of the images' bytes: neither names nor the order of
folders matter, and an image stays in its split when others are added to a different class.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kubegraft.data.folders import FoundFile
from kubegraft.data.inspection import Inspection
from kubegraft.data.manifest import SPLITS
from kubegraft.errors import DataError

_MOST_EXAMPLES: Final = 3


@dataclass(frozen=True, slots=True)
class AcceptedImage:
    """An image that will be in the dataset, and its split once that is known."""

    file: FoundFile
    verdict: Inspection
    split: str

    @property
    def label(self) -> str:
        """Class name."""
        return self.file.label or ""


def assign_splits(
    images: Sequence[tuple[FoundFile, Inspection]],
    *,
    given: Collection[str],
    fractions: Mapping[str, float],
    seed: int,
) -> list[AcceptedImage]:
    """Return the images with their splits, in the order of (split, class, sha256).

    Args:
        images: Every accepted image; its file says the split where folders give it.
        given: Splits that folders give; every other is carved from train, class by class.
        fractions: Fraction of each class to carve, by split.
        seed: Seed of the carving.
    """
    by_class: dict[str, list[tuple[FoundFile, Inspection]]] = defaultdict(list)
    assigned = []
    for file, verdict in images:
        if file.split in (None, "train"):
            by_class[file.label or ""].append((file, verdict))
        else:
            assigned.append(AcceptedImage(file, verdict, file.split or ""))
    carved = {split: fraction for split, fraction in fractions.items() if split not in given}
    for members in by_class.values():
        split_of = carve((verdict.sha256 for _, verdict in members), carved, seed)
        assigned += [AcceptedImage(file, verdict, split_of[verdict.sha256]) for file, verdict in members]
    assigned.sort(
        key=lambda image: (SPLITS.index(image.split), image.label, image.verdict.sha256, image.file.path)
    )
    return assigned


def carve(digests: Iterable[str], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """Return the split of each of a class's images, by sha256; equal images are one and stay together.

    Counts are exact: fractions of the number of different images, rounded. Train keeps at least one, and
    from three images on every split gets at least one.

    Args:
        digests: sha256 of each image, 64 hex digits.
        fractions: Fraction to carve, in (0, 1), by split; what is left is train.
        seed: Decides, with the bytes of an image, its place in the order that is cut.
    """
    ordered = sorted(
        set(digests), key=lambda digest: (hashlib.sha256(f"{seed} {digest}".encode()).digest(), digest)
    )
    num_left = len(ordered)
    split_of = {}
    for split, count in _counts(num_left, fractions).items():
        for digest in ordered[num_left - count : num_left]:
            split_of[digest] = split
        num_left -= count
    return split_of | dict.fromkeys(ordered[:num_left], "train")


def _counts(num_images: int, fractions: Mapping[str, float]) -> dict[str, int]:
    least = 1 if num_images >= 3 else 0
    counts = {split: max(least, math.floor(num_images * f + 0.5)) for split, f in fractions.items()}
    while counts and sum(counts.values()) >= max(num_images, 1):  # rounding up left train none
        largest = max(counts, key=lambda split: counts[split])
        if counts[largest] == 0:
            break
        counts[largest] -= 1
    return counts


def require_usable(images: Sequence[AcceptedImage], classes: Sequence[str], given: Collection[str]) -> None:
    """Check that every class can be trained on, and that every split has an image.

    Raises:
        DataError: If not.
    """
    trained = {image.label for image in images if image.split == "train"}
    empty = [name for name in classes if name not in trained]
    if empty:
        raise DataError(
            f"Every class must have an image to train on. Received: none that can be used for "
            f"{', '.join(map(repr, empty[:10]))}{', ...' if len(empty) > 10 else ''}. Add images of "
            f"{'it' if len(empty) == 1 else 'them'}, or remove the folder{'' if len(empty) == 1 else 's'}."
        )
    for split in SPLITS[1:]:
        if any(image.split == split for image in images):
            continue
        how = (
            f"None in the {split} folder can be used; repair it, or remove it to carve the split from train"
            if split in given
            else "No class has enough different images to spare one; add images, three or more to a class"
        )
        raise DataError(f"The `{split}` split must have an image. Received: 0 images. {how}.")


def split_warnings(images: Sequence[AcceptedImage], classes: Sequence[str]) -> Iterator[str]:
    """Yield what a user should know about the images: tiny classes, the same image twice."""
    counts = Counter((image.split, image.label) for image in images)
    for name in classes:
        if counts["train", name] == 1:
            yield f"Class {name!r} has a single training image, too few to learn from. Add more."
    for split in SPLITS[1:]:
        absent = [name for name in classes if not counts[split, name]]
        if absent:
            yield (
                f"The {split} split has no image of {', '.join(map(repr, absent[:8]))}"
                f"{f' and {len(absent) - 8} more' if len(absent) > 8 else ''}, so its metrics leave "
                f"{'it' if len(absent) == 1 else 'them'} out. Add images."
            )
    by_digest: dict[str, list[AcceptedImage]] = defaultdict(list)
    for image in images:
        by_digest[image.verdict.sha256].append(image)
    repeated = [same for same in by_digest.values() if len(same) > 1]
    leaked = [same for same in repeated if len({image.split for image in same}) > 1]
    if leaked:
        yield (
            f"{_number(leaked)} in more than one split, so what is measured on the later one is too good: "
            f"{_examples(leaked)}. Keep each in one."
        )
    conflicting = [same for same in repeated if len({image.label for image in same}) > 1]
    if conflicting:
        yield (
            f"{_number(conflicting)} in more than one class, so one of its labels is wrong: "
            f"{_examples(conflicting)}. Keep it in one class."
        )
    copies = sum(len(same) - 1 for same in repeated)
    if copies and len(repeated) > max(len(leaked), len(conflicting)):
        yield f"{copies} file{' is a copy' if copies == 1 else 's are copies'} of another, byte for byte."


def _number(groups: list[list[AcceptedImage]]) -> str:
    return "1 image is" if len(groups) == 1 else f"{len(groups)} images are"


def _examples(groups: list[list[AcceptedImage]]) -> str:
    ordered = sorted(groups, key=lambda same: same[0].file.path)[:_MOST_EXAMPLES]
    shown = ("{" + ", ".join(repr(image.file.path) for image in same[:4]) + "}" for same in ordered)
    return ", ".join(shown) + (", ..." if len(groups) > _MOST_EXAMPLES else "")

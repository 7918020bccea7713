"""The images of a benchmark: a test part that nobody chooses by, and 1 % that come later."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"}
SPLITS = ("train", "validation", "test")
VALIDATION_FRACTION = 0.2


@dataclass(frozen=True, slots=True)
class Image:
    """One file; `split` is "" where the folder has no splits."""

    split: str
    label: str
    path: Path

    @property
    def number(self) -> tuple[int, str, str]:
        """What a camera counted; a file without a number comes by its name, after those that have one."""
        digits = re.findall(r"\d+", self.path.stem)
        return (int(digits[-1]) if digits else 2**62, self.path.stem, self.label)


def find_images(root: Path) -> list[Image]:
    """Return the images of a folder of class folders, or of `train/` and `validation/` of them, by number."""
    splits = [name for name in SPLITS if (root / name).is_dir()]
    found = [
        Image(split, folder.name, path)
        for split in splits or [""]
        for folder in sorted((root / split).iterdir())
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise click.UsageError(f"{root} must hold <class>/*.jpg, or train/<class>/*.jpg. No image was found.")
    return sorted(found, key=lambda image: image.number)


def test_window(images: Sequence[Image], fraction: float, seed: int) -> tuple[int, int]:
    """Return where the test part begins and ends in images that are sorted by number.

    Photographs with neighbouring numbers are of one session: the same hand, clothes and room, in all classes. So
    the test part is a stretch of numbers. Seed 0 takes the last, seed 1 the one before it, and so on, round and
    round; the ends are moved to where the classes begin anew, if they do so nearby, so that no session is cut.
    """
    length = round(fraction * len(images))
    num_windows = max(1, len(images) // max(length, 1))
    end = len(images) - (seed % num_windows) * length
    return _session_start(images, end - length), _session_start(images, end)


def _session_start(images: Sequence[Image], wanted: int) -> int:
    if wanted <= 0 or wanted >= len(images):
        return max(0, min(wanted, len(images)))
    near = range(max(1, wanted - 10), min(len(images) - 1, wanted + 10) + 1)
    starts = [index for index in near if images[index].label < images[index - 1].label]
    return min(starts, key=lambda index: abs(index - wanted), default=wanted)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Folders for one seed, in the layout that both Keras and kubegraft read.

    `base` is for everybody; `grown` has the 1 % of the training images that `base` lacks.
    """

    base: Path
    grown: Path
    counts: dict[str, int]
    num_new: int


def prepare(source: Path, target: Path, *, test_fraction: float, seed: int) -> Prepared:
    """Copy images into the folders of one seed."""
    chosen = assign(find_images(source), test_fraction, seed)
    train = [image for image in chosen if image.split == "train"]
    new = set(random.Random(seed).sample(train, max(1, round(len(train) / 100))))
    for name, images in (("base", [each for each in chosen if each not in new]), ("grown", chosen)):
        for image in images:
            folder = target / name / image.split / image.label
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image.path, _free(folder / image.path.name))
    counts = {split: sum(image.split == split for image in chosen) for split in SPLITS}
    return Prepared(
        target / "base", target / "grown", {**counts, "train": counts["train"] - len(new)}, len(new)
    )


def _free(path: Path) -> Path:
    """Return a path that is not taken: two splits may have files of one name."""
    while path.exists():
        path = path.with_stem(f"{path.stem}_again")
    return path


def assign(images: Sequence[Image], test_fraction: float, seed: int) -> list[Image]:
    """Return images that each have a split; a test folder that is there is kept."""
    if any(image.split == "test" for image in images):
        kept = list(images)
    else:
        start, end = test_window(images, test_fraction, seed)
        kept = [
            Image("test", image.label, image.path) if start <= index < end else image
            for index, image in enumerate(images)
        ]
    chance = random.Random(f"validation {seed}")
    # The test part may have taken all of it.
    has_validation = any(image.split == "validation" for image in kept)
    return [
        image
        if image.split in ("validation", "test") or (image.split and has_validation)
        else Image(
            "validation" if chance.random() < VALIDATION_FRACTION else "train", image.label, image.path
        )
        for image in kept
    ]


def draw(target: Path, num_images: int, *, num_classes: int = 10, side: int = 224) -> None:
    """Write JPEGs of coloured noise, nine tenths to learn from; for throughput, they teach nothing."""
    import numpy as np
    from PIL import Image as Picture

    chance = np.random.default_rng(0)
    # One image of each class more, to test: without any, kubegraft would take some of the others.
    for number in range(num_images + num_classes):
        label = number % num_classes
        split = (
            "test" if number >= num_images else "validation" if number // num_classes % 10 == 9 else "train"
        )
        folder = target / split / f"class_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = chance.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        coarse[..., label % 3] //= 2
        Picture.fromarray(coarse).resize((side, side)).save(folder / f"{number:05}.jpg", quality=90)

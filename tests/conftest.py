"""What several test modules share: folders of tiny images, drawn at session start."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True, scope="session")
def _user_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what tests cache for later runs away from this user's own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("user-cache"))
    os.environ["KUBEGRAFT_CACHE"] = "none"  # a test that wants one says so


@pytest.fixture(autouse=True, scope="session")
def _modules_are_no_garbage() -> None:
    """Keep collections away from what all test files have imported by now: they took a twentieth of the time."""
    gc.collect()
    gc.freeze()


COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (40, 200, 200)]


def draw_image(class_number: int, number: int, size: int) -> Image.Image:
    """A noisy square in the colour of its class, at a place that depends on `number`."""
    random = np.random.default_rng([class_number, number, size])
    pixels = random.integers(0, 80, (size, size, 3), dtype=np.uint8)
    top, left = random.integers(0, size // 2, 2)
    pixels[top : top + size // 2, left : left + size // 2] = COLOURS[class_number]
    return Image.fromarray(pixels)


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that draws a folder of class folders, or of splits of them."""

    def draw(
        classes: int = 3,
        per_class: int = 8,
        size: int = 32,
        splits: tuple[str, ...] = (),
        name: str = "images",
    ) -> Path:
        root = tmp_path / name
        for split_number, split in enumerate(splits or ("",)):
            for class_number in range(classes):
                folder = root / split / f"class_{class_number}"
                folder.mkdir(parents=True)
                for number in range(per_class):
                    image = draw_image(class_number, 1000 * split_number + number, size)
                    image.save(folder / f"{number}.png")
        return root

    return draw

"""Datasets that need no download, written as the folders that a user would have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from kubegraft.errors import ConfigError, EnvironmentFault, suggestion


def write_sample(name: str, directory: Path) -> None:
    """Write a sample as class folders of images into `directory`, which is made if need be.

    Args:
        name: One of `SAMPLES`.
        directory: Where the class folders go.

    Raises:
        ConfigError: If there is no such sample.
        EnvironmentFault: If the package that holds its data is not installed.
    """
    if name not in SAMPLES:
        raise ConfigError(
            f"`source` names a sample that does not exist. Received: sample://{name}. Known are "
            f"{', '.join(f'sample://{known}' for known in SAMPLES)}.{suggestion(name, SAMPLES)}"
        )
    SAMPLES[name](directory)


def _write_digits(directory: Path) -> None:
    """Write 1,797 grey 8 x 8 scans of handwritten digits, the test set of UCI's optdigits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise EnvironmentFault(
            "sample://digits is part of scikit-learn, which is not installed. Received: "
            f"{error}. Install kubegraft[train]."
        ) from error
    from PIL import Image

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = directory / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = (pixels * (255 / 16)).round().astype("uint8")  # 0 to 16 in the data
        Image.fromarray(grey).save(folder / f"{number:04d}.png")


SAMPLES: Final[Mapping[str, Callable[[Path], None]]] = {"digits": _write_digits}

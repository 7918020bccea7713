"""`kubegraft bundle create`: all that a site without internet needs, into one directory, part by part."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kubegraft import __version__
from kubegraft.bundling.images import check_images, collect_image, find_container_tool
from kubegraft.bundling.index import (
    INDEX_FILE,
    SUMS_FILE,
    UNFINISHED_FILE,
    Bundle,
    BundledFile,
    read_bundle,
    write_sums,
)
from kubegraft.bundling.weights import WEIGHTS_DIR, collect_weights
from kubegraft.bundling.wheels import HASHED_PYTHON, REQUIREMENTS_FILE, WheelSet, collect_wheels
from kubegraft.errors import ConfigError, EnvironmentFault, StorageError
from kubegraft.local_run import find_checkout, packaged_pipeline
from kubegraft.modeling.backbones import get_backbone
from kubegraft.reporting.events import log_event

TARGETS: Final = ("cpu", "gpu")
_KINDS: Final = {
    "wheels": "wheel",
    "images": "image",
    WEIGHTS_DIR: "weights",
    "pipelines": "pipeline",
    "manifests": "manifest",
}
_READ_ME: Final = "README.txt"
_TEXT: Final = """\
kubegraft {version} for a site without internet ({target}).

1. Check that everything has arrived:    sha256sum --check --quiet SHA256SUMS
2. Install it (Linux x86-64{python}):
     python3 -m venv venv
     venv/bin/python -m pip install --no-index --find-links wheels --no-deps --require-hashes -r wheels/requirements.txt
3. Load the images and weights:          venv/bin/kubegraft bundle load . --registry registry.example/team

docs/clusters.md, "Air-gapped", says more. bundle.json lists every file.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleRequest:
    """What goes into a bundle.

    Attributes:
        backbones: Names of backbones whose ImageNet weights are wanted.
        images: Images by name and tag; empty takes the pipeline's image and the model server's.
        target: `cpu` or `gpu`: which TensorFlow wheels and image have.
        python: Version of Python on the other side.
        with_images: Whether images are wanted at all.
        with_wheels: Whether Python packages are wanted.
        container_tool: Program that saves images; "" takes the first that is installed.
    """

    backbones: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    target: str = "cpu"
    python: str = HASHED_PYTHON
    with_images: bool = True
    with_wheels: bool = True
    container_tool: str = ""

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            ConfigError: If one breaks its rule, or two contradict each other.
        """
        for name in self.backbones:
            get_backbone(name)
        if self.images and not self.with_images:
            raise ConfigError(
                f"`image` and `no_images` exclude each other. Received: image={self.images!r}. Give one of the two."
            )
        check_images(self.wanted_images())

    def wanted_images(self) -> tuple[str, ...]:
        """Return the names of the images, none where none are wanted."""
        from kubegraft.kfp_client.package import released_image
        from kubegraft.rendering.serving import SERVING_IMAGE

        if not self.with_images:
            return ()
        if self.images:
            return self.images
        named = os.environ.get("KUBEGRAFT_TRAIN_IMAGE", "")
        task = released_image(image=named, registry="" if named else os.environ.get("KUBEGRAFT_REGISTRY", ""))
        if self.target == "gpu":
            task = task.replace("/kubegraft-train:", "/kubegraft-train-gpu:")
        return task, SERVING_IMAGE


def create_bundle(directory: str | os.PathLike[str], request: BundleRequest) -> Bundle:
    """Write a bundle, or complete or update the one that is there, and return what it holds.

    Until all of it is there its index has another name, so that it can't be loaded. A file that is there and has
    the right digest is not fetched again.

    Args:
        directory: Where to; it must not exist, be empty, or hold a bundle.
        request: What goes into it.

    Raises:
        ConfigError: If the directory holds something else.
        EnvironmentFault: If the container tool or the source checkout is missing.
        StorageError: If something can't be fetched.
    """
    directory = Path(directory).absolute()
    checkout = find_checkout()
    wheel_set = _wheel_set(request, checkout) if request.with_wheels else None
    images = request.wanted_images()
    tool = find_container_tool(request.container_tool) if images else None
    earlier = _opened(directory)
    bundle = Bundle(target=request.target)

    backbones = [get_backbone(name) for name in dict.fromkeys(request.backbones)]
    packaged = tuple(each.name for each in backbones if each.imagenet is None)
    bundle = dataclasses.replace(
        bundle, packaged_backbones=packaged, weights=collect_weights(backbones, directory)
    )
    _documents(directory, checkout)
    if wheel_set is not None:
        if _removed_faulty(directory, earlier, "wheels/") or earlier.wheels_key != wheel_set.key:
            collect_wheels(wheel_set, directory / "wheels")
        bundle = dataclasses.replace(bundle, python=request.python, wheels_key=wheel_set.key)
        _remember(directory, bundle, earlier)
    for image in images:
        if tool is not None:
            added = collect_image(tool, image, directory, earlier)
            bundle = dataclasses.replace(bundle, images=(*bundle.images, added))
            _remember(directory, bundle, earlier)
    return _finished(directory, bundle)


def _wheel_set(request: BundleRequest, checkout: Path | None) -> WheelSet:
    if checkout is None:
        raise EnvironmentFault(
            "Wheels are collected from a source checkout, which has the list of packages with their hashes. Received: "
            "an installed kubegraft. Run this in a clone (`make setup`), or say --no-wheels."
        )
    return WheelSet(checkout, request.target, request.python)


def _opened(directory: Path) -> Bundle:
    """Make the directory if need be, and return what it held; from here on it is unfinished."""
    finished, unfinished = directory / INDEX_FILE, directory / UNFINISHED_FILE
    if directory.exists() and not directory.is_dir():
        raise ConfigError(
            f"`directory` must be a directory. Received: {str(directory)!r}, a file. Choose another."
        )
    if not finished.exists() and not unfinished.exists():
        for path in directory.iterdir() if directory.exists() else ():
            raise ConfigError(
                "`directory` must not exist, be empty, or hold a bundle. Received: "
                f"directory={str(directory)!r}, which holds {path.name!r}. Choose another one."
            )
        directory.mkdir(parents=True, exist_ok=True)
        Bundle().write(unfinished)
    elif finished.exists():
        finished.replace(unfinished)
        (directory / SUMS_FILE).unlink(missing_ok=True)
    try:
        return read_bundle(directory, UNFINISHED_FILE)
    except StorageError as error:  # by another version: everything is compared anew
        log_event("bundle", "starting over", reason=str(error))
        return Bundle()


def _documents(directory: Path, checkout: Path | None) -> None:
    """Copy the compiled pipelines, and manifests and documents where there is a checkout."""
    if checkout is None:
        with _replaced(directory / "pipelines") as aside:
            shutil.copy(packaged_pipeline(), aside)
        log_event("bundle", "left out", what="manifests, docs", reason="only a source checkout has them")
        return
    with _replaced(directory / "pipelines") as aside:
        for path in (checkout / "pipelines" / "compiled").glob("*.yaml"):
            shutil.copy(path, aside)
    for name in ("manifests", "docs"):
        with _replaced(directory / name) as aside:
            shutil.copytree(checkout / name, aside, dirs_exist_ok=True)


@contextlib.contextmanager
def _replaced(directory: Path) -> Iterator[Path]:
    """Give an empty directory that takes the place of `directory` at the end."""
    aside = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    yield aside
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)


def _remember(directory: Path, bundle: Bundle, earlier: Bundle) -> None:
    """Write down what has been collected, so that an interrupted call continues behind it."""
    collected = {image.path for image in bundle.images}
    images = (*bundle.images, *(image for image in earlier.images if image.path not in collected))
    bundle = dataclasses.replace(bundle, images=images)
    dataclasses.replace(bundle, files=tuple(_described(directory, bundle))).write(directory / UNFINISHED_FILE)


def _removed_faulty(directory: Path, bundle: Bundle, prefix: str) -> bool:
    """Remove files that are not what the bundle says, and return whether anything is missing or was removed."""
    files = [file for file in bundle.files if file.path.startswith(prefix)]
    faulty = [file for file in files if file.fault(directory)]
    for file in faulty:
        (directory / file.path).unlink(missing_ok=True)
    return not files or bool(faulty)


def _finished(directory: Path, bundle: Bundle) -> Bundle:
    for leftover in directory.glob("*.partial"):
        shutil.rmtree(leftover)
    python = f", Python {bundle.python}" if bundle.python else ""
    text = _TEXT.format(version=__version__, target=bundle.target, python=python)
    (directory / _READ_ME).write_text(text, encoding="utf-8")
    bundle = dataclasses.replace(bundle, files=tuple(_described(directory, bundle, clean=True)))
    bundle.write(directory / UNFINISHED_FILE)
    (directory / UNFINISHED_FILE).replace(directory / INDEX_FILE)
    write_sums(directory, bundle.files)
    return bundle


def _described(directory: Path, bundle: Bundle, *, clean: bool = False) -> Iterator[BundledFile]:
    """Yield every file that belongs to the bundle; with `clean`, remove what an earlier one left."""
    listed = {weights.path for weights in bundle.weights} | {image.path for image in bundle.images}
    for path in sorted(_files(directory)):
        top, _, rest = path.relative_to(directory).as_posix().partition("/")
        belongs = (
            f"{top}/{rest}" in listed if top in ("images", WEIGHTS_DIR) else top != "wheels" or bundle.python
        )
        if belongs and not top.endswith(".partial"):
            kind = "requirements" if path.name == REQUIREMENTS_FILE else _KINDS.get(top, "text")
            yield BundledFile.of(directory, path, kind)
        elif clean:
            path.unlink()


def _files(directory: Path) -> Iterable[Path]:
    own = {INDEX_FILE, UNFINISHED_FILE, SUMS_FILE}
    return (path for path in directory.rglob("*") if path.is_file() and path.name not in own)

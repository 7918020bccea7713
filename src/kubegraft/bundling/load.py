"""`kubegraft bundle load`: on the other side, after every file has been verified."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kubegraft.bundling.images import check_images, find_container_tool, load_into_kind, short_name
from kubegraft.bundling.index import Bundle, verify_bundle
from kubegraft.bundling.weights import WEIGHTS_DIR
from kubegraft.bundling.wheels import REQUIREMENTS_FILE
from kubegraft.errors import ConfigError
from kubegraft.modeling.backbones import get_backbone
from kubegraft.storage import check_target, is_remote, public_uri, publish_tree

_IMAGE_OF_TASKS: Final = "kubegraft-train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a bundle is loaded to.

    Attributes:
        registry: Registry, with a folder or without, that images are pushed to; "" for none.
        kind_cluster: Name of a kind cluster whose nodes get the images; "" for none.
        weights_uri: Directory, or `gs://` or `s3://` URI of a folder, that weights are copied to; "" for none.
        container_tool: Program that loads and pushes images; "" takes the first that is installed.
    """

    registry: str = ""
    kind_cluster: str = ""
    weights_uri: str = ""
    container_tool: str = ""

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            ConfigError: If the registry is not one, or two places are given for images.
        """
        if self.registry and ("://" in self.registry or any(each.isspace() for each in self.registry)):
            raise ConfigError(
                f"`registry` must be a host, and a path if need be, without a scheme. Received: "
                f"registry={self.registry!r}. For example registry.example/team."
            )
        if self.registry and self.kind_cluster:
            raise ConfigError(
                f"`registry` and `kind` exclude each other. Received: registry={self.registry!r}, "
                f"kind={self.kind_cluster!r}. Give one of the two."
            )

    def name_of(self, image: str) -> str:
        """Return what an image is called there."""
        return f"{self.registry.rstrip('/')}/{short_name(image)}" if self.registry else image


def load_bundle(
    directory: str | os.PathLike[str], destination: Destination, *, dry_run: bool = False
) -> dict[str, Any]:
    """Verify a bundle, load its images and copy its weights; what is there already is left as it is.

    Args:
        directory: The bundle.
        destination: Where to.
        dry_run: Whether to verify and say what would be done, and do no more.

    Returns:
        `bundle`, `kubegraft` (version), `num_files`, `images` (name here -> name there), `weights` (where to, "" for
        nowhere), `dry_run`, and `next`: commands to go on with.

    Raises:
        StorageError: If a file is missing or another one, in which case nothing has been loaded; or a place can't be
            written.
        ConfigError: If there is something else where the weights should go.
        EnvironmentFault: If the container tool is missing.
    """
    directory = Path(directory).absolute()
    bundle = verify_bundle(directory)
    check_images(tuple(image.name for image in bundle.images))
    if destination.weights_uri and not bundle.weights:
        raise ConfigError(
            f"`weights_to` needs a bundle with weights. Received: {directory}, which has none of its own. "
            "Make it with --backbone NAME; those of efficientnet_lite0 are among the wheels."
        )
    if destination.weights_uri:
        check_target(directory / WEIGHTS_DIR, destination.weights_uri)
    if not dry_run:
        _load_images(directory, bundle, destination)
        if destination.weights_uri:
            publish_tree(directory / WEIGHTS_DIR, destination.weights_uri)
    return {
        "bundle": str(directory),
        "kubegraft": bundle.kubegraft,
        "num_files": len(bundle.files),
        "images": {image.name: destination.name_of(image.name) for image in bundle.images},
        "weights": public_uri(destination.weights_uri),
        "dry_run": dry_run,
        "next": list(next_commands(directory, bundle, destination)),
    }


def _load_images(directory: Path, bundle: Bundle, destination: Destination) -> None:
    if destination.kind_cluster:
        for image in bundle.images:
            load_into_kind(directory / image.path, destination.kind_cluster)
        return
    tool = find_container_tool(destination.container_tool) if bundle.images else None
    for image in bundle.images:
        if tool is not None:
            tool.load(directory / image.path)
            if destination.registry:
                tool.push(image.name, destination.name_of(image.name))


def next_commands(directory: Path, bundle: Bundle, destination: Destination) -> Iterator[str]:
    """Yield commands that install and use what the bundle brought."""
    if bundle.python:
        wheels = directory / "wheels"
        yield (
            f"python3 -m pip install --no-index --find-links {wheels} --no-deps --require-hashes "
            f"-r {wheels / REQUIREMENTS_FILE}    # Python {bundle.python}"
        )
    task = next(
        (each.name for each in bundle.images if short_name(each.name).startswith(_IMAGE_OF_TASKS)), ""
    )
    weights = _weights_flags(directory, bundle, destination)
    if task:
        image = destination.name_of(task)
        yield f"kubegraft compile --image {image} --output-dir pipelines"
        yield f"kubegraft render job DATA --image {image}{weights} --output job.yaml"
    if weights and not is_remote(destination.weights_uri):
        yield f"kubegraft run DATA{weights} --output outcome"


def _weights_flags(directory: Path, bundle: Bundle, destination: Destination) -> str:
    for weights in bundle.weights:
        backbone = get_backbone(weights.backbone)
        file = backbone.imagenet.for_size(backbone.native_input_size) if backbone.imagenet else None
        if file is not None and file.cache_path.name == weights.path.rsplit("/", 1)[-1]:
            place = destination.weights_uri.rstrip("/") or str(directory / WEIGHTS_DIR)
            relative = weights.path.partition("/")[2]
            return (
                f" --backbone {backbone.name} --weights {place}/{relative} --weights-sha256 {weights.sha256}"
            )
    return ""

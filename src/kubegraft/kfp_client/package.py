"""The compiled pipeline as it is uploaded: which image it runs in, and the name that its content gives it."""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kubegraft import __version__
from kubegraft.errors import ConfigError
from kubegraft.local_run import find_checkout, load_pipeline, packaged_pipeline

_HASH_DIGITS: Final = 12
_IMAGE_LINE: Final = re.compile(r"^(\s+image: )(\S+)$", re.MULTILINE)
_CACHE_LINE: Final = re.compile(r"^(\s+cachingOptions:)\n\s+enableCache: true$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PipelinePackage:
    """A compiled pipeline.

    Attributes:
        text: YAML documents, as they are uploaded.
    """

    text: str

    @property
    def name(self) -> str:
        """Name that the pipeline carries in its own definition."""
        return str(self._spec()["pipelineInfo"]["name"])

    @property
    def description(self) -> str:
        """Sentence that the pipeline carries in its own definition."""
        return str(self._spec()["pipelineInfo"].get("description", ""))

    @property
    def version_name(self) -> str:
        """Name that no other content has: kubegraft's version and the first digits of the text's SHA-256."""
        return f"{__version__}-{hashlib.sha256(self.text.encode()).hexdigest()[:_HASH_DIGITS]}"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks at the pipeline's root."""
        return tuple(self._spec()["root"]["dag"]["tasks"])

    @property
    def defaults(self) -> dict[str, Any]:
        """Parameter name -> default value; a parameter without one is left out."""
        parameters = self._spec()["root"].get("inputDefinitions", {}).get("parameters", {})
        return {name: p["defaultValue"] for name, p in parameters.items() if "defaultValue" in p}

    def with_image(self, *, image: str = "", registry: str = "") -> PipelinePackage:
        """Return the pipeline with its tasks in another image.

        Args:
            image: Whole name of the image; "" keeps it.
            registry: Registry to take the image of the same name and tag from; "" keeps it.

        Raises:
            ConfigError: If both are given, or the image has no tag or digest of its own.
        """
        if image and registry:
            raise ConfigError(
                "`image` names the registry already. Received: "
                f"image={image!r}, registry={registry!r}. Give one of the two."
            )
        if image:
            check_image(image)

        def renamed(match: re.Match[str]) -> str:
            old = match[2]
            new = image or (f"{registry.rstrip('/')}/{old.rpartition('/')[2]}" if registry else old)
            return match[1] + new

        return PipelinePackage(_IMAGE_LINE.sub(renamed, self.text))

    def without_caching(self) -> PipelinePackage:
        """Return the pipeline with no task ever answered from KFP's cache.

        The client's `enable_caching=False` reaches tasks at the root only, and no uploaded version at all.
        """
        return PipelinePackage(_CACHE_LINE.sub(r"\1 {}", self.text))

    @contextlib.contextmanager
    def as_file(self) -> Any:
        """Yield the path of a temporary file with the text."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "pipeline.yaml")
            path.write_text(self.text, encoding="utf-8")
            yield str(path)

    def _spec(self) -> dict[str, Any]:
        import yaml

        return dict(next(iter(yaml.safe_load_all(self.text))))


def load_package() -> PipelinePackage:
    """Return the pipeline: compiled now from a checkout's source, or as the installed kubegraft carries it.

    Raises:
        EnvironmentFault: If there is neither.
    """
    if find_checkout() is None:
        return PipelinePackage(packaged_pipeline().read_text(encoding="utf-8"))
    return PipelinePackage(_compiled(load_pipeline()))


def released_image(*, image: str = "", registry: str = "") -> str:
    """Return the image of the tasks, as the compiled pipeline names it, or another; see `with_image`.

    Raises:
        ConfigError: If the image has no tag or digest of its own.
        EnvironmentFault: If there is no compiled pipeline.
    """
    checkout = find_checkout()
    compiled = (
        checkout / "pipelines" / "compiled" / "transfer_learning.yaml" if checkout else packaged_pipeline()
    )
    package = PipelinePackage(compiled.read_text(encoding="utf-8")).with_image(image=image, registry=registry)
    match = _IMAGE_LINE.search(package.text)
    return match[2] if match else image


def _compiled(pipeline: Callable[..., Any]) -> str:
    from kfp import compiler

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "pipeline.yaml")
        compiler.Compiler().compile(pipeline, str(path))
        return path.read_text(encoding="utf-8")


def check_image(image: str) -> None:
    """Raise unless an image is named by a tag that can stay what it is.

    Raises:
        ConfigError: If it has no tag or digest, or the tag is `latest`, which makes Kubernetes pull at every
            start and KFP's cache answer for another image.
    """
    name = image.rpartition("/")[2]
    tag = name.partition("@")[2] or name.partition(":")[2]
    if not tag or tag == "latest" or any(character.isspace() for character in image):
        raise ConfigError(
            "`image` must be a name with a tag or digest that never moves. Received: "
            f"image={image!r}. For example registry.example/team/kubegraft-train:{__version__}."
        )

"""Container images as archives: saved with docker, podman or nerdctl, loaded with them or into a kind cluster."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kubegraft.bundling.commands import CommandFailed, run_command
from kubegraft.bundling.index import Bundle, BundledImage
from kubegraft.errors import ConfigError, EnvironmentFault, StorageError
from kubegraft.reporting.events import log_event

IMAGES_DIR: Final = "images"
CONTAINER_TOOLS: Final = ("docker", "podman", "nerdctl")


@dataclass(frozen=True, slots=True)
class ContainerTool:
    """A program with docker's command line.

    Attributes:
        program: Its name or path.
    """

    program: str

    def describe(self, image: str) -> tuple[str, tuple[str, ...]] | None:
        """Return an image's identifier and its names with digests, or None where it isn't on this machine."""
        try:
            text = run_command([self.program, "image", "inspect", image], f"inspect {image}")
        except CommandFailed:
            return None
        try:
            facts: dict[str, Any] = json.loads(text)[0]
            return str(facts["Id"]), tuple(sorted(facts.get("RepoDigests") or ()))
        except (ValueError, LookupError, TypeError) as error:
            raise StorageError(
                f"`{self.program} image inspect` must answer with JSON that has `Id`. Received: {text[:200]!r}. "
                f"Use {' or '.join(CONTAINER_TOOLS)}."
            ) from error

    def pull(self, image: str) -> None:
        """Fetch an image to this machine.

        Raises:
            CommandFailed: If it can't be had.
        """
        log_event("bundle", "pulling", image=image)
        advice = "Build it (`make images`), name another with --image, or leave images out with --no-images."
        run_command([self.program, "pull", image], f"pull {image}", advice=advice)

    def save(self, image: str, path: Path) -> None:
        """Write an image's archive to `path`."""
        log_event("bundle", "saving", image=image)
        run_command([self.program, "save", "--output", str(path), image], f"save {image}")

    def load(self, path: Path) -> None:
        """Put the image of an archive among this machine's."""
        log_event("bundle", "loading", archive=path.name)
        run_command([self.program, "load", "--input", str(path)], f"load {path.name}")

    def push(self, image: str, name: str) -> bool:
        """Push `image` under another `name`; return whether the registry lacked it. A tag never moves."""
        try:
            run_command([self.program, "manifest", "inspect", name], f"look for {name}")
            log_event("bundle", "pushed before", image=name)
            return False
        except CommandFailed:
            log_event("bundle", "pushing", image=name)
        run_command([self.program, "tag", image, name], f"tag {image}")
        advice = f"Sign in with `{self.program} login`, and check that you may push there."
        run_command([self.program, "push", name], f"push {name}", advice=advice)
        return True


def find_container_tool(name: str = "") -> ContainerTool:
    """Return the container tool of this name, or the first that is installed.

    Raises:
        EnvironmentFault: If it is not installed.
    """
    for program in (name,) if name else CONTAINER_TOOLS:
        if shutil.which(program):
            return ContainerTool(program)
    raise EnvironmentFault(
        f"`container_tool` must be installed: {', '.join(CONTAINER_TOOLS)}, or another with docker's command line. "
        f"Received: {name or 'none of them'}. Install one, or leave images out with --no-images."
    )


def load_into_kind(path: Path, cluster: str) -> None:
    """Put the image of an archive on the nodes of a kind cluster."""
    log_event("bundle", "loading", archive=path.name, cluster=cluster)
    run_command(
        ["kind", "load", "image-archive", str(path), "--name", cluster],
        f"load {path.name}",
        advice="`kind get clusters` lists the clusters.",
    )


def collect_image(tool: ContainerTool, image: str, directory: Path, earlier: Bundle) -> BundledImage:
    """Put an image's archive into the bundle `directory`; one that is there and of the same image is kept.

    Args:
        tool: With what.
        image: Name and tag.
        directory: The bundle.
        earlier: What the bundle held before.

    Raises:
        CommandFailed: If the image is neither here nor in its registry.
    """
    if tool.describe(image) is None:
        tool.pull(image)
    facts = tool.describe(image)
    if facts is None:
        raise EnvironmentFault(
            f"`{tool.program}` must know an image that it has pulled. Received: {image}. Try again."
        )
    path = directory / IMAGES_DIR / f"{_file_name(image)}.tar"
    described = BundledImage(image, *facts, path.relative_to(directory).as_posix())
    if described.image_id not in {
        each.image_id for each in earlier.images if each.path == described.path
    } or any(file.fault(directory) for file in earlier.files if file.path == described.path):
        _save(tool, image, path)
    return described


def check_images(images: tuple[str, ...]) -> None:
    """Raise unless all images have tags that never move, and names that stay different in one registry.

    Raises:
        ConfigError: If one has none, or two would have the same name.
    """
    from kubegraft.kfp_client.package import check_image

    seen: dict[str, str] = {}
    for image in images:
        check_image(image)
        if "@" in image:
            raise ConfigError(
                f"`image` must have a tag, by which it is found after loading. Received: image={image!r}. "
                "Give it one with `docker tag`; bundle.json holds the digest."
            )
        other = seen.setdefault(short_name(image), image)
        if other != image:
            raise ConfigError(
                f"`image` must be different in its last part and tag. Received: {other!r} and {image!r}, which would "
                "have one name in a registry. Give one of them another with `docker tag`."
            )


def short_name(image: str) -> str:
    """Return an image's name without its registry and folders, as `compile --registry` names it."""
    return image.rpartition("/")[2]


def _save(tool: ContainerTool, image: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.unlink(missing_ok=True)  # podman does not write over a file
    try:
        tool.save(image, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _file_name(image: str) -> str:
    return short_name(image).replace(":", "-")

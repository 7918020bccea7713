"""Python packages for a machine without a package index: those of the images, each by its pinned version and hash.

As docker/train.Dockerfile does, packages that are published as source only are built with pinned tools, and
kubegraft's own wheel with them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kubegraft.bundling.commands import run_command
from kubegraft.errors import ConfigError, EnvironmentFault
from kubegraft.reporting.events import log_event
from kubegraft.reporting.progress import Progress
from kubegraft.storage import sha256_of

# The Python of the images, for which requirements-*.txt has hashes; others get the same versions unhashed.
HASHED_PYTHON: Final = "3.13"
PYTHONS: Final = ("3.11", "3.12", "3.13")
REQUIREMENTS_FILE: Final = "requirements.txt"
_GLIBC_MINORS: Final = range(41, 4, -1)
_SOURCE_DATE_EPOCH: Final = "1767225600"  # that of docker/train.Dockerfile
_SOURCES: Final = ("pyproject.toml", "README.md", "LICENSE", "pipelines/compiled/*.yaml", "src/**/*")
_SOURCE_SUFFIXES: Final = (".tar.gz", ".zip")
_PIN: Final = re.compile(r"^([\w.-]+)==([\w.!+]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class WheelSet:
    """Which wheels a bundle gets.

    Attributes:
        checkout: Source checkout with `docker/requirements-*.txt`, from which kubegraft's own wheel is built.
        target: `cpu` or `gpu`.
        python: Version of Python on the other side, for example `3.13`.
    """

    checkout: Path
    target: str
    python: str = HASHED_PYTHON

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            ConfigError: If there is no list for this target, or Python is not one of `PYTHONS`.
        """
        if self.python not in PYTHONS:
            raise ConfigError(
                f"`python` must be one of {', '.join(PYTHONS)}. Received: python={self.python!r}. "
                "It is the version on the machine without internet."
            )
        if not self.requirements.is_file():
            raise ConfigError(
                f"`target` must have a list of packages. Received: target={self.target!r}, and there is no "
                f"{self.requirements}. Use cpu or gpu."
            )

    @property
    def requirements(self) -> Path:
        """The list of packages, by version and hash."""
        return self.checkout / "docker" / f"requirements-{self.target}.txt"

    @property
    def tools(self) -> Path:
        """The list of build tools, by version and hash."""
        return self.checkout / "docker" / "requirements-build.txt"

    @property
    def key(self) -> str:
        """Digest of everything that decides what the wheels are, 64 hex digits."""
        total = hashlib.sha256(f"{self.target} {self.python}\n".encode())
        for path in (self.requirements, self.tools, *self._sources()):
            total.update(f"{sha256_of(path)}  {path.relative_to(self.checkout).as_posix()}\n".encode())
        return total.hexdigest()

    @property
    def versions(self) -> dict[str, str]:
        """Normalised name of each package -> its version."""
        return {_normalised(name): version for name, version in _PIN.findall(self.requirements.read_text())}

    def _sources(self) -> list[Path]:
        found = {path for pattern in _SOURCES for path in self.checkout.glob(pattern) if path.is_file()}
        return sorted(path for path in found if "__pycache__" not in path.parts)


def collect_wheels(wheel_set: WheelSet, directory: Path) -> None:
    """Put all wheels and `requirements.txt` into `directory`, which appears when they are all there.

    What an interrupted call or an earlier bundle has fetched is kept where its hash is right.

    Args:
        wheel_set: Which wheels.
        directory: The bundle's `wheels`.

    Raises:
        CommandFailed: If pip can't fetch or build something.
        EnvironmentFault: If this Python has no pip.
    """
    if importlib.util.find_spec("pip") is None:
        raise EnvironmentFault(
            "`pip` must be installed to fetch wheels. Received: a Python without it. "
            "`python -m ensurepip` installs it; --no-wheels does without wheels."
        )
    aside = directory.with_name(f"{directory.name}.partial")
    if directory.exists() and not aside.exists():
        directory.rename(aside)
    aside.mkdir(parents=True, exist_ok=True)
    _remove_others(aside, wheel_set.versions)
    with tempfile.TemporaryDirectory(prefix="kubegraft-bundle-") as temporary:
        pip = _build_environment(wheel_set, Path(temporary))
        _download(pip, wheel_set, aside, Path(temporary))
        _build(pip, wheel_set, aside, Path(temporary))
    (aside / REQUIREMENTS_FILE).write_text(_requirements(aside), encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)


def _remove_others(directory: Path, versions: dict[str, str]) -> None:
    """Remove what is not of this set, so that no installation takes it, and what an interrupted call left half."""
    for path in directory.iterdir():
        name, _, rest = path.name.partition("-")
        is_wanted = path.suffix == ".whl" and versions.get(_normalised(name)) == rest.partition("-")[0]
        if not (is_wanted and zipfile.is_zipfile(path)):
            path.unlink()


def _build_environment(wheel_set: WheelSet, temporary: Path) -> list[str]:
    """Make an environment with the build tools, and return the call of pip that works in it."""
    environment = temporary / "environment"
    venv.create(environment, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    tools = ["install", "--quiet", "--require-hashes", "--only-binary=:all:", "-r", str(wheel_set.tools)]
    _run_pip([*pip, *tools], "install the build tools")
    return pip


def _download(pip: list[str], wheel_set: WheelSet, directory: Path, temporary: Path) -> None:
    requirements = wheel_set.requirements
    hashed = ["--require-hashes"]
    if wheel_set.python != HASHED_PYTHON:
        hashed = []
        requirements = temporary / REQUIREMENTS_FILE
        pins = _PIN.finditer(wheel_set.requirements.read_text(encoding="utf-8"))
        requirements.write_text("".join(f"{pin[0]}\n" for pin in pins), encoding="utf-8")
        log_event("bundle", "unhashed", python=wheel_set.python, reason=f"hashes are for {HASHED_PYTHON}")
    command = [*pip, "download", "--no-deps", "--no-build-isolation", "--dest", str(directory)]
    options = [*hashed, *_platform(wheel_set.python), "--requirement", str(requirements)]
    with Progress("bundle", len(wheel_set.versions), "packages") as progress:

        def count(line: str) -> None:
            if line.startswith("Collecting "):
                progress.update(package=line.split()[1])

        _run_pip([*command, *options], "fetch the packages", count)


def _platform(python: str) -> Iterator[str]:
    """Yield pip's options for another machine's Python: Linux x86-64, with a glibc as new as the images'."""
    yield from (f"--platform=manylinux_2_{minor}_x86_64" for minor in _GLIBC_MINORS)
    yield from (f"--platform=manylinux{name}_x86_64" for name in ("2014", "2010", "1"))
    yield from ("--platform=linux_x86_64", f"--python-version={python}", "--implementation=cp")
    yield from (f"--abi={name}" for name in (f"cp{python.replace('.', '')}", "abi3", "none"))


def _build(pip: list[str], wheel_set: WheelSet, directory: Path, temporary: Path) -> None:
    """Build what came as source, whose hash was checked, and kubegraft itself; the sources are then removed."""
    sources = [path for path in directory.iterdir() if path.name.endswith(_SOURCE_SUFFIXES)]
    wheels = temporary / "wheels"
    command = [*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    for source in (*sources, wheel_set.checkout):
        log_event("bundle", "building", source=source.name)
        _run_pip([*command, str(source)], f"build {source.name}")
    for wheel in wheels.iterdir():
        shutil.move(wheel, directory / wheel.name)
    for source in sources:
        source.unlink()


def _run_pip(command: list[str], purpose: str, on_line: Callable[[str], None] = lambda line: None) -> None:
    environment = {
        **os.environ,
        "SOURCE_DATE_EPOCH": _SOURCE_DATE_EPOCH,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    run_command(
        command,
        purpose,
        advice="Check the connection to the package index, which pip's own configuration names. "
        "The same call continues with what is missing.",
        environment=environment,
        on_line=on_line,
    )


def _requirements(directory: Path) -> str:
    """Return a list that pip installs these very wheels from: `--require-hashes --no-deps`."""
    lines = []
    for path in sorted(directory.glob("*.whl")):
        name, version = path.name.split("-")[:2]
        lines.append(f"{_normalised(name)}=={version} \\\n    --hash=sha256:{sha256_of(path)}\n")
    return "".join(lines)


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

"""Where the programs are found that read manifests: kustomize (or kubectl, which contains it) and checkov.

Looked for on PATH, then in the testbed's cache, and, for kustomize, where `go install` puts it. A test of what is
not found is skipped, unless KUBEGRAFT_REQUIRE names it, as `make test-manifests` does: then it fails and says how
to get it.
"""

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLACES = (
    Path(os.environ.get("TESTBED_CACHE", "/var/cache/testbed")) / "bin",
    Path.home() / "go" / "bin",
)
ADVICE = {
    "kustomize": "Install kubectl, or with Go: go install sigs.k8s.io/kustomize/kustomize/v5@v5.8.0",
    "checkov": "`make test-manifests` installs it into an environment of its own.",
}


def find_program(*names: str) -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, PLACES)])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def absent(name: str) -> None:
    message = (
        f"`{name}` must be on PATH, in {' or '.join(map(str, PLACES))}. Received: nothing. {ADVICE[name]}"
    )
    if name in os.environ.get("KUBEGRAFT_REQUIRE", "").split(","):
        pytest.fail(message)
    pytest.skip(message)


@functools.cache
def built(command: tuple[str, ...], directory: Path) -> str:
    done = subprocess.run([*command, str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def build_yaml() -> Callable[[Path], str]:
    """Return a function that builds a directory of manifests and returns the YAML."""
    program = find_program("kustomize", "kubectl")
    if program is None:
        absent("kustomize")
    command = (program, "build") if Path(program).name == "kustomize" else (program, "kustomize")
    return lambda directory: built(command, directory)


@pytest.fixture
def build(build_yaml) -> Callable[[Path], list[dict]]:
    """Return a function that builds a directory of manifests and returns its objects."""
    return lambda directory: [one for one in yaml.safe_load_all(build_yaml(directory)) if one]


@pytest.fixture
def checkov() -> str:
    program = find_program("checkov")
    if program is None:
        absent("checkov")
    return program

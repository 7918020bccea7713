"""Stand-ins for `docker` and `kind`, which the default tests can't have: real programs with the same command line.

They keep "images" (any text) as files: one folder is the machine, one the registry, one the kind cluster's nodes. What
they can't show is that real archives load; `kubegraft bundle` was tried with docker itself by hand.
"""

import sys
from pathlib import Path

_PROGRAM = """#!{python}
import hashlib, json, pathlib, shutil, sys
from urllib.parse import quote

ROOT = pathlib.Path({root!r})
with (ROOT / "calls").open("a") as calls:
    calls.write(" ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")

def place(kind, name):
    return ROOT / kind / quote(name, safe="")

def need(path):
    if not path.exists():
        sys.exit("Error response from daemon: no such image: " + path.name)
    return path

def main(*words):
    match words:
        case ("image", "inspect", name):
            content = need(place("machine", name)).read_bytes()
            print(json.dumps([{{"Id": "sha256:" + hashlib.sha256(content).hexdigest(), "RepoDigests": []}}]))
        case ("pull", name):
            shutil.copy(need(place("registry", name)), place("machine", name))
        case ("save", "--output", path, name):
            content = need(place("machine", name)).read_text()
            pathlib.Path(path).write_text(json.dumps({{"name": name, "content": content}}))
        case ("load", "--input", path):
            archive = json.loads(pathlib.Path(path).read_text())
            place("machine", archive["name"]).write_text(archive["content"])
        case ("load", "image-archive", path, "--name", "testbed"):
            archive = json.loads(pathlib.Path(path).read_text())
            place("nodes", archive["name"]).write_text(archive["content"])
        case ("tag", name, other):
            shutil.copy(need(place("machine", name)), place("machine", other))
        case ("manifest", "inspect", name):
            need(place("registry", name))
        case ("push", name):
            shutil.copy(need(place("machine", name)), place("registry", name))
        case _:
            sys.exit("unknown command: " + " ".join(words))

main(*sys.argv[1:])
"""


class ContainerStandin:
    """The programs and what they keep; put `bin` on PATH."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin = root, root / "bin"
        for folder in ("bin", "machine", "registry", "nodes"):
            (root / folder).mkdir(parents=True)
        (root / "calls").touch()
        for name in ("docker", "kind"):
            program = self.bin / name
            program.write_text(_PROGRAM.format(python=sys.executable, root=str(root)))
            program.chmod(0o755)

    def images(self, kind: str) -> dict[str, str]:
        """Return name -> content in `machine`, `registry` or `nodes`."""
        from urllib.parse import unquote

        return {unquote(path.name): path.read_text() for path in (self.root / kind).iterdir()}

    def add(self, kind: str, name: str, content: str) -> None:
        """Put an image somewhere."""
        from urllib.parse import quote

        (self.root / kind / quote(name, safe="")).write_text(content)

    def calls(self) -> list[str]:
        """Return the calls since the last time."""
        path = self.root / "calls"
        lines = path.read_text().splitlines()
        path.write_text("")
        return lines

"""Compile the pipelines to YAML files that the KFP UI accepts.

python pipelines/compile.py                  write pipelines/compiled/*.yaml
python pipelines/compile.py --check          exit 1 if a committed file differs from its source
python pipelines/compile.py --output-dir DIR write elsewhere
python pipelines/compile.py --registry NAME  take the released image from another registry
python pipelines/compile.py --image NAME:TAG run the tasks in another image
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: this directory would shadow modules of the standard library
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import difflib
import os
import subprocess
import tempfile
from collections.abc import Sequence

COMPILED_DIR = Path(__file__).resolve().parent / "compiled"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile or check as the arguments say; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Compile the pipelines to YAML files that the KFP UI accepts."
    )
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    parser.add_argument("--output-dir", type=Path, default=COMPILED_DIR, help="default: %(default)s")
    parser.add_argument(
        "--registry", default="", help="registry of the image, in place of the released one's"
    )
    parser.add_argument("--image", type=_image, help="whole name of the image, with its tag")
    options = parser.parse_args(arguments)
    if options.registry or options.image:
        return _with_image(options)
    if options.check:
        return check(options.output_dir)
    for path in compile_all(options.output_dir):
        print(path)
    return 0


def _image(name: str) -> str:
    tag = name.rpartition("/")[2].replace("@", ":").partition(":")[2]
    if tag in ("", "latest"):
        raise argparse.ArgumentTypeError(f"{name!r} needs a tag or digest that never moves")
    return name


def _with_image(options: argparse.Namespace) -> int:
    """Do the same in a process of its own: `components/_images.py` reads its variables when it is imported."""
    variables = {"KUBEGRAFT_REGISTRY": options.registry, "KUBEGRAFT_TRAIN_IMAGE": options.image}
    environment = {**os.environ, **{name: value.rstrip("/") for name, value in variables.items() if value}}
    if options.registry and not options.image:
        environment.pop("KUBEGRAFT_TRAIN_IMAGE", None)
    command = [sys.executable, __file__, "--output-dir", str(options.output_dir)]
    command += ["--check"] if options.check else []
    return subprocess.run(command, env=environment, check=False).returncode


def compile_all(output_dir: Path) -> list[Path]:
    """Write every pipeline to `output_dir` and return the files' paths."""
    from kfp import compiler

    from pipelines._registry import PIPELINES

    output_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, pipeline in PIPELINES.items():
        path = output_dir / f"{name}.yaml"
        aside = output_dir / f"{name}.partial.yaml"
        compiler.Compiler().compile(pipeline, str(aside))
        aside.replace(path)
        paths.append(path)
    return paths


def check(committed_dir: Path) -> int:
    """Print how the files in `committed_dir` differ from their source; return 1 if any does."""
    from pipelines._registry import PIPELINES

    with tempfile.TemporaryDirectory() as directory:
        fresh_dir = Path(directory)
        compile_all(fresh_dir)
        differences = [line for name in PIPELINES for line in _difference(name, committed_dir, fresh_dir)]
    sys.stdout.writelines(differences)
    if differences:
        print("\nCompiled pipelines differ from their source. Run `make compile` and commit the result.")
    return 1 if differences else 0


def _difference(name: str, committed_dir: Path, fresh_dir: Path) -> list[str]:
    committed, fresh = committed_dir / f"{name}.yaml", fresh_dir / f"{name}.yaml"
    before = committed.read_text(encoding="utf-8").splitlines(keepends=True) if committed.exists() else []
    after = fresh.read_text(encoding="utf-8").splitlines(keepends=True)
    return list(difflib.unified_diff(before, after, str(committed), "compiled now"))


if __name__ == "__main__":
    raise SystemExit(main())

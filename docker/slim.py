"""Make an environment of the image small and reproducible; train.Dockerfile runs it while the image is built.

    slim.py packages ENVIRONMENT          remove what is never used, strip, compile, set file times
    slim.py code ENVIRONMENT OUTPUT       put kubegraft's own files, compiled, and the SBOM into OUTPUT
    slim.py part PATH                     compile one package, in a process of its own

Needs the standard library only. File times are SOURCE_DATE_EPOCH; bytecode is compiled unchecked, since neither
its sources nor their times ever change in an image.
"""

import compileall
import concurrent.futures
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from strip_symbols import strip_symbols

# What no code path of kubegraft, KFP's executor or their libraries reads at run time, by glob in site-packages.
UNUSED = (
    "tensorflow/include",  # C++ headers, for building custom operations
    "tensorflow/**/*.a",
    "tensorflow/lite/testing",
    "tensorflow/python/**/kernel_tests",
    "tensorflow/xla_aot_runtime_src",
    "clang/native",  # libclang, which TensorFlow declares and only its build uses
    "scipy/**/tests",
    "sklearn/**/tests",
    "kubernetes/e2e_test",
    "google/cloud/**/*.proto",
    "pip",
    "pip-*.dist-info",
)
# boto3 describes 400 services; these are S3 and the ways to sign in to it.
BOTO_SERVICES = frozenset({"s3", "sts", "sso", "sso-oidc", "signin"})


def main(arguments: list[str]) -> int:
    """Do what the arguments say; return the exit code."""
    command, environment, *rest = arguments
    if command == "packages":
        slim(Path(environment))
    elif command == "part":
        compile_part(Path(environment))
    else:
        collect(Path(environment), Path(rest[0]))
    return 0


def slim(environment: Path) -> None:
    """Remove what is never used from `environment`, and compile the rest."""
    packages = site_packages(environment)
    before = size_bytes(environment)
    for path in unused(packages):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for path in packages.rglob("*.so*"):
        if path.is_file() and not path.is_symlink():
            strip_symbols(path)
    removed = before - size_bytes(environment)
    compile_all(environment)
    print(f"removed {removed / 1e6:.0f} MB; {size_bytes(environment) / 1e6:.0f} MB remain with bytecode")


def unused(packages: Path) -> Iterator[Path]:
    """Yield the files and directories to remove, none of them inside another."""
    found = {path for pattern in UNUSED for path in packages.glob(pattern)}
    found |= {path for path in (packages / "botocore" / "data").glob("*/") if path.name not in BOTO_SERVICES}
    for path in sorted(found):
        if not found.intersection(path.parents):
            yield path


def collect(environment: Path, output: Path) -> None:
    """Copy what the wheel of kubegraft brought to `environment`, and write the SBOM beside it."""
    packages = site_packages(environment)
    own = [
        *packages.glob("kubegraft"),
        *packages.glob("kubegraft-*.dist-info"),
        environment / "bin/kubegraft",
    ]
    for path in own:
        target = output / path.relative_to(environment)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, target) if path.is_dir() else shutil.copy2(path, target)
    compile_all(output)


def compile_all(directory: Path) -> None:
    """Compile every module below `directory` and give all files one time.

    A process of its own for each package: what else a process has compiled shows in the bytecode, which marks the
    objects that somebody else refers to.
    """
    parts = sorted(path for path in (directory / "lib").glob("python3.*/site-packages/*"))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [[sys.executable, __file__, "part", str(path)] for path in parts]
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    when = int(os.environ["SOURCE_DATE_EPOCH"])
    for path in (directory, *directory.rglob("*")):
        os.utime(path, (when, when), follow_symlinks=False)


def compile_part(path: Path) -> None:
    """Compile one package or module; a constant hash in place of its time says that it never changes."""
    # Some packages carry sources of other Pythons, or templates; they have no bytecode and never needed it.
    settings = {"quiet": 2, "force": True, "invalidation_mode": py_compile.PycInvalidationMode.UNCHECKED_HASH}
    if path.is_dir():
        compileall.compile_dir(path, maxlevels=40, workers=1, **settings)
    elif path.suffix == ".py":
        compileall.compile_file(path, **settings)


def site_packages(environment: Path) -> Path:
    """Return the one site-packages directory of `environment`."""
    (found,) = environment.glob("lib/python3.*/site-packages")
    return found


def size_bytes(directory: Path) -> int:
    """Return the size of all files below `directory`."""
    return sum(path.lstat().st_size for path in directory.rglob("*") if not path.is_dir())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

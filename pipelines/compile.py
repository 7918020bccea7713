"""Compile the pipelines to YAML files that the KFP UI accepts.

python pipelines/compile.py                      write pipelines/compiled/*.yaml
python pipelines/compile.py --check              exit 1 if a committed file differs from its source
python pipelines/compile.py --output-dir DIR     write elsewhere
python pipelines/compile.py --profile gpu        write the variant for GPUs only
python pipelines/compile.py --registry NAME      take the released images from another registry
python pipelines/compile.py --image NAME:TAG     run the tasks in another image
python pipelines/compile.py --gpu-image NAME:TAG run the training tasks of the GPU variant in another image
python pipelines/compile.py --work-claim NAME    keep work directories on a volume, for retries that continue
python pipelines/compile.py --secret NAME        credentials of buckets, from a Secret of that name
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: this directory would shadow modules of the standard library
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import ast
import difflib
import os
import pprint
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any

COMPILED_DIR = Path(__file__).resolve().parent / "compiled"
PROFILE_NAMES = ("cpu", "gpu")
_IMAGE_OPTIONS = {
    "registry": "KUBEGRAFT_REGISTRY",
    "image": "KUBEGRAFT_TRAIN_IMAGE",
    "gpu_image": "KUBEGRAFT_TRAIN_GPU_IMAGE",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile or check as the arguments say; return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if any(getattr(options, name) for name in _IMAGE_OPTIONS):
        return _with_images(options)
    profiles = [options.profile] if options.profile else _default_profiles()
    changes = {
        "work_claim": options.work_claim,
        "secret": options.secret,
        "node_selector": dict(options.node_selector),
    }
    missing = _without_image(profiles)
    if missing:
        parser.error(missing)
    if options.check:
        return check(options.output_dir, profiles, changes)
    for path in compile_all(options.output_dir, profiles, changes):
        print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compile",  # of `python pipelines/compile.py` and of `kubegraft compile`
        description="Compile the pipelines to YAML files that the KFP UI accepts.",
    )
    add = parser.add_argument
    add("--check", action="store_true", help="compare with the files instead of writing them")
    add("--output-dir", type=Path, default=COMPILED_DIR, help="default: %(default)s")
    add("--profile", choices=PROFILE_NAMES, help="default: all; with an image of another name, cpu")
    add("--registry", help="registry of the images, in place of the released ones'")
    add("--image", type=_image, help="whole name of the image, with its tag")
    add("--gpu-image", type=_image, help="the same for the training tasks of the GPU variant")
    add("--work-claim", type=_name, help="PersistentVolumeClaim for the tasks' work directories")
    add("--secret", type=_name, help="Secret whose keys are the tasks' credentials for buckets")
    add(
        "--node-selector",
        type=_label,
        action="append",
        default=[],
        metavar="LABEL=VALUE",
        help="label of the training tasks' nodes, the default of the parameter; repeatable",
    )
    return parser


def _image(name: str) -> str:
    tag = name.rpartition("/")[2].replace("@", ":").partition(":")[2]
    if tag in ("", "latest"):
        raise argparse.ArgumentTypeError(f"{name!r} needs a tag or digest that never moves")
    return name


def _name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", name):
        raise argparse.ArgumentTypeError(f"{name!r} is no name that an object in Kubernetes can have")
    return name


def _label(text: str) -> tuple[str, str]:
    label, equals, value = text.partition("=")
    if not (label and equals):
        raise argparse.ArgumentTypeError(f"{text!r} has not the form LABEL=VALUE")
    return label, value


def _with_images(options: argparse.Namespace) -> int:
    """Do the same in a process of its own: `components/_images.py` reads its variables when it is imported."""
    given = {name: (getattr(options, name) or "").rstrip("/") for name in _IMAGE_OPTIONS}
    environment = {**os.environ, **{_IMAGE_OPTIONS[name]: value for name, value in given.items() if value}}
    if given["registry"] and not given["image"]:
        environment.pop(_IMAGE_OPTIONS["image"], None)
    if (given["registry"] or given["image"]) and not given["gpu_image"]:
        environment.pop(_IMAGE_OPTIONS["gpu_image"], None)
    command = [sys.executable, __file__, "--output-dir", str(options.output_dir)]
    command += ["--check"] if options.check else []
    command += ["--profile", options.profile] if options.profile else []
    command += ["--work-claim", options.work_claim] if options.work_claim else []
    command += ["--secret", options.secret] if options.secret else []
    for label, value in options.node_selector:
        command += ["--node-selector", f"{label}={value}"]
    return subprocess.run(command, env=environment, check=False).returncode


def _default_profiles() -> list[str]:
    from components._images import TRAIN_GPU_IMAGE

    return list(PROFILE_NAMES) if TRAIN_GPU_IMAGE else ["cpu"]


def _without_image(profiles: Sequence[str]) -> str:
    from components._images import TRAIN_GPU_IMAGE, TRAIN_IMAGE

    if "gpu" not in profiles or TRAIN_GPU_IMAGE:
        return ""
    return (
        f"--profile gpu needs --gpu-image, since the image beside {TRAIN_IMAGE} can't be told from its name"
    )


def compile_all(
    output_dir: Path,
    profiles: Sequence[str] = PROFILE_NAMES,
    changes: Mapping[str, Any] | None = None,
    *,
    names: Collection[str] = (),
) -> list[Path]:
    """Write every pipeline in every profile to `output_dir`, and return the files' paths.

    Args:
        output_dir: Made if need be.
        profiles: Names of profiles.
        changes: Fields of the profiles to set; empty ones stay as they are.
        names: Pipelines to write; all if there are none.
    """
    from kfp import compiler, dsl

    from pipelines._profiles import PROFILES, applied
    from pipelines._registry import PIPELINES

    output_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names or PIPELINES:
        pipeline = PIPELINES[name]
        for profile_name in profiles:
            profile = _changed(PROFILES[profile_name], changes or {})
            info = pipeline.pipeline_spec.pipeline_info
            with applied(profile):
                traced = dsl.pipeline(
                    name="-".join(filter(None, (info.name, profile.suffix))),
                    display_name=info.display_name + profile.title,
                    description=pipeline.description,
                )(pipeline.pipeline_func)
            path = output_dir / file_name(name, profile_name)
            aside = path.with_suffix(".partial.yaml")
            compiler.Compiler().compile(traced, str(aside), pipeline_parameters=profile.defaults)
            aside.write_text(_with_stable_header(aside.read_text(encoding="utf-8")), encoding="utf-8")
            aside.replace(path)
            paths.append(path)
    return paths


def _with_stable_header(text: str) -> str:
    """Sort the keys of the defaults in the comment at the top; kfp writes them in any order."""

    def sorted_keys(match: re.Match[str]) -> str:
        value = pprint.pformat(ast.literal_eval(match[2]), width=10_000)
        return f"{match[1]}{value}]"

    return re.sub(r"^(#    \w+: (?:list|dict) \[Default: )(.*)\]$", sorted_keys, text, flags=re.MULTILINE)


def _changed(profile: Any, changes: Mapping[str, Any]) -> Any:
    import dataclasses

    return dataclasses.replace(profile, **{name: value for name, value in changes.items() if value})


def file_name(pipeline_name: str, profile_name: str) -> str:
    """Return the name of the file of a pipeline in a profile."""
    from pipelines._profiles import PROFILES

    return "_".join(filter(None, (pipeline_name, PROFILES[profile_name].suffix))) + ".yaml"


def check(
    committed_dir: Path, profiles: Sequence[str] = PROFILE_NAMES, changes: Mapping[str, Any] | None = None
) -> int:
    """Print how the files in `committed_dir` differ from their source; return 1 if any does."""
    with tempfile.TemporaryDirectory() as directory:
        fresh = compile_all(Path(directory), profiles, changes)
        differences = [line for path in fresh for line in _difference(committed_dir / path.name, path)]
    sys.stdout.writelines(differences)
    if differences:
        print("\nCompiled pipelines differ from their source. Run `make compile` and commit the result.")
    return 1 if differences else 0


def _difference(committed: Path, fresh: Path) -> list[str]:
    before = committed.read_text(encoding="utf-8").splitlines(keepends=True) if committed.exists() else []
    after = fresh.read_text(encoding="utf-8").splitlines(keepends=True)
    return list(difflib.unified_diff(before, after, str(committed), "compiled now"))


if __name__ == "__main__":
    raise SystemExit(main())

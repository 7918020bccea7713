"""The compiled pipeline as it is uploaded: which image it runs in, and the name that its content gives it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kubegraft import __version__
from kubegraft.cache import BUDGET_VARIABLE, CACHE_VARIABLE, OPEN_BUDGET
from kubegraft.config import CREDENTIAL_VARIABLES
from kubegraft.errors import ConfigError
from kubegraft.local_run import COMPILED_FILES, find_checkout, import_from_checkout, packaged_pipeline
from kubegraft.processes import WORK_DIR_VARIABLE

_PIPELINE: Final = "transfer_learning"
_HASH_DIGITS: Final = 12
_IMAGE_LINE: Final = re.compile(r"(\s+image: )\S+$")
_EXECUTOR_LINE: Final = re.compile(r"    exec-([\w-]+):$")
_TRAINING: Final = ("train-head", "fine-tune")
_CLAIM: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_SELECTOR_DEFAULT: Final = re.compile(r"^(      node_selector:\n        defaultValue: )\{\}$", re.MULTILINE)
_WORK_DIR: Final = "/workspace"  # as in pipelines/_profiles.py
_ON_CLAIM: Final = {  # as in pipelines/_placement.py
    WORK_DIR_VARIABLE: _WORK_DIR,
    CACHE_VARIABLE: f"{_WORK_DIR}/cache",
    BUDGET_VARIABLE: OPEN_BUDGET,
}
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

    @property
    def images(self) -> tuple[str, str]:
        """Image of the tasks, and of the training tasks; only the GPU profile has two."""
        executors = self._spec()["deploymentSpec"]["executors"]
        both = [executors[name]["container"]["image"] for name in ("exec-ingest", "exec-train-head")]
        return str(both[0]), str(both[1])

    def with_image(self, *, image: str = "", registry: str = "", gpu_image: str = "") -> PipelinePackage:
        """Return the pipeline with its tasks in other images.

        Args:
            image: Whole name of the image; "" keeps it. In the GPU profile that of the training tasks is the one
                which is built beside it, unless `gpu_image` says otherwise.
            registry: Registry to take the images of the same name and tag from; "" keeps it.
            gpu_image: Whole name of the training tasks' image in the GPU profile.

        Raises:
            ConfigError: If image and registry are both given, an image has no tag or digest of its own, or that of
                the training tasks can't be told.
        """
        if image and registry:
            raise _two_registries(image, registry)
        for given in filter(None, (image, gpu_image)):
            check_image(given)
        old, old_training = self.images
        new, new_training = (
            f"{registry.rstrip('/')}/{name.rpartition('/')[2]}" if registry else name
            for name in (old, old_training)
        )
        new = image or new
        if gpu_image:
            new_training = gpu_image
        elif old_training == old:
            new_training = new
        elif image:
            new_training = self.image_beside(image) or _untold(image)
        executor = ""  # both images may have one name, so that only the executor tells them apart
        lines = self.text.splitlines(keepends=True)
        for number, line in enumerate(lines):
            if match := _EXECUTOR_LINE.match(line):
                executor = match[1]
            elif match := _IMAGE_LINE.match(line):
                lines[number] = f"{match[1]}{new_training if executor in _TRAINING else new}\n"
        return PipelinePackage("".join(lines))

    def image_beside(self, image: str) -> str:
        """Return the training tasks' image that is built together with an image of the others; "" for another name.

        Of the training tasks' own image that is itself.
        """
        place, slash, last = image.rpartition("/")
        name, training_name = (own.rpartition("/")[2].partition(":")[0] for own in self.images)
        found, colon, tag = last.partition(":")
        return f"{place}{slash}{training_name}:{tag}" if colon and found in (name, training_name) else ""

    def with_work_claim(self, claim: str) -> PipelinePackage:
        """Return the pipeline with every task's work directory on a PersistentVolumeClaim; "" for none.

        A task whose pod was lost then continues from its checkpoint when KFP starts it again.

        Raises:
            ConfigError: If it is no name that a claim can have.
        """
        if not claim:
            return self
        if not _CLAIM.fullmatch(claim):
            raise ConfigError(
                "`work_claim` must be the name of a PersistentVolumeClaim. Received: "
                f"work_claim={claim!r}. For example kubegraft-work."
            )
        import yaml

        spec, platform = yaml.safe_load_all(self.text)
        platforms = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        for name, executor in spec["deploymentSpec"]["executors"].items():
            executor["container"].setdefault("env", []).extend(
                {"name": name, "value": value} for name, value in _ON_CLAIM.items()
            )
            named = {"runtimeValue": {"constant": claim}}
            mount = {"mountPath": _WORK_DIR, "constant": claim, "pvcNameParameter": named}
            platforms[name].setdefault("pvcMount", []).append(mount)
        return self._rewritten(spec, platform)

    def with_secret(self, secret: str) -> PipelinePackage:
        """Return the pipeline with the credentials of buckets in every task, from a Secret's keys; "" for none.

        KFP takes keys by name only, so it is those that the clients of stores know; a Secret need not have all.

        Raises:
            ConfigError: If it is no name that a Secret can have.
        """
        if not secret:
            return self
        if not _CLAIM.fullmatch(secret):
            raise ConfigError(
                f"`secret` must be the name of a Secret, never what is in it. Received: {len(secret)} characters that "
                "are no name. For example kubegraft-s3."
            )
        import yaml

        spec, platform = yaml.safe_load_all(self.text)
        keys = [{"envVar": key, "secretKey": key} for key in CREDENTIAL_VARIABLES]
        named = {"runtimeValue": {"constant": secret}}
        variables = {"secretName": secret, "secretNameParameter": named, "keyToEnv": keys, "optional": True}
        for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
            executor.setdefault("secretAsEnv", []).append(variables)
        return self._rewritten(spec, platform)

    def _rewritten(self, spec: dict[str, Any], platform: dict[str, Any]) -> PipelinePackage:
        import yaml

        class Dumper(yaml.SafeDumper):
            """Dumper without anchors."""

            def ignore_aliases(self, data: Any) -> bool:
                return True

        header = self.text[: self.text.index("\ncomponents:") + 1]
        documents = yaml.dump_all([spec, platform], Dumper=Dumper, sort_keys=True, allow_unicode=True)
        return PipelinePackage(header + documents)

    def with_node_selector(self, labels: Mapping[str, str]) -> PipelinePackage:
        """Return the pipeline with another default of its parameter `node_selector`; {} keeps it."""
        if not labels:
            return self
        import json

        default = json.dumps(dict(labels), sort_keys=True)
        return PipelinePackage(_SELECTOR_DEFAULT.sub(lambda match: match[1] + default, self.text, count=1))

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


def load_package(profile: str = "cpu") -> PipelinePackage:
    """Return the pipeline: compiled now from a checkout's source, or as the installed kubegraft carries it.

    Args:
        profile: `cpu`, or `gpu` for the variant whose training tasks run in the image for GPUs.

    Raises:
        EnvironmentFault: If there is neither.
    """
    checkout = find_checkout()
    if checkout is None:
        return _as_variables_say(PipelinePackage(packaged_pipeline(profile).read_text(encoding="utf-8")))
    compile_all = import_from_checkout(checkout, "pipelines.compile").compile_all
    with tempfile.TemporaryDirectory() as directory:
        (path,) = compile_all(Path(directory), [profile], names=[_PIPELINE])
        return PipelinePackage(path.read_text(encoding="utf-8"))


def _as_variables_say(package: PipelinePackage) -> PipelinePackage:
    """Return a packaged pipeline in the images that a checkout would compile it with (components/_images.py)."""
    image = os.environ.get("KUBEGRAFT_TRAIN_IMAGE", "")
    registry = "" if image else os.environ.get("KUBEGRAFT_REGISTRY", "")
    gpu_image = ""
    if len(set(package.images)) > 1:
        gpu_image = os.environ.get("KUBEGRAFT_TRAIN_GPU_IMAGE", "")
        if image and not gpu_image:
            gpu_image = package.image_beside(image) or image
    return package.with_image(image=image, registry=registry, gpu_image=gpu_image)


def released_image(*, image: str = "", registry: str = "", gpu: bool = False) -> str:
    """Return the image of a pod that runs the whole pipeline.

    Args:
        image: Whole name; "" for that of `KUBEGRAFT_TRAIN_IMAGE` or `KUBEGRAFT_TRAIN_GPU_IMAGE`, or the released one.
        registry: Registry to take the image of that name and tag from; "" for that of `KUBEGRAFT_REGISTRY`, or its own.
        gpu: Whether the pod gets GPUs, and so needs the image for them.

    Raises:
        ConfigError: If the image has no tag or digest of its own, can't be told, or names a registry beside `registry`.
        EnvironmentFault: If there is no compiled pipeline.
    """
    if image and registry:
        raise _two_registries(image, registry)
    if image:
        check_image(image)
        return image
    profile = "gpu" if gpu else "cpu"
    checkout = find_checkout()
    compiled = (
        checkout / "pipelines" / "compiled" / COMPILED_FILES[profile]
        if checkout
        else packaged_pipeline(profile)
    )
    package = PipelinePackage(compiled.read_text(encoding="utf-8"))
    named = os.environ.get("KUBEGRAFT_TRAIN_IMAGE", "")
    if gpu and named and not (os.environ.get("KUBEGRAFT_TRAIN_GPU_IMAGE") or package.image_beside(named)):
        raise ConfigError(
            "`image` must name the image for GPUs where it can't be told from the other's name. Received: "
            f"KUBEGRAFT_TRAIN_IMAGE={named!r}. Give --image NAME:TAG, the same again if it has TensorFlow for GPUs."
        )
    return _as_variables_say(package).with_image(registry=registry).images[1]


def _two_registries(image: str, registry: str) -> ConfigError:
    return ConfigError(
        "`image` names the registry already. Received: "
        f"image={image!r}, registry={registry!r}. Give one of the two."
    )


def _untold(image: str) -> str:
    raise ConfigError(
        "`gpu_image` must name the training tasks' image where it can't be told from the other's name. Received: "
        f"image={image!r} and no gpu_image. Give --gpu-image NAME:TAG, the same again if it has TensorFlow for GPUs."
    )


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

"""What goes into the images: pinned, hashed, tagged by content, small; checked without building one."""

import fnmatch
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from kubegraft import __version__
from pipelines._placement import USER

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = ("docker/train.Dockerfile", "docker/operator.Dockerfile")
DOCKERFILE = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in DOCKERFILES)
REQUIREMENTS = ("build", "cpu", "gpu", "operator")


def script(name: str):
    """Import a script of docker/, which is no package."""
    loader = SourceFileLoader(f"docker_{name.removesuffix('.py')}", str(DOCKER / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = bytecode
    return module


@pytest.fixture
def slim(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCKER))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767225600")
    yield script("slim.py")
    sys.modules.pop("strip_symbols", None)


def pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([\w.!+]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_of_an_image_has_a_hash_and_names_no_host(name):
    text = (DOCKER / f"requirements-{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    entries = " ".join(lines).split()
    assert "://" not in text
    hashes = [entry for entry in entries if re.fullmatch("--hash=sha256:[0-9a-f]{64}", entry)]
    assert len(hashes) == len(pins(DOCKER / f"requirements-{name}.txt")) > 5


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_images_contain_the_versions_that_were_tested_together(name):
    tested = pins(ROOT / "constraints.txt")
    different = {
        package: (version, tested[package])
        for package, version in pins(DOCKER / f"requirements-{name}.txt").items()
        if tested.get(package, version) != version
    }
    assert not different, "run `make requirements`"


@pytest.mark.parametrize(("name", "tensorflow"), [("cpu", "tensorflow-cpu"), ("gpu", "tensorflow")])
def test_images_contain_all_that_the_extras_ask_for(name, tensorflow):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["train"], *extras["kfp"], *extras["s3"]]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted}
    names = names - {"tensorflow-cpu"} | {tensorflow}
    assert names <= pins(DOCKER / f"requirements-{name}.txt").keys(), "run `make requirements`"


def test_the_operator_s_image_contains_its_extra_and_neither_tensorflow_nor_kfp():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["operator"]]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted}
    found = pins(DOCKER / "requirements-operator.txt").keys()
    assert names <= found, "run `make requirements`"
    assert not {"tensorflow-cpu", "tensorflow", "kfp", "kubernetes"} & found


def test_the_gpu_image_has_cuda_and_otherwise_the_cpu_image_s_packages():
    cpu, gpu = (pins(DOCKER / f"requirements-{name}.txt") for name in ("cpu", "gpu"))
    assert cpu.keys() - gpu.keys() == {"tensorflow-cpu"}
    more = gpu.keys() - cpu.keys() - {"tensorflow"}
    assert more
    assert all(name.startswith("nvidia-") for name in more)
    assert all(gpu[name] == version for name, version in cpu.items() if name in gpu)


def copied() -> list[str]:
    """Return what the Dockerfiles copy from the checkout."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()]


def test_the_tag_hashes_what_the_dockerfiles_copy_and_the_dockerfiles():
    tag = script("tag")
    hashed = {path.relative_to(ROOT).as_posix() for path in tag.inputs(ROOT)}
    assert set(DOCKERFILES) <= hashed
    for source in copied():
        path = ROOT / source
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        names = {p.relative_to(ROOT).as_posix() for p in files if "__pycache__" not in p.parts}
        assert names
        assert names <= hashed, source
    for name in hashed - set(DOCKERFILES):
        assert any(name == source or name.startswith(source + "/") for source in copied()), name


def test_the_builder_gets_what_is_copied_and_nothing_else():
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert "*" in rules
    for source in copied():
        assert any(fnmatch.fnmatch(source, rule) for rule in allowed), source
    for rule in allowed:
        assert any(fnmatch.fnmatch(source, rule) for source in copied()), rule


def test_the_tag_follows_content_and_not_times(tmp_path):
    tag = script("tag")
    for path in tag.inputs(ROOT):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    before = tag.digest(tmp_path)
    assert before == tag.digest(ROOT)
    assert re.fullmatch(r"[0-9a-f]{12}", before)
    (tmp_path / "docs.md").write_text("not in an image")
    (tmp_path / "src/kubegraft/__pycache__").mkdir()
    (tmp_path / "src/kubegraft/__pycache__/cli.pyc").write_text("")
    assert tag.digest(tmp_path) == before
    (tmp_path / "src/kubegraft/new.py").write_text("")
    assert tag.digest(tmp_path) != before


@pytest.mark.parametrize(("arguments", "shape"), [([], r"-[0-9a-f]{12}"), (["--release"], "")])
def test_the_tag_begins_with_the_version(arguments, shape):
    said = subprocess.run(
        [sys.executable, DOCKER / "tag", *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert re.fullmatch(re.escape(__version__) + shape, said)


def test_the_dockerfile_is_plain_and_ends_as_a_numeric_user():
    assert not re.search(r"RUN --mount|<<", DOCKERFILE.replace("heredocs, no RUN --mount", ""))
    final = [
        stage for stage in DOCKERFILE.split("\nFROM ") if re.match(r"\S+ AS (cpu|gpu|operator)\n", stage)
    ]
    assert len(final) == 3
    for stage in final:
        assert f"USER {USER}:{USER}" in stage
        assert "HOME=/tmp" in stage
        assert "RUN " not in stage


def test_nothing_is_installed_into_an_image_unchecked():
    commands = [line for line in DOCKERFILE.splitlines() if re.search(r" (install|wheel) -", line)]
    assert len(commands) == 14
    for line in commands:
        assert "--require-hashes" in line or "--no-index" in line


def test_slimming_keeps_what_runs_and_makes_times_equal(slim, tmp_path, capsys):
    packages = tmp_path / "lib/python3.13/site-packages"
    kept = ["tensorflow/__init__.py", "botocore/data/s3/x.json", "botocore/data/endpoints.json", "scipy/a.py"]
    gone = ["tensorflow/include/a.h", "botocore/data/ec2/x.json", "scipy/stats/tests/test_a.py", "pip/b.py"]
    for name in kept + gone:
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text("x = 1\n" if name.endswith(".py") else "{}")
    slim.slim(tmp_path)
    assert all((packages / name).exists() for name in kept)
    assert not any((packages / name).exists() for name in gone)
    assert list((packages / "tensorflow/__pycache__").glob("*.pyc"))
    assert {path.stat().st_mtime for path in tmp_path.rglob("*")} == {1767225600}
    assert "remain" in capsys.readouterr().out


def test_a_stripped_library_still_loads_and_answers(tmp_path):
    import markupsafe._speedups as library

    copy = tmp_path / Path(library.__file__).name
    shutil.copy(library.__file__, copy)
    before = copy.stat().st_size
    saved = script("strip_symbols.py").strip_symbols(copy)
    assert saved > 0
    assert copy.stat().st_size == before - saved
    assert script("strip_symbols.py").strip_symbols(copy) == 0
    program = "import _speedups; print(_speedups.__file__, _speedups._escape_inner('<'))"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert answer.stdout.split() == [str(copy), "&lt;"]


def test_what_is_no_library_is_left_alone(tmp_path):
    path = tmp_path / "linker_script.so"
    path.write_text("INPUT(libreal.so)")
    assert script("strip_symbols.py").strip_symbols(path) == 0
    assert path.read_text() == "INPUT(libreal.so)"


def test_the_bill_of_materials_lists_every_package_with_its_licence():
    answer = subprocess.run(
        [sys.executable, DOCKER / "sbom.py"], capture_output=True, text=True, check=True
    ).stdout
    document = json.loads(answer)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["name"] == "kubegraft"
    by_name = {entry["name"]: entry for entry in document["components"]}
    assert {"keras", "numpy", "kfp"} <= by_name.keys()
    assert by_name["keras"]["purl"] == f"pkg:pypi/keras@{by_name['keras']['version']}"
    assert sum("licenses" in entry for entry in by_name.values()) > 0.8 * len(by_name)

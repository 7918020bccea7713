"""Bundles for sites without internet: a package index and a server of weights on loopback, pip itself, real files.

The container tool is a stand-in (tests/container_standin.py), because the default tests can have no Docker.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import venv
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from kubegraft.bundling import create, load
from kubegraft.cli import main
from kubegraft.modeling.backbones import get_backbone
from kubegraft.modeling.imagenet import ImageNetFile
from tests.container_standin import ContainerStandin

IMAGE = "registry.test/team/kubegraft-train:1.0"
SERVER = "tensorflow/serving:2.0"
# A PEP 517 backend that needs the standard library only, so that the tests need no build tool from anywhere.
BACKEND = """
import pathlib, zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    name, version = pathlib.Path(__file__).with_name("name").read_text().split()
    info = f"{name}-{version}.dist-info"
    wheel = f"{name}-{version}-py3-none-any.whl"
    files = {
        f"{name}.py": f"VERSION = {version!r}\\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    record = "".join(f"{path},,\\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(pathlib.Path(directory) / wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(zipfile.ZipInfo(path), text)
    return wheel
"""
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def project(directory, name, version):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "pyproject.toml").write_text(PROJECT)
    (directory / "backend.py").write_text(BACKEND)
    (directory / "name").write_text(f"{name} {version}")
    return directory


def wheel(directory, name, version, scratch):
    namespace = {"__file__": str(project(scratch / name, name, version) / "backend.py")}
    exec(BACKEND, namespace)
    directory.mkdir(parents=True)
    return directory / namespace["build_wheel"](directory)


def source_archive(directory, name, version, scratch):
    directory.mkdir(parents=True)
    path = directory / f"{name}-{version}.tar.gz"
    project(scratch / name, name, version)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(scratch / name, f"{name}-{version}")
        info = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
        entry = tarfile.TarInfo(f"{name}-{version}/PKG-INFO")
        entry.size = len(info)
        archive.addfile(entry, io.BytesIO(info))
    return path


def pin(name, version, path):
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


class Site:
    """The side with internet: a checkout, servers on loopback, and a container tool."""

    def __init__(self, root, port, requests):
        self.root, self.requests, self.port = root, requests, port
        self.checkout, web = root / "checkout", root / "web"
        packages = {
            "owl": wheel(web / "simple" / "owl", "owl", "1.0", root / "scratch"),
            "kite": source_archive(web / "simple" / "kite", "kite", "2.0", root / "scratch"),
        }
        tool = wheel(web / "simple" / "hammer", "hammer", "1.0", root / "scratch")
        project(self.checkout, "kubegraft", "0.1.0")
        (self.checkout / "docker").mkdir()
        lines = [pin("owl", "1.0", packages["owl"]), pin("kite", "2.0", packages["kite"])]
        (self.checkout / "docker" / "requirements-cpu.txt").write_text("".join(lines))
        (self.checkout / "docker" / "requirements-build.txt").write_text(pin("hammer", "1.0", tool))
        documents = ("manifests/base/kustomization.yaml", "docs/clusters.md")
        for path in ("pipelines/compiled/transfer_learning.yaml", *documents):
            (self.checkout / path).parent.mkdir(parents=True)
            (self.checkout / path).write_text(f"# {path}\n")
        weights = web / "keras" / "resnet50_notop.h5"
        weights.parent.mkdir()
        weights.write_bytes(b"weights" * 1000)
        self.weights = weights
        self.containers = ContainerStandin(root / "containers")
        self.containers.add("machine", IMAGE, "tasks")
        self.containers.add("registry", SERVER, "server")

    def backbone(self, name):
        """Of the registry, but with its weights on loopback."""
        md5 = hashlib.md5(b"weights" * 1000, usedforsecurity=False).hexdigest()
        file = ImageNetFile(url=f"http://127.0.0.1:{self.port}/keras/resnet50_notop.h5", file_hash=md5)
        found = get_backbone(name)
        return dataclasses.replace(found, imagenet=file) if found.imagenet else found

    def fetched(self):
        """Files that were asked for since the last time; pages of the index don't count."""
        names = [path.rsplit("/", 1)[-1] for path in self.requests if not path.endswith("/")]
        self.requests.clear()
        return names


@contextlib.contextmanager
def web_server(directory, requests):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(directory))

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A site, and a bundle that it has made once; tests copy the bundle before they change it."""
    root, requests = tmp_path_factory.mktemp("site"), []
    (root / "web").mkdir()
    with web_server(root / "web", requests) as port, pytest.MonkeyPatch.context() as patch:
        site = Site(root, port, requests)
        for variable in [name for name in os.environ if name.startswith("PIP_")]:
            patch.delenv(variable)
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_CACHE_DIR", "1")
        patch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
        patch.setenv("PATH", f"{site.containers.bin}:/usr/bin:/bin")
        patch.setenv("KERAS_HOME", str(root / "keras"))
        patch.setattr(create, "find_checkout", lambda: site.checkout)
        patch.setattr(create, "get_backbone", site.backbone)
        patch.setattr(load, "get_backbone", site.backbone)
        bundle = root / "bundle"
        site.result = bundle_call(*everything(bundle))
        site.first_fetched = site.fetched()
        yield site, bundle


@pytest.fixture
def site(made):
    made[0].fetched()
    made[0].containers.calls()
    return made[0]


@pytest.fixture
def bundle(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "bundle")


def everything(directory):
    return [
        *("create", directory, "--image", IMAGE, "--image", SERVER),
        *("--backbone", "resnet50", "--backbone", "efficientnet_lite0"),
    ]


def bundle_call(*arguments):
    result = CliRunner().invoke(main, ["bundle", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments):
    result = CliRunner().invoke(main, ["bundle", *map(str, arguments)])
    return result.exit_code, result.stderr


def content(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_everything_is_in_one_directory_and_in_the_index(site, bundle):
    files = content(bundle)
    assert sorted(files) == [
        *("README.txt", "SHA256SUMS", "bundle.json", "docs/clusters.md"),
        *("images/kubegraft-train-1.0.tar", "images/serving-2.0.tar"),
        *("manifests/base/kustomization.yaml", "pipelines/transfer_learning.yaml"),
        "weights/resnet50/resnet50_notop.h5",
        *("wheels/kite-2.0-py3-none-any.whl", "wheels/kubegraft-0.1.0-py3-none-any.whl"),
        *("wheels/owl-1.0-py3-none-any.whl", "wheels/requirements.txt"),
    ]
    index = json.loads(files["bundle.json"])
    listed = {file["path"]: (file["size"], file["sha256"]) for file in index["files"]}
    assert listed == {
        path: (len(data), hashlib.sha256(data).hexdigest())
        for path, data in files.items()
        if path not in ("bundle.json", "SHA256SUMS")
    }
    assert index["packaged_backbones"] == ["efficientnet_lite0"]
    assert [image["name"] for image in index["images"]] == [IMAGE, SERVER]
    assert index["images"][0]["image_id"] == "sha256:" + hashlib.sha256(b"tasks").hexdigest()
    assert sorted(site.first_fetched) == [
        *("hammer-1.0-py3-none-any.whl", "kite-2.0.tar.gz", "owl-1.0-py3-none-any.whl", "resnet50_notop.h5"),
    ]


def test_a_machine_without_kubegraft_verifies_and_installs_it(bundle, tmp_path):
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=bundle, check=False)
    assert done.returncode == 0
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (command,) = [line for line in (bundle / "README.txt").read_text().splitlines() if "pip install" in line]
    words = command.split()[1:]
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--python", python, *words[2:]], cwd=bundle, check=True
    )
    program = "import kite, owl, kubegraft; print(kite.VERSION, owl.VERSION, kubegraft.VERSION)"
    done = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "2.0 1.0 0.1.0\n"


def test_the_same_call_again_fetches_nothing(site, made):
    _, bundle = made
    before = content(bundle)
    bundle_call(*everything(bundle))
    assert site.fetched() == []
    assert not [call for call in site.containers.calls() if " save " in call or " pull " in call]
    assert content(bundle) == before


def test_an_interrupted_call_is_continued(site, bundle):
    """As `kill` leaves it: the index has its other name, some files are there, some are damaged."""
    before = content(bundle)
    (bundle / "bundle.json").rename(bundle / "bundle.partial.json")
    (bundle / "wheels").rename(bundle / "wheels.partial")
    (bundle / "wheels.partial" / "kite-2.0-py3-none-any.whl").unlink()
    (bundle / "images" / "serving-2.0.tar").write_bytes(b"half")
    (bundle / "weights" / "resnet50" / "resnet50_notop.h5").write_bytes(b"half")
    code, message = refused("load", bundle)
    assert code == 8
    assert "an unfinished bundle" in message
    bundle_call(*everything(bundle))
    assert "owl-1.0-py3-none-any.whl" not in (fetched := site.fetched())
    assert {"kite-2.0.tar.gz", "resnet50_notop.h5"} <= set(fetched)
    saved = [call.split()[-1] for call in site.containers.calls() if " save " in call]
    assert saved == [SERVER]
    assert content(bundle) == before


def test_another_call_makes_the_directory_be_as_it_says(bundle):
    bundle_call("create", bundle, "--no-wheels", "--image", IMAGE)
    assert sorted(
        path for path in content(bundle) if not path.startswith(("manifests", "pipelines", "docs"))
    ) == [
        *("README.txt", "SHA256SUMS", "bundle.json", "images/kubegraft-train-1.0.tar"),
    ]
    bundle_call("verify", bundle)


def test_an_image_that_has_changed_is_saved_again(site, bundle):
    site.containers.add("machine", IMAGE, "newer")
    try:
        made = bundle_call("create", bundle, "--no-wheels", "--image", IMAGE)
    finally:
        site.containers.add("machine", IMAGE, "tasks")
    assert made["images"][0]["image_id"] == "sha256:" + hashlib.sha256(b"newer").hexdigest()
    assert "newer" in (bundle / "images" / "kubegraft-train-1.0.tar").read_text()


def test_for_another_python_versions_are_pinned_without_hashes(site, tmp_path):
    made = bundle_call("create", tmp_path / "other", "--no-images", "--python", "3.12")
    assert made["python"] == "3.12"
    assert {"kite-2.0.tar.gz", "owl-1.0-py3-none-any.whl"} <= set(site.fetched())
    damage(tmp_path / "other" / "wheels" / "owl-1.0-py3-none-any.whl")
    again = bundle_call("create", tmp_path / "other", "--no-images", "--python", "3.12")
    assert again["files"] == made["files"]
    assert "owl-1.0-py3-none-any.whl" in site.fetched()


def test_a_package_with_another_hash_is_refused(site, tmp_path):
    path = site.checkout / "docker" / "requirements-cpu.txt"
    text = path.read_text()
    path.write_text(
        "".join(line[:-5] + "0000\n" if "--hash" in line else line for line in text.splitlines(True))
    )
    try:
        code, message = refused("create", tmp_path / "bundle", "--no-images")
    finally:
        path.write_text(text)
    assert code == 8
    assert "could not fetch the packages" in message
    assert "bundle.json" not in content(tmp_path / "bundle")


def test_weights_that_are_not_those_of_keras_are_refused(site, tmp_path):
    original = site.weights.read_bytes()
    site.weights.write_bytes(b"other")
    try:
        code, message = refused(
            "create", tmp_path / "b", "--no-images", "--no-wheels", "--backbone", "resnet50"
        )
    finally:
        site.weights.write_bytes(original)
    assert code == 4
    assert "must be the file that Keras published" in message
    assert not list((tmp_path / "b").glob("weights/*/*.h5"))


def test_weights_in_the_cache_of_keras_are_taken_from_there(site, tmp_path):
    cached = site.root / "keras" / "models" / "resnet50_notop.h5"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(site.weights.read_bytes())
    try:
        bundle_call("create", tmp_path / "b", "--no-images", "--no-wheels", "--backbone", "ResNet50")
    finally:
        cached.unlink()
    assert site.fetched() == []
    assert (tmp_path / "b" / "weights" / "resnet50" / "resnet50_notop.h5").exists()


def damage(path):
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Path.unlink, "is missing"),
        (damage, "has SHA-256"),
        (lambda path: path.write_bytes(b""), "has 0 bytes in place of"),
    ],
    ids=["missing", "damaged", "truncated"],
)
@pytest.mark.parametrize("path", ["images/serving-2.0.tar", "wheels/owl-1.0-py3-none-any.whl"])
def test_a_damaged_bundle_is_named_and_nothing_is_loaded(site, bundle, tmp_path, change, reason, path):
    change(bundle / path)
    for call in (["verify", bundle], ["load", bundle, "--weights-to", tmp_path / "weights"]):
        code, message = refused(*call)
        assert code == 8
        assert f"{path} {reason}" in message
    assert site.containers.calls() == []
    assert not (tmp_path / "weights").exists()


def test_an_index_that_leads_out_of_the_bundle_is_refused(bundle):
    index = json.loads((bundle / "bundle.json").read_text())
    index["files"][0]["path"] = "../../etc/passwd"
    (bundle / "bundle.json").write_text(json.dumps(index))
    code, message = refused("verify", bundle)
    assert code == 8
    assert "leads out of the folder" in message


def test_images_go_into_the_registry_and_a_tag_there_never_moves(site, bundle):
    outcome = bundle_call("load", bundle, "--registry", "inside.test/mirror/")
    names = ["inside.test/mirror/kubegraft-train:1.0", "inside.test/mirror/serving:2.0"]
    assert outcome["images"] == dict(zip([IMAGE, SERVER], names, strict=True))
    assert [site.containers.images("registry")[name] for name in names] == ["tasks", "server"]
    assert f"kubegraft compile --image {names[0]} --output-dir pipelines" in outcome["next"]
    site.containers.calls()
    bundle_call("load", bundle, "--registry", "inside.test/mirror")
    assert not [call for call in site.containers.calls() if " push " in call]


def test_images_go_onto_the_nodes_of_a_kind_cluster(site, bundle):
    bundle_call("load", bundle, "--kind", "testbed")
    assert site.containers.images("nodes") == {IMAGE: "tasks", SERVER: "server"}
    code, message = refused("load", bundle, "--kind", "other")
    assert code == 8
    assert "unknown command" in message


def test_a_dry_run_changes_nothing(site, bundle, tmp_path):
    outcome = bundle_call(
        *("load", bundle, "--registry", "inside.test", "--weights-to", tmp_path / "weights", "--dry-run")
    )
    assert outcome["dry_run"] is True
    assert outcome["images"][SERVER] == "inside.test/serving:2.0"
    assert site.containers.calls() == []
    assert not (tmp_path / "weights").exists()


def test_weights_go_into_a_directory_or_bucket_and_the_next_command_names_them(bundle, object_store):
    target = f"{object_store.folder}/weights"
    outcome = bundle_call("load", bundle, "--kind", "testbed", "--weights-to", target)
    keys = object_store.keys()
    assert "weights/resnet50/resnet50_notop.h5" in keys
    sha256 = hashlib.sha256(b"weights" * 1000).hexdigest()
    flags = f"--backbone resnet50 --weights {target}/resnet50/resnet50_notop.h5 --weights-sha256 {sha256}"
    assert any(flags in command for command in outcome["next"])


def test_the_next_commands_are_ones_that_kubegraft_takes(bundle, tmp_path):
    outcome = bundle_call("load", bundle, "--registry", "inside.test", "--weights-to", tmp_path / "weights")
    commands = [line.split() for line in outcome["next"] if line.startswith("kubegraft ")]
    assert [words[1] for words in commands] == ["compile", "render", "run"]
    for words in commands:
        end = 3 if words[1] == "render" else 2
        known = CliRunner().invoke(main, [*words[1:end], "--help"]).stdout
        assert all(word in known for word in words if word.startswith("--"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["create", "{full}"], 2, "must not exist, be empty, or hold a bundle"),
        (["create", "{new}", "--backbone", "resnet51"], 2, "Did you mean 'resnet50'"),
        (["create", "{new}", "--image", "a/b:latest"], 2, "never moves"),
        (["create", "{new}", "--image", "a/b:1", "--image", "c/b:1"], 2, "one name in a registry"),
        (["create", "{new}", "--image", "a/b:1", "--no-images"], 2, "exclude each other"),
        (["create", "{new}", "--python", "3.9", "--no-images"], 2, "3.11, 3.12, 3.13"),
        (["create", "{new}", "--target", "gpu", "--no-images"], 2, "must have a list of packages"),
        (["create", "{new}", "--no-wheels", "--container-tool", "dockr"], 9, "must be installed"),
        (["create", "{new}", "--no-wheels", "--image", "a/b:1"], 8, "no such image"),
        (["load", "{new}"], 8, "must hold bundle.json"),
        (["load", "{full}", "--registry", "https://inside.test"], 2, "without a scheme"),
        (["load", "{full}", "--registry", "a", "--kind", "b"], 2, "exclude each other"),
    ],
)
def test_what_can_not_be_is_refused_with_the_reason(site, tmp_path, arguments, code, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").touch()
    places = {"full": tmp_path / "full", "new": tmp_path / "new"}
    actual, text = refused(*(argument.format(**places) for argument in arguments))
    assert message in text
    assert actual == code


def test_without_a_checkout_wheels_are_refused_and_the_rest_goes(made, monkeypatch, tmp_path):
    packaged = tmp_path / "transfer_learning.yaml"
    packaged.write_text("# compiled\n")
    monkeypatch.setattr(create, "find_checkout", lambda: None)
    monkeypatch.setattr(create, "packaged_pipeline", lambda: packaged)
    code, message = refused("create", tmp_path / "bundle", "--no-images")
    assert code == 9
    assert "--no-wheels" in message
    made = bundle_call("create", tmp_path / "bundle", "--no-images", "--no-wheels")
    assert {file["path"] for file in made["files"]} == {"README.txt", "pipelines/transfer_learning.yaml"}


def test_wheels_are_zip_files_with_the_one_content_each_time(bundle):
    """Our own wheel is built at a fixed time, so that a bundle made again is the same."""
    with zipfile.ZipFile(bundle / "wheels" / "kubegraft-0.1.0-py3-none-any.whl") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}

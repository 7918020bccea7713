import copy
import dataclasses
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kubegraft.kfp_client.package import PipelinePackage
from kubegraft.processes import WORK_DIR_VARIABLE
from kubegraft.run_config import RunConfig, pipeline_parameters
from pipelines._parameters import CLUSTER_PARAMETERS
from pipelines.compile import COMPILED_DIR, check, compile_all, main

ROOT = Path(__file__).resolve().parents[2]


FILES = {"cpu": "transfer_learning.yaml", "gpu": "transfer_learning_gpu.yaml"}


def load(path: Path) -> dict:
    """A pipeline, and its platform-specific part."""
    spec, platform = yaml.safe_load_all(path.read_text())
    return {"spec": spec, "executors": platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]}


@pytest.fixture(scope="module")
def compiled() -> dict:
    return load(COMPILED_DIR / FILES["cpu"])


@pytest.fixture(scope="module")
def compiled_for_gpus() -> dict:
    return load(COMPILED_DIR / FILES["gpu"])


def parameters(compiled: dict) -> dict:
    return compiled["spec"]["root"]["inputDefinitions"]["parameters"]


def containers(compiled: dict) -> dict:
    return {name: e["container"] for name, e in compiled["spec"]["deploymentSpec"]["executors"].items()}


def test_committed_files_are_what_the_source_compiles_to(capsys):
    assert check(COMPILED_DIR) == 0, capsys.readouterr().out


def test_check_works_from_another_directory_and_finds_a_difference(tmp_path):
    command = [sys.executable, str(ROOT / "pipelines" / "compile.py"), "--check"]
    assert (
        subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False).returncode == 0
    )
    shutil.copytree(COMPILED_DIR, tmp_path / "compiled")
    (tmp_path / "compiled" / "transfer_learning.yaml").write_text("stale: true\n")
    stale = subprocess.run(
        [*command, "--output-dir", "compiled"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert stale.returncode == 1
    assert "make compile" in stale.stdout
    assert (tmp_path / "compiled" / "transfer_learning.yaml").read_text() == "stale: true\n"


def test_compiling_twice_gives_the_same_bytes(tmp_path, capsys):
    compile_all(tmp_path / "a")
    compile_all(tmp_path / "b")
    for name in FILES.values():
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_parameters_and_defaults_are_those_of_the_config(compiled):
    found = {
        name: p.get("defaultValue")
        for name, p in parameters(compiled).items()
        if name not in CLUSTER_PARAMETERS
    }
    assert found == pipeline_parameters(RunConfig())


def test_every_parameter_reads_well_in_the_ui(compiled):
    for name, parameter in parameters(compiled).items():
        assert len(parameter["description"]) > 20, name
        assert parameter["isOptional"], f"{name} has no default"


def test_the_digest_reaches_every_later_task(compiled):
    tasks = compiled["spec"]["root"]["dag"]["tasks"]
    for name in tasks.keys() - {"check-images", "ingest"}:
        source = tasks[name]["inputs"]["parameters"]["dataset_digest"]["taskOutputParameter"]
        assert source == {"outputParameterKey": "dataset_digest", "producerTask": "ingest"}


@pytest.mark.parametrize("name", ["num_blocks", "unfreeze_fraction"])
def test_the_head_knows_where_fine_tuning_will_cut(compiled, name):
    tasks = compiled["spec"]["root"]["dag"]["tasks"]
    for task in ("train-head", "fine-tune"):
        assert tasks[task]["inputs"]["parameters"][name] == {"componentInputParameter": name}


def test_the_look_at_the_images_alone_is_never_answered_from_the_cache(compiled):
    tasks = compiled["spec"]["root"]["dag"]["tasks"]
    cached = {name for name, task in tasks.items() if task["cachingOptions"].get("enableCache")}
    assert cached == tasks.keys() - {"check-images"}


def test_no_task_reads_an_artifact_of_a_task_that_always_runs(compiled):
    """KFP's cache knows an artifact by an id that each run of its task makes anew."""
    tasks = compiled["spec"]["root"]["dag"]["tasks"]
    for task in tasks.values():
        artifacts = task["inputs"].get("artifacts", {}).values()
        assert "check-images" not in {one["taskOutputArtifact"]["producerTask"] for one in artifacts}
    digest = tasks["ingest"]["inputs"]["parameters"]["images_digest"]["taskOutputParameter"]
    assert digest == {"outputParameterKey": "images_digest", "producerTask": "check-images"}


def test_every_container_is_bounded_and_not_root(compiled):
    for name, container in containers(compiled).items():
        assert {"resourceCpuRequest", "resourceCpuLimit", "resourceMemoryRequest", "resourceMemoryLimit"} <= (
            container["resources"].keys()
        ), name
        assert compiled["executors"][name]["securityContext"]["runAsNonRoot"] is True
        assert "latest" not in container["image"]
        assert "pip install" not in str(container["command"])


def test_accelerators_are_parameters_of_both_training_tasks(compiled):
    with_accelerators = {
        name for name, container in containers(compiled).items() if "accelerator" in container["resources"]
    }
    assert with_accelerators == {"exec-train-head", "exec-fine-tune"}
    for name in with_accelerators:
        executor = compiled["executors"][name]
        assert executor["tolerations"]
        assert executor["nodeSelector"]
        assert {"mountPath": "/dev/shm", "medium": "Memory"}.items() <= executor["emptyDirMounts"][-1].items()


def test_the_gpu_profile_differs_in_what_it_is_for_and_in_nothing_else(compiled, compiled_for_gpus):
    cpu, gpu = copy.deepcopy(compiled), copy.deepcopy(compiled_for_gpus)
    images = {name: container["image"] for name, container in containers(gpu).items()}
    training = {"exec-train-head", "exec-fine-tune"}
    assert {name for name, image in images.items() if "kubegraft-train-gpu:" in image} == training
    assert {name for name, image in images.items() if "kubegraft-train:" in image} == images.keys() - training
    assert parameters(gpu)["accelerator_count"].pop("defaultValue") == 1
    assert parameters(gpu)["tolerations"].pop("defaultValue") == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    for changed in (cpu, gpu):
        for name in ("accelerator_count", "tolerations"):
            parameters(changed)[name].pop("defaultValue", None)
        for container in containers(changed).values():
            container.pop("image")
        changed["spec"].pop("pipelineInfo")
    assert cpu == gpu
    assert compiled["spec"]["pipelineInfo"]["name"] != compiled_for_gpus["spec"]["pipelineInfo"]["name"]


def test_only_with_a_claim_does_work_outlive_its_pod(compiled, tmp_path, capsys):
    assert not any("pvcMount" in executor for executor in compiled["executors"].values())
    assert main(["--work-claim", "results", "--output-dir", str(tmp_path), "--profile", "cpu"]) == 0
    claimed = load(tmp_path / FILES["cpu"])
    for name, container in containers(claimed).items():
        (mount,) = claimed["executors"][name]["pvcMount"]
        assert (mount["constant"], mount["mountPath"]) == ("results", "/workspace")
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        assert variables == {
            WORK_DIR_VARIABLE: "/workspace",
            "KUBEGRAFT_CACHE": "/workspace/cache",
            "KUBEGRAFT_CACHE_BUDGET": "auto",
        }
    text = (COMPILED_DIR / FILES["cpu"]).read_text()
    (tmp_path / "edited.yaml").write_text(PipelinePackage(text).with_work_claim("results").text)
    assert load(tmp_path / "edited.yaml") == claimed


def test_credentials_come_from_a_secret_by_its_name(compiled, tmp_path, capsys):
    flags = ["--secret", "team-s3", "--image", "a/b:1"]  # an image is compiled in a process of its own
    assert main([*flags, "--output-dir", str(tmp_path), "--profile", "cpu"]) == 0
    secretive = load(tmp_path / FILES["cpu"])
    for executor in secretive["executors"].values():
        (variables,) = executor["secretAsEnv"]
        assert variables["secretName"] == "team-s3"
        assert {"envVar": "AWS_SECRET_ACCESS_KEY", "secretKey": "AWS_SECRET_ACCESS_KEY"} in variables[
            "keyToEnv"
        ]
    package = PipelinePackage((COMPILED_DIR / FILES["cpu"]).read_text()).with_image(
        image="a/b:1", registry=""
    )
    (tmp_path / "edited.yaml").write_text(package.with_secret("team-s3").text)
    assert load(tmp_path / "edited.yaml") == secretive


def test_nodes_can_be_chosen_when_compiling(compiled_for_gpus, tmp_path, capsys):
    assert main(["--node-selector", "pool=gpu", "--output-dir", str(tmp_path), "--profile", "gpu"]) == 0
    assert parameters(load(tmp_path / FILES["gpu"]))["node_selector"]["defaultValue"] == {"pool": "gpu"}
    assert not (tmp_path / FILES["cpu"]).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile", "gpu", "--image", "registry.example/own:1"], "--gpu-image"),
        (["--work-claim", "No Claim"], "name that an object"),
        (["--secret", "AKID/SECRET"], "name that an object"),
        (["--node-selector", "pool"], "LABEL=VALUE"),
    ],
)
def test_what_can_not_be_compiled_is_said(flags, message, tmp_path, capfd):
    command = [sys.executable, str(ROOT / "pipelines" / "compile.py"), *flags, "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_every_task_knows_its_run(compiled):
    for executor in compiled["executors"].values():
        (variable,) = executor["fieldPathAsEnv"]
        assert variable == {"name": "KUBEGRAFT_RUN_NAME", "fieldPath": "metadata.labels['pipeline/runid']"}


def test_lost_nodes_are_retried(compiled):
    for task in compiled["spec"]["root"]["dag"]["tasks"].values():
        assert task["retryPolicy"]["maxRetryCount"] == 2


def test_the_signature_has_no_parameter_twice():
    from pipelines.transfer_learning import transfer_learning

    names = list(inspect.signature(transfer_learning.pipeline_func).parameters)
    assert len(names) == len(set(names))
    assert "source" in names
    assert dataclasses.is_dataclass(RunConfig)

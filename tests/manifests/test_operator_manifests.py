"""What installs the operator, its samples, and the runtime for Kubeflow Trainer."""

import json
from pathlib import Path

import pytest
import yaml

from components._images import TRAIN_IMAGE
from kubegraft.controller.jobset import PORT
from tests.manifests.test_manifests import (
    CUSTOM_KINDS,
    assert_fits_schemas,
    assert_restricted,
    one_of,
    run_checkov,
)
from tests.operator_manifests import allowed

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
INSTALLATIONS = ("operator", "operator/one-namespace")
CUSTOM = {"TransferJob", "TransferSchedule", "ClusterTrainingRuntime", "CustomResourceDefinition"}
DEFINED_BY_OTHERS = CUSTOM_KINDS | CUSTOM
installation = pytest.mark.parametrize("directory", INSTALLATIONS)


@pytest.mark.parametrize("directory", [*INSTALLATIONS, "crds"])
def test_every_object_fits_the_schemas_of_all_supported_kubernetes_versions(directory, build):
    objects = build(MANIFESTS / directory)
    assert objects
    for one in objects:
        if one["kind"] not in DEFINED_BY_OTHERS:
            assert_fits_schemas(json.dumps(one, sort_keys=True))


@installation
def test_the_operator_s_pod_is_restricted_bounded_and_probed(directory, build):
    spec = one_of(build(MANIFESTS / directory), "Deployment")["spec"]["template"]["spec"]
    assert spec["serviceAccountName"] == "kubegraft-operator"
    assert_restricted({**spec, "automountServiceAccountToken": False})  # the one pod that needs a token
    (container,) = spec["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["image"] == TRAIN_IMAGE.replace("kubegraft-train", "kubegraft-operator")
    (image,) = [v["value"] for v in container["env"] if v["name"] == "KUBEGRAFT_TRAIN_IMAGE"]
    assert image == TRAIN_IMAGE


@installation
def test_the_command_line_knows_the_operator_s_arguments(directory, build):
    import click

    from kubegraft.cli.operator import operator, run

    (container,) = one_of(build(MANIFESTS / directory), "Deployment")["spec"]["template"]["spec"][
        "containers"
    ]
    group, command, *arguments = container["args"]
    assert (group, operator.commands[command]) == ("operator", run)
    values, rest, _ = run.make_parser(click.Context(run)).parse_args(list(arguments))
    assert not rest
    assert values.get("namespace", "") == ("" if directory == "operator" else "kubegraft")


def test_in_one_namespace_the_same_is_allowed_there_and_nothing_elsewhere(build):
    objects = build(MANIFESTS / "operator/one-namespace")
    assert not [one for one in objects if one["kind"].startswith("ClusterRole")]
    assert {one["metadata"]["namespace"] for one in objects} == {"kubegraft"}
    everywhere = one_of(build(MANIFESTS / "operator"), "ClusterRole", "kubegraft-operator")
    assert allowed([one_of(objects, "Role", "kubegraft-operator")]) == allowed([everywhere])


@installation
def test_accounts_and_roles_that_are_bound_are_there(directory, build):
    objects = build(MANIFESTS / directory)
    there = {(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in objects}
    bindings = [one for one in objects if one["kind"].endswith("Binding")]
    assert bindings
    for binding in bindings:
        namespace = binding["metadata"].get("namespace")
        role = binding["roleRef"]
        assert (role["kind"], namespace if role["kind"] == "Role" else None, role["name"]) in there
        for subject in binding["subjects"]:
            assert (subject["kind"], subject.get("namespace", namespace), subject["name"]) in there


def test_nobody_may_use_wildcards_or_read_secrets(build):
    for role in (one for one in build(MANIFESTS / "operator") if one["kind"] in ("Role", "ClusterRole")):
        for verb, group, resource in allowed([role]):
            assert "*" not in (verb, group, resource)
            assert resource != "secrets"


def test_the_installation_defines_both_resources(build):
    definitions = [one for one in build(MANIFESTS / "operator") if one["kind"] == "CustomResourceDefinition"]
    assert {one["spec"]["names"]["kind"] for one in definitions} == {"TransferJob", "TransferSchedule"}
    for one in definitions:
        (version,) = one["spec"]["versions"]
        assert version["subresources"] == {"status": {}}


def documents(path: str) -> list[dict]:
    return list(yaml.safe_load_all((MANIFESTS / path).read_text(encoding="utf-8")))


def test_the_loader_is_restricted_and_what_it_names_is_there(build):
    objects = documents("samples/loader.yaml")
    job = one_of(objects, "Job")
    assert_fits_schemas(json.dumps(job, sort_keys=True))
    spec = job["spec"]["template"]["spec"]
    assert_restricted(spec)
    overlay = build(MANIFESTS / "overlays/generic")
    names = {(one["kind"], one["metadata"]["name"]) for one in [*overlay, *objects]}
    assert ("ServiceAccount", spec["serviceAccountName"]) in names
    assert ("PersistentVolumeClaim", spec["volumes"][0]["persistentVolumeClaim"]["claimName"]) in names
    assert ("ConfigMap", spec["volumes"][1]["configMap"]["name"]) in names
    assert spec["containers"][0]["image"] == TRAIN_IMAGE


def test_what_the_loader_loads_is_what_the_samples_train_on():
    script = one_of(documents("samples/loader.yaml"), "ConfigMap")["data"]["kubegraft-load"]
    (job,), (schedule,) = documents("samples/transferjob.yaml"), documents("samples/transferschedule.yaml")
    source = job["spec"]["ingest"]["source"]
    assert f'"{source}"' in script
    assert schedule["spec"]["template"]["spec"]["ingest"]["source"] == source


def test_the_loader_s_script_replaces_photographs_all_at_once(tmp_path):
    import subprocess
    import sys
    import tarfile

    script = one_of(documents("samples/loader.yaml"), "ConfigMap")["data"]["kubegraft-load"]
    script = script.replace("/artifacts", str(tmp_path / "artifacts"))
    for name in ("first", "second"):
        folder = tmp_path / name / "class"
        folder.mkdir(parents=True)
        (folder / f"{name}.jpg").write_text(name)
        with tarfile.open(tmp_path / "tar", "w") as tar:
            tar.add(tmp_path / name, ".")
        with (tmp_path / "tar").open("rb") as file:
            command = [sys.executable, "-c", script]
            done = subprocess.run(command, stdin=file, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("1 files in")
        target = tmp_path / "artifacts/data/photographs"
        assert [path.name for path in target.rglob("*.jpg")] == [f"{name}.jpg"]
        assert target.with_suffix(".loaded").exists()


def runtime(build) -> dict:
    return one_of(build(MANIFESTS / "trainer"), "ClusterTrainingRuntime")


def test_the_trainer_s_runtime_has_the_stages_of_a_job_and_restricted_pods(build):
    found = runtime(build)
    policy = found["spec"]["mlPolicy"]
    assert policy.keys() == {"numNodes", "torch"}  # at most one policy, says its definition
    jobs = found["spec"]["template"]["spec"]["replicatedJobs"]
    assert [job["name"] for job in jobs] == ["prepare", "node", "finish"]
    assert [job.get("dependsOn") for job in jobs][1:] == [
        [{"name": "prepare", "status": "Complete"}],
        [{"name": "node", "status": "Complete"}],
    ]
    steps = [job["template"].get("metadata", {}).get("labels", {}) for job in jobs]
    assert [step.get("trainer.kubeflow.org/trainjob-ancestor-step") for step in steps] == [
        None,
        "trainer",
        None,
    ]
    for job in jobs:
        spec = job["template"]["spec"]["template"]["spec"]
        assert_restricted(spec)
        (container,) = spec["containers"]
        assert container["name"] == "node"  # the name that Trainer knows
        assert container["image"] == TRAIN_IMAGE


def test_the_trainer_s_workers_find_each_other(build, monkeypatch):
    import os

    jobs = runtime(build)["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = jobs[1]["template"]["spec"]["template"]["spec"]["containers"]
    program, called = container["command"][2], []
    monkeypatch.setattr(os, "execvp", lambda *arguments: called.append(arguments))
    monkeypatch.setenv("JOB_NAME", "signs")
    monkeypatch.setenv("PET_NNODES", "3")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    monkeypatch.setattr("sys.argv", ["-c", "--config=x"])
    monkeypatch.delenv("TF_CONFIG", raising=False)
    exec(compile(program, "runtime", "exec"), {})
    found = json.loads(os.environ.pop("TF_CONFIG"))
    assert found["task"] == {"type": "worker", "index": 2}
    assert found["cluster"]["worker"] == [f"signs-node-0-{index}.signs:{PORT}" for index in range(3)]
    assert called == [("kubegraft", ["kubegraft", "job", "train", "--config=x"])]


@installation
def test_checkov_finds_nothing_that_a_file_does_not_argue(directory, build_yaml, checkov, tmp_path):
    (tmp_path / "operator.yaml").write_text(build_yaml(MANIFESTS / directory))
    run_checkov(checkov, "kubernetes", "--directory", tmp_path)

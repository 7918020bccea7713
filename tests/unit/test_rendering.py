"""Rendered manifests, validated against the schemas of the Kubernetes versions that are supported."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from kubegraft import __version__, errors
from kubegraft.cli import main
from kubegraft.config_file import load_run_config
from kubegraft.errors import ConfigError
from kubegraft.rendering.pods import Setting, scaled

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES_VERSIONS = ("1.30", "1.33", "1.36")
SCHEMALESS = {"InferenceService"}  # KServe's own kind
CRON = ("--cron", "0 3 * * *")
COMMANDS = {
    "job": ["job"],
    "job with everything": [
        *("job", "gs://bucket/photos", "--namespace", "team", "--accelerator-count", "2", "--secret", "keys"),
        *("--node-selector", "pool=gpu", "--toleration", "nvidia.com/gpu:NoSchedule", "--cpu", "6"),
    ],
    "job to a bucket": ["job", "--publish", "s3://bucket/out", "--claim", ""],
    "cronjob": ["cronjob", *CRON, "--time-zone", "Europe/Berlin"],
    "serving": ["serving"],
    "serving by KServe": ["serving", "--server", "kserve"],
}


def render(*arguments):
    result = CliRunner().invoke(main, ["render", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


def by_kind(manifests):
    return {manifest["kind"]: manifest for manifest in manifests}


def pod_of(manifest):
    spec = manifest["spec"]
    spec = spec.get("jobTemplate", {}).get("spec", spec)
    return spec["predictor"] if "predictor" in spec else spec["template"]["spec"]


@pytest.fixture(params=COMMANDS.values(), ids=COMMANDS)
def rendered(request):
    return render(*request.param)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_takes_what_is_rendered(rendered, version):
    for manifest in rendered:
        if manifest["kind"] not in SCHEMALESS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_pod_security_restricted_admits_every_pod(rendered):
    (manifest,) = [m for m in rendered if m["kind"] not in ("ConfigMap", "Service")]
    pod = pod_of(manifest)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all(
        volume.keys() <= {"name", "persistentVolumeClaim", "emptyDir", "configMap"}
        for volume in pod["volumes"]
    )
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"]["requests"].keys()
        assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"]["limits"].keys()
        assert not container["image"].endswith(":latest")


@pytest.mark.parametrize(
    ("command", "sample"),
    [
        (["job", "--name", "kubegraft-run"], "job/job.yaml"),
        (["cronjob", *CRON, "--name", "kubegraft-retrain"], "cronjob/cronjob.yaml"),
        (["serving", "--run", "run"], "tf-serving/serving.yaml"),
        (["serving", "--run", "run", "--server", "kserve"], "kserve/inference-service.yaml"),
    ],
    ids=["job", "cronjob", "serving", "kserve"],
)
def test_pods_are_those_of_the_samples(command, sample):
    """But for names, and the config, which a sample takes from the ConfigMap of manifests/base."""

    def comparable(manifest):
        pod = pod_of(manifest)
        (container,) = pod["containers"]
        container.pop("args")
        for values in (*pod["volumes"], *container["volumeMounts"]):
            values["name"] = values["name"].replace("defaults", "config")
            values.pop("configMap", None)
        return {key: pod[key] for key in ("securityContext", "containers", "volumes", "serviceAccountName")}

    written = next(iter(yaml.safe_load_all((ROOT / "manifests" / "samples" / sample).read_text())))
    (ours,) = [m for m in render(*command) if m["kind"] == written["kind"]]
    assert comparable(ours) == comparable(written)


def test_the_config_travels_with_the_job(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 5\nhead:\n  backbone: mobilenet_v2\n  hidden_units: [64, 32]\n")
    objects = by_kind(render("job", "s3://bucket/photos", "--config", path, "--num-blocks", "2"))
    path.write_text(objects["ConfigMap"]["data"]["run.yaml"])
    config = load_run_config(path)
    assert (config.seed, config.head.backbone, config.fine_tune.num_blocks) == (5, "mobilenet_v2", 2)
    assert config.ingest.source == "s3://bucket/photos"
    pod = pod_of(objects["Job"])
    assert {"name": "config", "configMap": {"name": objects["ConfigMap"]["metadata"]["name"]}} in pod[
        "volumes"
    ]
    assert pod["containers"][0]["args"] == [
        "run",
        *("--config", "/etc/kubegraft/run.yaml", "--output", "/workspace/kubegraft"),
    ]


def test_the_arguments_of_a_container_are_those_of_the_command_line():
    for command in (["job"], ["cronjob", *CRON], ["job", "--publish", "gs://b/o"]):
        manifest = render(*command)[-1]
        arguments = pod_of(manifest)["containers"][0]["args"]
        known = CliRunner().invoke(main, [arguments[0], "--help"]).stdout
        for flag in arguments:
            if flag.startswith("--"):
                assert re.search(rf"{flag}\b", known), flag


def test_the_same_call_renders_the_same_and_another_config_another_job():
    names = [by_kind(render("job", "--seed", seed))["Job"]["metadata"]["name"] for seed in (1, 1, 2)]
    assert names[0] == names[1] != names[2]


def test_a_cronjob_keeps_its_name_and_runs_only_if_changed():
    first, second = (by_kind(render("cronjob", *CRON, "--seed", seed)) for seed in (1, 2))
    assert first["CronJob"]["metadata"]["name"] == second["CronJob"]["metadata"]["name"] == "kubegraft"
    assert first["ConfigMap"]["metadata"]["name"] != second["ConfigMap"]["metadata"]["name"]
    assert "--if-changed" in pod_of(first["CronJob"])["containers"][0]["args"]
    assert first["CronJob"]["spec"]["concurrencyPolicy"] == "Forbid"


def test_exit_codes_that_another_try_cant_mend_fail_the_job():
    (rule, disruption) = by_kind(render("job"))["Job"]["spec"]["podFailurePolicy"]["rules"]
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.KubegraftError)]
    retried = {kind.exit_code for kind in kinds if kind.retryable} | {1}
    assert not retried & set(rule["onExitCodes"]["values"])
    assert {2, 3, 9} <= set(rule["onExitCodes"]["values"])
    assert disruption["action"] == "Ignore"


def test_accelerators_reach_the_pod():
    pod = pod_of(by_kind(render(*COMMANDS["job with everything"]))["Job"])
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert {"name": "KUBEGRAFT_REQUIRE_ACCELERATORS", "value": "2"} in container["env"]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert container["resources"]["requests"]["cpu"] == "1500m"


def test_with_a_bucket_no_volume_is_needed():
    pod = pod_of(by_kind(render(*COMMANDS["job to a bucket"]))["Job"])
    assert pod["volumes"][0] == {"name": "work", "emptyDir": {"sizeLimit": "8Gi"}}
    assert pod["containers"][0]["args"][-2:] == ["--publish", "s3://bucket/out"]


def test_the_image_is_the_pipelines_or_the_one_given(monkeypatch):
    def image(*flags):
        return pod_of(render("job", *flags)[-1])["containers"][0]["image"]

    released = f"kubegraft-train:{__version__}"
    assert image() == f"ghcr.io/kubegraft/{released}"
    for_gpus = f"kubegraft-train-gpu:{__version__}"
    assert image("--accelerator-count", "1") == f"ghcr.io/kubegraft/{for_gpus}"
    assert image("--accelerator-count", "1", "--registry", "r.example") == f"r.example/{for_gpus}"
    assert image("--accelerator-count", "1", "--image", "a:1") == "a:1"
    assert image("--registry", "registry.example/team") == f"registry.example/team/{released}"
    monkeypatch.setenv("KUBEGRAFT_REGISTRY", "registry.example")
    assert image() == f"registry.example/{released}"
    monkeypatch.setenv("KUBEGRAFT_TRAIN_IMAGE", "a/b:1")
    assert image() == "a/b:1"


def test_the_service_finds_the_servers_pods():
    objects = by_kind(render("serving", "--name", "owls"))
    selector = objects["Service"]["spec"]["selector"]
    assert selector.items() <= objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert selector == objects["Deployment"]["spec"]["selector"]["matchLabels"]
    names = {port["name"] for port in pod_of(objects["Deployment"])["containers"][0]["ports"]}
    assert {port["targetPort"] for port in objects["Service"]["spec"]["ports"]} == names


def test_it_is_written_to_a_file(tmp_path):
    path = tmp_path / "job.yaml"
    result = CliRunner().invoke(main, ["render", "job", "--output", str(path)])
    assert result.stdout == f"{path}\n"
    assert [m["kind"] for m in yaml.safe_load_all(path.read_text())] == ["ConfigMap", "Job"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["job", "photos"], "absolute path in the pod"),
        (["job", "--name", "Owls"], "lower-case"),
        (["job", "--memory", "lots"], "quantity"),
        (["job", "--image", "x:latest"], "never moves"),
        (["job", "--claim", ""], "where results stay"),
        (["job", "--toleration", "a:b"], "effect"),
        (["cronjob", "--cron", "0 0 3 * * *"], "five fields"),
        (["cronjob", *CRON, "--time-zone", "Europe/Berlinn"], "Did you mean 'Europe/Berlin'"),
        (["serving", "--image", "tensorflow/serving"], "never moves"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(arguments, message):
    result = CliRunner().invoke(main, ["render", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("quantity", "fraction", "expected"),
    [
        ("4", 0.25, "1"),
        ("6", 0.25, "1500m"),
        ("500m", 0.5, "250m"),
        ("8Gi", 0.5, "4Gi"),
        ("3Gi", 0.5, "1536Mi"),
    ],
)
def test_parts_of_quantities(quantity, fraction, expected):
    assert scaled(quantity, fraction) == expected


def test_names_become_labels_so_they_are_short():
    with pytest.raises(ConfigError, match="at most 40"):
        Setting(name="a" * 41, image="x:1")

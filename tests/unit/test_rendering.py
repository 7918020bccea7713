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
from kubegraft.storage import publish_tree

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
    "serving by kubegraft": ["serving", "--server", "kubegraft"],
    "serving from a bucket by kubegraft": ["serving", "--model", "gs://bucket/owls", "--server", "kubegraft"],
    "serving from a bucket": ["serving", "--model", "gs://bucket/owls", "--secret", "keys"],
    "serving from a bucket where there is no volume": ["serving", "--model", "gs://b/owls", "--claim", ""],
    "serving from a bucket by KServe": ["serving", "--model", "s3://bucket/owls", "--server", "kserve"],
    "reader": ["reader", "--namespace", "team"],
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
    if manifest["kind"] == "Pod":
        return spec
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
    (manifest,) = [m for m in rendered if m["kind"] not in ("ConfigMap", "Service", "NetworkPolicy")]
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
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
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


@pytest.mark.parametrize("cron", ["*/5 0-6 1,15 JAN-mar sun", "@daily"])
def test_a_cronjob_takes_what_kubernetes_reads(cron):
    assert by_kind(render("cronjob", "--cron", cron))["CronJob"]["spec"]["schedule"] == cron


def test_metrics_are_served_where_they_are_asked_for():
    def container(*flags):
        return pod_of(by_kind(render("job", *flags))["Job"])["containers"][0]

    assert "ports" not in container()
    asked = container("--metrics")
    (port,) = asked["ports"]
    assert {"name": "KUBEGRAFT_METRICS_PORT", "value": str(port["containerPort"])} in asked["env"]
    policies = yaml.safe_load_all((ROOT / "manifests/base/network-policies.yaml").read_text())
    (opened,) = [one["spec"] for one in policies if one["metadata"]["name"] == "allow-metrics"]
    assert opened["ingress"][0]["ports"] == [{"protocol": "TCP", "port": port["containerPort"]}]


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
    assert image("--registry", "other.example") == "other.example/b:1"
    assert image("--image", "c:1") == "c:1"
    assert image("--accelerator-count", "1", "--image", "c:1") == "c:1"
    result = CliRunner().invoke(main, ["render", "job", "--accelerator-count", "1"])
    assert result.exit_code == 2
    assert "Give --image" in result.stderr
    for name in ("kubegraft-train:1", "kubegraft-train-gpu:1"):
        monkeypatch.setenv("KUBEGRAFT_TRAIN_IMAGE", f"a/{name}")
        assert image("--accelerator-count", "1") == "a/kubegraft-train-gpu:1"
    monkeypatch.setenv("KUBEGRAFT_TRAIN_GPU_IMAGE", "d:1")
    assert image("--accelerator-count", "1") == "d:1"


def test_the_service_finds_the_servers_pods():
    objects = by_kind(render("serving", "--name", "owls"))
    selector = objects["Service"]["spec"]["selector"]
    assert selector.items() <= objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert selector == objects["Deployment"]["spec"]["selector"]["matchLabels"]
    names = {port["name"] for port in pod_of(objects["Deployment"])["containers"][0]["ports"]}
    assert {port["targetPort"] for port in objects["Service"]["spec"]["ports"]} == names


def test_a_server_fetches_its_model_from_a_bucket_before_it_starts():
    objects = by_kind(render("serving", "--name", "owls", "--model", "gs://bucket/run", "--secret", "keys"))
    pod = pod_of(objects["Deployment"])
    (fetch,), (server,) = pod["initContainers"], pod["containers"]
    assert fetch["image"] == f"ghcr.io/kubegraft/kubegraft-train:{__version__}"
    assert fetch["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert "envFrom" not in server
    command, uri, directory, *flags = fetch["args"]
    assert (command, uri) == ("fetch", "gs://bucket/run")
    (source,) = [mount for mount in fetch["volumeMounts"] if mount["name"] == "model"]
    (served,) = [mount for mount in server["volumeMounts"] if mount["name"] == "model"]
    part = flags[flags.index("--only") + 1]
    assert f"{directory}/{part}" == f"{source['mountPath']}/{served['subPath']}"
    assert served["mountPath"] == "/models/owls/1"
    assert "--model_base_path=/models/owls" in server["args"]
    assert not [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]


def test_kubegrafts_own_server_is_in_the_image_of_the_tasks_and_gets_the_proof_with_the_model():
    objects = by_kind(render("serving", "--name", "owls", "--run", "night", "--server", "kubegraft"))
    pod = pod_of(objects["Deployment"])
    (server,) = pod["containers"]
    assert server["image"] == f"ghcr.io/kubegraft/kubegraft-train:{__version__}"
    (mount,) = [mount for mount in server["volumeMounts"] if mount["name"] == "work"]
    assert mount["subPath"] == "night/model"
    command, *arguments = server["args"]
    context = main.get_command(None, command).make_context(command, arguments, resilient_parsing=True)
    assert context.params["name"] == "owls"
    assert context.params["model"] == mount["mountPath"]
    assert pod["terminationGracePeriodSeconds"] > server["lifecycle"]["preStop"]["sleep"]["seconds"] + 25


def test_a_server_that_fetches_may_reach_the_bucket_and_another_may_not():
    assert "NetworkPolicy" not in by_kind(render("serving"))
    for server in ("tf-serving", "kserve"):
        objects = by_kind(render("serving", "--model", "s3://bucket/run", "--server", server))
        policy = objects["NetworkPolicy"]["spec"]
        workload = objects.get("Deployment", objects.get("InferenceService"))["spec"]
        labels = (
            workload["predictor"]["labels"]
            if server == "kserve"
            else workload["template"]["metadata"]["labels"]
        )
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
        tasks = yaml.safe_load_all((ROOT / "manifests/base/network-policies.yaml").read_text())
        (allowed,) = [one["spec"] for one in tasks if one["metadata"]["name"] == "allow-task-egress"]
        assert policy["egress"] == allowed["egress"]


@pytest.mark.parametrize("object_store", ["gs", "s3"], indirect=True)
def test_what_the_server_fetches_is_the_model_that_a_run_published(object_store, tmp_path):
    """The very arguments of the init container, with its folders below the test's."""
    for path in (
        "model/saved_model/saved_model.pb",
        "model/saved_model/variables/v",
        "model/model.keras",
        "run.json",
    ):
        (tmp_path / "outcome" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "outcome" / path).write_text(path)
    publish_tree(tmp_path / "outcome", object_store.folder)
    pod = pod_of(render("serving", "--model", object_store.folder)[0])
    arguments = [
        arg.replace("/fetched", str(tmp_path / "fetched")) for arg in pod["initContainers"][0]["args"]
    ]
    for _ in range(2):  # as after a restart of the node
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.stderr
        served = tmp_path / "fetched" / pod["containers"][0]["volumeMounts"][0]["subPath"]
        assert (served / "saved_model.pb").read_text() == "model/saved_model/saved_model.pb"
        assert not (tmp_path / "fetched" / "published" / "run.json").exists()
        assert [path.name for path in (tmp_path / "fetched").iterdir()] == ["published"]


def test_a_reader_sees_what_a_job_left_and_can_change_nothing():
    job, pod = pod_of(by_kind(render("job"))["Job"]), pod_of(render("reader")[0])
    (container,) = pod["containers"]
    assert container["image"] == job["containers"][0]["image"]
    assert container["volumeMounts"] == [{"name": "work", "mountPath": "/workspace", "readOnly": True}]
    claims = [job["volumes"][0]["persistentVolumeClaim"]["claimName"]]
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]] == claims
    assert pod["activeDeadlineSeconds"] == 3600


def test_it_is_written_to_a_file(tmp_path):
    path = tmp_path / "job.yaml"
    result = CliRunner().invoke(main, ["render", "job", "--output", str(path)])
    assert result.stdout == f"{path}\n"
    assert [m["kind"] for m in yaml.safe_load_all(path.read_text())] == ["ConfigMap", "Job"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["job", "photos"], "absolute path in the pod"),
        (["job", "s3:/photos"], "absolute path in the pod"),
        (["job", "ftp://host/photos"], "must begin with one of"),
        (["job", "https://user:word@host/photos.zip"], "no user name, password or signature"),
        (["job", "https://host/photos.zip?X-Amz-Signature=word"], "no user name, password or signature"),
        (["job", "--weights", "own.weights.h5"], "`weights` must be a URI or an absolute path"),
        (["job", "--backbone", "resnet5"], "Did you mean"),
        (["job", "--publish", "results"], "`publish` must be a gs:// or s3://"),
        (["job", "--publish", "s3://user:word@bucket/results"], "no user name, password or signature"),
        (["job", "--publish", "gs://"], "must name a bucket"),
        (["job", "--claim", "", "--publish", "/workspace/results"], "`publish` must be a gs:// or s3://"),
        (["serving", "--model", "gs://user:word@bucket/run"], "no user name, password or signature"),
        (["job", "--name", "Owls"], "lower-case"),
        (["job", "--memory", "lots"], "quantity"),
        (["job", "--cpu", "0"], "above 0"),
        (["job", "--namespace", "Team"], "`namespace` must be a name"),
        (["job", "--secret", "AWS_KEY"], "`secret` must be a name"),
        (["job", "--image", "a:1", "--registry", "b"], "one of the two"),
        (["serving", "--task-image", "a:1", "--registry", "b"], "one of the two"),
        (["job", "--image", "x:latest"], "never moves"),
        (["job", "--claim", ""], "where results stay"),
        (["reader", "--claim", ""], "Give --claim NAME."),
        (["serving", "--claim", ""], "or --model"),
        (["job", "--toleration", "a:b"], "effect"),
        (["cronjob", "--cron", "0 0 3 * * *"], "five fields"),
        (["cronjob", "--cron", "99 99 * * *"], "minute in 0-59"),
        (["cronjob", "--cron", "@nightly"], "five fields"),
        (["cronjob", *CRON, "--time-zone", "Europe/Berlinn"], "Did you mean 'Europe/Berlin'"),
        (["serving", "--image", "tensorflow/serving"], "never moves"),
        (["serving", "--model", "/workspace/run"], "gs:// or s3:// folder"),
        (["serving", "--model", "gs://b/run", "--run", "owls"], "exclude each other"),
        (["serving", "--model", "gs://b/run", "--task-image", "x"], "never moves"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(arguments, message):
    result = CliRunner().invoke(main, ["render", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "word" not in result.stderr.replace("password", "")


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


@pytest.mark.parametrize("command", ["serving", "reader"])
def test_no_request_is_above_its_limit(command):
    (container,) = pod_of(render(command, "--cpu", "20m", "--memory", "0.03Gi")[0])["containers"]
    requests, limits = (container["resources"][name] for name in ("requests", "limits"))
    assert (requests["cpu"], requests["memory"]) == (limits["cpu"], limits["memory"]) == ("20m", "0.03Gi")


def test_objects_that_others_made_may_have_any_name():
    claim = "datasets.of-the-team-that-takes-photographs-of-owls"
    assert pod_of(by_kind(render("job", "--claim", claim))["Job"])["volumes"][0]["persistentVolumeClaim"] == {
        "claimName": claim
    }


def test_names_become_labels_so_they_are_short():
    with pytest.raises(ConfigError, match="at most 40"):
        Setting(name="a" * 41, image="x:1")

"""Every overlay, sample and component, built by kustomize, is what a cluster and its administrators accept."""

import functools
import json
import subprocess
from pathlib import Path

import click
import kubernetes_validate
import pytest
import yaml

from components._images import TRAIN_IMAGE
from kubegraft import errors
from pipelines._placement import USER

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
OVERLAYS = sorted(path.parent for path in MANIFESTS.glob("overlays/*/kustomization.yaml"))
SAMPLES = sorted(path.parent for path in MANIFESTS.glob("samples/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent for path in MANIFESTS.glob("components/*/kustomization.yaml"))
TASKS = ("job", "cronjob")
# docs/operations.md names the same.
KUBERNETES_VERSIONS = [f"1.{minor}" for minor in range(31, 38)]
# Their schemas come with the operators that define them.
CUSTOM_KINDS = {"LocalQueue", "InferenceService"}

named = pytest.mark.parametrize
directory_ids = {"ids": lambda path: f"{path.parent.name}/{path.name}"}


def with_component(tmp_path, component: Path, *resources: Path) -> Path:
    """Write an overlay as a user would: some resources, and a component on top."""
    out = tmp_path / "overlay"
    out.mkdir()

    def relative(path):
        return str(Path(*[".."] * (len(out.resolve().parts) - 1), *path.resolve().parts[1:]))

    document = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [relative(path) for path in resources],
        "components": [relative(component)],
    }
    (out / "kustomization.yaml").write_text(yaml.safe_dump(document))
    return out


def pod_specs(objects):
    for one in objects:
        spec = one.get("spec", {})
        if one["kind"] == "InferenceService":
            yield one, spec["predictor"]
        elif one["kind"] == "CronJob":
            yield one, spec["jobTemplate"]["spec"]["template"]["spec"]
        elif "template" in spec:
            yield one, spec["template"]["spec"]


def pod_labels(one):
    spec = one["spec"]
    if one["kind"] == "InferenceService":
        return spec["predictor"]["labels"]
    return spec.get("jobTemplate", {"spec": spec})["spec"]["template"]["metadata"]["labels"]


def one_of(objects, kind, name=None):
    (found,) = [o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    return found


def assert_valid(objects):
    for one in objects:
        if one["kind"] not in CUSTOM_KINDS:
            assert_fits_schemas(json.dumps(one, sort_keys=True))


@functools.cache  # overlays and samples share most of their objects
def assert_fits_schemas(document: str) -> None:
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(json.loads(document), version, strict=True)


@named("directory", [*OVERLAYS, *SAMPLES], **directory_ids)
def test_every_object_fits_the_schemas_of_all_supported_kubernetes_versions(directory, build):
    assert_valid(build(directory))


@named("sample", TASKS)
@named("component", COMPONENTS, ids=lambda path: path.name)
def test_components_change_tasks_into_valid_ones(component, sample, build, tmp_path):
    overlay = with_component(
        tmp_path, component, MANIFESTS / "overlays/generic", MANIFESTS / "samples" / sample
    )
    plain = build(MANIFESTS / "overlays/generic") + build(MANIFESTS / "samples" / sample)
    objects = build(overlay)
    assert_valid(objects)
    assert objects != plain
    for _, spec in pod_specs(objects):
        assert_restricted(spec)


def test_a_misspelt_field_is_refused(build):
    job = one_of(build(MANIFESTS / "samples/job"), "Job")
    job["spec"]["template"]["spec"]["servicAccountName"] = "typo"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES_VERSIONS[-1], strict=True)


@named("sample", SAMPLES, **directory_ids)
def test_every_pod_is_restricted_and_has_requests_and_limits(sample, build):
    specs = [spec for _, spec in pod_specs(build(sample))]
    assert specs
    for spec in specs:
        assert_restricted(spec)


def assert_restricted(spec):
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == USER
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert spec["automountServiceAccountToken"] is False
    assert all("hostPath" not in volume for volume in spec["volumes"])
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        for part in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][part].keys()
        assert not container["image"].endswith(":latest")
        assert ":" in container["image"]


@named("overlay", OVERLAYS, **directory_ids)
@named("sample", SAMPLES, **directory_ids)
def test_samples_find_in_every_overlay_what_they_name(overlay, sample, build):
    objects = build(overlay)

    def names(kind):
        return {one["metadata"]["name"] for one in objects if one["kind"] == kind}

    for _, spec in pod_specs(build(sample)):
        assert spec["serviceAccountName"] in names("ServiceAccount")
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names("PersistentVolumeClaim")
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names("ConfigMap")


@named("sample", SAMPLES, **directory_ids)
def test_samples_fit_into_the_quota_and_the_limit_range(sample, build):
    base = build(MANIFESTS / "overlays/kind")
    hard = one_of(base, "ResourceQuota")["spec"]["hard"]
    largest = one_of(base, "LimitRange")["spec"]["limits"][0]["max"]
    for _, spec in pod_specs(build(sample)):
        for container in spec["containers"]:
            resources = container["resources"]
            for name in ("cpu", "memory", "ephemeral-storage"):
                assert quantity(resources["limits"][name]) <= quantity(largest[name])
                assert quantity(resources["requests"][name]) <= quantity(hard[f"requests.{name}"])


def quantity(text: str) -> float:
    units = {"m": 1e-3, "Mi": 2**20, "Gi": 2**30}
    unit = next((unit for unit in ("Mi", "Gi", "m") if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)


@named("sample", SAMPLES, **directory_ids)
def test_network_policies_select_the_pods_of_samples(sample, build):
    policies = [o for o in build(MANIFESTS / "overlays/generic") if o["kind"] == "NetworkPolicy"]
    for one, _ in pod_specs(build(sample)):
        labels = pod_labels(one)
        selecting = [
            policy["metadata"]["name"]
            for policy in policies
            if (wanted := policy["spec"]["podSelector"].get("matchLabels"))
            and wanted.items() <= labels.items()
        ]
        assert selecting, f"{one['metadata']['name']} may talk to nobody"


@named("overlay", OVERLAYS, **directory_ids)
def test_an_overlay_denies_traffic_that_it_does_not_name_and_enforces_restricted_pods(overlay, build):
    objects = build(overlay)
    labels = one_of(objects, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    deny = one_of(objects, "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    outside = {"Namespace"}
    for one in objects:
        assert one["kind"] in outside or one["metadata"]["namespace"] == "kubegraft"
        assert one["metadata"]["labels"]["app.kubernetes.io/part-of"] == "kubegraft"


@named("overlay", OVERLAYS, **directory_ids)
def test_tasks_may_ask_the_api_server_for_their_defaults_only(overlay, build):
    objects = build(overlay)
    assert not [one for one in objects if one["kind"].startswith("ClusterRole")]
    (rule,) = one_of(objects, "Role")["rules"]
    assert rule == {
        "apiGroups": [""],
        "resources": ["configmaps"],
        "resourceNames": ["kubegraft-defaults"],
        "verbs": ["get"],
    }
    for account in (one for one in objects if one["kind"] == "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


@named("directory", [*OVERLAYS, *SAMPLES], **directory_ids)
def test_no_secret_is_in_a_manifest(directory, build):
    objects = build(directory)
    assert not [one for one in objects if one["kind"] == "Secret"]
    for _, spec in pod_specs(objects):
        for variable in (v for container in spec["containers"] for v in container.get("env", [])):
            assert not any(word in variable["name"] for word in ("KEY", "SECRET", "TOKEN", "PASSWORD"))


@named("sample", TASKS)
def test_tasks_run_the_image_that_pipelines_name(sample, build):
    for _, spec in pod_specs(build(MANIFESTS / "samples" / sample)):
        assert [container["image"] for container in spec["containers"]] == [TRAIN_IMAGE]


@named("sample", TASKS)
def test_the_command_line_knows_the_arguments_of_tasks(sample, build):
    from kubegraft.cli.run import run

    ((_, spec),) = pod_specs(build(MANIFESTS / "samples" / sample))
    (container,) = spec["containers"]
    command, *arguments = container["args"]
    assert command == "run"
    values, rest, _ = run.make_parser(click.Context(run)).parse_args(list(arguments))
    assert not rest
    assert values["source"] == "sample://digits"
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(Path(values["output"]).is_relative_to(mount) for mount in mounts)


@named("sample", TASKS)
def test_a_job_gives_up_at_once_on_exit_codes_that_another_try_cannot_mend(sample, build):
    """Except 1: whatever ended a stage unexpectedly, want of memory for example, may not do so again."""
    hopeless = {code for code, retryable in exit_codes() if not retryable} - {1}
    ((one, _),) = pod_specs(build(MANIFESTS / "samples" / sample))
    spec = one["spec"].get("jobTemplate", {"spec": one["spec"]})["spec"]
    fail, ignore = spec["podFailurePolicy"]["rules"]
    assert (fail["action"], set(fail["onExitCodes"]["values"])) == ("FailJob", hopeless)
    assert ignore["action"] == "Ignore"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # what a failure policy asks for


def exit_codes():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return {(k.exit_code, k.retryable) for k in kinds if issubclass(k, errors.KubegraftError)}


def test_the_defaults_are_a_config_file_that_runs_accept(build, tmp_path):
    from kubegraft.config_file import load_run_config

    defaults = one_of(build(MANIFESTS / "overlays/generic"), "ConfigMap")["data"]
    assert set(defaults) == {"run.yaml"}
    path = tmp_path / "run.yaml"
    path.write_text(defaults["run.yaml"])
    load_run_config(path)


def test_gpu_tasks_ask_for_a_gpu_tolerate_its_taint_and_have_shared_memory(build, tmp_path):
    overlay = with_component(tmp_path, MANIFESTS / "components/gpu", MANIFESTS / "samples/job")
    ((_, spec),) = pod_specs(build(overlay))
    (container,) = spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "KUBEGRAFT_REQUIRE_ACCELERATORS", "value": "1"} in container["env"]
    assert container["image"] == TRAIN_IMAGE.replace("kubegraft-train", "kubegraft-train-gpu")
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert "/dev/shm" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_components_add_up(build, tmp_path):
    overlay = with_component(tmp_path, MANIFESTS / "components/gpu", MANIFESTS / "samples/cronjob")
    path = overlay / "kustomization.yaml"
    document = yaml.safe_load(path.read_text())
    gpu = document["components"][0]
    document["components"] += [gpu.replace("/gpu", "/s3-secret"), gpu.replace("/gpu", "/kueue-queue")]
    path.write_text(yaml.safe_dump(document))
    objects = build(overlay)
    assert_valid(objects)
    ((cronjob, spec),) = pod_specs(objects)
    assert spec["containers"][0]["envFrom"] == [{"secretRef": {"name": "kubegraft-s3"}}]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    job = cronjob["spec"]["jobTemplate"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "kubegraft"
    assert job["spec"]["suspend"] is True


def test_checkov_finds_nothing_that_a_file_does_not_argue(build_yaml, checkov, tmp_path):
    for directory in (*OVERLAYS, *SAMPLES):
        (tmp_path / f"{directory.name}.yaml").write_text(build_yaml(directory))
    summary = run_checkov(checkov, "kubernetes", "--directory", tmp_path)
    assert summary["passed"] > 100


@named("name", ["train", "operator"])
def test_checkov_accepts_the_dockerfiles(name, checkov):
    run_checkov(checkov, "dockerfile", "--file", MANIFESTS.parent / f"docker/{name}.Dockerfile")


def run_checkov(program, framework, *arguments):
    command = [program, "--framework", framework, "--skip-download", "--output", "json", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    report = json.loads(done.stdout)
    failed = [(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]]
    assert not failed
    for check in report["results"]["skipped_checks"]:
        assert len(check["check_result"]["suppress_comment"]) > 20, "an exception needs its reason"
    return report["summary"]

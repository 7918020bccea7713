"""What the cluster lets in, and what the accounts of tasks may do."""

import copy

import pytest
import yaml

from tests.e2e.conftest import ROOT, run
from tests.e2e.kube import Refused, restricted_pod

ACCOUNT = "system:serviceaccount:kubegraft:kubegraft-task"


def pod_templates():
    """Yield every pod of the samples, as a Pod."""
    for sample in ("job", "cronjob", "tf-serving", "kserve"):
        built = run(["kubectl", "kustomize", str(ROOT / "manifests" / "samples" / sample)])
        for one in yaml.safe_load_all(built):
            spec = one["spec"]
            spec = spec.get("jobTemplate", {"spec": spec})["spec"]
            template = spec.get("template") or ({"spec": spec["predictor"]} if "predictor" in spec else None)
            if template:
                pod = {
                    k: v
                    for k, v in template["spec"].items()
                    if k not in ("minReplicas", "maxReplicas", "labels")
                }
                yield (
                    sample,
                    {
                        "apiVersion": "v1",
                        "kind": "Pod",
                        "metadata": {"name": f"sample-{sample}"},
                        "spec": pod,
                    },
                )


DRY_RUN = ("--dry-run=server",)


@pytest.mark.parametrize("sample", ["job", "cronjob", "tf-serving", "kserve"])
def test_pod_security_restricted_admits_every_pod(cluster, sample):
    assert "created" in cluster.apply(dict(pod_templates())[sample], flags=DRY_RUN)


@pytest.mark.parametrize("sample", ["job", "cronjob", "tf-serving"])
def test_every_controller_is_admitted_without_a_warning(cluster, sample):
    built = run(["kubectl", "kustomize", str(ROOT / "manifests" / "samples" / sample)])
    assert "created" in cluster.kubectl(
        "apply", "--dry-run=server", "--warnings-as-errors", "--filename", "-", content=built.encode()
    )


def broken(**changes):
    pod = copy.deepcopy(restricted_pod("intruder", "kubegraft:0", ["true"]))
    security = pod["spec"]["containers"][0]["securityContext"]
    security.update(changes.pop("security", {}))
    pod["spec"].update(changes)
    return pod


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (broken(security={"privileged": True, "allowPrivilegeEscalation": True}), "privileged"),
        (broken(security={"runAsNonRoot": False, "runAsUser": 0}), "runAsNonRoot"),
        (broken(security={"capabilities": {"add": ["NET_ADMIN"]}}), "capabilities"),
        (broken(hostNetwork=True), "host namespaces"),
        (
            broken(volumes=[{"name": "work", "hostPath": {"path": "/"}}, {"name": "tmp", "emptyDir": {}}]),
            "hostPath",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pod_security_restricted_refuses_what_asks_for_more(cluster, pod, reason):
    with pytest.raises(Refused, match=reason):
        cluster.apply(pod, flags=DRY_RUN)


@pytest.mark.parametrize(
    "arguments",
    [
        ("get", "secrets"),
        ("get", "pods"),
        ("get", "configmaps"),
        ("delete", "jobs", "--all"),
        ("create", "job", "mine", "--image=x"),
        ("exec", "toolbox", "--", "true"),
        ("get", "nodes"),
        ("get", "namespaces"),
        ("get", "secrets", "--all-namespaces"),
        ("create", "token", "kubegraft-serving"),
        ("create", "clusterrolebinding", "mine", "--clusterrole=cluster-admin", f"--user={ACCOUNT}"),
    ],
    ids=" ".join,
)
def test_what_a_task_may_not_do_is_refused_by_the_api_server(cluster, arguments):
    with pytest.raises(Refused, match=r"(?i)forbidden"):
        cluster.kubectl(f"--as={ACCOUNT}", *arguments)


def test_a_task_may_read_its_defaults(cluster):
    assert "run.yaml" in cluster.kubectl(
        "get", "configmap", "kubegraft-defaults", "-o", "yaml", f"--as={ACCOUNT}"
    )


def test_no_pod_gets_a_token(cluster, toolbox):
    with pytest.raises(Refused):
        cluster.execute(toolbox, "ls", "/var/run/secrets/kubernetes.io/serviceaccount")


def test_a_pod_beyond_the_quota_is_refused_with_the_reason(cluster):
    pod = restricted_pod(
        "giant",
        "kubegraft:0",
        ["true"],
        resources={"requests": {"cpu": "30", "memory": "64Mi"}, "limits": {"cpu": "32", "memory": "1Gi"}},
    )
    with pytest.raises(Refused, match="exceeded quota"):
        cluster.apply(pod, flags=DRY_RUN)

"""TransferJobs and TransferSchedules for tests, and what the operator's role allows."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROLE_FILE = ROOT / "manifests" / "operator" / "cluster-role.yaml"


def transfer_job(name="photographs", *, namespace="team", labels=None, **spec) -> dict:
    """A TransferJob as a user writes it, with the defaults that the API server would fill in."""
    return {
        "apiVersion": "kubegraft.dev/v1alpha1",
        "kind": "TransferJob",
        "metadata": {"name": name, "namespace": namespace, "labels": labels or {}},
        "spec": {
            "ingest": {"source": "/artifacts/data/photographs"},
            "nodes": 2,
            "suspend": False,
            "maxRestarts": 3,
            "accelerators": {"count": 0, "resource": "nvidia.com/gpu"},
            "artifacts": {"claim": "kubegraft-work"},
            **spec,
        },
    }


def transfer_schedule(name="nightly", *, namespace="team", **spec) -> dict:
    return {
        "apiVersion": "kubegraft.dev/v1alpha1",
        "kind": "TransferSchedule",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"cron": "0 3 * * *", "template": {"spec": transfer_job()["spec"]}, **spec},
    }


def allowed(documents) -> set[tuple[str, str, str]]:
    """Verb, group and resource of everything that a role's rules allow."""
    (role,) = [one for one in documents if one["kind"] in ("ClusterRole", "Role")]
    return {
        (verb, group, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }

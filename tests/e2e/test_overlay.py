"""An overlay comes and goes, and nothing of it stays."""

import json

import yaml

from tests.e2e.conftest import ROOT, open_volume, run
from tests.e2e.kube import Cluster, restricted_pod, until

ELSEWHERE = "kubegraft-leaves"


def test_deleting_the_overlay_leaves_nothing(tmp_path, image):
    """In a namespace of its own, with a pod that runs and has written to the volume."""
    up = "/".join([".."] * (len(tmp_path.parts) - 1))
    document = {"namespace": ELSEWHERE, "resources": [f"{up}{ROOT}/manifests/overlays/kind"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(document))
    cluster = Cluster(ELSEWHERE)
    objects = run(["kubectl", "kustomize", str(tmp_path)]).encode()
    cluster.kubectl("apply", "--filename", "-", content=objects)
    open_volume(cluster)
    program = "import time, pathlib; pathlib.Path('/workspace/trace').touch(); time.sleep(3600)"
    cluster.apply(restricted_pod("writer", image, ["python3", "-c", program]))
    cluster.kubectl("wait", "--for=condition=Ready", "pod/writer", "--timeout=120s", seconds=130)
    assert volumes()
    cluster.kubectl("delete", "--filename", "-", "--timeout=150s", content=objects, seconds=180)
    until(lambda: not volumes(), seconds=60)
    assert "NotFound" in missing("namespace", ELSEWHERE)
    kinds = run(["kubectl", "api-resources", "--namespaced=false", "--verbs=list", "--output=name"]).split()
    for kind in kinds:
        found = json.loads(run(["kubectl", "get", kind, "--output", "json"]))["items"]
        assert not [one for one in found if ELSEWHERE in json.dumps(one["metadata"])], kind


def volumes():
    everything = json.loads(run(["kubectl", "get", "persistentvolumes", "--output", "json"]))["items"]
    return [one for one in everything if one["spec"].get("claimRef", {}).get("namespace") == ELSEWHERE]


def missing(*what):
    from tests.e2e.kube import Refused

    try:
        return run(["kubectl", "get", *what])
    except Refused as refusal:
        return str(refusal)

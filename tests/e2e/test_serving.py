"""The exported model behind a server: raw JPEG bytes in, classes out."""

import base64
import json

import pytest

from tests.e2e.conftest import named
from tests.e2e.kube import until

ASK = """
import json, sys, urllib.request
body = sys.stdin.buffer.read()
url, kind = sys.argv[1:]
request = urllib.request.Request(url, body, {"Content-Type": kind})
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""
URL = "http://signs:8501/v1/models/signs:predict"


@pytest.fixture(scope="module")
def server(cluster, trained, rendered):
    """The server in our own image; TensorFlow Serving's can't be pulled by a cluster without a registry."""
    objects = rendered("serving", "--name", "signs", "--run", "signs", "--server", "kubegraft")
    cluster.apply(*objects)
    deployment = named(objects, "Deployment")
    cluster.kubectl("rollout", "status", f"deployment/{deployment}", "--timeout=180s", seconds=200)
    yield deployment
    cluster.kubectl("delete", "deployment,service", deployment)


def ask(cluster, toolbox, body, kind):
    return json.loads(cluster.execute(toolbox, "python3", "-c", ASK, URL, kind, content=body))


def photograph_of(photographs, name):
    return sorted((photographs / "validation" / name).iterdir())[2].read_bytes()


def test_it_answers_the_raw_bytes_of_photographs(cluster, toolbox, server, photographs):
    classes = sorted(folder.name for folder in (photographs / "validation").iterdir())
    instances = [{"b64": base64.b64encode(photograph_of(photographs, name)).decode()} for name in classes]
    body = json.dumps({"signature_name": "serve", "instances": instances}).encode()
    answers = ask(cluster, toolbox, body, "application/json")["predictions"]
    right = [answer["predicted_class"] == name for answer, name in zip(answers, classes, strict=True)]
    assert sum(right) >= 0.8 * len(right)
    (alone,) = ask(cluster, toolbox, photograph_of(photographs, classes[0]), "image/jpeg")["predictions"]
    assert alone["predicted_class"] == answers[0]["predicted_class"]


def test_it_ends_in_good_order(cluster, server):
    (pod,) = cluster.get(
        "pods", **{"app.kubernetes.io/instance": "signs", "app.kubernetes.io/component": "serving"}
    )["items"]
    cluster.kubectl("rollout", "restart", f"deployment/{server}")
    cluster.kubectl("rollout", "status", f"deployment/{server}", "--timeout=180s", seconds=200)
    until(
        lambda: pod["metadata"]["name"] not in cluster.kubectl("get", "pods", "--output", "name"), seconds=60
    )

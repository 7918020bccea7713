"""Each component's container, started from the compiled pipeline as KFP starts it.

KFP's launcher calls the command of the compiled YAML with an executor input; here a pod does, with the artifacts on a
volume at /minio, HOME at / and a root file system that can't be written.
"""

import json

import pytest
import yaml

from tests.e2e.conftest import ROOT
from tests.e2e.kube import restricted_pod, until

STAGES = ("check-images", "ingest", "train-head", "fine-tune", "evaluate", "export")
PARAMETERS = {
    "source": "/workspace/data/few",
    "input_size": 96,
    "head_num_epochs": 5,
    "fine_tune_num_epochs": 1,
    "num_blocks": 1,
    "num_bootstrap_samples": 100,
}


class Launcher:
    """Does for each task what KFP's driver and launcher do: resolves its inputs, and hands them over."""

    def __init__(self, cluster, toolbox, image):
        self.cluster, self.toolbox, self.image = cluster, toolbox, image
        compiled = (ROOT / "pipelines" / "compiled" / "transfer_learning.yaml").read_text()
        self.spec = next(iter(yaml.safe_load_all(compiled)))
        definitions = self.spec["root"]["inputDefinitions"]["parameters"]
        self.parameters = {name: one.get("defaultValue") for name, one in definitions.items()} | PARAMETERS
        self.outputs = {}

    def run(self, task):
        component = self.spec["components"][self.task(task)["componentRef"]["name"]]
        container = self.spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        executor_input = {"inputs": self.inputs(task), "outputs": self.places(task, component)}
        arguments = [text.replace("{{$}}", json.dumps(executor_input)) for text in container["args"]]
        pod = restricted_pod(
            f"kfp-{task}",
            self.image,
            [*container["command"], *arguments],
            env=[{"name": "HOME", "value": "/"}],
            workingDir="/",
            volumeMounts=[{"name": "work", "mountPath": "/minio", "subPath": "kfp"}],
        )
        self.cluster.apply(pod)
        phase = until(lambda: self.phase(pod), seconds=240, or_else="never ended")
        assert phase == "Succeeded", self.cluster.logs(f"kfp-{task}", "--tail=60")
        said = self.cluster.execute(self.toolbox, "cat", f"/workspace/kfp/runs/{task}/output.json")
        self.outputs[task] = json.loads(said)
        return self.outputs[task]

    def phase(self, pod):
        phase = self.cluster.get("pod", pod["metadata"]["name"])["status"]["phase"]
        return phase if phase in ("Succeeded", "Failed") else ""

    def task(self, name):
        return self.spec["root"]["dag"]["tasks"][name]

    def inputs(self, task):
        given = self.task(task)["inputs"]
        return {
            "parameterValues": {name: self.value(one) for name, one in given.get("parameters", {}).items()},
            "artifacts": {
                name: {"artifacts": [self.artifact(one["taskOutputArtifact"])]}
                for name, one in given.get("artifacts", {}).items()
            },
        }

    def value(self, source):
        if "componentInputParameter" in source:
            return self.parameters[source["componentInputParameter"]]
        if "runtimeValue" in source:
            return source["runtimeValue"]["constant"]
        output = source["taskOutputParameter"]
        place = f"/workspace/kfp/runs/{output['producerTask']}/{output['outputParameterKey']}.txt"
        return self.cluster.execute(self.toolbox, "cat", place)

    def artifact(self, output):
        written = self.outputs[output["producerTask"]]["artifacts"]
        (artifact,) = written[output["outputArtifactKey"]]["artifacts"]
        return artifact

    def places(self, task, component):
        definitions = component["outputDefinitions"]
        return {
            "parameters": {
                name: {"outputFile": f"/minio/runs/{task}/{name}.txt"}
                for name in definitions.get("parameters", {})
            },
            "artifacts": {
                name: {
                    "artifacts": [
                        {
                            "name": name,
                            "type": one["artifactType"],
                            "uri": f"minio://runs/{task}/{name}",
                            "metadata": {"display_name": name},
                        }
                    ]
                }
                for name, one in definitions["artifacts"].items()
            },
            "outputFile": f"/minio/runs/{task}/output.json",
        }


@pytest.fixture(scope="module")
def launcher(cluster, toolbox, image):
    cluster.execute(toolbox, "python3", "-c", "import os; os.makedirs('/workspace/kfp', exist_ok=True)")
    return Launcher(cluster, toolbox, image)


@pytest.mark.parametrize("stage", STAGES)
def test_a_component_runs_as_kfp_would_start_it(launcher, stage):
    """In order: each reads what the one before it wrote."""
    missing = [task for task in STAGES[: STAGES.index(stage)] if task not in launcher.outputs]
    assert not missing, f"{missing} did not run"
    output = launcher.run(stage)
    assert output["artifacts"]
    if stage == "evaluate":
        (metrics,) = output["artifacts"]["metrics"]["artifacts"]
        assert 0 <= metrics["metadata"]["test_accuracy"] <= 1


def test_bad_input_ends_with_its_reason_as_the_last_line_of_the_log(launcher, cluster):
    launcher.parameters = {**launcher.parameters, "source": "/workspace/data/nothing"}
    launcher.cluster.kubectl("delete", "pod", "kfp-check-images", "--ignore-not-found", "--wait=true")
    with pytest.raises(AssertionError, match="Failed"):
        launcher.run("check-images")
    assert "Error: " in cluster.logs("kfp-check-images").splitlines()[-1]
    status = cluster.get("pod", "kfp-check-images")["status"]["containerStatuses"][0]
    assert status["state"]["terminated"]["exitCode"] in (2, 3, 8)

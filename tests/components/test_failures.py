"""A component that fails, run as KFP's launcher runs it: its log, which the launcher keeps, ends with the reason."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import components

ARTIFACTS = {"Output": "outputs", "Input": "inputs"}


def executor_input(function, directory: Path) -> dict:
    """What the launcher would give a component: paths below `directory`, and no value that could work."""
    artifacts: dict = {"inputs": {}, "outputs": {}}
    values: dict = {}
    outputs: dict = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = str(parameter.annotation)
        if "OutputPath" in kind:
            outputs[name] = {"outputFile": str(directory / name)}
        elif parameter.annotation in (str, int, float, bool, list, dict):
            values[name] = {"source": "file:///nowhere"}.get(name, parameter.annotation())
        else:
            side = "outputs" if "Output" in kind or "output" in kind.lower() else "inputs"
            artifact = {
                "name": name,
                "type": {"schemaTitle": "system.Artifact"},
                "uri": str(directory / name),
            }
            artifacts[side][name] = {"artifacts": [artifact]}
    return {
        "inputs": {"parameterValues": values, "artifacts": artifacts["inputs"]},
        "outputs": {
            "parameters": outputs,
            "artifacts": artifacts["outputs"],
            "outputFile": str(directory / "executor_output.json"),
        },
    }


@pytest.fixture
def execute(tmp_path):
    """Return a function that runs a component and gives its exit code and log."""

    def run(name, **values):
        function = getattr(components, name).python_func
        source = textwrap.dedent(inspect.getsource(function)).partition("\n")[2]  # without its decorator
        module = tmp_path / "ephemeral_component.py"
        module.write_text(
            f"import kfp\nfrom kfp import dsl\nfrom kfp.dsl import *\nfrom typing import *\n\n{source}"
        )
        given = executor_input(function, tmp_path)
        given["inputs"]["parameterValues"] |= values
        log_path = tmp_path / "executor-logs"
        with log_path.open("wb") as log:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "kfp.dsl.executor_main", "--component_module_path", str(module)),
                    *("--executor_input", json.dumps(given), "--function_to_execute", name),
                ],
                env={**os.environ, "KUBEGRAFT_LOG_FORMAT": "json", "KUBEGRAFT_RUN_NAME": "run-1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=200,
                check=False,
            )
        return done.returncode, log_path.read_text().strip().splitlines()

    return run


@pytest.mark.parametrize(
    ("name", "values", "code", "kind", "reason"),
    [
        ("ingest", {"validation_fraction": 5.0}, 2, "ConfigError", "validation_fraction=5.0"),
        ("train_head", {"required_accelerators": 1}, 9, "EnvironmentFault", "accelerator_count=1"),
        ("evaluate", {}, 4, "ModelError", "output directory of a kubegraft stage"),
    ],
)
def test_the_log_of_a_failed_step_ends_with_the_reason(execute, name, values, code, kind, reason):
    exit_code, lines = execute(name, **values)
    assert exit_code == code, "\n".join(lines[-20:])
    assert lines[-1].startswith("Error: ")
    assert reason in lines[-1]
    event = json.loads(lines[-2])
    expected = {
        "level": "error",
        "run": "run-1",
        "stage": name,
        "event": "failed",
        "type": kind,
        "exit_code": code,
    }
    assert expected.items() <= event.items()
    assert event["reason"] == lines[-1].removeprefix("Error: ")

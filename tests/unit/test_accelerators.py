"""A task that asked for a GPU and sees none ends at once; this machine has none."""

import subprocess
import sys

import pytest
import tensorflow as tf

from kubegraft import accelerators
from kubegraft.accelerators import REQUIRE_VARIABLE, require_accelerators, required_accelerators
from kubegraft.errors import ConfigError, EnvironmentFault

COMPONENT = """
import sys
from types import SimpleNamespace
import components
function = getattr(components, sys.argv[1]).python_func
names = function.__code__.co_varnames[: function.__code__.co_argcount]
artifact = SimpleNamespace(path=sys.argv[2], metadata={})
values = dict.fromkeys(names, artifact) | {"dataset_digest": "none", "required_accelerators": 2}
function(**values)
"""


def ended(*command, **environment):
    import os

    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("stage", ["train_head", "fine_tune"])
def test_a_pipelines_task_fails_before_it_reads_its_dataset(stage, tmp_path):
    code, message = ended("-c", COMPONENT, stage, tmp_path / "absent")
    assert code == EnvironmentFault.exit_code
    assert "accelerator_count=2" in message
    assert "sees 0" in message
    assert "CPU build" in message
    assert list(tmp_path.iterdir()) == []


def test_a_whole_run_fails_before_its_first_stage(image_folder, tmp_path):
    images, output = image_folder(), tmp_path / "out"
    code, message = ended(
        *("-m", "kubegraft", "run", images, "--weights", "none", "--output", output),
        **{REQUIRE_VARIABLE: "1"},
    )
    assert code == EnvironmentFault.exit_code
    assert "accelerator_count=1" in message
    assert not output.exists()


def test_nothing_asked_for_takes_what_there_is(monkeypatch):
    require_accelerators()
    monkeypatch.setenv(REQUIRE_VARIABLE, "0")
    require_accelerators(0)


def test_logical_devices_do_not_count(monkeypatch):
    assert len(tf.config.list_logical_devices()) >= 1
    with pytest.raises(EnvironmentFault, match="sees 0"):
        require_accelerators(1)


def test_the_larger_of_both_counts(monkeypatch):
    monkeypatch.setenv(REQUIRE_VARIABLE, "3")
    with pytest.raises(EnvironmentFault, match="accelerator_count=3"):
        require_accelerators(1)


@pytest.mark.parametrize("text", ["-1", "all", "1.5"])
def test_a_number_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv(REQUIRE_VARIABLE, text)
    with pytest.raises(ConfigError, match="whole number"):
        required_accelerators()


@pytest.mark.parametrize(
    ("num_seen", "hidden", "fix"),
    [(0, None, "driver"), (0, "", "CUDA_VISIBLE_DEVICES"), (1, None, "give it more")],
)
def test_the_fix_fits_what_a_cuda_build_sees(monkeypatch, num_seen, hidden, fix):
    if hidden is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert fix in accelerators._message(2, num_seen, True, "2.21.0")

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from kubegraft.cli import main
from kubegraft.cli.group import COMMANDS
from kubegraft.config_file import load_run_config
from kubegraft.errors import DataError
from kubegraft.run_config import RunConfig, parameter_fields, stage_fields

HEAVY = ("tensorflow", "keras", "kfp", "numpy", "yaml", "PIL", "sklearn", "jinja2")


def call(*arguments, **options):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["fine-tune", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import sys\nfrom kubegraft.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_commands_in_the_order_of_the_work():
    text = call("--help").output
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.split()]
    assert [word for word in lines if word in COMMANDS] == list(COMMANDS)
    assert text.count("\n    kubegraft ") == 3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_explains_itself(name):
    result = call(name, "--help")
    assert result.exit_code == 0
    command = main.get_command(click.Context(main), name)
    assert command.name == name
    assert COMMANDS[name].summary.endswith(".")
    for parameter in command.params:
        described = getattr(parameter, "summary", None) or getattr(parameter, "help", None)
        assert described, f"{parameter.name} has no help"


def test_version_is_the_packages():
    from kubegraft import __version__

    assert call("--version").output.strip().endswith(__version__)


def test_module_can_be_run():
    done = subprocess.run([sys.executable, "-m", "kubegraft", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("kubegraft")


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["rnu"], "'run'"),
        (["fine_tune"], "'fine-tune'"),
        (["train"], "'train-head'"),
        (["run", "--bakbone", "vgg16"], "--backbone"),
        (["train-head", "--learning-rat", "1"], "--learning-rate"),
    ],
)
def test_typos_get_a_suggestion_and_exit_code_2(arguments, near):
    result = call(*arguments)
    assert result.exit_code == 2
    assert near in result.stderr
    assert result.stdout == ""


def test_unknown_command_far_from_all_lists_them():
    assert all(name in call("zzz").stderr for name in COMMANDS)


def test_run_has_a_flag_for_every_pipeline_parameter():
    command = main.get_command(click.Context(main), "run")
    names = {parameter.name for parameter in command.params}
    assert set(parameter_fields()) <= names


@pytest.mark.parametrize("value", ["0", "7", "fast", "nan"])
def test_a_flag_against_its_rule_names_flag_and_rule(value):
    result = call("run", "--print-config", "--head-learning-rate", value)
    assert result.exit_code == 2
    assert "--head-learning-rate" in result.stderr
    assert "`learning_rate` must be" in result.stderr


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\nhead:\n  backbone: vgg16\n  batch_size: 8\n")
    result = call("run", "--config", path, "--backbone", "resnet50", "--print-config")
    path.write_text(result.stdout)
    config = load_run_config(path)
    assert (config.seed, config.head.backbone, config.head.batch_size) == (3, "resnet50", 8)
    assert config.fine_tune.batch_size == RunConfig().fine_tune.batch_size


@pytest.mark.parametrize(
    ("flags", "stage", "field", "expected"),
    [
        (["--hidden-units", "64,32"], "head", "hidden_units", (64, 32)),
        (["--batch-norm"], "head", "batch_norm", True),
        (["--no-batch-norm"], "head", "batch_norm", False),
        (["--head-batch-size", "auto"], "head", "batch_size", -1),
        (["--head-batch-size", "-1"], "head", "batch_size", -1),
        (["--fine-tune-learning-rate", "1e-4"], "fine_tune", "learning_rate", 1e-4),
        (["--formats", "keras"], "export", "formats", ("keras",)),
        (["--mixed-precision", "off"], "", "mixed_precision", "off"),
        (["photos"], "ingest", "source", "photos"),
        (["--seed", "9"], "evaluate", "seed", 9),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_flags_are_read_as_their_field_means_them(tmp_path, flags, stage, field, expected):
    path = tmp_path / "run.yaml"
    path.write_text(call("run", *flags, "--print-config").stdout)
    config = load_run_config(path)
    assert getattr(getattr(config, stage) if stage else config, field) == expected


def test_printed_config_is_the_default_and_needs_no_arguments(tmp_path):
    path = tmp_path / "run.yaml"
    for command in ("run", "ingest", "train-head", "fine-tune", "evaluate", "export"):
        result = call(command, "--print-config")
        assert result.exit_code == 0, result.output
        path.write_text(result.stdout)
        assert load_run_config(path) == RunConfig()


def test_a_stage_prints_its_own_section_only():
    document = json.loads(call("train-head", "--learning-rate", "0.01", "--print-config", "--json").stdout)
    assert set(document) == {"seed", "mixed_precision", "head"}
    assert set(document["head"]) == set(stage_fields("head"))
    assert document["head"]["learning_rate"] == 0.01


def test_printing_writes_nothing(tmp_path):
    call("run", "--output", tmp_path / "output", "--print-config")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["ingest", "train-head", "fine-tune", "evaluate", "export", "predict"])
def test_missing_arguments_are_usage_errors(command):
    result = call(command)
    assert result.exit_code == 2
    assert "Missing" in result.stderr


def test_an_error_in_the_config_file_is_one_message_with_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("head:\n  backbon: vgg16\n")
    result = call("run", "--config", path)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert "line 2" in result.stderr
    assert "Did you mean 'backbone'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def failing(monkeypatch):
    """Return a function that makes `kubegraft doctor` raise."""

    def fail_with(error):
        def fail():
            raise error

        monkeypatch.setattr("kubegraft.doctor.examine", fail)

    return fail_with


def test_an_error_becomes_its_message_and_exit_code(failing):
    failing(DataError("`x` is bad."))
    result = call("doctor")
    assert (result.exit_code, result.stderr) == (3, "Error: `x` is bad.\n")


@pytest.mark.parametrize(
    ("before", "after", "environment"),
    [(["--debug"], [], {}), ([], ["--debug"], {}), ([], [], {"KUBEGRAFT_DEBUG": "1"})],
    ids=["before the command", "after it", "environment"],
)
def test_debug_shows_the_traceback_before_the_message(failing, before, after, environment):
    failing(DataError("`x` is bad."))
    result = call(*before, "doctor", *after, env=environment)
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("Error: `x` is bad.\n")


def test_ctrl_c_is_exit_code_130(failing):
    failing(KeyboardInterrupt())
    assert call("doctor").exit_code == 130


@pytest.mark.parametrize(("module", "extra"), [("kfp", "kfp"), ("tensorflow", "train"), ("PIL", "train")])
def test_a_missing_package_says_how_to_install_it(failing, module, extra):
    failing(ModuleNotFoundError(f"No module named {module!r}", name=f"{module}.part"))
    result = call("doctor")
    assert result.exit_code == 9
    assert f"kubegraft[{extra}]" in result.stderr


def test_other_missing_modules_are_not_hidden(failing):
    failing(ModuleNotFoundError("No module named 'kubegraft.x'", name="kubegraft.x"))
    assert isinstance(call("doctor").exception, ModuleNotFoundError)


def test_what_the_system_refuses_is_a_message_and_exit_code_8(failing):
    failing(OSError(28, "No space left on device", "dataset/train.tfrecord"))
    done = call("doctor")
    assert done.exit_code == 8
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr

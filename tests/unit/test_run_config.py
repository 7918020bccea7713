import dataclasses
import inspect

import pytest

from kubegraft.config import FineTuneConfig, HeadConfig
from kubegraft.config_file import load_run_config, to_values, to_yaml, value_from_text
from kubegraft.errors import ConfigError
from kubegraft.run_config import (
    STAGES,
    RunConfig,
    from_parameters,
    parameter_fields,
    pipeline_parameters,
    stage_fields,
)

CHANGED = RunConfig(
    seed=7,
    mixed_precision="off",
    head=HeadConfig(
        head="mlp", hidden_units=(64, 32), learning_rate=1e-3, weights_sha256="0" * 63 + "1", batch_norm=True
    ),
    fine_tune=FineTuneConfig(unfreeze_fraction=0.25, augmentation="flip,mixup", batch_size=8),
)


@pytest.fixture
def load(tmp_path):
    def load_text(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_run_config(path)

    return load_text


def test_seed_and_precision_reach_every_stage_that_has_them():
    assert {getattr(CHANGED, stage).seed for stage in STAGES} == {7}
    assert CHANGED.head.mixed_precision == CHANGED.fine_tune.mixed_precision == "off"


@pytest.mark.parametrize("config", [RunConfig(), CHANGED], ids=["default", "changed"])
def test_yaml_loads_back_to_the_same_config(load, config):
    assert load(to_yaml(config)) == config


@pytest.mark.parametrize(
    "source",
    [
        "C: images #1",
        "~/images",
        "ä ö/ü",
        "off",
        "null",
        "1e-3",
        "a\nb",
        "'quoted' \"twice\"",
        "x" * 500,
        "- a",
    ],
)
def test_any_source_survives_yaml(load, source):
    config = RunConfig().with_values({("ingest", "source"): source})
    assert load(to_yaml(config)).ingest.source == source


def test_yaml_explains_every_field():
    text = to_yaml(RunConfig())
    for stage in STAGES:
        for field in stage_fields(stage).values():
            assert field.metadata["help"].split()[0] in text


@pytest.mark.parametrize("config", [RunConfig(), CHANGED], ids=["default", "changed"])
def test_pipeline_parameters_are_scalars_that_mean_the_same_config(config):
    parameters = pipeline_parameters(config)
    assert all(isinstance(value, (str, int, float, bool, list)) for value in parameters.values())
    assert from_parameters(parameters) == config


def test_parameter_names_take_the_stage_only_where_they_must():
    names = parameter_fields()
    assert names["backbone"] == ("head", "backbone")
    assert names["num_blocks"] == ("fine_tune", "num_blocks")
    assert names["head_learning_rate"] == ("head", "learning_rate")
    assert names["fine_tune_learning_rate"] == ("fine_tune", "learning_rate")
    assert names["seed"] == ("", "seed")
    assert "learning_rate" not in names
    assert len(names) == 2 + sum(len(stage_fields(stage)) for stage in STAGES)


def test_parameters_are_those_of_the_pipeline():
    from pipelines.transfer_learning import transfer_learning

    signature = inspect.signature(transfer_learning.pipeline_func)
    cluster_only = {"accelerator_type", "accelerator_count", "node_selector", "tolerations"}
    assert set(signature.parameters) - cluster_only == set(parameter_fields())
    defaults = {name: p.default for name, p in signature.parameters.items() if name not in cluster_only}
    assert defaults == pipeline_parameters(RunConfig())


def test_unknown_parameter_gets_a_suggestion():
    with pytest.raises(ConfigError, match="Did you mean 'backbone'"):
        from_parameters({"backbon": "vgg16"})


def test_what_the_file_leaves_out_keeps_its_default(load):
    config = load("head:\n  backbone: vgg16\nfine_tune:\nexport: {}\n")
    assert config == RunConfig().with_values({("head", "backbone"): "vgg16"})


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n", "{}\n"])
def test_an_empty_file_is_the_default(load, text):
    assert load(text) == RunConfig()


@pytest.mark.parametrize(
    ("line", "field", "expected"),
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("learning_rate: auto", "learning_rate", -1),
        ("learning_rate: -1", "learning_rate", -1),
        ("batch_size: '32'", "batch_size", 32),
        ("num_epochs: 1_000", "num_epochs", 1000),
        ("batch_norm: yes", "batch_norm", True),
        ("weights: none", "weights", "none"),
        ("weights_sha256: " + "1" * 64, "weights_sha256", "1" * 64),
        ("hidden_units: [64, 32.0]", "hidden_units", (64, 32)),
        ("hidden_units:\n    - 64\n    - 32", "hidden_units", (64, 32)),
        ("hidden_units: 64, 32", "hidden_units", (64, 32)),
    ],
)
def test_values_are_read_as_their_field_means_them(load, line, field, expected):
    assert getattr(load(f"head:\n  {line}\n").head, field) == expected


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_on_and_off_are_words_for_precision(load, value):
    assert load(f"mixed_precision: {value}").mixed_precision == value


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("head:\n  backbone: a\n  learning_rat: 1\n", 3, "Did you mean 'learning_rate'"),
        ("hed:\n  backbone: a\n", 1, "Did you mean 'head'"),
        ("backbone: vgg16\n", 1, "belongs in the section `head`"),
        ("head_learning_rate: 0.1\n", 1, "`learning_rate` in the section `head`"),
        ("learning_rate: 0.1\n", 1, "section `head` or `fine_tune`"),
        ("head:\n  num_blocks: 2\n", 2, "section `fine_tune`"),
        ("head:\n  seed: 2\n", 2, "top level"),
        ("seed: 1\n\nseed: 2\n", 3, "second time, after line 1"),
        ("head:\n  backbone: a\n  backbone: b\n", 3, "second time, after line 2"),
        ("head:\n  batch_size: 2.5\n", 2, "whole number"),
        ("head:\n  batch_size: .inf\n", 2, "whole number"),
        ("head:\n  learning_rate: nan\n", 2, "must be a number"),
        ("head:\n  learning_rate: 7\n", 2, r"\(0, 1\]"),
        ("head:\n  learning_rate: [1, 2]\n", 2, "must be a number"),
        ("head:\n  backbone:\n", 2, "has no value"),
        ("head:\n  backbone: {a: b}\n", 2, "single value"),
        ("seed: 1\nhead:\n  head: mlp\n  hidden_units: []\n", 3, "hidden_units"),
        ("fine_tune:\n  num_blocks: 1\n  unfreeze_fraction: 0.5\n", 2, "say the same thing"),
        ("head: 3\n", 1, "`name: value` lines"),
        ("- head\n", 1, "`name: value` lines"),
        ("1: 2\n", 1, "`1` is not a known name"),
        ("head: [\n", 2, "not valid YAML"),
        ("head:\n\tbackbone: a\n", 2, "not valid YAML"),
        ("seed: 1\n---\nseed: 2\n", 2, "not valid YAML"),
        ("head: &a\n  backbone: b\nfine_tune:\n  <<: *a\n", 4, "not a known name"),
    ],
)
def test_an_error_names_its_line_and_a_way_out(load, text, line, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(text)
    assert f"run.yaml, line {line}: " in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"head: \x00"], ids=["not UTF-8", "control character"])
def test_a_file_that_is_not_text_is_a_config_error(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_run_config(path)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="--print-config"):
        load_run_config(tmp_path / "none.yaml")


def test_yaml_can_be_limited_to_a_stage(load):
    text = to_yaml(CHANGED, ["head"])
    assert "fine_tune:" not in text
    assert load(text).head == CHANGED.head


def test_plain_values_say_auto_where_a_recipe_chooses():
    values = to_values(RunConfig())
    assert values["head"]["learning_rate"] == "auto"
    assert values["head"]["hidden_units"] == [256]
    assert values["seed"] == 0


def test_text_that_means_nothing_is_left_for_the_rule_to_refuse():
    fields = {field.name: field for field in dataclasses.fields(HeadConfig)}
    assert value_from_text(fields["batch_size"], "many") == "many"
    assert value_from_text(fields["batch_norm"], "perhaps") == "perhaps"

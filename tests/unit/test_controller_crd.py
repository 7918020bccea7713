"""The CustomResourceDefinitions: in step with the config, and such that an API server takes them."""

import dataclasses
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest

from kubegraft.config import EXPORT_FORMATS, TrainingConfig
from kubegraft.controller import crd
from kubegraft.controller.crd import generated_files, transfer_job, transfer_schedule
from kubegraft.controller.rules import JOB_RULES, immutable
from kubegraft.controller.spec import JobSpec
from kubegraft.run_config import SHARED, STAGES, RunConfig, stage_fields
from tests.controller_world import World, fate_table, settle
from tests.controller_world import transfer_job as a_job

ROOT = Path(__file__).resolve().parents[2]
DEFINITIONS = {"job": transfer_job(), "schedule": transfer_schedule()}


def schema_of(definition):
    return definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def nodes_of(schema, path="", inside_values=False):
    """Yield (path, schema) of a schema and all below it."""
    yield path, schema
    for name, below in schema.get("properties", {}).items():
        yield from nodes_of(below, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes_of(schema[key], f"{path}[]")


SPEC = schema_of(DEFINITIONS["job"])["properties"]["spec"]


def defaulted(schema, value):
    """Fill in defaults as an API server does."""
    for name, below in schema.get("properties", {}).items():
        if name not in value and "default" in below:
            value = {**value, name: below["default"]}
        if isinstance(value.get(name), dict):
            value = {**value, name: defaulted(below, value[name])}
    return value


def test_the_files_are_what_the_code_makes(tmp_path, monkeypatch, capsys):
    assert crd.main(["--check"]) == 0, capsys.readouterr().out
    monkeypatch.setattr(crd, "__file__", str(tmp_path / "src" / "kubegraft" / "controller" / "crd.py"))
    assert crd.main(["--check"]) == 1
    assert "make generate" in capsys.readouterr().out
    assert crd.main([]) == 0
    assert {path for path in generated_files() if (tmp_path / path).exists()} == set(generated_files())
    assert crd.main(["--check"]) == 0


@pytest.mark.parametrize("definition", DEFINITIONS.values(), ids=DEFINITIONS)
def test_kubernetes_knows_the_form(definition):
    kubernetes_validate.validate(definition, "1.34", strict=True)


@pytest.mark.parametrize("definition", DEFINITIONS.values(), ids=DEFINITIONS)
def test_everything_is_bounded_and_explained(definition):
    """The server bounds the cost of rules by the sizes of what they read."""
    for part in ("spec", "status"):
        for path, schema in nodes_of(schema_of(definition)["properties"][part], part):
            if not path.endswith("[]"):
                assert schema.get("description"), path
            if (
                schema.get("type") == "string"
                and "enum" not in schema
                and schema.get("format") != "date-time"
            ):
                assert "maxLength" in schema, path
            if schema.get("type") == "array":
                assert "maxItems" in schema and "x-kubernetes-list-type" in schema, path
            if "additionalProperties" in schema:
                assert "maxProperties" in schema, path


def test_each_field_of_the_config_is_a_field_of_the_spec():
    assert set(SHARED) <= set(SPEC["properties"])
    for stage in STAGES:
        assert list(SPEC["properties"][stage]["properties"]) == list(stage_fields(stage))


def test_the_defaults_are_the_configs():
    spec = defaulted(SPEC, {})
    read = JobSpec.of({"metadata": {"name": "signs"}, "spec": spec})
    assert read.run_config() == RunConfig()
    assert (read.nodes, read.max_restarts, read.artifacts_claim) == (1, 3, "kubegraft-work")
    jsonschema.Draft4Validator(SPEC).validate(spec)


def test_ranges_are_the_configs():
    rate = SPEC["properties"]["head"]["properties"]["learning_rate"]
    assert (rate["minimum"], rate["maximum"], rate["default"]) == (-1, 1, -1)
    assert rate["x-kubernetes-validations"][0]["rule"] == "self == -1.0 || self > 0.0"
    fraction = SPEC["properties"]["ingest"]["properties"]["test_fraction"]
    assert (fraction["minimum"], fraction["exclusiveMinimum"], fraction["maximum"]) == (0, True, 0.5)
    formats = SPEC["properties"]["export"]["properties"]["formats"]
    assert formats["items"]["enum"] == list(EXPORT_FORMATS)


def test_every_field_but_the_few_that_may_change_is_immutable():
    rules = "\n".join(rule["rule"] for rule in SPEC["x-kubernetes-validations"] if "oldSelf" in rule["rule"])
    free = {name for name in SPEC["properties"] if f"self.{name} == oldSelf.{name}" not in rules}
    assert free == {
        "suspend",
        "activeDeadlineSeconds",
        "ttlSecondsAfterFinished",
        "budget",
        "search",
        "promotion",
    }
    template = schema_of(DEFINITIONS["schedule"])["properties"]["spec"]["properties"]["template"]
    assert "oldSelf" not in str(template)


@pytest.mark.parametrize("rule", [*JOB_RULES, *immutable(["nodes"])], ids=lambda rule: rule.expression[:40])
def test_rules_name_fields_that_exist_and_say_what_to_do(rule):
    assert re.match(r"`[a-zA-Z_.]+` ", rule.message)
    assert len(rule.message) > 40
    if rule.field:
        schema = SPEC
        for name in rule.field.strip(".").split("."):
            schema = schema["properties"][name]


def test_rules_repeat_what_the_config_refuses_between_fields():
    """Every check between fields in config.py has its rule; a new one must be added here, too."""
    expressions = " ".join(rule.expression for rule in JOB_RULES)
    for words in ("lbfgs", "search_seconds", "hidden_units", "unfreeze_fraction", "weight_decay"):
        assert words in expressions
    assert {field.name for field in dataclasses.fields(TrainingConfig)} >= {"learning_rate", "patience"}


def test_a_jobs_status_fits_its_schema():
    world = World(fate=fate_table(()))
    world.put(a_job(accelerators={"count": 1}))
    settle(world)
    status = world.get("TransferJob")["status"]
    schema = schema_of(DEFINITIONS["job"])["properties"]["status"]
    jsonschema.Draft202012Validator(schema).validate(status)
    assert set(status) <= set(schema["properties"])
    assert set(status["metrics"]) <= set(schema["properties"]["metrics"]["properties"])


def test_people_see_a_jobs_story_in_columns():
    columns = DEFINITIONS["job"]["spec"]["versions"][0]["additionalPrinterColumns"]
    shown = [column["name"] for column in columns if not column.get("priority")]
    assert shown == ["Stage", "Progress", "Backbone", "Nodes", "Accuracy", "Age"]
    names = DEFINITIONS["job"]["spec"]["names"]
    assert (names["shortNames"], DEFINITIONS["schedule"]["spec"]["names"]["shortNames"]) == (["tj"], ["ts"])


def test_the_page_names_every_field():
    page = (ROOT / "docs" / "transferjob-fields.md").read_text()
    for stage in STAGES:
        for name in stage_fields(stage):
            assert f"`{stage}.{name}`" in page

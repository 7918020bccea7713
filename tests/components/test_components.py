"""Only a component's function source is shipped to a cluster: it must stand on its own."""

import ast
import builtins
import dataclasses
import inspect
import symtable
import textwrap
from collections.abc import Callable, Iterator

import pytest

import components
from components._images import TRAIN_IMAGE
from kubegraft import config

CONFIG_OF = {
    "check_images": config.IngestConfig,
    "ingest": config.IngestConfig,
    "train_head": config.HeadConfig,
    "fine_tune": config.FineTuneConfig,
    "evaluate": config.EvaluateConfig,
    "export": config.ExportConfig,
}


@dataclasses.dataclass
class Nothing:
    """Of `train_distributed`, whose config is a TransferJob's spec."""


FUNCTIONS = {name: getattr(components, name).python_func for name in components.__all__}
ALL = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def definition_of(function: Callable) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    tree.body[0].decorator_list = []
    return tree.body[0]


def free_names(function: Callable) -> set[str]:
    """Names that the function takes from its module, which a cluster doesn't have."""
    module = symtable.symtable(ast.unparse(definition_of(function)), "<component>", "exec")
    in_signature = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_referenced()}
    in_body = {
        symbol.get_name() for table in tables(module) for symbol in table.get_symbols() if symbol.is_global()
    }
    return (in_body | in_signature) - set(dir(builtins)) - {"dsl", function.__name__}


def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for child in table.get_children():
        yield child
        yield from tables(child)


@ALL
def test_a_component_has_no_free_name(function):
    assert free_names(function) == set()


MODULE_CONSTANT = 3


def leaks_a_constant(dataset_digest: str):
    return [MODULE_CONSTANT for _ in dataset_digest]


def leaks_a_default(count: int = MODULE_CONSTANT):
    return count


def leaks_a_helper():
    def inner():
        return definition_of

    return inner


@pytest.mark.parametrize("function", [leaks_a_constant, leaks_a_default, leaks_a_helper])
def test_the_check_finds_free_names(function):
    assert free_names(function)


@ALL
def test_a_body_only_translates(function):
    body = definition_of(function).body[1:]
    lines = {node.lineno for statement in body for node in ast.walk(statement) if hasattr(node, "lineno")}
    assert len(lines) <= 15


@ALL
def test_a_component_takes_every_field_of_its_config_and_has_no_default(function):
    parameters = inspect.signature(function).parameters
    fields = {field.name for field in dataclasses.fields(CONFIG_OF.get(function.__name__, Nothing))}
    assert fields <= parameters.keys()
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters.values())


@ALL
def test_every_task_after_ingest_gets_the_datasets_digest(function):
    if function.__name__ not in ("check_images", "ingest", "train_distributed"):
        assert inspect.signature(function).parameters["dataset_digest"].annotation is str


def test_images_have_an_immutable_tag():
    name, _, tag = TRAIN_IMAGE.rpartition(":")
    assert name
    assert tag[0].isdigit()


@ALL
def test_no_input_has_a_name_that_kfp_gives_to_an_accelerator_limit(function):
    """kfp would overwrite its value with a placeholder, which no run could read as a number."""
    assert not {"accelerator_count", "accelerator_type"} & inspect.signature(function).parameters.keys()

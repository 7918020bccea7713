"""What the documents say, compared with the code."""

import inspect
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from kubegraft import errors
from kubegraft.cli import main
from kubegraft.cli.group import COMMANDS
from kubegraft.config_file import load_run_config
from kubegraft.controller import failures
from kubegraft.modeling.backbones import BACKBONES, backbone_table

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
EXAMPLES = [*DOCUMENTS, ROOT / "docker/README.md", ROOT / "manifests/README.md"]


def text_of(path):
    return (ROOT / path).read_text(encoding="utf-8")


def table_rows(text):
    rows = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= set("-: ")]


def test_exit_codes_are_those_of_the_errors():
    documented = {
        row[1].strip("`"): (int(row[0]), row[3] == "yes")
        for row in table_rows(text_of("docs/errors.md"))
        if row[0].isdecimal()
    }
    actual = {
        name: (kind.exit_code, kind.retryable)
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.KubegraftError)
    }
    assert documented == actual


def test_the_operators_page_explains_every_reason_that_a_job_may_give():
    given = {value for value in vars(failures).values() if isinstance(value, str) and value.isalpha()}
    given |= set(failures._BY_ERROR.values()) | set(failures._BY_EXIT_CODE.values())
    for path in (ROOT / "src/kubegraft/controller").glob("*.py"):
        given |= set(re.findall(r'\bFailure\(\s*"(\w+)"', path.read_text(encoding="utf-8")))
    rows = table_rows(text_of("docs/operator.md"))
    explained = {reason for row in rows for reason in re.findall(r"`(\w+)`", row[0])}
    assert {reason for reason in given if reason[0].isupper()} <= explained
    assert "VolumeNotMounted" in given


def test_readme_lists_every_command_with_its_summary():
    rows = {row[0]: row[1] for row in table_rows(text_of("README.md"))}
    assert {name: rows.get(f"`kubegraft {name}`") for name in COMMANDS} == {
        name: entry.summary for name, entry in COMMANDS.items()
    }


def readme_backbones():
    lines = ["| name | Keras | parameters | input size | license |", "|---|---|---:|---:|---|"]
    lines += [
        f"| `{row['name']}` | {BACKBONES[row['name']].display_name} | {row['num_parameters'] / 1e6:.1f} M "
        f"| {row['input_size']} | {row['license']} |"
        for row in backbone_table()
    ]
    return "\n".join(lines)


def test_readme_lists_every_backbone():
    section = (
        text_of("README.md").partition("<!-- backbones: begin")[2].partition("<!-- backbones: end -->")[0]
    )
    expected = readme_backbones()
    assert section.partition("-->\n")[2].strip() == expected, f"it should be:\n{expected}"


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
        link = "".join(target)
        if not link.startswith(("http:", "https:")):
            file, _, anchor = link.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), link
            assert not anchor or anchor in anchors(linked), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_of_config_files_load(path, tmp_path):
    for number, block in enumerate(
        re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    ):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        found = yaml.safe_load(block)
        assert found
        if "apiVersion" not in found:  # an object of a cluster
            load_run_config(file)


def help_of(name):
    """The help of a command and of its subcommands."""
    command = main.get_command(click.Context(main), name)
    below = command.commands if isinstance(command, click.Group) else ()
    calls = [[name, "--help"], *([name, inner, "--help"] for inner in below)]
    return "".join(CliRunner().invoke(main, call).output for call in calls)


def example_commands(path):
    """Yield each command of the console blocks as a list of words."""
    for block in re.findall(r"```console\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.lstrip().startswith("$ "):
                # What the shell would put in place of $(...) is one word here.
                text = re.sub(r"\$\([^()]*\)", "VALUE", line.lstrip()[2:])
                words = shlex.split(text, comments=True)
                ends = [i for i, word in enumerate(words) if word in ("&&", "|", "&", ";", "<", ">")]
                for start, end in zip([-1, *ends], [*ends, len(words)], strict=True):
                    yield words[start + 1 : end]


def require_known(words):
    """Fail unless the command line takes `words`: its commands, options and number of arguments."""
    command, context = main, click.Context(main, info_name="kubegraft")
    while isinstance(command, click.Group):
        _, command, words = command.resolve_command(context, words)
        context = click.Context(command, info_name=command.name, parent=context)
    _, rest, _ = command.make_parser(context).parse_args(words)
    assert not rest, f"too many arguments: {rest}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_of_commands_are_ones_that_exist(path):
    targets = set(re.findall(r"^([a-z0-9-]+):", text_of("Makefile"), re.MULTILINE))
    for words in example_commands(path):
        if words[:1] == ["kubegraft"]:
            require_known(words[1:])
        elif words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, words
        elif words[:3] == ["kubectl", "apply", "-k"] and words[3].startswith("manifests/"):
            assert (ROOT / words[3] / "kustomization.yaml").exists(), words


def test_the_commands_of_examples_are_seen():
    """So that the test before this one can't pass by seeing none."""
    commands = [words for path in EXAMPLES for words in example_commands(path)]
    assert ["kubegraft", "submit"] in commands
    assert ["make", "setup"] in commands
    with pytest.raises(click.UsageError):
        require_known(["bundle", "create", "somewhere", "--backbones", "vgg16"])
    with pytest.raises(click.UsageError):
        require_known(["bundle", "make", "somewhere"])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_prose_exist(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name, below in re.findall(r"`kubegraft ([a-z][a-z0-9-]+)((?: [a-z|-]+)?)", text):
        assert name in COMMANDS, f"{path}: kubegraft {name}"
        command = main.get_command(click.Context(main), name)
        if isinstance(command, click.Group) and below:
            assert set(below.strip().split("|")) <= set(command.commands), f"{path}: kubegraft {name}{below}"


def test_flags_in_prose_exist():
    helps = "".join(help_of(name) for name in COMMANDS)
    for path in DOCUMENTS:
        for flag in re.findall(r"`(--[a-z][\w-]+)", path.read_text(encoding="utf-8")):
            assert re.search(rf"{flag}\b", helps + "--help --version --strict-markers"), f"{path}: {flag}"


def test_the_newest_version_is_in_the_changelog():
    from kubegraft import __version__

    text = text_of("CHANGELOG.md")
    assert f"## [{__version__}]" in text or "## [Unreleased]" in text

"""`kubegraft cache`, and the flags that say where the cache is."""

import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from kubegraft.cache import FeatureCache
from kubegraft.cache.location import parse_age, parse_bytes, shown_bytes
from kubegraft.cache.shard_file import PAGE_BYTES
from kubegraft.cli import main
from kubegraft.cli.options import cache_options
from kubegraft.errors import ConfigError
from tests.unit.test_cache import POOLED, keep, shards


def call(*arguments):
    return CliRunner().invoke(main, ["cache", *map(str, arguments)])


def document(*arguments):
    return json.loads(call(*arguments, "--json").stdout)


@pytest.fixture
def filled(tmp_path):
    directory = tmp_path / "cache"
    keep(FeatureCache.open(directory), range(5))
    keep(FeatureCache.open(directory), range(3, 8))
    return directory


def damage(directory):
    path = shards(directory)[0]
    content = bytearray(path.read_bytes())
    content[PAGE_BYTES] ^= 1
    path.write_bytes(content)


def test_stats_by_space(filled):
    shown = document("stats", "--cache", filled)
    assert (shown["cache"], shown["entries"], shown["spaces"]) == (str(filled), 10, 1)
    assert shown["by_space"][0]["digest"] == POOLED.digest
    text = call("stats", "--cache", filled).output
    assert "tiny" in text
    assert "pooled" in text


def test_the_default_place_is_looked_into(filled, monkeypatch):
    monkeypatch.setenv("KUBEGRAFT_CACHE", str(filled))
    assert document("stats")["entries"] == 10


def test_an_empty_cache_is_no_error(tmp_path):
    assert document("stats", "--cache", tmp_path / "nothing")["entries"] == 0
    for command in ("verify", "prune"):
        assert call(command, "--cache", tmp_path / "nothing").exit_code == 0
    assert not (tmp_path / "nothing").exists()


def test_verify_ends_with_code_3_where_something_is_damaged(filled):
    assert call("verify", "--cache", filled).exit_code == 0
    damage(filled)
    for arguments in (["--report-only"], []):
        result = call("verify", "--cache", filled, *arguments)
        assert result.exit_code == 3
        assert "1 of 5 rows" in result.output
    result = call("verify", "--cache", filled, "--json")
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (0, True)


def test_prune(filled):
    assert document("prune", "--cache", filled, "--dry-run", "--all")["removed_shards"] == 2
    assert document("prune", "--cache", filled)["duplicate_rows"] == 2
    assert document("prune", "--cache", filled, "--older-than", "30d")["removed_shards"] == 0
    assert document("prune", "--cache", filled, "--max-bytes", "1GiB")["kept_bytes"] > 0
    assert "removed" in call("prune", "--cache", filled, "--space", POOLED.digest[:6]).output
    assert document("stats", "--cache", filled)["entries"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "--cache", "none"], "turns caching off"),
        (["stats", "--cache", "ftp://host/x"], "ftp"),
        (["prune", "--max-bytes", "much"], "10GiB"),
        (["prune", "--older-than", "30"], "30d"),
        (["prune", "--space", "zz"], "`space` must be the beginning"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("KUBEGRAFT_CACHE", str(tmp_path))
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_file_is_no_cache(tmp_path):
    (tmp_path / "file").write_text("")
    assert call("stats", "--cache", tmp_path / "file").exit_code == 2


def test_sizes_and_ages():
    assert [parse_bytes("x", text) for text in ("0", "512", "1KB", "1.5 KiB", "10GiB", "2t")] == [
        0, 512, 1000, 1536, 10 * 2**30, 2 * 10**12,
    ]  # fmt: skip
    assert [parse_age("x", text) for text in ("90s", "1.5h", "30d", "2w")] == [90, 5400, 2592000, 1209600]
    assert [shown_bytes(number) for number in (7, 1536, 5 * 2**30, 3 * 2**40)] == [
        "7 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
    for text in ("", "-1", "1 XB", "1.2.3"):
        with pytest.raises(ConfigError):
            parse_bytes("x", text)


def test_flags_hold_for_a_call_and_what_it_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBEGRAFT_CACHE_BUDGET", "1GiB")
    monkeypatch.delenv("KUBEGRAFT_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)

    @click.command()
    @cache_options
    def command():
        program = "import os; print(os.environ['KUBEGRAFT_CACHE'], os.environ['KUBEGRAFT_CACHE_BUDGET'])"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        click.echo(done.stdout)

    for given, received in (("here", str(tmp_path / "here")), ("none", "none"), ("gs://b/p", "gs://b/p")):
        result = CliRunner().invoke(command, ["--cache", given, "--cache-budget", "2GiB"])
        assert result.output.split() == [received, "2GiB"]
    assert "KUBEGRAFT_CACHE" not in os.environ
    assert os.environ["KUBEGRAFT_CACHE_BUDGET"] == "1GiB"


@pytest.mark.parametrize("command", ["run", "train-head", "fine-tune"])
def test_commands_that_compute_features_take_the_flags(command):
    help_text = CliRunner().invoke(main, [command, "--help"]).output
    assert "--cache LOCATION" in help_text
    assert "--cache-budget SIZE" in help_text

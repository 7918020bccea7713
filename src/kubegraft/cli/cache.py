"""`kubegraft cache`: looking into the feature cache, verifying and pruning it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import SectionedCommand, json_option
from kubegraft.cli.output import print_facts, print_json, print_table, stdout_to_stderr
from kubegraft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from kubegraft.cache.shelves import Shelf
    from kubegraft.cache.upkeep import Pruning, SpaceStats, Verification

_CACHE = click.option(
    "--cache",
    "location",
    metavar="LOCATION",
    help="Directory, or gs:// or s3:// URI.  [default: $KUBEGRAFT_CACHE, or the user's cache directory]",
)


class _CacheGroup(click.Group):
    """Group whose subcommands stand in the order of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group("cache", cls=_CacheGroup)
@DebugOption.decorate
def cache() -> None:
    """Look into the feature cache: what frozen backbones said about images, kept for all later runs.

    Everything in it can be computed again, so nothing is lost by removing any of it. All commands are safe while runs
    use the cache.
    """


@cache.command("stats", cls=SectionedCommand)
@_CACHE
@json_option
@DebugOption.decorate
def stats(location: str | None, as_json: bool) -> None:
    """List what is in the cache, by backbone, kind and input size."""
    from kubegraft.cache.upkeep import stats as run

    place, shelf = _opened(location)
    with stdout_to_stderr():
        spaces = run(shelf)
    totals = {
        "spaces": len(spaces),
        "entries": sum(space.entries for space in spaces),
        "bytes": sum(space.bytes for space in spaces),
    }
    if as_json:
        import dataclasses

        print_json({"cache": place, **totals, "by_space": [dataclasses.asdict(space) for space in spaces]})
        return
    if spaces:
        _print_spaces(spaces)
    click.echo(f"{place}: {totals['entries']} values, {_shown(totals['bytes'])}")


@cache.command("verify", cls=SectionedCommand)
@_CACHE
@click.option("--report-only", is_flag=True, help="Remove nothing that is damaged.")
@json_option
@DebugOption.decorate
@click.pass_context
def verify(context: click.Context, location: str | None, report_only: bool, as_json: bool) -> None:
    """Read every value and compare its checksum; remove what is damaged.

    Ends with exit code 3 if something was damaged. Runs never use a damaged value in any case.
    """
    from kubegraft.cache.upkeep import verify as run

    place, shelf = _opened(location)
    with stdout_to_stderr():
        result = run(shelf, remove=not report_only)
    if as_json:
        print_json({"cache": place, **result.to_values()})
    else:
        _print_verification(result)
    context.exit(0 if result.ok else DataError.exit_code)


@cache.command("prune", cls=SectionedCommand)
@_CACHE
@click.option("--max-bytes", metavar="SIZE", help="Keep this much, the most recently used: 10GiB, 500MB.")
@click.option("--older-than", metavar="AGE", help="Remove what was not used for so long: 30d, 12h.")
@click.option(
    "--space",
    "spaces",
    multiple=True,
    metavar="DIGEST",
    help="Only this space, by the beginning of its digest; without a limit, all of it. May be repeated.",
)
@click.option("--all", "everything", is_flag=True, help="Remove every value.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@json_option
@DebugOption.decorate
def prune(
    location: str | None,
    max_bytes: str | None,
    older_than: str | None,
    spaces: tuple[str, ...],
    everything: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove what is not wanted, what killed runs left, and repetitions; merge small files.

    Without a limit only leftovers and repetitions go.
    """
    from kubegraft.cache.location import parse_age, parse_bytes
    from kubegraft.cache.upkeep import prune as run

    limit = parse_bytes("max-bytes", max_bytes) if max_bytes else None
    age = parse_age("older-than", older_than) if older_than else None
    place, shelf = _opened(location)
    with stdout_to_stderr():
        result = run(
            shelf,
            max_bytes=limit,
            older_than_seconds=age,
            spaces=spaces,
            everything=everything,
            dry_run=dry_run,
        )
    if as_json:
        print_json({"cache": place, **result.to_values()})
    else:
        _print_pruning(result)


def _opened(location: str | None) -> tuple[str, Shelf]:
    from kubegraft.cache.location import OFF, default_location
    from kubegraft.cache.shelves import open_shelf
    from kubegraft.storage import public_uri

    place = location or default_location()
    if place == OFF:
        raise ConfigError(
            f"`cache` must name a cache to look into. Received: cache={place!r}, which turns caching off. "
            "Give --cache, or unset KUBEGRAFT_CACHE."
        )
    return public_uri(place), open_shelf(place)


def _shown(num_bytes: int) -> str:
    from kubegraft.cache.location import shown_bytes

    return shown_bytes(num_bytes)


def _print_spaces(spaces: list[SpaceStats]) -> None:
    rows = [
        [
            space.digest[:12],
            space.backbone or "?",
            space.kind or "?",
            str(space.input_size or "?"),
            f"{space.engine} {space.dtype}".strip() or "?",
            str(space.entries),
            _shown(space.bytes),
            space.last_used[:16].replace("T", " "),
        ]
        for space in spaces
    ]
    header = ["space", "backbone", "kind", "input size", "computed by", "values", "size", "last used (UTC)"]
    print_table(header, rows, right=(3, 5, 6))


def _print_verification(result: Verification) -> None:
    print_facts(
        [
            ("values", f"{result.rows} right, in {result.shards} shards of {_shown(result.bytes)}"),
            (
                "damaged",
                f"{result.damaged_shards} shards, {result.damaged_rows} values in others, "
                f"{result.unreadable} unreadable; {result.removed} removed or mended",
            ),
        ]
    )
    for line in result.damage:
        click.echo(f"  {line}")


def _print_pruning(result: Pruning) -> None:
    verb = "would remove" if result.dry_run else "removed"
    print_facts(
        [
            (verb, f"{result.removed_shards} shards of {_shown(result.removed_bytes)}"),
            ("leftovers", f"{result.leftover_files} files of {_shown(result.leftover_bytes)}"),
            ("repetitions", f"{result.duplicate_rows} values; {result.merged_shards} shards merged"),
            ("kept", _shown(result.kept_bytes)),
        ]
    )

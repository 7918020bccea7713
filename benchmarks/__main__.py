"""`python -m benchmarks DATA`: run all contestants, write the page and the raw results."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from kubegraft.cli.group import DebugOption
from kubegraft.cli.options import SectionedCommand, input_argument
from kubegraft.stage import write_atomically

from . import large, machine, page
from .contest import CONTESTANTS, NOT_BY_DEFAULT, Plan, compete, variables, with_needed
from .datasets import prepare
from .measuring import busy_cores, documents, watch

_PACKAGE = __package__ or "benchmarks"
_PATH = click.Path(path_type=Path)
_PLAN_OPTIONS = {
    "backbone": "Backbone of all contestants.",
    "weights": "Its weights: imagenet, none, or a file.",
    "input_size": "Side of the images in pixels.",
    "num_blocks": "Last blocks that the textbook and kubegraft unfreeze.",
    "head_epochs": "Most epochs of the textbook with a frozen backbone; it stops after three that bring nothing.",
    "tune_epochs": "Epochs of the textbook's fine-tuning.",
    "all_epochs": "Epochs of its fine-tuning where it unfreezes everything, which is slow.",
}
_DOCS = Path(__file__).resolve().parents[1] / "docs"


def _plan_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each field of the plan that a user may choose."""
    for name, text in reversed(_PLAN_OPTIONS.items()):
        default = Plan.__dataclass_fields__[name].default
        option = click.option(f"--{name.replace('_', '-')}", default=default, show_default=True, help=text)
        function = option(function)
    return function


@click.command("benchmark", cls=SectionedCommand)
@input_argument(
    "data",
    "Folder of <class>/*.jpg, or of train/<class>/*.jpg and validation/<class>/*.jpg.",
    required=False,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option("--seeds", default=1, show_default=True, help="How often, each time with another test part.")
@click.option(
    "--contestants",
    metavar="A,B,...",
    default=",".join(name for name in CONTESTANTS if name not in NOT_BY_DEFAULT),
    help=f"Who takes part: {', '.join(CONTESTANTS)}.  [default: all but {', '.join(NOT_BY_DEFAULT)}]",
)
@_plan_options
@click.option("--test-fraction", default=0.3, show_default=True, help="Part that nobody chooses by.")
@click.option("--no-bare", is_flag=True, help="Leave out the limits of this machine.")
@click.option(
    "--large/--no-large",
    "with_large",
    default=False,
    show_default=True,
    help="Also throughput and memory on many generated images. What is not measured, these or the contestants "
    "(--contestants ''), keeps its results.",
)
@click.option("--large-images", default=5000, show_default=True, help="How many.")
@click.option(
    "--page", "page_path", type=_PATH, help="Page to write the tables into.  [default: docs/benchmarks.md]"
)
@click.option("--json-file", "json_path", type=_PATH, help="Raw results.  [default: beside the page]")
@click.option("--work-dir", type=_PATH, help="Where to work.  [default: a temporary directory]")
@click.option("--again", is_flag=True, help="Only write the page anew from the raw results that are there.")
@DebugOption.decorate
@click.pass_context
def benchmark(context: click.Context, /, **arguments: Any) -> None:
    """Measure kubegraft beside plain Keras and scikit-learn, on your images and this machine.

    Each contestant is a process of its own. The page has the time that each takes to the same validation accuracy,
    accuracy on images that nobody chose by, memory, and disk. Nothing else should run meanwhile. Ends with exit
    code 1 if a contestant failed.
    """
    options = SimpleNamespace(**arguments)
    page_path = options.page_path or (_DOCS if _DOCS.is_dir() else Path()) / "benchmarks.md"
    json_path = options.json_path or page_path.with_suffix(".json")
    if options.again:
        page.write(page_path, _read(json_path))
        return
    names = _names(options.contestants)
    if not names and not options.with_large:
        raise click.UsageError("without `contestants` there must be `--large`. Received: neither.")
    if names and options.data is None:
        raise click.UsageError(
            "`data` must be a folder of labelled images; only --contestants '' --large needs none. Received: no "
            "`data`. With make: make benchmark DATA=folder"
        )
    before = _read(json_path) if json_path.exists() else {}
    if not before and page.has_tables(page_path):
        raise click.UsageError(
            f"`json-file` must hold the raw results of {page_path}, whose tables are written anew from them. "
            f"Received: {json_path}, which is not there. Name another --page, or the file with --json-file."
        )
    results = _results(options, names, before)
    if options.work_dir:
        options.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kubegraft-benchmark-", dir=options.work_dir) as work:
        for _ in _stages(options, names, Path(work), results):
            json_path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(json_path, json.dumps(results, indent=1) + "\n")
    page.write(page_path, results)
    print(page.render(results))
    say(f"written: {page_path}, {json_path}")
    measured = (*(results["records"] if names else ()), *(results["large"] if options.with_large else ()))
    context.exit(int(any(record["failed"] for record in measured)))


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.UsageError(
            f"`json-file` must hold a benchmark's raw results. Received: {path}: {error}. Move it away to start anew."
        ) from error
    return found


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    given = [name.strip() for name in text.split(",") if name.strip()]
    for name in given:
        if name not in CONTESTANTS:
            raise click.UsageError(f"`contestants` must be of {', '.join(CONTESTANTS)}. Received: {name!r}.")
    return with_needed(given)


def _results(options: SimpleNamespace, names: list[str], before: dict[str, Any]) -> dict[str, Any]:
    """Return results to fill; what is not measured now is kept from those before."""
    facts, busy = machine.facts(), busy_cores()
    if busy > 0.1 * facts["cores"]:
        say(
            f"warning: {busy:.1f} of {facts['cores']} processors are busy, load average {os.getloadavg()[0]:.2f}. The "
            "numbers will be of a machine that does something else too. End that first, and start again."
        )
    large_part = {"large": before.get("large", []), "large_run": before.get("large_run", {})}
    if options.with_large:
        large_run = {"machine": facts, "input_size": options.input_size}
        large_part = {"large": [], "large_run": large_run}
    if before and not names:
        return before | large_part
    plan_names = (
        *("backbone", "weights", "input_size", "num_blocks"),
        *("head_epochs", "tune_epochs", "all_epochs"),
    )
    return {
        "schema": 1,
        "machine": facts,
        "busy_cores_before": busy,
        "load_average_before": round(os.getloadavg()[0], 2),
        "seeds": list(range(options.seeds)),
        "plan": {
            **{name: getattr(options, name) for name in plan_names},
            "data": options.data.name if options.data else "none",
            "test_fraction": options.test_fraction,
            "counts": {},
            "num_new": 0,
        },
        "records": [],
        "bare": {},
        **large_part,
    }


def _stages(options: SimpleNamespace, names: list[str], work: Path, results: dict[str, Any]) -> Any:
    """Do the work, and yield whenever `results` has more."""
    plan_names = set(Plan.__dataclass_fields__) & set(results["plan"])
    for seed in results["seeds"] if names else ():
        root = work / f"seed-{seed}"
        data = prepare(options.data, root / "images", test_fraction=options.test_fraction, seed=seed)
        if not seed:
            results["plan"] |= {"counts": data.counts, "num_new": data.num_new}
        plan = Plan(
            data=data, work=root, seed=seed, **{name: results["plan"][name] for name in plan_names - {"data"}}
        )
        for name in names:
            say(f"seed {seed}: {name} ...")
            record = compete(name, plan)
            results["records"].append(record)
            say(f"seed {seed}: {name} {_outcome(record)}")
            yield
    if names and not options.no_bare:
        say("bare limits ...")
        results["bare"] = _bare(options, work)
        yield
    if options.with_large:
        results["large"] = large.compare(work / "large", options.large_images, options.input_size, say)
        yield


def _outcome(record: dict[str, Any]) -> str:
    if record["failed"]:
        return f"failed: {record['failed']}"
    accuracy = {name: round(value, 4) for name, value in record["validation_accuracy"].items() if value}
    return f"took {record['seconds']:.1f} s, validation {accuracy}, test {record['test_accuracy']}"


def _bare(options: SimpleNamespace, work: Path) -> dict[str, Any]:
    environment = variables(work / "bare", work / "home")
    command = [sys.executable, "-m", f"{_PACKAGE}.bare"]
    for name in ("backbone", "weights", "input_size", "num_blocks"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    seen = watch([command], environment)
    found = documents(seen.stdout)
    if seen.exit_code or not found:
        return {"failed": f"exit code {seen.exit_code}: {seen.tail[-2000:]}"}
    result = found[-1]
    if importlib.util.find_spec(f"{_PACKAGE}.engines"):
        folder = str(work / "seed-0" / "images" / "base" / "train")
        choice = ["--backbone", options.backbone, "--size", str(options.input_size)]
        engines = watch([[sys.executable, "-m", f"{_PACKAGE}.engines", folder, *choice]], environment)
        result["engines"] = engines.stdout if engines.exit_code == 0 else ""
        # The last line of a trace is its error; the others are paths of this machine.
        last = engines.tail.strip().rpartition("\n")[2]
        result["engines_failed"] = f"exit code {engines.exit_code}: {last}" if engines.exit_code else ""
    return result


if __name__ == "__main__":
    benchmark(prog_name="python -m benchmarks")

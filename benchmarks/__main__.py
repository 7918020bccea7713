"""`python -m benchmarks DATA`: run all contestants, write the page and the raw results."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import large, machine, page
from .contest import CONTESTANTS, NOT_BY_DEFAULT, Plan, compete, variables, with_needed
from .datasets import prepare
from .measuring import busy_cores, documents, watch

_PACKAGE = __package__ or "benchmarks"
_DOCS = Path(__file__).resolve().parents[1] / "docs"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    default = Plan.__dataclass_fields__
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run kubegraft beside plain Keras and scikit-learn on your images, and write the comparison.",
    )
    made.add_argument("data", type=Path, nargs="?", help="folder of <class>/*.jpg, or train/<class>/*.jpg")
    made.add_argument("--seeds", type=int, default=1, help="how often, each with another test part  [1]")
    made.add_argument(
        "--contestants",
        metavar="A,B,...",
        default=",".join(name for name in CONTESTANTS if name not in NOT_BY_DEFAULT),
        help=f"who takes part, of {', '.join(CONTESTANTS)}  [all but {', '.join(NOT_BY_DEFAULT)}]",
    )
    for name in ("backbone", "weights"):
        made.add_argument(f"--{name}", default=default[name].default, help=f"[{default[name].default}]")
    for name, text in (
        ("input_size", "side of the images in pixels"),
        ("num_blocks", "last blocks that the textbook and kubegraft unfreeze"),
        ("head_epochs", "epochs of the textbook with a frozen backbone"),
        ("tune_epochs", "epochs of the textbook's fine-tuning"),
        ("all_epochs", "epochs of its fine-tuning where it unfreezes everything, which is slow"),
    ):
        flag, value = f"--{name.replace('_', '-')}", default[name].default
        made.add_argument(flag, type=int, default=value, help=f"{text}  [{value}]")
    made.add_argument("--test-fraction", type=float, default=0.3, help="part that nobody chooses by  [0.3]")
    made.add_argument("--no-bare", action="store_true", help="leave out the limits of this machine")
    made.add_argument("--large", action="store_true", help="also throughput on many generated images")
    made.add_argument("--large-images", type=int, default=5000, help="how many  [5000]")
    made.add_argument("--page", type=Path, help="Markdown page to write into  [docs/benchmarks.md]")
    made.add_argument("--json", type=Path, help="raw results; beside the page by default")
    made.add_argument("--work-dir", type=Path, help="where to work; a temporary directory by default")
    made.add_argument(
        "--again", action="store_true", help="only write the page from the raw results that are there"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 if a contestant failed."""
    options = parser().parse_args(arguments)
    page_path = options.page or (_DOCS if _DOCS.is_dir() else Path()) / "benchmarks.md"
    json_path = options.json or page_path.with_suffix(".json")
    if options.again:
        page.write(page_path, json.loads(json_path.read_text(encoding="utf-8")))
        return 0
    names = _names(options.contestants)
    if options.data is None and (names or not options.large):
        raise SystemExit(
            "`data` must be a folder of labelled images. Or say --contestants '' --large without one."
        )
    results = _results(options)
    with tempfile.TemporaryDirectory(prefix="kubegraft-benchmark-", dir=options.work_dir) as work:
        for _ in _stages(options, names, Path(work), results):
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page.write(page_path, results)
    print(page.render(results))
    say(f"written: {page_path}, {json_path}")
    return int(any(record["failed"] for record in (*results["records"], *results["large"])))


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    given = [name.strip() for name in text.split(",") if name.strip()]
    for name in given:
        if name not in CONTESTANTS:
            raise SystemExit(f"`--contestants` must be of {', '.join(CONTESTANTS)}. Received: {name!r}.")
    return with_needed(given)


def _results(options: argparse.Namespace) -> dict[str, Any]:
    facts, busy = machine.facts(), busy_cores()
    if busy > 0.1 * facts["cores"]:
        say(
            f"warning: {busy:.1f} of {facts['cores']} processors are busy, load average {os.getloadavg()[0]:.2f}. The "
            "numbers will be of a machine that does something else too. End that first, and start again."
        )
    names = (
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
            **{name: getattr(options, name) for name in names},
            "data": options.data.name if options.data else "none",
            "test_fraction": options.test_fraction,
            "counts": {},
            "num_new": 0,
        },
        "records": [],
        "bare": {},
        "large": [],
    }


def _stages(options: argparse.Namespace, names: list[str], work: Path, results: dict[str, Any]) -> Any:
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
    if options.large:
        results["large"] = large.compare(work / "large", options.large_images, options.input_size, say)
        yield


def _outcome(record: dict[str, Any]) -> str:
    if record["failed"]:
        return f"failed: {record['failed']}"
    accuracy = {name: round(value, 4) for name, value in record["validation_accuracy"].items() if value}
    return f"took {record['seconds']:.1f} s, validation {accuracy}, test {record['test_accuracy']}"


def _bare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
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
        engines = watch([[sys.executable, "-m", f"{_PACKAGE}.engines"]], environment)
        result["engines"] = engines.stdout if engines.exit_code == 0 else ""
        result["engines_failed"] = engines.tail[-2000:] if engines.exit_code else ""
    return result


if __name__ == "__main__":
    sys.exit(main())

"""The tables of docs/benchmarks.md: what is between the two marks is replaced, the rest is for people to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .arithmetic import FIXED, comparisons, fixed_marks, mean, name_of, noise, overview
from .contest import CONTESTANTS, MEANINGS, NOT_BY_DEFAULT

BEGIN = "<!-- begin: written by `make benchmark` -->"
END = "<!-- end: written by `make benchmark` -->"
_PHASES = {"head": "frozen", "fine_tuned": "fine-tuned"}
_MISSING = "-"


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Put the tables between the marks of a page; a page without marks gets them at its end."""
    text = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(between_marks(text, render(results)), encoding="utf-8")


def between_marks(text: str, content: str) -> str:
    """Return a page with other content between its marks."""
    block = f"{BEGIN}\n\n{content.strip()}\n\n{END}"
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        return before + block + rest.partition(END)[2]
    return f"{text.rstrip()}\n\n{block}\n"


def render(results: Mapping[str, Any]) -> str:
    """Return the page's content: warnings, facts, and a table for each question."""
    records = results["records"]
    parts = [*_warnings(results), _facts(results)]
    if records:
        parts += ["### Contestants", _contestants(records), _meanings(records)]
    if rows := comparisons(records):
        parts += ["### Time to the textbook's accuracy", _comparisons(rows)]
    if records:
        parts += ["### Time to fixed accuracies", _fixed_marks(records)]
    if results.get("bare"):
        parts += ["### Bare limits", _bare(results)]
    if rows := [row for row in results.get("large", ()) if not row["failed"]]:
        parts += ["### Many images, random weights", _large(rows)]
        parts += [_large_facts(run)] if (run := results.get("large_run")) else []
    return "\n\n".join(parts)


def has_tables(path: Path) -> bool:
    """Return whether a page has tables of an earlier benchmark."""
    return path.exists() and BEGIN in path.read_text(encoding="utf-8")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return _MISSING if value is None else form(value)


def _seconds(value: float) -> str:
    return f"{value:.1f} s"


def _accuracy(value: float) -> str:
    return f"{value:.4f}"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


def _warnings(results: Mapping[str, Any]) -> list[str]:
    cores, busy, found = results["machine"]["cores"], results["busy_cores_before"], []
    if busy > 0.1 * cores:
        found.append(f"{busy:.1f} of {cores} processors were busy before the benchmark began")
    found += _disturbances("the contestants", results["machine"], results["records"])
    if run := results.get("large_run"):
        found += _disturbances("the many images", run["machine"], results["large"])
    for record in (*results["records"], *results.get("large", ())):
        if record["failed"]:
            found.append(f"{name_of(record)} failed, and is left out: {record['failed'].splitlines()[0]}")
    if not found:
        return []
    return ["**Not to be relied on:**\n\n" + "\n".join(f"- {line}" for line in found)]


def _disturbances(what: str, machine: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = noise(records, machine["cores"])
    if machine["commit"].endswith("with changes"):
        found.append(f"the checkout that measured {what} had changes that are in no commit")
    return found


def _facts(results: Mapping[str, Any]) -> str:
    machine, plan = results["machine"], results["plan"]
    counts = ", ".join(f"{number:,} {split}" for split, number in plan["counts"].items())
    instructions = ", ".join(machine["instructions"]) or "none of note"
    rows = [
        ["processor", f"{machine['processor']}, {machine['cores']} cores ({instructions})"],
        ["memory", f"{machine['memory_bytes'] / 2**30:.0f} GiB"],
        ["GPUs", "; ".join(machine["gpus"]) or "none"],
        ["versions", _versions(machine)],
        ["date, commit", f"{machine['date']}, {machine['commit'] or 'unknown'}"],
        ["load average before", f"{results['load_average_before']:.2f}"],
    ]
    if results["records"]:
        rows[5:5] = [
            ["images", f"{plan['data']}: {counts}, and {plan['num_new']} new ones for `kubegraft-1%`"],
            [
                "task",
                f"{plan['backbone']}, weights {plan['weights']}, {plan['input_size']} pixels, last "
                f"{plan['num_blocks']} blocks unfrozen; seeds {', '.join(map(str, results['seeds']))}",
            ],
            [
                "epochs of the textbook",
                f"frozen until three bring nothing ({plan['head_epochs']} at most), then {plan['tune_epochs']} "
                f"({plan['all_epochs']} where all unfreezes)",
            ],
        ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _versions(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"Python {machine['python']}, {versions}"


def _contestants(records: Sequence[Mapping[str, Any]]) -> str:
    heads = [
        *("", "validation, frozen", "fine-tuned", "test, frozen", "fine-tuned"),
        *("to textbook's frozen", "to its fine-tuned", "whole process"),
        *("peak memory", "disk", "images decoded"),
    ]
    rows = [
        [
            f"`{row['contestant']}`" + (f" ({row['num_failed']} failed)" if row["num_failed"] else ""),
            *(
                _shown(row[f"{kind}_{phase}"], _accuracy)
                for kind in ("validation_accuracy", "test_accuracy")
                for phase in _PHASES
            ),
            *(_shown(row[f"seconds_to_{phase}"], _seconds) for phase in _PHASES),
            _shown(row["seconds"], _seconds),
            _shown(row["peak_memory_bytes"], _mib),
            _shown(row["disk_bytes"], _mib),
            _shown(row["images_decoded"], "{:,.0f}".format),
        ]
        for row in overview(records)
    ]
    return table(heads, rows)


def _meanings(records: Sequence[Mapping[str, Any]]) -> str:
    names = dict.fromkeys(record["contestant"] for record in records)
    lines = [f"- `{name}`: {MEANINGS[name]}." for name in names]
    absent = [f"`{name}`" for name in CONTESTANTS if name not in {*names, *NOT_BY_DEFAULT}]
    return "\n".join(lines) + (f"\n\nNot in this run: {', '.join(absent)}." if absent else "")


def _comparisons(rows: Sequence[Mapping[str, Any]]) -> str:
    return table(
        ["to the accuracy of", "accuracy", "textbook", "contestant", "its time", "ratio"],
        [
            [
                f"`{row['mark']}`, {_PHASES[row['phase']]}",
                _accuracy(row["accuracy"]),
                _seconds(row["textbook_seconds"]),
                f"`{row['contestant']}`",
                _shown(row["seconds"], _seconds)
                if row["reached"] == row["num_seeds"]
                else f"reached by {row['reached']} of {row['num_seeds']}",
                _shown(row["ratio"], "{:.1f}".format),
            ]
            for row in rows
        ],
    )


def _fixed_marks(records: Sequence[Mapping[str, Any]]) -> str:
    def time_of(row: Mapping[str, Any], accuracy: float) -> str:
        reached, seconds = row["reached"][accuracy], _shown(row["seconds"][accuracy], _seconds)
        return seconds if reached in (0, row["num_seeds"]) else f"{seconds} ({reached} of {row['num_seeds']})"

    return table(
        ["validation accuracy", *(f"{accuracy:.2f}" for accuracy in FIXED)],
        [
            [f"`{row['contestant']}`", *(time_of(row, accuracy) for accuracy in FIXED)]
            for row in fixed_marks(records)
        ],
    )


def _bare(results: Mapping[str, Any]) -> str:
    bare, plan = results["bare"], results["plan"]
    if bare.get("failed"):
        return f"Failed: {bare['failed'].splitlines()[0]}"
    num_frozen, num_train = plan["counts"]["train"] + plan["counts"]["validation"], plan["counts"]["train"]
    stage, epoch = _ours(results["records"])
    rows = [
        [
            f"frozen pass, {engine}",
            f"{rate:,.1f} images/s",
            _seconds(num_frozen / rate),
            _times(stage, num_frozen / rate),
        ]
        for engine, rate in bare["images_per_second"].items()
    ]
    rows += [
        [
            f"an epoch of the {bare['suffix_products']} matrix products of the last {plan['num_blocks']} blocks, "
            f"{dtype}",
            f"{1 / each:,.1f} images/s",
            _seconds(num_train * each),
            _times(epoch, num_train * each),
        ]
        for dtype, each in bare["suffix_seconds_per_image"].items()
    ]
    if stage:
        whole = "kubegraft-cold: stage `train_head` whole, loading and decoding included"
        rows.append([whole, "", _seconds(stage), ""])
    if epoch:
        rows.append(["kubegraft-cold: an epoch of `fine_tune`, validation included", "", _seconds(epoch), ""])
    header = ["", "rate", f"{num_frozen:,} images, or an epoch of {num_train:,}", "kubegraft takes"]
    text = table(header, rows)
    engines = (bare.get("engines") or "").strip()
    if failed := bare.get("engines_failed"):
        return f"{text}\n\nThe rates of the whole frozen pass are missing: {failed}"
    return text + (f"\n\n```text\n{engines}\n```" if engines else "")


def _times(seconds: float | None, limit: float) -> str:
    return f"{seconds / limit:.1f} times as long" if seconds else "-"


def _ours(records: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Return what kubegraft took where the limits hold: its stage with the frozen pass, and an epoch of fine-tuning."""
    cold = [each for each in records if each["contestant"] == "kubegraft-cold" and not each["failed"]]
    stages = [each["stage_seconds"].get("train_head") for each in cold]
    epochs = [
        event["phase_seconds"] / (event["epoch"] + 1)
        for each in cold
        for event in each["events"][-2:]
        if event["stage"] == "fine_tune" and "phase_seconds" in event and "epoch" in event
    ]
    return mean(stages), mean(epochs)


def _large_facts(run: Mapping[str, Any]) -> str:
    machine = run["machine"]
    return (
        f"{run['input_size']} pixels. {machine['processor']}, {machine['cores']} cores; {_versions(machine)}; "
        f"{machine['date']}, {machine['commit'] or 'unknown'}."
    )


def _large(rows: Sequence[Mapping[str, Any]]) -> str:
    return table(
        ["backbone", "way", "images", "rate", "work", "whole process", "peak memory"],
        [
            [
                row["backbone"] or "any",
                f"`{row['way']}`",
                f"{row['num_images']:,}",
                _shown(row["images_per_second"], "{:,.1f} images/s".format),
                _seconds(row["work_seconds"]),
                _seconds(row["seconds"]),
                _mib(row["peak_memory_bytes"]),
            ]
            for row in rows
        ],
    )

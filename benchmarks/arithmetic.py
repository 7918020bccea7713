"""From what was seen to what is compared. A record is a dict, as it stands in the JSON file (see `contest`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

# Accuracies of the same images differ by one image or not at all; logs round.
TOLERANCE = 1e-5
PHASES = ("head", "fine_tuned")
# Whose final accuracy is the mark, and in which phase.
MARKS = (
    ("textbook", "head"),
    ("textbook", "fine_tuned"),
    ("textbook-cache", "head"),
    ("textbook-cache", "fine_tuned"),
    ("textbook-all", "fine_tuned"),
)

# Validation accuracies that do not depend on how well anybody's textbook does.
FIXED = (0.90, 0.95, 0.98)

Record = Mapping[str, Any]


def seconds_to(events: Iterable[Mapping[str, Any]], accuracy: float) -> float | None:
    """Return the seconds from the start until validation accuracy was as high, or None if it never was.

    Args:
        events: In the order of time; those without `validation_accuracy` don't count.
        accuracy: In [0, 1].
    """
    for event in events:
        found = event.get("validation_accuracy")
        if found is not None and found >= accuracy - TOLERANCE:
            return float(event["seconds"])
    return None


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, or None if a value is missing: a mean of some seeds would compare different runs."""
    listed = list(values)
    return fmean(listed) if listed and None not in listed else None  # type: ignore[arg-type]


def nested(record: Record, *names: str) -> Any:
    """Return what is under a path of names, or None."""
    value: Any = record
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def of_contestant(records: Sequence[Record], name: str) -> list[Record]:
    """Return the records of one contestant that ended well, by seed."""
    return sorted(
        (record for record in records if record["contestant"] == name and not record["failed"]),
        key=lambda record: record["seed"],
    )


def marks(records: Sequence[Record], name: str, phase: str) -> dict[int, float]:
    """Return the final validation accuracy of a contestant in a phase, by seed."""
    found = {
        record["seed"]: nested(record, "validation_accuracy", phase)
        for record in of_contestant(records, name)
    }
    return {seed: accuracy for seed, accuracy in found.items() if accuracy is not None}


def times_to(records: Sequence[Record], name: str, mark: Mapping[int, float]) -> list[float | None]:
    """Return the seconds that a contestant needed to each seed's mark; None where it did not reach it."""
    own = {record["seed"]: record for record in of_contestant(records, name)}
    return [
        seconds_to(own[seed]["events"], accuracy) if seed in own else None for seed, accuracy in mark.items()
    ]


def comparisons(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return how long each contestant took to each mark, beside the one who set it.

    Returns:
        A row for each mark and other contestant: `mark`, `phase`, `accuracy` (mean over seeds), `textbook_seconds`,
        `contestant`, `seconds` (None unless every seed reached the mark), `ratio`, `reached` and `num_seeds`.
    """
    names = list(dict.fromkeys(record["contestant"] for record in records))
    rows = []
    for name, phase in MARKS:
        mark = marks(records, name, phase)
        own = mean(times_to(records, name, mark))
        for other in names if mark and own else ():
            if other.startswith("textbook"):
                continue
            times = times_to(records, other, mark)
            seconds = mean(times)
            rows.append(
                {
                    "mark": name,
                    "phase": phase,
                    "accuracy": fmean(mark.values()),
                    "textbook_seconds": own,
                    "contestant": other,
                    "seconds": seconds,
                    "ratio": own / seconds if own and seconds else None,
                    "reached": sum(each is not None for each in times),
                    "num_seeds": len(times),
                }
            )
    return rows


def fixed_marks(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return how long each contestant took to the accuracies of `FIXED`, whatever others came to.

    Returns:
        A row for each contestant: `contestant`, `num_seeds`, and by accuracy the `seconds` (mean of the seeds that got
        there, or None) and how many `reached` it.
    """
    rows = []
    for name in dict.fromkeys(record["contestant"] for record in records):
        seeds = [record["seed"] for record in of_contestant(records, name)]
        row: dict[str, Any] = {"contestant": name, "num_seeds": len(seeds), "seconds": {}, "reached": {}}
        for accuracy in FIXED:
            times = times_to(records, name, dict.fromkeys(seeds, accuracy))
            there = [each for each in times if each is not None]
            row["seconds"][accuracy], row["reached"][accuracy] = mean(there) if there else None, len(there)
        rows.append(row)
    return rows


def overview(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return a row for each contestant, means over its seeds; None where a seed has no such value."""
    rows = []
    for name in dict.fromkeys(record["contestant"] for record in records):
        own = of_contestant(records, name)
        row: dict[str, Any] = {
            "contestant": name,
            "num_seeds": len(own),
            "num_failed": sum(record["contestant"] == name for record in records) - len(own),
        }
        for kind in ("validation_accuracy", "test_accuracy"):
            for phase in PHASES:
                row[f"{kind}_{phase}"] = mean(nested(record, kind, phase) for record in own)
        for phase in PHASES:
            row[f"seconds_to_{phase}"] = mean(times_to(records, name, marks(records, "textbook", phase)))
        for field in ("seconds", "peak_memory_bytes", "disk_bytes", "images_decoded"):
            row[field] = mean(record[field] for record in own)
        rows.append(row)
    return rows


def name_of(record: Record) -> str:
    """Return whose record it is: of a contestant and a seed, or of a backbone and a way."""
    if "contestant" in record:
        return f"{record['contestant']}, seed {record['seed']}"
    return f"{record['backbone']} {record['way']}".strip()


def noise(records: Sequence[Record], cores: int) -> list[str]:
    """Return a sentence for each record that shared the machine: more than a tenth of it was used by others."""
    return [
        f"{name_of(record)}: {record['other_cores']:.1f} of {cores} processors were busy with something else"
        for record in records
        if record["other_cores"] > 0.1 * cores
    ]

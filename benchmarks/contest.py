"""Who competes, with which commands, and what is kept of each.

A record in the JSON file: `contestant`, `seed`, `failed` (why, or ""), `seconds`, `events` (those with a validation
accuracy, `seconds` since the process started), `validation_accuracy` and `test_accuracy` by phase (`head`,
`fine_tuned`), `peak_memory_bytes`, `disk_bytes`, `images_decoded` (None where nobody counts), `cpu_seconds`,
`other_cores`, `load_average`, `details`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arithmetic import nested
from .datasets import Prepared
from .measuring import Seen, disk_bytes, documents, watch

_PACKAGE = __package__ or "benchmarks"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is the same for all contestants of one seed."""

    data: Prepared
    work: Path
    seed: int
    backbone: str = "efficientnet_lite0"
    weights: str = "imagenet"
    input_size: int = 224
    num_blocks: int = 5
    head_epochs: int = 30
    tune_epochs: int = 6
    all_epochs: int = 10

    def directory(self, name: str) -> Path:
        """Return what a contestant writes to; it is not there yet."""
        return self.work / name.replace("%", "")

    @property
    def cache(self) -> Path:
        """kubegraft's feature cache; empty for `kubegraft-cold`."""
        return self.work / "cache"


Commands = list[list[str]]


def _textbook(name: str, *flags: str) -> Callable[[Plan], Commands]:
    def commands(plan: Plan) -> Commands:
        depth, epochs = (
            (-1, plan.all_epochs) if name == "textbook-all" else (plan.num_blocks, plan.tune_epochs)
        )
        return [
            [
                *_module("textbook", plan, name),
                *("--num-blocks", str(depth), "--tune-epochs", str(epochs)),
                *("--head-epochs", str(plan.head_epochs), *flags),
            ]
        ]

    return commands


def _features(plan: Plan) -> Commands:
    return [_module("features_logreg", plan, "features-logreg")]


def _module(module: str, plan: Plan, name: str) -> list[str]:
    command = [sys.executable, "-m", f"{_PACKAGE}.{module}", str(plan.data.base)]
    return [*command, "--output", str(plan.directory(name)), *_shared(plan)]


def _shared(plan: Plan) -> list[str]:
    return [
        *("--backbone", plan.backbone, "--weights", plan.weights),
        *("--input-size", str(plan.input_size), "--seed", str(plan.seed)),
    ]


def kubegraft(*arguments: object) -> list[str]:
    """Return the command that calls this very kubegraft."""
    return [sys.executable, "-m", "kubegraft", *map(str, arguments)]


def _run(
    name: str, *flags: str, grown: bool = False, chosen_depth: bool = False, setting: str = ""
) -> Callable[[Plan], Commands]:
    def commands(plan: Plan) -> Commands:
        data = plan.data.grown if grown else plan.data.base
        depth = [] if chosen_depth else ["--num-blocks", plan.num_blocks]
        command = kubegraft(
            "run", data, "--output", plan.directory(name), *depth, *_shared(plan), *flags, "--json"
        )
        return [["env", setting, *command] if setting else command]

    return commands


def _warm_head(plan: Plan) -> Commands:
    """Head and evaluation alone, on the dataset that the cold run ingested."""
    dataset = next(plan.directory("kubegraft-cold").glob("kfp/*/ingest/dataset"))
    root = plan.directory("kubegraft-warm-head")
    return [
        kubegraft("train-head", dataset, "--output", root / "head", *_shared(plan), "--json"),
        kubegraft("evaluate", dataset, root / "head", "--output", root / "evaluation", "--json"),
    ]


# In the order in which they run: the textbook sets the marks, and `kubegraft-cold` fills the cache.
CONTESTANTS: dict[str, Callable[[Plan], Commands]] = {
    "textbook": _textbook("textbook"),
    "textbook-cache": _textbook("textbook-cache", "--cache"),
    "textbook-all": _textbook("textbook-all"),
    "features-logreg": _features,
    "kubegraft-cold": _run("kubegraft-cold"),
    "kubegraft-warm": _run("kubegraft-warm"),
    "kubegraft-warm-head": _warm_head,
    "kubegraft-1%": _run("kubegraft-1%", grown=True),
    "kubegraft-auto": _run("kubegraft-auto", chosen_depth=True),
    "kubegraft-xla": _run("kubegraft-xla", setting="KUBEGRAFT_XLA=on"),
    "kubegraft-float32": _run("kubegraft-float32", "--mixed-precision", "off"),
}
NOT_BY_DEFAULT = ("kubegraft-auto", "kubegraft-xla", "kubegraft-float32")
NEED_COLD = ("kubegraft-warm", "kubegraft-warm-head", "kubegraft-1%")
MEANINGS = {
    "textbook": "plain Keras: frozen backbone in `fit`, then the last blocks unfrozen and `fit` again",
    "textbook-cache": "the same, decoded images kept in memory by `cache()`",
    "textbook-all": "the same, but all blocks unfrozen, at the rate of Keras's guide (1e-5)",
    "features-logreg": "`model.predict`, then scikit-learn's logistic regression",
    "kubegraft-cold": "`kubegraft run` with an empty cache, evaluation and verified export included",
    "kubegraft-warm": "the same again: new output directory, same cache",
    "kubegraft-warm-head": "`kubegraft train-head` and `kubegraft evaluate` on the ingested dataset, same cache",
    "kubegraft-1%": "`kubegraft run` with 1 % new training images, same cache",
    "kubegraft-auto": "`kubegraft run` with an empty cache, which chooses the number of blocks itself",
    "kubegraft-xla": "`kubegraft-cold` with training steps compiled by XLA; for GPUs",
    "kubegraft-float32": "`kubegraft-cold` without mixed precision; for GPUs",
}


def with_needed(names: Sequence[str]) -> list[str]:
    """Return contestants in the order in which they run, those that others need included."""
    wanted = {*names, *(["kubegraft-cold"] if set(names) & set(NEED_COLD) else [])}
    return [name for name in CONTESTANTS if name in wanted]


def compete(name: str, plan: Plan) -> dict[str, Any]:
    """Run one contestant, and return its record."""
    # What others left, engines too, would make these warm.
    apart = name in NOT_BY_DEFAULT
    own_cache = plan.work / f"cache-{name}" if apart else plan.cache
    home = plan.work / (f"home-{name}" if apart else "home")
    try:
        commands = CONTESTANTS[name](plan)
    except StopIteration:
        return record_of(name, plan.seed, Seen(exit_code=-1, tail="kubegraft-cold left no dataset"), [])
    seen = watch(commands, variables(own_cache, home))
    written = [plan.directory(name), *([own_cache] if name.startswith("kubegraft") else [])]
    return record_of(name, plan.seed, seen, written)


def variables(cache: Path, home: Path) -> dict[str, str]:
    """Return the environment of contestants: a cache of their own, and nothing that earlier runs have left."""
    # A checkout is not installed, and the caller may be anywhere.
    ours = [] if "." in _PACKAGE else [str(Path(__file__).resolve().parents[1])]
    return {
        "PYTHONPATH": os.pathsep.join([*ours, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "KUBEGRAFT_CACHE": str(cache),
        "KUBEGRAFT_LOG_FORMAT": "json",
        "XDG_CACHE_HOME": str(home),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONUNBUFFERED": "1",
        # What `kubegraft run` and the images ask for, which makes Keras quicker as well.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }


def record_of(name: str, seed: int, seen: Seen, written: Sequence[Path]) -> dict[str, Any]:
    """Return what is kept of what was seen."""
    found = documents(seen.stdout)
    failed = "" if seen.exit_code == 0 and found else f"exit code {seen.exit_code}: {seen.tail[-2000:]}"
    result = _result(found) if not failed else {}
    return {
        "contestant": name,
        "seed": seed,
        "failed": failed,
        "seconds": round(seen.seconds, 2),
        "events": [event for event in seen.events if event.get("validation_accuracy") is not None],
        "validation_accuracy": result.get("validation_accuracy", {}),
        "test_accuracy": result.get("test_accuracy", {}),
        "peak_memory_bytes": seen.peak_memory_bytes,
        "disk_bytes": disk_bytes(*written),
        "images_decoded": result.get("images_decoded", images_decoded(seen.events)),
        "cpu_seconds": round(seen.cpu_seconds, 2),
        "other_cores": seen.other_cores,
        "load_average": seen.load_average,
        "stage_seconds": stage_seconds(seen.events),
        "details": {key: result[key] for key in ("epoch_seconds", "feature_seconds") if key in result},
    }


def _result(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return accuracies by phase from what a contestant printed: ours, a run's summary, or stages' results."""
    last = found[-1]
    if "stage" in last:  # train-head, then perhaps evaluate
        by_stage = {document["stage"]: document["metrics"] for document in found}
        return {
            "validation_accuracy": {"head": nested(by_stage, "train_head", "validation_accuracy")},
            "test_accuracy": {"head": nested(by_stage, "evaluate", "test_accuracy")},
        }
    if "kubegraft" in last:
        return {
            "validation_accuracy": last["validation_accuracy"],
            "test_accuracy": {
                "head": last["test"].get("reference_test_accuracy"),
                "fine_tuned": last["test"].get("test_accuracy"),
            },
        }
    return last


def images_decoded(events: Sequence[dict[str, Any]]) -> int | None:
    """Return the images that kubegraft decoded to train on, as far as its events say; None if they don't.

    The stages' own counters; without them, what the feature cache had to compute of one kind of value.
    """
    # The metrics of a stage, in its event `finished`, repeat its counter.
    counters = [event for event in events if event["event"] == "frozen passes"]
    counted = [int(event["images_decoded"]) for event in counters if "images_decoded" in event]
    if counted:
        return sum(counted)
    computed: dict[str, int] = {}
    for event in events:
        if event.get("stage") == "cache" and "computed" in event:
            kind = str(event.get("kind"))
            computed[kind] = computed.get(kind, 0) + int(event["computed"])
    return max(computed.values()) if computed else None


def stage_seconds(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return how long each of kubegraft's stages worked, from `started` to `finished`; start-up is between them."""
    starts: dict[str, float] = {}
    took: dict[str, float] = {}
    for event in events:
        stage = str(event.get("stage"))
        if event["event"] == "started":
            starts[stage] = event["seconds"]
        elif event["event"] in ("finished", "reused") and stage in starts:
            took[stage] = round(event["seconds"] - starts[stage], 2)
    return took

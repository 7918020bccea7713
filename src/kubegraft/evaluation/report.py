"""`report.html` of an evaluation: what the numbers mean, with the images that went wrong."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from kubegraft.config import EvaluateConfig
from kubegraft.data.manifest import SPLITS, ImageRecord, Manifest, read_quarantine
from kubegraft.evaluation.calibration import ReliabilityBin
from kubegraft.evaluation.metrics import Answers, confusion_matrix
from kubegraft.stage import write_atomically

_THUMBNAIL_SIDE: Final = 96
_MOST_LISTED_FILES: Final = 200
_MOST_LISTED_CLASSES: Final = 1000
_MOST_PAIRS: Final = 30


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model and what it said about the test split.

    Attributes:
        directory: Its model directory.
        metadata: Contents of its `model.json`.
        answers: Its answers, in the order of the split.
    """

    directory: Path
    metadata: dict[str, Any]
    answers: Answers


def write_report(
    path: Path,
    dataset_dir: Path,
    manifest: Manifest,
    models: Sequence[EvaluatedModel],
    images: Sequence[ImageRecord],
    measured: dict[str, Any],
    config: EvaluateConfig,
) -> None:
    """Write the report of `models[0]`, compared with `models[1]` if there is one.

    Args:
        path: File to write.
        dataset_dir: Output of `ingest`.
        manifest: Its manifest.
        models: The model and perhaps its reference.
        images: Records of the test split, in its order.
        measured: Contents of `metrics.json`.
        config: How to report.
    """
    from kubegraft.reporting.html import render

    model = models[0]
    page = render(
        "evaluation.html",
        manifest=manifest,
        splits=[(name, manifest.splits[name].num_images) for name in SPLITS],
        model=model.metadata,
        metrics=measured["metrics"],
        level=f"{100 * config.confidence_level:g}",
        worst=_worst_images(dataset_dir, manifest, model.answers, images, config.num_worst_images),
        classes=_class_rows(measured, model.answers),
        pairs=_confused_pairs(measured),
        quarantine=_quarantine(dataset_dir),
        recipe=_recipe(model.metadata),
        provenance=_provenance(manifest, models, config),
        **_plots(model, measured),
    )
    write_atomically(path, page)


def _plots(model: EvaluatedModel, measured: dict[str, Any]) -> dict[str, Any]:
    from kubegraft.reporting import plots

    phases = _histories(model.directory)
    bars = [
        plots.Bar(
            row["class"], row["recall"], row["recall_low"], row["recall_high"], f"of {row['num_images']}"
        )
        for row in sorted(measured["per_class"], key=lambda row: (row["recall"], -row["num_images"]))
        if row["num_images"]
    ]
    return {
        "accuracy_curves": plots.learning_curves(
            plots.phase_curves(phases, "accuracy"), "accuracy", fraction=True
        ),
        "loss_curves": plots.learning_curves(plots.phase_curves(phases, "loss"), "loss"),
        "has_curves": any(phase["epochs"] for phase in phases),
        "has_path": any(phase.get("solver") == "lbfgs" for phase in phases),
        "matrix": plots.confusion_heat_map(confusion_matrix(model.answers), measured["classes"]),
        "reliability": plots.reliability_diagram(
            [ReliabilityBin(**each) for each in measured["calibration"]]
        ),
        "recall_bars": plots.horizontal_bars(bars, "recall"),
        "num_bars": min(len(bars), plots.MOST_BARS),
        "comparison": plots.horizontal_bars(_comparison_bars(measured["metrics"]), "test accuracy"),
    }


def _comparison_bars(metrics: dict[str, float]) -> list[Any]:
    from kubegraft.reporting.html import percent
    from kubegraft.reporting.plots import Bar

    names = {"reference_test_accuracy": "before fine-tuning", "test_accuracy": "after fine-tuning"}
    return [
        Bar(label, metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"], percent(metrics[name]))
        for name, label in names.items()
        if name in metrics
    ]


def _histories(model_dir: Path) -> list[dict[str, Any]]:
    """Return the histories of both phases, as far as the model has them, in the order they ran."""
    files = (model_dir / name for name in ("head_history.json", "history.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def _worst_images(
    dataset_dir: Path, manifest: Manifest, answers: Answers, images: Sequence[ImageRecord], most: int
) -> dict[str, Any]:
    """Return the wrong answers that were given with most confidence; without any, the least certain."""
    from kubegraft.data.shards import SplitReader

    wrong = np.flatnonzero(~answers.correct)
    chosen = wrong if len(wrong) else np.arange(len(answers))
    chosen = chosen[np.argsort(answers.label_probability[chosen], kind="stable")][:most]
    with SplitReader(dataset_dir, manifest, "test") as reader:
        shown = [
            {
                "picture": _thumbnail(reader.read(int(index))),
                "true": manifest.classes[answers.labels[index]],
                "predicted": manifest.classes[answers.predicted[index]],
                "probability": float(answers.confidence[index]),
                "label_probability": float(answers.label_probability[index]),
                "path": images[int(index)].path,
            }
            for index in chosen
        ]
    return {"images": shown, "num_wrong": len(wrong)}


def _thumbnail(encoded: bytes) -> str:
    """Return a data URI of the image as the model saw it, at most 96 pixels high and twice as wide."""
    from PIL import Image

    from kubegraft.data.decode import decode_bytes

    picture = Image.fromarray(decode_bytes(encoded))
    picture.thumbnail((2 * _THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _class_rows(measured: dict[str, Any], answers: Answers) -> dict[str, Any]:
    """Return the table of classes: the worst 1,000 if there are more, in the order of their labels."""
    matrix = confusion_matrix(answers)
    np.fill_diagonal(matrix, 0)
    f1 = np.array([row["f1"] if row["num_images"] else 2.0 for row in measured["per_class"]])
    listed = np.sort(np.argsort(f1, kind="stable")[:_MOST_LISTED_CLASSES])
    rows = []
    for index in listed:
        row, mistaken = measured["per_class"][index], int(matrix[index].argmax())
        images = int(matrix[index, mistaken])
        confusion = f"{measured['classes'][mistaken]} ({images})" if images else ""
        rows.append({**row, "mistaken_for": confusion})
    return {"rows": rows, "num_all": len(f1)}


def _confused_pairs(measured: dict[str, Any]) -> list[dict[str, Any]]:
    cells = [cell for cell in measured["confusion_cells"] if cell[0] != cell[1]]
    names, rows = measured["classes"], measured["per_class"]
    return [
        {"true": names[true], "called": names[called], "images": images, "of": rows[true]["num_images"]}
        for true, called, images in sorted(cells, key=lambda cell: -cell[2])[:_MOST_PAIRS]
    ]


def _quarantine(dataset_dir: Path) -> dict[str, Any]:
    files = read_quarantine(dataset_dir)
    return {
        "reasons": Counter(file.reason for file in files).most_common(),
        "files": [(file.path, file.reason, file.detail) for file in files[:_MOST_LISTED_FILES]],
        "num_all": len(files),
    }


def _recipe(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of each phase."""
    own = {"train_head": "Head training", "fine_tune": "Fine-tuning"}.get(metadata["stage"], "Training")
    phases = [("Head training", metadata.get("head_choices") or []), (own, metadata.get("choices") or [])]
    return [
        {"name": name, "rows": [(each["name"], _shown(each["value"]), each["reason"]) for each in choices]}
        for name, choices in phases
        if choices
    ]


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _provenance(
    manifest: Manifest, models: Sequence[EvaluatedModel], config: EvaluateConfig
) -> list[tuple[str, str]]:
    metadata = models[0].metadata
    seeds = {"split": manifest.seed, "training": metadata["config"]["seed"], "evaluation": config.seed}
    reference = [("model before", str(each.metadata["model_digest"])) for each in models[1:]]
    return [
        ("images", manifest.source),
        ("dataset digest", manifest.digest),
        ("backbone", metadata["backbone"]),
        ("pretrained weights", f"{metadata['weights']}, digest {metadata['weights_digest']}"),
        ("model digest", metadata["model_digest"]),
        *reference,
        ("seeds", ", ".join(f"{name} {seed}" for name, seed in seeds.items())),
        *sorted((f"{name} version", str(number)) for name, number in metadata["versions"].items()),
    ]

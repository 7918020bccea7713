"""Stage `evaluate`: the test split, used here and nowhere else.

metrics.json        everything measured, for scripts
predictions.jsonl   one answer a line, in the order of the test split
report.html         the same for people; see `kubegraft.evaluation.report`
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from kubegraft import __version__
from kubegraft.config import EvaluateConfig
from kubegraft.data.manifest import ImageRecord, Manifest, load_manifest, read_images
from kubegraft.errors import EvaluationError
from kubegraft.evaluation.calibration import expected_calibration_error, reliability_bins
from kubegraft.evaluation.intervals import (
    Resampling,
    accuracy_gain_interval,
    accuracy_interval,
    macro_f1_interval,
    top_k_interval,
    wilson_interval,
)
from kubegraft.evaluation.metrics import (
    TOP_K,
    Answers,
    accuracy,
    class_scores,
    confusion_matrix,
    log_loss,
    macro_f1,
    top_k_accuracy,
)
from kubegraft.evaluation.report import EvaluatedModel, write_report
from kubegraft.stage import Outcome, StageResult, Workspace, read_result, run_stage, write_atomically

METRICS_FILE: Final = "metrics.json"
PREDICTIONS_FILE: Final = "predictions.jsonl"
REPORT_FILE: Final = "report.html"
SCHEMA: Final = 1
_MOST_MATRIX_CLASSES: Final = 1000  # a square of numbers beyond this makes a file that no one opens
_MOST_LOGGED_CLASSES: Final = 60
_OTHERS: Final = "(other classes)"


def evaluate(
    dataset_dir: str | os.PathLike[str],
    model_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    config: EvaluateConfig,
    reference_dir: str | os.PathLike[str] | None = None,
) -> StageResult:
    """Measure a model on the test split and write an evaluation directory.

    Args:
        dataset_dir: Output of `ingest`.
        model_dir: Output of `train_head` or `fine_tune`.
        output_dir: Directory to make.
        config: How to report.
        reference_dir: Model to compare with, usually the one before fine-tuning; None compares with nothing.

    Returns:
        The result; its metrics hold `test_accuracy` with its interval and, with a reference, `accuracy_gain`.

    Raises:
        EvaluationError: If there are no test images, or a model knows other classes than the dataset.
        DataError: If the dataset can't be read.
        ModelError: If a model can't be read.
    """
    manifest = load_manifest(dataset_dir)
    if not manifest.splits["test"].num_images:
        raise EvaluationError(
            "`test` split must hold images to evaluate on. Received: test=0 images. Ingest with a test/ "
            "folder, more images, or a larger `test_fraction`."
        )
    inputs = {"dataset": read_result(dataset_dir).digest, "model": read_result(model_dir).digest}
    if reference_dir is not None:
        inputs["reference"] = read_result(reference_dir).digest

    def body(workspace: Workspace) -> Outcome:
        directories = [Path(model_dir), *([Path(reference_dir)] if reference_dir is not None else [])]
        return _Evaluation(Path(dataset_dir), manifest, directories, config, workspace).write(inputs)

    return run_stage("evaluate", output_dir, inputs=inputs, config=config, body=body)


def confusion_matrix_of(evaluation_dir: str | os.PathLike[str]) -> tuple[list[str], list[list[int]]]:
    """Return class names and the confusion matrix, for KFP's `log_confusion_matrix`.

    The KFP UI draws every cell, so of more than 60 classes the ones with most errors are kept and the rest
    are counted together.

    Args:
        evaluation_dir: Output of `evaluate`.

    Raises:
        EvaluationError: If there is no readable `metrics.json` in it.
    """
    path = Path(evaluation_dir) / METRICS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        classes, cells = values["classes"], np.array(values["confusion_cells"], np.int64).reshape(-1, 3)
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(
            f"`{evaluation_dir}` must be the output of evaluate, with a readable {METRICS_FILE}. Received: "
            f"{type(error).__name__}: {error}. Evaluate the model again."
        ) from error
    names, group = _grouped(classes, cells)
    matrix = np.zeros((len(names), len(names)), np.int64)
    np.add.at(matrix, (group[cells[:, 0]], group[cells[:, 1]]), cells[:, 2])
    return names, matrix.tolist()


def _grouped(classes: list[str], cells: np.ndarray[Any, Any]) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Return the names to show, and for each class the position of its name."""
    if len(classes) <= _MOST_LOGGED_CLASSES:
        return classes, np.arange(len(classes))
    wrong = cells[cells[:, 0] != cells[:, 1]]
    errors = np.bincount(wrong[:, 0], wrong[:, 2], len(classes))
    kept = np.sort(np.argsort(-errors, kind="stable")[: _MOST_LOGGED_CLASSES - 1])
    group = np.full(len(classes), len(kept))
    group[kept] = np.arange(len(kept))
    return [*(classes[index] for index in kept), _OTHERS], group


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """One evaluation: a model, perhaps a reference, and what they answer."""

    dataset_dir: Path
    manifest: Manifest
    model_dirs: Sequence[Path]
    config: EvaluateConfig
    workspace: Workspace

    def write(self, inputs: dict[str, str]) -> Outcome:
        """Measure and write everything."""
        from kubegraft import tensorflow_setup

        tensorflow_setup.setup(self.config.seed)
        directory = self.workspace.staging
        models, work = self._answered()
        images = [image for image in read_images(self.dataset_dir) if image.split == "test"]
        measured = self._measured(models)
        content = json.dumps({**measured, "inputs": inputs}, indent=1, ensure_ascii=False) + "\n"
        predictions = _prediction_lines(models[0].answers, images, self.manifest.classes)
        write_atomically(directory / METRICS_FILE, content)
        write_atomically(directory / PREDICTIONS_FILE, predictions)
        write_report(
            directory / REPORT_FILE, self.dataset_dir, self.manifest, models, images, measured, self.config
        )
        provenance = {f"{name}_digest": digest for name, digest in inputs.items()}
        provenance |= {"seed": str(self.config.seed), "kubegraft": __version__}
        digest = hashlib.sha256(content.encode() + predictions.encode()).hexdigest()
        return Outcome(digest=digest, metrics={**measured["metrics"], **work}, provenance=provenance)

    def _answered(self) -> tuple[list[EvaluatedModel], dict[str, float]]:
        """Return what each model says of the test split, and how much of the frozen parts was computed for it."""
        from kubegraft.data.shards import SplitReader
        from kubegraft.evaluation.inference import answer_split
        from kubegraft.modeling.classifier import load_classifier
        from kubegraft.modeling.model_files import classifier_metadata
        from kubegraft.training.frozen_pass import PassCounts, work_of

        models, counts, next_cut = list[EvaluatedModel](), PassCounts(), 0
        metadata = [classifier_metadata(model_dir) for model_dir in self.model_dirs]
        for found, model_dir in zip(metadata, self.model_dirs, strict=True):
            _require_same_classes(found["classes"], self.manifest.classes, model_dir)
        if {found["backbone"] for found in metadata} == {metadata[0]["backbone"]}:
            next_cut = metadata[0]["num_unfrozen_blocks"]
        with SplitReader(self.dataset_dir, self.manifest, "test") as reader:
            # From the last to the first: a pass through a whole frozen backbone goes by what a fine-tuned model needs.
            for number in reversed(range(len(metadata))):
                directory = self.workspace.scratch / f"model-{number}"
                directory.mkdir(exist_ok=True)
                loaded = load_classifier(self.model_dirs[number])
                answers = answer_split(loaded, reader, directory, counts, next_cut if number else 0)
                models.insert(0, EvaluatedModel(self.model_dirs[number], dict(loaded.metadata), answers))
        return models, work_of("evaluate", counts, [reader])

    def _measured(self, models: Sequence[EvaluatedModel]) -> dict[str, Any]:
        answers = models[0].answers
        matrix = confusion_matrix(answers)
        rows, columns = np.nonzero(matrix)
        return {
            "schema": SCHEMA,
            "metrics": self._metrics(answers, [model.answers for model in models[1:]]),
            "confidence_level": self.config.confidence_level,
            "num_bootstrap_samples": self.config.num_bootstrap_samples,
            "classes": list(self.manifest.classes),
            "per_class": self._per_class(matrix),
            "confusion_matrix": matrix.tolist() if len(matrix) <= _MOST_MATRIX_CLASSES else None,
            "confusion_cells": np.stack([rows, columns, matrix[rows, columns]], axis=1).tolist(),
            "calibration": [
                {name: getattr(each, name) for name in each.__slots__}
                for each in reliability_bins(answers, self.config.num_calibration_bins)
            ],
        }

    def _metrics(self, answers: Answers, references: Sequence[Answers]) -> dict[str, float]:
        resampling = Resampling(
            self.config.num_bootstrap_samples, self.config.confidence_level, self.config.seed
        )
        k = min(TOP_K, answers.num_classes)
        metrics = {
            "num_test": float(len(answers)),
            "test_accuracy": accuracy(answers),
            **_ends("test_accuracy", accuracy_interval(answers, resampling)),
            "test_macro_f1": macro_f1(confusion_matrix(answers)),
            **_ends("test_macro_f1", macro_f1_interval(answers, resampling)),
            "test_top5_accuracy": top_k_accuracy(answers, k),
            **_ends("test_top5_accuracy", top_k_interval(answers, resampling, k)),
            "test_loss": log_loss(answers),
            "test_calibration_error": expected_calibration_error(answers, self.config.num_calibration_bins),
        }
        for reference in references:
            before = accuracy(reference)
            metrics["reference_test_accuracy"] = before
            metrics |= _ends("reference_test_accuracy", accuracy_interval(reference, resampling))
            metrics["accuracy_gain"] = metrics["test_accuracy"] - before
            metrics |= _ends("accuracy_gain", accuracy_gain_interval(answers, reference, resampling))
        return metrics

    def _per_class(self, matrix: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
        scores = class_scores(matrix)
        low, high = wilson_interval(np.diagonal(matrix), scores.support, self.config.confidence_level)
        return [
            {
                "class": name,
                "num_images": int(scores.support[index]),
                "precision": float(scores.precision[index]),
                "recall": float(scores.recall[index]),
                "recall_low": float(low[index]),
                "recall_high": float(high[index]),
                "f1": float(scores.f1[index]),
            }
            for index, name in enumerate(self.manifest.classes)
        ]


def _ends(name: str, interval: tuple[float, float]) -> dict[str, float]:
    return {f"{name}_low": interval[0], f"{name}_high": interval[1]}


def _prediction_lines(answers: Answers, images: Sequence[ImageRecord], classes: Sequence[str]) -> str:
    lines = (
        json.dumps(
            {
                "path": image.path,
                "sha256": image.sha256,
                "true": classes[answers.labels[index]],
                "predicted": classes[answers.predicted[index]],
                "probability": round(float(answers.confidence[index]), 7),
                "correct": bool(answers.labels[index] == answers.predicted[index]),
            },
            ensure_ascii=False,
        )
        for index, image in enumerate(images)
    )
    return "".join(line + "\n" for line in lines)


def _require_same_classes(model: Sequence[str], dataset: Sequence[str], model_dir: Path) -> None:
    if tuple(model) == tuple(dataset):
        return
    only_model, only_dataset = sorted(set(model) - set(dataset)), sorted(set(dataset) - set(model))
    difference = (
        f"only in the model: {only_model}, only in the dataset: {only_dataset}"
        if only_model or only_dataset
        else "the same names in another order"
    )
    raise EvaluationError(
        f"`classes` of the model must be those of the dataset, in the same order. Received: {difference} "
        f"({model_dir}). Evaluate on the dataset that the model was trained on."
    )

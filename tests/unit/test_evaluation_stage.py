from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from kubegraft.config import EvaluateConfig
from kubegraft.data.decode import decode_bytes
from kubegraft.data.manifest import load_manifest, read_images
from kubegraft.data.shards import SplitReader
from kubegraft.errors import DataError, EvaluationError, ModelError
from kubegraft.evaluation import evaluate as stage
from kubegraft.evaluation.evaluate import confusion_matrix_of, evaluate
from kubegraft.evaluation.inference import answer_split
from kubegraft.modeling.classifier import load_classifier
from kubegraft.training.frozen_pass import PassCounts
from tests.classifier_stages import NAMES, write_dataset, write_model


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    dataset = write_dataset(root)
    model = write_model(root / "model", dataset, skill=8)
    reference = write_model(root / "reference", dataset, skill=-1)
    result = evaluate(
        dataset, model, root / "evaluation", EvaluateConfig(num_bootstrap_samples=200), reference
    )
    return {"root": root, "dataset": dataset, "model": model, "reference": reference, "result": result}


@pytest.mark.parametrize("num_unfrozen", [0, 3, 16])  # of 16: nothing is frozen
def test_answers_are_those_of_the_model_itself_one_image_at_a_time(paths, tmp_path, num_unfrozen):
    manifest = load_manifest(paths["dataset"])
    loaded = load_classifier(paths["model"])
    loaded.metadata["num_unfrozen_blocks"] = num_unfrozen
    with SplitReader(paths["dataset"], manifest, "test") as reader:
        answers = answer_split(loaded, reader, tmp_path, PassCounts())
        model = loaded.model
        own = [np.asarray(model(decode_bytes(each)[np.newaxis], training=False))[0] for each in reader]
    np.testing.assert_allclose(answers.confidence, np.max(own, axis=1), atol=1e-4)  # an engine's tolerance
    assert answers.predicted.tolist() == np.argmax(own, axis=1).tolist()
    assert np.std(answers.confidence) > 1e-3  # answers that don't depend on the image would agree anyway


def test_metrics_hold_the_headline_with_intervals_and_the_gain(paths):
    metrics = paths["result"].metrics
    names = {
        "test_accuracy",
        "test_macro_f1",
        "test_top5_accuracy",
        "reference_test_accuracy",
        "accuracy_gain",
    }
    for name in names:
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"], name
    assert metrics["test_accuracy"] > 0.7 > metrics["reference_test_accuracy"]
    assert metrics["accuracy_gain"] == metrics["test_accuracy"] - metrics["reference_test_accuracy"]
    assert metrics["test_top5_accuracy"] == 1.0  # there are but three classes
    assert metrics["num_test"] == load_manifest(paths["dataset"]).splits["test"].num_images
    assert all(isinstance(value, float) for value in metrics.values())


def test_metrics_file_agrees_with_itself(paths):
    values = json.loads((paths["root"] / "evaluation" / "metrics.json").read_text())
    matrix = np.array(values["confusion_matrix"])
    assert values["classes"] == list(NAMES)
    assert np.trace(matrix) / matrix.sum() == values["metrics"]["test_accuracy"]
    assert [row["num_images"] for row in values["per_class"]] == matrix.sum(axis=1).tolist()
    assert sum(each["count"] for each in values["calibration"]) == matrix.sum()
    assert confusion_matrix_of(paths["root"] / "evaluation") == (list(NAMES), matrix.tolist())


def test_predictions_name_every_test_image_once(paths):
    lines = (paths["root"] / "evaluation" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    images = [image for image in read_images(paths["dataset"]) if image.split == "test"]
    assert [(row["path"], row["sha256"]) for row in rows] == [(image.path, image.sha256) for image in images]
    assert [row["true"] for row in rows] == [image.label for image in images]
    assert np.mean([row["correct"] for row in rows]) == paths["result"].metrics["test_accuracy"]


def test_the_report_is_one_self_contained_page_and_escapes_names(paths):
    page = (paths["root"] / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;.jpg" in page  # the quarantined file
    assert "blau &amp; &lt;b&gt;" in page
    assert "few &lt;images&gt;" in page  # the recipe's reason
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    metrics = paths["result"].metrics
    num_wrong = round(metrics["num_test"] * (1 - metrics["test_accuracy"]))
    assert page.count("data:image/jpeg;base64,") == num_wrong > 0
    for heading in (
        "Before and after fine-tuning",
        "Learning curves",
        "Calibration",
        "The recipe",
        "Provenance",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert load_manifest(paths["dataset"]).digest in page
    assert json.loads((paths["model"] / "model.json").read_text())["model_digest"] in page


def test_a_finished_evaluation_is_not_run_again_and_repeats_bit_for_bit(paths, tmp_path):
    config = EvaluateConfig(num_bootstrap_samples=200)
    arguments = (paths["dataset"], paths["model"])
    again = evaluate(*arguments, paths["root"] / "evaluation", config, paths["reference"])
    elsewhere = evaluate(*arguments, tmp_path / "evaluation", config, paths["reference"])
    assert again.reused
    assert not elsewhere.reused
    assert elsewhere.digest == paths["result"].digest
    first, second = ((root / "evaluation" / "report.html").read_bytes() for root in (paths["root"], tmp_path))
    assert first == second


def test_what_the_cache_holds_is_not_computed_again(paths, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBEGRAFT_CACHE", str(tmp_path / "cache"))
    config = EvaluateConfig(num_bootstrap_samples=200)
    arguments = (paths["dataset"], paths["model"])
    first, second = (
        evaluate(*arguments, tmp_path / name, config, paths["reference"]) for name in ("first", "second")
    )
    num_test = first.metrics["num_test"]
    assert first.metrics["images_decoded"] >= num_test
    assert first.metrics["features_computed"] == num_test  # both models stand on one frozen backbone
    assert second.metrics["images_decoded"] == second.metrics["features_computed"] == 0
    assert second.metrics["features_found"] == 2 * num_test
    assert second.digest == first.digest == paths["result"].digest


@pytest.mark.parametrize("features", ["last", "levels"])
def test_a_fine_tuned_model_and_the_one_before_it_take_one_pass(paths, tmp_path, monkeypatch, features):
    config = EvaluateConfig(num_bootstrap_samples=200)
    before = write_model(tmp_path / "before", paths["dataset"], skill=-1.0, features=features)
    tuned = write_model(
        tmp_path / "tuned", paths["dataset"], skill=1.0, features=features, num_unfrozen_blocks=2
    )
    by_cache = {}
    for cache in ("none", str(tmp_path / "cache")):
        monkeypatch.setenv("KUBEGRAFT_CACHE", cache)
        output = tmp_path / f"evaluation-{len(by_cache)}"
        by_cache[cache] = evaluate(paths["dataset"], tuned, output, config, before)
    without, cached = by_cache.values()
    num_test = cached.metrics["num_test"]
    assert cached.metrics["features_computed"] == cached.metrics["features_found"] == num_test
    assert without.metrics["features_computed"] == 2 * num_test
    assert cached.digest == without.digest


def test_without_a_reference_nothing_is_compared(paths, tmp_path):
    config = EvaluateConfig(num_bootstrap_samples=10, num_worst_images=0)
    result = evaluate(paths["dataset"], paths["model"], tmp_path / "evaluation", config)
    assert not [name for name in result.metrics if "reference" in name or "gain" in name]
    page = (tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "Before and after" not in page
    assert "data:image" not in page


def test_a_model_of_other_classes_is_refused_with_the_difference(paths, tmp_path):
    model = write_model(tmp_path / "model", paths["dataset"], skill=1, classes=["blue", "grün", "red"])
    with pytest.raises(EvaluationError, match=r"only in the model: \['blue'\], only in the dataset: \['blau"):
        evaluate(paths["dataset"], model, tmp_path / "evaluation", EvaluateConfig())
    assert not (tmp_path / "evaluation").exists()


def test_a_dataset_without_test_images_is_refused(paths, tmp_path):
    dataset = tmp_path / "dataset"
    shutil.copytree(paths["dataset"], dataset)
    values = json.loads((dataset / "manifest.json").read_text())
    values["splits"]["test"] = {"num_images": 0, "class_counts": [0, 0, 0], "shards": []}
    (dataset / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(EvaluationError, match="test=0 images"):
        evaluate(dataset, paths["model"], tmp_path / "evaluation", EvaluateConfig())


def test_a_damaged_shard_is_a_data_error_and_publishes_nothing(paths, tmp_path):
    dataset = tmp_path / "dataset"
    shutil.copytree(paths["dataset"], dataset)
    shard = next(dataset.glob("test-*.tfrecord"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DataError, match="is damaged"):
        evaluate(dataset, paths["model"], tmp_path / "evaluation", EvaluateConfig())
    assert not (tmp_path / "evaluation").exists()


def test_what_is_no_model_directory_is_refused(paths, tmp_path):
    with pytest.raises(ModelError, match="output directory of a kubegraft stage"):
        evaluate(paths["dataset"], tmp_path, tmp_path / "evaluation", EvaluateConfig())


def test_a_matrix_too_large_for_the_kfp_page_counts_the_best_classes_together(tmp_path):
    classes = [f"class {number}" for number in range(100)]
    cells = [[number, number, 10] for number in range(100)] + [[70, 3, 5], [3, 99, 2]]
    (tmp_path / stage.METRICS_FILE).write_text(json.dumps({"classes": classes, "confusion_cells": cells}))
    names, matrix = confusion_matrix_of(tmp_path)
    assert len(names) == len(matrix) == 60
    assert {"class 70", "class 3", "(other classes)"} <= set(names)
    assert np.sum(matrix) == 1007
    assert matrix[names.index("class 70")][names.index("class 3")] == 5

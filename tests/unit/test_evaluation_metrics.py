from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from kubegraft.errors import EvaluationError
from kubegraft.evaluation import calibration, intervals, metrics
from kubegraft.evaluation.intervals import Resampling
from kubegraft.evaluation.metrics import Answers


def softmax_answers(num_images: int, num_classes: int, seed: int = 0, skill: float = 2.0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_images)
    logits = generator.normal(size=(num_images, num_classes))
    logits[np.arange(num_images), labels] += skill
    rows = np.exp(logits)
    return rows / rows.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("num_classes", [2, 3, 10, 40])
def test_metrics_agree_with_scikit_learn(num_classes):
    probabilities, labels = softmax_answers(300, num_classes, seed=num_classes)
    answers = Answers.of(probabilities, labels)
    predicted, every = probabilities.argmax(axis=1), list(range(num_classes))
    matrix = metrics.confusion_matrix(answers)
    scores = metrics.class_scores(matrix)
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted, labels=every, zero_division=0
    )

    assert metrics.accuracy(answers) == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    assert np.array_equal(matrix, sklearn_metrics.confusion_matrix(labels, predicted, labels=every))
    np.testing.assert_allclose(scores.precision, precision)
    np.testing.assert_allclose(scores.recall, recall)
    np.testing.assert_allclose(scores.f1, f1)
    assert np.array_equal(scores.support, support)
    present = np.unique(labels)
    assert metrics.macro_f1(matrix) == pytest.approx(
        sklearn_metrics.f1_score(labels, predicted, labels=present, average="macro", zero_division=0)
    )
    assert metrics.log_loss(answers) == pytest.approx(
        sklearn_metrics.log_loss(labels, probabilities, labels=every), rel=1e-5
    )
    if num_classes > 5:
        assert metrics.top_k_accuracy(answers, 5) == pytest.approx(
            sklearn_metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=every)
        )
    else:
        assert metrics.top_k_accuracy(answers, 5) == 1.0


def test_a_class_without_images_is_left_out_of_macro_f1_but_costs_those_called_so():
    rows = np.eye(3)[[0, 0, 1, 2]]
    answers = Answers.of(rows, [0, 0, 1, 1])
    matrix = metrics.confusion_matrix(answers)
    scores = metrics.class_scores(matrix)
    assert scores.recall.tolist() == [1.0, 0.5, 0.0]
    assert scores.precision.tolist() == [1.0, 1.0, 0.0]
    assert metrics.macro_f1(matrix) == pytest.approx((1 + 2 / 3) / 2)


def test_equal_probabilities_count_for_the_first_class_only():
    answers = Answers.of(np.full((2, 4), 0.25), [0, 3])
    assert metrics.accuracy(answers) == 0.5
    assert answers.label_rank.tolist() == [0, 3]
    assert metrics.top_k_accuracy(answers, 3) == 0.5


def test_batches_join_to_the_whole():
    probabilities, labels = softmax_answers(50, 7)
    whole = Answers.of(probabilities, labels)
    joined = Answers.joined(
        Answers.of(probabilities[i : i + 16], labels[i : i + 16]) for i in range(0, 50, 16)
    )
    assert np.array_equal(metrics.confusion_matrix(joined), metrics.confusion_matrix(whole))
    assert metrics.log_loss(joined) == metrics.log_loss(whole)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        pytest.param(np.ones((2, 3)), [0, 1], "sum to 1", id="logits"),
        pytest.param([[np.nan, 1.0]], [0], "sum to 1", id="nan"),
        pytest.param([[1.5, -0.5]], [0], "at least 0", id="negative"),
        pytest.param([[0.5, 0.5]], [2], r"in \[0, 2\)", id="label-too-large"),
        pytest.param([[0.5, 0.5]], [-1], r"in \[0, 2\)", id="label-negative"),
        pytest.param([[0.5, 0.5]], [0.0], "whole numbers", id="label-no-integer"),
        pytest.param([[0.5, 0.5]], [0, 1], "one label an image", id="lengths"),
        pytest.param([0.5, 0.5], [0, 1], "shape", id="one-dimension"),
    ],
)
def test_what_is_no_classification_is_refused(probabilities, labels, message):
    with pytest.raises(EvaluationError, match=message):
        Answers.of(probabilities, labels)


def test_no_images_are_refused():
    with pytest.raises(EvaluationError, match="at least one image"):
        Answers.joined([Answers.of(np.zeros((0, 3)), np.zeros(0, int))])


def test_calibration_error_is_the_gap_of_each_bin_weighted_by_its_images():
    rows = [[0.95, 0.05]] * 4 + [[0.65, 0.35]] * 2
    answers = Answers.of(rows, [0, 0, 0, 1, 0, 0])
    expected = 4 / 6 * abs(0.95 - 0.75) + 2 / 6 * abs(0.65 - 1.0)
    assert calibration.expected_calibration_error(answers, num_bins=10) == pytest.approx(expected)
    assert sum(each.count for each in calibration.reliability_bins(answers, 10)) == 6


def test_certain_answers_fall_into_the_last_bin():
    bins = calibration.reliability_bins(Answers.of([[1.0, 0.0], [0.0, 1.0]], [0, 1]), 15)
    assert bins[-1].count == 2
    assert calibration.expected_calibration_error(Answers.of([[1.0, 0.0]], [0])) == 0.0


def test_intervals_agree_with_resampling_the_images_themselves():
    probabilities, labels = softmax_answers(150, 6, skill=1.5)
    answers = Answers.of(probabilities, labels)
    resampling = Resampling(num_samples=4000, confidence_level=0.9, seed=1)
    generator = np.random.default_rng(2)
    accuracies, f1s = [], []
    for _ in range(4000):
        chosen = generator.integers(0, 150, 150)
        sample = Answers.of(probabilities[chosen], labels[chosen])
        accuracies.append(metrics.accuracy(sample))
        f1s.append(metrics.macro_f1(metrics.confusion_matrix(sample)))
    np.testing.assert_allclose(
        intervals.accuracy_interval(answers, resampling), np.quantile(accuracies, [0.05, 0.95]), atol=0.008
    )
    np.testing.assert_allclose(
        intervals.macro_f1_interval(answers, resampling), np.quantile(f1s, [0.05, 0.95]), atol=0.008
    )


def test_intervals_are_the_same_for_the_same_seed_and_chunk(monkeypatch):
    answers = Answers.of(*softmax_answers(80, 5))
    resampling = Resampling(num_samples=200, seed=3)
    once = intervals.macro_f1_interval(answers, resampling)
    assert intervals.macro_f1_interval(answers, resampling) == once
    monkeypatch.setattr(intervals, "_CHUNK_NUMBERS", 100)
    assert intervals.macro_f1_interval(answers, resampling) == once
    assert intervals.macro_f1_interval(answers, resampling._replace(seed=4)) != once


def test_a_paired_gain_ignores_what_both_models_get_wrong():
    before = Answers.of(np.eye(2)[[0] * 60 + [1] * 40], [0] * 100)
    after = Answers.of(np.eye(2)[[0] * 70 + [1] * 30], [0] * 100)
    low, high = intervals.accuracy_gain_interval(after, before, Resampling(2000))
    assert 0.03 <= low < 0.1 < high <= 0.17
    assert intervals.accuracy_gain_interval(after, after, Resampling(100)) == (0.0, 0.0)


def test_a_gain_over_other_images_is_refused():
    first, second = Answers.of(np.eye(2), [0, 1]), Answers.of(np.eye(2), [1, 1])
    with pytest.raises(EvaluationError, match="same images"):
        intervals.accuracy_gain_interval(first, second, Resampling(10))


def test_wilson_intervals_stay_open_for_small_classes():
    low, high = intervals.wilson_interval(np.array([2, 0, 0, 90]), np.array([2, 2, 0, 100]), 0.95)
    np.testing.assert_allclose(low, [0.342, 0.0, 0.0, 0.826], atol=1e-3)
    np.testing.assert_allclose(high, [1.0, 0.658, 1.0, 0.945], atol=1e-3)


def test_a_thousand_classes_resample_in_flat_memory():
    answers = Answers.of(*softmax_answers(3000, 1000, skill=4))
    low, high = intervals.macro_f1_interval(answers, Resampling(200))
    assert 0 < low <= high < 1

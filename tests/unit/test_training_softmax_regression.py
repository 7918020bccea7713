"""The solver of linear heads, held against scikit-learn and against its own definition."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kubegraft.errors import TrainingError
from kubegraft.training.softmax_regression import SoftmaxRegression
from kubegraft.training.standardisation import feature_moments


def examples(count=120, dim=20, classes=4, seed=0):
    random = np.random.default_rng(seed)
    labels = np.resize(np.arange(classes), count).astype(np.int32)
    mixing = random.standard_normal((dim, dim)) * np.logspace(0, -2, dim)
    features = random.standard_normal((count, dim)) @ mixing
    features[:, :classes] += 0.7 * np.eye(classes)[labels]
    return features.astype(np.float32), labels


def reference(features, labels, decay, weights=None):
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(
        C=1 / (decay * len(features)), tol=1e-12, max_iter=20_000, class_weight=weights, solver="newton-cg"
    )
    return model.fit(features.astype(np.float64), labels)


def plain_objective(kernel, bias, features, labels, decay, smoothing=0.0, weights=None):
    """f as the module's docstring has it, written without any of its tricks."""
    logits = features.astype(np.float64) @ kernel + bias
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = (1 - smoothing) * np.eye(len(bias))[labels] + smoothing / len(bias)
    losses = -(targets * log_probabilities).sum(1)
    factors = np.ones(len(labels)) if weights is None else weights[labels]
    return (factors * losses).mean() + decay / 2 * np.square(kernel).sum()


@pytest.mark.parametrize("decay", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize(
    ("count", "dim"), [(120, 20), (30, 60)], ids=["more_examples_than_features", "fewer"]
)
def test_the_optimum_is_that_of_scikit_learn(count, dim, decay):
    features, labels = examples(count, dim)
    found = SoftmaxRegression(features, labels, 4).solve(decay, tolerance=1e-7)
    expected = reference(features, labels, decay)
    assert found.converged
    value = plain_objective(found.kernel, found.bias, features, labels, decay)
    best = plain_objective(expected.coef_.T, expected.intercept_, features, labels, decay)
    assert value == pytest.approx(found.objective, rel=1e-9)
    assert value <= best + 1e-9
    np.testing.assert_allclose(found.kernel, expected.coef_.T, rtol=1e-3, atol=1e-3)
    probabilities = np.exp(features @ found.kernel + found.bias)
    probabilities /= probabilities.sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected.predict_proba(features), atol=1e-5)


def test_class_weights_mean_what_they_mean_in_scikit_learn():
    features, labels = examples()
    weights = np.array([1.0, 3.0, 0.5, 2.0])
    found = SoftmaxRegression(features, labels, 4, class_weights=weights).solve(0.01, tolerance=1e-7)
    expected = reference(features, labels, 0.01, dict(enumerate(weights)))
    np.testing.assert_allclose(found.kernel, expected.coef_.T, atol=1e-4)


@pytest.mark.parametrize("resident_bytes", [1 << 30, 0], ids=["held", "streamed"])
def test_the_gradient_is_that_of_finite_differences(resident_bytes):
    features, labels = examples(40, 6)
    regression = SoftmaxRegression(
        features,
        labels,
        4,
        label_smoothing=0.1,
        class_weights=np.array([1, 2, 0.5, 1]),
        resident_bytes=resident_bytes,
        chunk_rows=16,
    )
    at = np.random.default_rng(1).standard_normal((7, 4))
    _, gradient = regression.objective(at, 0.3)
    for place in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[place] = 1e-6
        slope = (regression.objective(at + step, 0.3)[0] - regression.objective(at - step, 0.3)[0]) / 2e-6
        assert gradient[place] == pytest.approx(slope, abs=1e-8), place


def test_smoothing_and_weights_are_in_the_objective_as_written():
    features, labels = examples(40, 6)
    weights = np.array([1, 2, 0.5, 1])
    options = {"label_smoothing": 0.2, "class_weights": weights}
    found = SoftmaxRegression(features, labels, 4, **options).solve(0.05, tolerance=1e-7)
    value = plain_objective(found.kernel, found.bias, features, labels, 0.05, 0.2, weights)
    assert value == pytest.approx(found.objective, rel=1e-9)
    random = np.random.default_rng(0)
    for _ in range(20):
        moved = found.kernel + 1e-2 * random.standard_normal(found.kernel.shape)
        assert plain_objective(moved, found.bias, features, labels, 0.05, 0.2, weights) > value


def test_streamed_from_a_file_equals_held_in_memory(tmp_path):
    features, labels = examples(300, 20)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    mean, variance = feature_moments(mapped)
    options = {"mean": mean, "variance": variance}
    whole = SoftmaxRegression(features, labels, 4, **options).solve(1e-3, tolerance=1e-7)
    chunked = SoftmaxRegression(mapped, labels, 4, **options, resident_bytes=0, chunk_rows=64)
    streamed = chunked.solve(1e-3, tolerance=1e-7)
    np.testing.assert_allclose(streamed.kernel, whole.kernel, atol=1e-7)
    np.testing.assert_allclose(streamed.bias, whole.bias, atol=1e-7)
    assert streamed.train_loss == pytest.approx(whole.train_loss, abs=1e-8)


def test_float32_products_come_to_the_same_optimum(monkeypatch):
    from kubegraft.training import softmax_regression

    features, labels = examples(300, 20)
    exact = SoftmaxRegression(features, labels, 4).solve(1e-3, tolerance=1e-7)
    monkeypatch.setattr(softmax_regression, "_FLOAT64_NUMBERS", 0)
    single = SoftmaxRegression(features, labels, 4)
    rounded = single.solve(1e-3, tolerance=single.finest_tolerance)
    assert rounded.converged
    assert rounded.objective == pytest.approx(exact.objective, abs=1e-6)


def test_separable_classes_have_an_optimum():
    labels = np.array([0, 0, 1, 1], np.int32)
    features = np.array([[-2], [-1], [1], [2]], np.float32)
    found = SoftmaxRegression(features, labels, 2).solve(1e-6)
    assert found.converged
    assert found.train_accuracy == 1
    assert np.isfinite(found.kernel).all()


def test_features_that_say_nothing_leave_the_shares_of_the_classes():
    labels = np.array([0, 0, 0, 1], np.int32)
    for features in (np.zeros((4, 3), np.float32), np.ones((4, 3), np.float32)):
        mean, _ = feature_moments(features)
        found = SoftmaxRegression(features, labels, 2, mean=mean).solve(0.1, tolerance=1e-7)
        np.testing.assert_allclose(np.exp(found.bias[0] - found.bias[1]), 3, rtol=1e-6)
        np.testing.assert_array_equal(found.kernel, 0)


def test_one_image_a_class_and_classes_without_any_are_solved():
    features = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    found = SoftmaxRegression(features, np.array([0, 1, 2]), 5).solve(0.01)
    assert found.converged
    assert found.train_accuracy == 1
    assert (np.delete(features @ found.kernel + found.bias, [0, 1, 2], axis=1) < 0).all()


def test_a_thousand_classes_are_solved():
    random = np.random.default_rng(0)
    labels = np.resize(np.arange(1000), 2000).astype(np.int32)
    centres = random.standard_normal((1000, 64))
    features = (centres[labels] + 0.3 * random.standard_normal((2000, 64))).astype(np.float32)
    found = SoftmaxRegression(features, labels, 1000).solve(1e-4, tolerance=1e-4)
    assert found.converged
    assert found.train_accuracy > 0.99


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_no_numbers_are_a_clear_error(bad):
    features, labels = examples()
    features[7, 3] = bad
    with pytest.raises(TrainingError, match=r"`features` must be finite numbers.*features\[7\] with 1 of 20"):
        feature_moments(features)
    with pytest.raises(TrainingError, match="`features` must be finite numbers"):
        SoftmaxRegression(features, labels, 4)


def test_moments_survive_a_large_mean():
    features = np.random.default_rng(0).normal(1e4, 1e-1, (5000, 3)).astype(np.float32)
    mean, variance = feature_moments(features)
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, features.astype(np.float64).var(0), rtol=1e-6)


AGAIN = """
import hashlib, sys
sys.path.insert(0, {tests!r})
from test_training_softmax_regression import examples
from kubegraft.training.softmax_regression import SoftmaxRegression
features, labels = examples(200, 300)
found = SoftmaxRegression(features, labels, 4).solve(1e-3)
print(hashlib.sha256(found.kernel.tobytes() + found.bias.tobytes()).hexdigest())
"""


def test_two_processes_come_to_the_same_bits():
    script = AGAIN.format(tests=str(Path(__file__).parent))
    answers = {
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            env=os.environ | {"OPENBLAS_NUM_THREADS": threads},
        ).stdout
        for threads in ("1", "2")
    }
    assert len(answers) == 1

"""A linear head with its weight decay chosen on validation."""

import numpy as np
import pytest

from kubegraft.errors import Interrupted
from kubegraft.training import linear_head
from kubegraft.training.linear_head import DECAYS, LinearProblem, fit_linear_head, history_of, measure
from kubegraft.training.softmax_regression import SoftmaxRegression
from kubegraft.training.sources import FeatureSource
from kubegraft.training.standardisation import feature_moments

CLASSES = 3


def split(count, seed, noise=1.0, dim=40):
    random = np.random.default_rng(seed)
    labels = np.resize(np.arange(CLASSES), count).astype(np.int32)
    features = noise * random.standard_normal((count, dim)) + 5
    features[:, :CLASSES] += np.eye(CLASSES)[labels]
    return FeatureSource(features.astype(np.float32), labels)


def problem(**options):
    train = split(60, 0)
    mean, variance = feature_moments(train.features)
    made = {"train": train, "validation": split(90, 1), "num_classes": CLASSES}
    return LinearProblem(**made | {"mean": mean, "variance": variance} | options)


def test_the_decay_that_is_best_on_validation_is_kept_and_solved_exactly():
    fit = fit_linear_head(problem())
    assert fit.chosen.rank == max(point.rank for point in fit.path)
    assert fit.chosen.solution.converged
    assert [point.solution.decay for point in fit.path] == list(DECAYS[: len(fit.path)])
    loss, accuracy = measure(problem(), fit.chosen.solution.kernel, fit.chosen.solution.bias)
    assert (loss, accuracy) == (fit.chosen.validation_loss, fit.chosen.validation_accuracy)
    assert accuracy > 1 / CLASSES + 0.1
    assert "on validation: accuracy" in fit.reason


def test_the_path_ends_when_weaker_decays_are_clearly_worse():
    fit = fit_linear_head(problem())
    assert "clearly worse" in fit.stopped
    assert len(fit.path) < len(DECAYS)
    easy = fit_linear_head(problem(train=split(60, 0, noise=0.01), validation=split(90, 1, noise=0.01)))
    assert easy.chosen.validation_accuracy == 1


def test_a_warm_start_changes_nothing_but_the_number_of_steps():
    along = fit_linear_head(problem(), decays=DECAYS[:7])
    alone = fit_linear_head(problem(), decays=[along.chosen.solution.decay])
    np.testing.assert_allclose(along.chosen.solution.kernel, alone.chosen.solution.kernel, atol=1e-3)
    assert along.chosen.solution.objective == pytest.approx(alone.chosen.solution.objective, abs=1e-6)


def test_the_same_fit_twice_gives_the_same_bits():
    one, other = fit_linear_head(problem()), fit_linear_head(problem())
    np.testing.assert_array_equal(one.chosen.solution.kernel, other.chosen.solution.kernel)
    np.testing.assert_array_equal(one.chosen.solution.bias, other.chosen.solution.bias)


def test_a_time_budget_ends_the_path_with_what_there_is():
    fit = fit_linear_head(problem(), time_budget_seconds=1e-9)
    assert len(fit.path) == 1
    assert "time budget" in fit.stopped


def test_an_interrupted_path_goes_on_where_it_was(tmp_path, monkeypatch):
    undisturbed = fit_linear_head(problem())
    monkeypatch.setattr(linear_head, "_SAVE_SECONDS", 0.0)
    solved, solve = [], SoftmaxRegression.solve

    def stops(self, decay, *rest):
        solved.append(decay)
        if len(solved) == 4:
            raise Interrupted("now")
        return solve(self, decay, *rest)

    monkeypatch.setattr(SoftmaxRegression, "solve", stops)
    with pytest.raises(Interrupted, match="now"):
        fit_linear_head(problem(), directory=tmp_path)
    fit = fit_linear_head(problem(), directory=tmp_path)
    assert solved[:4] == list(DECAYS[:4])
    assert solved[4] == DECAYS[3]
    assert [point.rank for point in fit.path] == [point.rank for point in undisturbed.path]
    np.testing.assert_array_equal(fit.chosen.solution.kernel, undisturbed.chosen.solution.kernel)


def test_a_path_of_less_than_a_second_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_head, "_SAVE_SECONDS", 1000.0)
    fit_linear_head(problem(), directory=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_was_solved_on_other_features_or_is_damaged_is_solved_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(linear_head, "_SAVE_SECONDS", 0.0)
    other = problem(train=split(60, 7))
    fit_linear_head(other, directory=tmp_path)
    before = set(tmp_path.iterdir())
    expected = fit_linear_head(problem())
    fit = fit_linear_head(problem(), directory=tmp_path)
    np.testing.assert_array_equal(fit.chosen.solution.kernel, expected.chosen.solution.kernel)
    for path in set(tmp_path.iterdir()) - before:
        path.write_bytes(b"half of it")
    fit = fit_linear_head(problem(), directory=tmp_path)
    np.testing.assert_array_equal(fit.chosen.solution.kernel, expected.chosen.solution.kernel)
    fit_linear_head(problem(), directory=tmp_path / "nowhere")
    assert "train_head: not kept" in capfd.readouterr().err


def test_a_stop_signal_ends_the_work_at_once(monkeypatch):
    monkeypatch.setattr(linear_head, "stop_requested", lambda: True)
    with pytest.raises(Interrupted, match="the features are kept"):
        fit_linear_head(problem())


def test_the_history_holds_a_decay_in_the_place_of_an_epoch():
    fit = fit_linear_head(problem())
    history = history_of(fit, start=(1.0, 0.5))
    assert history.solver == "lbfgs"
    assert history.best["weight_decay"] == fit.chosen.solution.decay
    assert history.best["converged"] == 1
    assert history.start == {"validation_loss": 1.0, "validation_accuracy": 0.5}

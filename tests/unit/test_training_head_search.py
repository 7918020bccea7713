"""Which head is preferred, and on what evidence."""

import dataclasses

import numpy as np
import pytest

from kubegraft.config import HeadConfig
from kubegraft.errors import ConfigError
from kubegraft.training.distribution import make_strategy
from kubegraft.training.head_search import Score, SearchData, preferred, search_head, stratified_folds
from kubegraft.training.loop import LoopConfig
from kubegraft.training.sources import FeatureSource
from kubegraft.training.standardisation import feature_moments


def score(head, *accuracies, loss=1.0):
    return Score(head=head, accuracies=accuracies, loss=loss, seconds=1)


def test_folds_hold_out_every_example_once_and_every_class_evenly():
    labels = np.repeat([0, 1, 2], [50, 25, 10])
    folds = list(stratified_folds(labels, seed=3))
    assert sorted(np.concatenate([outside for _, outside in folds])) == list(range(85))
    for inside, outside in folds:
        assert not set(inside) & set(outside)
        np.testing.assert_array_equal(np.bincount(labels[outside]), [10, 5, 2])
    again = list(stratified_folds(labels, seed=3))
    assert all(np.array_equal(one[1], other[1]) for one, other in zip(folds, again, strict=True))
    other = list(stratified_folds(labels, seed=4))
    assert not all(np.array_equal(one[1], other[1]) for one, other in zip(folds, other, strict=True))


def test_few_examples_make_fewer_folds():
    assert len(list(stratified_folds(np.array([0, 1, 0, 1]), seed=0))) == 2


@pytest.mark.parametrize(
    ("linear", "mlp", "expected"),
    [
        ((0.9, 0.8, 0.85), (0.91, 0.79, 0.86), "linear"),
        ((0.9, 0.8, 0.85), (0.95, 0.86, 0.9), "mlp"),
        ((0.95, 0.86, 0.9), (0.9, 0.8, 0.85), "linear"),
        ((0.9, 0.9, 0.9), (0.9, 0.9, 0.9), "linear"),
    ],
    ids=["within_the_error", "clearly_better", "clearly_worse", "equal"],
)
def test_the_simplest_head_wins_unless_another_is_clearly_better(linear, mlp, expected):
    assert preferred([score("linear", *linear), score("mlp", *mlp, loss=0.5)]).head == expected


def rings(count, seed):
    """Two classes that no straight line tells apart."""
    random = np.random.default_rng(seed)
    labels = np.resize([0, 1], count).astype(np.int32)
    angle, radius = random.uniform(0, 2 * np.pi, count), 1 + labels + 0.1 * random.standard_normal(count)
    return FeatureSource(
        np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32), labels
    )


PLAN = LoopConfig(
    phase="head_search",
    num_classes=2,
    batch_size=32,
    num_epochs=30,
    learning_rate=1e-2,
    warmup_fraction=0.05,
    weight_decay=0.0,
    label_smoothing=0.0,
    gradient_clip_norm=1.0,
    patience=30,
    time_budget_seconds=0,
    checkpoint_interval_seconds=20,
    seed=0,
)


def test_hidden_layers_are_found_where_they_are_needed_and_the_report_can_say_why(tmp_path):
    train = rings(160, 0)
    mean, variance = feature_moments(train.features)
    data = SearchData(train=train, mean=mean, variance=variance, num_classes=2, class_weights=None)
    config = HeadConfig(search_seconds=1000, dropout=0.1)
    found, choices = search_head(make_strategy(["CPU:0"]), data, config, PLAN, tmp_path)
    assert found.head == "mlp"
    assert found.hidden_units in ((128,), (512,))
    named = {choice.name: choice for choice in choices}
    assert named["head"].value == "mlp"
    assert "linear 0." in named["head"].reason
    assert "cross-validation" in named["head"].reason
    assert not list(tmp_path.iterdir())


def test_no_time_leaves_the_linear_head_and_says_so(tmp_path):
    train = rings(40, 0)
    mean, variance = feature_moments(train.features)
    data = SearchData(train=train, mean=mean, variance=variance, num_classes=2, class_weights=None)
    config = HeadConfig(search_seconds=1e-6)
    found, choices = search_head(make_strategy(["CPU:0"]), data, config, PLAN, tmp_path)
    assert found.head == "linear"
    assert "4 more not tried to the end for lack of time" in choices[0].reason


def test_a_head_that_time_cuts_short_does_not_take_part(tmp_path):
    train = rings(40, 0)
    mean, variance = feature_moments(train.features)
    data = SearchData(train=train, mean=mean, variance=variance, num_classes=2, class_weights=None)
    config = HeadConfig(search_seconds=1.5)
    endless = dataclasses.replace(PLAN, num_epochs=10**6)
    found, choices = search_head(make_strategy(["CPU:0"]), data, config, endless, tmp_path)
    assert found.head == "linear"
    assert "4 more not tried to the end for lack of time" in choices[0].reason
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"solver": "lbfgs"}, {"augmentation": "crop"}], ids=str)
def test_a_search_that_would_contradict_another_choice_is_refused(options):
    with pytest.raises(ConfigError, match="`search_seconds` must be 0"):
        HeadConfig(search_seconds=10, **options)

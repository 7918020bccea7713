import dataclasses

import pytest

from kubegraft.config import AUTO, AUTO_NAME, FineTuneConfig, HeadConfig
from kubegraft.data.manifest import DatasetFacts
from kubegraft.errors import ConfigError
from kubegraft.recipes import resolve_fine_tune, resolve_head

SIGNS = DatasetFacts(
    num_train=990,
    num_validation=300,
    num_classes=10,
    smallest_class=99,
    largest_class=99,
    median_height=100,
    median_width=100,
)


def head(facts=SIGNS, config=None, native=224, replicas=1):
    return resolve_head(
        config or HeadConfig(),
        facts,
        native_input_size=native,
        accepted_input_size=lambda side: -(-side // 32) * 32,
        num_replicas=replicas,
    )


def fine_tune(facts=SIGNS, config=None, blocks=16, parameters=3_400_000, replicas=1):
    return resolve_fine_tune(
        config or FineTuneConfig(),
        facts,
        num_backbone_blocks=blocks,
        num_backbone_parameters=parameters,
        num_replicas=replicas,
    )


@pytest.mark.parametrize("resolve", [head, fine_tune], ids=["head", "fine_tune"])
def test_nothing_is_left_open_and_every_choice_has_a_reason(resolve):
    config, choices = resolve()
    unused = {"unfreeze_fraction"}  # says the same as num_blocks, which is chosen
    if getattr(config, "solver", "") == "lbfgs":  # has no epochs, and its decay is chosen on validation
        unused |= {"learning_rate", "num_epochs", "patience", "weight_decay"}
    for field in dataclasses.fields(config):
        if field.name not in unused | {"mixed_precision"}:
            assert getattr(config, field.name) not in (AUTO, AUTO_NAME), field.name
    assert all(choice.reason for choice in choices)


def test_what_the_user_set_stays():
    config, choices = head(config=HeadConfig(learning_rate=0.5, input_size=64, augmentation="flip"))
    assert (config.learning_rate, config.input_size, config.augmentation) == (0.5, 64, "flip")
    assert {c.name for c in choices if c.reason == "set by the user"} == {
        "learning_rate",
        "input_size",
        "augmentation",
    }


@pytest.mark.parametrize(("side", "expected"), [(8, 96), (28, 96), (50, 160), (100, 224), (1000, 224)])
def test_small_pictures_get_a_small_input(side, expected):
    facts = dataclasses.replace(SIGNS, median_height=side, median_width=side + 5)
    assert head(facts)[0].input_size == expected


def test_heads_see_several_levels_unless_there_are_very_many_images():
    many = dataclasses.replace(SIGNS, num_train=200_001)
    assert head(dataclasses.replace(SIGNS, num_train=200_000))[0].features == "levels"
    assert head(many)[0].features == "last"
    assert head(many, HeadConfig(features="levels"))[0].features == "levels"
    assert head(config=HeadConfig(features="last"))[0].features == "last"


def test_imbalance_is_balanced():
    assert head(dataclasses.replace(SIGNS, largest_class=400))[0].class_weights == "balanced"
    assert head()[0].class_weights == "none"


def test_a_fraction_becomes_whole_blocks():
    assert fine_tune(config=FineTuneConfig(unfreeze_fraction=0.5))[0].num_blocks == 8
    assert fine_tune(config=FineTuneConfig(unfreeze_fraction=1))[0].num_blocks == 16
    assert fine_tune(config=FineTuneConfig(num_blocks=0))[0].num_blocks == 0


def test_a_large_backbone_is_moved_gently():
    assert fine_tune(parameters=140_000_000)[0].learning_rate < fine_tune()[0].learning_rate


def test_more_images_a_class_unfreeze_more():
    few = dataclasses.replace(SIGNS, num_train=50)
    many = dataclasses.replace(SIGNS, num_train=100_000)
    assert fine_tune(few)[0].num_blocks < fine_tune()[0].num_blocks < fine_tune(many)[0].num_blocks


@pytest.mark.parametrize(
    ("options", "solver"),
    [
        ({}, "lbfgs"),
        ({"label_smoothing": 0.1, "class_weights": "balanced", "batch_size": 8}, "lbfgs"),
        ({"augmentation": "none", "dropout": 0}, "lbfgs"),
        ({"solver": "lbfgs", "weight_decay": 0.01, "dropout": 0.4}, "lbfgs"),
        ({"solver": "adamw"}, "adamw"),
        ({"head": "mlp"}, "adamw"),
        ({"augmentation": "mixup"}, "adamw"),
        ({"learning_rate": 0.1}, "adamw"),
        ({"num_epochs": 3}, "adamw"),
        ({"weight_decay": 0.1}, "adamw"),
        ({"dropout": 0.4}, "adamw"),
    ],
    ids=str,
)
def test_a_linear_head_is_solved_for_unless_something_asks_for_epochs(options, solver):
    config, choices = head(config=HeadConfig(**options))
    assert config.solver == solver
    reason = next(choice.reason for choice in choices if choice.name == "solver")
    assert (reason == "set by the user") == ("solver" in options)
    assert (config.learning_rate == AUTO) == (solver == "lbfgs")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"learning_rate": 0.1}, "learning_rate"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"weight_decay": 0}, "weight_decay"),
        ({"head": "mlp"}, "solver"),
        ({"augmentation": "crop"}, "solver"),
    ],
    ids=str,
)
def test_a_solver_that_would_ignore_a_choice_is_refused(options, field):
    with pytest.raises(ConfigError, match=rf"`{field}` must .*solver='lbfgs'"):
        HeadConfig(solver="lbfgs", **options)


@pytest.mark.parametrize(
    ("replicas", "num_train", "batch_size"),
    [(1, 990, 32), (2, 990, 64), (8, 990, 96), (8, 100_000, 256), (4, 90, 32)],
    ids=["one", "two", "few images", "many images", "too few for two"],
)
def test_batch_and_rate_grow_with_the_devices(replicas, num_train, batch_size):
    facts = dataclasses.replace(SIGNS, num_train=num_train)
    alone, _ = fine_tune(facts)
    config, choices = fine_tune(facts, replicas=replicas)
    assert config.batch_size == batch_size
    assert config.learning_rate == pytest.approx(alone.learning_rate * (batch_size / 32) ** 0.5)
    reasons = {choice.name: choice.reason for choice in choices}
    assert ("devices" in reasons["learning_rate"]) == (batch_size > 32)


def test_a_batch_size_that_the_user_sets_scales_nothing():
    config, _ = fine_tune(config=FineTuneConfig(batch_size=128), replicas=4)
    assert (config.batch_size, config.learning_rate) == (128, fine_tune()[0].learning_rate)
    solved, _ = head(config=HeadConfig(solver="adamw"), replicas=4)
    assert solved.batch_size == 96  # 8 steps an epoch at least

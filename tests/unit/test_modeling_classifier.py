"""Classifiers: heads, resizing, precision, files, and what training changes in them."""

import json
import random
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from kubegraft.config import HeadConfig
from kubegraft.errors import ConfigError, ModelError, WeightsError
from kubegraft.modeling.backbones import get_backbone
from kubegraft.modeling.classifier import (
    build_classifier,
    load_classifier,
    model_digest,
    parts,
    save_classifier,
)
from kubegraft.modeling.freezing import freeze_backbone, rate_multipliers, training_plan, unfreeze_last_blocks

BACKBONE = get_backbone("mobilenet_v3_small")
CLASSES = ("Ähre", "bee", "cat")
METADATA = {"classes": list(CLASSES), "backbone": BACKBONE.name}


def build(policy: str = "float32", **options: Any) -> Any:
    chosen = HeadConfig(**{"weights": "none", "dropout": 0.3, "features": "last", **options})
    return build_classifier(BACKBONE, 48, CLASSES, chosen, policy=policy)


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


def test_initial_weights_do_not_depend_on_who_else_draws_random_numbers(model: Any) -> None:
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            random.random()

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        again = build()
    finally:
        done.set()
        thread.join()
    for one, other in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_building_a_model_leaves_random_numbers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the generator returns after `build()` would tell nothing: threads of other tests draw from it too.
    drawn: list[str] = []
    tested = threading.get_ident()

    def watch(name: str, draw: Callable[..., Any]) -> None:
        def watched(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == tested:
                drawn.append(name)
            return draw(*arguments, **options)

        monkeypatch.setattr(random, name, watched)

    for name, draw in list(vars(random).items()):
        if isinstance(getattr(draw, "__self__", None), random.Random):
            watch(name, draw)
    random.random()
    build()
    assert drawn == ["random"]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 70, 95, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["standardise", "dropout", "logits"]),
        (
            {"head": "mlp", "hidden_units": (8, 4)},
            ["standardise", "hidden_1", "hidden_1_dropout", "hidden_2", "hidden_2_dropout", "logits"],
        ),
        (
            {"head": "mlp", "hidden_units": (8,), "batch_norm": True},
            ["standardise", "hidden_1", "hidden_1_norm", "hidden_1_dropout", "logits"],
        ),
    ],
    ids=["linear", "mlp", "mlp with batch norm"],
)
def test_a_head_has_the_layers_that_were_asked_for(options: dict[str, Any], names: list[str]) -> None:
    found = parts(build(**options))
    assert [layer.name for layer in found.head_layers] == names
    assert found.head_layers[-1].compute_dtype == "float32"


def test_the_parts_one_after_the_other_are_the_model(model: Any, images: np.ndarray) -> None:
    found = parts(model)
    resized = tf.image.resize(images, (48, 48), antialias=True)
    np.testing.assert_array_equal(found.resize(images.astype(np.float32)), resized)
    outputs = found.pool(found.backbone(resized, training=False))
    for layer in found.head_layers:
        outputs = layer(outputs, training=False)
    np.testing.assert_allclose(tf.nn.softmax(outputs), model(images), atol=1e-6)


def test_standardisation_is_set_saved_and_never_explodes(tmp_path: Path) -> None:
    model = build()
    found = parts(model)
    features = np.random.default_rng(0).normal(5, 3, (200, 576)).astype(np.float32)
    features[:, 7] = 0.5
    found.set_standardisation(features.mean(0), features.var(0))
    save_classifier(model, tmp_path, METADATA)
    loaded = parts(load_classifier(tmp_path).model)
    for standardise in (found.standardise, loaded.standardise):
        scaled = np.asarray(standardise(features, training=True))
        np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(np.delete(scaled.var(0), 7), 1, atol=1e-3)
        assert np.asarray(standardise(np.full((1, 576), 1.5, np.float32)))[0, 7] == pytest.approx(1)


def test_a_feature_that_hardly_varies_in_training_is_not_blown_up() -> None:
    found = parts(build())
    features = np.random.default_rng(0).normal(5, 3, (200, 576)).astype(np.float32)
    features[:, 7] = 0.5 + 1e-2 * features[:, 7]
    found.set_standardisation(features.mean(0), features.var(0))
    elsewhere = np.full((1, 576), 5, np.float32)  # there, the feature moves as others do
    assert np.abs(np.asarray(found.standardise(elsewhere))).max() < 16


def test_one_seed_gives_one_model_and_one_file(model: Any, tmp_path: Path) -> None:
    again = build()
    assert model_digest(again) == model_digest(model)
    first, second = (
        save_classifier(m, tmp_path / name, METADATA) for m, name in ((model, "a"), (again, "b"))
    )
    assert first.read_bytes() == second.read_bytes()
    third = save_classifier(load_classifier(first).model, tmp_path / "c", METADATA)
    assert third.read_bytes() == first.read_bytes()
    assert model_digest(build(seed=1)) != model_digest(model)


def test_mixed_precision_keeps_logits_in_float32_and_saves_float32(
    model: Any, images: np.ndarray, tmp_path: Path
) -> None:
    mixed = build(policy="mixed_bfloat16")
    assert model_digest(mixed) == model_digest(model)
    assert parts(mixed).backbone.get_layer("conv").compute_dtype == "bfloat16"
    assert mixed(images).dtype == tf.float32
    np.testing.assert_allclose(mixed(images), model(images), atol=0.05)
    save_classifier(mixed, tmp_path, METADATA)
    np.testing.assert_array_equal(load_classifier(tmp_path).model(images), model(images))
    again = load_classifier(tmp_path, policy="mixed_bfloat16").model
    np.testing.assert_array_equal(again(images), mixed(images))


def test_class_names_travel_inside_the_file(model: Any, tmp_path: Path) -> None:
    path = save_classifier(model, tmp_path / "model", METADATA)
    alone = tmp_path / "alone.keras"
    path.rename(alone)
    assert load_classifier(alone).classes == CLASSES
    assert json.loads((tmp_path / "model" / "model.json").read_text(encoding="utf-8")) == METADATA
    assert [entry.name for entry in (tmp_path / "model").iterdir()] == ["model.json"]


def test_a_model_of_others_is_refused_with_advice(tmp_path: Path) -> None:
    inputs = keras.Input((4,))
    keras.Model(inputs, keras.layers.Dense(2)(inputs)).save(tmp_path / "other.keras")
    with pytest.raises(ModelError, match="must be written by kubegraft"):
        load_classifier(tmp_path / "other.keras")
    with pytest.raises(ModelError, match=r"must be a model directory or a \.keras file"):
        load_classifier(tmp_path)
    (tmp_path / "text.keras").write_text("no model")
    with pytest.raises(ModelError, match=r"must be a model directory or a \.keras file"):
        load_classifier(tmp_path / "text.keras")


def test_a_classifier_with_a_lambda_is_refused(tmp_path: Path) -> None:
    inputs = keras.Input((4,))
    keras.Model(inputs, keras.layers.Lambda(lambda x: x[:, :2])(inputs)).save(tmp_path / "evil.keras")
    with zipfile.ZipFile(tmp_path / "evil.keras", "a") as archive:
        archive.writestr("kubegraft.json", json.dumps({"classes": ["a", "b"]}))
    with pytest.raises(WeightsError, match="Lambda"):
        load_classifier(tmp_path / "evil.keras")


def test_metadata_must_name_every_class(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="must name each of the model's 3 outputs"):
        save_classifier(model, tmp_path, {"classes": ["a", "b"]})
    assert not list(tmp_path.iterdir())


def test_open_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="`dropout` must be in"):
        build(dropout=-1)


def test_training_a_frozen_backbone_does_not_move_it_by_one_bit(images: np.ndarray) -> None:
    model = build(head="mlp", hidden_units=(8,), batch_norm=True)
    freeze_backbone(model)
    found = parts(model)
    before, head_before = model_digest(found.backbone), model_digest(model.get_layer("head"))
    model.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
    model.fit(images, np.array([0, 1, 2]), epochs=2, verbose=0)
    assert model_digest(found.backbone) == before
    assert model_digest(model.get_layer("head")) != head_before


def test_fine_tuning_moves_the_last_blocks_only(images: np.ndarray) -> None:
    model = build()
    unfrozen = dict(unfreeze_last_blocks(model, BACKBONE, 2))
    found = parts(model)
    before = {weight.path: weight.numpy() for weight in model.weights}
    model.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
    model.fit(images, np.array([0, 1, 2]), verbose=0)
    moved = {
        weight.path for weight in model.weights if not np.array_equal(weight.numpy(), before[weight.path])
    }
    assert moved <= {*unfrozen, "logits/kernel", "logits/bias"}
    assert {unfrozen[path] for path in moved if path in unfrozen} == {9, 10}
    assert all(row.trainable == (row.variable in unfrozen) for row in _backbone_rows(model))
    freeze_backbone(model)
    assert not found.backbone.trainable_weights


def _backbone_rows(model: Any) -> list[Any]:
    return [row for row in training_plan(model, BACKBONE) if row.part == "backbone"]


def test_wrong_numbers_of_blocks_and_other_backbones_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"`num_blocks` must be in \[0, 11\]"):
        unfreeze_last_blocks(model, BACKBONE, 12)
    unfreeze_last_blocks(model, BACKBONE, 3)
    with pytest.raises(ModelError, match="`num_blocks` must be the number of blocks that are trainable"):
        rate_multipliers(model, BACKBONE, 2, 0.5)
    with pytest.raises(ModelError, match="must be built on vgg16"):
        unfreeze_last_blocks(model, get_backbone("vgg16"), 1)

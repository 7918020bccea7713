"""What every backbone of the registry promises, checked on small inputs with random weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from kubegraft.config import HeadConfig
from kubegraft.errors import ConfigError
from kubegraft.modeling.backbones import BACKBONES, Backbone, block_of_layer
from kubegraft.modeling.classifier import (
    build_classifier,
    load_classifier,
    model_digest,
    parts,
    save_classifier,
)
from kubegraft.modeling.engines import TOLERANCE, FrozenGraph, relative_difference
from kubegraft.modeling.engines.keras_forward import KerasForward
from kubegraft.modeling.engines.litert import LiteRtForward, convert
from kubegraft.modeling.freezing import freeze_backbone, rate_multipliers, training_plan, unfreeze_last_blocks
from kubegraft.modeling.identity import network_digest
from kubegraft.modeling.levels import groups_of, level_blocks
from kubegraft.modeling.splitting import boundary_of, split_backbone

CLASSES = ("ant", "bee", "cat")
# Every kind of thing that a description of a model may hold: operations, nested models, classes of one architecture.
SAVED = (
    "vgg16",
    "inception_resnet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "efficientnet_lite0",
)

MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
EXPECTED_PREPROCESSING = {
    "tf": lambda rgb: rgb / 127.5 - 1,
    "lite": lambda rgb: (rgb - 127) / 128,
    "torch": lambda rgb: (rgb / 255 - MEAN) / DEVIATION,
    "caffe": lambda rgb: rgb[::-1] - np.array([103.939, 116.779, 123.68]),
    "efficientnet_b": lambda rgb: (rgb / 255 - MEAN) / DEVIATION / np.sqrt(DEVIATION),
    "efficientnet_v2_b": lambda rgb: (rgb / 255 - MEAN) / DEVIATION,
    "efficientnet_v2_s": lambda rgb: rgb / 128 - 1,
    "mobilenet_v3": lambda rgb: rgb / 127.5 - 1,
    "convnext": lambda rgb: (rgb / 255 - MEAN) / DEVIATION,
}


@dataclass
class Case:
    backbone: Backbone
    model: Any

    @property
    def core(self) -> Any:
        """The backbone, to features of several levels."""
        return parts(self.model).backbone

    @property
    def to_feature_map(self) -> Any:
        """The backbone, to its last feature map."""
        return keras.Model(self.core.input, self.core.get_layer("level_last").input)


@pytest.fixture(scope="module", params=sorted(BACKBONES))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    backbone = BACKBONES[request.param]
    # Heads on several levels need all that those on the last feature map need, and more.
    options = HeadConfig(weights="none", dropout=0.1, features="levels")
    yield Case(backbone, build_classifier(backbone, backbone.min_input_size, CLASSES, options))
    keras.utils.clear_session()


def test_a_classifier_answers_any_image_with_probabilities(case: Case) -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 41, 90, 3), dtype=np.uint8)
    probabilities = np.asarray(case.model(image))
    assert probabilities.shape == (2, 3)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)


def test_preprocessing_inside_the_model_is_what_the_weights_expect(case: Case) -> None:
    kinds = [
        name
        for name in EXPECTED_PREPROCESSING
        if name == case.backbone.preprocessing
        or (case.backbone.preprocessing == "inside" and case.backbone.name.startswith(name))
    ]
    first = next(layer for layer in case.core.layers if layer.weights and "normalization" not in layer.name)
    seen = keras.Model(case.core.input, first.input)
    size = case.backbone.min_input_size
    for colour in ([0.0, 0.0, 0.0], [255.0, 255.0, 255.0], [200.0, 100.0, 50.0]):
        pixels = np.broadcast_to(np.array(colour, np.float32), (1, size, size, 3))
        middle = np.asarray(seen(pixels))[0, size // 2, size // 2]
        np.testing.assert_allclose(middle, EXPECTED_PREPROCESSING[kinds[0]](np.array(colour)), atol=1e-4)


def test_blocks_cover_every_layer_and_can_be_cut_apart(case: Case) -> None:
    blocks = block_of_layer(case.backbone, case.core)
    assert set(blocks) == {layer.name for layer in case.core.layers}
    assert set(blocks.values()) == set(range(case.backbone.num_blocks))
    if not case.backbone.clean_cuts:
        return
    core = case.to_feature_map
    operations = {operation.name: operation for operation in core.operations}
    for block, name in enumerate(case.backbone.blocks[:-1]):
        rest = keras.Model(operations[name].output, core.output)
        later = {layer.name for layer in rest.layers if not isinstance(layer, keras.layers.InputLayer)}
        assert later == {layer.name for layer in core.layers if blocks[layer.name] > block}


def test_a_frozen_backbone_trains_its_head_only(case: Case) -> None:
    freeze_backbone(case.model)
    assert [weight.path for weight in case.model.trainable_weights] == ["logits/kernel", "logits/bias"]
    assert len(training_plan(case.model, case.backbone)) == len(case.model.weights)


def test_unfreezing_all_blocks_leaves_batch_norm_frozen(case: Case) -> None:
    unfrozen = unfreeze_last_blocks(case.model, case.backbone, case.backbone.num_blocks)
    trainable = {weight.path for weight in case.core.trainable_weights}
    norms = [layer for layer in case.core.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert not trainable & {weight.path for norm in norms for weight in norm.weights}
    assert trainable == {path for path, _ in unfrozen}
    blocks = [block for _, block in unfrozen]
    assert set(blocks) == set(range(case.backbone.num_blocks))
    multipliers = rate_multipliers(case.model, case.backbone, case.backbone.num_blocks, 0.5)
    by_path = {v.path: m for v, m in zip(case.model.trainable_variables, multipliers, strict=True)}
    assert by_path["logits/kernel"] == 1
    assert all(by_path[path] == 0.5 ** (case.backbone.num_blocks - 1 - block) for path, block in unfrozen)


def test_unfreezing_the_last_block_trains_no_other(case: Case) -> None:
    unfrozen = unfreeze_last_blocks(case.model, case.backbone, 1)
    assert {block for _, block in unfrozen} == {case.backbone.num_blocks - 1}


def answer_and_gradients(case: Case, pixels: Any, call: Any) -> tuple[Any, dict[str, Any]]:
    """Return what `call` makes of the pixels, and the gradient of a mixture of it for every trainable variable."""
    variables = case.core.trainable_variables

    # Op by op: of a network that runs once, making a graph takes longer.
    with tf.GradientTape() as tape:
        answer = call(pixels)
        numbers = tf.range(tf.size(answer), dtype=tf.float32)
        mixture = tf.reduce_sum(answer * tf.reshape(tf.cos(numbers), tf.shape(answer)))
    gradients = tape.gradient(mixture, [variable.value for variable in variables])
    return answer.numpy(), {v.path: g.numpy() for v, g in zip(variables, gradients, strict=True)}


def assert_alike(one: Any, other: Any, message: str) -> None:
    # Random weights make the answers of some backbones tiny: what counts is the difference beside them.
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max() + 1e-30, err_msg=message)


def test_both_halves_are_the_whole_and_train_it(case: Case) -> None:
    num_blocks = case.backbone.num_blocks // 2
    unfreeze_last_blocks(case.model, case.backbone, num_blocks)
    described, digest = case.model.to_json(), model_digest(case.model)
    split = split_backbone(case.core, case.backbone, num_blocks)
    size = case.backbone.min_input_size
    pixels = np.random.default_rng(2).uniform(0, 255, (2, size, size, 3)).astype(np.float32)
    whole, gradients = answer_and_gradients(case, pixels, lambda given: case.core(given, training=False))
    activations = split.activations(pixels)
    halves, of_suffix = answer_and_gradients(case, activations, split.outputs)
    ends = np.cumsum(groups_of(case.core))[:-1]
    for half, level in zip(np.split(halves, ends, 1), np.split(whole, ends, 1), strict=True):
        assert_alike(half, level, "features")
    for path, gradient in of_suffix.items():
        assert_alike(gradient, gradients[path], path)
    # The halves are views of the whole, which they leave as it was.
    assert (described, digest) == (case.model.to_json(), model_digest(case.model))


def pooled_and_boundary(case: Case) -> tuple[Any, tuple[int, ...]]:
    """Return a function to features and, behind them, a flat boundary in the middle: both in one pass."""
    middle = case.backbone.blocks[case.backbone.num_blocks // 2]
    boundary = next(operation.output for operation in case.core.operations if operation.name == middle)
    both = keras.Model(case.core.input, [boundary, case.core.output])

    def forward(images: Any) -> Any:
        inner, last = both(images, training=False)
        return tf.concat([last, tf.reshape(inner, (-1, np.prod(inner.shape[1:])))], 1)

    return forward, groups_of(case.core)


def test_the_engine_answers_like_keras(case: Case) -> None:
    forward, groups = pooled_and_boundary(case)
    size = case.backbone.min_input_size
    graph = FrozenGraph(forward, size)
    # Structure, as photographs have, and some noise.
    generator = np.random.default_rng(0)
    smooth = tf.image.resize(generator.uniform(0, 255, (2, 4, 4, 3)), (size, size)).numpy()
    images = np.clip(smooth + generator.normal(0, 10, smooth.shape), 0, 255).astype(np.float32)
    rows = LiteRtForward(convert(graph), size, num_threads=1).forward(images)
    expected = KerasForward(graph).forward(images)
    assert rows.shape == expected.shape
    # Apart: a random network's boundary may be thousands of times its features.
    ends = np.cumsum(groups)
    for found, wanted in zip(np.split(rows, ends, 1), np.split(expected, ends, 1), strict=True):
        assert relative_difference(found, wanted) <= TOLERANCE
    assert len(network_digest(case.core)) == 64  # what the feature cache knows it by


def test_every_cut_has_a_boundary(case: Case) -> None:
    for num_blocks in range(1, case.backbone.num_blocks):
        boundary = boundary_of(case.core, case.backbone, num_blocks)
        cut = case.backbone.num_blocks - num_blocks - 1
        levels = sum(block < cut for block in level_blocks(case.backbone.num_blocks))
        assert len(boundary.shapes) == 1 + levels or not case.backbone.clean_cuts
        assert boundary.row_bytes == 4 * boundary.row_length > 0
    for num_blocks in (0, case.backbone.num_blocks):
        with pytest.raises(ConfigError, match=r"to cut .* in two"):
            boundary_of(case.core, case.backbone, num_blocks)


def test_facts_of_the_registry_are_true(case: Case) -> None:
    backbone = case.backbone
    assert case.core.count_params() == backbone.num_parameters
    assert backbone.native_input_size >= backbone.min_input_size
    assert backbone.source.startswith("https://")
    with pytest.raises(ConfigError, match="`input_size` must be at least"):
        backbone.check_input_size(backbone.min_input_size - 1)
    # SavedModel refuses such names ("not a valid root scope name").
    assert not [layer.name for layer in case.core.layers if layer.name.startswith("_")]
    # Training finds variables by their paths.
    paths = [weight.path for weight in case.model.weights]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_classifier_answers_bit_for_bit_alike(name: str, tmp_path: Path) -> None:
    model = build_classifier(
        BACKBONES[name], 80, CLASSES, HeadConfig(weights="none", dropout=0.1, features="levels")
    )
    image = np.random.default_rng(1).integers(0, 256, (1, 80, 60, 3), dtype=np.uint8)
    save_classifier(model, tmp_path, {"classes": list(CLASSES)})
    loaded = load_classifier(tmp_path)
    assert loaded.classes == CLASSES
    assert model_digest(loaded.model) == model_digest(model)
    np.testing.assert_array_equal(loaded.model(image), model(image))

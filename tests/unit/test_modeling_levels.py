"""Features of several levels: where they are read, how they are pooled, and what of them crosses a cut."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from kubegraft.config import HeadConfig
from kubegraft.errors import ConfigError
from kubegraft.modeling.backbones import get_backbone
from kubegraft.modeling.classifier import build_classifier, parts
from kubegraft.modeling.engines import TOLERANCE, FrozenGraph, relative_difference
from kubegraft.modeling.engines.keras_forward import KerasForward
from kubegraft.modeling.engines.litert import LiteRtForward, convert
from kubegraft.modeling.levels import groups_of, level_blocks
from kubegraft.modeling.splitting import boundary_of, split_backbone

BACKBONE = get_backbone("efficientnet_lite0")
SIZE = 64


def build(features: str = "levels", policy: str = "float32", size: int = SIZE) -> Any:
    config = HeadConfig(weights="none", dropout=0.1, features=features)
    return build_classifier(BACKBONE, size, ("a", "b", "c"), config, policy=policy)


@pytest.fixture(scope="module")
def core() -> Any:
    return parts(build()).backbone


@pytest.fixture(scope="module")
def images() -> Any:
    return np.random.default_rng(0).uniform(0, 255, (2, SIZE, SIZE, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("num_blocks", "expected"),
    [(1, ()), (2, (0,)), (3, (0, 1)), (4, (0, 1, 2)), (5, (1, 2, 3)), (16, (3, 7, 11)), (13, (3, 6, 9))],
)
def test_levels_are_a_quarter_half_and_three_quarters_deep(
    num_blocks: int, expected: tuple[int, ...]
) -> None:
    assert level_blocks(num_blocks) == expected


def test_features_are_the_last_map_averaged_and_quarters_of_earlier_ones(core: Any, images: Any) -> None:
    ends = [core.get_layer(BACKBONE.blocks[block]).output for block in (3, 7, 11)]
    early, middle, late, last = keras.Model(core.input, [*ends, core.get_layer("level_last").input])(
        images, training=False
    )
    assert [tuple(each.shape[1:]) for each in (early, middle, late, last)] == [
        (8, 8, 40),
        (4, 4, 80),
        (2, 2, 192),
        (2, 2, 1280),
    ]
    expected = [np.mean(last, (1, 2))]
    for level in (early, middle, late):
        half = level.shape[1] // 2
        quarters = [
            level[:, :half, :half],
            level[:, :half, half:],
            level[:, half:, :half],
            level[:, half:, half:],
        ]
        expected += [np.mean(quarter, (1, 2)) for quarter in quarters]
    found = core(images, training=False)
    assert groups_of(core) == (1280, 160, 320, 768)
    np.testing.assert_allclose(found, np.concatenate(expected, 1), rtol=1e-5, atol=1e-7)


def test_the_middle_of_an_odd_side_is_in_both_halves() -> None:
    core = parts(build(size=96)).backbone
    level = core.get_layer(BACKBONE.blocks[11]).output
    assert level.shape[1:3] == (3, 3)
    pixels = np.random.default_rng(1).uniform(0, 255, (1, 96, 96, 3)).astype(np.float32)
    found, pooled = keras.Model(core.input, [level, core.get_layer("level_11").output])(
        pixels, training=False
    )
    quarters = [found[:, top : top + 2, left : left + 2] for top in (0, 1) for left in (0, 1)]
    expected = np.concatenate([np.mean(quarter, (1, 2)) for quarter in quarters], 1)
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-7)


def test_a_map_of_one_cell_has_no_quarters() -> None:
    # The last three blocks of a small image: 1 x 1.
    assert groups_of(parts(build(size=32)).backbone) == (1280, 160, 320, 192)


def test_a_wide_level_is_averaged_over_the_whole_image() -> None:
    core = parts(
        build_classifier(
            get_backbone("vgg16"), 64, ("a", "b"), HeadConfig(weights="none", dropout=0.1, features="levels")
        )
    ).backbone
    # 4 x 128 are as many as the last feature map has; 4 x 256 would be more.
    assert groups_of(core) == (512, 512, 256, 512)


def test_without_levels_there_is_one_group() -> None:
    model = build("last")
    assert parts(model).backbone.output_shape == (None, 2, 2, 1280)
    assert groups_of(parts(model).backbone) == (1280,)


def test_levels_are_standardised_each_by_its_own_scale() -> None:
    model_parts = parts(build())
    groups = groups_of(model_parts.backbone)
    scales = np.repeat([1e-4, 1.0, 1e4, 1.0], groups)
    scales[0] = 0.0
    model_parts.set_standardisation(np.zeros(sum(groups)), scales)
    _mean, variance = model_parts.standardise.get_weights()
    expected = scales.copy()
    expected[0] = 1.0
    # A level that varies little beside another one is scaled up all the same.
    np.testing.assert_allclose(variance, expected, rtol=1e-6)


@pytest.mark.parametrize("num_blocks", [2, 4, 5, 8, 13, 15])
def test_levels_cross_a_cut_pooled(core: Any, images: Any, num_blocks: int) -> None:
    boundary = boundary_of(core, BACKBONE, num_blocks)
    cut = BACKBONE.num_blocks - num_blocks - 1
    pooled = [length for block, length in ((3, 160), (7, 320), (11, 768)) if block < cut]
    assert sorted(shape[0] for shape in boundary.shapes if len(shape) == 1) == pooled
    assert sum(len(shape) == 3 for shape in boundary.shapes) == 1
    split = split_backbone(core, BACKBONE, num_blocks)
    rows = split.activations(images)
    assert rows.shape == (2, boundary.row_length)
    np.testing.assert_allclose(split.outputs(rows), core(images, training=False), rtol=1e-5, atol=1e-7)


def test_levels_are_averaged_in_float32_in_any_policy() -> None:
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 224, 224, 3)).astype(np.float32)
    core = parts(build(policy="mixed_bfloat16", size=224)).backbone
    ends = [core.get_layer(BACKBONE.blocks[block]).output for block in (3, 7, 11)]
    *maps, found = keras.Model(core.input, [*ends, core.output])(pixels, training=False)
    assert [each.dtype for each in (*maps, found)] == [tf.bfloat16] * 3 + [tf.float32]
    _last, *levels = np.split(found.numpy(), np.cumsum(groups_of(core))[:-1], 1)
    for level, each in zip(levels, maps, strict=True):
        plain = tf.cast(each, tf.float32).numpy()
        height, width = plain.shape[1] // 2, plain.shape[2] // 2
        # The first quarter; of an odd side the middle too.
        quarter = plain[:, : plain.shape[1] - height, : plain.shape[2] - width]
        np.testing.assert_allclose(level[:, : plain.shape[3]], np.mean(quarter, (1, 2)), rtol=1e-4, atol=1e-6)
    split = split_backbone(core, BACKBONE, 4)
    assert split.boundary.dtype == "bfloat16"
    rows = split.activations(pixels)
    assert rows.dtype == tf.bfloat16
    halves = split.outputs(rows)
    assert halves.dtype == tf.float32
    # Of what crosses, bfloat16 keeps eight bits.
    np.testing.assert_allclose(halves, found, rtol=2**-7, atol=1e-5)


def test_the_engine_answers_like_keras_at_a_usual_size() -> None:
    core = parts(build(size=224)).backbone
    graph = FrozenGraph(lambda pixels: core(pixels, training=False), 224)
    smooth = tf.image.resize(np.random.default_rng(0).uniform(0, 255, (2, 8, 8, 3)), (224, 224)).numpy()
    rows, expected = LiteRtForward(convert(graph), 224).forward(smooth), KerasForward(graph).forward(smooth)
    ends = np.cumsum(groups_of(core))[:-1]
    for found, wanted in zip(np.split(rows, ends, 1), np.split(expected, ends, 1), strict=True):
        assert relative_difference(found, wanted) <= TOLERANCE


def test_what_the_head_sees_must_be_chosen_before_building() -> None:
    with pytest.raises(ConfigError, match=r"`features` must be one of \['last', 'levels'\]"):
        build("auto")
    with pytest.raises(ConfigError, match="`features` must be"):
        HeadConfig(features="first")

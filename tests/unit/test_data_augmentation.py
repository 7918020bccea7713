import numpy as np
import pytest

from kubegraft import tensorflow_setup  # noqa: F401 - before tensorflow
from kubegraft.data.augmentation import augment_image
from kubegraft.errors import ConfigError

import tensorflow as tf  # isort: skip

IMAGE = tf.constant(np.random.default_rng(0).integers(0, 256, (32, 32, 3)), tf.float32)
TRANSFORMS = ("flip", "crop", "rotation", "colour", "randaugment")


def augmented(transforms, strength, first=0, count=1):
    seeds = tf.stack([[number, 7] for number in range(first, first + count)])
    variants = tf.data.Dataset.from_tensor_slices(seeds).map(
        lambda seed: augment_image(IMAGE, seed, transforms, strength), num_parallel_calls=2
    )
    return np.stack([variant.numpy() for variant in variants])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_varies_with_the_seed_and_only_with_it(transform):
    variants = augmented((transform,), 0.8, count=24)
    np.testing.assert_array_equal(variants, augmented((transform,), 0.8, count=24))
    assert len(np.unique(variants.reshape(24, -1), axis=0)) >= 2
    assert variants.dtype == np.float32
    assert variants.shape == (24, 32, 32, 3)
    assert variants.min() >= 0
    assert variants.max() <= 255


@pytest.mark.parametrize("transform", TRANSFORMS[1:])
def test_strength_zero_leaves_the_image(transform):
    np.testing.assert_allclose(augmented((transform,), 0.0, count=8), np.stack([IMAGE] * 8), atol=1e-3)


def test_flip_mirrors_about_half_of_the_images_exactly():
    variants = augmented(("flip",), 0.0, count=64)
    mirrored = [bool((variant == IMAGE.numpy()[:, ::-1]).all()) for variant in variants]
    untouched = [bool((variant == IMAGE.numpy()).all()) for variant in variants]
    assert all(one != other for one, other in zip(mirrored, untouched, strict=True))
    assert 18 <= sum(mirrored) <= 46


def test_randaugment_uses_all_of_its_operations():
    variants = augmented(("randaugment",), 1.0, count=200)
    assert len(np.unique(variants.reshape(200, -1), axis=0)) > 150


def test_a_transform_does_not_depend_on_the_others():
    without = augmented(("colour",), 0.5, count=4)
    mixup_is_no_transform_of_one_image = augmented(("mixup", "colour"), 0.5, count=4)
    np.testing.assert_array_equal(without, mixup_is_no_transform_of_one_image)


def test_no_transform_leaves_the_image():
    np.testing.assert_array_equal(augmented((), 1.0)[0], IMAGE)


def test_an_unknown_transform_gets_a_suggestion():
    with pytest.raises(ConfigError, match="Did you mean 'rotation'"):
        augment_image(IMAGE, tf.constant([0, 0]), ("rotate",), 0.5)

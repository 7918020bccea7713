"""Random transforms of training images, each a pure function of a seed.

Training derives the seed from the run's seed, the epoch and the example's index, so that a resumed run sees
the very pixels that an uninterrupted one does, on any number of threads or devices.

All transforms that move pixels are composed into one affine map first, so that an image is interpolated
once however many of them are on.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Final

import tensorflow as tf

from kubegraft.config import TRANSFORMS
from kubegraft.errors import ConfigError, suggestion

# At strength 1. The published RandAugment rotates and shears as far at its highest magnitude.
_MOST_ROTATION_DEGREES: Final = 30.0
_MOST_CROPPED: Final = 0.5  # of the side
_MOST_COLOUR: Final = 0.6
_MOST_SHEAR: Final = 0.3
_MOST_TRANSLATION: Final = 0.3  # of the side
_MOST_POSTERISED_BITS: Final = 4.0
_NUM_RANDAUGMENT: Final = 2

# ITU-R BT.601: what the eye takes from red, green and blue.
_LUMINANCE: Final = (0.299, 0.587, 0.114)


def augment_image(
    image: tf.Tensor, seed: tf.Tensor, transforms: tuple[str, ...], strength: float
) -> tf.Tensor:
    """Return a random variant of an image.

    flip: mirrored left to right, or not. crop: a window of at least `1 - 0.5 * strength` of the side,
    enlarged. rotation: by up to `30 * strength` degrees. colour: brightness, contrast and saturation by up to
    `0.6 * strength`. randaugment: two of rotation, shear in x or y, translation, brightness, contrast,
    saturation, posterisation and solarisation, each by up to `strength` of its most. What comes in from
    outside the image is its reflection.

    Each transform draws from its own stream, so that turning one on does not change what another does. At
    strength 0 all but flip, which has no strength, leave the image as it is.

    Args:
        image: `float32[size, size, 3]`, values in [0, 255].
        seed: `int32[2]`; equal seeds give equal results.
        transforms: Some of `flip`, `crop`, `rotation`, `colour`, `randaugment`. `mixup`, which is not a
            transform of one image, is ignored.
        strength: In [0, 1].

    Returns:
        `float32[size, size, 3]`, values in [0, 255].

    Raises:
        ConfigError: If a transform is unknown.

    Source:
        Cubuk et al. 2020, "RandAugment", for the operations of `randaugment`.
    """
    _require_known(transforms)
    moved = {name: _AFFINE[name](_stream(seed, name), strength) for name in transforms if name in _AFFINE}
    operations = (
        _chosen_operations(_stream(seed, "randaugment"), strength) if "randaugment" in transforms else []
    )
    matrices = [*moved.values(), *(_operation_matrix(*operation) for operation in operations)]
    if matrices:
        image = _warped(image, matrices)
    if "colour" in transforms:
        image = _coloured(image, _stream(seed, "colour"), strength)
    for operation in operations:
        image = _operation_pixels(image, *operation)
    return tf.clip_by_value(image, 0.0, 255.0)


def _require_known(transforms: tuple[str, ...]) -> None:
    for name in transforms:
        if name not in TRANSFORMS:
            raise ConfigError(
                f"`augmentation` must name transforms among {', '.join(TRANSFORMS)}. Received: {name!r}."
                f"{suggestion(name, TRANSFORMS)}"
            )


def _stream(seed: tf.Tensor, name: str) -> tf.Tensor:
    """Return the seed of a transform's own random numbers."""
    return tf.random.experimental.stateless_fold_in(seed, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def _uniform(seed: tf.Tensor, count: int, low: float, high: float) -> list[tf.Tensor]:
    """Return `count` random scalars in [low, high)."""
    return list(tf.unstack(tf.random.stateless_uniform([count], seed, low, high)))


# A map is a 2 x 3 matrix (a, b, c, d, e, f): output pixel (x, y) shows input pixel
# (a x + b y + c, d x + e y + f), measured from the centre in units of the side.
_Affine = tuple[tf.Tensor | float, ...]


def _flip(seed: tf.Tensor, strength: float) -> _Affine:
    (draw,) = _uniform(seed, 1, 0.0, 1.0)
    return tf.where(draw < 0.5, -1.0, 1.0), 0.0, 0.0, 0.0, 1.0, 0.0


def _crop(seed: tf.Tensor, strength: float) -> _Affine:
    cropped, x, y = _uniform(seed, 3, 0.0, 1.0)
    side = 1.0 - _MOST_CROPPED * strength * cropped
    return side, 0.0, (1.0 - side) * (x - 0.5), 0.0, side, (1.0 - side) * (y - 0.5)


def _rotation(seed: tf.Tensor, strength: float) -> _Affine:
    (turn,) = _uniform(seed, 1, -1.0, 1.0)
    return _rotated(turn * strength)


def _rotated(amount: tf.Tensor) -> _Affine:
    angle = amount * math.radians(_MOST_ROTATION_DEGREES)
    cosine, sine = tf.cos(angle), tf.sin(angle)
    return cosine, -sine, 0.0, sine, cosine, 0.0


_AFFINE: Final[dict[str, Callable[[tf.Tensor, float], _Affine]]] = {
    "flip": _flip,
    "crop": _crop,
    "rotation": _rotation,
}


def _warped(image: tf.Tensor, matrices: list[_Affine]) -> tf.Tensor:
    size = tf.shape(image)[:2]
    side = tf.cast(size[0] - 1, tf.float32)
    combined = tf.eye(3)
    for matrix in matrices:
        combined = combined @ tf.reshape(
            tf.stack([*map(tf.cast, matrix, [tf.float32] * 6), 0.0, 0.0, 1.0]), [3, 3]
        )
    linear, shift = combined[:2, :2], combined[:2, 2]
    # From the centre to the corner, where the op has its origin.
    centre = tf.fill([2], side / 2.0)
    offset = centre - tf.linalg.matvec(linear, centre) + shift * side
    transform = tf.concat([tf.concat([linear, offset[:, tf.newaxis]], axis=1), [[0.0, 0.0, 1.0]]], axis=0)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[tf.newaxis],
        transforms=tf.reshape(transform, [1, 9])[:, :8],
        output_shape=size,
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="REFLECT",
    )[0]


def _coloured(image: tf.Tensor, seed: tf.Tensor, strength: float) -> tf.Tensor:
    most = _MOST_COLOUR * strength
    brightness, contrast, saturation = _uniform(seed, 3, -most, most)
    return _saturated(_contrasted(_brightened(image, brightness), contrast), saturation)


def _brightened(image: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(image * (1.0 + amount), 0.0, 255.0)


def _contrasted(image: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    mean = tf.reduce_mean(image)
    return tf.clip_by_value(mean + (image - mean) * (1.0 + amount), 0.0, 255.0)


def _saturated(image: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    grey = tf.reduce_sum(image * tf.constant(_LUMINANCE), axis=-1, keepdims=True)
    return tf.clip_by_value(grey + (image - grey) * (1.0 + amount), 0.0, 255.0)


def _posterised(image: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    step = tf.floor(2.0 ** tf.floor(tf.abs(amount) * (_MOST_POSTERISED_BITS + 1.0)))
    return tf.minimum(tf.floor(image / step) * step, 255.0)


def _solarised(image: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    return tf.where(image > 255.0 * (1.0 - tf.abs(amount)), 255.0 - image, image)


def _chosen_operations(seed: tf.Tensor, strength: float) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Return pairs of an operation's number and its amount in [-strength, strength]."""
    num_operations = len(_MATRICES) + len(_PIXELS)
    seeds = tf.random.experimental.stateless_split(seed, 2)
    numbers = tf.unstack(
        tf.random.stateless_uniform([_NUM_RANDAUGMENT], seeds[0], 0, num_operations, tf.int32)
    )
    return list(zip(numbers, _uniform(seeds[1], _NUM_RANDAUGMENT, -strength, strength), strict=True))


_MATRICES: Final[tuple[Callable[[tf.Tensor], _Affine], ...]] = (
    _rotated,
    lambda amount: (1.0, amount * _MOST_SHEAR, 0.0, 0.0, 1.0, 0.0),
    lambda amount: (1.0, 0.0, 0.0, amount * _MOST_SHEAR, 1.0, 0.0),
    lambda amount: (1.0, 0.0, amount * _MOST_TRANSLATION, 0.0, 1.0, 0.0),
    lambda amount: (1.0, 0.0, 0.0, 0.0, 1.0, amount * _MOST_TRANSLATION),
)
_PIXELS: Final[tuple[Callable[[tf.Tensor, tf.Tensor], tf.Tensor], ...]] = (
    lambda image, amount: _brightened(image, amount * _MOST_COLOUR),
    lambda image, amount: _contrasted(image, amount * _MOST_COLOUR),
    lambda image, amount: _saturated(image, amount * _MOST_COLOUR),
    _posterised,
    _solarised,
)


def _operation_matrix(number: tf.Tensor, amount: tf.Tensor) -> _Affine:
    """Return the map of an operation that moves pixels, the identity for any other."""
    matrices = tf.stack(
        [tf.stack([tf.cast(item, tf.float32) for item in make(amount)]) for make in _MATRICES]
    )
    identity = tf.constant([[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]])
    chosen = tf.concat([matrices, identity], axis=0)[tf.minimum(number, len(_MATRICES))]
    return tuple(tf.unstack(chosen, num=6))


def _operation_pixels(image: tf.Tensor, number: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    """Return the image after an operation that changes pixels' values, unchanged for any other."""
    branches = [functools.partial(make, image, amount) for make in _PIXELS]
    return tf.switch_case(number - len(_MATRICES), branches, default=lambda: image)

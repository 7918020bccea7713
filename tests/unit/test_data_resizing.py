"""Images get the network's side to the same bits, whoever resizes them."""

import numpy as np
import pytest

from kubegraft import tensorflow_setup  # noqa: F401 - before tensorflow
from kubegraft.data.resizing import resize, resize_into

import tensorflow as tf  # isort: skip

RANDOM = np.random.default_rng(0)
SIZE = 48


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 40), (7, 48), (48, 48), (20, 33), (47, 2), (49, 48), (20, 90), (131, 77)],
)
def test_an_array_is_resized_as_a_tensor_is(height, width):
    image = RANDOM.integers(0, 256, (height, width, 3), np.uint8)
    written = np.empty((SIZE, SIZE, 3), np.float32)
    resize_into(written, image)
    np.testing.assert_array_equal(written, resize(tf.constant(image), SIZE))
    antialiased = tf.image.resize(image, (SIZE, SIZE), antialias=True)
    np.testing.assert_allclose(written, antialiased, atol=1e-3)


def test_images_of_changing_size_do_not_mix():
    images = [RANDOM.integers(0, 256, (height, 9, 3), np.uint8) for height in (5, 30, 5, 12)]
    for image in images:
        written = np.empty((SIZE, SIZE, 3), np.float32)
        resize_into(written, image)
        np.testing.assert_array_equal(written, resize(tf.constant(image), SIZE))

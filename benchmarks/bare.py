"""The limits of this machine: the frozen pass on tensors in memory, and the matrix products of the trained blocks.

A process of its own; the result is one JSON document on stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings

import keras
import numpy as np
import tensorflow as tf

from kubegraft.modeling.backbones import get_backbone
from kubegraft.training.distribution import precision_policy

from .machine import has_bfloat16

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--backbone", default="efficientnet_lite0")
parser.add_argument("--weights", default="imagenet")
parser.add_argument("--input-size", type=int, default=224)
parser.add_argument("--num-blocks", type=int, default=5)
parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
BATCH = 32


def main() -> None:
    options = parser.parse_args()
    backbone = get_backbone(options.backbone)
    core = backbone.build(options.input_size, options.weights)
    model = keras.Model(core.input, keras.layers.GlobalAveragePooling2D()(core.output))
    shape = (BATCH, options.input_size, options.input_size, 3)
    images = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    products = matrix_products(core, backbone, options.num_blocks)
    rates = {name: rate(run, images, options.seconds) for name, run in engines(model).items()}
    gpus = tf.config.list_physical_devices("GPU")
    quick = precision_policy("auto") == "mixed_bfloat16" if gpus else has_bfloat16()
    if gpus and quick:  # what kubegraft computes in there
        keras.config.set_dtype_policy("mixed_bfloat16")
        core = backbone.build(options.input_size, options.weights)
        model = keras.Model(core.input, keras.layers.GlobalAveragePooling2D()(core.output))
        rates["tensorflow, bfloat16"] = rate(engines(model)["tensorflow"], images, options.seconds)
    result = {
        "images_per_second": rates,
        "suffix_products": len(products),
        "suffix_seconds_per_image": {
            dtype: seconds_of(products, dtype, options.seconds)
            for dtype in ("float32", *(["bfloat16"] if quick else []))
        },
    }
    print(json.dumps(result))


def engines(model) -> dict:
    """Return functions from images to features: TensorFlow's graph with frozen weights, and LiteRT."""
    signature = tf.TensorSpec([BATCH, *model.input_shape[1:]], tf.float32)
    traced = tf.function(lambda x: model(x, training=False), input_signature=[signature])
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    frozen = convert_variables_to_constants_v2(traced.get_concrete_function())
    made = {"tensorflow": lambda images: tf.cast(frozen(tf.constant(images))[0], tf.float32).numpy()}
    if not tf.config.list_physical_devices("GPU"):
        made["litert"] = litert(traced.get_concrete_function())
    return made


def litert(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = tf.lite.TFLiteConverter.from_concrete_functions([function]).convert()
        interpreter = tf.lite.Interpreter(model_content=content, num_threads=len(os.sched_getaffinity(0)))
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run(images):
        interpreter.set_tensor(given, images)
        interpreter.invoke()
        return interpreter.get_tensor(made)

    return run


def rate(run, images, seconds: float) -> float:
    """Return images a second, after a first call that does not count."""
    run(images)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        run(images)
        count += len(images)
    return round(count / (time.perf_counter() - started), 1)


def matrix_products(core, backbone, num_blocks: int) -> list[tuple[int, int, int]]:
    """Return (rows of an image, inner, columns) of each convolution of the last blocks that is a matrix product.

    Depthwise convolutions are none, and do not count: the limit is what no implementation can be faster than.
    """
    blocks = backbone.block_of_layer(core)
    first = backbone.num_blocks - num_blocks
    found = []
    for layer in core.layers:
        if blocks[layer.name] < first or type(layer) not in (keras.layers.Conv2D, keras.layers.Dense):
            continue
        *window, inner, columns = layer.kernel.shape
        rows = math.prod(layer.output.shape[1:-1])
        found.append((rows, math.prod(window) * inner, columns))
    return found


def seconds_of(products: list[tuple[int, int, int]], dtype: str, seconds: float) -> float:
    """Return the seconds of the products of one image, forward and both backward, in batches of 32."""
    operands = [
        (
            tf.cast(tf.random.normal((rows * BATCH, inner)), dtype),
            tf.cast(tf.random.normal((inner, columns)), dtype),
            tf.cast(tf.random.normal((rows * BATCH, columns)), dtype),
        )
        for rows, inner, columns in products
    ]

    @tf.function
    def step():
        wanted = []
        for inputs, kernel, gradient in operands:
            wanted.append(tf.matmul(inputs, kernel)[0, 0])
            wanted.append(tf.matmul(gradient, kernel, transpose_b=True)[0, 0])
            wanted.append(tf.matmul(inputs, gradient, transpose_a=True)[0, 0])
        return tf.cast(tf.stack(wanted), tf.float32)

    step().numpy()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds or not count:
        step().numpy()  # a GPU is done only when its answer is here
        count += 1
    return (time.perf_counter() - started) / count / BATCH


if __name__ == "__main__":
    main()

"""Transfer learning in plain Keras, as its guide teaches it and a user who knows it well writes it.

A process of its own. Each epoch is a JSON line on stderr, the result one on stdout. The backbone comes from kubegraft,
so that all contestants have the same weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import keras
import tensorflow as tf

from kubegraft.modeling.backbones import get_backbone
from kubegraft.training.distribution import precision_policy

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("data", type=Path)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--backbone", default="efficientnet_lite0")
parser.add_argument("--weights", default="imagenet")
parser.add_argument("--input-size", type=int, default=224)
parser.add_argument("--num-blocks", type=int, default=5, help="last blocks to unfreeze; -1 for all")
parser.add_argument("--head-epochs", type=int, default=30, help="at most; ends when it gets no better")
parser.add_argument("--tune-epochs", type=int, default=6)
parser.add_argument("--cache", action="store_true", help="keep decoded images in memory")
parser.add_argument("--seed", type=int, default=0)
BATCH = 32  # on each device
HEAD_RATE, TUNE_RATE = 1e-3, 1e-4
ALL_RATE = 1e-5  # of Keras's guide, which unfreezes the whole backbone
# Epochs without a better one after which the head is taken to be done.
PATIENCE = 3


def load(folder: Path, options: argparse.Namespace, batch_size: int, *, shuffle: bool):
    """Return the images and labels of a split, decoded and resized, in batches."""
    size = (options.input_size, options.input_size)
    arguments = {"image_size": size, "label_mode": "int", "shuffle": shuffle, "seed": options.seed}
    if not options.cache:
        images = keras.utils.image_dataset_from_directory(
            folder, batch_size=batch_size, verbose=False, **arguments
        )
        return images.prefetch(tf.data.AUTOTUNE)
    images = keras.utils.image_dataset_from_directory(folder, batch_size=None, verbose=False, **arguments)
    images = images.cache()
    if shuffle:
        images = images.shuffle(2000, seed=options.seed)
    return images.batch(batch_size).prefetch(tf.data.AUTOTUNE)


class Log(keras.callbacks.Callback):
    """Says after each epoch how far it is."""

    def __init__(self, phase: str):
        super().__init__()
        self.phase, self.seconds = phase, []

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.monotonic() - self.started)
        say(self.phase, "epoch", epoch=epoch, validation_accuracy=float(logs["val_accuracy"]))


def say(phase: str, event: str, **fields) -> None:
    print(json.dumps({"stage": phase, "event": event, **fields}), file=sys.stderr, flush=True)


def fit(model, splits, epochs: int, optimizer, phase: str, patience: int) -> dict:
    """Train until no epoch gets better, keep the best one, and return what came out."""
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    log = Log(phase)
    best = keras.callbacks.EarlyStopping(
        "val_accuracy", mode="max", patience=patience, restore_best_weights=True
    )
    history = model.fit(
        splits["train"],
        validation_data=splits["validation"],
        epochs=epochs,
        callbacks=[best, log],
        verbose=0,
    ).history
    return {
        "validation_accuracy": max(history["val_accuracy"]),
        "epoch_seconds": log.seconds,
        "weights": model.get_weights(),
    }


def unfreeze(core, backbone, num_blocks: int) -> None:
    """Make the last blocks trainable; batch norm stays as it is, as Keras's guide says."""
    first = 0 if num_blocks < 0 else backbone.num_blocks - num_blocks
    blocks = backbone.block_of_layer(core)
    core.trainable = True
    for layer in core.layers:
        layer.trainable = blocks[layer.name] >= first and not isinstance(
            layer, keras.layers.BatchNormalization
        )


def schedule(epochs: int, num_steps: int):
    """Warm up for a tenth of the steps, then fall as a cosine."""
    steps = max(epochs * num_steps, 2)
    warm_up = max(steps // 10, 1)
    return keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, warmup_target=TUNE_RATE, warmup_steps=warm_up
    )


def main() -> None:
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    # On GPUs what Keras's guides say of them: all of them, and mixed precision where they compute it.
    keras.config.set_dtype_policy(precision_policy("auto"))
    gpus = tf.config.list_logical_devices("GPU")
    strategy = tf.distribute.MirroredStrategy() if len(gpus) > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        train(options, BATCH * max(len(gpus), 1))


def train(options: argparse.Namespace, batch_size: int) -> None:
    """Train both phases, and print what came out."""
    splits = {
        path.name: load(path, options, batch_size, shuffle=path.name == "train")
        for path in sorted(options.data.iterdir())
    }
    num_classes = sum(1 for path in (options.data / "train").iterdir() if path.is_dir())
    num_images = {name: sum(1 for _ in (options.data / name).glob("*/*")) for name in splits}

    backbone = get_backbone(options.backbone)
    core = backbone.build(options.input_size, options.weights, seed=options.seed)
    core.trainable = False
    pixels = keras.Input((options.input_size, options.input_size, 3))
    x = keras.layers.GlobalAveragePooling2D()(core(pixels, training=False))
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.2)(x)
    answer = keras.layers.Dense(num_classes, activation="softmax", dtype="float32")
    model = keras.Model(pixels, answer(x))

    adam = keras.optimizers.Adam(HEAD_RATE)
    phases = {"head": fit(model, splits, options.head_epochs, adam, "train_head", PATIENCE)}
    if options.tune_epochs:
        unfreeze(core, backbone, options.num_blocks)
        num_steps = -(-num_images["train"] // batch_size)
        epochs = options.tune_epochs
        rate = schedule(epochs, num_steps) if options.num_blocks >= 0 else ALL_RATE
        optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01)
        phases["fine_tuned"] = fit(model, splits, epochs, optimizer, "fine_tune", epochs)
    options.output.mkdir(parents=True, exist_ok=True)
    model.save(options.output / "model.keras")
    say("textbook", "trained")

    test = {}
    for name, phase in phases.items() if "test" in splits else ():
        model.set_weights(phase["weights"])
        test[name] = float(model.evaluate(splits["test"], verbose=0, return_dict=True)["accuracy"])
    passes = 1 if options.cache else sum(len(phase["epoch_seconds"]) for phase in phases.values())
    result = {
        "validation_accuracy": {name: phase["validation_accuracy"] for name, phase in phases.items()},
        "test_accuracy": test,
        "images_decoded": passes * (num_images["train"] + num_images["validation"]),
        "epoch_seconds": {name: phase["epoch_seconds"] for name, phase in phases.items()},
        "num_images": num_images,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

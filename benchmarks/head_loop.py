"""The loop that trains a head with hidden layers, beside the bare matrix products of its steps, in one run.

    python -m benchmarks.head_loop [--images 60000] [--dim 1280] [--units 256] [--classes 10] [--batch 32 ...]

`products` are the five products of a step, forward and backward, and nothing else, many in one call of a graph;
`products xla` are the same, compiled. `steps` are ours: gathered batches, dropout, loss, clipping and AdamW. `steps
xla` are the same, compiled, as they run on a CPU. `made in` is what the first call takes more, which traces and
compiles. Each way has short turns, in rotation, and its best turn counts.
"""

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from kubegraft import tensorflow_setup
from kubegraft.processors import usable_processors

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("images", 60_000), ("dim", 1280), ("units", 256), ("classes", 10), ("steps", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, action="append", default=[])
    options = parser.parse_args()
    tensorflow_setup.setup(0)
    print(f"{options.dim} features, {options.units} hidden units, {usable_processors()} processors")
    for batch_size in options.batch or [32, 128, 256]:
        compare(options, batch_size)


def compare(options: argparse.Namespace, batch_size: int) -> None:
    """Print a line for each way to run steps of so many examples."""
    ways = {}
    for suffix, compiled in (("", False), (" xla", True)):
        ways["products" + suffix] = products(options, batch_size, compiled=compiled)
        ways["steps" + suffix] = steps(options, batch_size, compiled=compiled)
    first = {}
    for name, way in ways.items():
        start = time.perf_counter()
        way()
        first[name] = time.perf_counter() - start
        for _ in range(10):  # a call of the graph takes more and more steps, up to a fifth of a second
            way()
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name] = min(seconds[name], (time.perf_counter() - start) / options.steps)
    for name, each in seconds.items():
        made = first[name] - each * options.steps
        print(
            f"  batch {batch_size:4} {name:12} {1e3 * each:7.3f} ms a step   "
            f"{each / seconds['products']:5.2f} x products   made in {made:.1f} s"
        )


def products(options: argparse.Namespace, batch_size: int, *, compiled: bool) -> Callable[[], Any]:
    """Return a call that does the matrix products of all steps, each from what the one before it came to."""
    import tensorflow as tf

    rng = np.random.default_rng(0)

    def some(*shape: int) -> Any:
        return tf.constant(rng.normal(0, 0.01, shape), tf.float32)

    inputs, first = some(batch_size, options.dim), some(options.dim, options.units)
    second = some(options.units, options.classes)

    @tf.function(jit_compile=compiled)
    def run(inputs: Any, first: Any, second: Any) -> Any:
        def body(step: Any, first: Any, second: Any) -> Any:
            hidden = tf.matmul(inputs, first)
            logits = tf.matmul(hidden, second)
            back = tf.matmul(logits, second, transpose_b=True)
            return (
                step + 1,
                tf.matmul(inputs, back, transpose_a=True),
                tf.matmul(hidden, logits, transpose_a=True),
            )

        return tf.while_loop(
            lambda step, *_: step < options.steps, body, (0, first, second), parallel_iterations=1
        )

    return lambda: run(inputs, first, second)


def steps(options: argparse.Namespace, batch_size: int, *, compiled: bool) -> Callable[[], Any]:
    """Return a call that trains for all steps."""
    from kubegraft.config import HeadConfig
    from kubegraft.modeling.classifier import HeadParts, build_head
    from kubegraft.training import steps as steps_module
    from kubegraft.training.batches import epoch_batches
    from kubegraft.training.distribution import make_strategy
    from kubegraft.training.optimizer import GlobalAdamW, WarmUpCosine
    from kubegraft.training.sources import FeatureSource
    from kubegraft.training.trainables import HeadOnFeatures

    rng = np.random.default_rng(0)
    features = rng.normal(size=(options.images, options.dim)).astype(np.float32)
    source = FeatureSource(features, rng.integers(0, options.classes, options.images, dtype=np.int32))
    if features.nbytes > steps_module.RESIDENT_BYTES:
        raise SystemExit(
            f"--images and --dim must make features of at most {steps_module.RESIDENT_BYTES >> 20} MiB; others are "
            f"streamed. Received: {features.nbytes >> 20} MiB."
        )
    strategy = make_strategy()
    with strategy.scope():
        layers = build_head(
            options.dim, options.classes, HeadConfig(head="mlp", hidden_units=(options.units,), dropout=0.2)
        )
        head = HeadOnFeatures(HeadParts(layers))
        optimizer = GlobalAdamW(
            WarmUpCosine(1e-3, 10**6, 100),
            variables=head.variables,
            rate_multipliers=head.rate_multipliers,
            weight_decay=0.1,
        )
    config: Any = SimpleNamespace(num_classes=options.classes, label_smoothing=0.0, gradient_clip_norm=1.0)
    train_step, _ = steps_module.replica_steps(head, optimizer, config)
    made = steps_module.make_steps(strategy, source, batch_size, train_step, compiled=compiled)
    epoch = epoch_batches(source.labels, batch_size=batch_size, seed=0, epoch=0, shuffle=True)
    first = epoch.num_steps - options.steps
    if first < 0:
        raise SystemExit(
            f"--images must be at least {options.steps * batch_size} for batches of {batch_size}"
        )

    def run() -> None:
        for _ in made.run(epoch, first, (0, 0)):
            pass

    return run


if __name__ == "__main__":
    main()

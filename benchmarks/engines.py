"""Rates of the frozen pass, side by side in one run: Keras, constants, the engine, and our pipeline from files.

    python -m benchmarks.engines FOLDER [--backbone NAME ...] [--size PIXELS] [--seconds N]

FOLDER holds images, at any depth. Each way is given short turns, in rotation, and its best turn counts, so that
a busy machine slows all alike. `pipeline` reads, decodes, resizes and computes; its share is of the bare engine on
tensors that are in memory already. `cpu` counts processor time in place of wall time, on all processors.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from kubegraft import tensorflow_setup
from kubegraft.processors import usable_processors

from .datasets import SUFFIXES

ROUNDS = 4


class Files:
    """Image files as `training.sources.ImageSource` wants a split's reader."""

    split, failure = "train", None

    def __init__(self, folder: Path) -> None:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.casefold() in SUFFIXES)
        self.encoded = [path.read_bytes() for path in paths]
        self.labels = np.zeros(len(self.encoded), np.int32)

    def read(self, index: int) -> bytes:
        return self.encoded[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", action="append", default=[])
    parser.add_argument("--size", type=int, default=0, help="side in pixels; 0 for the backbone's own")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn")
    arguments = parser.parse_args()
    tensorflow_setup.setup(0)
    for name in arguments.backbone or ["efficientnet_lite0"]:
        measure(name, Files(arguments.folder), arguments.size, arguments.seconds)


def measure(name: str, files: Files, size: int, seconds: float) -> None:
    import tensorflow as tf

    from kubegraft.modeling.backbones import get_backbone
    from kubegraft.modeling.engines import FrozenGraph
    from kubegraft.modeling.engines.keras_forward import KerasForward
    from kubegraft.modeling.engines.litert import LiteRtForward, convert
    from kubegraft.training.batches import epoch_batches
    from kubegraft.training.features import engine_rows, in_order
    from kubegraft.training.sources import ImageSource

    backbone = get_backbone(name)
    size = size or backbone.native_input_size
    core = backbone.build(size, "imagenet" if name == "efficientnet_lite0" else "none")
    graph = FrozenGraph(lambda images: tf.reduce_mean(core(images, training=False), (1, 2)), size)
    start = time.perf_counter()
    engine = LiteRtForward(convert(graph), size)
    print(
        f"{name} at {size} pixels, {usable_processors()} processors; "
        f"LiteRT ready in {time.perf_counter() - start:.1f} s"
    )
    source = ImageSource(files, size)  # type: ignore[arg-type]
    batches = epoch_batches(files.labels, batch_size=engine.batch_size, seed=0, epoch=0, shuffle=False)

    def inputs() -> Any:
        return source.inputs(batches, slice(0, None), slice(None), engine.batch_size).as_numpy_iterator()

    ready = list(islice(inputs(), 4))
    constants = KerasForward(graph)
    constants.freeze(ready[0])
    ways: dict[str, Callable[[], Iterator[np.ndarray]]] = {
        "keras": lambda: map(KerasForward(graph).forward, cycle(ready)),
        "constants": lambda: map(constants.forward, cycle(ready)),
        "engine": lambda: in_order(engine.forward, cycle(ready), engine.num_workers),
        "decode": inputs,
        "pipeline": lambda: engine_rows(engine, source, batches),
    }
    wall, processor = best_rates(ways, seconds)
    for way in ways:
        print(
            f"  {way:10} {wall[way]:8.1f} images/s  {wall[way] / wall['keras']:5.2f} x keras  "
            f"{wall[way] / wall['engine']:5.2f} x engine   cpu {processor[way]:8.1f} images/s  "
            f"{processor[way] / processor['engine']:5.2f} x engine"
        )


def best_rates(
    ways: dict[str, Callable[[], Iterator[np.ndarray]]], seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return images a second of each way's best turn, by wall and by processor time."""
    wall, processor = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):
        for way, begin in ways.items():
            running = begin()
            next(running)  # threads, buffers, memory
            count, start, used = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - start < seconds:
                rows = next(running, None)
                if rows is None:
                    running = begin()
                    continue
                count += len(rows)
            wall[way] = max(wall[way], count / (time.perf_counter() - start))
            used = (time.process_time() - used) / usable_processors()
            processor[way] = max(processor[way], count / used)
            if hasattr(running, "close"):
                running.close()
    return wall, processor


if __name__ == "__main__":
    main()

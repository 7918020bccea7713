"""What a frozen network makes of a split, pooled features or boundary activations: paid once per image and stage."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorflow as tf

from kubegraft.errors import EnvironmentFault, Interrupted
from kubegraft.processes import stop_requested, stopping_gracefully
from kubegraft.reporting.progress import Progress
from kubegraft.stage import write_atomically
from kubegraft.training.batches import epoch_batches
from kubegraft.training.sources import Source

_SAVE_SECONDS: Final = 5.0


def extract_features(
    strategy: Any,
    forward: Callable[[Any], Any],
    source: Source,
    *,
    dim: int,
    batch_size: int,
    directory: Path,
    split: str,
) -> np.ndarray:
    """Return the features of every example of a split, computed once and kept in `directory`.

    What an interrupted call had computed is kept and gone on from.

    Args:
        strategy: A `tf.distribute` strategy; the batch is split over its replicas.
        forward: Inputs `float32[batch, ...]` -> features `float32[batch, dim]`.
        source: Inputs, in the order of the split.
        dim: Length of a feature vector.
        batch_size: Global batch size; a multiple of the number of replicas.
        directory: Where the features are kept.
        split: Name of the split.

    Returns:
        `float32[num_examples, dim]`, memory-mapped and read-only.
    """
    path = directory / f"{split}-features.npy"
    return extract_rows(strategy, forward, source, row_length=dim, batch_size=batch_size, path=path)


def extract_rows(
    strategy: Any,
    forward: Callable[[Any], Any],
    source: Source,
    *,
    row_length: int,
    batch_size: int,
    path: Path,
    dtype: str = "float32",
    phase: str = "features",
) -> np.ndarray:
    """Return a row of numbers for every example of a source, computed once and kept in the file `path`.

    What an interrupted call had computed is kept and gone on from. Memory does not grow with the number of
    examples.

    Args:
        strategy: A `tf.distribute` strategy; the batch is split over its replicas.
        forward: Inputs `float32[batch, ...]` -> rows `[batch, row_length]`.
        source: Inputs, in order.
        row_length: Numbers in a row.
        batch_size: Global batch size; a multiple of the number of replicas.
        path: Name of a `.npy` file; how much of it is done is kept beside it.
        dtype: `float32`, `float16` or `bfloat16` (whose bits are kept as uint16, since numpy lacks it).
        phase: What progress and messages call it.

    Returns:
        `[num_examples, row_length]`, memory-mapped and read-only.

    Raises:
        Interrupted: If the process was asked to stop; what was computed is kept.
    """
    num_examples = len(source.labels)
    done_path = path.with_suffix(".done")
    num_done = int(done_path.read_text()) if done_path.exists() else 0
    done_steps = num_done // batch_size if num_done < num_examples else -(-num_examples // batch_size)
    if not num_done:
        _reserve(path, (num_examples, row_length), stored_dtype(dtype))
    features = np.load(path, mmap_mode="r+")
    batches = epoch_batches(source.labels, batch_size=batch_size, seed=0, epoch=0, shuffle=False)
    compute = _compiled(strategy, forward, dtype)
    saved = time.monotonic()
    with stopping_gracefully(), Progress(phase, total=num_examples, unit="images") as progress:
        progress.resume(min(done_steps * batch_size, num_examples))
        progress.update(0, file=path.stem)
        for step, batch in enumerate(
            _distribute(strategy, source, batches, batch_size, done_steps), done_steps
        ):
            start = step * batch_size
            rows = features[start : start + batch_size]
            rows[:] = compute(batch).numpy()[: len(rows)].view(features.dtype)
            progress.update(len(rows))
            stopping = stop_requested()
            if stopping or time.monotonic() - saved > _SAVE_SECONDS or step + 1 == batches.num_steps:
                _save(features, path, done_path, start + len(rows))
                saved = time.monotonic()
            if stopping:
                raise Interrupted(
                    f"`{phase}` was asked to stop (SIGTERM) and kept {start + len(rows)} of {num_examples} rows. "
                    "Start it again with the same arguments to go on."
                )
    kept: np.ndarray = np.load(path, mmap_mode="r")
    return kept


def stored_dtype(dtype: str) -> Any:
    """Return the numpy dtype in which rows of a Keras dtype are kept."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def _reserve(path: Path, shape: tuple[int, int], dtype: Any) -> None:
    """Make the file, with its space on disk: writing to a mapped hole on a full disk would end the process."""
    np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink()
        raise EnvironmentFault(
            f"`{path.name}` needs {size:,} bytes of disk. Received: {error.strerror} at {str(path.parent)!r}. "
            "Make room, or put the work directory elsewhere."
        ) from error


def _save(features: np.memmap, path: Path, done_path: Path, num_done: int) -> None:
    """Make sure the features are on disk before the count that says so is."""
    features.flush()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    write_atomically(done_path, str(num_done))


def _distribute(strategy: Any, source: Source, batches: Any, batch_size: int, start_step: int) -> Any:
    if start_step >= batches.num_steps:
        return ()
    per_replica = batch_size // strategy.num_replicas_in_sync
    return strategy.distribute_datasets_from_function(
        lambda _: source.inputs(batches, slice(start_step, None), slice(None), per_replica)
    )


def _compiled(strategy: Any, forward: Callable[[Any], Any], dtype: str) -> Callable[[Any], Any]:
    def compute(batch: Any) -> Any:
        per_replica = strategy.run(forward, args=(batch,))
        return tf.concat(
            [tf.cast(part, dtype) for part in strategy.experimental_local_results(per_replica)], 0
        )

    compiled: Callable[[Any], Any] = tf.function(compute)
    return compiled

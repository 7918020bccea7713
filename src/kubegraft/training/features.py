"""What a frozen network makes of a split, pooled features or boundary activations: paid once per image and stage."""

from __future__ import annotations

import collections
import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import tensorflow as tf

from kubegraft.errors import EnvironmentFault, Interrupted
from kubegraft.modeling.engines import Forward, FrozenForward, choose_engine
from kubegraft.processes import stop_requested, stopping_gracefully
from kubegraft.reporting.events import log_event
from kubegraft.reporting.progress import Progress
from kubegraft.stage import write_atomically
from kubegraft.training.batches import EpochBatches, epoch_batches
from kubegraft.training.sources import Source

# Images that a replica computes together. Always as many: TensorFlow's last bits depend on the shape of a
# batch, but not on what else is in it, so that a row is the same whenever and with whatever it is computed.
BATCH_SIZE: Final = 32
_SAVE_SECONDS: Final = 5.0
# Real images to prove an engine with, and to time it.
_NUM_SAMPLES: Final = 8
_READ_BYTES: Final = 16 * 2**20


class KnownRows(Protocol):
    """Rows that earlier stages computed, for `extract_rows`; see `frozen_pass`."""

    def first_of_each(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the numbers of all examples but repetitions, of those, and for each of these what it repeats."""

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows `[n, row_length]` of examples, and which of them were there, `bool[n]`."""

    def keeping(self, num_missing: int) -> contextlib.AbstractContextManager[Callable[..., None]]:
        """Return a context whose value takes numbers and rows of examples that were computed."""


def frozen_forward(
    strategy: Any, forward: Forward, source: Source, input_size: int, identity: str = ""
) -> FrozenForward | Forward:
    """Return how a frozen pass is best computed on this machine.

    Args:
        strategy: A `tf.distribute` strategy.
        forward: Images `float32[batch, size, size, 3]` to rows `[batch, row_length]`.
        source: Images; the first few prove that an engine answers like Keras, where that is not known yet.
        input_size: Side of the images in pixels.
        identity: Digest of what `forward` computes; see `FrozenGraph`.

    Returns:
        An engine for a CPU; `forward` itself for GPUs or several replicas, where TensorFlow computes it.
    """
    if strategy.num_replicas_in_sync > 1 or tf.config.list_logical_devices("GPU"):
        log_event("engine", "tensorflow", reason=f"{strategy.num_replicas_in_sync} GPU or other replicas")
        return forward

    def samples() -> np.ndarray:
        count = min(_NUM_SAMPLES, len(source.labels))
        batches = epoch_batches(source.labels[:count], batch_size=count, seed=0, epoch=0, shuffle=False)
        images: np.ndarray = next(iter(source.inputs(batches, slice(0, 1), slice(None), count))).numpy()
        return images

    return choose_engine(forward, samples, input_size, identity=identity)


def extract_rows(
    strategy: Any,
    forward: FrozenForward | Callable[[Any], Any],
    source: Source,
    *,
    row_length: int,
    path: Path,
    dtype: str = "float32",
    phase: str = "features",
    known: KnownRows | None = None,
) -> np.ndarray:
    """Return a row of numbers for every example of a source, computed once and kept in the file `path`.

    Inputs are read, decoded and resized while earlier ones are computed. What an interrupted call had computed is
    kept and gone on from, by the same engine; another one starts anew. Memory does not grow with the number of
    examples.

    Args:
        strategy: A `tf.distribute` strategy; what is no engine runs on its replicas.
        forward: What `frozen_forward` returned, or a function of inputs `float32[batch, ...]`.
        source: Inputs, in order.
        row_length: Numbers in a row.
        path: Name of a `.npy` file, to which an engine's digest is added; which rows are done is kept beside it.
        dtype: `float32`, `float16` or `bfloat16` (whose bits are kept as uint16, since numpy lacks it).
        phase: What progress and messages call it.
        known: Rows that need not be computed, and where those that are go.

    Returns:
        `[num_examples, row_length]`, memory-mapped and read-only.

    Raises:
        EnvironmentFault: If the disk has no room for them.
        Interrupted: If the process was asked to stop; what was computed is kept.
    """
    engine: Any = forward if hasattr(forward, "digest") else None
    if engine:
        path = path.with_name(f"{path.stem}-{engine.digest[:16]}.npy")
    file = _RowFile(path, (len(source.labels), row_length), dtype)
    with stopping_gracefully(), Progress(phase, total=file.num_rows, unit="images") as progress:
        progress.resume(int(file.done.sum()))
        progress.update(0, file=path.stem)
        if not file.done.all():
            wanted, repeated, origin = (
                known.first_of_each() if known else (np.arange(file.num_rows), np.arange(0), np.arange(0))
            )
            if known:
                _take_known(known, wanted[~file.done[wanted]], file, progress, phase)
            missing = wanted[~file.done[wanted]]
            batch_size = engine.batch_size if engine else BATCH_SIZE * strategy.num_replicas_in_sync
            computed = (_by_engine if engine else _on_replicas)(
                strategy, forward, source, _full_batches(missing, batch_size), dtype
            )
            keeping = known.keeping(len(missing)) if known else contextlib.nullcontext(None)
            with keeping as keep, contextlib.closing(computed):
                for step, rows in enumerate(computed):
                    part = missing[step * batch_size : (step + 1) * batch_size]
                    file.put(part, rows[: len(part)])
                    if keep:
                        keep(part, file.rows[part])
                    progress.update(len(part))
                    _go_on(file, phase)
            for start in range(0, len(repeated), file.rows_at_once):
                part = slice(start, start + file.rows_at_once)
                file.put(repeated[part], file.rows[origin[part]])
            file.save()
    return file.finished()


def stored_dtype(dtype: str) -> Any:
    """Return the numpy dtype in which rows of a Keras dtype are kept."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


class _RowFile:
    """Rows in a mapped file, and in a file beside it which of them are done, a bit each."""

    def __init__(self, path: Path, shape: tuple[int, int], dtype: str) -> None:
        self._path, self._done_path = path, path.with_suffix(".done")
        self.num_rows, row_length = shape
        self._saved = time.monotonic()
        size = -(-self.num_rows // 8)
        bits = self._done_path.read_bytes() if self._done_path.exists() and path.exists() else b""
        if len(bits) != size:
            _reserve(path, shape, stored_dtype(dtype))
            bits = bytes(size)
        self.done = np.unpackbits(np.frombuffer(bits, np.uint8), count=self.num_rows).astype(bool)
        self.rows: Any = np.load(path, mmap_mode="r+")
        self.rows_at_once = max(_READ_BYTES // (row_length * self.rows.dtype.itemsize), 1)

    def put(self, numbers: np.ndarray, rows: np.ndarray) -> None:
        self.rows[numbers] = rows.view(self.rows.dtype)
        self.done[numbers] = True

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._saved > _SAVE_SECONDS or bool(self.done.all())

    def save(self) -> None:
        """Make sure the rows are on disk before the bits that say so are."""
        self.rows.flush()
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        write_atomically(self._done_path, np.packbits(self.done).tobytes())
        self._saved = time.monotonic()

    def finished(self) -> np.ndarray:
        rows: np.ndarray = np.load(self._path, mmap_mode="r")
        return rows


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


def _take_known(known: KnownRows, wanted: np.ndarray, file: _RowFile, progress: Progress, phase: str) -> None:
    """Fill in the rows that are known."""
    for start in range(0, len(wanted), file.rows_at_once):
        part = wanted[start : start + file.rows_at_once]
        rows, found = known.read(part)
        if found.any():
            file.put(part[found], rows[found])
            progress.update(int(found.sum()))
            _go_on(file, phase)


def _go_on(file: _RowFile, phase: str) -> None:
    """Save what is due; save and raise Interrupted if the process was asked to stop."""
    stopping = stop_requested()
    if stopping or file.is_due:
        file.save()
    if stopping:
        raise Interrupted(
            f"`{phase}` was asked to stop (SIGTERM) and kept {int(file.done.sum())} of {file.num_rows} rows. "
            "Start it again with the same arguments to go on."
        )


def _full_batches(numbers: np.ndarray, batch_size: int) -> EpochBatches:
    """Return batches of these examples as they are, the last one filled up with -1."""
    num_steps = -(-len(numbers) // batch_size)
    flat = np.full(num_steps * batch_size, -1, np.int64)
    flat[: len(numbers)] = numbers
    index = flat.reshape(num_steps, batch_size)
    ones = np.ones(index.shape, np.float32)
    position = np.broadcast_to(np.arange(batch_size, dtype=np.int32), index.shape)
    key = np.zeros(index.shape, np.int32)
    return EpochBatches(index, index, share=ones, weight=ones, real=ones, position=position, key=key)


def in_order(forward: FrozenForward, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the rows of batches in their order, computed by the engine's workers while later ones are decoded.

    At most two batches more than there are workers are held at a time.

    Args:
        forward: The engine.
        batches: `float32[batch, size, size, 3]` each; where they come from works in threads of its own.
    """
    waiting: collections.deque[Future[np.ndarray]] = collections.deque()
    with ThreadPoolExecutor(forward.num_workers, thread_name_prefix="engine") as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(forward.forward, batch))
                if len(waiting) > forward.num_workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _by_engine(
    _: Any, forward: Any, source: Source, batches: EpochBatches, dtype: str
) -> Generator[np.ndarray, None, None]:
    if not batches.num_steps:
        return
    inputs = source.inputs(batches, slice(None), slice(None), batches.index.shape[1])
    for rows in in_order(forward, inputs.as_numpy_iterator()):
        yield rows if dtype == "float32" else tf.cast(rows, dtype).numpy()


def _on_replicas(
    strategy: Any, forward: Any, source: Source, batches: EpochBatches, dtype: str
) -> Generator[np.ndarray, None, None]:
    if not batches.num_steps:
        return
    compute = _compiled(strategy, forward, dtype)
    per_replica = batches.index.shape[1] // strategy.num_replicas_in_sync
    for batch in strategy.distribute_datasets_from_function(
        lambda _: source.inputs(batches, slice(None), slice(None), per_replica)
    ):
        yield compute(batch).numpy()


def _compiled(strategy: Any, forward: Callable[[Any], Any], dtype: str) -> Callable[[Any], Any]:
    def compute(batch: Any) -> Any:
        per_replica = strategy.run(forward, args=(batch,))
        return tf.concat(
            [tf.cast(part, dtype) for part in strategy.experimental_local_results(per_replica)], 0
        )

    compiled: Callable[[Any], Any] = tf.function(compute)
    return compiled

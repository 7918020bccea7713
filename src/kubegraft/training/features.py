"""What a frozen network makes of a split, pooled features or boundary activations: paid once per image and stage."""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import tensorflow as tf

from kubegraft.errors import Interrupted
from kubegraft.modeling.engines import IMAGES_AT_ONCE, Forward, FrozenForward, choose_engine
from kubegraft.processes import stop_requested, stopping_gracefully
from kubegraft.processors import usable_processors
from kubegraft.reporting.events import log_event
from kubegraft.reporting.progress import Progress
from kubegraft.stage import await_file
from kubegraft.training.batches import EpochBatches, epoch_batches
from kubegraft.training.distribution import num_local_replicas, workers_of
from kubegraft.training.row_file import RowFile, is_whole, read_rows
from kubegraft.training.sources import FixedSource
from kubegraft.training.starvation import WatchedInput
from kubegraft.training.workers import Workers

# Images that a replica computes together. Always as many: TensorFlow's last bits depend on the shape of a
# batch, but not on what else is in it, so that a row is the same whenever and with whatever it is computed.
BATCH_SIZE: Final = 32
# Real images to prove an engine with, and to time it.
_NUM_SAMPLES: Final = 8


class KnownRows(Protocol):
    """Rows that earlier stages computed, for `extract_rows`; see `frozen_pass`."""

    def first_of_each(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the numbers of all examples but repetitions, of those, and for each of these what it repeats."""

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows `[n, row_length]` of examples, and which of them were there, `bool[n]`."""

    def keeping(self, num_missing: int) -> contextlib.AbstractContextManager[Callable[..., None]]:
        """Return a context whose value takes numbers and rows of examples that were computed.

        And what came with each row, `[n, 0]` where nothing does.
        """


def frozen_forward(
    strategy: Any,
    forward: Forward,
    source: FixedSource,
    input_size: int,
    identity: str = "",
    groups: Sequence[int] = (),
    *,
    undisturbed: bool = True,
) -> FrozenForward | Forward:
    """Return how a frozen pass is best computed on this machine.

    Args:
        strategy: A `tf.distribute` strategy.
        forward: Images `float32[batch, size, size, 3]` to rows `[batch, row_length]`.
        source: Images; the first few prove that an engine answers like Keras, where that is not known yet.
        input_size: Side of the images in pixels.
        identity: Digest of what `forward` computes; see `FrozenGraph`.
        groups: See `choose_engine`.
        undisturbed: See `choose_engine`.

    Returns:
        An engine for a CPU; `forward` itself for GPUs or several replicas, where TensorFlow computes it.
    """
    num_replicas, workers = num_local_replicas(strategy), workers_of(strategy)
    if num_replicas > 1 or tf.config.list_logical_devices("GPU"):
        log_event("engine", "tensorflow", reason=f"{num_replicas} GPU or other replicas")
        return forward

    def samples() -> np.ndarray:
        count = min(_NUM_SAMPLES, len(source.labels))
        if source.can_write:
            written = np.zeros((count, *source.shape), np.float32)
            for number, target in enumerate(written):
                source.write(target, number)
            return written
        batches = epoch_batches(source.labels[:count], batch_size=count, seed=0, epoch=0, shuffle=False)
        images: np.ndarray = next(iter(source.inputs(batches, slice(0, 1), slice(None), count))).numpy()
        return images

    found = choose_engine(
        forward, samples, input_size, identity=identity, groups=groups, undisturbed=undisturbed
    )
    chosen = workers.share(found.name)  # a matter of timing; rows that train together come from one engine
    if found.name == chosen:
        return found
    return choose_engine(forward, samples, input_size, identity=identity, groups=groups, engine=chosen)


def extract_rows(
    strategy: Any,
    forward: FrozenForward | Callable[[Any], Any],
    source: FixedSource,
    *,
    row_length: int,
    path: Path,
    dtype: str = "float32",
    phase: str = "features",
    known: KnownRows | None = None,
) -> np.ndarray:
    """Return a row of numbers for every example of a source, computed once and kept in the file `path`.

    Inputs are read, decoded and resized beside the computing of others; see `engine_rows`. What an interrupted call
    had computed is kept and gone on from, by the same engine; another one starts anew. Memory does not grow with the
    number of examples. Several workers compute a share each, and all read the file that the chief puts together.

    Args:
        strategy: A `tf.distribute` strategy; what is no engine runs on its replicas.
        forward: What `frozen_forward` returned, or a function of inputs `float32[batch, ...]`.
        source: Inputs, in order.
        row_length: Numbers in a row. What `forward` returns beyond them goes to `known`.
        path: Name of a `.npy` file, to which an engine's digest is added; which rows are done is kept beside it. All
            workers see it.
        dtype: `float32`, `float16` or `bfloat16` (whose bits are kept as uint16, since numpy lacks it).
        phase: What progress and messages call it.
        known: Rows that need not be computed, and where those that are go.

    Returns:
        `[num_examples, row_length]`, memory-mapped and read-only.

    Raises:
        EnvironmentFault: If the disk has no room for them.
        Interrupted: If the process was asked to stop; what was computed is kept.
        PeerLost: If another worker can't be reached any more.
    """
    workers = workers_of(strategy)
    digest = workers.share(getattr(forward, "digest", ""))
    if digest:
        path = path.with_name(f"{path.stem}-{digest[:16]}.npy")
    shape = (len(source.labels), row_length)
    if not workers.share(is_whole(path, shape[0])):
        frozen_pass = _Pass(strategy, forward, source, dtype, phase, known)
        fill = _fill_alone if workers.alone else functools.partial(_fill_together, workers=workers)
        fill(frozen_pass, path, shape)
    await_file(path)
    return read_rows(path)


def recall_rows(
    known: KnownRows, *, shape: tuple[int, int], path: Path, dtype: str = "float32", phase: str = "features"
) -> np.ndarray | None:
    """Return the rows of all examples as they are known, kept in the file `path`; None where one turns out to be lost.

    For what `extract_rows` would do without computing anything: no engine has to be made for it.

    Args:
        known: Where the rows are.
        shape: Number of examples, and numbers in a row.
        path: Name of a `.npy` file.
        dtype: As in `extract_rows`.
        phase: As in `extract_rows`.

    Raises:
        EnvironmentFault: If the disk has no room for them.
        Interrupted: If the process was asked to stop; what was read is kept.
    """
    if not is_whole(path, shape[0]):
        file = RowFile(path, shape, dtype)
        wanted, repeated, origin = known.first_of_each()
        with stopping_gracefully(), Progress(phase, total=file.num_rows, unit="images") as progress:
            progress.resume(int(file.done.sum()))
            _take_known(known, file, wanted, wanted, progress, phase)
        if not file.done[wanted].all():
            file.remove()
            return None
        file.repeat(repeated, origin)
        file.save()
    return read_rows(path)


def _fill_alone(frozen_pass: _Pass, path: Path, shape: tuple[int, int]) -> None:
    file = RowFile(path, shape, frozen_pass.dtype)
    wanted, repeated, origin = frozen_pass.first_of_each()
    frozen_pass.fill(file, wanted, wanted)
    file.repeat(repeated, origin)
    file.save()


def _fill_together(frozen_pass: _Pass, path: Path, shape: tuple[int, int], workers: Workers) -> None:
    """Compute this worker's share into a file of its own; the chief puts all shares into one."""
    wanted, repeated, origin = frozen_pass.first_of_each()
    shares = np.array_split(wanted, workers.num_workers)
    parts = [path.with_name(f"{path.stem}.{n}-of-{len(shares)}.npy") for n in range(len(shares))]
    own = shares[workers.index]
    if len(own):
        file = RowFile(parts[workers.index], (len(own), shape[1]), frozen_pass.dtype)
        frozen_pass.fill(file, np.arange(len(own)), own)
        file.save()
    workers.barrier()
    if workers.is_chief:
        whole = RowFile(path, shape, frozen_pass.dtype)
        for share, part in zip(shares, parts, strict=True):
            _copy_share(whole, share, part)
        whole.repeat(repeated, origin)
        whole.save()
        for part in parts:
            part.unlink(missing_ok=True)
            part.with_suffix(".done").unlink(missing_ok=True)
    workers.barrier()


def _copy_share(whole: RowFile, share: np.ndarray, part: Path) -> None:
    if not len(share):
        return
    await_file(part)
    rows = read_rows(part)
    for start in range(0, len(share), whole.rows_at_once):
        chosen = slice(start, start + whole.rows_at_once)
        whole.put(share[chosen], rows[chosen])


@dataclass(frozen=True, slots=True)
class _Pass:
    """What is computed from what; see `extract_rows`."""

    strategy: Any
    forward: Any
    source: FixedSource
    dtype: str
    phase: str
    known: KnownRows | None

    def first_of_each(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return which examples to compute, and which others repeat which of them."""
        if self.known:
            return self.known.first_of_each()
        return np.arange(len(self.source.labels)), np.arange(0), np.arange(0)

    def fill(self, file: RowFile, places: np.ndarray, numbers: np.ndarray) -> None:
        """Write the rows of examples that the file lacks, known or computed.

        Args:
            file: Where to.
            places: Rows of the file.
            numbers: Numbers of the examples that belong there.
        """
        with stopping_gracefully(), Progress(self.phase, total=file.num_rows, unit="images") as progress:
            progress.resume(int(file.done.sum()))
            progress.update(0, file=file.name)
            if self.known:
                _take_known(self.known, file, places, numbers, progress, self.phase)
            missing = ~file.done[places]
            self._compute(file, places[missing], numbers[missing], progress)

    def _compute(self, file: RowFile, places: np.ndarray, numbers: np.ndarray, progress: Progress) -> None:
        engine = self.forward if hasattr(self.forward, "digest") else None
        batch_size = BATCH_SIZE * num_local_replicas(self.strategy)
        if engine:
            batch_size = _fair_batch_size(engine, len(numbers))
        computed = (_by_engine if engine else _on_replicas)(
            self.strategy, self.forward, self.source, _full_batches(numbers, batch_size), self.dtype
        )
        keeping = self.known.keeping(len(numbers)) if self.known else contextlib.nullcontext(None)
        with keeping as keep, contextlib.closing(computed):
            for step, rows in enumerate(computed):
                part = slice(step * batch_size, (step + 1) * batch_size)
                here = places[part]
                row_length = file.rows.shape[1]
                file.put(here, rows[: len(here), :row_length])
                if keep:
                    keep(numbers[part], file.rows[here], rows[: len(here), row_length:])
                progress.update(len(here))
                _go_on(file, self.phase)


def _take_known(
    known: KnownRows, file: RowFile, places: np.ndarray, numbers: np.ndarray, progress: Progress, phase: str
) -> None:
    """Fill in the rows that the file lacks and that are known."""
    missing = ~file.done[places]
    places, numbers = places[missing], numbers[missing]
    for start in range(0, len(places), file.rows_at_once):
        part = slice(start, start + file.rows_at_once)
        rows, found = known.read(numbers[part])
        if found.any():
            file.put(places[part][found], rows[found])
            progress.update(int(found.sum()))
            _go_on(file, phase)


def _go_on(file: RowFile, phase: str) -> None:
    """Save what is due; save and raise Interrupted if the process was asked to stop."""
    stopping = stop_requested()
    if stopping or file.is_due:
        file.save()
    if stopping:
        raise Interrupted(
            f"`{phase}` was asked to stop (SIGTERM) and kept {int(file.done.sum())} of {file.num_rows} rows. "
            "Start it again with the same arguments to go on."
        )


def _fair_batch_size(engine: FrozenForward, num_images: int) -> int:
    """Return how many images to hand over at once, so that a few are not all one worker's."""
    if engine.num_workers == 1:
        return engine.batch_size
    share = -(-num_images // engine.num_workers)
    return min(engine.batch_size, max(IMAGES_AT_ONCE, -(-share // IMAGES_AT_ONCE) * IMAGES_AT_ONCE))


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


def in_order(
    compute: Callable[[Any], np.ndarray], batches: Iterable[Any], num_workers: int
) -> Iterator[np.ndarray]:
    """Yield what is computed of batches, in their order, by so many threads.

    At most two batches more than there are workers are held at a time.

    Args:
        compute: Makes rows of a batch; called from several threads.
        batches: What they are called with; where they come from may work in threads of its own.
        num_workers: Number of threads.
    """
    waiting: collections.deque[Future[np.ndarray]] = collections.deque()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="engine") as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(compute, batch))
                if len(waiting) > num_workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def engine_rows(forward: FrozenForward, source: FixedSource, batches: EpochBatches) -> Iterator[np.ndarray]:
    """Yield the rows of batches of examples as they are, in their order.

    Where an engine's workers occupy every processor, each makes the inputs of its batch itself, all of them before it
    computes: processors are quickest at what they have just done. Otherwise `tf.data` makes inputs beside, also where
    a source can't write them.

    Args:
        forward: The engine.
        source: The examples.
        batches: Which ones; what the row of -1 is does not matter.
    """
    if source.can_write and forward.num_workers >= usable_processors():
        of_thread = threading.local()  # fresh memory costs as much as to fill it

        def compute(numbers: np.ndarray) -> np.ndarray:
            if not hasattr(of_thread, "inputs"):
                of_thread.inputs = np.zeros((len(numbers), *source.shape), np.float32)
            for target, number in zip(of_thread.inputs, numbers.tolist(), strict=True):
                if number >= 0:
                    source.write(target, number)
            return forward.forward(of_thread.inputs)

        yield from in_order(compute, batches.index, forward.num_workers)
    elif batches.num_steps:
        inputs = source.inputs(batches, slice(None), slice(None), batches.index.shape[1])
        yield from in_order(forward.forward, inputs.as_numpy_iterator(), forward.num_workers)


def _by_engine(
    _: Any, forward: Any, source: FixedSource, batches: EpochBatches, dtype: str
) -> Generator[np.ndarray, None, None]:
    for rows in engine_rows(forward, source, batches):
        yield rows if dtype == "float32" else tf.cast(rows, dtype).numpy()


def _on_replicas(
    strategy: Any, forward: Any, source: FixedSource, batches: EpochBatches, dtype: str
) -> Generator[np.ndarray, None, None]:
    if not batches.num_steps:
        return
    compute = _compiled(strategy, forward, dtype)
    per_replica = batches.index.shape[1] // num_local_replicas(strategy)
    inputs = strategy.distribute_datasets_from_function(
        lambda _: source.inputs(batches, slice(None), slice(None), per_replica)
    )
    for batch in WatchedInput(once=True).watch(inputs):
        yield compute(batch).numpy()


def _compiled(strategy: Any, forward: Callable[[Any], Any], dtype: str) -> Callable[[Any], Any]:
    def compute(batch: Any) -> Any:
        per_replica = strategy.run(forward, args=(batch,))
        return tf.concat(
            [tf.cast(part, dtype) for part in strategy.experimental_local_results(per_replica)], 0
        )

    compiled: Callable[[Any], Any] = tf.function(compute, autograph=False)
    return compiled

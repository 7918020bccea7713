"""Which engine runs a frozen graph on this machine: proved equal first, then timed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import tensorflow as tf

from kubegraft.errors import ConfigError, suggestion
from kubegraft.modeling.engines.interface import (
    IMAGES_AT_ONCE,
    TOLERANCE,
    Forward,
    FrozenForward,
    FrozenGraph,
    relative_difference,
)
from kubegraft.modeling.engines.keras_forward import KerasForward
from kubegraft.modeling.engines.litert import LiteRtForward, convert
from kubegraft.modeling.engines.verdicts import Verdict, Verdicts
from kubegraft.reporting.events import log_event

ENGINE_VARIABLE: Final = "KUBEGRAFT_ENGINE"
ENGINES: Final = ("auto", "litert", "keras")
_TRIAL_ROUNDS: Final = 3
# Near parity timing is a coin's throw, and engines differ in the last bits; so only a clear loss counts.
_LEAST_RATIO: Final = 0.9
# So far from parity one round is enough: three would take as long as a hundred images.
_CLEAR_RATIO: Final = 1.5
_LARGEST_FLATBUFFER_BYTES: Final = 2**31 - 2**20
_NUM_NOISE_IMAGES: Final = 4


def choose_engine(
    forward: Forward,
    images: Callable[[], np.ndarray],
    input_size: int,
    *,
    identity: str = "",
    groups: Sequence[int] = (),
    engine: str = "",
    verdicts: Verdicts | None = None,
    undisturbed: bool = True,
) -> FrozenForward:
    """Return the engine for a frozen graph on this machine's processors, and say which and why.

    LiteRT, if it converts the graph, answers `images` like Keras within `TOLERANCE`, and is not slower than
    Keras by more than a tenth. Keras otherwise. What was found is kept for the next process.

    Args:
        forward: Images `float32[batch, size, size, 3]` in [0, 255] to rows `[batch, row_length]`, inference
            mode. Its variables must not change while the engine is used.
        images: Returns a few images to prove and time it with, `float32[num_images, input_size, input_size, 3]`.
            Not called where the answer is known, so that a run that finds all rows in a cache decodes none.
        input_size: Side of the images in pixels.
        identity: Digest of what `forward` computes; see `FrozenGraph`.
        groups: How many numbers of a row stand together, in order; each group is compared by itself, since groups may
            differ in scale. Empty where all are one.
        engine: `auto`, or `litert` or `keras` to insist; "" for `$KUBEGRAFT_ENGINE`, or `auto` without it.
            Who insists on LiteRT still gets Keras where LiteRT can't run or differs.
        verdicts: Where findings are kept; this user's cache directory by default.
        undisturbed: Whether a trial says what it would say at any time. Else one that LiteRT loses is not kept.

    Raises:
        ConfigError: If there is no such engine.
    """
    wanted = _checked(engine or os.environ.get(ENGINE_VARIABLE) or "auto")
    graph = FrozenGraph(forward, input_size, identity)
    if wanted == "keras":
        return _keras(graph, "asked for")
    verdicts = verdicts or Verdicts()
    with verdicts.deciding(_key(graph.digest)) if wanted == "auto" else contextlib.nullcontext():
        if wanted == "auto" and (known := _known(graph, verdicts)):
            return known
        if graph.num_bytes > _LARGEST_FLATBUFFER_BYTES:
            return _keras(graph, "the weights are larger than the 2 GiB that LiteRT's format holds")
        return _Trial(graph, wanted, verdicts, groups, undisturbed).engine(images())


def recallable(identity: str, verdicts: Verdicts | None = None) -> tuple[str, ...]:
    """Return the names of the engines whose rows may be taken from where they were kept, the preferred one first.

    Where it is known which one this machine takes, only that: rows of one run come from one engine, whoever
    filled the cache.

    Args:
        identity: As in `choose_engine`.
        verdicts: As in `choose_engine`.

    Raises:
        ConfigError: If `$KUBEGRAFT_ENGINE` names none.
    """
    wanted = _checked(os.environ.get(ENGINE_VARIABLE) or "auto")
    if wanted == "auto":
        wanted = (verdicts or Verdicts()).engine(_key(identity))
    return (wanted,) if wanted else ENGINES[1:]


def _checked(engine: str) -> str:
    if engine not in ENGINES:
        raise ConfigError(
            f"`{ENGINE_VARIABLE}` must be one of {', '.join(map(repr, ENGINES))}. Received: "
            f"{ENGINE_VARIABLE}={engine!r}.{suggestion(engine, ENGINES)} 'auto' is right for most."
        )
    return engine


def _known(graph: FrozenGraph, verdicts: Verdicts) -> FrozenForward | None:
    found = verdicts.find(_key(graph.digest))
    if found is None:
        return None
    verdict, flatbuffer = found
    if verdict.engine == "keras":
        return _keras(graph, verdict.reason)
    try:
        made = LiteRtForward(flatbuffer, graph.input_size)
    except (ValueError, RuntimeError):
        return None
    log_event("engine", "litert", reason=f"{verdict.reason} (found before)", workers=made.num_workers)
    return made


@dataclass(frozen=True, slots=True)
class _Trial:
    """What `choose_engine` was asked, where nothing is known yet."""

    graph: FrozenGraph
    wanted: str
    verdicts: Verdicts
    groups: Sequence[int]
    undisturbed: bool

    def engine(self, images: np.ndarray) -> FrozenForward:
        """Return the engine that the images and the clock prefer, and keep the verdict."""
        keras = KerasForward(self.graph)
        try:
            # TensorFlow prepares its first call in native code while the converter is busy in Python.
            with ThreadPoolExecutor(1) as pool:
                answers = pool.submit(keras.forward, images)
                flatbuffer = convert(self.graph)
            litert = LiteRtForward(flatbuffer, self.graph.input_size)
            rows = litert.forward(images)
        # A converter raises anything for a graph it does not know, and an interpreter for an operation that it finds it
        # can't run. Being without them costs speed, never a result.
        except Exception as error:
            said = str(error).strip().partition(chr(10))[0][:200]
            lasting = not isinstance(error, (OSError, MemoryError))
            return self._lost(f"LiteRT can't run it: {type(error).__name__}: {said}", lasting=lasting)
        difference = self._difference(rows, answers.result())
        if not difference <= TOLERANCE:
            return self._lost(f"LiteRT differs from Keras by {difference:.1e}, more than {TOLERANCE:.0e}")
        found = "asked for"
        if self.wanted == "auto":
            ratio = _ratio(litert, keras, images)
            found = f"{ratio:.1f} times as fast as Keras in a trial"
            if ratio < _LEAST_RATIO:
                return self._lost(f"LiteRT is {found}", lasting=self.undisturbed)
            self.verdicts.keep(_key(self.graph.digest), Verdict("litert", found), flatbuffer)
        log_event("engine", "litert", reason=found, difference=difference, workers=litert.num_workers)
        return litert

    def _difference(self, rows: np.ndarray, expected: np.ndarray) -> float:
        ends = np.cumsum(self.groups)[:-1]
        return max(map(relative_difference, np.split(rows, ends, 1), np.split(expected, ends, 1)))

    def _lost(self, reason: str, *, lasting: bool = True) -> FrozenForward:
        if lasting:
            self.verdicts.keep(_key(self.graph.digest), Verdict("keras", reason))
        return _keras(self.graph, reason)


def _keras(graph: FrozenGraph, reason: str) -> FrozenForward:
    made = KerasForward(graph)
    # The same for everyone, so that all take the same of the two ways.
    shape = (_NUM_NOISE_IMAGES, graph.input_size, graph.input_size, 3)
    made.freeze(np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32))
    log_event("engine", "keras", reason=reason)
    return made


def _ratio(litert: FrozenForward, keras: FrozenForward, images: np.ndarray) -> float:
    """Return the speed of one as a multiple of the other's; in turn, so that a busy machine slows both."""
    seconds = {id(litert): float("inf"), id(keras): float("inf")}
    # As many as the workers take at once: LiteRT would fill up what is left over.
    num_images = litert.num_workers * IMAGES_AT_ONCE
    batch = np.concatenate([images] * -(-num_images // len(images)))[:num_images]
    if len(batch) != len(images):
        keras.forward(batch)  # TensorFlow prepares for each new shape
    for _ in range(_TRIAL_ROUNDS):
        for each in (litert, keras):
            parts = np.array_split(batch, each.num_workers)
            start = time.perf_counter()
            with ThreadPoolExecutor(each.num_workers) as pool:
                list(pool.map(each.forward, parts))
            seconds[id(each)] = min(seconds[id(each)], time.perf_counter() - start)
        if seconds[id(keras)] > _CLEAR_RATIO * seconds[id(litert)]:
            break
    return seconds[id(keras)] / seconds[id(litert)]


def _key(digest: str) -> str:
    return f"{digest}-{tf.__version__}"

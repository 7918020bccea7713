"""What the processes that train together tell one another, beside the gradients.

All decisions that depend on a clock, a disk or a machine are the chief's, and shared here, so that workers never take
different paths. Every method is called by all workers in the same order; for a process that trains alone they cost
nothing. Bytes travel as integers that are summed with the others' zeros: no bit of a number changes on its way.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import tensorflow as tf

from kubegraft.errors import PeerLost, TrainingError
from kubegraft.training.cluster_spec import Cluster
from kubegraft.training.watchdog import WATCHDOG

# Of a group of TensorFlow's collectives; the strategy counts its own from 1.
_GROUP_KEY: Final = 1_000_003
_LOST: Final = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.InternalError,
)
# Winding down a process whose collectives are broken may take for ever.
_LAST_SECONDS: Final = 10.0


class Workers:
    """This process among those that train together; the default is one that trains alone.

    Attributes:
        index: Number of this process; 0 is the chief, which alone writes.
        num_workers: Number of processes.
    """

    def __init__(self, cluster: Cluster | None = None) -> None:
        """Take who there is; nothing is sent yet."""
        self.index = cluster.index if cluster else 0
        self.num_workers = cluster.num_workers if cluster else 1
        self._num_exchanges = 0

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.num_workers == 1

    @property
    def is_chief(self) -> bool:
        """Whether this process decides and writes."""
        return self.index == 0

    def gather(self, vector: np.ndarray) -> np.ndarray:
        """Return the vectors of all workers, `[num_workers, length]`; all are of one length and type."""
        if self.alone:
            return vector[None]
        size = vector.nbytes
        slots = np.zeros((self.num_workers, -(-size // 4) * 4), np.uint8)
        slots[self.index, :size] = np.frombuffer(vector.tobytes(), np.uint8)
        summed = self._exchanged(slots.reshape(-1).view(np.int32)).view(np.uint8).reshape(slots.shape)
        rows = np.ascontiguousarray(summed[:, :size]).reshape(-1).view(vector.dtype)
        return rows.reshape(self.num_workers, *vector.shape)

    def sums(self, vector: np.ndarray) -> np.ndarray:
        """Return the sum of the workers' vectors, added in one order everywhere."""
        total: np.ndarray = self.gather(vector).sum(0)
        return total

    def share(self, value: Any = None) -> Any:
        """Return the chief's value, a JSON value; what the others give is ignored."""
        if self.alone:
            return value
        data = json.dumps(value).encode() if self.is_chief else b""
        length = int(self.gather(np.array([len(data)], np.int64))[0, 0])
        (found,) = self._broadcast([np.frombuffer(data or bytes(length), np.uint8)])
        return json.loads(found.tobytes())

    def spread(self, arrays: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """Return the chief's arrays, by name, bit for bit; what the others give is ignored."""
        if self.alone:
            return dict(arrays or {})
        arrays = dict(arrays or {}) if self.is_chief else {}
        shapes = self.share({name: (str(np.asarray(a).dtype), np.shape(a)) for name, a in arrays.items()})
        if not shapes:
            return {}
        mine = [
            np.asarray(arrays[name]) if self.is_chief else np.zeros(shape, dtype)
            for name, (dtype, shape) in shapes.items()
        ]
        return dict(zip(shapes, self._broadcast(mine), strict=True))

    def barrier(self) -> None:
        """Return when all workers have come here."""
        self.gather(np.zeros(1, np.int32))

    def require_equal(self, digest: str, what: str) -> None:
        """Raise TrainingError if another worker has another digest.

        Args:
            digest: SHA-256 in hexadecimal digits.
            what: What it is of.
        """
        found = self.gather(np.frombuffer(bytes.fromhex(digest), np.uint8))
        differing = [number for number, row in enumerate(found) if not np.array_equal(row, found[0])]
        if differing:
            raise TrainingError(
                f"All workers must hold the same {what}, bit by bit. Received: other bits from worker "
                f"{differing[0]} than from worker 0. Workers on processors of different kinds can come to this; "
                "select nodes of one kind. On equal nodes it is a defect of kubegraft: please report it."
            )

    def _broadcast(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
        padded = np.frombuffer(data + bytes(-len(data) % 4), np.int32)
        found = self._exchanged(padded if self.is_chief else np.zeros_like(padded)).tobytes()
        results, start = [], 0
        for array in arrays:
            part = np.frombuffer(found, array.dtype, array.size, start)
            results.append(part.reshape(array.shape).copy())
            start += array.nbytes
        return results

    def _exchanged(self, vector: np.ndarray) -> np.ndarray:
        """Return the sum of `int32` vectors over the workers."""
        self._num_exchanges += 1
        with ending_if_lost(self):
            key = tf.constant(self._num_exchanges, tf.int32)
            total: np.ndarray = self._collective(tf.constant(vector), key).numpy()
        return total

    @functools.cached_property
    def _collective(self) -> Any:
        from tensorflow.python.ops import collective_ops

        def reduce(vector: Any, key: Any) -> Any:
            with tf.device("CPU:0"):
                return collective_ops.all_reduce_v2(
                    vector, self.num_workers, _GROUP_KEY, key, communication_hint="ring"
                )

        signature = [tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32)]
        return tf.function(reduce, input_signature=signature, autograph=False)


ALONE: Final = Workers()


@contextlib.contextmanager
def ending_if_lost(workers: Workers) -> Iterator[None]:
    """Raise PeerLost where TensorFlow says that another worker can't be reached any more.

    From then on this process can do no more than end: it does so in ten seconds whatever else happens.
    """
    if workers.alone:
        yield
        return
    try:
        yield
    except _LOST as error:
        reason = str(error.message).strip().rpartition("\n\n")[2].partition("\n")[0][:200]
        WATCHDOG.arm(_LAST_SECONDS, "a lost worker left this process in disorder")
        raise PeerLost(
            f"All {workers.num_workers} workers must stay reachable. Received: {type(error).__name__} "
            f"({reason}) at worker {workers.index}. Start all of them again: they go on from the last checkpoint."
        ) from error

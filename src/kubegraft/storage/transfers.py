"""Many files at once, by a fixed number of threads and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Final, TypeVar

from kubegraft.reporting.progress import Progress
from kubegraft.storage.objects import NUM_THREADS
from kubegraft.storage.retries import Retries

_NUM_WAITING: Final = 4 * NUM_THREADS  # enough that no thread idles, few enough that a million files fit

_T = TypeVar("_T")


def in_parallel(
    function: Callable[[_T], int], items: Iterable[_T], retries: Retries, *, total: int = 0
) -> tuple[int, int]:
    """Call `function` for every item, and show progress.

    `items` is read only as fast as the work goes on. The first failure ends the work: what waits is dropped,
    what runs is finished.

    Args:
        function: Does one item and returns how many bytes it moved.
        items: What to do.
        retries: Those of the work, which are stopped when it ends.
        total: How many items there are, or 0 where that is not known.

    Returns:
        The number of items, and of bytes moved.
    """
    num_bytes = num_items = 0
    pending: set[Future[int]] = set()
    pool = ThreadPoolExecutor(NUM_THREADS, "storage")
    try:
        with Progress("storage", total, "files") as progress:

            def collect(done: set[Future[int]]) -> None:
                nonlocal num_bytes, num_items
                for future in done:
                    num_bytes += future.result()
                    num_items += 1
                    progress.update(mib=round(num_bytes / 2**20, 1))

            for item in items:
                pending.add(pool.submit(function, item))
                if len(pending) >= _NUM_WAITING:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    collect(done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                collect(done)
    except BaseException:
        retries.stopped.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return num_items, num_bytes

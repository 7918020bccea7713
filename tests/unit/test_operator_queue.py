"""The operator's queue: one reconcile for any number of events, one worker for one object, later after each failure."""

import asyncio
import itertools

from kubegraft.controller.work_queue import WorkQueue


def run(test):
    """Run a test's coroutine function, bounded, since a queue's faults are waits for ever."""
    asyncio.run(asyncio.wait_for(test(), timeout=20))


class Worker:
    """Notes the keys it gets; holds each until it is let go, where it is told to."""

    def __init__(self, holds=False):
        self.seen, self.at_once, self.most = [], 0, 0
        self.began, self.go = asyncio.Event(), asyncio.Event()
        if not holds:
            self.go.set()

    async def __call__(self, key):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.seen.append(key)
        self.began.set()
        await self.go.wait()
        self.at_once -= 1


async def idle(queue):
    while len(queue) or queue._working:
        await asyncio.sleep(0)


def test_any_number_of_events_are_one_reconcile():
    async def test():
        queue, worker = WorkQueue(), Worker()
        for _ in range(100):
            queue.add("a")
        queue.add("b")
        task = asyncio.create_task(queue.work(worker))
        await idle(queue)
        queue.close()
        await task
        assert worker.seen == ["a", "b"]

    run(test)


def test_what_comes_while_a_worker_has_the_object_is_looked_at_once_more_and_never_at_the_same_time():
    async def test():
        queue, worker = WorkQueue(), Worker(holds=True)
        tasks = [asyncio.create_task(queue.work(worker)) for _ in range(4)]
        queue.add("a")
        await worker.began.wait()
        queue.add("a")
        queue.add("a")
        assert worker.seen == ["a"]
        worker.go.set()
        await idle(queue)
        queue.close()
        await asyncio.gather(*tasks)
        assert worker.seen == ["a", "a"]
        assert worker.most == 1

    run(test)


def test_of_several_times_to_look_again_the_earliest_holds():
    async def test():
        queue, worker = WorkQueue(), Worker()
        task = asyncio.create_task(queue.work(worker))
        queue.add_after("a", 3600)
        queue.add_after("a", 0.01)
        queue.add_after("a", 7200)
        await worker.began.wait()
        await idle(queue)
        queue.close()
        await task
        assert worker.seen == ["a"]

    run(test)


def test_each_failure_waits_longer_up_to_a_bound_and_success_begins_anew():
    async def test():
        queue = WorkQueue()
        waits = [queue.retry("a") for _ in range(12)]
        assert waits[0] < 1
        assert all(later > earlier for earlier, later in itertools.pairwise(waits[:7]))
        assert max(waits) <= 120 * 1.2
        queue.forget("a")
        assert queue.retry("a") < 1
        assert queue.retry("b", at_least=60) == 60
        queue.close()

    run(test)


def test_closing_ends_what_was_begun_and_begins_nothing_more():
    async def test():
        queue, worker = WorkQueue(), Worker(holds=True)
        tasks = [asyncio.create_task(queue.work(worker)) for _ in range(2)]
        queue.add("a")
        await worker.began.wait()
        queue.close()
        for key in ("b", "a"):
            queue.add(key)
        queue.add_after("c", 0)
        worker.go.set()
        await asyncio.gather(*tasks)
        assert worker.seen == ["a"]

    run(test)


def test_a_worker_that_is_stuck_is_seen():
    async def test():
        queue, worker = WorkQueue(), Worker(holds=True)
        assert queue.longest_work_seconds() == 0
        task = asyncio.create_task(queue.work(worker))
        queue.add("a")
        await worker.began.wait()
        assert queue.longest_work_seconds() > 0
        worker.go.set()
        queue.close()
        await task

    run(test)


def test_what_is_urgent_goes_first():
    async def test():
        queue, worker = WorkQueue(is_urgent=str.isupper), Worker()
        for key in "abCdE":
            queue.add(key)
        task = asyncio.create_task(queue.work(worker))
        await idle(queue)
        queue.close()
        await task
        assert worker.seen == ["C", "E", "a", "b", "d"]

    run(test)


def test_the_depth_is_told():
    async def test():
        depths = []
        queue = WorkQueue(observe_depth=depths.append)
        queue.add("a")
        queue.add("b")
        task = asyncio.create_task(queue.work(Worker()))
        await idle(queue)
        queue.close()
        await task
        assert depths == [1, 2, 1, 0]

    run(test)

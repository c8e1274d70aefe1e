"""The engine in its own thread: many threads, many event loops, early leavers and failures."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest
from engine_kit import NO_REUSE, of, request, run, tiny_model

from dgemma.engine import Engine, Worker
from dgemma.engine.streams import AsyncStream, Stream
from dgemma.errors import RequestError
from dgemma.events import Committed, Draft, Event, Finished

MODEL = tiny_model()
ITEMS = [
    request(3 + i, seed=i, watch=i % 2 == 0, mode="ar" if i == 3 else "diffusion", max_new_tokens=12) for i in range(6)
]


def new_worker() -> Worker:
    return Worker(Engine(MODEL, NO_REUSE))


def idle(worker: Worker) -> bool:
    """Wait until the thread has ended."""
    for _ in range(1000):
        if worker._thread is None:
            return not worker.engine.has_work and not worker._listeners
        time.sleep(0.01)
    return False


@pytest.fixture(scope="module")
def expected() -> list[list[Event]]:
    return [run(Engine(MODEL, NO_REUSE), [item]) for item in ITEMS]


def renumbered(events: list[Event]) -> list[Event]:
    assert len({event.request for event in events}) == 1
    return of(events, events[0].request)


def read(worker: Worker, index: int) -> list[Event]:
    with Stream(worker, ITEMS[index]) as stream:
        return list(stream.events())


def test_many_threads_share_batches_and_get_their_own_events(expected: list[list[Event]]) -> None:
    worker = new_worker()
    gate = threading.Barrier(6)

    def task(index: int) -> list[Event]:
        gate.wait()
        return read(worker, index)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(task, range(6)))
    assert [renumbered(answer) for answer in answers] == expected
    assert worker.engine.counters.denoise_passes < sum(sum(answer[-1].steps) for answer in answers)
    assert idle(worker)


def test_many_tasks_of_one_event_loop(expected: list[list[Event]]) -> None:
    worker = new_worker()

    async def task(index: int) -> list[Event]:
        with AsyncStream(worker, ITEMS[index]) as stream:
            return [event async for event in stream.events()]

    async def together() -> list[list[Event]]:
        return await asyncio.gather(*(task(index) for index in range(6)))

    assert [renumbered(answer) for answer in asyncio.run(together())] == expected
    assert idle(worker)


def test_the_event_loop_is_not_blocked() -> None:
    worker = new_worker()

    async def watch_the_clock() -> float:
        longest, last = 0.0, time.perf_counter()
        with AsyncStream(worker, request(200, seed=1, max_new_tokens=64)) as stream:
            reader = asyncio.ensure_future(anext(aiter(stream.events())))
            while not reader.done():
                await asyncio.sleep(0)
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
        return longest

    worker.engine.tick = slow(worker.engine.tick)  # type: ignore[method-assign]
    assert asyncio.run(watch_the_clock()) < 0.25
    assert idle(worker)


def slow(tick: object) -> object:
    def slower() -> list[Event]:
        time.sleep(0.5)  # without the interpreter's lock, like a matrix product
        return tick()  # type: ignore[operator,no-any-return]

    return slower


def test_leaving_early_aborts_and_others_go_on(expected: list[list[Event]]) -> None:
    worker = new_worker()
    long = request(4, seed=9, watch=True, max_new_tokens=400)
    with ThreadPoolExecutor(1) as pool, Stream(worker, long) as stream:
        other = pool.submit(read, worker, 2)
        for event in stream.events():
            if isinstance(event, Committed):
                break
        assert renumbered(other.result()) == expected[2]
    assert idle(worker)
    assert worker.engine.counters.denoise_passes < 400


def test_cancelling_a_task_aborts() -> None:
    worker = new_worker()

    async def cancelled() -> None:
        got: list[Event] = []

        async def task() -> None:
            with AsyncStream(worker, request(4, seed=9, watch=True, max_new_tokens=400)) as stream:
                async for event in stream.events():
                    got.append(event)

        running = asyncio.ensure_future(task())
        while not got:
            await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert isinstance(got[0], Draft)

    asyncio.run(cancelled())
    assert idle(worker)


def test_a_closed_event_loop_does_not_hurt_the_worker(expected: list[list[Event]]) -> None:
    worker = new_worker()

    async def leave_without_closing() -> None:
        AsyncStream(worker, request(4, seed=9, watch=True))

    asyncio.run(leave_without_closing())
    assert renumbered(read(worker, 0)) == expected[0]
    assert idle(worker)


def test_a_failing_pass_reaches_every_reader_and_the_worker_recovers(expected: list[list[Event]]) -> None:
    worker = new_worker()
    tick = worker.engine.tick

    def broken() -> list[Event]:
        raise MemoryError("no room")

    worker.engine.tick = broken  # type: ignore[method-assign]
    inboxes: list[SimpleQueue[Event | BaseException]] = [SimpleQueue(), SimpleQueue()]
    with worker._lock:  # both are there before the first tick
        numbers = [worker.engine.add(ITEMS[i]) for i in range(2)]
        worker._listeners |= dict(zip(numbers, [box.put for box in inboxes], strict=True))
        worker._wake()
    for box in inboxes:
        assert isinstance(box.get(timeout=20), MemoryError)
    assert idle(worker)
    worker.engine.tick = broken  # type: ignore[method-assign]
    with pytest.raises(MemoryError, match="no room"):
        read(worker, 0)
    worker.engine.tick = tick  # type: ignore[method-assign]
    assert renumbered(read(worker, 0)) == expected[0]


def test_wrong_requests_raise_where_they_are_made() -> None:
    worker = new_worker()
    with pytest.raises(RequestError, match="unknown sampler"):
        Stream(worker, request(3, sampler="gibbs"))
    assert idle(worker)


def test_aborting_twice_or_after_the_end_is_fine() -> None:
    worker = new_worker()
    stream = Stream(worker, request(3))
    assert isinstance(list(stream.events())[-1], Finished)
    with stream, stream:
        pass
    worker.abort(99)
    assert idle(worker)


SCRIPT = """
import sys, threading
sys.path.insert(0, "tests")
from engine_kit import NO_REUSE, request, tiny_model
from dgemma.engine import Engine, Worker
from dgemma.engine.streams import Stream
worker = Worker(Engine(tiny_model(), NO_REUSE))
def read():
    with Stream(worker, request(4, watch=True, max_new_tokens=24)) as stream:
        print(len(list(stream.events())) > 3, flush=True)
if sys.argv[1] == "thread":
    threading.Thread(target=read).start()
else:
    stream = Stream(worker, request(4, watch=True, max_denoising_steps=10**6, confidence_threshold=None))
    events = stream.events()
    print(next(events).step, flush=True)
"""


@pytest.mark.parametrize(("reader", "said"), [("thread", "True"), ("nobody", "1")])
def test_the_interpreter_ends_when_nobody_is_left_to_read(reader: str, said: str) -> None:
    root = Path(__file__).resolve().parent.parent
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, reader]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr

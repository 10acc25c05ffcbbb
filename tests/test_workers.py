"""Worker processes that are killed, hang, die or are given up: each costs its own piece of work, and no other."""

import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import CancelledError
from contextlib import suppress

import misbehave
import pytest

from xcomp.workers import WorkerEnded, WorkerNotStarted, Workers, WorkerTooSlow


@pytest.fixture
def workers():
    pool = Workers(2, print)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    "function, error, message",
    [
        (misbehave.abort, WorkerEnded, "SIGABRT"),
        (misbehave.die, WorkerEnded, "SIGKILL"),
        (misbehave.hang, WorkerTooSlow, None),
        (misbehave.stumble, ZeroDivisionError, "by\nzero"),
        (misbehave.leave, WorkerEnded, "status 3"),
        (misbehave.throw, RuntimeError, "Unpicklable: one"),
        (lambda path: path, Exception, "pickle"),
    ],
)
def test_what_goes_wrong_is_one_tasks_error(workers, function, error, message):
    bad = workers.submit(function, "a", limit=1.0)
    others = [workers.submit(misbehave.fine, letter) for letter in "abcd"]
    assert [other.result() for other in others] == list("ABCD")
    with pytest.raises(error, match=message):
        bad.result()


def test_idle_processes_that_are_killed_are_replaced(workers):
    tasks = [workers.submit(misbehave.nap, 0.2) for _ in range(2)]
    killed = {task.result() for task in tasks}
    for process in killed:
        os.kill(process, signal.SIGKILL)
    again = [workers.submit(misbehave.nap, 0.0) for _ in range(4)]
    assert len(killed) == 2 and not killed & {task.result() for task in again}


def test_work_of_a_process_that_is_killed_is_done_once_more(workers, tmp_path):
    for number in (signal.SIGKILL, signal.SIGTERM):
        first = str(tmp_path / number.name)
        assert workers.submit(misbehave.once, first, os.kill, number).result() == "the second time"


def test_kills_at_any_moment_lose_nothing(workers):
    """In the middle of a message too: most of the time goes to those."""
    rng = random.Random(0)
    tasks = [workers.submit(misbehave.fill, 30_000_000) for _ in range(30)]
    kills, until = 0, time.monotonic() + 100
    while not all(task.done() for task in tasks) and time.monotonic() < until:
        time.sleep(0.3 * rng.random())
        for process in workers.process_ids[:1] if kills < 6 else ():
            with suppress(ProcessLookupError):  # just replaced
                os.kill(process, signal.SIGKILL)
                kills += 1
    assert kills and all(task.done() for task in tasks)
    lost = [task for task in tasks if task.future.exception() is not None]
    assert len(lost) <= kills // 2  # those that were hit twice
    assert all(len(task.result()) == 30_000_000 for task in tasks if task not in lost)


def test_what_is_given_up_ends_with_its_process(workers):
    hanging = [workers.submit(misbehave.hang, "a") for _ in range(3)]  # one stands behind the others
    time.sleep(0.5)
    for task in hanging:
        task.cancel()
    assert workers.submit(misbehave.fine, "b").result() == "B"
    for task in hanging:
        with pytest.raises(CancelledError):
            task.result()


def test_processes_that_cannot_start_are_told(tmp_path):
    workers = Workers(1, os._exit, (7,))
    with pytest.raises(WorkerNotStarted, match="status 7"):
        workers.submit(misbehave.fine, "a").result()
    workers.close()
    workers = Workers(1, misbehave.once, (str(tmp_path / "x"), os._exit, 1))  # the first time
    assert workers.submit(misbehave.fine, "a").result() == "A"
    workers.close()


def test_closing_ends_everything():
    others = set(multiprocessing.active_children())
    workers = Workers(2, print)
    tasks = [workers.submit(misbehave.hang, "a") for _ in range(4)]
    time.sleep(0.5)
    workers.close()
    assert all(task.future.cancelled() or isinstance(task.future.exception(), CancelledError) for task in tasks)
    assert set(multiprocessing.active_children()) <= others

"""Worker processes that may die at any moment, in the middle of a message too, without harm to the others.

Each has a pipe of its own, whose other end nobody else holds, so that a process that ends also ends its messages; the
pools of the standard library and of others share one pipe and can wait for ever for the rest of a message.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

# Exit statuses of processes that others ended (SIGTERM; SIGKILL, as when memory runs out; the fork server's own end):
# their work is done once more.
FROM_OUTSIDE = (-signal.SIGTERM, -signal.SIGKILL, 255)
SECONDS_TO_START = 600.0  # imports take their time on a busy machine
SECONDS_TO_END = 10.0  # from the end of its messages to a process's own end

# ``multiprocessing`` looks after all processes whenever one starts, and an exit status can be read once.
_starting_and_ending = threading.Lock()


class WorkerEnded(Exception):
    """The process ended while it was at work. ``status``: its exit status, negative: the signal."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status

    def __str__(self) -> str:
        names = {-number: number.name for number in signal.Signals}
        return names.get(self.status, f"status {self.status}")


class WorkerNotStarted(WorkerEnded):
    """The process ended before it could begin."""


class WorkerTooSlow(Exception):
    """The work took longer than it may, and its process was ended."""


class Task:
    """A piece of work: ``function(*arguments)`` in a process that is free, within ``limit`` seconds."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any], limit: float | None):
        self.function, self.arguments, self.limit = function, tuple(arguments), limit
        self.future: Future[Any] | None = None
        self.unwanted = False
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> Any:
        """What the function returned; its exception, WorkerEnded, WorkerTooSlow or CancelledError are raised."""
        return self.future.result()

    def cancel(self) -> None:
        """Gives the work up, if need be with its process."""
        with self._lock:
            self.unwanted = True
            self.future.cancel()
            if self._process is not None:
                self._process.kill()

    def run(self, process: _Process) -> Any:
        try:
            return self._call(process)
        except WorkerEnded as error:
            if not self.unwanted and error.status not in FROM_OUTSIDE:
                raise
        return self._call(process)

    def _call(self, process: _Process) -> Any:
        process.start()
        with self._lock:
            if self.unwanted:
                raise CancelledError
            self._process = process
        try:
            return process.call(self.function, self.arguments, self.limit)
        except (WorkerEnded, WorkerTooSlow) as error:
            if self.unwanted:
                raise CancelledError from error
            raise
        finally:
            with self._lock:
                self._process = None


class Workers:
    """``count`` processes, each of which calls ``prepare(*arguments)`` once, and then what is submitted.

    Functions, arguments and results are pickled. ``preload``: modules that are imported once for all processes.
    """

    def __init__(
        self, count: int, prepare: Callable[..., Any], arguments: Sequence[Any] = (), *, preload: Sequence[str] = ()
    ):
        # Not forked from this process, which has threads.
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if hasattr(context, "set_forkserver_preload"):
            context.set_forkserver_preload(list(preload))
        self._processes = [_Process(context, prepare, tuple(arguments)) for _ in range(count)]
        self._free: SimpleQueue[_Process] = SimpleQueue()
        self._threads = ThreadPoolExecutor(count, "worker")  # one waits for each process
        self._tasks: set[Task] = set()
        for process in self._processes:
            self._threads.submit(self._stand_ready, process)

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that there are."""
        return [process.id for process in self._processes if process.id is not None]

    def submit(self, function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Task:
        task = Task(function, arguments, limit)
        task.future = self._threads.submit(self._run, task)
        self._tasks.add(task)
        task.future.add_done_callback(lambda _: self._tasks.discard(task))
        return task

    def close(self) -> None:
        """Ends the processes, whatever they are doing; tasks that are not done are cancelled."""
        for task in list(self._tasks):
            task.cancel()
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.end()

    def _stand_ready(self, process: _Process) -> None:
        try:
            process.start()
        except WorkerEnded:
            pass  # the first task will meet it again, and tell
        finally:
            self._free.put(process)

    def _run(self, task: Task) -> Any:
        process = self._free.get()
        try:
            return task.run(process)
        finally:
            self._free.put(process)


class _Process:
    """One process and its pipe, started anew where it has ended."""

    def __init__(self, context: Any, prepare: Callable[..., Any], arguments: tuple[Any, ...]):
        self._context, self._prepare = context, (prepare, arguments)
        self._process: Any | None = None
        self._pipe: Connection | None = None

    @property
    def id(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Starts the process, if it does not run; WorkerEnded if it ends before it is ready."""
        if self._process is not None and not wait([self._process.sentinel], 0):
            return
        self.end()
        self._pipe, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there, *self._prepare), daemon=True)
        with _starting_and_ending:
            process.start()
        self._process = process
        there.close()
        try:
            self._receive(SECONDS_TO_START)
        except WorkerEnded as error:
            raise WorkerNotStarted(error.status) from error

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], limit: float | None) -> Any:
        message = pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)
        try:
            self._pipe.send_bytes(message)
        except OSError as error:
            raise WorkerEnded(self.end(SECONDS_TO_END)) from error
        is_result, value = pickle.loads(self._receive(limit))
        if is_result:
            return value
        raise value

    def _receive(self, limit: float | None) -> bytes:
        if not wait([self._pipe, self._process.sentinel], limit):
            self.end()
            raise WorkerTooSlow
        try:
            if not self._pipe.poll():
                raise EOFError  # it ended, and something that it started keeps its end of the pipe
            return self._pipe.recv_bytes()
        except (OSError, EOFError) as error:
            raise WorkerEnded(self.end(SECONDS_TO_END)) from error

    def kill(self) -> None:
        """From any thread: the one that waits for the process meets its end."""
        process = self._process
        if process is not None:
            process.kill()

    def end(self, patience: float = 0.0) -> int:
        """Ends the process, unless it ends by itself in that many seconds; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if not wait([process.sentinel], patience):
            process.kill()
            wait([process.sentinel])
        with _starting_and_ending:
            process.join()
        self._pipe.close()
        return process.exitcode


# --- in the worker ----------------------------------------------------------------------------------------------------


def _serve(pipe: Connection, prepare: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others
    prepare(*arguments)
    try:
        pipe.send_bytes(b"ready")
        while True:
            pipe.send_bytes(_outcome(*pickle.loads(pipe.recv_bytes())))
    except (OSError, EOFError):
        return  # nobody is there any more


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    """(True, the result) or (False, the exception), pickled."""
    try:
        return pickle.dumps((True, function(*arguments)), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        try:
            message = pickle.dumps((False, error))
            pickle.loads(message)  # which some exceptions do not take
            return message
        except Exception:
            return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))

"""Decoding beside the model: processes that open, sample, decode and resize frames while the model computes.

A piece of work is a file and some frame numbers; what comes back are bytes at the sizes that encoders take, so that a
video's own size never reaches the model's process. A process that dies, takes too long or asks for too much memory is
replaced, and its piece of work becomes a :class:`xcomp.video.VideoError`; the others go on. One that is killed from
outside is replaced too, and its piece decoded once more (:mod:`xcomp.workers`).
"""

from __future__ import annotations

import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xcomp.config import Decoding, Sampling
from xcomp.messages import printable
from xcomp.pixels import PixelFormat
from xcomp.sampling import span_frames
from xcomp.stopping import end_with_parent
from xcomp.video import Video, VideoError
from xcomp.workers import FROM_OUTSIDE, Task, WorkerEnded, WorkerNotStarted, Workers, WorkerTooSlow

GIGABYTE = 1024**3
Span = tuple[float, float] | None  # seconds


@dataclass(frozen=True)
class VideoInfo:
    """A video as opened: ``candidates`` are the frames that the sampling rule takes, ``times`` their seconds.

    All of it speaks of the file. Where only a span of it is asked about, candidates are taken from that, it begins at
    ``span_start`` and lasts ``span_seconds``.
    """

    path: str
    num_frames: int
    fps: float
    duration: float
    reader: str
    reader_version: str
    candidates: tuple[int, ...]
    times: tuple[float, ...]
    span_start: float = 0.0
    span_seconds: float | None = None

    @property
    def shown_seconds(self) -> float:
        """How long what is asked about lasts: the span, or all."""
        return self.duration if self.span_seconds is None else self.span_seconds

    def shown_times(self, times: Sequence[float]) -> tuple[float, ...]:
        """Seconds of the file as seconds of what is asked about."""
        return tuple(round(time - self.span_start, 3) for time in times)


@dataclass(frozen=True)
class Pixels:
    """A decoded piece: for each format (T, 3, h, w) uint8, and the seconds that it took."""

    arrays: tuple[np.ndarray, ...]
    seconds: float


# --- in the worker ----------------------------------------------------------------------------------------------------

# The files that the last pieces of work were about: the video that is asked and the one that comes next.
_opened: OrderedDict[str, Video] = OrderedDict()


def inspect(path: str, threads: int, sampling: Sampling, span: Span = None) -> tuple[VideoInfo, float]:
    """A video's properties and candidate frames, and the seconds that it took to open it."""
    started = time.perf_counter()
    video = opened(path, sampling.reader, threads)
    first, count, seconds = 0, video.num_frames, None
    if span is not None:
        try:
            first, count, seconds = span_frames(count, video.fps, *span)
        except VideoError as error:
            raise VideoError(f"{printable(path)}: {error}") from error
    candidates = [first + frame for frame in sampling.candidates(count, video.fps)]
    start, *times = (round(time, 3) for time in video.times([first, *candidates]))
    names = ("path", "num_frames", "fps", "duration", "reader", "reader_version")
    told = [getattr(video, name) for name in names]
    info = VideoInfo(*told, tuple(candidates), tuple(times), start if seconds else 0.0, seconds)
    return info, time.perf_counter() - started


def decode(path: str, reader: str, threads: int, frames: Sequence[int], formats: Sequence[PixelFormat]) -> Pixels:
    """The frames of these numbers (ascending) in each format; one frame is held at its own size at a time."""
    started = time.perf_counter()
    arrays = read_resized(opened(path, reader, threads), frames, formats)
    return Pixels(arrays, time.perf_counter() - started)


def read_resized(video: Video, frames: Sequence[int], formats: Sequence[PixelFormat]) -> tuple[np.ndarray, ...]:
    """Frames of these numbers (ascending, each once) in each format, (T, 3, h, w) uint8."""
    resized: list[list[np.ndarray]] = [[] for _ in formats]
    for _, frame in video.read(frames):
        picture = torch.from_numpy(frame).unsqueeze(0)
        for pieces, pixel_format in zip(resized, formats):
            pieces.append(pixel_format.resize(picture).numpy())
    return tuple(np.concatenate(pieces) for pieces in resized)


def opened(path: str, reader: str, threads: int) -> Video:
    """A video that is open, as one of the last two that were asked for stays."""
    key = f"{reader}, {threads}, {path}"
    if key not in _opened:
        while len(_opened) >= 2:
            _opened.popitem(last=False)[1].close()
        _opened[key] = Video(path, reader, threads=threads)
    _opened.move_to_end(key)
    return _opened[key]


def _start_worker(threads: int, memory: float) -> None:
    """Sets a worker process up: gone with its parent, bounded memory."""
    torch.set_num_threads(threads)
    end_with_parent()
    if sys.platform == "linux":
        import resource

        with open("/proc/self/status", encoding="ascii") as file:
            held = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
        most = held + int(memory * GIGABYTE)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


# --- in the model's process -------------------------------------------------------------------------------------------


class Pending:
    """A piece of work that was handed out. ``result`` waits for it; what goes wrong with it is a VideoError."""

    def __init__(self, path: str, limit: float, task: Task | None, run: Callable[[], Any] | None = None):
        self._path, self._limit, self._task, self._run = path, limit, task, run

    def done(self) -> bool:
        """Whether ``result`` need not wait; without processes it always does the work itself."""
        return self._task is not None and self._task.done()

    def result(self) -> Any:
        try:
            return self._run() if self._task is None else self._task.result()
        except VideoError:
            raise
        except Exception as error:  # whatever a file makes the decoder do is that file's error
            raise VideoError(f"{printable(self._path)}: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        if isinstance(error, WorkerTooSlow):
            return f"decoding took longer than {self._limit:g} s; raise decoding.seconds, or mend the file"
        if isinstance(error, WorkerNotStarted):
            return f"a decoding process ended before it began ({error}); the machine may be out of memory"
        if isinstance(error, WorkerEnded) and error.status in FROM_OUTSIDE:
            return f"the process that decodes it was ended ({error}), twice; the machine may be out of memory"
        if isinstance(error, WorkerEnded):
            return f"decoding it ended the process ({error}); the file is broken"
        if isinstance(error, MemoryError):
            return "decoding takes more memory than decoding.memory allows; raise it, or mend the file"
        return " ".join(f"{type(error).__name__}: {error}".split())

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class DecodingPool:
    """Processes that decode, or with ``workers: 0`` none: then work is done where its result is asked for.

    Use it as a context manager. ``ranks`` is how many processes like this one share the machine.
    """

    def __init__(self, decoding: Decoding | None = None, sampling: Sampling | None = None, *, ranks: int = 1):
        self.options = decoding or Decoding()
        self.sampling = sampling or Sampling()
        cores = max(1, len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)))
        cores = max(1, cores // ranks)
        given, threads = self.options.workers, self.options.threads
        self.workers = min(4, max(1, cores // 2)) if given is None else given
        self.threads = max(1, cores // max(1, self.workers)) if threads is None else threads
        self._workers: Workers | None = None
        if self.workers:
            limits = self.threads, self.options.memory
            self._workers = Workers(self.workers, _start_worker, limits, preload=["xcomp.decoding"])

    def inspect(self, path: str, span: Span = None) -> Pending:
        """Open a video of which ``span`` (seconds; None: all) is asked about: its result is (:class:`VideoInfo`,
        seconds)."""
        return self.hand_out(inspect, path, self.threads, self.sampling, span)

    def decode(self, path: str, frames: Sequence[int], formats: Sequence[PixelFormat]) -> Pending:
        """Decode frames, ascending and each once: its result is :class:`Pixels`."""
        return self.hand_out(decode, path, self.sampling.reader, self.threads, list(frames), list(formats))

    def hand_out(self, function: Callable[..., Any], path: str, *args: Any) -> Pending:
        """Any other work on a file, ``function(path, *args)``, within the same limits; all of it is pickled."""
        limit = self.options.seconds
        if self._workers is None:
            return Pending(path, limit, None, lambda: function(path, *args))
        return Pending(path, limit, self._workers.submit(function, path, *args, limit=limit))

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        while _opened:
            _opened.popitem()[1].close()

    def __enter__(self) -> DecodingPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

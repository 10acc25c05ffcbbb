"""The ways to read a video's frames: PyAV, decord, torchcodec, and folders of images.

PyAV reads every file as the ffmpeg command does. decord and torchcodec are used where they are asked for and are known
to give the same frames, which is decided by what PyAV finds in the file; elsewhere they are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xcomp.sampling import VideoError

READERS = ("auto", "decord", "av", "torchcodec")
_IMAGE = re.compile(r"_(\d+)\.(?:jpe?g|png)$", re.IGNORECASE)


class Reader(Protocol):
    """One way to read a video.

    ``starts``: (num_frames,) float64 seconds, when each frame is shown, counted from the first. ``read`` takes distinct
    ascending numbers and gives each with its picture, (H, W, 3) uint8 RGB.
    """

    name: str
    version: str
    fps: float
    starts: np.ndarray

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]: ...

    def close(self) -> None: ...


def open_reader(path: str, name: str, threads: int) -> Reader:
    """Opens a file or a folder. ``auto`` is PyAV for every file: right about all, and as fast as any other reader.

    Measured for sparse and dense frames of an hour, with one thread and more (``perf/reading.py``).

    Raises:
        VideoError: if there is nothing to read, or the reader named is not exact for it; errors of the libraries.
    """
    if os.path.isdir(path):
        return ImageReader(path)
    exact = AvReader(path, threads)
    if name in ("auto", "av"):
        return exact
    try:
        return {"decord": DecordReader, "torchcodec": TorchcodecReader}[name](path, exact, threads)
    except Exception as error:
        exact.close()
        if isinstance(error, (VideoError, MemoryError)):
            raise
        # types of their own; ImportError: not installed
        raise VideoError(f"{name} cannot read it ({first_line(error)}); use reader: av or auto") from error


def first_line(error: Exception) -> str:
    """What an error says, short enough for another one's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__


class AvReader:
    """PyAV. A frame is known by its presentation time, and read from the keyframe before it where that can be trusted.

    Where seeking does not lead where the file says, or to a frame that cannot be decoded by itself, everything is read
    from the start from then on.
    """

    name = "av"

    def __init__(self, path: str, threads: int = 1):
        import av

        from xcomp.stream import Pictures, VideoStream
        from xcomp.timeline import survey

        self.version = f"av {av.__version__}"
        self.stream = VideoStream(path, threads)
        try:
            self.timeline, first = survey(self.stream)
            self.pictures = Pictures(first)
        except Exception:
            self.stream.close()
            raise
        self.fps, self.starts = self.timeline.fps, self.timeline.starts
        self.seekable = len(self.timeline.times) > 0
        self._frames: Iterator[tuple[int, Any]] = iter(())
        self._reached = len(self.starts)  # number of the last decoded frame; at first, behind all
        self._early = 0  # how many frames before the keyframe sought a seek has landed, as in some formats

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            yield index, self.pictures(self._frame(index))

    def check(self, index: int) -> None:
        """VideoError if a frame cannot be found by seeking to its keyframe and counting the frames from there."""
        keys = self.timeline.keys_before(index)
        first = keys[-1][0] if keys else 0
        if not first <= self._reached <= index:
            self._reached = len(self.starts)  # so that it is sought
        for number in range(first if self._reached > index else self._reached + 1, index + 1):
            self._frame(number)
        # Matroska's index may name other places than those of its keyframes; MP4's is all that says where they are.
        if not self.seekable or (self._early and "matroska" in self.stream.format):
            raise VideoError("seeking does not lead to its keyframes: the file is damaged; use reader: av or auto")

    def _frame(self, index: int) -> Any:
        self._begin_before(index)
        frame = self._go_on_to(index)
        if frame is None and self.seekable:
            self.seekable = False
            self._begin_before(index)
            frame = self._go_on_to(index)
        if frame is None:
            raise VideoError(f"frame {index} cannot be decoded: the file is damaged there")
        return frame

    def _begin_before(self, index: int) -> None:
        """Makes ``_frames`` lead to a frame: from where it stands, from a keyframe, or from the start.

        A seek costs less than decoding one frame.
        """
        passed = index <= self._reached
        keys = self.timeline.keys_before(index) if self.seekable else []
        if keys and (passed or keys[-1][0] - self._early > self._reached + 1):
            # Some containers look for presentation times, others for decoding times; some must begin earlier.
            targets = [int(self.timeline.times[index]), keys[-1][2], *(key[1] for key in keys[-2:-1])]
            landing = self.stream.seek(targets, self.timeline.key_bytes, targets[0])
            if landing is not None:
                number = self.timeline.number(landing[0])
                if number is not None:
                    self._early = max(self._early, keys[-1][0] - number)
                self._frames, self._reached = self._from_key(number, landing[1]), -1
                return
            self.seekable, passed = False, True
        if passed:
            self._frames, self._reached = self._numbered(self.stream.restart()), -1

    def _go_on_to(self, index: int) -> Any | None:
        for number, frame in self._frames:
            self._reached = number
            if number >= index:
                return frame if number == index else None
        self._reached = len(self.starts)
        return None

    def _numbered(self, frames: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        if not len(self.timeline.times):
            yield from enumerate(frames)
        for frame in frames:
            number = self.timeline.number(frame.pts)
            if number is not None:
                yield number, frame

    def _from_key(self, key: int | None, frames: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """Numbered frames after a seek; they end where it shows that decoding did not begin with a whole picture.

        Frames shown before the keyframe and stored after it may need what was not decoded: none of them is asked for.
        """
        begun = key is None  # an edit list leaves the keyframe out
        for number, frame in self._numbered(frames):
            if number == key:
                begun = frame.key_frame or frame.pict_type in _WHOLE
            if key is None or number >= key:
                if frame.is_corrupt or not begun:
                    return
            yield number, frame

    def close(self) -> None:
        self.stream.close()


_WHOLE = (0, 1, 5)  # picture types: unknown, I, SI


def _refuse_doubtful(exact: AvReader, name: str, doubts: Iterable[str] = ()) -> None:
    """VideoError if one of these doubts about a file holds, or one that PyAV could settle and others do not see."""
    timeline = exact.timeline
    if exact.stream.format.split(",")[0] not in ("mov", "matroska"):
        doubts = [f"the container {exact.stream.format}"]
    doubts = [*doubts, *timeline.doubts, *(["turned pictures"] if exact.pictures.turns else [])]
    if not doubts and len(timeline.keys) > 1:
        next(exact.read([int(timeline.keys[1, 0])]))
        doubts += [] if exact.seekable else ["keyframes that cannot be decoded by themselves"]
    if doubts:
        raise VideoError(f"{name} cannot be relied on for files with {doubts[0]}; use reader: av or auto")


class DecordReader:
    """decord. It counts frames from keyframes that it numbers as they are stored, and repeats what it cannot decode.

    Where frames are lost to damage, it gives others instead: PyAV decodes along, so that these are told.
    """

    name = "decord"

    def __init__(self, path: str, exact: AvReader, threads: int = 1):
        import decord

        self.version = f"decord {decord.__version__}"
        _refuse_doubtful(exact, self.name, self._doubts(exact))
        decord.logging.set_level(decord.logging.QUIET)
        # Above this share of repeated frames it raises: none may be.
        tolerance = "0.000000001"
        self._reader: Any = decord.VideoReader(
            f"file:{path}", ctx=decord.cpu(0), num_threads=threads, fault_tol=tolerance
        )
        self._exact, self.fps, self.starts = exact, exact.fps, exact.starts
        if not self._finds(exact.timeline):
            raise VideoError("decord finds other frames than PyAV in this file; use reader: av or auto")

    @staticmethod
    def _doubts(exact: AvReader) -> Iterator[str]:
        stream = exact.stream
        if stream.codec not in ("h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg"):
            yield f"the codec {stream.codec}"
        if stream.container.streams.best("video") is not stream.stream:
            yield "several video streams"
        if any(component.bits > 8 for component in stream.stream.codec_context.format.components):
            yield "more than 8 bits a colour"
        # It takes as much memory as the duration says: a wrong one ends the process.
        if (stream.container.duration or 0) / 1e6 > 2 * exact.starts[-1] + 60:
            yield "a wrong duration"

    def _finds(self, timeline: Any) -> bool:
        """Whether its FFmpeg, which is older, sees the same frames and keyframes."""
        if len(self._reader) != len(self.starts) or self._reader.get_key_indices() != timeline.keys[:, 0].tolist():
            return False
        starts = self._reader.get_frame_timestamp(range(len(self.starts)))[:, 0]
        return bool(np.allclose(starts, self.starts, rtol=1e-6, atol=1e-3))  # they are float32

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            self._exact.check(index)
            batch = self._reader.get_batch([index])
            # What comes back depends on decord's global bridge, which another library may have set.
            yield index, (batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch))[0]

    def close(self) -> None:
        self._reader = None
        self._exact.close()


class TorchcodecReader:
    """torchcodec, where it is installed. It checks neither edit lists nor where a seek has led."""

    name = "torchcodec"

    def __init__(self, path: str, exact: AvReader, threads: int = 1):
        import torchcodec
        from torchcodec.decoders import VideoDecoder

        self.version = f"torchcodec {torchcodec.__version__}"
        _refuse_doubtful(exact, self.name)
        self._reader: Any = VideoDecoder(
            f"file:{path}", stream_index=exact.stream.stream.index, dimension_order="NHWC", num_ffmpeg_threads=threads
        )
        self.fps, self.starts = exact.fps, exact.starts
        self._times = exact.timeline.times * float(exact.timeline.tick)
        self._tolerance = float(exact.timeline.tick) / 2
        if len(self._reader) != len(self.starts):
            raise VideoError("torchcodec finds other frames than PyAV in this file; use reader: av or auto")
        exact.close()

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            frame = self._reader.get_frame_at(index)
            if abs(frame.pts_seconds - self._times[index]) > self._tolerance:
                raise VideoError(f"torchcodec gives another frame than {index}; use reader: av or auto")
            yield index, frame.data.numpy()

    def close(self) -> None:
        self._reader = None


class ImageReader:
    """A folder of images named ``*_<number>.jpg`` or ``.png``, in the order of their numbers.

    Folders count as 1 frame a second, TVQA's as 3, as in VideoChat-Flash.
    """

    name = "images"

    def __init__(self, path: str):
        import PIL

        self.version = f"pillow {PIL.__version__}"
        numbered = ((_IMAGE.search(file.name), file) for file in Path(path).iterdir() if file.is_file())
        self._files = [file for _, file in sorted((int(match[1]), file) for match, file in numbered if match)]
        if not self._files:
            raise VideoError("folder has no frames: no images named *_<number>.jpg or .png")
        self.fps = 3.0 if "tvqa" in path else 1.0
        self.starts = np.arange(len(self._files)) / self.fps

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        from PIL import Image

        for index in indices:
            with Image.open(self._files[index]) as image:
                yield index, np.array(image.convert("RGB"))

    def close(self) -> None:
        pass

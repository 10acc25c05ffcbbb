"""Opening, sampling and decoding videos.

``Video`` reads single frames of a file (decord by default, PyAV where decord cannot) or of a folder of images.
``sample_indices`` implements the frame sampling of VideoChat-Flash (``dynamic_fps1``) and of XComp, which follows
it with more frames and other rules for short videos. Shape letters: T frames, H and W pixels.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

READERS = ("auto", "decord", "av")
# decord returns wrong frames of these wherever they have B-frames or open groups of pictures, and opens no GIF.
_AV_FIRST = (".avi", ".gif", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob")
STYLES = ("videochat_flash", "xcomp", "xcomp_training")
Style = Literal["videochat_flash", "xcomp", "xcomp_training"]


class VideoError(ValueError):
    """A video that cannot be opened or decoded, or a frame that it does not have."""


# --- Sampling ---------------------------------------------------------------------------------------------------------


def sample_indices(
    num_frames: int,
    fps: float,
    *,
    rate: float = 1.0,
    min_frames: int = 64,
    max_frames: int = 512,
    multiple: int = 8,
    style: Style = "videochat_flash",
) -> list[int]:
    """Ascending frame numbers: ``rate`` frames a second in whole units of ``multiple``, within the two bounds.

    The frames are the middles of equal parts of the video. Styles differ where a video has too few frames:
    ``videochat_flash`` repeats the last one; ``xcomp`` (its evaluation) takes whole units, and repeats frames evenly
    up to ``min_frames``; ``xcomp_training`` repeats none.

    Raises:
        ValueError: if the bounds contradict each other, or ``max_frames`` is no multiple of ``multiple``.
        VideoError: if there are no frames; with ``xcomp_training`` also if there are fewer than ``multiple``.
    """
    _check_sampling(num_frames, fps, rate, min_frames, max_frames, multiple, style)
    if num_frames < multiple and style == "xcomp_training":
        raise VideoError(f"video has {num_frames} frames, XComp's training needs at least {multiple}")
    if num_frames < multiple and style == "xcomp":
        indices = [i * num_frames // multiple for i in range(multiple)]
    else:
        count = _frame_count(num_frames, num_frames / fps * rate, min_frames, max_frames, multiple, style)
        indices = _bin_middles(num_frames, min(count, num_frames))
        if style == "videochat_flash":
            indices += [indices[-1]] * (count - len(indices))
    if style == "xcomp" and len(indices) < min_frames:
        indices = [indices[i * len(indices) // min_frames] for i in range(min_frames)]
    return indices


def uniform_indices(num_frames: int, count: int) -> list[int]:
    """The frames in the middle of ``count`` equal parts; some repeat if there are fewer frames than that."""
    if num_frames < 1:
        raise VideoError("video has no frames")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    return [(2 * i + 1) * num_frames // (2 * count) for i in range(count)]


def check_budget(count: int, clip_frames: int) -> None:
    """ValueError unless ``count`` frames fill clips of ``clip_frames``; names a number that does."""
    if count % clip_frames:
        fits = max(count // clip_frames, 1) * clip_frames
        raise ValueError(f"a budget of {count} frames does not divide into encoder clips of {clip_frames}; take {fits}")


def _frame_count(num_frames: int, wanted: float, low: int, high: int, multiple: int, style: Style) -> int:
    """Frames to take when ``wanted`` are asked for; more than there are only in the style that repeats the last."""
    whole = num_frames // multiple * multiple
    count = min(multiple * max(1, int(wanted // multiple)), high)
    if style != "videochat_flash" and count > num_frames:
        count = whole
    return max(whole if low > num_frames else low, count)


def _bin_middles(num_frames: int, count: int) -> list[int]:
    """Middle frames of ``count`` parts of the video whose bounds are rounded down to whole frames."""
    bounds = np.linspace(0, num_frames, count + 1).astype(int)  # the original's rounding, kept for equal indices
    return ((bounds[:-1] + bounds[1:] - 1) // 2).tolist()


def _check_sampling(num_frames: int, fps: float, rate: float, low: int, high: int, multiple: int, style: str) -> None:
    if num_frames < 1:
        raise VideoError("video has no frames")
    if not (fps > 0 and rate > 0):
        raise ValueError(f"fps={fps} and rate={rate} must be above 0")
    if multiple < 1 or high < multiple or high % multiple:
        raise ValueError(f"max_frames={high} must be a multiple of {multiple} (the frames encoded together)")
    if not 0 <= low <= high:
        raise ValueError(f"min_frames={low} must be between 0 and max_frames={high}")
    if style not in STYLES:
        raise ValueError(f"style={style!r} is not one of {', '.join(STYLES)}")


# --- Reading ----------------------------------------------------------------------------------------------------------


class Video:
    """A video file, or a folder of images named ``*_<number>.jpg`` or ``.png``, opened for reading single frames.

    Attributes: ``path``; ``num_frames``; ``fps`` (frames a second); ``duration`` (seconds); ``reader``, the one that
    opened it (decord, av or images). Use it as a context manager, or call ``close``.

    Folders count as 1 frame a second (TVQA's: 3), and animated GIFs as 1, as in VideoChat-Flash.

    Raises:
        VideoError: if the path does not exist, is no video, or has no frames.
    """

    def __init__(self, path: str | Path, reader: str = "auto", *, threads: int = 1):
        if reader not in READERS:
            raise ValueError(f"reader={reader!r} is not one of {', '.join(READERS)}")
        self.path = str(path)
        if not Path(path).exists():
            raise VideoError(f"{self.path}: no such file or folder")
        self._source: _Source | None = _open(self.path, reader)
        self.reader = self._source.name
        self.reader_version = self._source.name
        self.num_frames = self._source.num_frames
        self.fps = self._source.fps
        if self.num_frames < 1:
            self.close()
            raise VideoError(f"{self.path}: video has no frames")
        self.duration = self.num_frames / self.fps

    def times(self, indices):
        return [i / self.fps for i in indices]

    def read(self, indices):
        for i in sorted(set(indices)):
            yield i, self.frames([i])[0].numpy()

    def frames(self, indices: Iterable[int] | torch.Tensor) -> torch.Tensor:
        """(T, H, W, 3) uint8 RGB: the frames of these numbers, in this order; repeats are allowed.

        Raises:
            VideoError: if a number is not in 0..num_frames - 1, a frame cannot be decoded, or the video is closed.
        """
        wanted = [int(index) for index in indices]
        if self._source is None:
            raise VideoError(f"{self.path}: video is closed")
        if not wanted:
            raise VideoError(f"{self.path}: no frame was asked for")
        for index in wanted:
            if not 0 <= index < self.num_frames:
                raise VideoError(f"{self.path}: no frame {index}, the video has {self.num_frames} (from 0)")
        try:
            return torch.from_numpy(self._source.read(wanted))
        except VideoError:
            raise
        except Exception as error:  # decord and PyAV raise types of their own
            raise VideoError(f"{self.path}: cannot decode frames ({_first_line(error)})") from error

    def changed(self):
        return self._source is None

    def close(self) -> None:
        """Releases the file. Closing twice is fine."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def __len__(self) -> int:
        return self.num_frames

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Video({self.path!r}, {self.num_frames} frames, {self.fps:g} fps, {self.reader})"


class _Source(Protocol):
    """One way to read a video. ``read`` gets valid frame numbers and gives (T, H, W, 3) uint8."""

    name: str
    num_frames: int
    fps: float

    def read(self, indices: Sequence[int]) -> np.ndarray: ...

    def close(self) -> None: ...


def _open(path: str, reader: str) -> _Source:
    if Path(path).is_dir():
        return _Images(path)
    openers = {"decord": _Decord, "av": _Av}
    order = ["av", "decord"] if Path(path).suffix.lower() in _AV_FIRST else ["decord", "av"]
    reasons = []
    for name in order if reader == "auto" else [reader]:
        try:
            return openers[name](path)
        except VideoError:
            raise
        except Exception as error:  # decord and PyAV raise types of their own; ImportError: not installed
            reasons.append(f"{name}: {_first_line(error)}")
    raise VideoError(f"{path}: not a readable video ({'; '.join(reasons)})")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__


class _Decord:
    """decord: fast access to single frames of most files."""

    name = "decord"

    def __init__(self, path: str):
        import av
        import decord

        with av.open(path):  # it raises for what is no video; decord would also write to stderr
            decord.logging.set_level(decord.logging.QUIET)
        self._reader: Any = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        self.num_frames = len(self._reader)
        self.fps = float(self._reader.get_avg_fps())

    def read(self, indices: Sequence[int]) -> np.ndarray:
        batch = self._reader.get_batch(list(indices))
        # What comes back depends on decord's global bridge, which another library may have set.
        return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)

    def close(self) -> None:
        self._reader = None


class _Av:
    """PyAV: reads what FFmpeg reads. Seeks by the packets' timestamps, and decodes from the start where those lie."""

    name = "av"

    def __init__(self, path: str):
        import av

        self._open: Any = lambda: av.open(path)
        self._container: Any = self._open()
        if not self._container.streams.video:
            self.close()
            raise VideoError(f"{path}: file has no video stream")
        rate = self._container.streams.video[0].average_rate
        self.fps = 1.0 if Path(path).suffix.lower() == ".gif" or not rate else float(rate)
        self._times, self._keys = self._timestamps()
        self.num_frames = len(self._times) or sum(1 for _ in self._decode_all())

    def _timestamps(self) -> tuple[list[int], list[int]]:
        """Ascending times of all frames and of the keyframes; empty lists if the packets do not tell them."""
        packets = [p for p in self._container.demux(video=0) if p.size and not p.is_discard]
        times = [packet.pts for packet in packets]
        if None in times or len(set(times)) < len(times):
            return [], []
        return sorted(times), sorted(packet.pts for packet in packets if packet.is_keyframe)

    def _decode_all(self) -> Iterator[Any]:
        with self._open() as container:
            yield from container.decode(video=0)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        wanted = sorted(set(indices))
        found = dict(self._seek(wanted)) if self._keys else {}
        if len(found) < len(wanted):
            frames = enumerate(islice(self._decode_all(), wanted[-1] + 1))
            found = {index: _rgb(frame) for index, frame in frames if index in set(wanted)}
        return np.stack([found[index] for index in indices])

    def _seek(self, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """The ascending ``wanted`` frames, each decoded from the keyframe before it; stops where one is not found."""
        stream, position, decoded = self._container.streams.video[0], None, iter(())
        for index in wanted:
            time = self._times[index]
            key = self._keys[max(0, bisect_right(self._keys, time) - 1)]
            if position is None or key > position:
                self._container.seek(key, stream=stream)
                decoded = self._container.decode(stream)
            frame = next((frame for frame in decoded if frame.pts is None or frame.pts >= time), None)
            if frame is None or frame.pts != time:
                return
            position = time
            yield index, _rgb(frame)

    def close(self) -> None:
        self._container.close()


def _rgb(frame: Any) -> np.ndarray:
    return frame.to_ndarray(format="rgb24")


class _Images:
    """A folder of numbered images."""

    name = "images"

    def __init__(self, path: str):
        numbered = ((_IMAGE.search(file.name), file) for file in Path(path).iterdir())
        self._files = [file for _, file in sorted((int(match[1]), file) for match, file in numbered if match)]
        self.num_frames = len(self._files)
        self.fps = 3.0 if "tvqa" in path else 1.0

    def read(self, indices: Sequence[int]) -> np.ndarray:
        from PIL import Image

        pictures = {}
        for index in set(indices):
            with Image.open(self._files[index]) as image:
                pictures[index] = np.asarray(image.convert("RGB"))
        if len({picture.shape for picture in pictures.values()}) > 1:
            raise VideoError(f"{self._files[0].parent}: images differ in size")
        return np.stack([pictures[index] for index in indices])

    def close(self) -> None:
        pass


_IMAGE = re.compile(r"_(\d+)\.(?:jpe?g|png)$", re.IGNORECASE)

"""Frames and pictures of a record, read and resized beside the model (:mod:`xcomp.decoding`)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from xcomp.config import Sampling
from xcomp.decoding import opened, read_resized
from xcomp.pixels import PixelFormat
from xcomp.sampling import span_frames, uniform_indices
from xcomp.video import Video, VideoError


@dataclass(frozen=True)
class MediaRequest:
    """What is to be read of a record: a video's frames, ``count`` of them or those that the sampling rule takes of the
    ``span``; or ``images``. Plain values, for a process that has no model."""

    pixels: PixelFormat
    images: tuple[str, ...] = ()
    sampling: Sampling | None = None
    count: int | None = None
    span: tuple[float | None, float | None] | None = None
    is_folder: bool = False  # the record says that the video is a folder of frames


@dataclass(frozen=True)
class Media:
    """(T, 3, h, w) uint8; of a video how long it is, and when each frame is shown, from the span's start."""

    pixels: np.ndarray
    seconds: float | None = None
    times: tuple[float, ...] = ()


def read_media(path: str, request: MediaRequest, threads: int) -> Media:
    """Read and resize the frames of the video ``path``, or the pictures of the request.

    Raises:
        VideoError: if they cannot be opened or decoded, or the span holds none.
    """
    if request.images:
        return Media(np.concatenate([_picture(image, request.pixels) for image in request.images]))
    is_folder = os.path.isdir(path)
    if request.is_folder and os.path.exists(path) and not is_folder:
        raise VideoError(f"{path}: is a file, where the record's video_read_type says a folder of frames")
    sampling = request.sampling
    video = opened(path, sampling.reader, threads)
    first, number, seconds = 0, video.num_frames, _seconds(path) or video.duration
    if request.span is not None:
        try:
            first, number, seconds = span_frames(video.num_frames, video.fps, *request.span)
        except VideoError as error:
            raise VideoError(f"{path}: {error}") from error
        # The released training reads spans of folders, which have a frame a second, at their own rate.
        sampling = replace(sampling, rate=1.0) if is_folder else sampling
    chosen = uniform_indices(number, request.count) if request.count else sampling.candidates(number, video.fps)
    indices = [first + index for index in chosen]
    start, *times = video.times([first, *indices])
    return Media(_frames(video, indices, request.pixels), seconds, tuple(time - start for time in times))


def spellings(path: str) -> tuple[str, ...]:
    """A path, and of a .png the .jpg that may stand in its place, as in the released training."""
    return (path, path[:-4] + ".jpg") if path.endswith(".png") else (path,)


def _frames(video: Video, indices: Sequence[int], pixels: PixelFormat) -> np.ndarray:
    """Frames of these numbers in this order; repeats are decoded once."""
    rows = {index: row for row, index in enumerate(sorted(set(indices)))}
    (resized,) = read_resized(video, list(rows), (pixels,))
    return resized if len(rows) == len(indices) else resized[[rows[index] for index in indices]]


def _seconds(path: str) -> float | None:
    """Of a folder of frames, the video's length where a file beside it (``FOLDER.json``) tells it."""
    file = f"{path.rstrip('/')}.json"
    if not os.path.isdir(path) or not os.path.isfile(file):
        return None
    try:
        with open(file, encoding="utf-8") as content:
            return float(json.load(content)["duration"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VideoError(f"{file}: it holds no 'duration' in seconds ({error})") from error


def _picture(path: str, pixels: PixelFormat) -> np.ndarray:
    """A picture (1, 3, h, w) uint8, of the first frame where it moves."""
    from PIL import Image

    there = next((p for p in spellings(path) if os.path.exists(p)), path)
    try:
        with Image.open(there) as image:
            frame = np.array(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises types of its own
        reason = getattr(error, "strerror", None) or f"not a readable picture ({type(error).__name__})"
        raise VideoError(f"{path}: {reason}") from error
    return pixels.resize(torch.from_numpy(frame).unsqueeze(0)).numpy()

"""Which frames of a video are candidates, from its number of frames and its rate alone.

``sample_indices`` implements the frame sampling of VideoChat-Flash (``dynamic_fps1``) and of XComp, which follows
it with more frames and other rules for short videos.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

STYLES = ("videochat_flash", "xcomp", "xcomp_training")
Style = Literal["videochat_flash", "xcomp", "xcomp_training"]


class VideoError(ValueError):
    """A video that cannot be opened or decoded, or a frame that it does not have."""


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


def span_frames(num_frames: int, fps: float, start: float | None, end: float | None) -> tuple[int, int, float]:
    """A span of seconds as frames: the first one, how many there are, and the span's seconds.

    As VideoChat-Flash has it: the end is at most 0.1 s before the video's, and both bounds are rounded down to whole
    frames. A rule that takes candidates of a video takes those of a span from its frames, and counts from the first.
    None stands for the video's own start or end.

    Raises:
        VideoError: if the span is empty, begins before the video or after it, or holds no frame.
    """
    if num_frames < 1:
        raise VideoError("video has no frames")
    seconds = num_frames / fps
    begins, ends = 0.0 if start is None else start, seconds if end is None else end
    said = f"the span from {begins:g} to {ends:g} s"
    if not 0 <= begins < ends:
        raise VideoError(f"{said} is none; it must begin at 0 s or later and end after that")
    if begins >= seconds:
        raise VideoError(f"{said} is outside the video, which lasts {seconds:.2f} s")
    ends = min(ends, seconds - 0.1)
    count = int((ends - begins) * fps)
    if count < 1:
        raise VideoError(f"{said} holds no whole frame of a video of {seconds:.2f} s with {fps:g} frames a second")
    return int(begins * fps), count, ends - begins


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

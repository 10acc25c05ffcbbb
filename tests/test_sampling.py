"""xcomp.sampling against a slow transcription of the rule."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest

from xcomp.sampling import STYLES, VideoError, sample_indices, span_frames, uniform_indices


def slow_rule(num_frames: int, fps: float, rate: float, low: int, high: int, unit: int, style: str) -> list[int]:
    """The rule ``dynamic_fps1``, step by step as it is specified."""
    xcomp, original_low = style != "videochat_flash", low
    if style == "xcomp" and unit > num_frames:
        taken = [math.floor(i * num_frames / unit) for i in range(unit)]
    else:
        if low > num_frames:
            low = math.floor(num_frames / unit) * unit
        n = unit * max(1, int((num_frames / fps) * rate // unit))
        n = min(n, high)
        if xcomp and n > num_frames:
            n = math.floor(num_frames / unit) * unit
        n = max(low, n)
        m = min(n, num_frames)
        b = [int(x) for x in np.linspace(0, num_frames, m + 1)]
        taken = [math.floor((b[i] + b[i + 1] - 1) / 2) for i in range(m)]
        while not xcomp and len(taken) < n:
            taken.append(taken[-1])
    if style == "xcomp" and len(taken) < original_low:
        taken = [taken[math.floor(i * len(taken) / original_low)] for i in range(original_low)]
    return taken


@pytest.mark.parametrize("style", STYLES)
def test_sampling_follows_the_rule(style: str) -> None:
    rng = random.Random(0)
    for _ in range(1500):
        unit = rng.choice([1, 4, 8])
        high = unit * rng.randint(1, 130)
        low = rng.randint(0, high)
        num_frames = rng.choice([rng.randint(1, 40), rng.randint(1, 1000), rng.randint(1, 100_000)])
        fps, rate = rng.choice([1.0, 3.0, 8.0, 23.976, 30000 / 1001, 60.0]), rng.choice([1, 2, 8])
        bounds = {"rate": rate, "min_frames": low, "max_frames": high, "multiple": unit}
        if style == "xcomp_training" and num_frames < unit:
            with pytest.raises(VideoError, match="at least"):
                sample_indices(num_frames, fps, style=style, **bounds)
            continue
        indices = sample_indices(num_frames, fps, style=style, **bounds)
        assert indices == slow_rule(num_frames, fps, rate, low, high, unit, style)
        assert indices == sorted(indices)
        assert 0 <= indices[0] and indices[-1] < num_frames
        assert 1 <= len(indices) <= high


def test_sampling_by_hand() -> None:
    assert len(sample_indices(800, 8.0, min_frames=8)) == 96  # 100 s, in units of 8
    assert sample_indices(16, 1.0, min_frames=0, max_frames=8) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert sample_indices(3, 1.0) == [0, 1, 2, 2, 2, 2, 2, 2]
    assert sample_indices(3, 1.0, min_frames=8, style="xcomp") == [0, 0, 0, 1, 1, 1, 2, 2]
    assert len(sample_indices(20, 1.0, min_frames=128, max_frames=1024, rate=8, style="xcomp")) == 128
    assert len(sample_indices(20, 1.0, min_frames=128, max_frames=1024, rate=8, style="xcomp_training")) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_frames": 500}, "max_frames=500 must be a multiple of 8"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"min_frames": 600}, "min_frames=600"),
        ({"rate": 0}, "rate=0"),
        ({"style": "vcf"}, "style='vcf'"),
    ],
)
def test_sampling_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_indices(100, 8.0, **options)


def test_sampling_needs_frames() -> None:
    with pytest.raises(VideoError, match="no frames"):
        sample_indices(0, 8.0)
    with pytest.raises(VideoError, match="no frames"):
        uniform_indices(0, 4)
    with pytest.raises(ValueError, match="count=0"):
        uniform_indices(10, 0)


def test_uniform_indices() -> None:
    assert uniform_indices(10, 5) == [1, 3, 5, 7, 9]
    assert uniform_indices(2, 4) == [0, 0, 1, 1]
    for num_frames, count in [(7, 3), (100, 64), (12345, 512)]:
        assert uniform_indices(num_frames, count) == [math.floor((i + 0.5) * num_frames / count) for i in range(count)]


@pytest.mark.parametrize(
    "video, span, expected",
    [
        ((240, 8.0), (2.0, 10.0), (16, 64, 8.0)),
        ((240, 8.0), (1.3, 4.95), (10, 29, 3.65)),  # 10.4 and 29.2 frames
        ((240, 8.0), (20.0, 99.0), (160, 79, 9.9)),  # the end is 0.1 s before the video's
        ((240, 8.0), (20.0, None), (160, 79, 9.9)),
        ((240, 8.0), (None, 4.0), (0, 32, 4.0)),
        ((30, 1.0), (3.0, 12.0), (3, 9, 9.0)),  # a folder of images
    ],
)
def test_a_span_as_frames(video, span, expected) -> None:
    first, count, seconds = span_frames(*video, *span)
    assert (first, count) == expected[:2] and seconds == pytest.approx(expected[2])


def test_a_span_never_leaves_the_video() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        num_frames, fps = rng.randint(1, 3000), rng.choice([1.0, 3.0, 8.0, 23.976, 25.0, 60.0])
        start, end = sorted(rng.uniform(0, 1.2 * num_frames / fps) for _ in range(2))
        try:
            first, count, seconds = span_frames(num_frames, fps, start, end)
        except VideoError:
            continue
        assert start < num_frames / fps and 0 <= first < first + count <= num_frames
        assert first / fps <= start and seconds <= end - start + 1e-9


@pytest.mark.parametrize(
    "span, message",
    [
        ((5.0, 5.0), "the span from 5 to 5 s is none"),
        ((-1.0, 5.0), "the span from -1 to 5 s is none; it must begin at 0 s or later"),
        ((30.0, 35.0), "the span from 30 to 35 s is outside the video, which lasts 30.00 s"),
        ((31.0, None), "is none"),
        ((2.0, 2.1), "the span from 2 to 2.1 s holds no whole frame of a video of 30.00 s with 8 frames a second"),
        ((29.95, 30.0), "holds no whole frame"),
    ],
)
def test_a_span_without_frames_is_refused(span, message) -> None:
    with pytest.raises(VideoError, match=message):
        span_frames(240, 8.0, *span)


def test_sampling_needs_no_torch() -> None:
    code = "import sys, xcomp.sampling; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

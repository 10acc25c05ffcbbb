"""Decoding processes: the same bytes as at home, in order, and whatever one does wrong is one error."""

import multiprocessing
import time

import misbehave
import numpy as np
import pytest
import torch

import xcomp
from xcomp.config import Decoding, Sampling
from xcomp.decoding import DecodingPool
from xcomp.pixels import PixelFormat
from xcomp.video import Video, VideoError

SAMPLING = Sampling(rate=2, min_frames=8, max_frames=8)
FORMATS = (PixelFormat(16), PixelFormat(20, crop=12, shortest_edge=True))


@pytest.fixture(scope="module")
def path(needle_videos):
    return xcomp.load_benchmark("needle", **needle_videos).questions()[0].video


@pytest.fixture(scope="module")
def pool():
    with DecodingPool(Decoding(workers=1, threads=1, seconds=3.0, memory=1.0), SAMPLING) as pool:
        yield pool


@pytest.mark.parametrize("workers", [0, 2])
def test_what_comes_back_are_the_resized_frames(path, workers):
    with DecodingPool(Decoding(workers=workers, threads=1), SAMPLING) as pool:
        info, seconds = pool.inspect(path).result()
        pending = [pool.decode(path, frames, FORMATS) for frames in ([0, 3, 8], [31], [5, 6])]
        results = [p.result() for p in pending]
    with Video(path) as video:
        assert (info.num_frames, info.fps, info.duration) == (video.num_frames, video.fps, video.duration)
        assert info.reader == video.reader and len(info.candidates) == len(info.times) == 8 and seconds > 0
        assert list(info.times) == [round(t, 3) for t in video.times(info.candidates)]
        for frames, result in zip(([0, 3, 8], [31], [5, 6]), results):
            whole = video.frames(frames)
            for array, pixel_format in zip(result.arrays, FORMATS):
                assert array.dtype == np.uint8
                assert torch.equal(torch.from_numpy(array), pixel_format.resize(whole))
            assert result.seconds > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_opened_is_a_video_error(tmp_path, workers):
    (tmp_path / "text.mp4").write_text("no video")
    with DecodingPool(Decoding(workers=workers, threads=1), SAMPLING) as pool:
        for name in ("text.mp4", "nothing.mp4"):
            with pytest.raises(VideoError, match=name):
                pool.inspect(str(tmp_path / name)).result()


@pytest.mark.parametrize(
    "function, message",
    [
        (misbehave.die, r"a.mp4: the process that decodes it was ended \(SIGKILL\), twice"),
        (misbehave.abort, r"a.mp4: decoding it ended the process \(SIGABRT\)"),
        (misbehave.hang, "a.mp4: decoding took longer than 3 s; raise decoding.seconds"),
        (misbehave.grow, "a.mp4: decoding takes more memory than decoding.memory allows"),
        (misbehave.stumble, "a.mp4: ZeroDivisionError: by zero"),
    ],
)
def test_whatever_a_process_does_is_one_error_and_the_others_go_on(pool, path, function, message):
    before, started = pool.inspect(path), time.monotonic()
    bad, after = pool.hand_out(function, "a.mp4"), pool.hand_out(misbehave.fine, "b.mp4")
    with pytest.raises(VideoError, match=message) as caught:
        bad.result()
    assert "\n" not in str(caught.value) and time.monotonic() - started < 60
    assert before.result()[0].num_frames == 32 and after.result() == "B.MP4"


def test_what_is_no_longer_wanted_is_given_up(pool):
    hanging = pool.hand_out(misbehave.hang, "a.mp4")
    time.sleep(0.5)
    hanging.cancel()
    assert pool.hand_out(misbehave.fine, "b").result() == "B"


def test_closing_ends_the_processes():
    others = set(multiprocessing.active_children())
    pool = DecodingPool(Decoding(workers=2, threads=1), SAMPLING)
    waiting = pool.hand_out(misbehave.hang, "a.mp4")
    assert pool.hand_out(misbehave.fine, "b").result() == "B"
    pool.close()
    assert waiting.done() and set(multiprocessing.active_children()) <= others


def test_workers_and_threads_follow_from_the_cores(monkeypatch):
    def sizes(cores, ranks=1, **given):
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
        monkeypatch.setattr("xcomp.decoding.Workers", lambda *a, **k: None)
        pool = DecodingPool(Decoding(**given), ranks=ranks)
        return pool.workers, pool.threads

    assert [sizes(n) for n in (1, 2, 4, 16, 64)] == [(1, 1), (1, 2), (2, 2), (4, 4), (4, 16)]
    assert sizes(16, ranks=8) == (1, 2) and sizes(8, workers=8) == (8, 1) and sizes(8, threads=3) == (4, 3)

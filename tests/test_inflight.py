"""A video in flight: what it gives is a function of frame numbers, computed once and in bounded memory."""

import json
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import relative_error

from xcomp.config import Decoding, Memory
from xcomp.decoding import GIGABYTE, Pending, Pixels, VideoInfo
from xcomp.inflight import PixelBudget, VideoInFlight
from xcomp.pixels import PixelFormat
from xcomp.testing import tiny_backbone, video_of
from xcomp.video import VideoError

COUNT = 40
FRAMES = torch.randint(0, 256, (COUNT, 12, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def backbone(monkeypatch):
    """A tiny backbone that lists how many frames each call of ``encode`` got, but for the one that counts products."""
    backbone = tiny_backbone()
    backbone.clip_macs((2, 2))
    backbone.encoded, encode = [], backbone.encode
    monkeypatch.setattr(backbone, "encode", lambda pixels: backbone.encoded.append(len(pixels)) or encode(pixels))
    return backbone


def direct(backbone, frames):
    with torch.no_grad():
        return type(backbone).encode(backbone, backbone.preprocess(FRAMES[list(frames)]))


def test_pixels_are_the_frames_asked_for(backbone):
    other = PixelFormat((4, 6))
    with video_of(FRAMES, backbone) as video:
        for frames in ([5, 3, 3, 39], range(COUNT), [0]):
            assert torch.equal(video.pixels(frames), backbone.pixel_format.resize(FRAMES[list(frames)]))
            assert torch.equal(video.pixels(frames, other), other.resize(FRAMES[list(frames)]))
        assert torch.equal(video.normalised([7, 2]), backbone.preprocess(FRAMES[[7, 2]]))


@torch.no_grad()
def test_clips_are_encoded_once(backbone):
    with video_of(FRAMES, backbone) as video:
        first = video.tokens([0, 1, 2, 3, 10, 20])
        assert relative_error(first, direct(backbone, [0, 1, 2, 3, 10, 20])) < 1e-6 and sum(backbone.encoded) == 6
        again = video.tokens([10, 20, 4, 5, 0, 1])  # two of three clips are known
        assert relative_error(again, direct(backbone, [10, 20, 4, 5, 0, 1])) < 1e-6 and sum(backbone.encoded) == 8
        assert torch.equal(again[4:], first[:2]) and torch.equal(again[:2], first[4:])
        shifted = video.tokens([1, 2])  # frames that are known in another clip
        assert relative_error(shifted, direct(backbone, [1, 2])) < 1e-6 and sum(backbone.encoded) == 10
        with pytest.raises(ValueError, match="a budget of 3 frames does not divide into encoder clips of 2; take 2"):
            video.tokens([1, 2, 3])


@torch.no_grad()
def test_tokens_beyond_the_memory_are_computed_again(backbone):
    clip = 2 * 8 * 32 * 4  # bytes
    memory = Memory(tokens=3 * clip / GIGABYTE)
    with video_of(FRAMES, backbone, memory=memory) as video:
        for _ in range(2):
            assert relative_error(video.tokens(range(12)), direct(backbone, range(12))) < 1e-6
        assert video._tokens.used <= 3 * clip and sum(backbone.encoded) > 12


class Pool:
    """Frames on request, each piece by itself; counts what was decoded and what is on its way."""

    def __init__(self, workers=1, broken=()):
        self.options, self.workers, self.broken = Decoding(chunk=4), workers, set(broken)
        self.decoded, self.on_their_way, self.most = [], 0, 0

    def inspect(self, path, span=None):
        numbers = tuple(range(COUNT))
        info = VideoInfo(path, COUNT, 2.0, COUNT / 2, "test", "test 1", numbers, tuple(n / 2 for n in numbers))
        opened = Future()
        opened.set_result((info, 0.5))
        return Pending(path, 0, opened)

    def decode(self, path, frames, formats):
        self.on_their_way += 1
        self.most = max(self.most, self.on_their_way)

        def run():
            self.on_their_way -= 1
            if self.broken & set(frames):
                raise VideoError(f"{path}: cannot decode")
            self.decoded += frames
            return Pixels(tuple(f.resize(FRAMES[list(frames)]).numpy() for f in formats), 0.25)

        return Pending(path, 0, None, run)


def test_frames_are_decoded_once_for_all_formats_that_were_announced(backbone):
    pool, other = Pool(), PixelFormat((4, 6))
    with VideoInFlight("v", backbone, pool) as video:
        video.expect(lambda info: (info.candidates, (backbone.pixel_format, other)))
        video.pixels(range(COUNT))
        video.pixels(range(COUNT), other)
        assert sorted(pool.decoded) == list(range(COUNT))


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_kept_pixels_stay_within_their_budget(backbone, pieces):
    piece = 4 * 3 * 2 * 2
    budget = PixelBudget(Memory(pixels=pieces * piece / GIGABYTE))
    pool = Pool()
    with VideoInFlight("v", backbone, pool, budget=budget) as video:
        for _ in range(2):
            for frame in range(COUNT):
                assert torch.equal(video.pixels([frame]), backbone.pixel_format.resize(FRAMES[[frame]]))
                held = sum(p.arrays[0].nbytes for p in set(video._frames._pieces.values()) if p.arrays)
                # beyond the budget: the one in use, and two for each worker that are on their way
                assert held <= budget.used <= (pieces + 3) * piece
        assert len(pool.decoded) >= 2 * COUNT - 4 * pieces and pool.most <= pieces + 2
    assert budget.used == 0


def test_videos_in_flight_share_the_budget(backbone):
    piece = 4 * 3 * 2 * 2
    budget, pool = PixelBudget(Memory(pixels=5 * piece / GIGABYTE)), Pool()
    first, second = (VideoInFlight(name, backbone, pool, budget=budget) for name in "ab")
    for video in (first, second):
        video.expect(lambda info: (info.candidates, (backbone.pixel_format,)))
    assert pool.on_their_way == 5 and budget.used == 5 * piece  # all of them for the first
    first.pixels(range(COUNT))
    first.close()
    second.advance()
    assert pool.on_their_way == 5 and torch.equal(second.pixels([3]), backbone.pixel_format.resize(FRAMES[[3]]))
    second.close()
    assert budget.used == 0


def test_a_piece_that_cannot_be_decoded_fails_alone_and_is_not_tried_again(backbone):
    pool = Pool(broken=[9])
    with VideoInFlight("v", backbone, pool) as video:
        for _ in range(2):
            with pytest.raises(VideoError, match="v: cannot decode"):
                video.pixels(range(COUNT))
        assert torch.equal(video.pixels([30]), backbone.pixel_format.resize(FRAMES[[30]]))
        assert pool.decoded.count(0) <= 1 and video._frames._budget.used > 0
    assert video._frames._budget.used == 0


@torch.no_grad()
def test_features_are_computed_once_a_frame(backbone):
    seen = []

    def mean(pixels):
        seen.append(len(pixels))
        return pixels.flatten(1).mean(1, keepdim=True)

    with video_of(FRAMES, backbone) as video:
        for frames in (range(10), [3, 12, 3]):
            found = video.features("mean", frames, mean, PixelFormat((4, 6)), batch_size=4)
            wanted = mean(PixelFormat((4, 6))(FRAMES[list(frames)]))
            seen.pop()
            assert torch.equal(found, wanted)
        assert seen == [4, 4, 2, 1]


@torch.no_grad()
def test_costs_go_to_those_who_needed_them(backbone):
    pool = Pool()
    with VideoInFlight("v", backbone, pool) as video:
        with video.ledger.work("prefill") as one:
            video.tokens([0, 1, 2, 3])
        with video.ledger.work("prefill") as two:
            video.tokens([2, 3, 20, 21])
        stages = {name: [w for w in work.all() if w.stage == name] for name, work in (("vision", one), ("decode", one))}
        assert len(stages["vision"]) == 2 and all(w.macs == backbone.clip_macs((2, 2)) for w in stages["vision"])
        assert sum(w.seconds for w in stages["decode"]) == 0.75  # opening it, and the one piece
        both = {w for w in one.all() & two.all() if w.stage == "vision"}
        assert len(both) == 1 and one not in two.all()


def test_states_are_kept_only_if_asked(backbone):
    made = []

    class Layer:
        keys = values = torch.zeros(10)

    def compute(work):
        made.append(work)
        return type("State", (), {"cache": type("Cache", (), {"layers": [Layer()]})})

    for keep, count in ((False, 4), (True, 2)):
        made.clear()
        with video_of(FRAMES, backbone, keep_states=keep) as video:
            for key in ("a", "a", "b", "a"):
                video.state(key, "prefill", compute)
            video.release_states()
            video.state("a", "prefill", compute)
        assert len(made) == count


# --- real files -------------------------------------------------------------------------------------------------------

MEMORY = """
import sys, json
import torch
from xcomp.config import Decoding, Memory, Sampling
from xcomp.decoding import DecodingPool
from xcomp.inflight import VideoInFlight
from xcomp.memory import PeakMemory
from xcomp.tiny import tiny_backbone
from pathlib import Path

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

torch.set_num_threads(1)
backbone, sampling = tiny_backbone(), Sampling(rate=25, min_frames=8, max_frames=int(sys.argv[2]))
with torch.no_grad(), DecodingPool(Decoding(workers=0, threads=1), sampling) as pool:
    with VideoInFlight(sys.argv[1], backbone, pool) as video:
        video.pixels(video.candidates[:1])
    before = resident()
    with PeakMemory(torch.device("cpu")) as peak, VideoInFlight(sys.argv[1], backbone, pool, Memory()) as video:
        tokens = video.tokens(video.candidates)
    print(json.dumps([len(video.candidates), len(tokens), (peak.bytes["host"] - before) / 1e6]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peak memory")
def test_memory_does_not_grow_with_the_frames_nor_with_their_size(tmp_path):
    """480 frames of 1.2 MB each are 590 MB; what the model's process may take for them is a few."""
    path = tmp_path / "large.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "25"})
        stream.width, stream.height, stream.pix_fmt = 854, 480, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((480, 854, 3), np.uint8), format="rgb24")
        for _ in range(480):
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    grown = {}
    for count in (40, 480):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(path), str(count)], capture_output=True, text=True, check=True
        )
        frames, groups, grown[count] = json.loads(done.stdout)
        assert frames == groups == count
    assert grown[480] < 60 and grown[480] < grown[40] + 20, grown

"""Video files with random damage, read by every reader in decoding processes: what comes of each, and of this process.

Used by ``perf/reliability.py fuzz``. Every file follows from the seed and its number.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xcomp.config import Decoding, Sampling
from xcomp.decoding import DecodingPool, read_resized
from xcomp.pixels import PixelFormat
from xcomp.readers import AvReader
from xcomp.stream import VideoStream
from xcomp.video import Video, VideoError

READERS = ("auto", "av", "decord")
BASES = (
    *("h264 with B-frames", "h264 with open groups in mkv", "h264 in ts", "h264 in fragments", "h264 in flv"),
    *("h264 in avi", "h265 with closed groups", "mpeg4 with B-frames in avi", "mpeg2 in ps", "vp9", "av1"),
    *("mjpeg in avi", "edit list", "vp8", "gif"),
)
FORMAT = PixelFormat(64)
FRAMES = 8  # of each file
DECODING = Decoding(workers=1, threads=1, seconds=20.0, memory=0.5)
TOLERANCE = 2  # levels; two builds of FFmpeg convert YUV to RGB
MEGABYTE = 1024**2


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(data: bytearray, rng: random.Random) -> bytearray:
    """Single bits, anywhere."""
    for _ in range(2 ** rng.randint(0, 6)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def cut(data: bytearray, rng: random.Random) -> bytearray:
    """The end, or a piece from within."""
    first, last = sorted(rng.randrange(1, len(data)) for _ in range(2))
    return data[:last] if rng.random() < 0.5 else data[:first] + data[first + (last - first) // 4 :]


def swap(data: bytearray, rng: random.Random) -> bytearray:
    """Two blocks."""
    size = min(len(data) // 4, 2 ** rng.randint(2, 11))
    first, second = (rng.randrange(len(data) - size) for _ in range(2))
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )
    return data


def patch(data: bytearray, rng: random.Random) -> bytearray:
    """Numbers where headers stand, by extreme ones."""
    for _ in range(rng.randint(1, 4)):
        size = rng.choice((1, 2, 4, 8))
        near = rng.randrange(min(2048, len(data) - size))
        at = near if rng.random() < 0.5 else len(data) - size - near
        value = rng.choice((0, 1, (1 << 8 * size) - 1, (1 << 8 * size - 1) - 1, rng.getrandbits(8 * size)))
        data[at : at + size] = value.to_bytes(size, rng.choice(("big", "little")))
    return data


DAMAGES: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (flip, cut, swap, patch)


def damaged(bases: Sequence[bytes], seed: int, number: int) -> tuple[int, str, bytes]:
    """Which base, what was done to it, and the file."""
    rng = random.Random(f"{seed} {number}")
    base, damage = rng.randrange(len(bases)), DAMAGES[number % len(DAMAGES)]
    return base, damage.__name__, bytes(damage(bytearray(bases[base]), rng))


# --- in the decoding processes ----------------------------------------------------------------------------------------


def from_the_start(path: str, frames: Sequence[int]) -> list[list[tuple[np.ndarray, bool]]]:
    """For each frame number what decoding from the first packet to the last gives: one picture, several of one time, or
    none; and of each whether it is damaged: called so, or left over from before, as where there was nothing to draw.
    """
    reader, found, recent = AvReader(path), {}, []
    times = reader.timeline.times
    names = [int(times[frame]) for frame in frames] if len(times) else list(frames)
    for number, frame in enumerate(VideoStream(path).restart()):
        name = frame.pts if len(times) else number
        picture = read_resized(_One(reader.pictures(frame)), [0], [FORMAT])[0][0]
        if name is not None and name in names:
            left_over = any(np.array_equal(picture, before) for before in recent)
            found.setdefault(name, []).append((picture, left_over or frame.is_corrupt))
        recent = [*recent[-3:], picture]
    return [found.get(name, []) for name in names]


class _One:
    """A picture as the video of that picture."""

    def __init__(self, picture: np.ndarray):
        self.picture = picture

    def read(self, frames: Sequence[int]) -> Any:
        return iter([(0, self.picture)])


def look(path: str, reader: str, seed: str) -> tuple[list[int], np.ndarray]:
    """Some frames of a file, in two pieces, the later first.

    By one thread: with more, what FFmpeg makes of damaged pictures, and which it drops, is another for each number.
    """
    with Video(path, reader) as video:
        rng = random.Random(seed)
        frames = sorted(rng.sample(range(video.num_frames), min(FRAMES, video.num_frames)))
        split = rng.randint(0, len(frames))
        pieces = [read_resized(video, part, [FORMAT])[0] for part in (frames[split:], frames[:split]) if part]
    return frames, np.concatenate(pieces[::-1])


# --- in the caller ----------------------------------------------------------------------------------------------------


def fuzz(count: int, seed: int, place: Path) -> list[dict[str, Any]]:
    """A row for each base, reader and outcome, and one that tells of this process."""
    from video_kinds import KINDS

    bases, sound = [], []
    for name in BASES:
        path = place / f"base{len(bases)}{KINDS[name].suffix}"
        KINDS[name].make(path)
        bases.append(path.read_bytes())
        with Video(path) as video:
            sound.append(read_resized(video, range(video.num_frames), [FORMAT])[0])
    counts: Counter[tuple[str, str, str]] = Counter()
    pools = {name: DecodingPool(DECODING, Sampling(reader=name)) for name in (*READERS, "from the start")}
    began, held, slowest, wrong = time.perf_counter(), 0, 0.0, []
    try:
        for number in range(count):
            if number == count // 10:  # by then everything that is loaded once was
                held = _held()
            base, damage, data = damaged(bases, seed, number)
            path = place / f"fuzzed{KINDS[BASES[base]].suffix}"
            path.write_bytes(data)
            outcomes, longest = examine(str(path), pools, sound[base], f"{seed} {number}")
            slowest = max(slowest, longest)
            for reader, outcome in outcomes.items():
                counts[BASES[base], reader, outcome] += 1
                if outcome.startswith("wrong"):
                    wrong.append((number, BASES[base], damage, reader, outcome))
            if number % 500 == 499:
                print(f"{number + 1} files in {time.perf_counter() - began:.0f} s", flush=True)
    finally:
        for pool in pools.values():
            pool.close()
    for found in wrong[:50]:
        print("number {}, {}, {}, reader {}: {}".format(*found))
    grown = round((_held() - held) / MEGABYTE, 1)
    about = {"command": "fuzz", "seed": seed, "files": count, "caller_grown_mb": grown}
    about["slowest_answer_s"] = round(slowest, 1)
    columns = ("base", "reader", "outcome")
    return [{**about, **dict(zip(columns, key)), "count": found} for key, found in sorted(counts.items())]


def examine(path: str, pools: dict[str, DecodingPool], sound: np.ndarray, seed: str) -> tuple[dict[str, str], float]:
    """What each reader makes of a file, and the longest time that one of them took to say so.

    ``sound``: the pictures of the file before it was damaged.
    """
    began = time.perf_counter()
    pending = {name: pools[name].hand_out(look, path, name, seed) for name in READERS}
    results: dict[str, Any] = {}
    for name, work in pending.items():
        try:
            results[name] = work.result()
        except VideoError as error:
            results[name] = error
    longest = time.perf_counter() - began
    asked = {name: tuple(result[0]) for name, result in results.items() if not isinstance(result, VideoError)}
    expected: dict[tuple[int, ...], Any] = {}
    for frames in set(asked.values()):
        try:
            expected[frames] = pools["from the start"].hand_out(from_the_start, path, frames).result()
        except VideoError as error:
            expected[frames] = error
    outcomes = {}
    for name, result in results.items():
        if isinstance(result, VideoError):
            outcomes[name] = _kind_of_error(str(result))
        else:
            outcomes[name] = _compare(name, result[1], expected[asked[name]], sound)
    return outcomes, longest


def _kind_of_error(text: str) -> str:
    kinds = {
        "use reader: av or auto": "refused for this reader",
        "ended the process": "process ended",
        "was ended": "process ended",
        "took longer than": "given up after the limit",
        "more memory than": "more memory than allowed",
    }
    return next((kind for part, kind in kinds.items() if part in text), "VideoError")


def _compare(
    reader: str, ours: np.ndarray, theirs: list[list[tuple[np.ndarray, bool]]] | VideoError, sound: np.ndarray
) -> str:
    if isinstance(theirs, VideoError):
        return "frames, but not from the start"
    outcome = "equal frames"
    for picture, candidates in zip(ours, theirs, strict=True):
        if not candidates:
            if reader == "decord":  # which counts, and may have taken another for it
                return "wrong: a frame that is not there"
            outcome = "frames that are lost from the start"  # known by their time, found by a seek
            continue
        if min(_difference(picture, other) for other, _ in candidates) > TOLERANCE:
            # What a decoder makes of a damaged picture is its own affair, and of what it decoded before.
            other, is_damaged = candidates[0]
            if not is_damaged and any(_difference(other, known) <= TOLERANCE for known in sound):
                return "wrong: other frames"
            outcome = "equal but for damaged pictures"
    return outcome


def _difference(ours: np.ndarray, theirs: np.ndarray) -> int:
    return int(np.abs(ours.astype(np.int16) - theirs).max())


def _held() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def show(rows: list[dict[str, Any]]) -> bool:
    """Print outcomes by reader; whether no frame was wrong and this process held out."""
    print(f"{'outcome':<36}" + "".join(f"{name:>9}" for name in READERS))
    for outcome in sorted({row["outcome"] for row in rows}):
        sums = [sum(r["count"] for r in rows if (r["reader"], r["outcome"]) == (name, outcome)) for name in READERS]
        print(f"{outcome:<36}" + "".join(f"{number:>9}" for number in sums))
    print("slowest answer {slowest_answer_s} s; the caller grew by {caller_grown_mb} MB".format(**rows[0]))
    return not any(row["outcome"].startswith("wrong") for row in rows) and rows[0]["caller_grown_mb"] < 100

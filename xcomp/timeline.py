"""Which frames a video stream has and when each is shown: told by its packets, by decoding where those do not suffice.

Times are in ticks, the stream's unit of time, if nothing else is said.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np

from xcomp.sampling import VideoError
from xcomp.stream import VideoStream

NO_TIME = -(2**63)  # stands for a missing timestamp, as in FFmpeg


@dataclass(frozen=True)
class Timeline:
    """The frames of a stream in the order they are shown.

    tick: seconds.
    starts: (num_frames,) float64 seconds, when each frame is shown, counted from the first.
    times: (num_frames,) int64 ascending, by which a decoded frame is known; empty if only counting tells which it is.
    keys: (K, 3) int64 ascending: number, presentation and decoding time of the frames that decoding can begin with.
    key_bytes: sizes of these frames' packets and of those that an edit list leaves out, by presentation time.
    doubts: what makes frames hard to find, to be read after "files with".
    """

    fps: float
    tick: Fraction
    starts: np.ndarray
    times: np.ndarray
    keys: np.ndarray
    key_bytes: dict[int, int]
    doubts: tuple[str, ...]

    def number(self, time: int | None) -> int | None:
        """The frame that is shown at this time, if one is."""
        if time is None:
            return None
        number = int(np.searchsorted(self.times, time))
        return number if number < len(self.times) and self.times[number] == time else None

    def keys_before(self, index: int) -> list[list[int]]:
        """The last two of ``keys`` that are not shown after this frame, as far as there are any."""
        end = int(np.searchsorted(self.keys[:, 0], index, side="right"))
        return self.keys[max(0, end - 2) : end].tolist()


@dataclass(frozen=True)
class Packets:
    """Columns of a stream's packets, in the order they are stored."""

    pts: np.ndarray
    dts: np.ndarray
    size: np.ndarray  # bytes
    key: np.ndarray
    discard: np.ndarray  # decoded but not shown: an edit list leaves it out
    hidden: np.ndarray  # decoded but not shown: a reference for others
    damaged: np.ndarray

    @property
    def shown(self) -> np.ndarray:
        return ~(self.discard | self.hidden)


def survey(stream: VideoStream) -> tuple[Timeline, Any]:
    """The timeline of a stream that was just opened, and its first frame.

    Raises:
        VideoError: if no frame can be decoded.
    """
    packets = _from_index(stream) or _from_demuxer(stream)
    # These store an order and no presentation times; FFmpeg's guess of them goes wrong where frames are reordered.
    timeless = stream.reorders and stream.format in ("avi", "asf")
    if timeless or packets.damaged.any():
        stream.threads = 1  # at the end of a file, PyAV loses the frames of other threads to one's error
    first = next(stream.restart(), None)
    if first is None:
        raise VideoError("video has no frames")
    doubts = _doubts(stream, packets, timeless)
    times = None
    if not doubts:
        times = packets.pts[packets.shown] if timeless else _told_by(packets, stream, first.pts)
    if times is None:
        stream.threads = 1
        times = np.array([NO_TIME if frame.pts is None else frame.pts for frame in stream.restart()], np.int64)
    ascend = not timeless and NO_TIME not in times and bool(np.all(np.diff(times) >= 0))
    fps = _rate(stream, times if ascend else times[:0])
    starts = np.arange(len(times)) / fps
    if ascend and stream.format != "gif":
        starts = (times - times[0]) * stream.tick.numerator / stream.tick.denominator
    if not ascend or np.any(np.diff(times) == 0):
        doubts.append("frames that only counting tells apart")
        times = times[:0]
    doubts += _doubts_of_seeking(packets, times)
    keys, key_bytes = _keys(packets, times), _key_bytes(packets)
    return Timeline(fps, stream.tick, starts, times, keys, key_bytes, tuple(doubts)), first


def _from_index(stream: VideoStream) -> Packets | None:
    """Packets as the container's index lists them, if that holds all: reading an hour of packets takes seconds."""
    entries = stream.stream.index_entries
    if not stream.format.startswith("mov") or stream.reorders or stream.codec == "vp8":
        return None  # only MP4 lists every packet, with decoding times; VP8's hidden frames show in the packets
    if not len(entries) or len(entries) != stream.stream.frames:
        return None
    rows = [(e.timestamp, e.size, e.is_keyframe, e.is_discard, e.pos + e.size) for e in entries]
    times, sizes, keys, discards, ends = (np.array(column) for column in zip(*rows))
    first = next(stream.packets(), None)
    if first is None or not first.pts == first.dts == times[0]:
        return None
    if any(discards) or min(sizes) < 1 or max(ends) > stream.container.size:
        return None
    no = np.zeros(len(rows), bool)
    return Packets(times, times, sizes, keys.astype(bool), no, no, no)


def _from_demuxer(stream: VideoStream) -> Packets:
    pts, dts, size = array("q"), array("q"), array("q")
    key, discard, hidden, damaged = array("b"), array("b"), array("b"), array("b")
    hides = stream.codec == "vp8"
    for packet in stream.packets():  # an hour has 100,000
        pts.append(NO_TIME if packet.pts is None else packet.pts)
        dts.append(NO_TIME if packet.dts is None else packet.dts)
        size.append(packet.size)
        key.append(packet.is_keyframe)
        discard.append(packet.is_discard)
        damaged.append(packet.is_corrupt)
        hidden.append(hides and not memoryview(packet)[0] & 0x10)  # the bit show_frame
    marks = [np.array(mark, bool) for mark in (key, discard, hidden, damaged)]
    marks[-1][-1:] |= stream.broken_off
    return Packets(*(np.array(column, np.int64) for column in (pts, dts, size)), *marks)


def _doubts(stream: VideoStream, packets: Packets, timeless: bool) -> list[str]:
    """What makes packets and frames differ, so that only decoding tells which frames there are."""
    pts, dts = packets.pts[packets.shown], packets.dts[packets.dts != NO_TIME]
    found = {
        "packets without timestamps": not timeless and np.any(pts == NO_TIME),
        "doubled timestamps": not timeless and np.any(np.diff(np.sort(pts)) == 0),
        "timestamps that go back": not timeless and np.any(np.diff(dts) < 0),
        "damaged packets": np.any(packets.damaged[:-1]),
        "presentation times that are decoding times": not timeless and _are_decoding_times(stream, packets),
        # An MPEG-4 picture may be not coded: a header of a few bytes, and no frame.
        "pictures that are not coded": stream.codec == "mpeg4" and np.any(packets.size <= 16),
    }
    return [doubt for doubt, holds in found.items() if holds]


def _are_decoding_times(stream: VideoStream, packets: Packets) -> bool:
    """Whether frames come out of the decoder in another order than their packets' times, as some programs write them.

    Told by the first frames, and only where it may be: where the decoder reorders and the times ascend as stored.
    """
    if not stream.stream.codec_context.reorder_depth or np.any(np.diff(packets.pts) < 0):
        return False
    times = [frame.pts for frame in islice(stream.restart(), 64)]
    return None not in times and times != sorted(times)


def _told_by(packets: Packets, stream: VideoStream, first: int | None) -> np.ndarray | None:
    """Times of all frames; None if the packets do not tell them after all. ``first``: of the first decoded frame.

    A stream cut out of another begins and ends with packets that give no frame.
    """
    times = np.sort(packets.pts[packets.shown])
    if first not in times:
        return None
    times = times[times >= first]
    if packets.damaged[-1:].any():
        keys = _keys(packets, times)
        if not len(keys):
            return None
        landing = stream.seek(keys[-1, 1:].tolist(), _key_bytes(packets), int(keys[-1, 1]))
        if landing is None:
            return None
        decoded = [frame.pts for frame in landing[1] if frame.pts is not None]
        times = times[(times < landing[0]) | np.isin(times, decoded)]
    return times


def _keys(packets: Packets, times: np.ndarray) -> np.ndarray:
    """``Timeline.keys``."""
    chosen = packets.key & packets.shown & np.isin(packets.pts, times)
    pts, dts = packets.pts[chosen], packets.dts[chosen]
    keys = np.stack([np.searchsorted(times, pts), pts, np.where(dts == NO_TIME, pts, dts)], axis=1)
    return keys[np.argsort(keys[:, 0])]


def _key_bytes(packets: Packets) -> dict[int, int]:
    """``Timeline.key_bytes``."""
    return dict(zip(packets.pts[packets.key].tolist(), packets.size[packets.key].tolist()))


def _doubts_of_seeking(packets: Packets, times: np.ndarray) -> list[str]:
    """What PyAV reads right, and readers that number frames from a keyframe do not."""
    pts = packets.pts[packets.shown]
    rank = np.empty(len(pts), np.int64)
    rank[np.argsort(pts)] = np.arange(len(pts))
    keys = np.flatnonzero(packets.key[packets.shown])
    found = {
        "an edit list": packets.discard.any(),
        "hidden frames": packets.hidden.any(),
        "a damaged end": packets.damaged[-1:].any(),
        "packets that give no frame": len(times) and len(times) != len(pts),
        "no keyframes": not len(keys),
        "open groups of pictures": np.any(rank[keys] != keys),
    }
    return [doubt for doubt, holds in found.items() if holds]


def _rate(stream: VideoStream, times: np.ndarray) -> float:
    """Frames a second: the container's figure, else what the timestamps say. Animated GIFs: 1, by agreement."""
    if stream.format == "gif":
        return 1.0
    rate = float(stream.stream.average_rate or 0)
    gaps = np.diff(times) * float(stream.tick)
    told = [1 / float(gap) for gap in (gaps.mean(), np.median(gaps)) if gap > 0] if len(gaps) else []
    if math.isfinite(rate) and rate > 0 and not all(max(rate / t, t / rate) > 2 for t in told or [rate]):
        return rate
    return told[0] if told else float(stream.stream.guessed_rate or 1)

"""Kinds of video files for the tests of reading: codecs, containers, orders of frames, timestamps, turned pictures.

Every picture shows its number, so that what a file should give is known without any decoder. All are made by PyAV, or
by patching a few bytes of what it made.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

COUNT, HEIGHT, WIDTH, RATE = 40, 64, 64, 10
Picture = np.ndarray
X265 = "log-level=none:pools=none:frame-threads=1"


@dataclass(frozen=True)
class Kind:
    """A way to make a file, and the numbers of the pictures it should give; none where that is up to the decoder.

    turn: what the file asks to be done to them. starts: seconds at which they are shown, if not a tenth of the number.
    """

    make: Callable[[Path], None]
    suffix: str
    numbers: Sequence[int] | None = range(COUNT)
    turn: Callable[[Picture], Picture] = field(default=lambda picture: picture)
    starts: Sequence[float] | None = None


def draw(number: int) -> Picture:
    """(H, W, 3) uint8: a picture that shows ``number``, below 64, as six blocks, and moves."""
    picture = np.full((HEIGHT, WIDTH, 3), (30 + number // 8 * 10, 60, 90), np.uint8)
    for bit in range(6):
        if number >> bit & 1:
            picture[4:20, 2 + 10 * bit : 10 + 10 * bit] = (220, 220, 60)
    picture[24 + number % 20 :][:4, number % 50 :][:, :12] = (60, 240, 120)
    return picture


def number_of(picture: Picture) -> int:
    """What ``draw`` drew."""
    blocks = [picture[7:17, 4 + 10 * bit : 8 + 10 * bit, 0].mean() > 150 for bit in range(6)]
    return sum(1 << bit for bit, lit in enumerate(blocks) if lit)


def encode(
    path: Path,
    codec: str,
    options: dict[str, str] | None = None,
    *,
    numbers: Sequence[int] = range(COUNT),
    rate: int = RATE,
    times: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    container: dict[str, str] | None = None,
) -> None:
    """``times``: when each picture is shown, in hundredths of a second. ``container``: options of the muxer."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        stream.codec_context.thread_count = 1
        if times:
            stream.codec_context.time_base = Fraction(1, 100)
        for i, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 100)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def copied(
    make: Callable[[Path], None], change: Callable[[Any], None], container: dict[str, str] | None = None
) -> Callable[[Path], None]:
    """The packets of an MP4 with other times."""

    def derive(source: Path, target: Path) -> None:
        with av.open(str(source)) as old, av.open(str(target), "w", options=container or {}) as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.size:
                    change(packet)
                    packet.stream = stream
                    new.mux(packet)

    return derived(make, ".mp4", derive)


def shifted(seconds: int) -> Callable[[Any], None]:
    def change(packet: Any) -> None:
        ticks = int(seconds / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks

    return change


def h264(x264: str = "bframes=2", **more: Any) -> Callable[[Path], None]:
    """A keyframe every 12 pictures. ``x264``: its options, as in ``bframes=2:open-gop=1``."""
    settings = {"preset": "medium", "x264-params": f"keyint=12:min-keyint=12:scenecut=0:{x264}"}
    return lambda path: encode(path, "libx264", settings, **more)


def h265(x265: str) -> Callable[[Path], None]:
    settings = {"preset": "fast", "x265-params": f"{X265}:keyint=12:min-keyint=12:scenecut=0:{x265}"}
    return lambda path: encode(path, "libx265", settings)


def mpeg(codec: str, b_frames: int = 2, **more: Any) -> Callable[[Path], None]:
    return lambda path: encode(path, codec, {"bf": str(b_frames), "g": "12", "b": "800000"}, **more)


def plain(codec: str, pix_fmt: str = "yuv420p", **options: str) -> Callable[[Path], None]:
    return lambda path: encode(path, codec, {"g": "12", "b": "800000"} | options, pix_fmt=pix_fmt)


def derived(make: Callable[[Path], None], suffix: str, derive: Callable[[Path, Path], None]) -> Callable[[Path], None]:
    """A file made of another one, whose suffix is ``suffix``."""

    def build(path: Path) -> None:
        source = path.with_name(f"source-{path.stem}{suffix}")
        make(source)
        derive(source, path)

    return build


def patched(make: Callable[[Path], None], patch: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A file with other bytes."""

    def build(path: Path) -> None:
        make(path)
        path.write_bytes(patch(path.read_bytes()))

    return build


def matrix(a: float, b: float, c: float, d: float) -> Callable[[bytes], bytes]:
    """Sets the display matrix of an MP4's only track: x' = a x + c y, y' = b x + d y."""

    def patch(data: bytes) -> bytes:
        at = data.index(b"tkhd") + 4 + 40
        rows = [int(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)]
        return data[:at] + struct.pack(">9i", *rows, 1 << 30) + data[at + 36 :]

    return patch


def turned(a: int, b: int, c: int, d: int, turn: Callable[[Picture], Picture]) -> Kind:
    return Kind(patched(h264(), matrix(a, b, c, d)), ".mp4", turn=turn)


def edited(*parts: tuple[int, int]) -> Callable[[bytes], bytes]:
    """Replaces an MP4's edit list, given each part's first picture and how many there are."""

    def boxes(data: bytes, names: Sequence[bytes]) -> Iterator[int]:
        at = 0
        for name in names:
            while data[at + 4 : at + 8] != name:
                at += int.from_bytes(data[at : at + 4], "big")
            yield at
            at += 8

    def patch(data: bytes) -> bytes:
        *around, at = boxes(data, [b"moov", b"trak", b"edts", b"elst"])
        size = int.from_bytes(data[at : at + 4], "big")
        rows = [struct.pack(">IiI", count * 1000 // RATE, first * 10240 // RATE, 1 << 16) for first, count in parts]
        box = struct.pack(">I4sII", 16 + 12 * len(rows), b"elst", 0, len(rows)) + b"".join(rows)
        patched = bytearray(data[:at] + box + data[at + size :])
        for outer in around:  # what is stored comes before them, and stays where it is
            patched[outer : outer + 4] = struct.pack(">I", int.from_bytes(data[outer:][:4], "big") + len(box) - size)
        return bytes(patched)

    return patch


def renamed_box(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(old, new, 1)


def cut(begin: float, end: float, unit: int = 1) -> Callable[[bytes], bytes]:
    """A part of a file, its ends as shares of the whole, in units of so many bytes."""

    def patch(data: bytes) -> bytes:
        units = len(data) // unit
        return data[int(units * begin) * unit : int(units * end) * unit]

    return patch


def pack(source: Path, target: Path) -> None:
    """MPEG-4 in AVI as early encoders stored it: a B-frame shares the packet of its successor, then comes a dummy."""
    with av.open(str(source)) as file:
        stored = [(bytes(packet), packet.is_keyframe) for packet in file.demux(video=0) if packet.size]
        template = file.streams.video[0]
        vop, mark = b"\0\0\1\xb6", b"\0\0\1\xb2DivX503b1393p"  # p: packed
        types = [data[data.rindex(vop) + 4] >> 6 for data, _ in stored]  # 0 I, 1 P, 2 B
        packets = []
        for i, (data, key) in enumerate(stored):
            if types[i] == 2:
                packets.append((vop + bytes([0b01010000, 0b10111111]), False))  # a P-frame, not coded
            else:
                follows = i + 1 < len(stored) and types[i + 1] == 2
                packets.append((data.replace(vop, mark + vop) + (stored[i + 1][0] if follows else b""), key))
        with av.open(str(target), "w") as new:
            stream = new.add_stream_from_template(template)
            for i, (data, key) in enumerate(packets):
                packet = av.Packet(data)
                packet.pts = packet.dts = i
                packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, RATE), key, stream
                new.mux(packet)


def double(packet: Any) -> None:
    """Every second frame is shown when its predecessor is."""
    step = int(Fraction(1, RATE) / packet.time_base)
    packet.pts = packet.dts = packet.pts // (2 * step) * 2 * step


def with_cover(path: Path) -> None:
    """A picture on the sleeve comes first among the streams."""
    source = path.with_name("source-cover.mp4")
    h264()(source)
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        cover = new.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 200, 200, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = new.add_stream_from_template(old.streams.video[0])
        picture = av.VideoFrame.from_ndarray(np.zeros((200, 200, 3), np.uint8), format="rgb24")
        new.mux([*cover.encode(picture), *cover.encode()])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)


UNEVEN = [i * 10 + i % 3 * 4 + (200 if i > 25 else 0) for i in range(COUNT)]

KINDS: dict[str, Kind] = {
    # H.264: how frames depend on each other
    "h264 without B-frames": Kind(h264("bframes=0"), ".mp4"),
    "h264 with B-frames": Kind(h264(), ".mp4"),
    "h264 with a pyramid of B-frames": Kind(h264("bframes=6:b-pyramid=normal:ref=5"), ".mp4"),
    "h264 of keyframes alone": Kind(h264("keyint=1"), ".mp4"),
    "h264 with open groups": Kind(h264("bframes=3:open-gop=1:b-adapt=0"), ".mp4"),
    "h264 with open groups in mkv": Kind(h264("bframes=3:open-gop=1:b-adapt=0"), ".mkv"),
    "h264 with open groups in ts": Kind(h264("bframes=3:open-gop=1:b-adapt=0"), ".ts"),
    "h264 refreshed without keyframes": Kind(h264("bframes=0:intra-refresh=1"), ".mp4"),
    # and where it is stored
    "h264 in mkv": Kind(h264(), ".mkv"),
    "h264 in mov": Kind(h264(), ".mov"),
    "h264 in ts": Kind(h264(), ".ts"),
    "h264 in flv": Kind(h264(), ".flv"),
    "h264 in avi": Kind(h264(), ".avi"),
    "h264 in asf": Kind(h264(), ".wmv"),
    "h264 alone": Kind(h264(), ".h264", starts=[i / 25 for i in range(COUNT)]),
    "h264 in fragments": Kind(h264(container={"movflags": "frag_keyframe+empty_moov"}), ".mp4"),
    "h264 called all keyframes": Kind(patched(h264("bframes=0"), renamed_box(b"stss", b"free")), ".mp4"),
    "h264 in avi called mp4": Kind(derived(h264(), ".avi", lambda old, new: new.write_bytes(old.read_bytes())), ".mp4"),
    "h264 behind a cover": Kind(with_cover, ".mp4"),
    # H.265, MPEG-1, -2, -4
    "h265 with closed groups": Kind(h265("open-gop=0:bframes=3"), ".mp4"),
    "h265 with open groups": Kind(h265("open-gop=1:bframes=3:b-adapt=0"), ".mp4"),
    "h265 with open groups in mkv": Kind(h265("open-gop=1:bframes=3:b-adapt=0"), ".mkv"),
    "mpeg4 without B-frames": Kind(mpeg("mpeg4", 0), ".mp4"),
    "mpeg4 with B-frames": Kind(mpeg("mpeg4"), ".mp4"),
    "mpeg4 with B-frames in mkv": Kind(mpeg("mpeg4"), ".mkv"),
    "mpeg4 with B-frames in avi": Kind(mpeg("mpeg4"), ".avi"),
    "mpeg4 in avi, packed": Kind(derived(mpeg("mpeg4", 1), ".avi", pack), ".avi"),
    "mpeg4 called all keyframes": Kind(patched(mpeg("mpeg4", 0), renamed_box(b"stss", b"free")), ".mp4"),
    "mpeg2 in mp4": Kind(mpeg("mpeg2video", rate=25), ".mp4", starts=[i / 25 for i in range(COUNT)]),
    "mpeg2 in mkv": Kind(mpeg("mpeg2video", rate=25), ".mkv", starts=[i / 25 for i in range(COUNT)]),
    "mpeg2 in ts": Kind(mpeg("mpeg2video", rate=25), ".ts", starts=[i / 25 for i in range(COUNT)]),
    "mpeg2 in ps": Kind(mpeg("mpeg2video", rate=25), ".vob", starts=[i / 25 for i in range(COUNT)]),
    "mpeg1 in ps": Kind(mpeg("mpeg1video", rate=25), ".mpg", starts=[i / 25 for i in range(COUNT)]),
    # other codecs
    "vp8": Kind(plain("libvpx", deadline="realtime"), ".webm"),
    "vp9": Kind(plain("libvpx-vp9", deadline="realtime", **{"cpu-used": "8"}), ".webm"),
    "av1": Kind(plain("libsvtav1", preset="12"), ".mp4"),
    "wmv": Kind(plain("wmv2"), ".wmv"),
    "mjpeg in avi": Kind(plain("mjpeg", "yuvj420p"), ".avi"),
    "prores": Kind(plain("prores_ks", "yuv422p10le"), ".mov"),
    "ffv1": Kind(plain("ffv1"), ".mkv"),
    "gif": Kind(plain("gif", "rgb8"), ".gif", starts=range(COUNT)),
    # which part of the packets is shown, and when
    "edit list": Kind(copied(h264(), shifted(-2)), ".mp4", range(20, COUNT)),
    "edit list without B-frames": Kind(copied(h264("bframes=0"), shifted(-2)), ".mp4", range(20, COUNT)),
    "edit list, h265": Kind(copied(h265("open-gop=1:bframes=3"), shifted(-2)), ".mp4", range(20, COUNT)),
    "edit list with an empty edit": Kind(copied(h264(), shifted(3)), ".mp4"),
    "edit list of two parts": Kind(
        patched(h264("bframes=0"), edited((30, 10), (3, 12))),
        ".mp4",
        [*range(30, 40), *range(3, 15)],
        starts=[i / 10 for i in range(22)],
    ),
    "edit list that repeats": Kind(
        patched(mpeg("mpeg4", 0), edited((5, 20), (5, 20))),
        ".mp4",
        [*range(5, 25)] * 2,
        starts=[i / 10 for i in range(40)],
    ),
    "negative times": Kind(copied(h264(), shifted(-2), {"avoid_negative_ts": "disabled"}), ".mkv"),
    "times from 1.7e9 s": Kind(copied(h264(), shifted(1_700_000_000)), ".mkv"),
    "times from 100 s in ts": Kind(copied(h264(), shifted(100)), ".ts"),
    "times that wrap": Kind(copied(h264(), shifted(95_440)), ".ts"),
    "doubled times": Kind(copied(h264("bframes=0"), double), ".mkv", starts=[i // 2 / 5 for i in range(COUNT)]),
    "uneven times": Kind(h264(times=UNEVEN), ".mp4", starts=[t / 100 for t in UNEVEN]),
    "uneven times in mkv": Kind(h264(times=UNEVEN), ".mkv", starts=[t / 100 for t in UNEVEN]),
    # damaged and cut
    "cut off": Kind(patched(h264(container={"movflags": "faststart"}), cut(0, 0.75)), ".mp4", None),
    "cut off in ts": Kind(patched(h264(), cut(0, 0.7)), ".ts", None),
    "begins within a group": Kind(patched(h264("bframes=3:open-gop=1"), cut(0.3, 1, 188)), ".ts", None),
    # turned pictures
    "turned 90": turned(0, 1, -1, 0, lambda p: np.rot90(p, -1)),
    "turned 180": turned(-1, 0, 0, -1, lambda p: np.rot90(p, 2)),
    "turned 270": turned(0, -1, 1, 0, lambda p: np.rot90(p, 1)),
    "mirrored": turned(-1, 0, 0, 1, lambda p: p[:, ::-1]),
    "upside down": turned(1, 0, 0, -1, lambda p: p[::-1]),
    "transposed": turned(0, 1, 1, 0, lambda p: p.transpose(1, 0, 2)),
    "transposed the other way": turned(0, -1, -1, 0, lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
}

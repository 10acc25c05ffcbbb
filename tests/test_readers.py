"""Frames of every kind of file, by every reader: against a slow decoding of the whole file, and ffmpeg's own.

The reference decodes from the first packet to the last and turns pictures by hand. That it is right itself is seen
from the pictures, which show their numbers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from video_kinds import COUNT, HEIGHT, KINDS, WIDTH, Kind, Picture, draw, encode, h264, matrix, number_of, patched

from xcomp.readers import AvReader
from xcomp.stream import VideoStream
from xcomp.timeline import _from_demuxer, _from_index, _rate
from xcomp.video import Video, VideoError

OTHERS = [name for name in ("decord", "torchcodec") if importlib.util.find_spec(name)]
FFMPEG = shutil.which("ffmpeg")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Kind, Path, list[Picture]]]:
    """A kind by name, its file, and the file's upright pictures by the slow way."""
    folder, known = tmp_path_factory.mktemp("kinds"), {}

    def make(name: str) -> tuple[Kind, Path, list[Picture]]:
        if name not in known:
            kind, path = KINDS[name], folder / f"{len(known)}{KINDS[name].suffix}"
            kind.make(path)
            known[name] = kind, path, decode_all(path)
        return known[name]

    return make


def decode_all(path: Path) -> list[Picture]:
    with av.open(str(path)) as container:
        stream, pictures = container.streams.best("video"), []
        for packet in container.demux(stream):
            try:
                pictures += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
            except av.FFmpegError:  # cut off
                pass
        return [np.ascontiguousarray(picture) for picture in pictures]


def difference(ours: Any, theirs: Any) -> int:
    ours, theirs = np.asarray(ours, np.int16), np.asarray(theirs, np.int16)
    return int(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else 999


def draws(count: int, seed: int = 0) -> Iterator[list[int]]:
    """Frames to ask for: all, some in any order and again, single ones."""
    choose = random.Random(seed)
    yield list(range(count))
    for _ in range(4):
        yield [choose.randrange(count) for _ in range(6)]
    for _ in range(8):
        yield [choose.randrange(count)]
    yield [count - 1, 0]


# --- Which frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_frames_are_right_in_any_order(made: Callable, name: str, threads: int) -> None:
    kind, path, upright = made(name)
    numbers = [number_of(picture) for picture in upright]
    assert numbers == (list(kind.numbers) if kind.numbers is not None else sorted(set(numbers))) and numbers
    expected = [kind.turn(picture) for picture in upright]
    starts = kind.starts or [(number - numbers[0]) / 10 for number in numbers]
    with Video(path, threads=threads) as video:
        assert (video.num_frames, video.reader) == (len(expected), "av")
        assert video.times(range(len(video))) == pytest.approx(starts, abs=1e-3)
        for wanted in draws(len(video)):
            frames = video.frames(wanted)
            assert difference(frames, [expected[i] for i in wanted]) <= 2
    last = len(expected) - 1
    for alone in (last, last // 2):
        with Video(path, threads=threads) as video:
            assert difference(video.frames([alone])[0], expected[alone]) <= 2


@pytest.mark.parametrize("reader", OTHERS)
@pytest.mark.parametrize("name", KINDS)
def test_a_named_reader_is_right_or_refused(made: Callable, name: str, reader: str) -> None:
    _, path, upright = made(name)
    try:
        video = Video(path, reader)
    except VideoError as error:
        assert "use reader: av or auto" in str(error) and "\n" not in str(error)
        return
    with video, Video(path) as ours:
        assert (video.num_frames, video.fps, video.reader) == (len(upright), ours.fps, reader)
        for wanted in draws(len(video)):
            assert difference(video.frames(wanted), [upright[i] for i in wanted]) <= 2


def test_decord_is_not_believed_where_frames_are_lost(made: Callable, tmp_path: Path) -> None:
    """It would give the next ones in their place. Before, it may stumble itself: it decodes ahead."""
    pytest.importorskip("decord")
    _, path, upright = made("h264 without B-frames")
    with av.open(str(path)) as container:
        packet = next(p for p in container.demux(video=0) if p.pts == 15 * container.streams.video[0].duration // COUNT)
        data = bytes(packet)
    (tmp_path / "lost.mp4").write_bytes(path.read_bytes().replace(data, b"\xff" * len(data)))
    for wanted in ([30, 38], [11], [14]):
        with Video(tmp_path / "lost.mp4", "decord") as video, contextlib.suppress(VideoError):
            assert difference(video.frames(wanted), [upright[i] for i in wanted]) <= 2
    for wanted in ([15], [20], [38, 16]):
        with (
            Video(tmp_path / "lost.mp4", "decord") as video,
            pytest.raises(VideoError, match="frame 15 cannot be decoded: the file is damaged there"),
        ):
            video.frames(wanted)


def test_decord_is_not_believed_where_an_index_leads_astray(made: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decord")
    _, path, _ = made("vp9")
    begin = AvReader._begin_before

    def too_early(self: AvReader, index: int) -> None:
        begin(self, index)
        self._early = 12

    with Video(path, "decord") as video:
        monkeypatch.setattr(AvReader, "_begin_before", too_early)
        with pytest.raises(VideoError, match="seeking does not lead to its keyframes: .* use reader: av or auto"):
            video.frames([30])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("edit list", "an edit list"),
        ("h264 with open groups", "open groups of pictures"),
        ("h265 with open groups in mkv", "open groups of pictures"),
        ("mpeg4 with B-frames", "open groups of pictures"),
        ("h264 in avi called mp4", "the container avi"),
        ("wmv", "the container asf"),
        ("mpeg2 in mkv", "the codec mpeg2video"),
        ("h264 refreshed without keyframes", "keyframes that cannot be decoded by themselves"),
        ("times from 1.7e9 s", "a wrong duration"),  # ends the process: decord reserves room for so many frames
        ("turned 90", "turned pictures"),
        ("doubled times", "doubled timestamps"),
        ("cut off", "a damaged end"),
    ],
)
def test_decord_is_refused_where_it_is_not_exact(made: Callable, name: str, reason: str) -> None:
    pytest.importorskip("decord")
    _, path, _ = made(name)
    with pytest.raises(VideoError, match=f"decord cannot be relied on for files with {reason}; use reader: av or auto"):
        Video(path, "decord")


@pytest.mark.parametrize(
    "name", ["h264 with B-frames", "h264 in mkv", "h265 with closed groups", "vp9", "uneven times"]
)
def test_decord_serves_ordinary_files(made: Callable, name: str) -> None:
    decord = pytest.importorskip("decord")
    _, path, _ = made(name)
    with Video(path, "decord") as video:
        assert (video.reader, video.reader_version) == ("decord", f"decord {decord.__version__}")
        theirs = decord.VideoReader(str(path))
        assert (video.num_frames, video.fps) == (len(theirs), theirs.get_avg_fps())  # what sampling depends on


# --- The ffmpeg command -----------------------------------------------------------------------------------------------


def by_ffmpeg(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    command = [FFMPEG, "-v", "error", "-i", f"file:{path}", "-an", "-fps_mode", "passthrough"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    return np.frombuffer(subprocess.run(command, capture_output=True).stdout, np.uint8).reshape(-1, *shape)


@pytest.mark.skipif(not FFMPEG, reason="there is no ffmpeg command")
@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_the_ffmpeg_command(made: Callable, name: str) -> None:
    _, path, _ = made(name)
    with Video(path) as video:
        frames = video.frames(range(len(video)))
    assert difference(frames, by_ffmpeg(path, tuple(frames.shape[1:]))) <= 2


STILL = [0] * 15 + list(range(10)) + [9] * 15
FFMPEG_KINDS = {
    "theora": (range(COUNT), "ogv", "-c:v libtheora -g 12 -q:v 9"),
    "theora that stands still": (STILL, "ogv", "-c:v libtheora -g 12 -q:v 9"),
    "xvid in avi": (range(COUNT), "avi", "-c:v libxvid -bf 2 -g 12 -b:v 1M"),
    "xvid in avi that stands still": (STILL, "avi", "-c:v libxvid -bf 2 -g 12 -b:v 1M"),
    "xvid in mp4 that stands still": (STILL, "mp4", "-c:v libxvid -bf 2 -g 12 -b:v 1M"),
    "vp8 with hidden frames": (range(COUNT), "webm", "-c:v libvpx -b:v 300k -auto-alt-ref 1 -lag-in-frames 16"),
    "no index": (range(COUNT), "mkv", "-c:v libx264 -g 12 -bf 2 -live 1"),
    "interlaced": (range(COUNT), "mp4", "-c:v libx264 -g 12 -bf 2 -flags +ilme+ildct"),
    "10 bits": (range(COUNT), "mp4", "-c:v libx264 -g 12 -pix_fmt yuv420p10le"),
    "bt709": (range(COUNT), "mp4", "-c:v libx264 -g 12 -colorspace bt709 -color_primaries bt709 -color_trc bt709"),
    "full range": (range(COUNT), "mp4", "-c:v libx264 -g 12 -pix_fmt yuvj420p"),
    "realvideo": (range(COUNT), "rm", "-c:v rv20 -g 12"),
    "nut": (range(COUNT), "nut", "-c:v libx264 -g 12 -bf 2"),
    "mxf": (range(COUNT), "mxf", "-c:v mpeg2video -g 12 -bf 2 -r 25"),
}


@pytest.mark.skipif(not FFMPEG, reason="there is no ffmpeg command")
@pytest.mark.parametrize("name", FFMPEG_KINDS)
def test_frames_of_what_only_ffmpeg_encodes(tmp_path: Path, name: str) -> None:
    numbers, suffix, options = FFMPEG_KINDS[name]
    source, path = tmp_path / "pictures", tmp_path / f"clip.{suffix}"
    source.write_bytes(b"".join(draw(number).tobytes() for number in numbers))
    command = [FFMPEG, "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}"]
    command += ["-r", "10", "-i", str(source), "-pix_fmt", "yuv420p", *options.split()]
    for number in "12" if "hidden" in name else " ":  # hidden frames come of encoding twice
        passes = ["-pass", number, "-passlogfile", str(tmp_path / "log")] if number.strip() else []
        if subprocess.run([*command, *passes, str(path)], capture_output=True).returncode:
            pytest.skip("this ffmpeg does not encode it")
    with Video(path) as video:
        expected = by_ffmpeg(path, tuple(video.frames([0]).shape[1:]))
        assert video.num_frames == len(expected) > 8
        for wanted in draws(len(video)):
            assert difference(video.frames(wanted), expected[wanted]) <= 2
        if name == "theora":
            assert video.fps == pytest.approx(10)
    for reader in OTHERS:
        try:
            with Video(path, reader) as video:
                for wanted in draws(len(video)):
                    assert difference(video.frames(wanted), expected[wanted]) <= 2
        except VideoError as error:
            assert "use reader: av or auto" in str(error)


@pytest.mark.skipif(not FFMPEG, reason="there is no ffmpeg command")
def test_pictures_turned_by_any_angle(tmp_path: Path) -> None:
    path, c, s = tmp_path / "clip.mp4", np.cos(0.5), np.sin(0.5)
    patched(h264(), matrix(c, s, -s, c))(path)
    with Video(path) as video:
        frames = video.frames(range(len(video)))
    assert difference(frames, by_ffmpeg(path, tuple(frames.shape[1:]))) <= 2


# --- How they are found -----------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Counts the frames that are decoded while reading."""
    count = SimpleNamespace(frames=0)
    original = AvReader._numbered

    def numbered(self: AvReader, frames: Iterator[Any]) -> Iterator[Any]:
        for item in original(self, frames):
            count.frames += 1
            yield item

    monkeypatch.setattr(AvReader, "_numbered", numbered)
    return count


@pytest.mark.parametrize("name", ["h264 with B-frames", "h264 with open groups", "vp9", "mpeg2 in ts", "edit list"])
def test_sparse_frames_are_sought_and_dense_ones_decoded_once(made: Callable, counted: Any, name: str) -> None:
    _, path, upright = made(name)
    with Video(path) as video:
        video.frames([len(video) - 1])
        assert counted.frames < 26  # at most two groups: ts lands one early
        counted.frames = 0
        list(video.read(range(len(video))))
        assert len(upright) <= counted.frames <= len(upright) + 20
        counted.frames = 0
        list(video.read([2]))
        list(video.read([3, 5]))
        assert counted.frames <= 6  # it goes on where it stands


def test_the_second_of_two_readings_goes_on_undisturbed(made: Callable) -> None:
    _, path, upright = made("h264 with B-frames")
    with Video(path) as video:
        for (i, one), (j, other) in zip(video.read(range(0, 20)), video.read(range(20, 40))):
            assert difference(one, upright[i]) <= 2 and difference(other, upright[j]) <= 2


@pytest.mark.parametrize("fault", ["raises", "lands late", "lands at the start", "lands early"])
def test_a_seek_that_misses_never_gives_another_frame(made: Callable, fault: str) -> None:
    _, path, upright = made("h264 with B-frames")
    with Video(path) as video:
        stream = video._source.stream
        seek = stream.container.seek
        shift = {"lands late": 12 * 1024, "lands early": -12 * 1024, "lands at the start": -(10**9)}.get(fault)

        def faulty(target: int, **options: Any) -> None:
            if shift is None:
                raise av.error.PermissionError(1, "no seeking")
            seek(max(target + shift, 0), **options)

        stream.container = SimpleNamespace(seek=faulty, demux=stream.container.demux, close=stream.container.close)
        for wanted in draws(len(video)):
            assert difference(video.frames(wanted), [upright[i] for i in wanted]) <= 2


def test_one_picture_is_held_at_a_time(made: Callable) -> None:
    _, path, _ = made("h264 with B-frames")
    with Video(path) as video:
        held: list[weakref.ref] = []
        for _, picture in video.read(range(COUNT)):
            assert picture.shape == (HEIGHT, WIDTH, 3) and picture.dtype == np.uint8
            held.append(weakref.ref(picture))
            del picture
            assert not any(reference() is not None for reference in held[:-1])


def test_read_gives_each_frame_once_and_ascending(made: Callable) -> None:
    _, path, upright = made("vp9")
    with Video(path) as video:
        pairs = list(video.read(torch.tensor([30, 2, 30, 11])))
    assert [number for number, _ in pairs] == [2, 11, 30]
    assert all(difference(picture, upright[number]) <= 2 for number, picture in pairs)


def test_a_frame_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    path = tmp_path / "clip.mov"
    encode(path, "png", pix_fmt="rgb24")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][17]
        begin, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[begin : begin + size] = bytes(size)
    path.write_bytes(data)
    with Video(path) as video:
        assert [number_of(frame.numpy()) for frame in video.frames([18, 3, 16])] == [18, 3, 16]
        with pytest.raises(VideoError, match=r"clip.mov: frame 17 cannot be decoded"):
            video.frames([16, 17, 18])
        assert number_of(video.frames([19])[0].numpy()) == 19


def test_a_change_of_size_is_scaled_as_ffmpeg_does(tmp_path: Path) -> None:
    """Two recordings in one file, the second smaller."""
    source, path = tmp_path / "small.mkv", tmp_path / "clip.mkv"
    KINDS["vp9"].make(tmp_path / "large.webm")
    with av.open(str(source), "w") as file:
        stream = file.add_stream("libvpx-vp9", rate=10, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width, stream.height, stream.pix_fmt = WIDTH // 2, HEIGHT // 2, "yuv420p"
        for i in range(COUNT):
            frame = av.VideoFrame.from_ndarray(draw(i), format="rgb24").reformat(WIDTH // 2, HEIGHT // 2, "yuv420p")
            frame.pts = None
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with av.open(str(path), "w") as new, av.open(str(tmp_path / "large.webm")) as one, av.open(str(source)) as two:
        stream = new.add_stream_from_template(one.streams.video[0])
        for old, shift in ((one, 0), (two, 100 * COUNT)):
            for packet in old.demux(video=0):
                if packet.size:
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    new.mux(packet)
    with Video(path) as video:
        frames = video.frames([5, COUNT + 7, COUNT - 1, 2 * COUNT - 1])
    assert frames.shape == (4, HEIGHT, WIDTH, 3)
    assert [number_of(frame.numpy()) for frame in frames] == [5, 7, 39, 39]


@pytest.mark.parametrize(
    ("declared", "ticks", "fps"),
    [
        (25, [0, 4, 8], 25.0),
        (0, [0, 4, 8], 25.0),
        (float("nan"), [0, 4, 8], 25.0),
        (float("inf"), [0, 4, 8], 25.0),
        (60000, [0, 4, 8], 25.0),  # DV says so
        (10, [0, 10, 20, 9000], 10.0),  # a gap
        (0, [], 8.0),
        (0, [5], 8.0),
    ],
)
def test_the_rate_is_never_nonsense(declared: float, ticks: list[int], fps: float) -> None:
    inner = SimpleNamespace(average_rate=declared, guessed_rate=8)
    stream = SimpleNamespace(format="mov", stream=inner, tick=1 / 100)
    assert _rate(stream, np.array(ticks, np.int64)) == pytest.approx(fps)


@pytest.mark.parametrize("name", ["av1", "prores", "vp9 in mp4"])
def test_the_index_of_an_mp4_tells_what_its_packets_do(made: Callable, tmp_path: Path, name: str) -> None:
    if name in KINDS:
        _, path, _ = made(name)
    else:
        path = tmp_path / "clip.mp4"
        KINDS["vp9"].make(path)
    indexed, demuxed = _from_index(VideoStream(str(path))), _from_demuxer(VideoStream(str(path)))
    for column in ("pts", "dts", "size", "key", "discard", "hidden", "damaged"):
        assert getattr(indexed, column).tolist() == getattr(demuxed, column).tolist()


@pytest.mark.parametrize("name", ["h264 with B-frames", "h264 in fragments", "h264 in mkv", "edit list", "vp8"])
def test_no_index_is_believed_that_may_not_hold_all(made: Callable, name: str) -> None:
    _, path, _ = made(name)
    assert _from_index(VideoStream(str(path))) is None

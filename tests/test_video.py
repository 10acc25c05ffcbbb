"""xcomp.video: readers against known frames and each other."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import av
import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from xcomp.video import Video, VideoError

NUM_FRAMES = 40
READERS = ("decord", "av")


def encode(path: Path, codec: str, options: dict[str, str] | None = None, rate: int = 8) -> Path:
    """A video whose frame i is black with a white bar that begins at row i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb8" if codec == "gif" else "yuv420p"
        for i in range(NUM_FRAMES):
            picture = np.zeros((64, 64, 3), np.uint8)
            picture[i : i + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(frames: torch.Tensor) -> list[int]:
    """Which frames these are: the rows where their bars begin."""
    return [int((frame.float().mean(dim=(1, 2)) > 128).float().argmax()) for frame in frames]


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("video") / "clip.mp4", "libx264", {"g": "10", "bf": "2"})


@pytest.mark.parametrize("reader", READERS)
def test_reads_the_frames_asked_for(mp4: Path, reader: str) -> None:
    wanted = [39, 3, 17, 17, 0, 22]
    with Video(mp4, reader=reader) as video:
        assert (video.num_frames, video.fps, video.duration, video.reader) == (NUM_FRAMES, 8.0, 5.0, reader)
        frames = video.frames(wanted)
        assert frames.dtype == torch.uint8 and frames.shape == (6, 64, 64, 3)
        assert numbers(frames) == wanted
        assert numbers(video.frames(torch.tensor([5, 4]))) == [5, 4]  # again, and backwards
    with pytest.raises(VideoError, match="closed"):
        video.frames([0])
    video.close()


def test_readers_agree(mp4: Path) -> None:
    decord, pyav = (Video(mp4, reader=reader).frames(range(NUM_FRAMES)).int() for reader in READERS)
    assert (decord - pyav).abs().max() <= 2  # two builds of FFmpeg convert YUV to RGB


def test_times_are_those_of_the_frames(mp4: Path) -> None:
    with Video(mp4) as video:
        assert video.times([4, 0, 39, 4]) == [0.5, 0.0, 4.875, 0.5]
        assert video.times(torch.tensor([], dtype=torch.long)) == []
        with pytest.raises(VideoError, match="no frame 40"):
            video.times([40])


def test_what_serves_is_told(mp4: Path, tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "frame_1.png")
    with Video(mp4) as video:
        assert (video.reader, video.reader_version, len(video)) == ("av", f"av {av.__version__}", NUM_FRAMES)
    with Video(tmp_path) as video:
        assert (video.reader, video.reader_version) == ("images", f"pillow {PIL.__version__}")


@pytest.mark.parametrize("reader", ["decord", "torchcodec"])
def test_a_missing_reader_is_named(mp4: Path, monkeypatch: pytest.MonkeyPatch, reader: str) -> None:
    monkeypatch.setitem(sys.modules, reader, None)
    assert Video(mp4).reader == "av"
    with pytest.raises(VideoError, match=f"{reader} cannot read it .*; use reader: av or auto"):
        Video(mp4, reader=reader)


def test_image_folder(tmp_path: Path) -> None:
    folder = tmp_path / "film"
    folder.mkdir()
    for number in (10, 9, 2):  # as text, 10 would come first
        Image.new("RGB", (6, 4), (number, 0, 0)).save(folder / f"shot_{number}.png")
    (folder / "notes.txt").write_text("no image")
    with Video(folder) as video:
        assert (video.num_frames, video.fps, video.duration) == (3, 1.0, 3.0)
        frames = video.frames([0, 1, 2, 0])
    assert frames.shape == (4, 4, 6, 3)
    assert frames[:, 0, 0, 0].tolist() == [2, 9, 10, 2]


def test_tvqa_folders_have_three_frames_a_second(tmp_path: Path) -> None:
    folder = tmp_path / "tvqa"
    folder.mkdir()
    Image.new("RGB", (6, 4)).save(folder / "frame_00001.jpg")
    assert Video(folder).fps == 3.0


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [-1, NUM_FRAMES])
@pytest.mark.parametrize("reader", READERS)
def test_frame_out_of_range(mp4: Path, reader: str, index: int) -> None:
    with Video(mp4, reader=reader) as video, pytest.raises(VideoError, match=f"no frame {index}, the video has 40"):
        video.frames([0, index])


def test_no_indices(mp4: Path) -> None:
    with Video(mp4) as video, pytest.raises(VideoError, match="no frame was asked for"):
        video.frames([])


@pytest.mark.parametrize("reader", ["auto", *READERS])
def test_files_that_are_no_video(tmp_path: Path, reader: str) -> None:
    text, nothing = tmp_path / "text.mp4", tmp_path / "nothing.mp4"
    text.write_text("hello " * 100)
    nothing.touch()
    no_video = "not a readable video"
    for path, message in [(tmp_path / "none.mp4", "no such file"), (text, no_video), (nothing, no_video)]:
        with pytest.raises(VideoError, match=message) as caught:
            Video(path, reader=reader)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", ["auto", *READERS])
def test_video_without_frames(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "empty.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    with pytest.raises(VideoError, match="video stream"):
        Video(path, reader=reader)


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    os.mkfifo(tmp_path / "frame_1.png")
    with pytest.raises(VideoError, match=r"folder has no frames: no images named \*_<number>.jpg or .png"):
        Video(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "pipe in disguise"])
def test_what_is_neither_file_nor_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """To open them would be to wait for ever."""
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = Path("clip.mp4")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        os.mkfifo("pipe")
        path.symlink_to("pipe")
    with pytest.raises(VideoError, match="neither a file nor a folder"):
        Video(path)


@pytest.mark.parametrize("name", ["col:on.mp4", "http:x.mp4", "per%03dcent.mp4", "sp ace.mp4", "-dash.mp4", "film"])
def test_names_that_mean_something_to_ffmpeg(
    mp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copy(mp4, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with Video(name) as video:
        assert numbers(video.frames([30, 3])) == [30, 3]


def test_names_that_are_no_text(mp4: Path, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/clip\xff\n.mp4")
    with pytest.raises(VideoError) as caught:
        Video(path)
    assert str(caught.value).encode().endswith(rb"clip\udcff\n.mp4: no such file or folder")
    shutil.copy(mp4, path)
    with Video(path) as video:
        assert numbers(video.frames([30])) == [30]
        with pytest.raises(VideoError) as caught:
            video.frames([40])
    assert "\n" not in str(caught.value) and str(caught.value).encode()


@pytest.mark.parametrize(("name", "reason"), [("x" * 300, "name too long"), ("a\0b", "null")])
def test_names_that_cannot_be(name: str, reason: str) -> None:
    with pytest.raises(VideoError, match=rf"cannot be opened \(.*{reason}") as caught:
        Video(name)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(mp4: Path, tmp_path: Path) -> None:
    path = tmp_path / "closed.mp4"
    shutil.copy(mp4, path)
    path.chmod(0)
    with pytest.raises(VideoError, match="no permission to read it"):
        Video(path)


def test_no_permission_asked_of_the_system(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(VideoError, match="no permission to read it"):
        Video(mp4)


def test_titles_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "caf#"
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux([*stream.encode(picture), *stream.encode()])
    path.write_bytes(path.read_bytes().replace(b"caf#", b"caf\xe9"))
    assert len(Video(path)) == 1


@pytest.mark.parametrize("where", ["demux", "decode"])
def test_too_little_memory_is_no_end_of_the_file(mp4: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """PyAV counts it among FFmpeg's errors, which a damaged packet raises too."""
    from xcomp.stream import VideoStream

    stream = VideoStream(str(mp4))

    def fail(*args):
        raise av.error.MemoryError(12, "Cannot allocate memory")

    if where == "demux":
        stream.container = type("Container", (), {"demux": fail})()
        with pytest.raises(MemoryError):
            next(stream.packets())
    else:
        codec = type("Codec", (), {"decode": fail})()
        stream.stream = type("Stream", (), {"codec_context": codec})()
        with pytest.raises(MemoryError):
            next(stream.decode(iter([object()])))
    monkeypatch.setattr(VideoStream, where if where == "decode" else "packets", fail)
    with pytest.raises(MemoryError):
        Video(mp4).frames([3])


def test_closed_while_reading(mp4: Path) -> None:
    video = Video(mp4)
    pictures = video.read([1, 2, 3])
    assert next(pictures)[0] == 1
    video.close()
    with pytest.raises(VideoError, match="closed"):
        next(pictures)


def test_threads_are_at_least_one(mp4: Path) -> None:
    with pytest.raises(ValueError, match="threads=0 must be at least 1"):
        Video(mp4, threads=0)


def test_images_of_different_sizes(tmp_path: Path) -> None:
    for i, size in enumerate([(6, 4), (4, 6)]):
        Image.new("RGB", size).save(tmp_path / f"a_{i}.png")
    with pytest.raises(VideoError, match="differ in size"):
        Video(tmp_path).frames([0, 1])


def test_unknown_reader(mp4: Path) -> None:
    with pytest.raises(ValueError, match="reader='opencv'"):
        Video(mp4, reader="opencv")

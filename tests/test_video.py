"""xcomp.video: readers against known frames and each other."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
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


@pytest.mark.parametrize(
    ("name", "codec", "options", "rate"),
    [
        ("clip.avi", "mpeg4", {"bf": "2"}, 8),
        ("clip.ts", "libx264", {"g": "10"}, 8),
        ("clip.mpg", "mpeg2video", {"bf": "2"}, 25),
        ("clip.gif", "gif", {}, 8),
        ("clip.mkv", "libx264", {"bf": "2"}, 8),
    ],
)
def test_automatic_reader_finds_the_right_frames(
    tmp_path: Path, name: str, codec: str, options: dict, rate: int
) -> None:
    with Video(encode(tmp_path / name, codec, options, rate)) as video:
        assert video.num_frames == NUM_FRAMES
        assert video.fps == (1 if codec == "gif" else rate)
        assert numbers(video.frames([39, 3, 17, 0, 22])) == [39, 3, 17, 0, 22]


def test_pyav_decodes_from_the_start_without_timestamps(mp4: Path) -> None:
    video = Video(mp4, reader="av")
    video._source._keys = []  # as in a file whose packets carry none
    assert numbers(video.frames([30, 2])) == [30, 2]


def test_pyav_takes_over_where_decord_is_missing(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    assert Video(mp4).reader == "av"
    with pytest.raises(VideoError, match="decord"):
        Video(mp4, reader="decord")


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
    with pytest.raises(VideoError, match="no frames"):
        Video(tmp_path)


def test_images_of_different_sizes(tmp_path: Path) -> None:
    for i, size in enumerate([(6, 4), (4, 6)]):
        Image.new("RGB", size).save(tmp_path / f"a_{i}.png")
    with pytest.raises(VideoError, match="differ in size"):
        Video(tmp_path).frames([0, 1])


def test_unknown_reader(mp4: Path) -> None:
    with pytest.raises(ValueError, match="reader='opencv'"):
        Video(mp4, reader="opencv")

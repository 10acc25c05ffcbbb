"""NIAH: pictures in a haystack, on a made video and made pictures; the real annotations where they are present."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_annotations import ANNOTATIONS, make, needs_annotations, write_json
from PIL import Image

import xcomp
from xcomp.benchmarks import niah
from xcomp.benchmarks.niah import NIAH
from xcomp.video import Video


def colours(video: str) -> list[str]:
    """What each frame is: hay is grey, pictures are of one colour each."""
    with Video(video) as opened:
        frames = opened.frames(range(opened.num_frames)).numpy().mean(axis=(1, 2))
    names = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "hay": (128, 128, 128)}
    return [min(names, key=lambda name: np.linalg.norm(np.array(names[name]) - frame)) for frame in frames]


def load(options, **more):
    return xcomp.load_benchmark("niah", **(options | more))


@pytest.fixture
def single(tmp_path):
    return make("niah", tmp_path)


@pytest.fixture
def multi(single, tmp_path):
    question = "Find the frame. {}\nOptions: (A) one\n(B) two\nOnly give the best option. Best option: ("
    record = {"images": ["single/red.jpg", "single/green.png", "single/blue.jpg"], "answer1": "A", "answer2": "B"}
    record |= {"question1": question.format("Which caption?"), "question2": question.format("What is it?")}
    return single | {"annotations": write_json(tmp_path / "multi.json", [record])}


def test_a_picture_stands_at_its_depth(single):
    benchmark = load(single, depths=[0.0, 0.5, 1.0])
    questions = benchmark.questions()
    assert len(questions) == 2 * 3 and len({q.video for q in questions}) == 6
    for question, before in zip(questions, [0, 8, 16] * 2, strict=True):
        colour = "red" if "single-00" in question.id else "green"
        assert colours(question.video) == ["hay"] * before + [colour] * 4 + ["hay"] * (16 - before)
        assert question.events == ((float(before), before + 4.0),)
    assert questions[1].labels == {"frames": ("16",), "part": ("depth 0.5",)}
    assert (questions[1].answer, questions[1].options) == (1, ("(A) red", "(B) blue"))


def test_a_chain_begins_and_ends_with_a_picture(multi):
    first, second = load(multi).questions()
    expected = ["red"] * 4 + ["hay"] * 8 + ["green"] * 4 + ["hay"] * 8 + ["blue"] * 4
    assert first.video == second.video and colours(first.video) == expected
    assert first.events == ((0.0, 4.0), (12.0, 16.0), (24.0, 28.0))
    assert (first.answer, second.answer) == (0, 1) and second.labels == {"frames": ("16",), "part": ("question",)}


def test_the_event_of_a_chain_is_the_picture_asked_about(multi, tmp_path):
    (record,) = json.loads(Path(multi["annotations"]).read_text())
    folder = tmp_path / "images" / "single"
    for name in ("red.jpg", "blue.jpg"):
        (folder / name).rename(folder / f"niah_1_{name}")
    record["images"] = ["single/niah_1_red.jpg", "single/green.png", "single/niah_1_blue.jpg"]
    first, second = load(multi, annotations=write_json(tmp_path / "multi.json", [record])).questions()
    assert first.events == second.events == ((12.0, 16.0),)


def test_hay_is_a_frame_a_second_and_comes_twice_when_it_is_much(single, monkeypatch):
    benchmark = load(single, depths=[1.0])
    once = [Path(p).resolve().name for p in sorted(Path(benchmark.questions()[0].video).iterdir())]
    assert once[:16] == [f"frame_{i:05d}.jpg" for i in range(16)]
    with Video(single["haystack"]) as video:
        drawn = video.frames([round(3 * video.fps)])[0].numpy().astype(float)
    with Image.open(sorted(Path(benchmark.questions()[0].video).iterdir())[3]) as saved:
        assert abs(np.array(saved).astype(float) - drawn).mean() < 3
    monkeypatch.setattr(niah, "MOST_FRAMES", 15)
    twice = load(single, depths=[1.0], root=single["root"] + "2").questions()[0].video
    assert [Path(p).resolve().name for p in sorted(Path(twice).iterdir())][:16] == once[:8] * 2


def test_the_prompt_is_the_text_of_the_file(single, multi):
    for options in (single, multi):
        records = json.loads(Path(options["annotations"]).read_text())
        texts = [r[key] for r in records for key in ("question", "question1", "question2") if key in r]
        benchmark = load(options, depths=[0.0])
        assert [benchmark.prompt(q) for q in benchmark.questions()] == texts
    assert [benchmark.parse(text, benchmark.questions()[0]) for text in ("B) two", "a", "C", "")] == [1, 0, None, None]


def test_other_pictures_are_another_video(single):
    before = load(single).questions()[0].video
    for path in Path(single["images"]).rglob("*.jpg"):
        Image.new("RGB", (90, 60), (0, 0, 255)).save(path)
    after = load(single).questions()[0].video
    assert after != before and "blue" in colours(after) and "blue" not in colours(before)


def test_videos_are_written_once(single):
    benchmark = load(single)
    video = Path(benchmark.questions()[0].video)
    before = video.stat().st_mtime_ns
    assert load(single).questions() == benchmark.questions() and video.stat().st_mtime_ns == before
    assert not list(Path(single["root"]).rglob("*.tmp"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": [10]}, "frames holds 10; it must be a multiple of 4 from 8"),
        ({"depths": [1.2]}, "depths holds 1.2; it must be 0..1"),
        ({"depths": []}, "depths is .*; it must name at least one"),
        ({"frames": [16, 16]}, "frames is .*each once"),
        ({"parser": "mlv"}, "did you mean 'mlvu'"),
        ({"haystack": "no.mkv"}, "haystack 'no.mkv' cannot be read: No such file"),
        ({"images": "nowhere"}, r"picture 'nowhere.single.red\.jpg' cannot be read"),
        ({"frames": [400]}, "haystack '.*' lasts 24 s, but 400 frames, one a second, are asked for"),
    ],
)
def test_what_cannot_be_is_refused(single, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(single, **change).questions()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": "What?"}, "record 1: a question must end with 'Options: "),
        ({"answer": "E"}, "record 1: the answer 'E' is no letter of an option"),
        ({"image": 3}, "record 1: 'image' must be text, not 3"),
    ],
)
def test_bad_records_are_refused(single, tmp_path, change, message):
    (record, _) = json.loads(Path(single["annotations"]).read_text())
    path = write_json(tmp_path / "bad.json", [record | change])
    with pytest.raises(ValueError, match=message):
        load(single, annotations=path).questions()


def test_metrics():
    def cell(frames, depth, score):
        return {"labels": {"frames": [frames], "part": [f"depth {depth}"]}, "score": score, "video": "v"}

    single = [cell("8", "0", 1.0), cell("8", "0", 1.0), cell("8", "1", 0.0), cell("16", "0", 1.0)]
    assert NIAH.metrics(single) == {"accuracy": 75.0, "mean of cells": pytest.approx(200 / 3)}

    def part(video, name, score):
        return {"labels": {"frames": ["8"], "part": [name]}, "score": score, "video": video}

    multi = [
        part("a", "caption", 1.0),
        part("a", "question", 1.0),
        part("b", "caption", 0.0),
        part("b", "question", 1.0),
    ]
    assert NIAH.metrics(multi) == {"accuracy": 75.0, "caption": 50.0, "question": 100.0, "both right": 50.0}


@needs_annotations
@pytest.mark.parametrize("file, count", [("niah-coco-singlehop_20.json", 20), ("niah-coco-multihop-100.json", 200)])
def test_real_annotations(single, monkeypatch, file, count):
    """With pictures of one colour in place of the real ones, which are not with the annotations."""
    monkeypatch.setattr(NIAH, "_picture", lambda self, name: self._folder / "haystack" / "frame_00000.jpg")
    path = ANNOTATIONS / "NIAH" / file
    benchmark = load(single, annotations=str(path), depths=[0.2])
    questions = benchmark.questions()
    records = json.loads(path.read_text(encoding="utf-8"))
    keys = ("question",) if "question" in records[0] else ("question1", "question2")
    assert [benchmark.prompt(q) for q in questions] == [r[key] for r in records for key in keys]
    assert len(questions) == count and {len(q.options) for q in questions} == {4}
    gold = [r[key.replace("question", "answer")] for r in records for key in keys]
    assert ["ABCD"[q.answer] for q in questions] == gold

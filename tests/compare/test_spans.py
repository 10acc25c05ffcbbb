"""Questions about a part of a video, and benchmarks of which videos are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from comparison_runs import draw_video, read

from xcomp.answering import Answerer, Query
from xcomp.cli import main
from xcomp.compare.runner import compare
from xcomp.config import Decoding, Memory, Sampling, parse_config
from xcomp.decoding import DecodingPool
from xcomp.inflight import VideoInFlight
from xcomp.model import VideoQA
from xcomp.sampling import sample_indices
from xcomp.tiny import tiny_backbone
from xcomp.video import Video, VideoError

# (video, span) of each question stand in a file.
PARTS = """
import json
from dataclasses import dataclass
from pathlib import Path
from xcomp.benchmark import Benchmark, Question


class Parts(Benchmark):
    @dataclass
    class Config:
        file: str

    def questions(self):
        rows = json.loads(Path(self.config.file).read_text())
        self.defects = {"odd": 2}
        return [
            Question(f"q{n}", video, "What is it?", ("red", "blue"), 0, span=span and tuple(span))
            for n, (video, span) in enumerate(rows)
        ]
"""
SAMPLING = {"rate": 2, "min_frames": 4, "max_frames": 8, "multiple": 4}


@pytest.fixture
def make(tmp_path, tiny_run):
    """Writes a run about (video, span) and returns its file."""

    def make(*rows, **options):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "parts.py").write_text(PARTS)
        (tmp_path / "parts.json").write_text(json.dumps([(str(video), span) for video, span in rows]))
        own = {
            "plugins": [str(tmp_path / "mine")],
            "benchmark": {"name": "parts", "file": str(tmp_path / "parts.json")},
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**tiny_run, "sampling": SAMPLING, "frames": None, **own, **options}))
        return path

    return make


@pytest.fixture
def video(tmp_path):
    """Four seconds, eight frames a second."""
    from video_kinds import encode

    encode(tmp_path / "video.mp4", "libx264", {"g": "8"}, numbers=range(32), rate=8)
    return tmp_path / "video.mp4"


def config_of(path):
    return parse_config(yaml.safe_load(path.read_text()), "x")


@pytest.mark.parametrize("span, first, count", [((1.0, 3.0), 8, 16), ((0.0, 2.0), 0, 16), ((2.5, 99.0), 20, 11)])
def test_candidates_are_those_of_the_span_alone(video, span, first, count):
    """As if the span's frames were the video; a span's end is at most a tenth of a second before the video's."""
    sampling = Sampling(**SAMPLING)
    with DecodingPool(Decoding(workers=0), sampling) as pool, Video(video) as opened:
        info, _ = pool.inspect(str(video), span).result()
        expected = [first + i for i in sample_indices(count, 8.0, rate=2, min_frames=4, max_frames=8, multiple=4)]
        assert list(info.candidates) == expected and info.num_frames == 32 and info.duration == 4.0
        assert list(info.times) == pytest.approx(opened.times(expected), abs=1e-3)  # seconds of the file
        assert info.shown_seconds == pytest.approx(min(span[1], 3.9) - span[0])
        assert info.shown_times(info.times) == pytest.approx([t - first / 8 for t in info.times], abs=1e-3)


def test_a_prompt_speaks_of_the_span(video):
    """Its length, and times from its start; the selector sees the same."""
    told = []

    class Told(type(tiny_backbone())):
        def prompt(self, question, shown):
            told.append(shown)
            return super().prompt(question, shown)

    backbone = tiny_backbone()
    backbone.__class__ = Told
    with DecodingPool(Decoding(workers=0), Sampling(**SAMPLING)) as pool:
        for span in ((1.0, 3.0), None):
            with VideoInFlight(str(video), backbone, pool, Memory(), span=span) as opened:
                (answer,) = Answerer(backbone).answer(opened, [Query(str(video), "What?", "What?", span=span)])
            assert answer.duration == 4.0 and len(answer.times) == (4 if span else 8)
            assert told[-1].duration == (2.0 if span else 4.0) and told[-1].num_frames == len(answer.times)
            assert told[-1].times == pytest.approx([t - (1.0 if span else 0.0) for t in answer.times])


def test_spans_of_one_video_are_videos_of_their_own(make, video, monkeypatch):
    """Equal ones share what is computed; every record is that of a run with its question alone."""
    opened, real = [], VideoInFlight.__init__

    def watched(self, path, *args, span=None, **options):
        opened.append(span)
        real(self, path, *args, span=span, **options)

    monkeypatch.setattr(VideoInFlight, "__init__", watched)
    spans = [(0.0, 2.0), (2.0, 3.5), None, (0.0, 2.0)]
    together = read(compare(config_of(make(*[(video, s) for s in spans]))))
    assert sorted(opened, key=str) == sorted({*spans}, key=str)
    assert [r["span"] for r in together] == [s and list(s) for s in spans]
    assert all(r["error"] is None and r["duration"] == 4.0 for r in together)
    assert max(together[0]["times"]) < 2.0 <= min(together[1]["times"]) and max(together[1]["times"]) < 3.5
    assert together[0]["frames"] == together[3]["frames"] and together[0]["text"] == together[3]["text"]
    for number, span in enumerate(spans):
        (alone,) = read(compare(config_of(make((video, span), name=f"alone{number}"))))
        assert all(
            alone[key] == together[number][key] for key in ("frames", "times", "text", "tokens_in", "prediction")
        )


def test_a_span_outside_its_video_is_that_questions_error(make, video, capsys):
    path = make((video, (1.0, 2.0)), (video, (4.0, 5.0)), (video, (1.0, 1.05)))
    assert main(["evaluate", str(path)]) == 1
    good, outside, empty = read(config_of(path).folder)
    assert good["error"] is None
    assert outside["error"] == f"{video}: the span from 4 to 5 s is outside the video, which lasts 4.00 s"
    assert empty["error"].startswith(f"{video}: the span from 1 to 1.05 s holds no whole frame of a video of 4.00 s")


def test_a_script_asks_about_a_span(video):
    model = VideoQA(tiny_backbone(), sampling=Sampling(**SAMPLING))
    with model.open(video, (1.0, 3.0)) as part:
        inside = model.ask(part, "What?")
    assert 1.0 <= min(inside.times) and max(inside.times) < 3.0
    queries = [Query(str(video), "What?", "What?", span=span) for span in ((1.0, 3.0), None, (9.0, 10.0))]
    answers = model.answer(queries)
    assert answers[0].frames == inside.frames != answers[1].frames and isinstance(answers[2], VideoError)


def test_a_forecast_counts_spans(make, video, capsys):
    assert main(["evaluate", str(make((video, (0.0, 1.0)))), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 candidate frames, 1 s" in said and "2 with a defect: odd" in said


# --- missing videos ---------------------------------------------------------------------------------------------------


def test_missing_videos_are_listed_and_end_the_run_before_it_begins(make, video, capsys, monkeypatch):
    from xcomp.compare.runner import Comparison

    monkeypatch.setattr(Comparison, "_build", lambda *_: pytest.fail("a model was built"))
    gone = [video.parent / "gone" / f"{n}.mp4" for n in range(12)]
    path = make((video, None), *[(name, None) for name in gone])
    assert main(["evaluate", str(path)]) == 2
    out, err = capsys.readouterr()
    assert err == (
        f"xcomp: error: 12 of the benchmark's 13 videos are missing, looked for in '{video.parent / 'gone'}'; "
        "allow_missing: true goes on without them\n"
    )
    assert out.splitlines() == [*(f"  missing: {name}" for name in gone[:10]), "  missing: … and 2 more"]
    assert not Path(config_of(path).folder).exists()


def test_a_run_may_go_on_without_them_and_ask_them_later(make, video, tmp_path, capsys):
    late = tmp_path / "late.mp4"
    path = make((video, None), (late, None), (late, (0.0, 1.0)))
    assert main(["evaluate", str(path), "allow_missing=true"]) == 0
    assert "1 of 2 videos are missing: 2 questions are left out" in capsys.readouterr().out
    folder = config_of(path).folder

    def about():
        found = json.loads((folder / "run.json").read_text())["benchmark"]
        return {key: found[key] for key in ("num_questions", "num_videos", "missing", "missing_questions", "defects")}

    counts = {"num_questions": 1, "num_videos": 1, "missing_questions": 2, "defects": {"odd": 2}}
    assert about() == counts | {"missing": [str(late)]} and len(read(folder)) == 1
    draw_video(late)
    assert main(["evaluate", str(path)]) == 0  # allowing it is no other run
    assert about() == counts | {"num_questions": 3, "num_videos": 2, "missing": [], "missing_questions": 0}
    assert len(read(folder)) == 3


def test_without_any_video_there_is_no_run(make, tmp_path, capsys):
    path = make((tmp_path / "a.mp4", None), (tmp_path / "b.mp4", None))
    for more in ([], ["allow_missing=true"]):
        assert main(["evaluate", str(path), *more]) == 2
        said = f"none of the benchmark's 2 videos is there, looked for in '{tmp_path}'"
        assert said in capsys.readouterr().err


def test_a_dry_run_says_what_a_run_would_do(make, video, tmp_path, capsys):
    path = make((video, None), (tmp_path / "no.mp4", None))
    assert main(["evaluate", str(path), "--dry-run"]) == 1  # a run would not begin
    said = capsys.readouterr().out
    assert f"missing: {tmp_path / 'no.mp4'}" in said and "allow_missing: true goes on without them" in said
    assert main(["evaluate", str(path), "--dry-run", "allow_missing=true"]) == 0
    assert "goes on without them" not in capsys.readouterr().out

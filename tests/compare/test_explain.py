"""The page that shows why frames were chosen: scores, thumbnails, evidence; self-contained, everything escaped."""

import re

import pytest

import xcomp
from xcomp.cli import main
from xcomp.compare.explain import MOST, explanation, shown_frames


@pytest.fixture(scope="module")
def question(needle_videos):
    return xcomp.load_benchmark("needle", **needle_videos).questions()[0]


def record(question, **more):
    times = [i / 2 for i in range(8)]
    return {"video": question.video, "question_id": "<b>q</b>", "frames": [0, 8, 24], "times": [0.0, 1.0, 3.0],
            "duration": 4.0, "scores": [float(i) for i in range(8)], "candidate_times": times, "text": "<i>red</i>",
            "events": [[1.0, 2.0]], **more}  # fmt: skip


def test_scores_frames_and_evidence_are_drawn(question):
    html = explanation([("AKS & co", record(question))])
    assert html.count("<image") == 3 and html.count("data:image/jpeg;base64,") == 3
    assert html.count("<polyline") == 1 and html.count("<rect") == 1
    assert "AKS &amp; co" in html and "&lt;b&gt;q&lt;/b&gt;" in html and "&lt;i&gt;" in html
    assert "<b>q" not in html and "://" not in html and "<script" not in html


def test_scores_that_were_asked_for_alone_are_dots(question):
    scores = [0.5, None, None, 0.7, None, None, None, 0.1]
    html = explanation([("FOCUS", record(question, scores=scores))])
    assert html.count("<circle") == 3 and "<polyline" not in html


def test_without_scores_events_or_the_file_ticks_remain(question):
    html = explanation([("uniform", record(question, scores=None, events=[], video="gone.mp4"))])
    assert "<image" not in html and html.count("<line") == 4 and "<rect" not in html
    assert explanation([]) == ""


def test_of_many_frames_some_are_pictures():
    shown = shown_frames({"frames": list(range(100))})
    assert len(shown) == MOST and shown[0] == 0 and shown[-1] == 99


def test_ask_explains(question, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "ask.yaml").write_text(
        f"backbone: {{name: videochat_flash, checkpoint: {tiny_checkpoint}}}\nframes: 4\nselector: random\n"
        "sampling: {rate: 2, min_frames: 8, max_frames: 8}\ngeneration: {max_new_tokens: 2}\n"
    )
    page = tmp_path / "out.html"
    command = ["ask", question.video, "What <colour>?", "--config", str(tmp_path / "ask.yaml"), "--explain", str(page)]
    assert main(command) == 0
    text = page.read_text()
    assert text.count("<image") == 4 and "What &lt;colour&gt;?" in text and text.count("<polyline") == 1
    assert not re.search(r"(src|href)=\"(?!data:)", text)

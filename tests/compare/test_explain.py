"""Why frames were chosen: scores, thumbnails and evidence on a time axis; the page of one asked question."""

import re

import numpy as np
import pytest
from scipy import optimize

import xcomp
from xcomp.cli import main
from xcomp.compare.explain import HEIGHT, MOST, _apart, some, thumbnails, timeline


@pytest.fixture(scope="module")
def question(needle_videos):
    return xcomp.load_benchmark("needle", **needle_videos).questions()[0]


def record(question, **more):
    times = [i / 2 for i in range(8)]
    return {"video": question.video, "question_id": "q", "frames": [0, 8, 24], "times": [0.0, 1.0, 3.0],
            "duration": 4.0, "scores": [float(i) for i in range(8)], "candidate_times": times, "text": "red",
            "events": [[1.0, 2.0]], **more}  # fmt: skip


def of(question, *records):
    pictures = thumbnails({question.video: [0, 8, 24]})
    return timeline([(f"arm {n}", one) for n, one in enumerate(records)], pictures)


def test_scores_frames_and_evidence_stand_on_one_axis(question):
    line = of(question, record(question))
    (row,) = line.rows
    assert line.events == ((25.0, 25.0),)
    assert row.curve == "M0 100L125 86L250 71L375 57L500 43L625 29L750 14L875 0" and not row.dots
    assert row.ticks == "M0 0V100M250 0V100M750 0V100" and row.hits == 1
    assert [(thumb.frame, thumb.seconds, thumb.at) for thumb in row.thumbs] == [(0, 0, 0), (8, 1, 25), (24, 3, 75)]
    assert all(t.picture.height == HEIGHT and t.picture.url.startswith("data:image/jpeg;base64,") for t in row.thumbs)
    assert [tick.label for tick in line.ticks] == ["0 s", "1 s", "2 s", "3 s", "4 s"]


def test_what_a_question_is_not_about_is_told(question):
    assert of(question, record(question, span=[1.0, 3.0])).outside == ((0.0, 25.0), (75.0, 25.0))
    assert of(question, record(question, span=None)).outside == ()


def test_arms_that_showed_the_same_share_a_row(question):
    other = record(question, frames=[0, 16], times=[0.0, 2.0], scores=None)
    line = of(question, record(question), other, record(question), record(question, scores=None))
    assert [row.names for row in line.rows] == [("arm 0", "arm 2"), ("arm 1",), ("arm 3",)]
    assert set(line.pictures) == {"f-0", "f-8", "f-24"}  # each once; frame 16 was not read


def test_scores_that_were_asked_for_alone_are_dots(question):
    scores = [0.5, None, None, 0.7, None, None, None, 0.1]
    (row,) = of(question, record(question, scores=scores)).rows
    assert row.dots == "M0 33h0M375 0h0M875 100h0" and not row.curve


def test_without_scores_events_or_the_file_ticks_remain(question):
    (row,) = of(question, record(question, scores=None, events=[], video="gone.mp4")).rows
    assert not row.thumbs and not row.curve and row.ticks.count("M") == 3 and row.hits is None
    assert timeline([], {}) is None and thumbnails({"gone.mp4": [1]}) == {}
    assert timeline([("failed", {"video": "v", "error": "no", "times": None, "frames": None})], {}) is None


def test_thumbnails_stand_near_their_frames_without_touching(question):
    frames = list(range(32))
    pictures = thumbnails({question.video: frames})
    width = 100 * (next(iter(pictures.values())).width + 4) / 800
    for times in ([i / 8 for i in frames], [20 + i / 100 for i in frames], [4 + (i > 3) * 16 for i in frames]):
        one = record(question, frames=frames, times=times, duration=20.0)
        (row,) = timeline([("arm", one)], pictures).rows
        for lane in range(row.lanes):
            middles = [thumb.middle for thumb in row.thumbs if thumb.lane == lane]
            assert all(b - a >= width - 0.02 for a, b in zip(middles, middles[1:]))
            assert middles[0] >= width / 2 - 0.01 and middles[-1] <= 100 - width / 2 + 0.01
    alone = timeline([("arm", record(question))], pictures).rows[0].thumbs[1]
    assert alone.middle == alone.at and alone.lane == 0


@pytest.mark.parametrize("seed", range(5))
def test_no_other_places_are_nearer(seed):
    wanted = np.sort(np.random.default_rng(seed).uniform(30, 60, size=6))
    places = _apart(list(wanted), 4.0)
    # The same as bounded least squares: the first place, and how much more than a step each other is from the last.
    steps = np.tril(np.ones((6, 6)))
    best = optimize.lsq_linear(steps, wanted - 4.0 * np.arange(6), ([-np.inf] + [0] * 5, np.inf), tol=1e-12).x
    assert places == pytest.approx(steps @ best + 4.0 * np.arange(6), abs=1e-4)
    crowd = _apart([99.0] * 6, 4.0)
    assert crowd == pytest.approx([78, 82, 86, 90, 94, 98])


def test_long_score_curves_keep_their_peaks(question):
    scores = [0.0] * 5000
    scores[2500] = 1.0
    line = of(question, record(question, scores=scores, candidate_times=[i / 1250 for i in range(5000)]))
    assert line.rows[0].curve.count("L") < 400 and "L500 0L" in line.rows[0].curve


def test_of_many_frames_some_are_pictures():
    shown = some(list(range(100)), MOST)
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
    assert text.count("<image") == text.count("<use") == 4 and "What &lt;colour&gt;?" in text
    assert text.count('class="curve"') == 1 and not re.search(r"(src|href)=\"(?!data:|#)", text) and "://" not in text

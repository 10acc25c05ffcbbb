"""Video-MME: its records, prompts and scores, on made files of its form."""

import pytest
from made_annotations import VIDEOMME, touch, write_json, write_parquet

import xcomp
from xcomp.benchmarks.videomme import VideoMME


@pytest.fixture
def make(tmp_path):
    def make(records, **options):
        path = write_parquet(tmp_path / "test-00000-of-00001.parquet", records)
        return xcomp.load_benchmark("videomme", annotations=path, videos=str(tmp_path), **options)

    return make


def test_a_row_becomes_a_question(make, tmp_path):
    (question,) = make([VIDEOMME]).questions()
    assert (question.id, question.video) == ("videomme-601-1", str(tmp_path / "made-long-1.mp4"))
    assert (question.answer, question.category) == (2, "long")
    assert question.options == ("A. One.", "B. Two.", "C. Three.", "D. None of these.")
    assert question.labels == {
        "duration": ("long",),
        "domain": ("Knowledge",),
        "sub_category": ("Humanity & History",),
        "task_type": ("Counting Problem",),
    }
    assert tuple(question.labels) == VideoMME.axes and VideoMME.max_new_tokens == 16


@pytest.mark.parametrize("inside", ["", "data", "videos", "images_2048"])
@pytest.mark.parametrize("name", ["made-long-1.mp4", "made-long-1.MP4", "made-long-1.mkv", "made-long-1/x_0001.jpg"])
def test_videos_are_found_where_they_are_published(make, tmp_path, inside, name):
    touch(tmp_path / inside / name)
    (question,) = make([VIDEOMME]).questions()
    assert question.video == str(tmp_path / inside / name.removesuffix("/x_0001.jpg"))


def test_a_missing_video_is_looked_for_where_the_others_are(make, tmp_path):
    (tmp_path / "data").mkdir()
    (question,) = make([VIDEOMME]).questions()
    assert question.video == str(tmp_path / "data" / "made-long-1.mp4")


def test_durations_are_a_subset(make):
    rows = [VIDEOMME | {"question_id": f"{i}", "duration": d} for i, d in enumerate(["short", "long", "medium"])]
    assert [q.category for q in make(rows).questions()] == ["short", "long", "medium"]
    assert [q.category for q in make(rows, durations=["long"]).questions()] == ["long"]
    with pytest.raises(ValueError, match="durations names 'lang'; did you mean 'long'. known: short, medium, long"):
        make(rows, durations=["lang"])
    with pytest.raises(ValueError, match="has no question of the durations medium"):
        make(rows[:2], durations=["medium"]).questions()


def test_odd_rows_are_counted(make):
    options = ["A. One.", "B. Two.", "C. One.", "D. Two."]
    benchmark = make(
        [VIDEOMME | {"options": options}, VIDEOMME | {"question_id": "x", "options": ["A", "B", "C", "D"]}]
    )
    assert [q.answer for q in benchmark.questions()] == [2, 2]
    assert benchmark.defects == {"options that repeat": 1, "right option twice": 1}


@pytest.mark.parametrize(
    "row, message",
    [
        ({k: v for k, v in VIDEOMME.items() if k != "task_type"}, "record 1 has no 'task_type'"),
        (VIDEOMME | {"answer": "E"}, "record 1: the answer 'E' is no letter of an option"),
        (VIDEOMME | {"answer": ""}, "record 1: the answer '' is no letter of an option"),
        (VIDEOMME | {"duration": "endless"}, "record 1: duration is 'endless'; known: short, medium, long"),
        (VIDEOMME | {"options": "A"}, "record 1: 'options' must be list of text, not 'A'"),
    ],
)
def test_bad_rows_are_refused(make, row, message):
    with pytest.raises(ValueError, match=message):
        make([row]).questions()


def test_foreign_files_are_refused(tmp_path):
    path = write_json(tmp_path / "videomme.json", [VIDEOMME])
    with pytest.raises(ValueError, match=r"videomme\.json' must be a file ending in \.parquet"):
        xcomp.load_benchmark("videomme", annotations=path, videos=".").questions()
    with pytest.raises(ValueError, match=r"no\.parquet' cannot be read: No such file"):
        xcomp.load_benchmark("videomme", annotations=str(tmp_path / "no.parquet"), videos=".").questions()
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"x\.parquet' is not parquet"):
        xcomp.load_benchmark("videomme", annotations=str(tmp_path / "x.parquet"), videos=".").questions()


def test_the_prompts_are_those_of_the_published_evaluations(make):
    first, lmms_eval = make([VIDEOMME]), make([VIDEOMME], prompts="lmms_eval")
    assert first.prompt(first.questions()[0]) == (
        "These are the frames of a video. Select the best answer to the following multiple-choice question based on "
        "the video. Respond with only the letter (A, B, C, or D) of the correct option.\nQuestion: How many\nlamps are "
        "there?\nOption:\nA. One.\nB. Two.\nC. Three.\nD. None of these.\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert lmms_eval.prompt(lmms_eval.questions()[0]) == (
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
        "Respond with only the letter (A, B, C, or D) of the correct option.\nHow many\nlamps are there?\n"
        "A. One.\nB. Two.\nC. Three.\nD. None of these.\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    question = first.questions()[0]
    assert [b.parse("Answer: D", question) for b in (first, lmms_eval)] == [0, 3]


def test_metrics():
    records = [
        {"labels": {"duration": [d]}, "score": s, "text": ""} for d, s in [("short", 1.0), ("long", 1.0), ("long", 0.0)]
    ]
    assert VideoMME.metrics(records) == {"accuracy": pytest.approx(200 / 3), "short": 100.0, "long": 50.0}

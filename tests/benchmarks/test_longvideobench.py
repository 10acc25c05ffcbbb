"""LongVideoBench: both forms of its records, prompts with subtitles; the real annotations where they are present."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from made_annotations import (
    ANNOTATIONS,
    CUES,
    LONGVIDEOBENCH,
    longvideobench_row,
    needs_annotations,
    touch,
    write_json,
    write_parquet,
)

import xcomp
from xcomp.benchmarks.longvideobench import LongVideoBench, shown_cues
from xcomp.subtitles import Cue


@pytest.fixture
def make(tmp_path):
    def make(records, parquet=False, **options):
        write_json(tmp_path / "subtitles" / "made_en.json", CUES)
        if parquet:
            path = write_parquet(tmp_path / "validation-00000-of-00001.parquet", list(map(longvideobench_row, records)))
        else:
            path = write_json(tmp_path / "lvb_val.json", records)
        return xcomp.load_benchmark("longvideobench", annotations=path, videos=str(tmp_path), **options)

    return make


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_becomes_a_question(make, tmp_path):
    (question,) = make([LONGVIDEOBENCH]).questions()
    assert (question.id, question.video) == ("longvideobench-made_0", str(tmp_path / "made.mp4"))
    assert (question.answer, question.options) == (2, ("A cup", "A hat", "A cat"))
    assert question.subtitles == str(tmp_path / "subtitles" / "made_en.json")
    assert question.labels == {
        "duration_group": ("15",),
        "question_category": ("T2O",),
        "level": ("L1-Perception",),
        "duration_group, question_category": ("15 T2O",),
    }
    assert tuple(question.labels) == LongVideoBench.axes and LongVideoBench.max_new_tokens == 32


def test_json_and_parquet_are_the_same_questions(make):
    records = [
        LONGVIDEOBENCH,
        LONGVIDEOBENCH | {"id": "x", "candidates": list("abcde"), "starting_timestamp_for_subtitles": 7},
        LONGVIDEOBENCH | {"id": "y", "question_category": "SSS", "level": "L2-Relation", "duration_group": 3600},
    ]
    assert make(records).questions() == make(records, parquet=True).questions()


@pytest.mark.parametrize("inside", ["", "videos"])
@pytest.mark.parametrize("name", ["made.mp4", "made.mkv", "made/x_1.png"])
def test_videos_are_found_where_they_are_published(make, tmp_path, inside, name):
    touch(tmp_path / inside / name)
    (question,) = make([LONGVIDEOBENCH]).questions()
    assert question.video == str(tmp_path / inside / name.removesuffix("/x_1.png"))


def test_subtitles_lie_beside_or_in_the_videos_or_where_they_are_said_to(tmp_path):
    path = write_json(tmp_path / "lvb_val.json", [LONGVIDEOBENCH])
    (tmp_path / "videos").mkdir()
    for folder, options in (("subtitles", {}), ("other", {"subtitles": str(tmp_path / "other")})):
        benchmark = xcomp.load_benchmark("longvideobench", annotations=path, videos=str(tmp_path / "videos"), **options)
        with pytest.raises(
            ValueError, match=rf"1 of 1 subtitle files are missing, the first '.*{folder}.made_en\.json'"
        ):
            benchmark.questions()
        write_json(tmp_path / folder / "made_en.json", CUES)
        assert benchmark.questions()[0].subtitles == str(tmp_path / folder / "made_en.json")


def test_durations_are_a_subset(make):
    records = [LONGVIDEOBENCH | {"id": str(d), "duration_group": d} for d in (15, 600, 3600)]
    assert [q.category for q in make(records, durations=[3600, 15]).questions()] == ["15", "3600"]
    with pytest.raises(ValueError, match="durations names '360'; did you mean '3600'. known: 15, 60, 600, 3600"):
        make(records, durations=[360])
    with pytest.raises(ValueError, match="has no question of the duration groups 60"):
        make(records, durations=[60]).questions()


@pytest.mark.parametrize(
    "record, message",
    [
        ({"id": "a"}, "record 1 has no 'video_path'"),
        (LONGVIDEOBENCH | {"correct_choice": -1}, "correct_choice is -1, none of its 3 options; the test split has no"),
        (LONGVIDEOBENCH | {"correct_choice": 3}, "correct_choice is 3, none of its 3 options"),
        (LONGVIDEOBENCH | {"candidates": None}, "record 1: 'candidates' must be list of text, not None"),
        (LONGVIDEOBENCH | {"duration_group": 30}, "record 1: duration_group is 30; known"),
        (LONGVIDEOBENCH | {"question_category": "XYZ"}, "record 1: question_category 'XYZ' is not known"),
    ],
)
def test_bad_records_are_refused(make, record, message):
    with pytest.raises(ValueError, match=message):
        make([record]).questions()


def test_interleaved_subtitles_are_refused_by_name(make):
    with pytest.raises(ValueError, match="prompts: lmms_eval shows none .*between the frames, val_i, is not there"):
        make([LONGVIDEOBENCH], prompts="lmms_eval", subtitles="x")


def test_odd_records_are_counted(make):
    benchmark = make([LONGVIDEOBENCH | {"candidates": ["x", "x", "y"]}])
    benchmark.questions()
    assert benchmark.defects == {"options that repeat": 1}


# --- prompts and answers ----------------------------------------------------------------------------------------------


def test_the_prompts_are_those_of_the_published_evaluations(make):
    first, lmms_eval = make([LONGVIDEOBENCH]), make([LONGVIDEOBENCH], prompts="lmms_eval")
    assert first.prompt(first.questions()[0]) == (
        " This video's subtitles are listed below: \nhello\na cup of tea.\n"
        " Select the best answer to the following multiple-choice question based on the video and the subtitles. "
        "Respond with only the letter of the correct option.\n"
        "Question: What is on the table while the man says hello?\n(A). A cup\n(B). A hat\n(C). A cat\n"
        "Answer with the option's letter from the given choices directly.\n"
    )
    (question,) = lmms_eval.questions()
    assert question.subtitles is None
    assert lmms_eval.prompt(question) == (
        "What is on the table while the man says hello?\nA. A cup\nB. A hat\nC. A cat\n"
        "Answer with the option's letter from the given choices directly.\n"
    )
    assert [b.parse("I think B or so", question) for b in (first, lmms_eval)] == [1, 1]
    assert [b.parse("it is on top of a hat", question) for b in (first, lmms_eval)] == [1, None]


def test_the_clock_of_the_subtitles_is_shifted(make):
    later = LONGVIDEOBENCH | {"starting_timestamp_for_subtitles": 3}
    benchmark = make([later])
    assert "listed below: \na cup of tea.\n" in benchmark.prompt(benchmark.questions()[0])


def test_a_whole_number_is_no_end(make, tmp_path):
    """The published reader takes only a float for one."""
    benchmark = make([LONGVIDEOBENCH])
    (question,) = benchmark.questions()
    for end, shown in ((2, "hello"), (2.0, "")):
        write_json(tmp_path / "subtitles" / "made_en.json", [{"timestamp": [1.0, end], "text": "hello"}])
        assert f"listed below: \n{shown}.\n" in benchmark.prompt(question)
    write_json(tmp_path / "subtitles" / "made_en.json", [{"timestamp": [1.1, 1.2], "text": "short"}])
    assert "listed below: \nshort.\n" in benchmark.prompt(question)  # widened to 0.65 … 1.65 s
    write_json(tmp_path / "subtitles" / "made_en.json", [{"timestamp": [1.4, 0.7], "text": "backwards"}])
    assert "listed below: \nbackwards.\n" in benchmark.prompt(question)  # 0.55 … 1.55 s


def test_broken_subtitles_are_refused_before_anything_is_asked(make, tmp_path):
    benchmark = make([LONGVIDEOBENCH])
    (tmp_path / "subtitles" / "made_en.json").write_text('[{"timestamp": [1.0, 2.0]}]')
    with pytest.raises(ValueError, match=r"longvideobench: subtitles '.*made_en\.json', cue 0"):
        benchmark.questions()


def slow_shown(cues, start, duration, num_times):
    """Every cue against every time."""
    if duration > num_times:
        times = [duration / num_times * i for i in range(num_times)]
    else:
        times = [float(second) for second in range(int(duration))]
    shown = []
    for cue in cues:
        begin, end = cue.start - start, cue.end - start
        if end == float("inf"):
            end = duration - start
        middle = (begin + end) / 2
        if end - begin < 1:
            begin, end = middle - 0.5, middle + 0.5
        if any(begin < time < end for time in times):
            shown.append(cue.text)
    return shown


@pytest.mark.parametrize("num_times", [16, 512])
def test_shown_cues_against_a_slow_reference(num_times):
    draw, kept = random.Random(num_times), 0
    for _ in range(200):
        duration, start = draw.choice([9.0, 15.3, 16.0, 61.7, 512.0, 700.25, 3000.0]), draw.choice([0.0, 0.5, 12.0])
        cues, clock = [], 0.0
        for number in range(30):
            clock += draw.choice([0.0, 0.25, draw.random() * duration / 20])
            cues.append(
                Cue(clock, clock + draw.choice([0.0, 0.5, 1.0, 3.0 * draw.random(), float("inf")]), f"cue {number}")
            )
        shown = shown_cues(cues, start, duration, num_times)
        assert shown == slow_shown(cues, start, duration, num_times)
        kept += len(shown)
    assert 0 < kept < 200 * 30


def test_a_time_on_a_cues_border_does_not_show_it():
    assert shown_cues([Cue(2.0, 3.0, "a"), Cue(2.5, 3.5, "b"), Cue(3.0, 3.0, "c")], 0.0, 10.0, 16) == ["b", "c"]


def test_metrics():
    assert LongVideoBench.metrics([{"score": 1.0}, {"score": 0.0}, {"score": 0.0}]) == {"accuracy": 33.333}


# --- the real files ---------------------------------------------------------------------------------------------------

FILES = ANNOTATIONS / "LongVideoBench"


def real(name="lvb_val.json", **options):
    return xcomp.load_benchmark("longvideobench", annotations=str(FILES / name), videos="videos", **options)


@needs_annotations
def test_real_annotations():
    benchmark = real(prompts="lmms_eval")
    questions = benchmark.questions()
    assert len(questions) == 1337 and len({q.video for q in questions}) == 753
    assert Counter(len(q.options) for q in questions) == {5: 983, 4: 353, 3: 1}
    assert Counter(q.category for q in questions) == {"15": 189, "60": 172, "600": 412, "3600": 564}
    assert Counter(q.labels["level"][0] for q in questions) == {"L1-Perception": 625, "L2-Relation": 712}
    assert sum(q.meta["subtitles_start"] != 0 for q in questions) == 250
    assert benchmark.defects["options that repeat"] == 8 and "right option twice" not in benchmark.defects
    records = json.loads((FILES / "lvb_val.json").read_text(encoding="utf-8"))
    assert [q.labels["level"][0] for q in questions] == [r["level"] for r in records]
    assert [q.options[q.answer] for q in questions] == [r["candidates"][r["correct_choice"]] for r in records]


@needs_annotations
def test_the_real_parquet_is_the_real_json():
    ours, parquet = (real(name, prompts="lmms_eval") for name in ("lvb_val.json", "validation-00000-of-00001.parquet"))
    assert ours.questions() == parquet.questions() and ours.defects == parquet.defects


@needs_annotations
def test_real_prompts(tmp_path):
    """The subtitles are made up: they are not with the annotations."""
    records = json.loads((FILES / "lvb_val.json").read_text(encoding="utf-8"))
    said = {}
    for place, record in enumerate(records):
        start = float(record["starting_timestamp_for_subtitles"])
        said[record["subtitle_path"]] = [Cue(start + 0.5, start + 2.5, f"said {place}"), Cue(-9.0, -8.0, "never")]
    for path, cues in said.items():
        write_json(tmp_path / path, [{"timestamp": [cue.start, cue.end], "text": cue.text} for cue in cues])
    head = (
        " This video's subtitles are listed below: \n{}.\n Select the best answer to the following multiple-choice "
        "question based on the video and the subtitles. Respond with only the letter of the correct option.\n"
    )
    tail = "Answer with the option's letter from the given choices directly.\n"
    with_subtitles, plain = real(subtitles=str(tmp_path)), real(prompts="lmms_eval")
    for r, question, other in zip(records, with_subtitles.questions(), plain.questions(), strict=True):
        shown = slow_shown(said[r["subtitle_path"]], r["starting_timestamp_for_subtitles"], r["duration"], 512)
        lines = "".join(f"({letter}). {option}\n" for letter, option in zip("ABCDE", r["candidates"]))
        expected = head.format("\n".join(shown)) + f"Question: {r['question']}\n{lines}{tail}"
        assert with_subtitles.prompt(question) == expected
        lines = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCDE", r["candidates"]))
        assert plain.prompt(other) == f"{r['question']}\n{lines}{tail}"
        assert replace(question, subtitles=None) == other

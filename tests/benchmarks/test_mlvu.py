"""MLVU: its records, prompts and scores; the real annotations where they are present."""

import json
from collections import Counter

import pytest
from made_annotations import ANNOTATIONS, MLVU, needs_annotations, touch, write_json

import xcomp
from xcomp.benchmarks.mlvu import MLVU as MLVUBenchmark

NAMES = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning")


def mlvu(annotations, videos, **options):
    return xcomp.load_benchmark("mlvu", annotations=str(annotations), videos=str(videos), **options)


@pytest.fixture
def folder(tmp_path):
    """All seven files, a record each."""
    for name in NAMES:
        write_json(tmp_path / "json" / f"{name}.json", [MLVU | {"question": f"What of {name}?"}])
    return tmp_path / "json"


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_all_tasks_in_order(folder, tmp_path):
    questions = mlvu(folder, tmp_path).questions()
    assert [q.category for q in questions] == [name.split("_", 1)[1] for name in NAMES]
    first = questions[0]
    assert first.video == str(tmp_path / "1_plotQA" / "made_1.mp4") and first.answer == 1
    assert first.options == ("Yellow", "Red", "Green", "Blue") and first.labels == {"task": ("plotQA",)}
    assert first.meta["duration"] == 246 and len({q.id for q in questions}) == 7
    assert len({q.video for q in questions}) == 7  # one name, a folder a task
    assert MLVUBenchmark.axes == ("task",) and MLVUBenchmark.max_new_tokens == 16


def test_one_file_or_some_tasks(folder, tmp_path):
    (question,) = mlvu(folder / "5_order.json", tmp_path).questions()
    assert question.category == "order"
    found = mlvu(folder, tmp_path, tasks=["ego", "needle"]).questions()
    assert [q.category for q in found] == ["needle", "ego"]
    with pytest.raises(ValueError, match="tasks names 'plotqa'; did you mean 'plotQA'. known: plotQA, needle"):
        mlvu(folder, tmp_path, tasks=["plotqa"])


@pytest.mark.parametrize("inside", ["", "video", "MLVU/video"])
@pytest.mark.parametrize("suffix", [".mp4", ".MP4", ".mkv"])
def test_videos_are_found_where_they_are_published(folder, tmp_path, inside, suffix):
    path = tmp_path / inside / "3_ego" / f"made_1{suffix}"
    touch(path)
    (question,) = mlvu(folder, tmp_path, tasks=["ego"]).questions()
    assert question.video == str(path)


def test_a_folder_of_frames_comes_first(folder, tmp_path):
    touch(tmp_path / "3_ego" / "made_1.mp4", tmp_path / "3_ego" / "made_1" / "x_1.jpg")
    (question,) = mlvu(folder, tmp_path, tasks=["ego"]).questions()
    assert question.video == str(tmp_path / "3_ego" / "made_1")


def test_odd_records_are_counted_and_asked(tmp_path):
    empty = {"question": "", "candidates": [""] * 4, "answer": ""}
    records = [
        MLVU,
        MLVU | empty,
        MLVU | {"answer": "Crimson"},
        MLVU | {"candidates": ["Red", "Red", "Blue", " Red"]},
        MLVU | {"candidates": ["Red", "", "", "Blue"]},
    ]
    path = write_json(tmp_path / "7_topic_reasoning.json", records)
    benchmark, last = (mlvu(path, tmp_path, prompts=family) for family in ("videochat_flash", "lmms_eval"))
    assert [q.answer for q in benchmark.questions()] == [1, 0, None, 0, 0]
    assert [q.answer for q in last.questions()] == [1, 3, None, 1, 0]
    assert benchmark.defects == {
        "options that repeat": 3,
        "right option twice": 2,
        "right answer not among the options": 1,
        "no question text": 1,
        "empty options": 2,
        "outer white space in question or options": 1,
    }
    tail = "Answer with the option's letter from the given choices directly."
    assert benchmark.prompt(benchmark.questions()[1]) == f"Question:\nOption:\n(A) \n(B) \n(C) \n(D) \n{tail}"


def test_foreign_files_are_refused(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"'.*other\.json' must be a folder or one of the files 1_plotQA\.json, 2_needle"
    ):
        mlvu(write_json(tmp_path / "other.json", [MLVU]), tmp_path).questions()
    with pytest.raises(ValueError, match=r"1_plotQA\.json' must be a folder or one of the files 3_ego\.json$"):
        mlvu(folder / "1_plotQA.json", tmp_path, tasks=["ego"]).questions()
    (folder / "4_count.json").unlink()
    with pytest.raises(ValueError, match=r"4_count\.json' cannot be read: No such file"):
        mlvu(folder, tmp_path).questions()
    path = write_json(tmp_path / "3_ego.json", [MLVU, {"video": "a.mp4", "duration": 1}])
    with pytest.raises(ValueError, match=r"3_ego\.json', record 2 has no 'question'"):
        mlvu(path, tmp_path).questions()


# --- prompts and scores -----------------------------------------------------------------------------------------------


def test_the_prompts_are_those_of_the_published_evaluations(tmp_path):
    path = write_json(tmp_path / "1_plotQA.json", [MLVU])
    ours, lmms_eval = (mlvu(path, tmp_path, prompts=family) for family in ("videochat_flash", "lmms_eval"))
    assert ours.prompt(ours.questions()[0]) == (
        "Question:What colour is the door?\nOption:\n(A) Yellow\n(B) Red\n(C) Green\n(D) Blue\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert lmms_eval.prompt(lmms_eval.questions()[0]) == (
        "What colour is the door?\n(A) Yellow\n(B) Red\n(C) Green\n(D) Blue\nOnly give the best option.\nBest option: ("
    )
    question = ours.questions()[0]
    assert [b.parse(text, question) for b in (ours, lmms_eval) for text in ("b) it is", "D")] == [1, 3, None, 3]


def test_metrics():
    def record(task, score, text="A"):
        return {"labels": {"task": [task]}, "score": score, "text": text}

    records = [*[record("ego", 1.0)] * 3, record("ego", 0.0, ""), record("count", 0.0)]
    assert MLVUBenchmark.metrics(records) == {
        "accuracy": 60.0,
        "M-Avg": 37.5,
        "accuracy, empty left out": pytest.approx((4 * 100 + 1 * 0) / 5),
    }


def test_the_published_figures_follow_from_the_tasks():
    """XComp's published run: micro 66.667 and macro 63.97, from the accuracies of the seven tasks."""
    accuracy = {"plotQA": 77.92, "needle": 79.72, "ego": 62.50, "count": 40.78, "order": 28.57}
    accuracy |= {"anomaly_reco": 76.50, "topic_reasoning": 81.82}
    sizes = dict(zip(accuracy, (539, 355, 352, 206, 259, 200, 264)))
    records = []
    for task, size in sizes.items():
        right = round(accuracy[task] * size / 100)
        records += [{"labels": {"task": [task]}, "score": float(i < right), "text": "A"} for i in range(size)]
    found = MLVUBenchmark.metrics(records)
    assert found["accuracy"] == pytest.approx(66.667, abs=5e-4) and found["M-Avg"] == pytest.approx(63.97, abs=5e-3)


# --- the real files ---------------------------------------------------------------------------------------------------

FILES = ANNOTATIONS / "MLVU_MC" / "json"


@needs_annotations
def test_real_annotations():
    benchmark = mlvu(FILES, "videos")
    questions = benchmark.questions()
    assert len(questions) == 2175 and len({q.video for q in questions}) == 1242
    assert len({q.video.rsplit("/", 1)[1] for q in questions}) == 1122
    counts = Counter(q.category for q in questions)
    assert list(counts.values()) == [539, 355, 352, 206, 259, 200, 264]
    assert benchmark.defects["right answer not among the options"] == 2
    assert [q.id for q in questions if q.answer is None] == ["mlvu-needle-0034", "mlvu-needle-0338"]
    assert benchmark.defects["no question text"] == 1 and benchmark.defects["empty options"] == 4
    assert benchmark.defects["outer white space in question or options"] == 23 + 24
    assert benchmark.defects["options that repeat"] == 5 + 9 + 2
    assert benchmark.defects["right option twice"] == 3 + 1 + 2
    assert sum(q.meta["duration"] for q in questions) / len(questions) == pytest.approx(651.0, abs=0.1)


@needs_annotations
def test_which_of_two_right_options_counts():
    first, last = (mlvu(FILES, "videos", prompts=family).questions() for family in ("videochat_flash", "lmms_eval"))
    differ = {a.id: (a.answer, b.answer) for a, b in zip(first, last) if a.answer != b.answer}
    assert len(differ) == 6 and differ["mlvu-topic_reasoning-0026"] == (0, 3)


@needs_annotations
def test_real_prompts():
    records = [r for name in NAMES for r in json.loads((FILES / f"{name}.json").read_text(encoding="utf-8"))]
    forms = {
        "videochat_flash": "Question:%s\nOption:\n(A) %s\n(B) %s\n(C) %s\n(D) %s\n"
        "Answer with the option's letter from the given choices directly.",
        "lmms_eval": "%s\n(A) %s\n(B) %s\n(C) %s\n(D) %s\nOnly give the best option.\nBest option: (",
    }
    for family, form in forms.items():
        benchmark = mlvu(FILES, "videos", prompts=family)
        for r, question in zip(records, benchmark.questions(), strict=True):
            assert benchmark.prompt(question) == form % (r["question"], *r["candidates"])

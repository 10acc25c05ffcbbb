"""LVBench: both forms of its records, its prompts and scores; the real annotations where they are present."""

import json
from collections import Counter

import pytest
from made_annotations import ANNOTATIONS, LVBENCH, LVBENCH_OFFICIAL, needs_annotations, write_lines

import xcomp
from xcomp.benchmarks.lvbench import LVBench


@pytest.fixture
def make(tmp_path):
    def make(records, name="lvbench.json", **options):
        path = tmp_path / name
        path.write_text(records if isinstance(records, str) else json.dumps(records))
        return xcomp.load_benchmark("lvbench", annotations=str(path), videos=str(tmp_path), **options)

    return make


def official(folder, *videos, **options):
    path = write_lines(folder / "video_info.meta.jsonl", list(videos))
    return xcomp.load_benchmark("lvbench", annotations=path, videos=str(folder), **options)


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_becomes_a_question(make, tmp_path):
    (tmp_path / "1").mkdir()
    more = {"video": "1", "answer": "(B) 1366", "question_type": ["reasoning", "summarization"]}
    first, second = make([LVBENCH, LVBENCH | more]).questions()
    assert (first.video, first.answer, first.category) == (str(tmp_path / "00000000.mp4"), 3, "cartoon")
    assert (second.video, second.answer) == (str(tmp_path / "1"), 1)
    assert first.id != second.id and first.meta["time_reference"] == "00:15-00:19"
    assert first.options == tuple(LVBENCH["candidates"]) and first.events == ((15.0, 19.0),)
    assert second.labels == {"type": ("cartoon",), "question_type": ("reasoning", "summarization")}
    assert LVBench.axes == ("type", "question_type") and LVBench.max_new_tokens == 16


def test_an_official_line_becomes_its_questions(tmp_path):
    first, second = official(tmp_path, LVBENCH_OFFICIAL).questions()
    assert (first.id, first.video) == ("lvbench-7", str(tmp_path / "abcDEF-_123.mp4"))
    assert (first.question, first.answer, first.category) == ("What year appears?", 3, "tv")
    assert first.options == ("(A) 1636", "(B) 1366", "(C) 1363", "(D) 1633")
    assert first.events == ((100 * 60 + 15.0, 101 * 60 + 19.0),)
    assert first.labels["question_type"] == ("key information retrieval", "reasoning")
    assert (second.question, second.options, second.answer) == ("Who speaks\nfirst?", ("(A) Ann", "(B) Bob"), 0)
    assert second.events == ()


def test_types_are_a_subset(make, tmp_path):
    records = [LVBENCH, LVBENCH | {"type": "tv"}, LVBENCH | {"type": "sport"}]
    found = make(records, types=["sport", "cartoon"]).questions()
    assert [q.category for q in found] == ["cartoon", "sport"] and found[1].id == "lvbench-0002"
    with pytest.raises(ValueError, match="has no question of the types live"):
        make(records, types=["live"]).questions()
    with pytest.raises(ValueError, match="types names 'cartoons'; did you mean 'cartoon'. known: cartoon, documentary"):
        make(records, types=["cartoons"])


def test_odd_records_are_counted_and_asked(make):
    odd = [
        LVBENCH | {"candidates": ["(A) x", "(B) y", "(C) x", "(D) z"], "answer": "(C) x"},
        LVBENCH | {"candidates": ["(A) x", "(B) y", "(C) x", "(D) z"], "answer": "(B) y"},
        LVBENCH | {"question": " What?"},
        LVBENCH | {"time_reference": "08:17-None"},
        LVBENCH | {"time_reference": "10:00-09:00"},
        LVBENCH | {"time_reference": "00:07-00:07"},
    ]
    benchmark = make(odd)
    questions = benchmark.questions()
    assert [q.answer for q in questions[:2]] == [2, 1]
    assert [q.events for q in questions[3:]] == [(), (), ((7.0, 8.0),)]
    assert benchmark.defects == {
        "time reference without both times": 1,
        "time reference that ends before it starts": 1,
        "options that repeat": 2,
        "right option twice": 1,
        "outer white space in question or options": 1,
    }


@pytest.mark.parametrize(
    "records, message",
    [
        ("[", r"lvbench\.json' is not JSON"),
        ("{}", "must hold a list"),
        ("[]", "is empty"),
        ([{"video": "1"}], "record 1 has no 'type'"),
        (["x"], "has 1 bad record: record 1: not an object of fields but 'x'"),
        ([LVBENCH, LVBENCH | {"answer": "1633"}], "record 2: the answer '1633' is none of the candidates"),
        ([LVBENCH | {"candidates": "x"}], "record 1: 'candidates' must be list of text, not 'x'"),
        ([LVBENCH | {"candidates": [1, 2]}], r"record 1: 'candidates' must be list of text, not \[1, 2\]"),
        ([LVBENCH | {"type": "news"}], "record 1: type is 'news'; known: cartoon"),
    ],
)
def test_bad_annotations_are_refused(make, records, message):
    with pytest.raises(ValueError, match=message):
        make(records).questions()


@pytest.mark.parametrize(
    "video, message",
    [
        ({"key": "a", "type": "tv"}, "line 1 has no list 'qa'"),
        ({"key": "a"}, "line 1 has no 'type'"),
        (
            LVBENCH_OFFICIAL | {"qa": [LVBENCH_OFFICIAL["qa"][0] | {"answer": "E"}]},
            "line 1, question 0: the answer 'E'",
        ),
        (
            LVBENCH_OFFICIAL | {"qa": [LVBENCH_OFFICIAL["qa"][0] | {"question": "Who?"}]},
            "question 0: the answer 'D' is",
        ),
    ],
)
def test_bad_official_lines_are_refused(tmp_path, video, message):
    with pytest.raises(ValueError, match=message):
        official(tmp_path, video).questions()


def test_missing_and_foreign_files_are_refused(make, tmp_path):
    benchmark = xcomp.load_benchmark("lvbench", annotations=str(tmp_path / "no.json"), videos=".")
    with pytest.raises(ValueError, match=r"no\.json' cannot be read: No such file"):
        benchmark.questions()
    with pytest.raises(ValueError, match=r"'.*train\.parquet' must be a file ending in \.json or \.jsonl"):
        make([LVBENCH], name="train.parquet").questions()
    with pytest.raises(ValueError, match=r"has 1 bad line: line 2: not JSON"):
        make(json.dumps(LVBENCH_OFFICIAL) + "\n{\n", name="video_info.meta.jsonl").questions()


def test_unknown_options_suggest_the_nearest(make):
    with pytest.raises(ValueError, match="has no option 'prompt'; did you mean 'prompts'"):
        make([LVBENCH], prompt="x")
    with pytest.raises(
        ValueError, match="prompts is 'lmmseval'; did you mean 'lmms_eval'. known: videochat_flash, lmms"
    ):
        make([LVBENCH], prompts="lmmseval")
    with pytest.raises(ValueError, match="parser is 'p4'; parsers: videochat_flash, "):
        make([LVBENCH], parser="p4")


# --- prompts, answers, scores -----------------------------------------------------------------------------------------


def test_the_prompts_are_those_of_the_published_evaluations(make, tmp_path):
    options = "\nA. (A) 1636\nB. (B) 1366\nC. (C) 1363\nD. (D) 1633\n"
    tail = "Answer with the option's letter from the given choices directly."
    for benchmark in (make([LVBENCH]), official(tmp_path, LVBENCH_OFFICIAL)):
        assert benchmark.prompt(benchmark.questions()[0]) == f"What year appears?{options}{tail}"
    plain = "What year appears?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633\nAnswer the question with the option letter"
    for benchmark in (
        make([LVBENCH], prompts="lmms_eval"),
        official(tmp_path, LVBENCH_OFFICIAL, prompts="lmms_eval"),
    ):
        assert benchmark.prompt(benchmark.questions()[0]) == plain


def test_the_parser_follows_the_prompt_unless_it_is_named(make):
    told = {}
    for options in (
        {},
        {"prompts": "lmms_eval"},
        {"parser": "mlvu"},
        {"prompts": "lmms_eval", "parser": "videochat_flash"},
    ):
        benchmark = make([LVBENCH], **options)
        question = benchmark.questions()[0]
        told[tuple(options.values())] = [benchmark.parse(text, question) for text in ("b", "(A) or (C)", "B.", "E")]
    assert told[()] == [1, 0, 1, None]
    assert told[("lmms_eval",)] == [None, 2, 1, None]
    assert told[("mlvu",)] == [None, 0, None, None]
    assert told[("lmms_eval", "videochat_flash")] == told[()]


def record(kind, score, text="A"):
    return {"labels": {"type": [kind], "question_type": ["reasoning"]}, "score": score, "text": text}


def test_metrics():
    records = [record("tv", 1.0), record("tv", 0.0), record("tv", 0.0, " "), record("sport", 1.0)]
    assert LVBench.metrics(records) == {
        "accuracy": 50.0,
        "accuracy, empty left out": pytest.approx((3 * 50 + 1 * 100) / 4),
    }
    failed = {key: value for key, value in record("tv", 0.0).items() if key != "text"}  # could not be asked
    assert LVBench.metrics([record("tv", 1.0), failed])["accuracy, empty left out"] == 100.0
    assert LVBench.metrics([]) == {"accuracy": 0.0, "accuracy, empty left out": 0.0}


# --- the real files ---------------------------------------------------------------------------------------------------

FILES = ANNOTATIONS / "LVBench"
TYPES = {"cartoon": 271, "documentary": 197, "live": 244, "selfmedia": 317, "sport": 240, "tv": 250}


def real(path, **options):
    return xcomp.load_benchmark("lvbench", annotations=str(FILES / path), videos="videos", **options)


@needs_annotations
def test_real_annotations():
    benchmark = real("json/lvbench_clean.json")
    questions = benchmark.questions()
    assert len(questions) == 1519 and len({q.video for q in questions}) == 101
    assert Counter(q.category for q in questions) == TYPES
    kinds = Counter(kind for q in questions for kind in q.labels["question_type"])
    assert [kinds[name] for name in ("entity recognition", "event understanding", "summarization")] == [664, 633, 58]
    assert sum(len(q.events) for q in questions) == 1519 - 2 - 13
    assert max(q.events[0][1] for q in questions if q.events) == 139 * 60 + 55
    assert benchmark.defects == {
        "time reference without both times": 2,
        "time reference that ends before it starts": 13,
        "options that repeat": 10,
        "right option twice": 4,
        "outer white space in question or options": 4,
    }


@needs_annotations
def test_the_real_parts_are_the_whole():
    whole = Counter((q.video, q.question, q.options) for q in real("json/lvbench_clean.json").questions())
    parts = Counter()
    for name, count in TYPES.items():
        questions = real(f"json/lvbench_clean_{name}.json").questions()
        assert len(questions) == count == len(real("json/lvbench_clean.json", types=[name]).questions())
        parts.update((q.video, q.question, q.options) for q in questions)
    assert parts == whole


@needs_annotations
def test_the_real_set_of_the_published_runs():
    questions = real("json_xcomp_1492/lvbench_clean.json").questions()
    assert len(questions) == 1492 and len({q.video for q in questions}) == 99
    assert Counter(q.category for q in questions) == TYPES | {"cartoon": 244}


@needs_annotations
@pytest.mark.parametrize("prompts", ["videochat_flash", "lmms_eval"])
def test_real_prompts(prompts):
    records = json.loads((FILES / "json/lvbench_clean.json").read_text(encoding="utf-8"))
    benchmark = real("json/lvbench_clean.json", prompts=prompts)
    forms = {
        "videochat_flash": "%s\nA. %s\nB. %s\nC. %s\nD. %s\n"
        "Answer with the option's letter from the given choices directly.",
        "lmms_eval": "%s\n%s\n%s\n%s\n%s\nAnswer the question with the option letter",
    }
    for r, question in zip(records, benchmark.questions(), strict=True):
        assert benchmark.prompt(question) == forms[prompts] % (r["question"], *r["candidates"])
        assert r["candidates"][question.answer] == r["answer"]

"""LVBench: its records, prompt and parser; the real annotations where they are present."""

import json

import pytest
from golden import ROOT

import xcomp
from xcomp.benchmarks.lvbench import parse_answer
from xcomp.testing import check_benchmark

RECORD = {
    "video": "00000000",
    "type": "cartoon",
    "question": "What year appears?",
    "candidates": ["(A) 1636", "(B) 1366", "(C) 1363", "(D) 1633"],
    "answer": "(D) 1633",
    "question_type": ["key information retrieval"],
    "time_reference": "00:15-00:19",
}


@pytest.fixture
def make(tmp_path):
    def make(records):
        path = tmp_path / "lvbench.json"
        path.write_text(records if isinstance(records, str) else json.dumps(records))
        return xcomp.load_benchmark("lvbench", annotations=str(path), videos=str(tmp_path))

    return make


def test_a_record_becomes_a_question(make, tmp_path):
    (tmp_path / "1").mkdir()
    first, second = make([RECORD, RECORD | {"video": "1", "answer": "(B) 1366"}]).questions()
    assert (first.video, first.answer, first.category) == (str(tmp_path / "00000000.mp4"), 3, "cartoon")
    assert (second.video, second.answer) == (str(tmp_path / "1"), 1)
    assert first.id != second.id and first.meta["time_reference"] == "00:15-00:19"


def test_the_prompt_is_that_of_the_published_evaluation(make):
    benchmark = make([RECORD])
    assert benchmark.prompt(benchmark.questions()[0]) == (
        "What year appears?\nA. (A) 1636\nB. (B) 1366\nC. (C) 1363\nD. (D) 1633\n"
        "Answer with the option's letter from the given choices directly."
    )


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"), ("B.", "B"), ("b", "B"), ("(B)", "B"), ("(B) red", "B"), ("B. red", "B"), ("B) red", "B"),
        ("B: red", "B"), ("The answer is C.", "C"), ("The best option is C", "C"), ("Answer: D", "D"), ("A dog", "A"),
        ("It is a dog", "A"), ("Because D", "D"), ("", None), ("E", "E"), ("(A) or (C)", "A"), ("A or C", "A"),
        ("I'd say B", "D"), ("B\nbecause A", "B"), ("**C**", "C"), ("the answer seems to be the green car", None),
        ("None", None),
    ],
)  # fmt: skip
def test_the_parser_reads_what_the_published_one_does(text, letter):
    assert parse_answer(text) == letter


def test_a_letter_that_is_no_option_is_no_answer(make):
    benchmark = make([RECORD])
    question = benchmark.questions()[0]
    assert benchmark.parse("E", question) is None and benchmark.parse("d", question) == 3


def test_contract(make, tmp_path):
    (tmp_path / "00000000.mp4").touch()
    make([RECORD])
    options = {"annotations": str(tmp_path / "lvbench.json"), "videos": str(tmp_path)}
    check_benchmark(type(make([RECORD])), **options)


@pytest.mark.parametrize(
    "records, message",
    [
        ("[", "are not JSON"),
        ("{}", "must hold a list"),
        ([{"video": "1"}], "record 0 has no 'question'"),
        (["x"], "record 0 has no 'video'"),
        ([RECORD | {"answer": "1633"}], "record 0: the answer '1633' is none of the candidates"),
    ],
)
def test_bad_annotations_are_refused(make, records, message):
    with pytest.raises(ValueError, match=message):
        make(records).questions()


def test_missing_annotations_are_refused(tmp_path):
    benchmark = xcomp.load_benchmark("lvbench", annotations=str(tmp_path / "no.json"), videos=".")
    with pytest.raises(ValueError, match=r"no\.json' cannot be read: No such file"):
        benchmark.questions()


FILE = ROOT.parent / "data" / "annotations" / "LVBench" / "json" / "lvbench_clean.json"


@pytest.mark.skipif(not FILE.is_file(), reason=f"no annotations at {FILE}")
def test_real_annotations():
    questions = xcomp.load_benchmark("lvbench", annotations=str(FILE), videos="videos").questions()
    assert len(questions) == 1519 and len({q.video for q in questions}) == 101
    assert sum(q.category == "tv" for q in questions) == 250

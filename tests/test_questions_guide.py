"""The guide to one's own questions: its file is read as it stands there, and its metric works."""

import json
import re
from pathlib import Path

import pytest

import xcomp
from xcomp.config import load_config

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "questions.md").read_text(encoding="utf-8")


def block(language, holding=""):
    return next(b for b in re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.S) if holding in b)


def test_the_file_is_read(tmp_path):
    (tmp_path / "questions.jsonl").write_text(block("json"))
    first, second, third = xcomp.load_benchmark("questions", file=str(tmp_path / "questions.jsonl")).questions()
    assert (first.answer, first.id, first.video) == (1, "questions-1", str(tmp_path / "kitchen.mp4"))
    assert second.answer == 1 and second.span == (62.0, 91.5)
    assert third.references == ("41 City Centre", "41") and third.category == "text"


def test_the_metric_is_loaded(tmp_path):
    (tmp_path / "mine.py").write_text(block("python"))
    (tmp_path / "questions.jsonl").write_text(block("json"))
    metrics = [f"{tmp_path}/mine.py:overlap", "exact_match"]
    benchmark = xcomp.load_benchmark("questions", file=str(tmp_path / "questions.jsonl"), metrics=metrics)
    question = benchmark.questions()[2]
    assert benchmark.score("city", question) == {"overlap": pytest.approx(1 / 3), "exact_match": 0.0}
    assert benchmark.score("41", question) == {"overlap": 1.0, "exact_match": 1.0}


def test_the_config_names_real_options(tmp_path):
    (tmp_path / "mine.yaml").write_text(block("yaml", "backbone"))
    config = load_config(tmp_path / "mine.yaml")
    assert xcomp.registry.configure(
        "benchmark", "questions", {k: v for k, v in config.benchmark.items() if k != "name"}
    )
    assert [arm.name for arm in config.arms] == ["everything", "LP-Comp"]


def test_every_field_is_in_its_table():
    from xcomp.benchmarks.questions import FIELDS

    table = GUIDE[GUIDE.index("| field |") : GUIDE.index("A field that is not listed")]
    named = set(re.findall(r"`([a-zA-Z]+)`", table))
    assert set(FIELDS[:11]) <= named and {"A", "B"} <= named


def test_the_message_is_what_is_said(tmp_path):
    """On a file with those three mistakes."""
    said = re.search(r"```\n(xcomp: error: .*?)\n```", GUIDE)[1]
    good = {"video": "a.mp4", "question": "What?", "options": list("wxyz"), "answer": "x"}
    wrong = {**good, "answer": "triangle"}
    mistyped = {key: value for key, value in good.items() if key != "answer"} | {"awnser": "x"}
    lines = [json.dumps(row) for row in (wrong, mistyped, good, good)] + ['{"video": "a.mp4']
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:
        xcomp.load_benchmark("questions", file=str(tmp_path / "questions.jsonl")).questions()
    parts = [part for part in re.split(r"; |: '", said) if part.startswith(("it may", "line", "did you"))]
    assert len(parts) >= 4
    for part in parts:
        start = part.split(" (Unterminated")[0].split(" …")[0].strip()
        assert start in str(error.value), start

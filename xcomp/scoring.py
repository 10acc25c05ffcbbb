"""What a run asks of a benchmark: its questions, what is put to the model of each, and the verdict on an answer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from xcomp.answering import Query
from xcomp.benchmark import Benchmark, Question
from xcomp.contract import check_metrics, check_prediction, check_questions, name_of
from xcomp.messages import printable

SHOWN = 10  # of a list of missing videos


@dataclass(frozen=True)
class Verdict:
    """What an answer was read as: an option's index (None: none, or the question is open), and how good it is, 0..1.

    ``metrics`` are those of an open question, by name; the first is the ``score``.
    """

    prediction: int | None
    score: float
    metrics: dict[str, float]


def read_questions(benchmark: Benchmark) -> list[Question]:
    """The benchmark's questions, checked before anything is asked.

    Raises:
        ContractError: if they break the contract, naming the benchmark, the question and the clause.
    """
    questions = benchmark.questions()
    check_questions(name_of("benchmark", benchmark), benchmark, questions)
    return questions


def missing_videos(questions: Sequence[Question]) -> list[str]:
    """The videos that are not there, in the order of the questions."""
    return [video for video in dict.fromkeys(q.video for q in questions) if not os.path.exists(video)]


def list_missing(missing: Sequence[str]) -> list[str]:
    """Lines with the first ten, and how many there are more."""
    more = [f"  missing: … and {len(missing) - SHOWN} more"] if len(missing) > SHOWN else []
    return [*(f"  missing: {printable(video)}" for video in missing[:SHOWN]), *more]


def query_of(benchmark: Benchmark, question: Question) -> Query:
    """The question as a model is asked it."""
    text = benchmark.prompt(question)
    return Query(question.video, question.question, text, question.id, question.events, question.span)


def judge(benchmark: Benchmark, question: Question, text: str) -> Verdict:
    """The verdict on what the model wrote, by the benchmark's own rules.

    Raises:
        ContractError: if ``parse`` or ``score`` give what they must not, in the benchmark's name.
    """
    who = name_of("benchmark", benchmark)
    if not question.options:
        found = benchmark.score(text, question)
        check_metrics(who, found)
        metrics = {name: float(value) for name, value in found.items()}
        return Verdict(None, next(iter(metrics.values())), metrics)
    prediction = benchmark.parse(text, question)
    check_prediction(who, prediction, question)
    return chosen(question, prediction)


def chosen(question: Question, prediction: int | None) -> Verdict:
    """The verdict on an option: right if there is a right one and it is this one."""
    return Verdict(prediction, float(prediction is not None and prediction == question.answer), {})


def prompt_sha(question: Question, text: str) -> str:
    """16 hex digits that tell whether two runs asked the same: of the text put to the model, the options, what is
    right."""
    right = question.answer if question.options else list(question.references)
    asked = json.dumps([text, list(question.options), right], ensure_ascii=False)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:16]

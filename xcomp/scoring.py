"""What a run asks of a benchmark: its questions, what is put to the model of each, and the verdict on an answer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xcomp.answering import Answer, Query
from xcomp.benchmark import Benchmark, Question
from xcomp.contract import ContractError, check_continuations, check_metrics, check_prediction, check_questions, name_of
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
    text, continuations = benchmark.prompt(question), ()
    if question.options:
        continuations = benchmark.continuations(question)
        check_continuations(name_of("benchmark", benchmark), continuations, question)
    own = question.id, question.events, question.span
    return Query(question.video, question.question, text, *own, continuations)


def check_mode(mode: str, questions: Sequence[Question]) -> None:
    """ValueError where the likeliest option is to be taken and a question has none."""
    opened = [question.id for question in questions if not question.options]
    if mode == "loglikelihood" and opened:
        raise ValueError(
            f"generation.mode: loglikelihood chooses among options, and {len(opened)} of the benchmark's questions are "
            f"open, e.g. '{opened[0]}'; ask those with mode: generate"
        )


def verdict_on(benchmark: Benchmark, question: Question, answer: Answer) -> Verdict:
    """The verdict on an answer: on the option that is likeliest, or on what was written."""
    return judge(benchmark, question, answer.text) if answer.option_scores is None else _chosen(question, answer.choice)


def judge(benchmark: Benchmark, question: Question, text: str) -> Verdict:
    """The verdict on what the model wrote, by the benchmark's own rules.

    Raises:
        ContractError: if ``parse`` or ``score`` give what they must not, in the benchmark's name.
    """
    who = name_of("benchmark", benchmark)
    if not question.options:
        found = _asked_of(benchmark, "score", question, text)
        check_metrics(who, found)
        metrics = {name: float(value) for name, value in found.items()}
        return Verdict(None, next(iter(metrics.values())), metrics)
    prediction = _asked_of(benchmark, "parse", question, text)
    check_prediction(who, prediction, question)
    return _chosen(question, prediction)


def _asked_of(benchmark: Benchmark, method: str, question: Question, text: str) -> Any:
    try:
        return getattr(benchmark, method)(text, question)
    except Exception as error:
        who, failed = name_of("benchmark", benchmark), " ".join(f"{type(error).__name__}: {error}".split())
        asked = f"question '{question.id}', answer {printable(text)[:60]!r}"
        raise ContractError(f"{who}: {method}() must not fail on an answer; {asked}: {failed}") from error


def _chosen(question: Question, prediction: int | None) -> Verdict:
    """The verdict on an option: right if there is a right one and it is this one."""
    return Verdict(prediction, float(prediction is not None and prediction == question.answer), {})


def prompt_sha(question: Question, text: str) -> str:
    """16 hex digits that tell whether two runs asked the same: of the text put to the model, the options, what is
    right."""
    right = question.answer if question.options else list(question.references)
    asked = json.dumps([text, list(question.options), right], ensure_ascii=False)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:16]

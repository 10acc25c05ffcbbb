"""The benchmark contract: questions about video files, a prompt format, and how answers are read and scored."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from xcomp.parsing import LETTERS, parse_option


@dataclass(frozen=True)
class Question:
    """One question about a video file: with options to choose from or, without any, open.

    ``answer`` is the index of the right option; None where none of them is right, which is always scored wrong. An open
    question has ``references`` instead, right answers as text. ``labels`` are what results are broken down by: axis →
    labels, of which a question may have several. ``events`` are (start, end) seconds that hold the evidence, where the
    benchmark knows them. ``span`` are the seconds of the video that the question is about: the rest is not shown.
    ``subtitles`` is the path of a file. ``meta`` is whatever else records should tell, as JSON can hold it.
    """

    id: str
    video: str
    question: str
    options: tuple[str, ...] = ()
    answer: int | None = None
    references: tuple[str, ...] = ()
    category: str = ""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    events: tuple[tuple[float, float], ...] = ()
    span: tuple[float, float] | None = None
    subtitles: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class Benchmark:
    """Base class of all benchmarks. A subclass writes ``questions``; the rest has defaults.

    ``max_new_tokens`` bounds how long an answer may get where the run's ``generation`` does not. ``axes`` are the axes
    of questions' ``labels`` in the order in which a report shows them; those not named come after them. ``defects``
    are set by ``questions``: what is wrong with how many entries of the benchmark's own files. ``generated``: the
    videos are drawn, as those that the shipped checkpoints were trained on; of others these know nothing.
    """

    Config: type
    max_new_tokens: int = 16
    axes: tuple[str, ...] = ()
    generated: bool = False

    def __init__(self, config: Any):
        self.config = config
        self.defects: dict[str, int] = {}

    def questions(self) -> list[Question]:
        """All questions, in a fixed order. Makes or checks the video files it names."""
        raise NotImplementedError(f"{type(self).__name__} must define questions()")

    def prompt(self, question: Question) -> str:
        """The text put to the model, options included."""
        return multiple_choice_prompt(question.question, question.options) if question.options else question.question

    def continuations(self, question: Question) -> tuple[str, ...]:
        """What stands for each option as an answer, where the likeliest option is taken: what ``prompt`` asks for."""
        return tuple(LETTERS[: len(question.options)])

    def parse(self, text: str, question: Question) -> int | None:
        """The option index that the model's ``text`` names, or None."""
        return parse_option(text, question.options)

    def score(self, text: str, question: Question) -> dict[str, float]:
        """How good an answer to an open question is: metric → 0..1, the headline first. Choices are not asked."""
        return {"exact_match": exact_match(text, question.references)}

    @classmethod
    def metrics(cls, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """The benchmark's own figures of one arm's records, in per cent, the headline first.

        By default the share of choices that are right, and the mean of each metric of open questions. What could not be
        asked counts as 0.
        """
        records = list(records)
        scores: dict[str, list[float]] = {}
        if choices := [float(r["score"]) for r in records if r["options"]]:
            scores["accuracy"] = choices
        opened = [r["metrics"] for r in records if not r["options"]]
        for name in dict.fromkeys(name for metrics in opened for name in metrics):
            scores[name] = [float(metrics.get(name, 0.0)) for metrics in opened]
        return {name: 100 * sum(values) / len(values) for name, values in scores.items()}


# --- prompts ----------------------------------------------------------------------------------------------------------


def multiple_choice_prompt(question: str, options: tuple[str, ...] | list[str]) -> str:
    """The question, one lettered line an option, and the request for a letter."""
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"a question has {len(options)} options; it must have 2..{len(LETTERS)}")
    lines = [question, *(f"({LETTERS[i]}) {option}" for i, option in enumerate(options))]
    return "\n".join([*lines, "Answer with the option's letter from the given choices directly."])


def words_prompt(question: str, options: tuple[str, ...] | list[str]) -> str:
    """The question and the options in words, for models that answer with one of them."""
    return f"{question}\n{', '.join(options[:-1])} or {options[-1]}"


# --- open questions ---------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """What exact match compares: NFKC, case folded, without punctuation and the articles a, an and the, single spaces.

    The rules of SQuAD's evaluation (arXiv 1606.05250), for any script: punctuation is what Unicode calls so.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(c for c in text if unicodedata.category(c)[0] != "P" and c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(text: str, references: Iterable[str]) -> float:
    """1.0 if ``text`` is one of the references after :func:`normalise`, else 0.0."""
    said = normalise(text)
    return float(any(said == normalise(reference) for reference in references))

"""The benchmark contract: a set of multiple-choice questions about video files, a prompt format and a scorer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    ``answer`` is the index of the right option. ``events`` are (start, end) spans in seconds that hold the evidence,
    where the benchmark knows them.
    """

    id: str
    video: str
    question: str
    options: tuple[str, ...]
    answer: int
    category: str = ""
    events: tuple[tuple[float, float], ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


class Benchmark:
    """Base class of all benchmarks. A subclass writes ``questions``; the rest has defaults."""

    Config: type
    max_new_tokens: int = 16

    def __init__(self, config: Any):
        self.config = config

    def questions(self) -> list[Question]:
        """All questions, in a fixed order. Makes or checks the video files it names."""
        raise NotImplementedError(f"{type(self).__name__} must define questions()")

    def prompt(self, question: Question) -> str:
        """The text put to the model, options included."""
        return multiple_choice_prompt(question.question, question.options)

    def parse(self, text: str, question: Question) -> int | None:
        """The option index that the model's ``text`` names, or None."""
        return parse_letter(text, len(question.options))


def multiple_choice_prompt(question: str, options: tuple[str, ...] | list[str]) -> str:
    """The question, one lettered line an option, and the request for a letter."""
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"a question has {len(options)} options; it must have 2..{len(LETTERS)}")
    lines = [question, *(f"({LETTERS[i]}) {option}" for i, option in enumerate(options))]
    return "\n".join([*lines, "Answer with the option's letter from the given choices directly."])


def parse_letter(text: str, num_options: int) -> int | None:
    """The first stand-alone option letter, bracketed or not; None if there is none."""
    match = re.search(rf"(?<![A-Za-z])([A-{LETTERS[num_options - 1]}])(?![A-Za-z])", text)
    return LETTERS.index(match.group(1)) if match else None


def parse_words(text: str, options: tuple[str, ...] | list[str]) -> int | None:
    """The option that ``text`` consists of, whatever its case; None if it is none of them."""
    said = text.strip().strip(".").lower()
    return next((number for number, option in enumerate(options) if option.lower() == said), None)


def parse_option(text: str, options: tuple[str, ...] | list[str]) -> int | None:
    """The option named by its words, else by its letter."""
    said = parse_words(text, options)
    return parse_letter(text, len(options)) if said is None else said

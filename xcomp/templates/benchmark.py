"""skeleton: questions from a JSON file, with options to choose from or open.

The file holds a list of ``{"video": "a.mp4", "question": "What?", "options": ["this", "that"], "answer": 0}``; a
video's path is relative to the file, and ``answer`` the right option's number. A question without options has a list
``answers`` of right texts instead. (The built-in benchmark ``questions`` reads such files, and CSV and parquet, with
every bad line named: write one of your own where prompts, scores or files are others.)

A benchmark has to write ``questions()``, and may override:

- ``prompt(question)``: the text put to the model;
- ``parse(text, question)``: the number of the option that the model's answer means, or None;
- ``score(text, question)``: how good an answer to an open question is, metric → 0..1, the headline first;
- ``metrics(records)``: the benchmark's own figures, in per cent, from the records of one arm;
- ``continuations(question)``: what stands for each option where the likeliest is taken (default: the letters);
- ``max_new_tokens``: how long an answer may get; ``axes``: the order in which a report shows questions' labels.

``self.defects``, set by ``questions()``, counts what is odd in the benchmark's files, for ``run.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xcomp import Benchmark
from xcomp.benchmark import Question


class Skeleton(Benchmark):
    """Questions of one file."""

    max_new_tokens = 16
    axes = ("kind",)

    @dataclass
    class Config:
        """The options that YAML can set, their types and defaults, and what `xcomp plugins skeleton` says of them."""

        file: str  # without a default: it must be given

    def questions(self) -> list[Question]:
        """All questions: the same, in the same order, in every run; each ``id`` once."""
        path = Path(self.config.file)
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # one line for the user, not a traceback
            raise ValueError(f"skeleton: '{path}' is not JSON: {error}") from error
        return [self._question(number, record, path) for number, record in enumerate(records)]

    def _question(self, number: int, record: dict[str, Any], path: Path) -> Question:
        for key in ("video", "question", "answer" if "options" in record else "answers"):
            if key not in record:
                raise ValueError(f"skeleton: '{path}', question {number} has no '{key}'")
        options = tuple(record.get("options", ()))
        return Question(
            id=f"skeleton-{number}",
            video=str(path.parent / record["video"]),
            question=record["question"],
            options=options,
            answer=record["answer"] if options else None,  # an index; one that is no option is refused
            references=() if options else tuple(record["answers"]),
            labels={"kind": ("choice" if options else "open",)},  # axis → labels that results are broken down by
        )

"""skeleton: multiple-choice questions from a JSON file.

The file holds a list of ``{"video": "a.mp4", "question": "What?", "options": ["this", "that"], "answer": 0}``; a
video's path is relative to the file, and ``answer`` the right option's number.

A benchmark has to write ``questions()``. It may override ``prompt(question)``, the text put to the model, and
``parse(text, question)``, the option's number that the model's answer means, or None; ``max_new_tokens`` bounds how
long an answer may get.
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
        for key in ("video", "question", "options", "answer"):
            if key not in record:
                raise ValueError(f"skeleton: '{path}', question {number} has no '{key}'")
        video, options = str(path.parent / record["video"]), tuple(record["options"])
        return Question(f"skeleton-{number}", video, record["question"], options, record["answer"])

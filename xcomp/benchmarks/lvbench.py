"""LVBench: 1,549 four-way questions about 103 videos of over half an hour (arXiv 2406.08035).

Read is the form in which VideoChat-Flash and XComp evaluate: a JSON list of ``{"video", "type", "question",
"candidates", "answer", "question_type", "time_reference"}``, with the options' letters inside ``candidates``. Prompt
and answer parser are theirs. Deviation: an empty answer counts as wrong (theirs leaves it out of the mean).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from xcomp.benchmark import LETTERS, Benchmark, Question

KEYS = ("video", "question", "candidates", "answer")


class LVBench(Benchmark):
    """Questions of one annotation file; each video is ``<videos>/<name>.mp4`` or a folder of frames of that name."""

    @dataclass(kw_only=True)
    class Config:
        annotations: str  # lvbench_clean.json or a part of it
        videos: str  # folder of the videos

    def questions(self) -> list[Question]:
        path = Path(self.config.annotations)
        records = _read(path)
        return [self._question(i, record, f"'{path}', record {i}") for i, record in enumerate(records)]

    def _question(self, index: int, record: dict, where: str) -> Question:
        for key in KEYS:
            if not isinstance(record, dict) or key not in record:
                raise ValueError(f"lvbench: {where} has no '{key}'")
        options = tuple(record["candidates"])
        if record["answer"] not in options:
            raise ValueError(f"lvbench: {where}: the answer {record['answer']!r} is none of the candidates")
        folder = Path(self.config.videos)
        frames = folder / str(record["video"])
        video = frames if frames.is_dir() else folder / f"{record['video']}.mp4"
        meta = {key: record[key] for key in ("question_type", "time_reference") if key in record}
        return Question(
            id=f"lvbench-{index:04d}",
            video=str(video),
            question=record["question"],
            options=options,
            answer=options.index(record["answer"]),
            category=str(record.get("type", "")),
            meta=meta,
        )

    def prompt(self, question: Question) -> str:
        lines = [f"{LETTERS[i]}. {option}" for i, option in enumerate(question.options)]
        return "\n".join(
            [question.question, *lines, "Answer with the option's letter from the given choices directly."]
        )

    def parse(self, text: str, question: Question) -> int | None:
        letter = parse_answer(text)
        found = None if letter is None else LETTERS.index(letter)
        return found if found is not None and found < len(question.options) else None


def _read(path: Path) -> list:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"lvbench: annotations '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"lvbench: annotations '{path}' are not JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"lvbench: annotations '{path}' must hold a list of questions")
    return records


def parse_answer(text: str) -> str | None:
    """The option letter A–E in an answer: what it begins with before a period, else the first that stands alone.

    Before the latter, punctuation goes; an apostrophe or colon stays, so that in "I'd say B" the first is D.
    """
    start = re.fullmatch(r"([A-E])\.\s*(.+)?", text.strip(), re.IGNORECASE)
    if start:
        return start.group(1).upper()
    cleaned = re.sub(r"[\n\t]", " ", text)
    between_digits = re.search(r"\d,\d", cleaned)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        loose = f"{mark} " in cleaned or f" {mark}" in cleaned or between_digits
        cleaned = cleaned.replace(mark, "" if loose else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=32)
    alone = re.search(r"\b([a-e])\b", cleaned.strip("'\")( ").lower())
    return alone.group(1).upper() if alone else None

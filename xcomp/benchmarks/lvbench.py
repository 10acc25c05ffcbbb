"""LVBench: 1,549 four-way questions about 103 videos of over half an hour (arXiv 2406.08035).

Two forms are read. VideoChat-Flash's and XComp's: ``lvbench_clean.json`` (1,519 and 1,492 questions) or one of its six
parts by type, a list of ``{"video", "type", "question", "candidates", "answer", "question_type", "time_reference"}``
with the letters inside ``candidates``. The official one: ``video_info.meta.jsonl``, a line a video with ``key``,
``type`` and ``qa``, a list of ``{"uid", "question", "answer", "question_type", "time_reference"}`` with the options
inside ``question``.

A video is ``<videos>/<name>.mp4`` (also .MP4, .mkv, or a folder of frames), or so in ``videos/`` or ``data/`` within.
The time that a question refers to becomes its ``events``, a single moment for a second; one that cannot be read, or
ends before it starts, does not.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xcomp.annotations import (
    Annotated,
    Record,
    answered_score,
    check_options,
    check_record,
    find_video,
    mean_score,
    read_annotations,
)
from xcomp.benchmark import LETTERS, Question

WHO = "lvbench"
TYPES = ("cartoon", "documentary", "live", "selfmedia", "sport", "tv")
KEYS = {
    "video": str,
    "type": str,
    "question": str,
    "candidates": list,
    "answer": str,
    "question_type": list,
    "time_reference": str,
}
OFFICIAL_VIDEO = {"key": str, "type": str}
OFFICIAL = {"uid": (str, int), "question": str, "answer": str, "question_type": list, "time_reference": str}
NO_TIME, REVERSED_TIME = "time reference without both times", "time reference that ends before it starts"


class LVBench(Annotated):
    """Questions about very long videos, with the prompts of VideoChat-Flash and XComp or of lmms-eval."""

    axes = ("type", "question_type")
    parsers = {"videochat_flash": "videochat_flash", "lmms_eval": "lmms_eval"}

    @dataclass(kw_only=True)
    class Config:
        annotations: str  # lvbench_clean.json, a part of it, or the official video_info.meta.jsonl
        videos: str  # folder of the videos
        prompts: str = "videochat_flash"  # whose prompt is put: videochat_flash (and XComp) or lmms_eval
        parser: str | None = None  # how answers are read (xcomp.answer_parsers); None: as the prompt's authors do
        types: list[str] = field(default_factory=list)  # cartoon, documentary, live, selfmedia, sport, tv; empty: all

        def __post_init__(self) -> None:
            check_options(self, types=TYPES)

    def questions(self) -> list[Question]:
        path = Path(self.config.annotations)
        records = read_annotations(WHO, path, (".json", ".jsonl"))
        rows = _official(path, records) if path.suffix == ".jsonl" else _clean(path, records)
        found, times = [], Counter()
        for row in rows:
            if not self.config.types or row["type"] in self.config.types:
                events, defect = _events(row["time_reference"])
                times.update([defect] if defect else [])
                found.append(self._question(row, events))
        if not found:
            raise ValueError(f"{WHO}: '{path}' has no question of the types {', '.join(self.config.types)}")
        self.note_defects(found, times)
        return found

    def _question(self, row: Record, events: tuple[tuple[float, float], ...]) -> Question:
        return Question(
            id=row["id"],
            video=find_video(self.config.videos, row["video"], ("data", "videos")),
            question=row["question"],
            options=tuple(row["candidates"]),
            answer=row["right"],
            category=row["type"],
            labels={"type": (row["type"],), "question_type": tuple(row["question_type"])},
            events=events,
            meta={name: row[name] for name in ("question_type", "time_reference")},
        )

    def prompt(self, question: Question) -> str:
        """The options carry their letters already; VideoChat-Flash puts another in front."""
        if self.config.prompts == "lmms_eval":
            return "\n".join([question.question, *question.options, "Answer the question with the option letter"])
        lines = [f"{LETTERS[i]}. {option}" for i, option in enumerate(question.options)]
        return "\n".join(
            [question.question, *lines, "Answer with the option's letter from the given choices directly."]
        )

    @classmethod
    def metrics(cls, records: Any) -> dict[str, float]:
        """Beside the accuracy: as published, where an empty answer is left out of the mean."""
        records = list(records)
        return {"accuracy": mean_score(records), "accuracy, empty left out": answered_score(records, "type")}


def _clean(path: Path, records: list[Record]) -> list[Record]:
    """The records of VideoChat-Flash's form, with ``id`` and ``right``."""
    rows = []
    for number, record in enumerate(records):
        where = f"'{path}', record {number + 1}"
        check_record(WHO, where, record, KEYS)
        _check_type(where, record["type"])
        if record["answer"] not in record["candidates"]:
            raise ValueError(f"{WHO}: {where}: the answer {record['answer']!r} is none of the candidates")
        rows.append({**record, "id": f"lvbench-{number:04d}", "right": record["candidates"].index(record["answer"])})
    return rows


def _official(path: Path, records: list[Record]) -> list[Record]:
    """The questions of the official form, as those of VideoChat-Flash's."""
    rows = []
    for number, video in enumerate(records, start=1):
        where = f"'{path}', line {number}"
        check_record(WHO, where, video, OFFICIAL_VIDEO)
        _check_type(where, video["type"])
        if not isinstance(video.get("qa"), list):
            raise ValueError(f"{WHO}: {where} has no list 'qa'")
        for place, asked in enumerate(video["qa"]):
            within = f"{where}, question {place}"
            check_record(WHO, within, asked, OFFICIAL)
            question, options = _split(asked["question"])
            if len(options) < 2 or asked["answer"] not in LETTERS[: len(options)] or len(asked["answer"]) != 1:
                reason = f"the answer {asked['answer']!r} is none of the options (A) … in the question"
                raise ValueError(f"{WHO}: {within}: {reason}")
            own = {"id": f"lvbench-{asked['uid']}", "video": video["key"], "type": video["type"]}
            right = LETTERS.index(asked["answer"])
            rows.append({**asked, **own, "question": question, "candidates": options, "right": right})
    return rows


def _check_type(where: str, value: str) -> None:
    if value not in TYPES:
        raise ValueError(f"{WHO}: {where}: type is '{value}'; known: {', '.join(TYPES)}")


def _split(text: str) -> tuple[str, list[str]]:
    """A question and its options, ``(A) …`` on lines of their own, with their letters."""
    question, *options = re.split(r"\n(?=\([A-Z]\) )", text)
    lettered = all(option.startswith(f"({letter})") for letter, option in zip(LETTERS, options))
    return question, options if lettered else []


def _events(reference: str) -> tuple[tuple[tuple[float, float], ...], str | None]:
    """``MM:SS-MM:SS`` in seconds; otherwise nothing, and what is wrong."""
    times = re.fullmatch(r"\s*(\d+):(\d\d)\s*-\s*(\d+):(\d\d)\s*", reference)
    if times is None:
        return (), NO_TIME
    numbers = [float(number) for number in times.groups()]
    start, end = 60 * numbers[0] + numbers[1], 60 * numbers[2] + numbers[3]
    if start > end:
        return (), REVERSED_TIME
    return ((start, max(end, start + 1)),), None

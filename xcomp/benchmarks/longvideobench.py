"""LongVideoBench, validation: 1,337 questions with three to five options about 753 videos of 8 s to an hour, many of
them about what is said (arXiv 2407.15754).

Read are ``lvb_val.json`` and ``validation-00000-of-00001.parquet``, the same rows. A video is
``<videos>/<video_path>``, or so in ``videos/`` within (also as .MP4, .mkv, or a folder of frames); its subtitles are
``<subtitles>/<subtitle_path>``.

VideoChat-Flash and XComp list the subtitles before the question: those that cover one of 512 evenly spaced times,
whatever frames are shown. Of lmms-eval the form without subtitles is here (``longvideobench_val_v``); the one that
puts them between the frames (``val_i``) is not.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from xcomp.annotations import (
    Annotated,
    Record,
    check_options,
    check_record,
    find_video,
    mean_score,
    read_annotations,
)
from xcomp.benchmark import LETTERS, Question
from xcomp.subtitles import Cue, read_subtitles

WHO = "longvideobench"
DURATIONS = (15, 60, 600, 3600)
PERCEPTION = ("S2E", "S2O", "S2A", "E2O", "O2E", "T2E", "T2O", "T2A")
RELATION = ("E3E", "O3O", "SSS", "SOS", "SAA", "T3E", "T3O", "TOS", "TAA")
LEVELS = dict.fromkeys(PERCEPTION, "L1-Perception") | dict.fromkeys(RELATION, "L2-Relation")
KEYS = {
    "id": str,
    "video_path": str,
    "subtitle_path": str,
    "question": str,
    "question_category": str,
    "topic_category": str,
    "duration_group": int,
    "correct_choice": int,
    "duration": (int, float),
    "starting_timestamp_for_subtitles": (int, float),
}
OPTIONS = tuple(f"option{number}" for number in range(5))  # of a parquet row, padded with "N/A"
SUBTITLE_TIMES = 512  # evenly spaced times that VideoChat-Flash takes subtitles at


class LongVideoBench(Annotated):
    """Questions about what is seen and said, with VideoChat-Flash's prompt, subtitles in it, or lmms-eval's without."""

    max_new_tokens = 32
    axes = ("duration_group", "question_category", "level", "duration_group, question_category")
    parsers = {"videochat_flash": "videochat_flash_longvideobench", "lmms_eval": "lmms_eval_longvideobench"}

    @dataclass(kw_only=True)
    class Config:
        annotations: str  # lvb_val.json or validation-00000-of-00001.parquet
        videos: str  # folder of the videos
        subtitles: str | None = None  # folder of the subtitles; None: subtitles/ beside or in the folder of the videos
        prompts: str = "videochat_flash"  # whose prompt: videochat_flash (and XComp) with subtitles, lmms_eval without
        parser: str | None = None  # how answers are read (xcomp.answer_parsers); None: as the prompt's authors do
        durations: list[int] = field(default_factory=list)  # duration groups, of 15, 60, 600, 3600; empty: all

        def __post_init__(self) -> None:
            check_options(self, durations=DURATIONS)
            if self.prompts == "lmms_eval" and self.subtitles is not None:
                raise ValueError(
                    "subtitles are given, but prompts: lmms_eval shows none (its form with subtitles between the "
                    "frames, val_i, is not there); leave subtitles out, or use prompts: videochat_flash"
                )

    def questions(self) -> list[Question]:
        path = Path(self.config.annotations)
        found = []
        for number, record in enumerate(read_annotations(WHO, path, (".json", ".parquet"))):
            where = f"'{path}', record {number + 1}"
            options = _options(where, record)
            if not 0 <= record["correct_choice"] < len(options):
                reason = f"correct_choice is {record['correct_choice']}, none of its {len(options)} options"
                raise ValueError(f"{WHO}: {where}: {reason}; the test split has no answers and cannot be scored")
            if not self.config.durations or record["duration_group"] in self.config.durations:
                found.append(self._question(record, options))
        if not found:
            names = ", ".join(map(str, self.config.durations))
            raise ValueError(f"{WHO}: '{path}' has no question of the duration groups {names}")
        self._check_subtitles(found)
        self.note_defects(found)
        return found

    def _question(self, record: Record, options: tuple[str, ...]) -> Question:
        group, category = str(record["duration_group"]), record["question_category"]
        labels = (group, category, LEVELS[category], f"{group} {category}")
        subtitles = None
        if self.config.prompts == "videochat_flash":
            subtitles = os.path.normpath(os.path.join(self._subtitles, record["subtitle_path"]))
        return Question(
            id=f"longvideobench-{record['id']}",
            video=find_video(self.config.videos, os.path.splitext(record["video_path"])[0], ("videos",)),
            question=record["question"],
            options=options,
            answer=record["correct_choice"],
            category=group,
            labels={axis: (label,) for axis, label in zip(self.axes, labels)},
            subtitles=subtitles,
            meta={
                "topic_category": record["topic_category"],
                "duration": float(record["duration"]),
                "subtitles_start": float(record["starting_timestamp_for_subtitles"]),
            },
        )

    @property
    def _subtitles(self) -> str:
        if self.config.subtitles is not None:
            return self.config.subtitles
        inside = os.path.join(self.config.videos, "subtitles")
        return inside if os.path.isdir(inside) else os.path.join(self.config.videos, "..", "subtitles")

    def _check_subtitles(self, questions: Sequence[Question]) -> None:
        """All of them must be there, and be subtitles, before anything is asked."""
        paths = dict.fromkeys(question.subtitles for question in questions if question.subtitles is not None)
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise ValueError(
                f"{WHO}: {len(missing)} of {len(paths)} subtitle files are missing, the first '{missing[0]}'; "
                "'subtitles' names their folder, prompts: lmms_eval needs none"
            )
        try:
            for path in paths:
                read_subtitles(path, whole_ends=False)
        except ValueError as error:
            raise ValueError(f"{WHO}: {error}") from error

    def prompt(self, question: Question) -> str:
        asked, tail = question.question, "Answer with the option's letter from the given choices directly.\n"
        if self.config.prompts == "lmms_eval":
            lines = [f"{LETTERS[i]}. {option}" for i, option in enumerate(question.options)]
            return "\n".join([asked, *lines, tail])
        start, duration = question.meta["subtitles_start"], question.meta["duration"]
        cues = read_subtitles(question.subtitles, whole_ends=False)
        said = "\n".join(shown_cues(cues, start, duration, SUBTITLE_TIMES))
        lines = [f"({LETTERS[i]}). {option}" for i, option in enumerate(question.options)]
        task = (
            " Select the best answer to the following multiple-choice question based on the video and the subtitles. "
            "Respond with only the letter of the correct option."
        )
        head = f" This video's subtitles are listed below: \n{said}.\n{task}"
        return "\n".join([head, f"Question: {asked}", *lines, tail])

    @classmethod
    def metrics(cls, records: Any) -> dict[str, float]:
        """The accuracy over questions. The published code prints it as a fraction of 1, rounded to five digits."""
        return {"accuracy": round(mean_score(records), 3)}


def _options(where: str, record: Record) -> tuple[str, ...]:
    """The options of a JSON record or a parquet row, once it is checked."""
    check_record(WHO, where, record, KEYS)
    if record["duration_group"] not in DURATIONS:
        raise ValueError(f"{WHO}: {where}: duration_group is {record['duration_group']}; known: {DURATIONS}")
    if record["question_category"] not in LEVELS:
        raise ValueError(f"{WHO}: {where}: question_category '{record['question_category']}' is not known")
    if OPTIONS[0] in record:
        check_record(WHO, where, record, dict.fromkeys(OPTIONS, str))
        return tuple(record[name] for name in OPTIONS if record[name] != "N/A")
    check_record(WHO, where, record, {"candidates": list})
    return tuple(option for option in record["candidates"] if option != "N/A")


def shown_cues(cues: Sequence[Cue], start: float, duration: float, num_times: int) -> list[str]:
    """The text of the cues in which one of ``num_times`` times of the video lies; of a short one, one of its seconds.

    ``start``: when the video begins by the clock of the subtitles. A cue of less than a second is widened to one; one
    without end ends at ``duration`` by its own clock, as published.
    """
    even = duration > num_times
    times = [duration / num_times * i for i in range(num_times)] if even else list(range(int(duration)))
    shown = []
    for cue in cues:
        first, last = cue.start - start, (duration if cue.end == inf else cue.end) - start
        if last - first < 1:
            middle = (first + last) / 2
            first, last = middle - 0.5, middle + 0.5
        behind = bisect_right(times, first)  # the first time after the cue's start
        if behind < len(times) and times[behind] < last:
            shown.append(cue.text)
    return shown

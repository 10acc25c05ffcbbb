"""Video-MME without subtitles: 2,700 four-way questions about 900 videos, a third of them short, medium and long
(arXiv 2405.21075). The paper's VMME-L is ``durations: [long]``.

Read is ``test-00000-of-00001.parquet`` of lmms-eval/Video-MME. A video is ``<videos>/<videoID>.mp4`` (also .MP4, .mkv,
or a folder of frames), or so in ``data/``, ``videos/`` or ``images_2048/`` within.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xcomp.annotations import (
    Annotated,
    Record,
    by_label,
    check_options,
    check_record,
    find_video,
    mean_score,
    read_annotations,
)
from xcomp.benchmark import LETTERS, Question

WHO = "videomme"
DURATIONS = ("short", "medium", "long")
AXES = ("duration", "domain", "sub_category", "task_type")
TEXTS = ("video_id", *AXES, "videoID", "question_id", "question", "answer")
TAIL = "Answer with the option's letter from the given choices directly."


class VideoMME(Annotated):
    """Questions about videos of all lengths and domains, with VideoChat-Flash's prompts or lmms-eval's."""

    axes = AXES
    parsers = {"videochat_flash": "videochat_flash_videomme", "lmms_eval": "lmms_eval"}

    @dataclass(kw_only=True)
    class Config:
        annotations: str  # test-00000-of-00001.parquet
        videos: str  # folder of the videos
        prompts: str = "videochat_flash"  # whose prompt is put: videochat_flash (and XComp) or lmms_eval
        parser: str | None = None  # how answers are read (xcomp.answer_parsers); None: as the prompt's authors do
        durations: list[str] = field(default_factory=list)  # of short, medium, long; empty: all

        def __post_init__(self) -> None:
            check_options(self, durations=DURATIONS)

    def questions(self) -> list[Question]:
        path = Path(self.config.annotations)
        found = []
        for number, record in enumerate(read_annotations(WHO, path, (".parquet",))):
            where = f"'{path}', record {number + 1}"
            check_record(WHO, where, record, {"options": list} | dict.fromkeys(TEXTS, str))
            if record["answer"] not in list(LETTERS[: len(record["options"])]):
                raise ValueError(f"{WHO}: {where}: the answer {record['answer']!r} is no letter of an option")
            if record["duration"] not in DURATIONS:
                raise ValueError(f"{WHO}: {where}: duration is '{record['duration']}'; known: {', '.join(DURATIONS)}")
            if not self.config.durations or record["duration"] in self.config.durations:
                found.append(self._question(record))
        if not found:
            raise ValueError(f"{WHO}: '{path}' has no question of the durations {', '.join(self.config.durations)}")
        self.note_defects(found)
        return found

    def _question(self, record: Record) -> Question:
        return Question(
            id=f"videomme-{record['question_id']}",
            video=find_video(self.config.videos, record["videoID"], ("data", "videos", "images_2048")),
            question=record["question"],
            options=tuple(record["options"]),
            answer=LETTERS.index(record["answer"]),
            category=record["duration"],
            labels={axis: (record[axis],) for axis in AXES},
            meta={"video_id": record["video_id"]},
        )

    def prompt(self, question: Question) -> str:
        """The options carry their letters. lmms-eval speaks of subtitles though it shows none."""
        asked, options = question.question, "\n".join(question.options)
        letters = "Respond with only the letter (A, B, C, or D) of the correct option."
        best = "Select the best answer to the following multiple-choice question based on the video"
        if self.config.prompts == "lmms_eval":
            return f"{best} and the subtitles. {letters}\n{asked}\n{options}\n\n{TAIL}"
        return f"These are the frames of a video. {best}. {letters}\nQuestion: {asked}\nOption:\n{options}\n{TAIL}"

    @classmethod
    def metrics(cls, records: Any) -> dict[str, float]:
        """Over all questions and by duration; an empty answer is wrong, as published."""
        records = list(records)
        return {"accuracy": mean_score(records)} | {
            label: mean_score(group) for label, group in by_label(records, "duration").items()
        }

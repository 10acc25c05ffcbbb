"""MLVU, multiple choice (dev): 2,175 questions of seven tasks about videos from three minutes to nine hours
(arXiv 2406.04264).

Read is the folder of the seven files ``1_plotQA.json`` … ``7_topic_reasoning.json``, or one of them: lists of
``{"video", "duration", "question", "candidates", "answer", "question_type"}`` with the answer as text. A video is
``<videos>/<n>_<task>/<video>``, or so in ``video/`` or ``MLVU/video/`` within: 120 names occur under two tasks.

Where the right option's text stands twice, VideoChat-Flash takes the first, MLVU itself the last: ``prompts:
videochat_flash`` and ``lmms_eval``. An answer that is none of the options is always wrong, as in the released code.
The row of sy1998/MLVU_dev that lmms-eval reads is not published as text here: its question is taken to be followed by
the options as ``(A) …``, a line each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xcomp.annotations import (
    Annotated,
    Record,
    answered_score,
    by_label,
    check_options,
    check_record,
    find_video,
    mean_score,
    read_annotations,
)
from xcomp.benchmark import LETTERS, Question

WHO = "mlvu"
TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")
FILES = {f"{number}_{task}": task for number, task in enumerate(TASKS, start=1)}
KEYS = {
    "video": str,
    "duration": (int, float),
    "question": str,
    "candidates": list,
    "answer": str,
    "question_type": str,
}


class MLVU(Annotated):
    """Seven tasks about long videos, with the prompts of VideoChat-Flash and XComp or of lmms-eval."""

    axes = ("task",)
    parsers = {"videochat_flash": "videochat_flash", "lmms_eval": "lmms_eval"}

    @dataclass(kw_only=True)
    class Config:
        annotations: str  # folder of 1_plotQA.json … 7_topic_reasoning.json, or one of these files
        videos: str  # folder of the videos' folders, 1_plotQA … 7_topic_reasoning
        prompts: str = "videochat_flash"  # whose prompt is put: videochat_flash (and XComp) or lmms_eval
        parser: str | None = None  # how answers are read (xcomp.answer_parsers); None: as the prompt's authors do
        tasks: list[str] = field(default_factory=list)  # of plotQA, needle, ego, count, order, …; empty: all

        def __post_init__(self) -> None:
            check_options(self, tasks=TASKS)

    def questions(self) -> list[Question]:
        found = []
        for path in self._files():
            for number, record in enumerate(read_annotations(WHO, path, (".json",))):
                check_record(WHO, f"'{path}', record {number + 1}", record, KEYS)
                found.append(self._question(path.stem, number, record))
        self.note_defects(found)
        return found

    def _files(self) -> list[Path]:
        given = Path(self.config.annotations)
        wanted = [stem for stem, task in FILES.items() if not self.config.tasks or task in self.config.tasks]
        if given.is_dir():
            return [given / f"{stem}.json" for stem in wanted]
        if given.suffix == ".json" and given.stem in wanted:
            return [given]
        names = ", ".join(f"{stem}.json" for stem in wanted)
        raise ValueError(f"{WHO}: annotations '{given}' must be a folder or one of the files {names}")

    def _question(self, stem: str, number: int, record: Record) -> Question:
        options = tuple(record["candidates"])
        places = [place for place, option in enumerate(options) if option == record["answer"]]
        last = self.config.prompts == "lmms_eval"
        video = str(Path(stem) / Path(record["video"]).with_suffix(""))
        return Question(
            id=f"mlvu-{FILES[stem]}-{number:04d}",
            video=find_video(self.config.videos, video, ("video", "MLVU/video")),
            question=record["question"],
            options=options,
            answer=places[-1 if last else 0] if places else None,
            category=FILES[stem],
            labels={"task": (FILES[stem],)},
            meta={name: record[name] for name in ("question_type", "duration", "answer")},
        )

    def prompt(self, question: Question) -> str:
        lines = [f"({LETTERS[i]}) {option}" for i, option in enumerate(question.options)]
        if self.config.prompts == "lmms_eval":
            return "\n".join([question.question, *lines, "Only give the best option.", "Best option: ("])
        tail = "Answer with the option's letter from the given choices directly."
        return "\n".join([f"Question:{question.question}", "Option:", *lines, tail])

    @classmethod
    def metrics(cls, records: Any) -> dict[str, float]:
        """Beside the accuracy: MLVU's own mean over tasks; and as VideoChat-Flash, with empty answers left out."""
        records = list(records)
        tasks = [mean_score(group) for group in by_label(records, "task").values()]
        return {
            "accuracy": mean_score(records),
            "M-Avg": sum(tasks) / max(1, len(tasks)),
            "accuracy, empty left out": answered_score(records, "task"),
        }

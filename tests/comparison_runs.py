"""Comparisons that take moments, on a list of questions that is a file, and what they leave behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from video_kinds import encode

TIMED = ("seconds", "seconds_amortised", "seconds_waiting", "seconds_harness", "peak_memory")
ARMS = [
    {"name": "whole", "compressor": "none", "frames": 8},
    {"name": "half", "compressor": {"name": "avg_pool", "tokens": 8}, "selector": "qc_comp", "frames": 4},
]
# Every question that is asked leaves its id in a file beside the list.
LISTED = """
import json
from dataclasses import dataclass
from pathlib import Path
from xcomp.benchmark import Benchmark, Question


class Listed(Benchmark):
    @dataclass(kw_only=True)
    class Config:
        file: str

    def questions(self):
        return [Question(i, v, q, ("red", "blue"), 0) for i, v, q in json.loads(Path(self.config.file).read_text())]

    def prompt(self, question):
        with open(f"{self.config.file}.asked", "a") as file:
            file.write(question.id + "\\n")
        return super().prompt(question)
"""


def untimed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record but for what it took."""
    return {key: value for key, value in record.items() if key not in TIMED}


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def draw_video(path: Path, first: int = 0, **options: Any) -> None:
    """Sixteen pictures in two seconds; what they show depends on ``first``."""
    encode(path, "libx264", {"g": "8"}, numbers=range(first, first + 16), rate=8, **options)


def list_questions(folder: Path, questions: Iterable[tuple[str, Path | str, str]]) -> dict[str, Any]:
    """Writes a list of (id, video, question); what a configuration says to ask them."""
    (folder / "plugins").mkdir(exist_ok=True)
    (folder / "plugins" / "listed.py").write_text(LISTED)
    path = folder / "questions.json"
    path.write_text(json.dumps([(name, str(video), text) for name, video, text in questions]))
    benchmark = {"name": "listed", "file": str(path)}
    return {"plugins": [str(folder / "plugins")], "benchmark": benchmark, "arms": ARMS}


def asked(folder: Path) -> list[str]:
    """Ids of the questions that were asked, once an arm, since this was called last."""
    path = folder / "questions.json.asked"
    ids = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return ids

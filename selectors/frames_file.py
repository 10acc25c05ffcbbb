"""Frames or scores from a file, so that any selector of any program can be compared.

Each line of ``file`` is a JSON object about one question: ``video`` (its path, or its file's name with or without the
suffix), ``question_id`` (or ``question``, its words), and

- ``frames``: numbers of the frames to show, from 0, within the video file; or ``seconds``: their times;
- or ``scores``: a number for every candidate frame of the run, beside ``candidate_seconds`` if their times are to be
  checked; the best are shown, or what a picker makes of them.

A line with both is read for its frames, unless ``use: scores``. ``arm`` tells lines of several selectors apart.
``xcomp compare … export_frames=FILE`` writes such a file. Frames are taken from the run's candidates: a second stands
for the nearest of them, and a number that is no candidate is refused with the nearest, unless ``nearest: true``. Only
the frames that are shown are decoded, so ``sampling.rate`` may be as high as the video's own.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xcomp.backbone import QuestionError
from xcomp.compressor import Compressor
from xcomp.decoding import VideoInfo
from xcomp.inflight import VideoInFlight
from xcomp.messages import nearest
from xcomp.selector import Candidates, FrameQuery, FrameSelector, best, check_budget
from xcomp.tables import json_lines

KEYS = ("frames", "seconds", "scores")


class FramesFile(FrameSelector):
    """What a file says of a question."""

    uses_video = False

    @dataclass(kw_only=True)
    class Config:
        file: str  # JSON Lines, an object a question
        arm: str | None = None  # of a file with lines of several arms, these
        use: str | None = None  # frames, seconds or scores; None: the first of these that a line has
        nearest: bool = False  # a frame number that is no candidate stands for the nearest one

        def __post_init__(self) -> None:
            if self.use not in (None, *KEYS):
                raise ValueError(f"use is '{self.use}'; it must be one of {', '.join(KEYS)}")

    def __init__(self, config: Config):
        super().__init__(config)
        self._rows = self._read(Path(config.file))

    @property
    def repeats(self) -> bool:
        """Where the file names a frame several times."""
        rows = (row for rows in self._rows.values() for _, row in rows)
        return any(len(set(row[key])) < len(row[key]) for row in rows for key in KEYS[:2] if row.get(key))

    def _fail(self, number: int, what: str) -> ValueError:
        return ValueError(f"frames_file: '{self.config.file}', line {number}: {what}")

    def _read(self, path: Path) -> dict[str, list[tuple[int, dict[str, Any]]]]:
        """Lines by question, each with its number."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"frames_file: '{path}' cannot be read: {reason}") from error
        rows: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for number, row in json_lines(text):
            if isinstance(row, ValueError):
                raise self._fail(number, f"no JSON ({row})") from row
            self._check(number, row)
            if self.config.arm in (None, row.get("arm")):
                rows.setdefault(str(row.get("question_id", row.get("question"))), []).append((number, row))
        if not rows:
            which = "" if self.config.arm is None else f" of arm '{self.config.arm}'"
            raise ValueError(f"frames_file: '{path}' has no line{which}")
        return rows

    def _check(self, number: int, row: Any) -> None:
        if not isinstance(row, dict) or not isinstance(row.get("video"), str):
            raise self._fail(number, "no object with a 'video'")
        if not isinstance(row.get("question_id", row.get("question")), str):
            raise self._fail(number, "neither 'question_id' nor 'question' is text")
        found = [key for key in KEYS if row.get(key) is not None]
        if not found:
            raise self._fail(number, f"none of {', '.join(KEYS)}")
        for key in found:
            values = row[key]
            whole = key == "frames"
            right = isinstance(values, list) and values and all(
                (type(v) is int) if whole else (isinstance(v, (int, float)) and not isinstance(v, bool)) or
                (v is None and key == "scores") for v in values
            )  # fmt: skip
            if not right or any(isinstance(v, float) and not math.isfinite(v) for v in values):
                raise self._fail(number, f"{key} must be a list of {'whole ' if whole else ''}numbers")
        place = Path(row["video"])
        if len(place.parts) > 1 and not place.exists():
            raise self._fail(number, f"video '{place}' is not there")

    # --- one question -----------------------------------------------------------------------------------------------

    def score(
        self, video: VideoInFlight, queries: Sequence[FrameQuery], compressor: Compressor | None = None
    ) -> list[Tensor]:
        return [self._scores(video.info, query) for query in queries]

    def _scores(self, info: VideoInfo, query: FrameQuery) -> Tensor:
        number, row, use = self._row(info.path, query)
        if use == "scores":
            return self._given_scores(number, row, info)
        places = torch.tensor(self._places(number, row[use], use, info))
        return torch.bincount(places, minlength=len(info.candidates)).float()

    def pick(self, scores: Tensor, budget: int, frames: Candidates) -> list[int]:
        check_budget(budget)
        if frames.query is None or self._row(frames.query.video, frames.query)[2] == "scores":
            return best(scores, budget)
        places = [i for i, count in enumerate(scores.int().tolist()) for _ in range(count)]
        if len(places) != budget:
            raise QuestionError(
                f"frames_file: '{self.config.file}' names {len(places)} frames for question '{frames.query.name}', but "
                f"{budget} are to be shown; set frames: {len(places)}"
            )
        return places

    def _row(self, path: str, query: FrameQuery) -> tuple[int, dict[str, Any], str]:
        """The line about a question: its number, content, and which of its keys is read."""
        rows = self._rows.get(query.name) or self._rows.get(query.question)
        if rows is None:
            hint = nearest(query.name, list(self._rows))
            raise QuestionError(f"frames_file: '{self.config.file}' has no line about question '{query.name}';{hint}")
        video = Path(path)
        mine = [(n, r) for n, r in rows if r["video"] in (path, video.name, video.stem)
                or Path(r["video"]).name == video.name]  # fmt: skip
        if not mine:
            number, row = rows[0]
            raise QuestionError(str(self._fail(number, f"video '{row['video']}' is not '{path}'")))
        if len(mine) > 1:
            numbers = ", ".join(str(n) for n, _ in mine[:5])
            raise QuestionError(
                f"frames_file: '{self.config.file}' has several lines about question '{query.name}' ({numbers}); "
                "choose by 'arm'"
            )
        number, row = mine[0]
        use = self.config.use or next(key for key in KEYS if row.get(key) is not None)
        if row.get(use) is None:
            raise QuestionError(str(self._fail(number, f"no {use}")))
        return number, row, use

    def _given_scores(self, number: int, row: dict[str, Any], info: VideoInfo) -> Tensor:
        scores, times = row["scores"], row.get("candidate_seconds")
        if len(scores) != len(info.candidates):
            raise QuestionError(
                str(
                    self._fail(number, f"{len(scores)} scores, but the run has {len(info.candidates)} candidate frames")
                )
            )
        if times is not None:
            wrong = [i for i, (a, b) in enumerate(zip(times, info.times)) if abs(a - b) > 2e-3]
            if len(times) != len(scores) or wrong:
                raise QuestionError(str(self._fail(number, "candidate_seconds are not those of this run's sampling")))
        if None in scores:
            raise QuestionError(str(self._fail(number, "some candidates have no score (null)")))
        return torch.tensor(scores, dtype=torch.float32)

    def _places(self, number: int, values: list[float], use: str, info: VideoInfo) -> list[int]:
        """The candidates that frame numbers or seconds name, ascending."""
        known: Sequence[float] = info.candidates if use == "frames" else info.times
        end = info.num_frames - 1 if use == "frames" else info.duration
        places = []
        for value in values:
            if not 0 <= value <= end:
                what = "frame" if use == "frames" else "second"
                raise QuestionError(str(self._fail(number, f"{what} {value} is not there: the video ends at {end:g}")))
            after = min(bisect_left(known, value), len(known) - 1)
            near = min((max(after - 1, 0), after), key=lambda i: abs(known[i] - value))
            if use == "frames" and known[near] != value and not self.config.nearest:
                raise QuestionError(
                    str(self._fail(number, f"frame {value} is no candidate, the nearest is {known[near]}; raise "
                                           "sampling.rate, or set nearest: true"))
                )  # fmt: skip
            places.append(near)
        if len(set(places)) < len(set(values)):
            raise QuestionError(str(self._fail(number, "several frames are one candidate; raise sampling.rate")))
        return sorted(places)

"""``records.jsonl``: one line an answered question, written as a run goes, and what a run that goes on makes of it.

With several processes each writes a file of its own, ``records.rank<r>.jsonl``; they become part of ``records.jsonl``
when the run ends or is started again. Everything that reads a run calls :func:`read_run_records`, so a run can be
looked at while it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xcomp.answering import Answer, AskError, Query
from xcomp.benchmark import Benchmark, Question
from xcomp.config import ConfigError
from xcomp.decoding import VideoInfo
from xcomp.run import write_atomically
from xcomp.scoring import prompt_sha, verdict_on
from xcomp.tables import json_lines

RECORDS = "records.jsonl"
Record = dict[str, Any]
_NEEDED = {"arm": str, "question_id": str, "video": str, "correct": bool}
_SAME = ("prediction", "text", "frames")  # in records of one question and arm


def rank_file(folder: Path, rank: int, world_size: int) -> Path:
    """Where a process writes its records."""
    return folder / (RECORDS if world_size == 1 else f"records.rank{rank}.jsonl")


def record(
    arm: str,
    question: Question,
    query: Query,
    outcome: Answer | AskError,
    benchmark: Benchmark,
    info: VideoInfo | None,
    mode: str,
) -> Record:
    """One question's line. Seconds and peak memory are told by ``add_costs``."""
    line = {
        "arm": arm,
        "question_id": question.id,
        "video": question.video,
        "category": question.category,
        "question": question.question,
        "options": list(question.options),
        "answer": question.answer,
        "references": list(question.references),
        "labels": {axis: list(labels) for axis, labels in question.labels.items()},
        "meta": question.meta,
        "prompt_sha": prompt_sha(question, query.text),
        "mode": mode,
        "prediction": None,
        "correct": False,
        "score": 0.0,
        "metrics": {},
        "option_scores": None,
        "events": [list(span) for span in question.events],
        "span": None if question.span is None else list(question.span),
        "error": None,
        "reader": None if info is None else f"{info.reader_version}",
    }
    if not isinstance(outcome, Answer):
        return {**line, "error": str(outcome)}
    verdict = verdict_on(benchmark, question, outcome)
    return {
        **line,
        "prediction": verdict.prediction,
        "correct": verdict.score >= 1,
        "score": verdict.score,
        "metrics": verdict.metrics,
        "option_scores": outcome.option_scores,
        "text": outcome.text,
        "frames": outcome.frames,
        "times": outcome.times,
        "duration": outcome.duration,
        "num_frames": len(outcome.frames),
        "tokens_given": outcome.tokens_given,
        "tokens_in": outcome.tokens_in,
        "tokens_out": outcome.tokens_per_layer[-1],
        "tokens_per_layer": outcome.tokens_per_layer,
        "kept": outcome.kept,
        "scores": outcome.scores,
        "candidate_times": outcome.candidate_times,
    }


def append_records(path: Path, records: Iterable[Record]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in records)


def read_run_records(folder: Path) -> list[Record]:
    """All records of a run so far, one for each arm and question: of several the last that holds an answer.

    A line that an interruption cut short does not count.

    Raises:
        ConfigError: if a whole line is no record, or two lines hold different answers, naming file and line.
    """
    # Those of single processes first: one that is being merged meanwhile is then found in one place or the other.
    files = [*sorted(folder.glob("records.rank*.jsonl")), folder / RECORDS]
    found: dict[tuple[str, str], Record] = {}
    for path in files:
        for number, line in _read_lines(path):
            key = line["arm"], line["question_id"]
            before = found.get(key)
            if before is None or before.get("error"):
                found[key] = line
            elif not line.get("error"):
                if any(before.get(name) != line.get(name) for name in _SAME):
                    raise ConfigError(
                        f"'{path}', line {number}: question {key[1]!r} of arm {key[0]!r} has another answer than in an "
                        "earlier line; delete one of the two"
                    )
                found[key] = line
    return list(found.values())


def _read_lines(path: Path) -> list[tuple[int, Record]]:
    """Records and the numbers of their lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not UTF-8 ({error.reason} at byte {error.start}); mend or delete it") from error
    records = []
    for number, value in json_lines(text[: text.rfind("\n") + 1], strict=False):  # every record ends its line
        if isinstance(value, ValueError):
            raise ConfigError(f"'{path}', line {number}, is not JSON ({value}); delete that line") from value
        right = isinstance(value, Mapping) and all(isinstance(value.get(k), kind) for k, kind in _NEEDED.items())
        if not right:
            needed = ", ".join(_NEEDED)
            raise ConfigError(f"'{path}', line {number}, is no record (a mapping with {needed}); delete that line")
        records.append((number, value))
    return records


def merge_records(folder: Path, keep: Sequence[tuple[str, str]]) -> list[Record]:
    """Bring all records into ``records.jsonl``, in the order of ``keep`` (arm, question id), whole or not at all.

    Records of other arms and questions stay, behind them.
    """
    order = {key: place for place, key in enumerate(keep)}
    records = sorted(read_run_records(folder), key=lambda r: order.get((r["arm"], r["question_id"]), len(order)))
    text = "".join(json.dumps(line) + "\n" for line in records)
    path = folder / RECORDS
    if records and not (path.is_file() and path.read_text(encoding="utf-8") == text):
        write_atomically(path, text)
    for other in folder.glob("records.rank*.jsonl"):
        other.unlink()
    return records


def frames_in_events(record: Mapping[str, Any]) -> int | None:
    """How many of the frames that were shown lie within the question's events; None where it has none."""
    seen = _seen(record)
    return sum(any(of_frame) for of_frame in zip(*seen)) if seen else None


def event_recall(record: Mapping[str, Any]) -> float | None:
    """The share of the question's events of which a frame was shown; None where it has none."""
    seen = _seen(record)
    return sum(map(any, seen)) / len(seen) if seen else None


def _seen(record: Mapping[str, Any]) -> list[list[bool]]:
    """Of each event, which of the frames that were shown lie within it."""
    return [[start <= t <= end for t in record.get("times") or []] for start, end in record.get("events") or []]


def export_frames(path: Path, records: Iterable[Record]) -> None:
    """The frames of each answered question and arm as JSON lines, as the selector ``frames_file`` reads them.

    ``frames`` are numbers within the video file, ``seconds`` their times; where candidates were scored, ``scores``
    stand beside ``candidate_seconds`` (null: not asked for).
    """
    lines = []
    for line in records:
        if line.get("error"):
            continue
        row = {"video": line["video"], "question_id": line["question_id"], "arm": line["arm"]}
        row |= {"frames": line["frames"], "seconds": line["times"]}
        if line.get("scores") is not None:
            row |= {"scores": line["scores"], "candidate_seconds": line["candidate_times"]}
        lines.append(json.dumps(row) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(lines))

"""What benchmarks with published annotation files share: reading the files, finding the videos, odd records, scores.

Files are read as they were published: a JSON list, JSON lines, or parquet. Whatever is not of the form that a benchmark
describes is refused with file and record.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xcomp.answer_parsers import check_parser, parse_with
from xcomp.benchmark import LETTERS, Benchmark, Question
from xcomp.messages import nearest
from xcomp.tables import Problems, read_rows

FAMILIES = ("videochat_flash", "lmms_eval")
VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv")

# What is wrong with a record, as ``defects`` counts it.
REPEATED = "options that repeat"
RIGHT_REPEATED = "right option twice"
NO_RIGHT = "right answer not among the options"
NO_QUESTION = "no question text"
EMPTY_OPTIONS = "empty options"
OUTER_SPACE = "outer white space in question or options"

Record = Mapping[str, Any]


class Annotated(Benchmark):
    """A benchmark whose prompts and parsers are those of a published evaluation, a *family*.

    A subclass's ``Config`` has ``annotations``, ``videos``, ``prompts`` (of ``FAMILIES``) and ``parser`` (a name of
    :data:`xcomp.answer_parsers.PARSERS`, or None for the family's own); ``parsers`` maps a family to its parser.
    """

    parsers: dict[str, str] = {}

    def parse(self, text: str, question: Question) -> int | None:
        return parse_with(self.config.parser or self.parsers[self.config.prompts], text, question.options)

    def note_defects(self, questions: Iterable[Question], more: Mapping[str, int] | None = None) -> None:
        """Count what is odd with the questions, and ``more`` that cannot be seen from them."""
        found = Counter(more or {})
        for question in questions:
            found.update(defects_of(question))
        self.defects = {what: count for what, count in found.items() if count}


def check_options(config: Any, **lists: Sequence[str]) -> None:
    """ValueError unless prompts and parser are known, and each of the config's lists names some of those given."""
    if config.prompts not in FAMILIES:
        hint = nearest(config.prompts, FAMILIES)
        raise ValueError(f"prompts is '{config.prompts}';{hint} known: {', '.join(FAMILIES)}")
    if config.parser is not None:
        check_parser(config.parser)
    for name, known in lists.items():
        for value in getattr(config, name):
            if value not in known:
                hint = nearest(str(value), map(str, known))
                raise ValueError(f"{name} names '{value}';{hint} known: {', '.join(map(str, known))}")


def defects_of(question: Question) -> list[str]:
    """What is odd with a question; none of it keeps it from being asked."""
    options = _bare(question.options)
    right = None if question.answer is None else options[question.answer]
    spaced = (text != text.strip() for text in (question.question, *options))
    odd = {
        REPEATED: len(set(options)) < len(options),
        RIGHT_REPEATED: options.count(right) > 1,
        NO_RIGHT: right is None,
        NO_QUESTION: not question.question,
        EMPTY_OPTIONS: "" in options,
        OUTER_SPACE: any(spaced),
    }
    return [what for what, holds in odd.items() if holds]


def _bare(options: Sequence[str]) -> list[str]:
    """Options without the letters that they may carry, ``(A) `` or ``A. ``."""
    carried = [re.fullmatch(rf"\(?{letter}[.)] ?(.*)", o, re.DOTALL) for letter, o in zip(LETTERS, options)]
    return [match.group(1) for match in carried] if all(carried) else list(options)


# --- files ------------------------------------------------------------------------------------------------------------


def read_annotations(who: str, path: Path, forms: Sequence[str]) -> list[Record]:
    """The records of a ``.json`` list, ``.jsonl`` or ``.parquet`` file, of which ``forms`` says what is taken.

    Raises:
        ValueError: one line with the file, and the lines or records that are none.
    """
    if path.suffix not in forms:
        raise ValueError(f"{who}: annotations '{path}' must be a file ending in {' or '.join(forms)}")
    problems = Problems(path)
    try:
        rows = read_rows(path, problems, keep_empty=True)
        problems.check()
    except ValueError as error:
        raise ValueError(f"{who}: annotations {error}") from error
    return [row.values for row in rows]


def check_record(who: str, where: str, record: Any, keys: Mapping[str, type | tuple[type, ...]]) -> None:
    """ValueError unless the record is a mapping with these keys and types."""
    for key, kind in keys.items():
        if not isinstance(record, Mapping) or key not in record:
            raise ValueError(f"{who}: {where} has no '{key}'")
        value, kinds = record[key], kind if isinstance(kind, tuple) else (kind,)
        texts = list not in kinds or not isinstance(value, list) or all(isinstance(item, str) for item in value)
        if not isinstance(value, kinds) or isinstance(value, bool) or not texts:
            names = " or ".join("list of text" if k is list else "text" if k is str else k.__name__ for k in kinds)
            raise ValueError(f"{who}: {where}: '{key}' must be {names}, not {value!r:.60}")


def find_video(root: str, name: str, inside: Sequence[str] = ()) -> str:
    """The path of video ``name``, without suffix, in the folder ``root`` or one of the folders ``inside`` it.

    A folder of that name (of frames) comes before a file. Where there is none: ``<root>/<name>.mp4``, with the first of
    ``inside`` that there is.
    """
    folders = [folder for part in ("", *inside) if os.path.isdir(folder := os.path.join(root, part))]
    for folder in folders:
        for suffix in ("", *VIDEO_SUFFIXES):
            path = os.path.join(folder, name + suffix)
            if os.path.exists(path) if suffix else os.path.isdir(path):
                return os.path.normpath(path)
    return os.path.normpath(os.path.join(folders[-1] if folders else root, f"{name}.mp4"))


# --- scores -----------------------------------------------------------------------------------------------------------


def mean_score(records: Iterable[Record]) -> float:
    """Mean score in per cent; 0 without records."""
    scores = [float(record["score"]) for record in records]
    return 100 * sum(scores) / len(scores) if scores else 0.0


def by_label(records: Iterable[Record], axis: str) -> dict[str, list[Record]]:
    """The records of each label of an axis, in the order in which labels come up."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        for label in record["labels"].get(axis, ()):
            groups.setdefault(label, []).append(record)
    return groups


def answered_score(records: Iterable[Record], axis: str) -> float:
    """As VideoChat-Flash scores a group of tasks: per cent of the answers that are not empty, by label of ``axis``,
    averaged with all its questions as weight."""
    groups = list(by_label(records, axis).values())
    total = sum(map(len, groups))
    return sum(len(g) * mean_score(r for r in g if (r.get("text") or "").strip()) for g in groups) / max(1, total)

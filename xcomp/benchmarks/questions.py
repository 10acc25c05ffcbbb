"""Questions of your own about videos of your own, from one file: JSON lines, a JSON list, CSV or parquet.

A line: ``{"video": "a.mp4", "question": "What?", "options": ["a cup", "a key"], "answer": "a key"}``. All fields, and
how each is read, are in docs/questions.md. Whatever is wrong with the file is told at once, by line, before anything is
asked.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from xcomp.annotations import REPEATED
from xcomp.benchmark import LETTERS, Benchmark, Question, exact_match, words_prompt
from xcomp.messages import nearest
from xcomp.subtitles import Cue, overlapping, read_subtitles, seconds
from xcomp.tables import Problems, Row, from_json, read_rows

FIELDS = (
    *("id", "video", "question", "options", "answer", "category", "subtitles", "start", "end", "event", "events"),
    *LETTERS,
)
PROMPTS = ("letters", "words")
ANSWERS = ("auto", "index", "letter", "text")
Metric = Callable[[str, tuple[str, ...]], float]


class Questions(Benchmark):
    """The questions of one file, with options to choose from or open."""

    @dataclass(kw_only=True)
    class Config:
        file: str  # .jsonl, .json (a list), .csv or .parquet, one question a line
        videos: str | None = None  # folder of videos and subtitles; None: the file's own
        prompts: str = "letters"  # ask for an option's letter, or (words) for the option itself
        answers: str = "auto"  # how answers are given: index (from 0), letter, text; auto: as it can only be meant
        metrics: list[str] = field(default_factory=list)  # of open questions: exact_match, FILE.py:function or module:…
        labels: list[str] = field(default_factory=list)  # further fields to break results down by
        meta: list[str] = field(default_factory=list)  # further fields to keep in the records

        def __post_init__(self) -> None:
            for name, known in (("prompts", PROMPTS), ("answers", ANSWERS)):
                if (value := getattr(self, name)) not in known:
                    raise ValueError(
                        f"{name} is '{value}';{nearest(value, known)} it must be one of {', '.join(known)}"
                    )
            further = [*self.labels, *self.meta]
            for name, count in Counter(further).items():
                if name in FIELDS or count > 1:
                    reason = "is read as it is" if name in FIELDS else "is named twice"
                    raise ValueError(f"labels and meta name further fields, but '{name}' {reason}")

    def __init__(self, config: Any):
        super().__init__(config)
        self.axes = tuple(config.labels)
        named = [(_name(metric), metric) for metric in config.metrics or ["exact_match"]]
        for name, count in Counter(name for name, _ in named).items():
            if count > 1:
                raise ValueError(f"questions: metrics names '{name}' twice")
        self._metrics = {name: _load_metric(metric) for name, metric in named}

    def questions(self) -> list[Question]:
        path = Path(self.config.file)
        problems = Problems(path)
        rows = read_rows(path, problems)
        self._check_fields(rows, problems)
        found: list[tuple[Row, Question]] = []
        for row in rows:
            try:
                found.append((row, self._question(path, row)))
            except ValueError as error:
                problems.add(row.place, error)
        first: dict[str, str] = {}
        for row, question in found:
            if first.setdefault(question.id, row.place) != row.place:
                problems.add(row.place, f"the id '{question.id}' is that of {first[question.id]} too")
        problems.check()
        questions = [question for _, question in found]
        self._check_metrics([question for question in questions if not question.options])
        repeated = sum(len(set(q.options)) < len(q.options) for q in questions)
        self.defects = {REPEATED: repeated} if repeated else {}
        return questions

    # --- one line -----------------------------------------------------------------------------------------------------

    def _check_fields(self, rows: list[Row], problems: Problems) -> None:
        """Every field is read, or named by ``labels`` or ``meta``; and what these name is there."""
        known = {*FIELDS, *self.config.labels, *self.config.meta}
        for row in rows:
            for name in row.values:
                if name not in known:
                    way = f"a field of your own is kept where the benchmark says meta: [{name}] or labels: [{name}]"
                    problems.add(row.place, f"'{name}' is not read;{nearest(name, FIELDS)} {way}")
        names = dict.fromkeys(name for row in rows for name in row.values)
        for name in (*self.config.labels, *self.config.meta):
            if rows and name not in names:
                raise ValueError(f"no line of '{self.config.file}' has the field '{name}';{nearest(name, names)}")

    def _question(self, path: Path, row: Row) -> Question:
        given = row.values
        folder = path.parent if self.config.videos is None else Path(self.config.videos)
        text, options = _text(given, "question"), _options(given)
        span = _span(given)
        subtitles = _text(given, "subtitles", None)
        if subtitles is not None:
            subtitles = str(folder / subtitles)
            _cues(subtitles)
        labels = {axis: _labels(given[axis], axis) for axis in self.config.labels if axis in given}
        answer, references = None, ()
        if "answer" not in given:
            raise ValueError("'answer' is missing")
        if options:
            answer = _answer(given["answer"], options, self.config.answers)
            if options.count(options[answer]) > 1:
                raise ValueError(f"the right option {options[answer]!r:.60} stands there twice")
        else:
            references = _references(given["answer"])
        if "event" in given and "events" in given:
            raise ValueError("'event' and 'events' are both given; one of them is enough")
        return Question(
            id=str(_scalar(given, "id", f"{path.stem}-{row.number}")),
            video=str(folder / _text(given, "video")),
            question=text,
            options=options,
            answer=answer,
            references=references,
            category=str(_scalar(given, "category", "")),
            labels=labels,
            events=_events(given.get("events", given.get("event"))),
            span=span,
            subtitles=subtitles,
            meta={name: _plain(given.get(name), name) for name in self.config.meta},
        )

    # --- what the model is asked, and what its answer is worth --------------------------------------------------------

    def prompt(self, question: Question) -> str:
        """The subtitles of what is shown, if there are any, then the question and its options."""
        asked = super().prompt(question)
        if self.config.prompts == "words" and question.options:
            asked = words_prompt(question.question, question.options)
        if question.subtitles is None:
            return asked
        shown = overlapping(_cues(question.subtitles), *(question.span or (0.0, math.inf)))
        lines = [cue.text for cue in shown if cue.text]
        return "\n".join(["This video's subtitles are listed below:", *lines, asked]) if lines else asked

    def continuations(self, question: Question) -> tuple[str, ...]:
        return super().continuations(question) if self.config.prompts == "letters" else question.options

    def score(self, text: str, question: Question) -> dict[str, float]:
        return {name: metric(text, question.references) for name, metric in self._metrics.items()}

    def _check_metrics(self, opened: list[Question]) -> None:
        """Tried on a right answer, so that one that fails does so before the model has been asked anything."""
        if not opened:
            if self.config.metrics:
                raise ValueError(f"metrics are for open questions, and '{self.config.file}' has none")
            return
        for name, metric in self._metrics.items():
            try:
                value = metric(opened[0].references[0], opened[0].references)
            except Exception as error:
                raise ValueError(
                    f"the metric '{name}' failed on a right answer: {type(error).__name__}: {error}"
                ) from error
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"the metric '{name}' must give a number from 0 to 1, not {value!r:.60}")


# --- fields -----------------------------------------------------------------------------------------------------------

_NEEDED = object()


def _text(given: Mapping[str, Any], name: str, default: Any = _NEEDED) -> Any:
    if name not in given:
        if default is _NEEDED:
            raise ValueError(f"'{name}' is missing")
        return default
    value = given[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"'{name}' must be text, not {value!r:.60}")
    return _writable(value, name)


def _writable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"'{name}' holds half of a surrogate pair: write the character itself") from error
    return text


def _scalar(given: Mapping[str, Any], name: str, default: str) -> Any:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"'{name}' must be text or a whole number, not {value!r:.60}")
    return _writable(value, name) if isinstance(value, str) else value


def _list(value: Any, name: str) -> Any:
    """A list, which a CSV cell holds as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = from_json(value)
        except ValueError as error:
            raise ValueError(f"'{name}' is not a list ({error})") from error
    return value


def _options(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the field ``options``, or of the fields A, B, C …"""
    lettered = [letter for letter in LETTERS if letter in given]
    if "options" in given and lettered:
        raise ValueError(f"'options' and '{lettered[0]}' are both given; options stand in one list or in A, B, C …")
    if lettered:
        if lettered != list(LETTERS[: len(lettered)]):
            missing = next(letter for letter in LETTERS if letter not in given)
            raise ValueError(f"option '{missing}' is missing before '{lettered[-1]}'")
        values: Any = [given[letter] for letter in lettered]
    else:
        values = _list(given.get("options", []), "options")
    if not isinstance(values, list):
        raise ValueError(f"'options' must be a list, not {values!r:.60}")
    if values and not 2 <= len(values) <= len(LETTERS):
        raise ValueError(f"there must be 2 to {len(LETTERS)} options, or none for an open question, not {len(values)}")
    return tuple(_word(value, f"option {number}") for number, value in enumerate(values))


def _word(value: Any, name: str) -> str:
    """Text, or a number as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value}"
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text or a number, not {value!r:.60}")
    return _writable(value, name)


def _answer(value: Any, options: tuple[str, ...], how: str) -> int:
    """The right option's index. A value that can be meant in two ways is refused unless ``how`` says which."""
    if isinstance(value, float) and value.is_integer():  # a column of a table in which some have none
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"'answer' must be an option's index, letter or text, not {value!r:.60}")
    ways = {"index": _by_index, "letter": _by_letter, "text": _by_text}
    wanted = ways if how == "auto" else {how: ways[how]}
    found = {way: option for way, read in wanted.items() if (option := read(value, options)) is not None}
    if not found:
        as_what = "index (from 0), letter or text" if how == "auto" else how
        letters = f"0..{len(options) - 1}, A..{LETTERS[len(options) - 1]} or one of the options' texts"
        raise ValueError(f"'answer' is {value!r:.60}, which is none of the options by {as_what}; it may be {letters}")
    if len(set(found.values())) > 1:
        readings = " and ".join(f"{way} option {options[option]!r:.40}" for way, option in found.items())
        ways_out = " or ".join(f"answers: {way}" for way in found)
        raise ValueError(f"'answer' is {value!r:.60}, by {readings}; say which is meant with {ways_out}")
    return next(iter(found.values()))


def _by_index(value: str | int, options: tuple[str, ...]) -> int | None:
    if isinstance(value, str) and not re.fullmatch(r"\s*\d{1,4}\s*", value):
        return None
    return int(value) if 0 <= int(value) < len(options) else None


def _by_letter(value: str | int, options: tuple[str, ...]) -> int | None:
    letter = re.fullmatch(r"\s*\(?([A-Za-z])[).]?\s*", value) if isinstance(value, str) else None
    index = LETTERS.index(letter[1].upper()) if letter else len(options)
    return index if index < len(options) else None


def _by_text(value: str | int, options: tuple[str, ...]) -> int | None:
    """An option's text, as it is or but for case and outer space."""
    said = f"{value}"
    if said in options:
        return options.index(said)
    folded = [option.strip().casefold() for option in options]
    return folded.index(said.strip().casefold()) if folded.count(said.strip().casefold()) == 1 else None


def _references(value: Any) -> tuple[str, ...]:
    values = _list(value, "answer")
    values = values if isinstance(values, list) else [values]
    if not values:
        raise ValueError("'answer' must be a text or a list of at least one, as there are no options")
    return tuple(_word(value, "'answer'") for value in values)


def _labels(value: Any, axis: str) -> tuple[str, ...]:
    values = _list(value, axis)
    return tuple(_word(value, f"'{axis}'") for value in (values if isinstance(values, list) else [values]))


def _number(value: Any, name: str) -> float:
    """Seconds, as a number or like 1:02.5."""
    if isinstance(value, str):
        try:
            return seconds(value)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"'{name}' must be a number of seconds, not {value!r:.60}")
    return float(value)


def _span(given: Mapping[str, Any]) -> tuple[float, float] | None:
    if "start" not in given and "end" not in given:
        return None
    if "end" not in given:
        raise ValueError("'start' is given, but not 'end'")
    start, end = _number(given.get("start", 0), "start"), _number(given["end"], "end")
    if not start < end:
        raise ValueError(f"the span ends at {end:g} s, where it begins ({start:g} s) or before")
    return start, end


def _events(value: Any) -> tuple[tuple[float, float], ...]:
    """One pair of seconds, or a list of pairs."""
    pairs = _list([] if value is None else value, "event")
    if isinstance(pairs, list) and pairs and not any(isinstance(pair, list) for pair in pairs):
        pairs = [pairs]
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"an event must be [start, end] in seconds, and events a list of them, not {value!r:.60}")
    found = tuple((_number(start, "event"), _number(end, "event")) for start, end in pairs)
    for start, end in found:
        if end < start:
            raise ValueError(f"an event ends at {end:g} s, before it begins at {start:g} s")
    return found


def _plain(value: Any, name: str) -> Any:
    """A value that records can hold."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{name}' is nothing that JSON can hold: {error}") from error


@lru_cache(maxsize=1024)
def _cues(path: str) -> tuple[Cue, ...]:
    return tuple(read_subtitles(path))


# --- metrics ----------------------------------------------------------------------------------------------------------


def _name(metric: str) -> str:
    return metric.rpartition(":")[2]


def _load_metric(metric: str) -> Metric:
    """``exact_match``, or a function ``(text, references) -> 0..1`` of a file or an installed module."""
    if metric == "exact_match":
        return exact_match
    place, _, name = metric.rpartition(":")
    if not place:
        hint = nearest(metric, ["exact_match"])
        raise ValueError(
            f"metric '{metric}' is not known;{hint} it must be exact_match, FILE.py:function or module:function"
        )
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"xcomp_metric_{Path(place).stem}", place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # whatever a file raises on import
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"metric '{metric}': {place} failed to import: {reason}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ValueError(f"metric '{metric}': {place} has no function '{name}';{nearest(name, names)}")
    return function

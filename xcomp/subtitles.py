"""Subtitle files: SubRip (``.srt``), WebVTT (``.vtt``) and LongVideoBench's JSON, as cues in seconds.

SubRip is what players take for it: index lines may be missing, a point may stand for the comma. WebVTT follows
https://www.w3.org/TR/webvtt1/ as far as text and times go. JSON is a list of ``{"timestamp": [start, end], "text": …}``
(seconds) or of ``{"start": "H:M:S.s", "end": …, "line": …}``.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".srt", ".vtt", ".json")
_TIME = r"(?:\d+:)?\d{1,2}:\d{1,2}(?:[.,]\d+)?"
_TIMING = re.compile(rf"\s*({_TIME})\s*-->\s*({_TIME})(?:\s.*)?")


@dataclass(frozen=True)
class Cue:
    """Text that is shown from ``start`` to ``end`` (seconds; infinite where the file does not say until when)."""

    start: float
    end: float
    text: str


def read_subtitles(path: str | Path, *, whole_ends: bool = True) -> list[Cue]:
    """The cues of a file in its order, by its suffix. Of .srt and .vtt, markup is left out and lines become one.

    ``whole_ends``: whether an end in JSON may be a whole number of seconds; if not, it stands for the end of the video,
    as any end that is no number always does, and a cue may end before it begins: LongVideoBench's own reader takes 5.0
    for a time, but not 5, and widens every cue of less than a second.

    Raises:
        ValueError: if the file cannot be read, naming it and the line or cue.
    """
    path = Path(path)
    readers = {".srt": _read_srt, ".vtt": _read_vtt, ".json": lambda text: _read_json(text, whole_ends)}
    if path.suffix.lower() not in readers:
        raise ValueError(f"subtitles '{path}' are of an unknown kind; known: {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"subtitles '{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"subtitles '{path}' are not UTF-8 ({error.reason} at byte {error.start})") from error
    try:
        return readers[path.suffix.lower()](text)
    except ValueError as error:
        raise ValueError(f"subtitles '{path}', {error}") from error


def overlapping(cues: Iterable[Cue], start: float = 0.0, end: float = math.inf) -> list[Cue]:
    """The cues that are shown at some time between ``start`` and ``end`` (seconds)."""
    return [cue for cue in cues if (cue.start < end and cue.end > start) or start <= cue.start == cue.end < end]


def _read_srt(text: str) -> list[Cue]:
    """A cue goes on to the next times but for the line of a number before them: blank lines within it are left out."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if "-->" in line]
    if any(line.strip() for line in lines) and not starts:
        raise ValueError("line 1: no cue, which has a line like '00:00:01,000 --> 00:00:02,500'")
    cues = []
    for start, following in zip(starts, [*starts[1:], len(lines)]):
        begins, ends = _times(lines[start], start)
        own = lines[start + 1 : following]
        if following < len(lines) and own and own[-1].strip().isdigit() and (len(own) < 2 or not own[-2].strip()):
            own.pop()  # the next one's index
        cues.append(Cue(begins, ends, _one_line(re.sub(r"\{\\[^}]*\}", "", "\n".join(own)))))
    return cues


def _read_vtt(text: str) -> list[Cue]:
    """Blocks between blank lines; those without times are identifiers, notes, styles and regions."""
    lines = text.splitlines()
    if not lines or not re.fullmatch(r"WEBVTT([ \t].*)?", lines[0]):
        raise ValueError("line 1: a WebVTT file must begin with WEBVTT")
    cues, number = [], 1
    while number < len(lines):
        block = number
        while number < len(lines) and lines[number].strip():
            number += 1
        timing = next((n for n in range(block, min(block + 2, number)) if "-->" in lines[n]), None)
        if timing is not None and not re.match(r"NOTE([ \t]|$)", lines[block]):
            begins, ends = _times(lines[timing], timing)
            cues.append(Cue(begins, ends, html.unescape(_one_line("\n".join(lines[timing + 1 : number])))))
        number += 1
    return cues


def _times(line: str, number: int) -> tuple[float, float]:
    found = _TIMING.fullmatch(line)
    if not found:
        raise ValueError(f"line {number + 1}: {line.strip()!r:.60} is no pair of times")
    start, end = (seconds(time) for time in found.groups())
    if end < start:
        raise ValueError(f"line {number + 1}: {line.strip()!r:.60} ends before it begins")
    return start, end


def seconds(time: str) -> float:
    """ "H:M:S.s", "M:S,s" or "S" in seconds; ValueError for other text."""
    parts = time.strip().replace(",", ".").split(":")
    if (
        len(parts) > 3
        or not all(re.fullmatch(r"\d+", p) for p in parts[:-1])
        or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", parts[-1])
    ):
        raise ValueError(f"{time!r:.40} is no time like 62.5 or 00:01:02.5")
    return sum(float(part) * 60**power for power, part in enumerate(reversed(parts)))


def _one_line(text: str) -> str:
    """Without tags, on one line. Only what looks like a tag is one: "a < b" stays."""
    return " ".join(re.sub(r"</?[A-Za-z][^<>]*>|<\d[\d:.]*>", "", text).split())


def _read_json(text: str, whole_ends: bool) -> list[Cue]:
    try:
        cues = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(cues, list):
        raise ValueError("not a list of cues")
    found = []
    for number, cue in enumerate(cues):
        try:
            found.append(_json_cue(cue, whole_ends))
        except (ValueError, TypeError) as error:
            raise ValueError(f"cue {number} (from 0): {error}") from error
    return found


def _json_cue(cue: Any, whole_ends: bool) -> Cue:
    forms = ({"timestamp", "text"}, {"start", "end", "line"})
    if not isinstance(cue, dict) or not any(form <= cue.keys() for form in forms):
        raise ValueError("it must have 'timestamp' and 'text', or 'start', 'end' and 'line'")
    if "timestamp" in cue:
        times, text = cue["timestamp"], cue["text"]
        if not isinstance(times, list) or len(times) != 2:
            raise ValueError(f"timestamp is {times!r:.40}; it must be [start, end]")
        start, end = times
        if not _is_number(start):
            raise ValueError(f"timestamp begins at {start!r:.40}; it must be a number of seconds")
        timed = _is_number(end) and (whole_ends or isinstance(end, float))
        end = float(end) if timed else math.inf
    else:
        text = cue["line"]
        start, end = (float(t) if _is_number(t) else seconds(str(t)) for t in (cue["start"], cue["end"]))
    if not isinstance(text, str):
        raise ValueError(f"its text is {text!r:.40}")
    if end < start and whole_ends:
        raise ValueError(f"it ends at {end:g} s, before it begins at {start:g} s")
    return Cue(float(start), end, text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""Why these frames: for a question, the score of every candidate over time, and the frames shown as thumbnails.

A :class:`Timeline` is one question's: a row for each choice of frames, which several arms may share. It is drawn by
``templates/frames.html.j2``, in a run's report and in the page of ``xcomp ask --explain``. Thumbnails are read from the
video file again; where it is gone, ticks stand alone.
"""

from __future__ import annotations

import base64
import io
import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from xcomp.answering import Answer
from xcomp.compare.charts import Tick, round_steps
from xcomp.compare.plots import part_label, score_curve
from xcomp.compare.records import frames_in_events
from xcomp.config import Decoding, Sampling
from xcomp.decoding import DecodingPool
from xcomp.pixels import PixelFormat
from xcomp.run import whole_file
from xcomp.video import VideoError

Record = Mapping[str, Any]
SHORTER, HEIGHT, WIDEST = 64, 60, 120  # pixels of a thumbnail: as stored, and as shown
MOST = 32  # thumbnails a row; of more frames, so many are taken evenly
CURVE_POINTS = 400  # of longer score curves, the highest of each stretch
NOMINAL = 800  # pixels of the narrowest axis below which thumbnails stand in lanes


@dataclass(frozen=True)
class Picture:
    """A thumbnail as a data URL, and its size as shown."""

    url: str
    width: int
    height: int


@dataclass(frozen=True)
class Thumb:
    """Where a thumbnail stands: its frame's place and its own middle in per cent of the axis, and its lane."""

    key: str
    picture: Picture
    frame: int
    seconds: float
    at: float
    middle: float
    lane: int


@dataclass(frozen=True)
class Row:
    """The frames that some arms showed. ``ticks``, ``curve`` and ``dots`` are SVG paths over 1000 × 100 units."""

    names: tuple[str, ...]
    num_frames: int
    ticks: str
    curve: str
    dots: str
    thumbs: tuple[Thumb, ...]
    lanes: int
    hits: int | None  # frames within the evidence, where that is known
    colour: str


@dataclass(frozen=True)
class Timeline:
    """One question's frames; ``events`` are (left, width) of the evidence, ``outside`` of what the question is not
    about, and ``ticks`` times, all in per cent."""

    rows: tuple[Row, ...]
    events: tuple[tuple[float, float], ...]
    outside: tuple[tuple[float, float], ...]
    ticks: tuple[Tick, ...]

    @property
    def pictures(self) -> dict[str, Picture]:
        """The thumbnails by key, each once."""
        return {thumb.key: thumb.picture for row in self.rows for thumb in row.thumbs}


@dataclass(frozen=True)
class Explained:
    """A question that was just asked, its answer and its frames."""

    question: str
    text: str
    timeline: Timeline | None


@cache
def environment() -> jinja2.Environment:
    """The project's page templates; everything put into them is escaped."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("xcomp.compare", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["breakable"] = _breakable
    return made


def _breakable(name: str) -> Markup:
    """An arm's name as HTML that may break between its parts."""
    return Markup("<wbr>").join(Markup.escape(part) for part in re.split(r"(?<=[+@_/])", name))


def render(template: str, **values: Any) -> str:
    """A page; characters that UTF-8 has no form for (halves of surrogate pairs, from broken data) become "?"."""
    text = environment().get_template(template).render(**values)
    return text.encode("utf-8", "replace").decode("utf-8")


def of_answer(video: str, question: str, selector: Any, answer: Answer, reader: str = "auto") -> Explained:
    """A question that was just answered."""
    names = ("text", "frames", "times", "duration", "scores", "candidate_times")
    record = {"video": video, **{name: getattr(answer, name) for name in names}}
    pictures = thumbnails({video: some(record["frames"], MOST)}, reader)
    return Explained(question, answer.text, timeline([(part_label(selector), record)], pictures))


def write_page(path: str, video: str, questions: Sequence[Explained]) -> None:
    """The page of ``xcomp ask --explain``, whole or not at all."""
    pictures = {key: p for told in questions if told.timeline for key, p in told.timeline.pictures.items()}
    title = f"Frames of {Path(video).name}"
    page = render("explain.html.j2", title=title, questions=questions, pictures=pictures, most=MOST)
    with whole_file(Path(path)) as file:
        file.write(page.encode())


def some(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of the items, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, most)]


# --- thumbnails ---------------------------------------------------------------------------------------------------


def thumbnails(
    wanted: Mapping[str, Sequence[int]],
    reader: str = "auto",
    decoding: Decoding | None = None,
    seconds: float = float("inf"),
) -> dict[tuple[str, int], Picture]:
    """Small JPEGs of frames of videos, by path and number; none of a video that is gone or cannot be read.

    ``decoding`` as in a run: whatever a file does to whoever decodes it, the page is written. No further video is begun
    once ``seconds`` have passed.
    """
    there = {path: sorted(set(frames)) for path, frames in wanted.items() if frames and os.path.exists(path)}
    found: dict[tuple[str, int], Picture] = {}
    if not there:
        return found
    decoding = decoding or Decoding(workers=0)
    limits = replace(decoding, seconds=min(decoding.seconds, max(1.0, seconds)))
    started = time.monotonic()
    with DecodingPool(limits, Sampling(reader=reader)) as pool:
        for path, frames in there.items():
            if time.monotonic() - started > seconds:
                break
            try:
                pixels = pool.decode(path, frames, [PixelFormat(SHORTER, shortest_edge=True)]).result()
            except VideoError:
                continue
            found |= {(path, number): _picture(frame) for number, frame in zip(frames, pixels.arrays[0])}
    return found


def _picture(frame: np.ndarray) -> Picture:
    """(3, h, w) bytes as a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(frame.transpose(1, 2, 0)).save(buffer, format="JPEG", quality=75)
    height, width = frame.shape[1:]
    scale = min(HEIGHT / height, WIDEST / width)
    url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(url, round(width * scale), round(height * scale))


# --- the time axis ------------------------------------------------------------------------------------------------


def timeline(
    records: Sequence[tuple[str, Record]],
    pictures: Mapping[tuple[str, int], Picture],
    most: int = MOST,
    prefix: str = "f",
    colours: Mapping[str, str] | None = None,
) -> Timeline | None:
    """The frames of one question's records, each with its arm's name; None if no record has any.

    Arms that showed the same frames and scored them alike share a row. ``prefix`` of the thumbnails' keys tells videos
    apart; ``colours`` are classes of the style sheet, by name.
    """
    merged: dict[tuple, list[tuple[str, Record]]] = defaultdict(list)
    for name, record in records:
        if record.get("times") and record.get("frames"):
            merged[tuple(record["times"]), tuple(record.get("scores") or ())].append((name, record))
    if not merged:
        return None
    shown = [rows[0][1] for rows in merged.values()]
    end = float(shown[0].get("duration") or 0) or max(max(record["times"]) for record in shown) or 1.0
    events = [event for record in shown for event in record.get("events") or []]
    colours = colours or {}
    rows = tuple(_row(rows, end, pictures, most, prefix, colours.get(rows[0][0], "c0")) for rows in merged.values())
    shaded = tuple(dict.fromkeys(_span(start, stop, end) for start, stop in events))
    first, last = shown[0].get("span") or (0.0, end)
    outside = tuple(_span(start, stop, end) for start, stop in ((0.0, first), (last, end)) if stop > start)
    return Timeline(rows, shaded, outside, _time_ticks(end))


def _at(seconds: float, end: float) -> float:
    return min(max(100 * seconds / end, 0.0), 100.0)


def _span(start: float, stop: float, end: float) -> tuple[float, float]:
    """Left and width; a second in an hour would be thinner than a pixel."""
    width = max(_at(stop, end) - _at(start, end), 0.4)
    return round(min(_at(start, end), 100 - width), 2), round(width, 2)


def _time_ticks(end: float) -> tuple[Tick, ...]:
    unit, scale = ("min", 60) if end > 600 else ("s", 1)
    steps = [step for step in round_steps(0, end / scale, 7) if step <= end / scale]
    return tuple(Tick(round(_at(step * scale, end), 2), f"{step:g} {unit}") for step in steps)


def _row(
    records: Sequence[tuple[str, Record]],
    end: float,
    pictures: Mapping[tuple[str, int], Picture],
    most: int,
    prefix: str,
    colour: str,
) -> Row:
    record = records[0][1]
    ticks = "".join(f"M{10 * _at(t, end):.0f} 0V100" for t in record["times"])
    curve, dots = _score_paths(record, end)
    times = dict(zip(record["frames"], record["times"]))
    frames = [f for f in dict.fromkeys(some(record["frames"], most)) if (record["video"], f) in pictures]
    shown = [(frame, pictures[record["video"], frame], _at(times[frame], end)) for frame in frames]
    places = _lanes([at for _, _, at in shown], [picture.width for _, picture, _ in shown])
    thumbs = [
        Thumb(f"{prefix}-{frame}", picture, frame, times[frame], round(at, 2), round(middle, 2), lane)
        for (frame, picture, at), (middle, lane) in zip(shown, places)
    ]
    hits = frames_in_events(record)
    names = tuple(name for name, _ in records)
    used = max((thumb.lane + 1 for thumb in thumbs), default=0)
    return Row(names, len(record["times"]), ticks, curve, dots, tuple(thumbs), used, hits, colour)


def _lanes(wanted: Sequence[float], widths: Sequence[int]) -> list[tuple[float, int]]:
    """Middle and lane of each thumbnail, ascending in time: as few lanes as hold them all, in turn, and in each lane as
    near to their frames as they can stand without touching."""
    step = 100 * max((width + 4 for width in widths), default=1) / NOMINAL
    num_lanes = -(-len(wanted) // max(1, int(100 / step)))
    places: list[tuple[float, int]] = [(0.0, 0)] * len(wanted)
    for lane in range(num_lanes):
        own = range(lane, len(wanted), num_lanes)
        for place, middle in zip(own, _apart([wanted[i] for i in own], step)):
            places[place] = middle, lane
    return places


def _apart(wanted: Sequence[float], step: float) -> list[float]:
    """Places within 0..100, ``step`` apart and half a step from the ends, at the least squared distance from those
    wanted: less a step for each before it, a place may not be below its predecessor's, which pools adjacent violators
    (Ayer et al., 1955)."""
    blocks: list[list[float]] = []  # sum and number of what was pooled
    for i, at in enumerate(wanted):
        blocks.append([at - step * i, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    low, high = step / 2, 100 - step / 2 - step * (len(wanted) - 1)
    levels = [min(max(total / count, low), high) for total, count in blocks for _ in range(int(count))]
    return [level + step * i for i, level in enumerate(levels)]


def _score_paths(record: Record, end: float) -> tuple[str, str]:
    """A line through the scores of all candidates, or dots where only some were asked for; empty without scores."""
    found = score_curve(record)
    if found is None:
        return "", ""
    whole = bool(np.isfinite(found[1]).all())
    spots = [(10 * _at(t, end), 100 - 100 * v) for t, v in zip(*found) if np.isfinite(v)]
    if len(spots) > CURVE_POINTS:  # the highest of each stretch: peaks are what frames are picked by
        parts = np.array_split(np.arange(len(spots)), CURVE_POINTS)
        spots = [spots[min(part, key=lambda i: spots[i][1])] for part in parts]
    if whole:
        return "M" + "L".join(f"{a:.0f} {b:.0f}" for a, b in spots), ""
    return "", "".join(f"M{a:.0f} {b:.0f}h0" for a, b in spots)

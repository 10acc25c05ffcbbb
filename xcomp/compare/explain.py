"""Why these frames: for a question, the score of every candidate over time, and the frames shown as thumbnails.

One picture an arm, drawn as SVG into the page itself: nothing is loaded from outside, and every text is escaped. The
frames are read from the video file again; where it is gone, ticks stand alone.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xcomp.answering import Answer
from xcomp.compare.plots import COLOURS, EVENT, GRID, INK, MUTED, part_label, score_curve
from xcomp.config import Decoding, Sampling
from xcomp.decoding import DecodingPool
from xcomp.pixels import PixelFormat
from xcomp.run import write_atomically
from xcomp.video import VideoError

Record = Mapping[str, Any]
WIDTH, THUMB, CURVE, MARGIN = 960, 76, 70, 12  # pixels
MOST = 32  # thumbnails an arm; of more frames, so many are taken evenly
LANES = 4  # rows of thumbnails

CSS = """
:root { color-scheme: light; --ink: #222; --muted: #666; --line: #ddd; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 2.5rem 1.5rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; } .lead, .note { color: var(--muted); } .note { font-size: .875rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 1.25rem 0 0;
  font-size: .9rem; } dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid var(--ink); vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal;
  overflow-wrap: anywhere; min-width: 9rem; }
.text { white-space: normal; overflow-wrap: anywhere; }
tbody tr:hover { background: #f6f8fa; } small { color: var(--muted); font-size: .8rem; }
img { display: block; width: 100%; max-width: 900px; height: auto; margin: 1rem auto 0; }
pre { background: #f6f8fa; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.45; }
code { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, "Liberation Mono", monospace; }
summary { cursor: pointer; color: var(--accent); }
@media print { details > pre { white-space: pre-wrap; } h2 { break-after: avoid; } img, tr { break-inside: avoid; } }
"""


def explanation(rows: Sequence[tuple[str, Record]], reader: str = "auto", decoding: Decoding | None = None) -> str:
    """HTML of one question: a heading, and for each (arm's name, record) its scores and frames. May be empty."""
    rows = [(name, record) for name, record in rows if record.get("times")]
    if not rows:
        return ""
    first = rows[0][1]
    parts = [f"<h3>Question {escape(str(first.get('question_id')))}</h3>\n"]
    if first.get("question"):
        parts.append(f"<p>{escape(str(first['question']))}</p>\n")
    pictures = thumbnails(first["video"], sorted({f for _, r in rows for f in shown_frames(r)}), reader, decoding)
    end = float(first.get("duration") or 0) or max(max(record["times"]) for _, record in rows) or 1.0
    for number, (name, record) in enumerate(rows):
        told = f"{len(record['times'])} frames" + (f": {record['text']}" if record.get("text") else "")
        parts.append(f"<p><b>{escape(name)}</b> <small>{escape(told)}</small></p>\n")
        parts.append(_axis(record, end, pictures, COLOURS[number % len(COLOURS)]))
    note = (
        "Curve: score of every candidate frame, scaled to its own range; dots: candidates that were asked for alone. "
    )
    note += "Ticks: frames shown; shaded: the evidence, where it is known. At most "
    return "".join(parts) + f'<p class="note">{note}{MOST} thumbnails a row.</p>\n'


def of_answer(video: str, question: str, selector: Any, answer: Answer, reader: str = "auto") -> str:
    """HTML of a question that was just answered."""
    record = {
        "video": video, "question_id": question, "text": answer.text, "frames": answer.frames, "times": answer.times,
        "duration": answer.duration, "scores": answer.scores, "candidate_times": answer.candidate_times,
    }  # fmt: skip
    return explanation([(part_label(selector), record)], reader)


def write_page(path: str, video: str, questions: Sequence[str]) -> None:
    """The page of ``xcomp ask --explain``, whole or not at all."""

    write_atomically(Path(path), page(f"Frames of {Path(video).name}", "".join(questions), CSS))


def page(title: str, body: str, style: str) -> str:
    """A whole HTML document."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}</body>\n</html>\n"
    )


def shown_frames(record: Record) -> list[int]:
    """The frame numbers of the thumbnails."""
    frames = record["frames"]
    if len(frames) <= MOST:
        return list(frames)
    return [frames[round(i)] for i in np.linspace(0, len(frames) - 1, MOST)]


def thumbnails(
    path: str, frames: Sequence[int], reader: str = "auto", decoding: Decoding | None = None
) -> dict[int, str]:
    """Frames as data URLs of small JPEGs, by number; none where the video cannot be read.

    ``decoding`` as in a run: whatever the file does to whoever decodes it, the page is written.
    """
    found = {}
    try:
        with DecodingPool(decoding or Decoding(workers=0), Sampling(reader=reader)) as pool:
            pixels = pool.decode(path, list(frames), [PixelFormat(THUMB, shortest_edge=True)]).result()
    except VideoError:
        return {}
    for number, frame in zip(frames, pixels.arrays[0]):
        buffer = io.BytesIO()
        Image.fromarray(frame.transpose(1, 2, 0)).save(buffer, format="JPEG", quality=80)
        found[number] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return found


def _axis(record: Record, end: float, pictures: Mapping[int, str], colour: str) -> str:
    """One arm's time axis: evidence, scores, ticks, thumbnails in lanes below."""

    def x(seconds: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * min(max(seconds / end, 0.0), 1.0)

    base, parts = CURVE + 8, []
    for start, stop in record.get("events") or []:
        width = max(x(stop) - x(start), 2.0)
        parts.append(f'<rect x="{x(start):.1f}" y="0" width="{width:.1f}" height="{base + 10}" fill="{EVENT}"/>')
    parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{base}" y2="{base}" stroke="{GRID}"/>')
    curve = score_curve(record)
    if curve is not None:
        points = [(x(t), CURVE - (CURVE - 4) * v) for t, v in zip(*curve) if np.isfinite(v)]
        if len(points) == len(curve[0]):
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        else:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="1.8" fill="{colour}"/>' for a, b in points]
    for seconds in record["times"]:
        parts.append(f'<line x1="{x(seconds):.1f}" x2="{x(seconds):.1f}" y1="{base - 5}" y2="{base + 7}" '
                     f'stroke="{colour}" stroke-width="1.4"/>')  # fmt: skip
    free, lowest = [0.0] * LANES, base + 10
    times = dict(zip(record["frames"], record["times"]))
    for frame in dict.fromkeys(f for f in shown_frames(record) if f in pictures):
        wanted = min(max(x(times[frame]) - THUMB / 2, 0), WIDTH - THUMB)
        lane = next((i for i, until in enumerate(free) if until <= wanted), min(range(LANES), key=lambda i: free[i]))
        left = min(max(wanted, free[lane]), WIDTH - THUMB)
        free[lane], top = left + THUMB + 2, base + 22 + lane * (THUMB + 14)
        parts.append(f'<line x1="{x(times[frame]):.1f}" x2="{left + THUMB / 2:.1f}" y1="{base + 7}" y2="{top}" '
                     f'stroke="{GRID}"/>')  # fmt: skip
        parts.append(f'<image x="{left:.1f}" y="{top}" width="{THUMB}" height="{THUMB}" href="{pictures[frame]}">'
                     f"<title>frame {frame}, {times[frame]:.1f} s</title></image>")  # fmt: skip
        parts.append(f'<text x="{left + THUMB / 2:.1f}" y="{top + THUMB + 10}" font-size="9" text-anchor="middle" '
                     f'fill="{MUTED}">{times[frame]:.1f} s</text>')  # fmt: skip
        lowest = max(lowest, top + THUMB + 14)
    parts.append(f'<text x="{WIDTH - MARGIN}" y="{base - 8}" font-size="9" text-anchor="end" fill="{INK}">'
                 f"{end:.1f} s</text>")  # fmt: skip
    head = f'<svg viewBox="0 0 {WIDTH} {lowest}" width="100%" role="img">'
    return f"{head}\n{chr(10).join(parts)}\n</svg>\n"

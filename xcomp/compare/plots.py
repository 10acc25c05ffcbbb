"""Four pictures of a run as PNG files, for papers and READMEs.

Drawn without pyplot, so that nothing global is touched and no display is needed.

Colours are Okabe and Ito's (2008), which colour-blind readers can tell apart; lines differ in marker and dash as well.
Figures are 9 inches wide: at the 900 pixels of a README column, 10 pt type is 14 pixels high.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

from xcomp.compare.analysis import ArmSummary, Summary
from xcomp.compare.records import frames_in_events
from xcomp.compare.tables import macs_unit

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
METHOD = ("backbone", "compressor", "selector")  # what an arm's method is made of
INK, MUTED, GRID, EVENT = "#222222", "#666666", "#E3E3E3", "#F3DE8A"
MAX_ROWS = 12
_DPI = 200

Record = Mapping[str, Any]


def part_label(part: Any) -> str:
    """ "lp_comp", or "avg_pool (tokens=4)" for a part with options, or "none"."""
    if isinstance(part, (list, tuple)):
        return " + ".join(map(part_label, part))
    if not isinstance(part, Mapping):
        return "none" if part is None else str(part)
    options = ", ".join(f"{key}={value}" for key, value in part.items() if key not in ("name", "options"))
    options = options or ", ".join(f"{key}={value}" for key, value in (part.get("options") or {}).items())
    return f"{part.get('name') or 'none'}{f' ({options})' if options else ''}"


def accuracy_plot(summary: Summary) -> Figure:
    """Accuracy against the number of frames, a line a method; with a single number of frames, a row an arm."""
    lines = _lines(summary.arms)
    if max(len(points) for points in lines.values()) == 1:
        return _accuracy_rows(summary.arms)
    figure, axes = _figure(height=4.4)
    budgets = sorted({frames for points in lines.values() for frames, _ in points})
    for index, (label, points) in enumerate(lines.items()):
        # Lines stand a little apart (together at most a sixth), so that error bars do not hide each other.
        shift = 1.17 ** ((index + 0.5) / len(lines) - 0.5)
        x, arms = [frames * shift for frames, _ in points], [arm for _, arm in points]
        axes.errorbar(x, *_bars(arms), label=_plain(label), **_style(index), capsize=3, elinewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [f"{budget:,.6g}" for budget in budgets])
    axes.minorticks_off()
    axes.set_xlabel("frames shown to the model")
    _percent_axis(axes, "y")
    _legend(figure, axes, len(lines))
    return figure


def cost_plot(summary: Summary) -> Figure | None:
    """Accuracy against all multiply-accumulates of a question, choosing frames included; a line a method.

    None where fewer than two arms say what they take.
    """
    lines = {
        label: [(a.total_macs, a) for _, a in points if a.total_macs] for label, points in _lines(summary.arms).items()
    }
    lines = {label: sorted(points, key=lambda point: point[0]) for label, points in lines.items() if points}
    costs = [cost for points in lines.values() for cost, _ in points]
    if len(costs) < 2:
        return None
    unit, scale = macs_unit(summary.arms)
    figure, axes = _figure(height=4.4)
    wide = max(costs) > 5 * min(costs)
    for index, (label, points) in enumerate(lines.items()):
        # Lines stand a little apart (together at most a fortieth), so that error bars do not hide each other.
        shift = 1.025 ** ((index + 0.5) / len(lines) - 0.5)
        x, arms = [cost / scale * shift for cost, _ in points], [arm for _, arm in points]
        axes.errorbar(x, *_bars(arms), label=_plain(label), **_style(index), capsize=3, elinewidth=1.2)
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.minorticks_off()
    else:
        axes.set_xlim(0, 1.05 * max(costs) / scale)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel(f"{unit} a question: vision, choosing frames and language model")
    _percent_axis(axes, "y")
    _legend(figure, axes, len(lines))
    return figure


def _accuracy_rows(arms: Sequence[ArmSummary]) -> Figure:
    figure, axes = _figure(height=1.3 + 0.42 * len(arms))
    for row, arm in enumerate(arms):
        values, errors = _bars([arm])
        axes.errorbar(values, [row], xerr=errors, **{**_style(0), "linestyle": "none"}, capsize=3, elinewidth=1.2)
    axes.set_yticks(range(len(arms)), [_plain(arm.name) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    _percent_axis(axes, "x")
    return figure


def _lines(arms: Iterable[ArmSummary]) -> dict[str, list[tuple[float, ArmSummary]]]:
    """Points (frames, arm) of each group of arms: one method at several frame budgets."""
    lines: dict[str, list[tuple[float, ArmSummary]]] = defaultdict(list)
    everything = list(arms)
    for arm in everything:
        budget = arm.description.get("frames")
        frames = budget if isinstance(budget, int) else arm.frames or 0
        if frames > 0:
            lines[arm.group].append((frames, arm))
    ordered = {label: sorted(points, key=lambda point: point[0]) for label, points in lines.items()}
    return ordered or {arm.name: [(1, arm)] for arm in everything}


def _bars(arms: Sequence[ArmSummary]) -> tuple[list[float], list[list[float]]]:
    """Accuracies in per cent, and distances down and up to the interval's ends."""
    shares = [arm.accuracy for arm in arms]
    ends = [[100 * (s.value - s.low) for s in shares], [100 * (s.high - s.value) for s in shares]]
    return [100 * s.value for s in shares], [[max(0.0, end) for end in side] for side in ends]


def _percent_axis(axes: Axes, which: str) -> None:
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    (axes.set_ylim if which == "y" else axes.set_xlim)(max(low, -2), min(high, 102))
    axis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_label_text("accuracy (%), bars: 95 % interval")


def tokens_plot(summary: Summary) -> Figure | None:
    """Visual tokens a shown frame has left at each LLM layer; None if no arm says. Equal curves share a line."""
    curves = token_curves(summary)
    if not curves:
        return None
    figure, axes = _figure(height=4.0)
    for index, (label, values) in enumerate(curves):
        style = {**_style(index), "marker": ""}
        axes.step(range(1, len(values) + 1), values, where="mid", label=_plain(label), **style)
    axes.set_xlabel("LLM layer")
    axes.set_ylabel("visual tokens for each frame shown")
    axes.set_ylim(bottom=0, top=1.08 * max(max(values) for _, values in curves))
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14, min_n_ticks=1))
    _legend(figure, axes, len(curves))
    return figure


def token_curves(summary: Summary) -> list[tuple[str, list[float]]]:
    """Tokens of each layer for each frame shown, and whose: arms' curves that are equal to 1 % are one.

    Named by the arms' compressors, or by the arm itself where its compressor has several curves.
    """
    curves: list[tuple[np.ndarray, list[ArmSummary]]] = []
    for arm in summary.arms:
        if not arm.tokens_per_layer or not arm.frames:
            continue
        values = np.array(arm.tokens_per_layer) / arm.frames
        same = (arms for curve, arms in curves if len(curve) == len(values) and np.allclose(curve, values, rtol=0.01))
        arms = next(same, None)
        if arms is None:
            curves.append((values, [arm]))
        else:
            arms.append(arm)
    whose: dict[str, set[int]] = defaultdict(set)
    for place, (_, arms) in enumerate(curves):
        for arm in arms:
            whose[_compressor(arm)].add(place)
    labels = []
    for _, arms in curves:
        names = [arm.name if len(whose[_compressor(arm)]) > 1 else _compressor(arm) for arm in arms]
        labels.append(", ".join(dict.fromkeys("no compression" if name == "none" else name for name in names)))
    return [(label, [float(value) for value in values]) for label, (values, _) in zip(labels, curves)]


def _compressor(arm: ArmSummary) -> str:
    return part_label(arm.description["compressor"]) if "compressor" in arm.description else arm.name


@dataclass(frozen=True)
class SelectionRow:
    """The frames that one arm, or several with equal choices, showed of a video."""

    label: str
    selector: str
    record: Record


def selection_example(records: Sequence[Record], summary: Summary) -> list[SelectionRow]:
    """Rows of the selection plot: the first question with the most selectors; evidence known wins ties. May be empty.

    Of several frame budgets the one with all selectors is shown, the smallest first. Arms of one selector that showed
    the same frames (they differ in the compressor, say) share a row.
    """
    questions: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.get("times") and not record.get("error"):
            questions[record["question_id"]].append(record)
    if not questions:
        return []
    arms = {arm.name: arm for arm in summary.arms}

    def selectors(rows: Iterable[Record]) -> set[str]:
        return {_selector(arms[record["arm"]]) for record in rows}

    best = max(questions.values(), key=lambda rows: (len(selectors(rows)), bool(rows[0].get("events"))))
    for budget in sorted({len(record["times"]) for record in best}):
        equal = [record for record in best if len(record["times"]) == budget]
        if selectors(equal) == selectors(best):
            return _selection_rows(equal, arms)
    return _selection_rows(best, arms)


def _selector(arm: ArmSummary) -> str:
    return part_label(arm.description["selector"]) if "selector" in arm.description else arm.name


def _selection_rows(records: Sequence[Record], arms: Mapping[str, ArmSummary]) -> list[SelectionRow]:
    """One row for each selector and choice of frames, labelled by the arm where the selector alone is ambiguous."""
    merged: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        merged[_selector(arms[record["arm"]]), tuple(record["times"])].append(record)
    names = [selector for selector, _ in merged]
    rows = []
    for (selector, _), group in merged.items():
        scored = next((record for record in group if record.get("scores")), group[0])
        arm = group[0]["arm"]
        label = arms[arm].group if names.count(selector) == 1 else arm
        rows.append(SelectionRow(label=label, selector=selector, record=scored))
    return sorted(rows, key=lambda row: names.index(row.selector))[:MAX_ROWS]


def selection_plot(rows: Sequence[SelectionRow]) -> Figure | None:
    """Which frames each row's arm chose, on the video's time axis, over the spans that hold the evidence."""
    if not rows:
        return None
    figure, axes = _figure(height=1.7 + 0.62 * len(rows))
    first = rows[0].record
    duration = first.get("duration") or max(max(row.record["times"]) for row in rows)
    unit, scale = ("min", 60) if duration > 600 else ("s", 1)
    for start, end in first.get("events") or []:
        # Evidence of a second in an hour would be thinner than a pixel.
        middle, width = (start + end) / 2, max(end - start, duration / 300)
        axes.axvspan((middle - width / 2) / scale, (middle + width / 2) / scale, color=EVENT, zorder=0, linewidth=0)
    selectors = list(dict.fromkeys(row.selector for row in rows))
    for index, row in enumerate(rows):
        _draw_selection(axes, index, row.record, scale, COLOURS[selectors.index(row.selector) % len(COLOURS)])
    _selection_axes(axes, rows, duration / scale, unit)
    return figure


def _draw_selection(axes: Axes, index: int, record: Record, scale: float, colour: str) -> None:
    """Ticks at the frames; above them the score, where it is known. ``scale`` is seconds a unit of the axis."""
    curve = score_curve(record)
    top, bottom = (0.05, 0.36) if curve is not None else (-0.16, 0.16)
    times = np.array(record["times"]) / scale
    # Hundreds of ticks must not melt into a bar.
    width = float(np.clip(160 / len(times), 0.5, 1.6))
    axes.vlines(times, index + top, index + bottom, color=colour, linewidth=width, zorder=3)
    if curve is not None:
        axes.plot(curve[0] / scale, index - 0.02 - 0.36 * curve[1], color=colour, linewidth=0.9, alpha=0.9, zorder=2)


def score_curve(record: Record) -> tuple[np.ndarray, np.ndarray] | None:
    """Candidate times in seconds and scores scaled to 0..1; None where there are none."""
    scores, times = record.get("scores"), record.get("candidate_times")
    if not scores or not times or len(scores) != len(times):
        return None
    values = np.array([np.nan if score is None else score for score in scores], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    spread = np.nanmax(values) - np.nanmin(values) if np.isfinite(values).any() else 0
    return (np.array(times), (values - np.nanmin(values)) / spread) if spread > 0 else None


def _selection_axes(axes: Axes, rows: Sequence[SelectionRow], end: float, unit: str) -> None:
    axes.set_yticks(range(len(rows)), [_plain(row.label) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, end)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"time in the video ({unit})")
    counts = axes.secondary_yaxis("right")
    counts.set_yticks(range(len(rows)), [_hits(row.record) for row in rows], color=MUTED, fontsize=9)
    counts.tick_params(length=0)
    counts.spines["right"].set_visible(False)
    axes.set_title(_selection_title(rows), loc="left", fontsize=10, color=INK)


def _selection_title(rows: Sequence[SelectionRow]) -> str:
    record = rows[0].record
    parts = ["ticks: frames shown"]
    if any(score_curve(row.record) is not None for row in rows):
        parts.append("curve: frame score")
    if record.get("events"):
        parts.append("shaded: the evidence")
    return f"Question {_plain(str(record['question_id']))}  ({'; '.join(parts)})"


def _hits(record: Record) -> str:
    shown, hits = len(record["times"]), frames_in_events(record)
    return f"{shown} frames" if hits is None else f"{hits} of {shown} in evidence"


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _figure(height: float) -> tuple[Figure, Axes]:
    """A figure of README width with one quiet pair of axes; height in inches."""
    figure = Figure(figsize=(9, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=10)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _style(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the index-th line; 28 lines before any two look alike."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "linewidth": 1.8,
        "markersize": 6,
    }


def _legend(figure: Figure, axes: Axes, entries: int) -> None:
    """Below the axes, where it can hide nothing; none for a single unnamed choice."""
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(3, entries),
        frameon=False,
        fontsize=9.5,
    )


def _plain(text: str) -> str:
    """Text as it stands: matplotlib would take what is between two dollar signs for a formula."""
    return text.replace("$", r"\$")

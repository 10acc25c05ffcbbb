"""``report.html``: one self-contained page that a person reads, from a :class:`Summary` and, for questions, records.

What is computed here is where things stand and how numbers are written; the page itself is ``templates/report.html.j2``
(everything escaped), with inline SVG and a script that sorts tables and browses questions. Without the script the page
reads the same, but for the questions that it has no room to show at once.

The page is bounded: of a large run it holds the questions on which arms disagree most, and says how many
of how many.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from xcomp.benchmark import LETTERS
from xcomp.compare import charts
from xcomp.compare.analysis import ArmSummary, Difference, RunFacts, Summary, score
from xcomp.compare.explain import Picture, environment, render, some, thumbnails, timeline
from xcomp.compare.plots import METHOD, part_label, token_curves
from xcomp.compare.statistics import Accuracy, pareto_front
from xcomp.compare.tables import is_accuracy, macs_unit, number, p_value, signed, significant, span
from xcomp.config import BUDGETS, Decoding

Record = Mapping[str, Any]
LISTED_BYTES = 2_000_000  # of questions that the script lists, as JSON
DETAILED, DETAILED_BYTES = 60, 1_200_000  # questions that stand in the page with their frames
PICTURED, PICTURE_BYTES = 24, 1_300_000  # of these, those with thumbnails
PICTURE_SECONDS = 60.0  # after which no further video is opened for thumbnails
THUMBNAILS = 16  # a row
LONGEST = 600  # characters of a question, an option or an answer
ERRORS = 20  # different ones
COSTS = {
    "frames": ("frames shown", lambda arm: arm.frames),
    "tokens_in": ("visual tokens entering the LLM", lambda arm: arm.tokens_in),
    "kv_tokens": ("KV tokens (visual, mean over layers)", lambda arm: arm.kv_tokens),
    "macs": ("total {unit} a question", lambda arm: arm.total_macs),
    "seconds": ("seconds a question, alone", lambda arm: arm.total_seconds),
}
STAGES = ("decode", "vision", "select", "compress", "prefill", "answer", "harness")


# --- what the template is given -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArmView:
    """An arm as it is told apart: by number, and by its method's colour and marker."""

    number: int
    name: str
    method: int
    parts: str  # the names of what it is made of
    described: str  # and their options

    @property
    def colour(self) -> str:
        return f"c{self.method % 7}"

    @property
    def marker(self) -> str:
        return f"m{(self.method + self.method // 7) % 7}"


@dataclass(frozen=True)
class Interval:
    """A value and its interval on a scale, in per cent; ``zero`` is where the scale's zero is, if it is within."""

    at: float
    low: float
    high: float
    zero: float | None = None


@dataclass(frozen=True)
class Cell:
    """A table cell: text, a smaller remark, what it is sorted by, and a mark of what it holds."""

    text: str
    small: str = ""
    value: float | str | None = None
    arm: ArmView | None = None
    interval: Interval | None = None
    share: float | None = None  # per cent, of a bar
    title: str = ""


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = True
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """Accuracy against a cost: points with whiskers, lines that join a method's points, the Pareto front."""

    title: str
    x: charts.Axis
    y: charts.Axis
    points: Sequence[tuple[ArmView, charts.Point, str]]
    lines: Sequence[tuple[ArmView, Sequence[charts.Point]]]
    front: Sequence[charts.Point]


@dataclass(frozen=True)
class Curve:
    """Tokens in each layer: corners of a stepped line in per cent, and whose it is."""

    label: str
    colour: str
    dash: int
    corners: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Layers:
    x: charts.Axis
    y: charts.Axis
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Bars:
    """Costs by stage: for each arm its total and (stage, per cent, text) of each part."""

    title: str
    stages: Sequence[str]
    rows: Sequence[tuple[ArmView, str, Sequence[tuple[str, float, str]]]]


@dataclass(frozen=True)
class Answered:
    """One arm's answer to a question. ``mark``: "1" right, "0" wrong, "p" partly, "e" failed to run, "-" not asked."""

    mark: str
    score: float | None = None
    pick: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Asked:
    """A question, and what became of it in every arm (in the arms' order)."""

    id: str
    video: str
    place: str  # the video within the folder that holds all
    text: str
    options: Sequence[str]
    answer: int | None
    references: Sequence[str]
    labels: Sequence[tuple[str, str]]
    answers: Sequence[Answered]
    records: Sequence[tuple[str, Record]] = field(repr=False)

    @property
    def asked(self) -> int:
        return sum(a.mark != "-" for a in self.answers)

    @property
    def right(self) -> int:
        return sum(a.mark == "1" for a in self.answers)

    @property
    def telling(self) -> float:
        """How much arms disagree, 0 to ¼; a question that all got wrong before one that all got right."""
        scores = [0.0 if a.score is None else a.score for a in self.answers if a.mark != "-"]
        mean = sum(scores) / len(scores) if scores else 1.0
        return mean * (1 - mean) + (1 - mean) / 1000

    def compact(self, index: Callable[[str, Any], int]) -> dict[str, Any]:
        """As the script reads it; ``index`` numbers what many questions share."""
        shared: dict[str, Any] = {"i": self.id, "v": index("videos", self.place), "q": self.text}
        shared |= {"o": list(self.options), "a": self.answer, "r": list(self.references)}
        shared |= {"l": [index("labels", label) for label in self.labels], "m": "".join(a.mark for a in self.answers)}
        shared["t"] = [index("texts", a.text) for a in self.answers]
        shared["p"] = [a.pick for a in self.answers]
        if any(a.mark == "p" for a in self.answers):
            shared["s"] = [None if a.score is None else round(a.score, 3) for a in self.answers]
        return shared


@dataclass(frozen=True)
class Browser:
    """The questions: HTML of those that stand in the page, with frames, and the data of all that are listed."""

    total: int
    detailed: Sequence[str]
    pictures: Mapping[str, Picture]
    data: Mapping[str, Any]
    remark: str


# --- the page -------------------------------------------------------------------------------------------------------


def render_page(summary: Summary, records: Sequence[Record]) -> str:
    """The HTML of a summary; ``records`` are those behind it, ``arm`` as the summary calls it."""
    views = _views(summary)
    unit = macs_unit(summary.arms)
    return render(
        "report.html.j2",
        summary=summary,
        lead=_lead(summary),
        facts=[fact for run in summary.runs for fact in _facts(run, several=len(summary.runs) > 1)],
        arms=list(views.values()),
        results=_results(summary, views, unit),
        methods=_interval_methods(summary),
        charts=_charts(summary, views, unit),
        reference=views[summary.reference],
        differences=_differences(summary, summary.differences, views),
        groups=_groups(summary),
        group_differences=_differences(summary, summary.group_differences, {}),
        equal=_equal(summary, views, unit),
        bars=_bars(summary, views, unit),
        stages=[_stage_table(arms, views, unit, title) for title, arms in _machines(summary)],
        layers=_layers(summary),
        labels=_labels(summary, views),
        browser=_browser(summary, records, views),
        errors=_errors(records, views),
        published=_published_rows(summary),
        reruns=[_rerun(run) for run in summary.runs],
    )  # fmt: skip


def _views(summary: Summary) -> dict[str, ArmView]:
    methods: dict[str, int] = {}
    views = {}
    backbones = {_names(arm.description.get("backbone")) for arm in summary.arms}
    told = METHOD if len(backbones) > 1 else METHOD[1:]
    for place, arm in enumerate(summary.arms, start=1):
        method = methods.setdefault(f"{arm.run} {arm.group}" if len(summary.runs) > 1 else arm.group, len(methods))
        parts = {part: arm.description[part] for part in METHOD if part in arm.description}
        names = [_names(parts[part]) for part in told if part in parts]
        described = ", ".join(f"{part}: {part_label(value)}" for part, value in parts.items())
        views[arm.name] = ArmView(place, arm.name, method, " · ".join(names), described)
    return views


def _names(part: Any) -> str:
    """A part's name, or several's, without options."""
    if isinstance(part, (list, tuple)):
        return " + ".join(map(_names, part))
    return part_label(part.get("name") if isinstance(part, Mapping) else part)


def _lead(summary: Summary) -> str:
    arms = span([len(summary.arms)], "arm")
    questions = span([arm.num_questions for arm in summary.arms], "question")
    videos = span([arm.num_videos for arm in summary.arms], "video")
    runs = f", from {len(summary.runs)} runs" if len(summary.runs) > 1 else ""
    compared = "" if len(summary.arms) == 1 else " compared"
    return f"{arms}{compared} on {questions} about {videos}{runs}."


def _facts(run: RunFacts, several: bool) -> Iterable[tuple[str, str]]:
    """What was run, on what; several runs begin with their names."""
    if several:
        yield "Run", f"{run.name} ({run.folder})"
    counts = {"num_questions": "question", "num_videos": "video", "missing_questions": "missing question"}
    told = (*counts, "missing", "defects")  # here, and in the summary's cautions
    about = {key: value for key, value in run.benchmark.items() if key not in told}
    yield "Benchmark", _inline(about)
    sizes = [span([run.benchmark[key]], noun) for key, noun in counts.items() if run.benchmark.get(key)]
    yield "Size", ", ".join(sizes)
    yield "Seed", _inline(run.config.get("seed"))
    yield "Hardware", _inline(run.hardware)
    yield "Versions", _inline(run.versions)
    yield "Commit", _inline(run.git_commit)


def _inline(value: Any) -> str:
    """A value of run.json as one line of text."""
    if isinstance(value, Mapping):
        items = [(key, _inline(item)) for key, item in value.items() if item not in (None, "", {}, [])]
        return ", ".join(text if key == "name" else f"{key} {text}" for key, text in items)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_inline, value))
    return "" if value is None else str(value)


# --- cells ----------------------------------------------------------------------------------------------------------


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _accuracy_cell(accuracy: Accuracy, scale: charts.Axis) -> Cell:
    places = Interval(*(scale.place(100 * x) for x in (accuracy.value, accuracy.low, accuracy.high)))
    small = f"({_points(accuracy.low)}–{_points(accuracy.high)})"
    return Cell(_points(accuracy.value), small, accuracy.value, interval=places)


def _number_cell(value: float | None, text: Callable[[float | None], str] = number, small: str = "") -> Cell:
    return Cell(text(value), small, value)


def _accuracy_axis(summary: Summary) -> charts.Axis:
    shares = [100 * x for arm in summary.arms for x in (arm.accuracy.low, arm.accuracy.high)]
    return charts.linear(shares, lambda value: f"{value:g}")


# --- results --------------------------------------------------------------------------------------------------------


def _results(summary: Summary, views: Mapping[str, ArmView], unit: tuple[str, float]) -> Table:
    """A row an arm. A column that no arm has anything for is left out."""
    scale = _accuracy_axis(summary)
    official = dict.fromkeys(name for arm in summary.arms for name in arm.official or {})
    official = [name for name in official if not all(is_accuracy(arm, name) for arm in summary.arms)]
    published = list(dict.fromkeys(name for arm in summary.arms for name in arm.published))

    def seconds(arm: ArmSummary) -> Cell | None:
        if not summary.seconds_comparable:
            return None
        shared = "" if arm.total_seconds_amortised is None else f"({significant(arm.total_seconds_amortised)})"
        return _number_cell(arm.total_seconds, significant, shared)

    def arm_cell(arm: ArmSummary) -> Cell:
        view = views[arm.name]
        return Cell(arm.name, view.parts, view.number, arm=view, title=view.described)

    columns: list[tuple[str, Callable[[ArmSummary], Cell | None]]] = [
        ("arm", arm_cell),
        ("seed", lambda arm: None if arm.seed is None else Cell(str(arm.seed), value=arm.seed)),
        ("accuracy % (95\u00a0%)", lambda arm: _accuracy_cell(arm.accuracy, scale)),
        *((f"published {_words(name)}", _published(name)) for name in published),
        *((f"official {_words(name)}", _official(name)) for name in official),
        ("of those asked %", lambda arm: _asked(summary, arm)),
        ("hard part % (95\u00a0%)", lambda arm: arm.hard and _accuracy_cell(arm.hard, scale)),
        ("frames", lambda arm: _number_cell(arm.frames)),
        ("tokens given → in → last layer", _tokens),
        ("KV tokens", lambda arm: _number_cell(arm.kv_tokens)),
        (f"total {unit[0]}", lambda arm: _number_cell(_scaled(arm.total_macs, unit), significant)),
        ("s alone (shared)", seconds),
        ("events shown %", lambda arm: arm.event_recall is not None
         and Cell(_points(arm.event_recall), value=arm.event_recall)),
    ]  # fmt: skip
    cells = [[make(arm) or None for arm in summary.arms] for _, make in columns]
    kept = [place for place, column in enumerate(cells) if any(column)]
    rows = [[cells[place][row] or Cell("–") for place in kept] for row in range(len(summary.arms))]
    return Table([columns[place][0] for place in kept], rows)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _scaled(macs: float | None, unit: tuple[str, float]) -> float | None:
    return None if macs is None else macs / unit[1]


def _published(name: str) -> Callable[[ArmSummary], Cell | None]:
    def cell(arm: ArmSummary) -> Cell | None:
        value = arm.published.get(name)
        return None if value is None else Cell(_inline(value), value=value if isinstance(value, (int, float)) else None)

    return cell


def _published_rows(summary: Summary) -> Table | None:
    """Rows of a paper's table that are no arms of the runs, as the configurations quote them."""
    rows = {name: row for run in summary.runs for name, row in (run.config.get("published") or {}).items()}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [
        [Cell(who, value=who), *(Cell(_inline(row.get(name)) or "–", value=row.get(name)) for name in names)]
        for who, row in rows.items()
    ]
    return Table(["", *map(_words, names)], cells) if cells else None


def _official(name: str) -> Callable[[ArmSummary], Cell | None]:
    def cell(arm: ArmSummary) -> Cell | None:
        value = (arm.official or {}).get(name)
        return None if value is None or not math.isfinite(value) else Cell(f"{value:.1f}", value=value)

    return cell


def _asked(summary: Summary, arm: ArmSummary) -> Cell | None:
    """Accuracy over the questions that ran, where some did not."""
    if not any(a.errors for a in summary.arms):
        return None
    failed = f"{arm.errors:,} failed" if arm.errors else ""
    return Cell("–", failed) if arm.accuracy_asked is None else Cell(
        _points(arm.accuracy_asked.value), failed, arm.accuracy_asked.value
    )  # fmt: skip


def _tokens(arm: ArmSummary) -> Cell:
    given = "" if arm.tokens_given is None else f"{number(arm.tokens_given)} → "
    return Cell(f"{given}{number(arm.tokens_in)} → {number(arm.tokens_out)}", value=arm.tokens_in)


def _interval_methods(summary: Summary) -> str:
    how = {
        "wilson": "Wilson’s, one question a video",
        "clustered wilson": "Wilson’s at the number of questions that the videos are worth (questions about one video "
        "are not independent)",
        "wilson over videos": "Wilson’s with the number of videos as the count, because all videos scored alike",
    }
    found = dict.fromkeys(arm.accuracy.method for arm in summary.arms)
    few = " With so few videos, intervals are rough." if min(arm.num_videos for arm in summary.arms) < 20 else ""
    return f"Intervals are {'; '.join(how.get(method, method) for method in found)}.{few}"


# --- charts ---------------------------------------------------------------------------------------------------------


def _charts(summary: Summary, views: Mapping[str, ArmView], unit: tuple[str, float]) -> list[Chart]:
    y = _accuracy_axis(summary)
    made = []
    for kind, (title, cost) in COSTS.items():
        known = [(arm, cost(arm)) for arm in summary.arms if cost(arm) is not None]
        if len(known) < 2 or (kind == "seconds" and not summary.seconds_comparable):
            continue
        scale = unit[1] if kind == "macs" else 1.0
        x = charts.spread([value / scale for _, value in known], lambda value: f"{value:,.6g}")
        marks = [(views[arm.name].number, value / scale,
                  *(100 * v for v in (arm.accuracy.value, arm.accuracy.low, arm.accuracy.high)))
                 for arm, value in known]  # fmt: skip
        placed = charts.points(marks, x, y)
        titles = [_point_title(arm, value / scale) for arm, value in known]
        front = pareto_front({arm.name: (value, arm.accuracy.value) for arm, value in known})
        by_name = {arm.name: point for (arm, _), point in zip(known, placed)}
        methods: dict[int, list[tuple[float, str]]] = defaultdict(list)
        for arm, value in known:
            methods[views[arm.name].method].append((arm.frames or value, arm.name))
        lines = [(views[group[0][1]], [by_name[name] for _, name in sorted(group)]) for group in methods.values()]
        own = [views[arm.name] for arm, _ in known]
        made.append(Chart(title.format(unit=unit[0]), x, y, list(zip(own, placed, titles)),
                          [line for line in lines if len(line[1]) > 1], [by_name[name] for name in front]))  # fmt: skip
    return made


def _point_title(arm: ArmSummary, cost: float) -> str:
    share = arm.accuracy
    return f"{arm.name}: {_points(share.value)} % ({_points(share.low)}–{_points(share.high)}) at {cost:,.4g}"


def _layers(summary: Summary) -> Layers | None:
    curves = token_curves(summary)
    if not curves:
        return None
    longest = max(len(values) for _, values in curves)
    y = charts.linear([value for _, values in curves for value in values], lambda v: f"{v:g}", zero=True, most=5)
    layers = [round(step) for step in charts.round_steps(1, longest, 8) if 1 <= step <= longest and step == round(step)]
    layers = sorted({1, *layers, longest}) if longest < 6 else sorted({1, *layers})
    # A layer is a stretch of the axis; its number stands in the middle.
    x = charts.Axis(0.5, longest + 0.5, False, tuple(
        charts.Tick(round(100 * (layer - 0.5) / longest, 2), str(layer)) for layer in layers
    ))  # fmt: skip
    drawn = []
    for place, (label, values) in enumerate(curves):
        corners = []
        for layer, value in enumerate(values):
            height = round(100 - y.place(value), 2)
            corners += [(round(100 * layer / longest, 2), height), (round(100 * (layer + 1) / longest, 2), height)]
        drawn.append(Curve(label, f"c{place % 7}", place // 7 % 4, corners))
    return Layers(x, y, drawn)


def _bars(summary: Summary, views: Mapping[str, ArmView], unit: tuple[str, float]) -> list[Bars]:
    """Seconds (of each run alone where hardware differs) and MACs, by stage."""
    made = []
    for run, arms in _machines(summary):
        of = f" ({run})" if run else ""
        rows = [(arm, {**arm.seconds, "harness": arm.harness or 0.0}) for arm in arms]
        made.append(_stacked(f"seconds a question, alone on a fresh video{of}", rows, views, 1.0, "s"))
    rows = [(arm, arm.macs) for arm in summary.arms if arm.macs]
    made.append(_stacked(f"{unit[0]} a question, alone on a fresh video", rows, views, unit[1], unit[0]))
    return [bars for bars in made if bars is not None]


def _stacked(
    title: str, rows: Sequence[tuple[ArmSummary, Mapping[str, float]]], views: Mapping[str, ArmView], scale: float,
    unit: str,
) -> Bars | None:  # fmt: skip
    largest = max((sum(parts.values()) for _, parts in rows), default=0)
    if not largest:
        return None
    stages = [stage for stage in _stages(parts for _, parts in rows) if any(parts.get(stage) for _, parts in rows)]
    drawn = []
    for arm, parts in rows:
        shares = [(stage, round(100 * parts.get(stage, 0) / largest, 2), significant(parts.get(stage, 0) / scale))
                  for stage in stages if parts.get(stage)]  # fmt: skip
        drawn.append((views[arm.name], f"{significant(sum(parts.values()) / scale)} {unit}", shares))
    return Bars(title, stages, drawn)


def _stages(parts: Iterable[Mapping[str, float]]) -> list[str]:
    found = dict.fromkeys(stage for part in parts for stage in part)
    return [*(stage for stage in STAGES if stage in found), *(stage for stage in found if stage not in STAGES)]


def _machines(summary: Summary) -> list[tuple[str, list[ArmSummary]]]:
    """The arms that ran whose seconds can be compared: all of them, or those of each run by its name."""
    ran = [arm for arm in summary.arms if arm.seconds]
    if summary.seconds_comparable:
        return [("", ran)] if ran else []
    runs = {run.name: [arm for arm in ran if arm.run == run.name] for run in summary.runs}
    return [(name, arms) for name, arms in runs.items() if arms]


def _stage_table(ran: Sequence[ArmSummary], views: Mapping[str, ArmView], unit: tuple[str, float], title: str) -> Table:
    """The numbers behind the bars, and peak memory."""
    stages, counted = _stages(arm.seconds for arm in ran), _stages(arm.macs for arm in ran)
    counted = [stage for stage in counted if any(arm.macs.get(stage) for arm in ran)]
    harness = any(arm.harness is not None for arm in ran)
    rows = []
    for arm in ran:
        row = [Cell(arm.name, value=views[arm.name].number, arm=views[arm.name])]
        for stage in stages:
            shared = f"({significant(arm.seconds_amortised.get(stage))})"
            row.append(_number_cell(arm.seconds.get(stage), significant, shared))
        row += [_number_cell(arm.harness, significant)] * harness
        row += [_number_cell(_scaled(arm.macs.get(stage), unit), significant) for stage in counted]
        memory = ", ".join(f"{name} {significant(size / 1e9)}" for name, size in arm.peak_memory.items())
        rows.append([*row, Cell(memory or "–", value=max(arm.peak_memory.values(), default=0))])
    columns = [*(f"{s}, s" for s in stages), *["harness, s"] * harness, *(f"{s}, {unit[0]}" for s in counted)]
    return Table(["arm", *columns, "peak memory, GB"], rows, title=title)


# --- differences, groups, labels ------------------------------------------------------------------------------------


def _differences(summary: Summary, differences: Sequence[Difference], views: Mapping[str, ArmView]) -> Table | None:
    """Arm minus arm, in points; columns that no pair has anything for are left out."""
    if not differences:
        return None
    bounds = [100 * x for d in differences for x in (d.low, d.high)]
    scale = charts.linear([min(0.0, *bounds), max(0.0, *bounds)], str)
    several = len({d.b for d in differences}) > 1

    def points(d: Difference) -> Cell:
        places = Interval(*(scale.place(100 * x) for x in (d.difference, d.low, d.high)), zero=scale.place(0.0))
        return Cell(signed(d.difference), f"({signed(d.low)} to {signed(d.high)})", d.difference, interval=places)

    def arm(name: str) -> Cell:
        view = views.get(name)
        return Cell(name, value=view.number if view else name, arm=view)

    columns: list[tuple[str, Callable[[Difference], Cell | None]]] = [
        ("arm", lambda d: arm(d.a)),
        ("minus", lambda d: arm(d.b) if several else None),
        ("points (95\u00a0%)", points),
        ("told apart", lambda d: Cell("yes" if d.told_apart else "no", value=int(d.told_apart))),
        ("p (Holm)", lambda d: Cell(p_value(d.p_holm), value=d.p_holm)),
        ("p", lambda d: Cell(p_value(d.p), value=d.p)),
        ("wins / ties / losses", lambda d: Cell(f"{d.wins:,} / {d.ties:,} / {d.losses:,}", value=d.wins - d.losses)),
        ("McNemar p (Holm)", lambda d: None if d.mcnemar is None
         else Cell(p_value(d.mcnemar), "" if d.mcnemar_holm is None else f"({p_value(d.mcnemar_holm)})", d.mcnemar)),
        ("could have seen, points", lambda d: None if d.detectable is None
         else Cell(_points(d.detectable), value=d.detectable)),
        ("questions (videos)", lambda d: Cell(f"{d.n:,}", f"({d.num_videos:,})", d.n)),
        ("seeds", lambda d: Cell(str(d.num_seeds), value=d.num_seeds) if d.num_seeds else None),
        ("× its MACs", lambda d: None if d.macs_ratio is None else Cell(f"{d.macs_ratio:.2f}", value=d.macs_ratio)),
        ("equal in", lambda d: Cell(", ".join(BUDGETS[kind] for kind in d.equal)) if d.equal else None),
    ]  # fmt: skip
    cells = [[make(d) for d in differences] for _, make in columns]
    kept = [place for place, column in enumerate(cells) if any(column)]
    rows = [[cells[place][row] or Cell("–") for place in kept] for row in range(len(differences))]
    return Table([columns[place][0] for place in kept], rows)


def _equal(
    summary: Summary, views: Mapping[str, ArmView], unit: tuple[str, float]
) -> list[tuple[list[ArmView], list[str]]]:
    """Arms that spend the same, and what they spend the same of."""
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for group in summary.equal:
        value = f"{significant(group.value / unit[1])} {unit[0]}" if group.kind == "macs" else number(group.value)
        found[tuple(group.arms)].append(f"{BUDGETS[group.kind]} ({value})")
    return [([views[name] for name in arms], budgets) for arms, budgets in found.items()]


def _groups(summary: Summary) -> Table | None:
    """Arms with several seeds, as one."""
    if not summary.groups:
        return None
    scale = _accuracy_axis(summary)
    rows = [
        [Cell(group.name, value=group.name), Cell(", ".join(map(str, group.seeds)), value=len(group.seeds)),
         _accuracy_cell(group.accuracy, scale), Cell(_points(group.deviation), value=group.deviation)]
        for group in summary.groups
    ]  # fmt: skip
    return Table(["arms", "seeds", "mean accuracy % (95 %)", "deviation between seeds, points"], rows)


def _labels(summary: Summary, views: Mapping[str, ArmView]) -> list[Table]:
    """For each axis a table: a row a label, a column an arm, bars in the cells."""
    tables = []
    for axis in summary.axes:
        names = list(dict.fromkeys(label for arm in summary.arms for label in arm.labels.get(axis, {})))
        if len(names) < 2:
            continue
        rows = []
        for name in names:
            shares = [arm.labels.get(axis, {}).get(name) for arm in summary.arms]
            counts = [share.n for share in shares if share]
            asked = span(counts, "question")
            cells = [_label_cell(share, view.name) for share, view in zip(shares, views.values())]
            rows.append([Cell(name, asked, name), *cells])
        columns = ["label", *(str(view.number) for view in views.values())]
        tables.append(Table(columns, rows, title=_words(axis)))
    return tables


def _label_cell(share: Accuracy | None, arm: str) -> Cell:
    if share is None:
        return Cell("–", title=arm)
    counted, width = f"{share.correct:g}/{share.n}", round(100 * share.value, 1)
    return Cell(f"{100 * share.value:.0f}", counted, share.value, share=width, title=arm)


# --- questions ------------------------------------------------------------------------------------------------------


def _browser(summary: Summary, records: Sequence[Record], views: Mapping[str, ArmView]) -> Browser:
    asked = sorted(_asked_questions(records, list(views)), key=lambda question: -question.telling)
    listed, data = _listed(asked, views, summary.reference)
    detailed, pictures, told = _detailed(listed, summary, views)
    data["detailed"] = len(detailed)
    if len(listed) < len(asked):
        some_of = f"The page lists the {len(listed):,} of {len(asked):,} questions on which arms disagree most"
        told = f"{some_of}; all are in records.jsonl. {told}"
    return Browser(len(asked), detailed, pictures, data, told)


def _asked_questions(records: Iterable[Record], arms: Sequence[str]) -> Iterable[Asked]:
    by_question: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        by_question[record["question_id"]][record["arm"]] = record
    places = _places({str(record["video"]) for found in by_question.values() for record in found.values()})
    for name, found in by_question.items():
        first = next(iter(found.values()))
        labels = first.get("labels") or ({"category": [first["category"]]} if first.get("category") else {})
        yield Asked(
            id=name,
            video=str(first["video"]),
            place=places[str(first["video"])],
            text=_short(first.get("question")),
            options=[_short(option) for option in first.get("options") or []],
            answer=first.get("answer"),
            references=[_short(text) for text in first.get("references") or []],
            labels=[(_words(axis), str(label)) for axis, group in labels.items() for label in group],
            answers=[_answered(found.get(arm)) for arm in arms],
            records=[(arm, found[arm]) for arm in arms if arm in found],
        )


def _places(videos: Iterable[str]) -> dict[str, str]:
    """Paths without the folders that all share, which say nothing and may come from the environment."""
    videos = list(videos)
    try:
        shared = os.path.commonpath([os.path.dirname(video) for video in videos])
    except ValueError:  # absolute and relative ones
        shared = ""
    return {video: os.path.relpath(video, shared) if shared else video for video in videos}


def _answered(record: Record | None) -> Answered:
    if record is None:
        return Answered("-")
    if record.get("error"):
        return Answered("e", 0.0, None, _short(record["error"]))
    value = score(record)
    mark = "1" if value >= 1 else "0" if value <= 0 else "p"
    return Answered(mark, value, record.get("prediction"), _short(record.get("text")))


def _short(text: Any) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _listed(
    asked: Sequence[Asked], views: Mapping[str, ArmView], reference: str
) -> tuple[Sequence[Asked], dict[str, Any]]:
    """The questions that there is room for, and what the script is given of them."""
    tables: dict[str, dict[Any, int]] = {"videos": {}, "labels": {}, "texts": {}}
    spent = 0

    def index(table: str, item: Any) -> int:
        nonlocal spent
        known = tables[table]
        if item not in known:
            known[item] = len(known)
            spent += len(json.dumps(item)) + 1
        return known[item]

    rows: list[dict[str, Any]] = []
    for question in asked:
        row = question.compact(index)
        spent += len(json.dumps(row)) + 1
        if spent > LISTED_BYTES and rows:
            break
        rows.append(row)
    data: dict[str, Any] = {name: list(table) for name, table in tables.items()}
    data |= {"arms": [view.name for view in views.values()], "reference": views[reference].number - 1}
    return asked[: len(rows)], {**data, "questions": rows}


def _detailed(
    asked: Sequence[Asked], summary: Summary, views: Mapping[str, ArmView]
) -> tuple[list[str], dict[str, Picture], str]:
    """The HTML of the first questions, with frames; the thumbnails; what is to be said of their number."""
    colours = {name: view.colour for name, view in views.items()}
    videos = {video: f"f{place}" for place, video in enumerate(dict.fromkeys(question.video for question in asked))}
    found, with_pictures, gone = _pictures(asked, summary)
    template = environment().get_template("question.html.j2").module
    detailed: list[str] = []
    pictures: dict[str, Picture] = {}
    size = spent = framed = drawn = 0
    for place, question in enumerate(asked[:DETAILED]):
        line = timeline(question.records, found, THUMBNAILS, videos[question.video], colours)
        new = {} if line is None else {key: p for key, p in line.pictures.items() if key not in pictures}
        weight = sum(len(picture.url) for picture in new.values())
        if place >= with_pictures or spent + weight > PICTURE_BYTES:
            line, weight, new = timeline(question.records, {}, colours=colours), 0, {}
        text = template.question(question, line, list(views.values()), LETTERS)
        size += len(text.encode("utf-8", "replace"))
        if size > DETAILED_BYTES and detailed:
            break
        spent += weight
        pictures |= new
        framed += line is not None
        drawn += line is not None and bool(line.pictures)
        detailed.append(text)
    return detailed, pictures, _told(len(asked), framed, drawn, gone)


def _told(asked: int, framed: int, drawn: int, gone: int) -> str:
    """What stands in the page of how much."""
    if not framed:
        return ""
    whose = "every question" if framed == asked else f"the {framed:,} questions on which arms disagree most"
    text = f"Frames stand under {whose}, "
    text += f"as thumbnails (at most {THUMBNAILS} a row) under {drawn:,} of them." if drawn else "without thumbnails."
    text += f" {span([gone], 'video')} could not be read again." if gone else ""
    return (
        f"{text} Ticks are the frames shown; the curve is the score of every candidate, scaled to its own range (dots: "
        "candidates asked for alone); shaded is the evidence, where it is known, and grey what is not asked about."
    )


def _pictures(asked: Sequence[Asked], summary: Summary) -> tuple[dict[tuple[str, int], Picture], int, int]:
    """Thumbnails of the first questions: as many as there is room for; of how many questions; videos not read."""
    wanted: dict[str, set[int]] = defaultdict(set)
    chosen = 0
    for question in asked[:PICTURED]:
        for _, record in question.records:
            wanted[question.video] |= set(some(record.get("frames") or [], THUMBNAILS))
        chosen += 1
        if sum(map(len, wanted.values())) * 2_500 > PICTURE_BYTES:  # about what a thumbnail takes
            break
    config = summary.runs[0].config
    reader, given = (config.get("sampling") or {}).get("reader", "auto"), config.get("decoding") or {}
    # As the run was written: an interpolation stays one, and means the default here.
    decoding = Decoding(**{name: value for name, value in given.items() if not isinstance(value, str)})
    frames = {video: sorted(numbers) for video, numbers in wanted.items() if numbers}
    found = thumbnails(frames, reader, decoding, PICTURE_SECONDS)
    return found, chosen, len(frames) - len({video for video, _ in found})


# --- errors, and again ----------------------------------------------------------------------------------------------


def _errors(records: Iterable[Record], views: Mapping[str, ArmView]) -> tuple[list[tuple[str, str, str]], int]:
    """(message, arms, count) of the most frequent errors, and how many others there are."""
    counts: Counter[str] = Counter()
    arms: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.get("error"):
            counts[str(record["error"])] += 1
            arms[str(record["error"])].add(record["arm"])
    shown = [(_short(error), ", ".join(name for name in views if name in arms[error]), f"{n:,}")
             for error, n in counts.most_common(ERRORS)]  # fmt: skip
    return shown, len(counts) - len(shown)


def _rerun(run: RunFacts) -> dict[str, str]:
    name = f"{run.config.get('name') or run.name}.yaml"
    config = OmegaConf.to_yaml(OmegaConf.create(dict(run.config)))
    command = run.command or f"xcomp {run.kind} {shlex.quote(name)}"
    return {"name": name, "command": command, "config": config, "commit": run.git_commit or ""}

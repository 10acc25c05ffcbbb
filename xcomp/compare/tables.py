"""A summary as tables: for a terminal of 80 columns, ``table.md``, ``table.tex`` (booktabs) and ``table.csv``.

A :class:`Grid` is a table as text, with a title and notes; the three renderings show the same grids. All costs are
means a question.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xcomp.compare.analysis import TOLERANCE, ArmSummary, Difference, Summary
from xcomp.compare.statistics import Accuracy
from xcomp.config import BUDGETS


@dataclass(frozen=True)
class Grid:
    """A table as text; the first column is left-aligned, the others right."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


# --- what is shown -----------------------------------------------------------------------------------------------


def grids(summary: Summary, *, brief: bool = False) -> list[Grid]:
    """All tables of a summary, those without content left out; ``brief``: those that a terminal is given."""
    found = [results(summary, brief=brief), differences(summary, brief=brief), seeds(summary)]
    found += [group_differences(summary, brief=brief), *stages(summary, brief=brief)]
    if not brief or summary.equal_budget is not None:
        found.append(budgets(summary))
    if not brief:
        found += [labels(summary, axis) for axis in summary.axes]
    found.append(others(summary))
    return [replace(grid, notes=[*grid.notes, *summary.cautions]) for grid in found if grid is not None]


def results(summary: Summary, *, brief: bool = False) -> Grid:
    """The comparison, a row an arm; seconds only where all were taken on the same hardware."""
    arms = summary.arms
    unit, scale = macs_unit(arms)
    failed = any(arm.errors for arm in arms)
    columns = ["arm", "frames", "accuracy % (95\u00a0%)", *(["of\u00a0those asked\u00a0%"] if failed else [])]
    columns += ["KV tokens"] if brief else ["tokens given", "in", "last layer", "KV mean"]
    columns += [f"total {unit}", *(["s/question alone\u00a0(shared)"] if summary.seconds_comparable else [])]
    rows = []
    for arm in arms:
        row = [arm.name, number(arm.frames), percent_with_interval(arm.accuracy)]
        row += [percent(arm.accuracy_asked)] if failed else []
        given = [] if brief else [number(n) for n in (arm.tokens_given, arm.tokens_in, arm.tokens_out)]
        row += [*given, number(arm.kv_tokens)]
        row.append(significant(arm.total_macs, scale))
        if summary.seconds_comparable:
            row.append(f"{significant(arm.total_seconds)} ({significant(arm.total_seconds_amortised)})")
        rows.append(row)
    return Grid("Results", columns, rows, [_meaning(summary), *summary.remarks])


def _meaning(summary: Summary) -> str:
    questions = span([arm.num_questions for arm in summary.arms], "question")
    videos = span([arm.num_videos for arm in summary.arms], "video")
    text = f"{questions} on {videos}; means a question. KV tokens: visual tokens in the cache, mean over layers. "
    text += "MACs: vision, selection and language model."
    if summary.seconds_comparable:
        text += " Seconds: alone on a fresh video, and with shared work divided among those who shared it."
    return text


def stages(summary: Summary, *, brief: bool = False) -> list[Grid]:
    """Mean seconds alone by stage, and what is no stage's; a table a run where hardware differs."""
    found = []
    names = [None] if summary.seconds_comparable else [run.name for run in summary.runs]
    for name in names:
        arms = [arm for arm in summary.arms if name in (None, arm.run) and arm.seconds]
        shown = list(dict.fromkeys(stage for arm in arms for stage in arm.seconds))
        if not shown:
            continue
        if brief:  # stages that take no time in any arm have no room
            shown = [stage for stage in shown if any(significant(arm.seconds.get(stage)) != "0.000" for arm in arms)]
        rows = [
            [arm.name, *(significant(arm.seconds.get(stage)) for stage in shown), _harness_cell(arm)] for arm in arms
        ]
        totals = [[significant(arm.total_seconds), significant(arm.total_seconds_amortised)] for arm in arms]
        rows = rows if brief else [[*row, *total] for row, total in zip(rows, totals, strict=True)]
        title = "Seconds by stage" + (f": {name}" if name else "")
        note = (
            "Means a question, alone on a fresh video. Harness: time of the run that is no stage's, divided among its "
            "questions, and its share of the model's process (stages with shared work divided, without decoding and "
            "waiting). Decoding runs beside the model: seconds of its processes divided by their number."
        )
        columns = ["arm", *shown, "harness", *([] if brief else ["total", "shared"])]
        found.append(Grid(title, columns, rows, [note]))
    return found


def _harness_cell(arm: ArmSummary) -> str:
    return "–" if arm.harness is None else f"{significant(arm.harness)} ({100 * (arm.harness_share or 0):.1f}\u00a0%)"


def differences(summary: Summary, *, brief: bool = False) -> Grid | None:
    """Paired differences of arms, with the smallest that could have been seen."""
    if len(summary.arms) < 2:
        return None
    columns, rows = _difference_cells(summary.differences, with_b=summary.pairs == "all", brief=brief)
    against = "the second of each pair" if summary.pairs == "all" else summary.reference
    notes = []
    if rows:
        notes.append(
            f"Accuracy minus that of {against}, in percentage points, on {_counts(summary.differences)}. Intervals and "
            "p: t test with errors clustered by video; McNemar's exact p takes questions as independent, so trust it "
            "only where videos have one each; both adjusted by Holm for the table. 'seen': the smallest difference "
            "that 80 % of such runs would have found."
        )
    if summary.equal_budget:
        notes.append(f"Equal budgets asked for: {BUDGETS[summary.equal_budget]}, within {100 * TOLERANCE:.0f} %.")
    reasons: dict[tuple[str, str], list[str]] = {}
    for refusal in summary.refused:
        reasons.setdefault((refusal.b, refusal.reason), []).append(refusal.a)
    notes += [f"Not compared with {b}: {', '.join(arms)} ({reason})." for (b, reason), arms in reasons.items()]
    return Grid("Paired differences", columns, rows, notes)


def _difference_cells(found: Sequence[Difference], with_b: bool, brief: bool) -> tuple[list[str], list[list[str]]]:
    exact = any(d.mcnemar is not None for d in found)
    columns = ["arm", *(["minus"] if with_b else []), "points (95\u00a0%)", "wins/ ties/ losses", "p\u00a0Holm"]
    columns += ["McNemar p\u00a0Holm"] if exact else []
    columns += ["seen", *([] if brief else ["equal in"])]
    rows = []
    for d in found:
        row = [d.a, *([d.b] if with_b else []), points_with_interval(d), f"{d.wins:,}/{d.ties:,}/{d.losses:,}"]
        row += [p_value(d.p_holm), *([p_value(d.mcnemar_holm)] if exact else [])]
        row += ["–" if d.detectable is None else f"{100 * d.detectable:.1f}" if d.detectable < 1 else ">\u00a0100"]
        rows.append([*row, *([] if brief else [", ".join(BUDGETS[kind] for kind in d.equal) or "–"])])
    return columns, rows


def _counts(found: Sequence[Difference]) -> str:
    return f"{span([d.n for d in found], 'question')} in {span([d.num_videos for d in found], 'video')} (clusters)"


def seeds(summary: Summary) -> Grid | None:
    """Arms that differ in the seed alone, taken together."""
    if not summary.groups:
        return None
    rows = [
        [g.name, f"{len(g.seeds)}", percent_with_interval(g.accuracy), f"{100 * g.deviation:.1f}"]
        for g in summary.groups
    ]
    note = "Mean over seeds; intervals take seeds and videos as drawn. Deviation: from seed to seed, in points."
    return Grid("Over seeds", ["arms", "seeds", "accuracy % (95\u00a0%)", "deviation"], rows, [note])


def group_differences(summary: Summary, *, brief: bool = False) -> Grid | None:
    """Paired differences of groups of seeds."""
    if not summary.group_differences:
        return None
    found = summary.group_differences
    columns, rows = _difference_cells(found, with_b=False, brief=brief)
    rows = [[row[0], f"{d.num_seeds}", *row[1:]] for row, d in zip(rows, found, strict=True)]
    note = (
        f"Mean score over seeds minus that of {found[0].b}, on {_counts(found)}; questions are paired within seeds "
        "where the seeds agree (their number is shown; 0: they do not, or there is one)."
    )
    return Grid("Paired differences over seeds", [columns[0], "paired seeds", *columns[1:]], rows, [note])


def budgets(summary: Summary) -> Grid | None:
    """Which arms may be compared as equals, and in what."""
    rows = []
    unit, scale = macs_unit(summary.arms)
    for group in summary.equal:
        if summary.equal_budget in (None, group.kind):
            value = f"{significant(group.value, scale)} {unit}" if group.kind == "macs" else number(group.value)
            rows.append([", ".join(group.arms), BUDGETS[group.kind], value])
    note = f"Equal within {100 * TOLERANCE:.0f} %; MACs with selection."
    return Grid("Equal budgets", ["arms", "equal in", "mean"], rows, [note]) if rows else None


def labels(summary: Summary, axis: str) -> Grid | None:
    """Accuracies by the labels of an axis, with the number of questions."""
    counts: dict[str, list[int]] = {}
    for arm in summary.arms:
        for label, share in arm.labels.get(axis, {}).items():
            counts.setdefault(label, []).append(share.n)
    if not counts:
        return None
    columns = [f"{label} ({min(n):,})" if min(n) == max(n) else label for label, n in counts.items()]
    rows = [
        [arm.name, *(_label_cell(arm.labels.get(axis, {}).get(label), counts[label]) for label in counts)]
        for arm in summary.arms
    ]
    note = "Accuracy in %, and in brackets the number of questions. Small groups scatter: read with care."
    return Grid(f"By {axis.replace('_', ' ')}", ["arm", *columns], rows, [note])


def _label_cell(share: Accuracy | None, counts: Sequence[int]) -> str:
    same = min(counts) == max(counts)
    return "–" if share is None else percent(share) + ("" if same else f" ({share.n:,})")


def others(summary: Summary) -> Grid | None:
    """The benchmark's own metrics, events shown, and published numbers beside ours, of other models too."""
    official = list(dict.fromkeys(key for arm in summary.arms for key in arm.official or {}))
    quoted = {name: row for run in summary.runs for name, row in (run.config.get("published") or {}).items()}
    published = list(dict.fromkeys(k for row in (*(a.published for a in summary.arms), *quoted.values()) for k in row))
    if official == ["accuracy"] and all(is_accuracy(arm, "accuracy") for arm in summary.arms if arm.official):
        official = []
    recall = any(arm.event_recall is not None for arm in summary.arms)
    columns = ["arm", "accuracy\u00a0%", *(["hard part\u00a0%"] if summary.hard else [])]
    columns += [f"{key} (official)" for key in official] + [f"{key} (published)" for key in published]
    columns += ["events shown\u00a0%"] if recall else []
    if len(columns) == 2:
        return None
    rows = []
    for arm in summary.arms:
        row = [arm.name, percent(arm.accuracy), *([percent(arm.hard)] if summary.hard else [])]
        row += [_plain_number((arm.official or {}).get(key)) for key in official]
        row += [_as_quoted(arm.published.get(key)) for key in published]
        rows.append(row + ([_plain_number(_times(arm.event_recall, 100))] if recall else []))
    for name, row in quoted.items():
        numbers = {f"{key} (published)": _as_quoted(row.get(key)) for key in published}
        rows.append([name, *(numbers.get(column, "–") for column in columns[1:])])
    notes = []
    if summary.hard:
        how = "named in the configuration" if summary.hard.found == "named" else "plain down-sampling"
        notes.append(f"Hard part: the {summary.hard.n:,} questions that '{summary.hard.arm}' gets wrong ({how}).")
    notes += ["Official: as the benchmark itself aggregates."] if official else []
    notes += ["Published: as quoted in the configuration, not measured here."] if published else []
    if recall:
        notes.append("Events shown: of the events a question is about, the share of which a frame was shown, mean.")
    return Grid("Other numbers", columns, rows, notes)


# --- numbers as text ---------------------------------------------------------------------------------------------


def macs_unit(arms: Iterable[ArmSummary]) -> tuple[str, float]:
    """The unit in which the largest total is at least 1, and how many MACs it is."""
    largest = max((arm.total_macs for arm in arms if arm.total_macs is not None), default=0)
    units = {"TMACs": 1e12, "GMACs": 1e9, "MMACs": 1e6}
    return next((item for item in units.items() if largest >= item[1]), ("MMACs", 1e6))


def percent(share: Accuracy | None) -> str:
    return "–" if share is None else f"{100 * share.value:.1f}"


def percent_with_interval(share: Accuracy) -> str:
    return f"{100 * share.value:.1f} ({100 * share.low:.1f}–{100 * share.high:.1f})"


def points_with_interval(d: Difference) -> str:
    return f"{signed(d.difference)} ({signed(d.low)} to {signed(d.high)})"


def signed(share: float) -> str:
    """Percentage points with a sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def p_value(value: float | None) -> str:
    return "–" if value is None else "<\u00a00.001" if value < 0.001 else f"{value:.3f}"


def number(value: float | None) -> str:
    """A count, or a mean of counts to one decimal; a dash if unknown."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if round(value, 1) == round(value) else f"{value:,.1f}"


def significant(value: float | None, scale: float = 1) -> str:
    """Three significant digits, but at most three decimals; a dash if unknown."""
    return "–" if value is None else _significant(value / scale)


def _significant(value: float) -> str:
    decimals = 3
    for limit in (1, 10, 100):
        decimals -= abs(value) >= limit
    return f"{value:,.{decimals}f}"


def span(counts: Sequence[int], noun: str) -> str:
    """ "96 questions", or "90–96 questions" where arms differ."""
    low, high = min(counts), max(counts)
    text = f"{high:,}" if low == high else f"{low:,}–{high:,}"
    return f"{text} {noun}{'' if high == 1 else 's'}"


def _as_quoted(value: object) -> str:
    """With as many digits as a paper has."""
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _plain_number(value: object) -> str:
    return f"{value:,.1f}" if isinstance(value, (int, float)) else "–" if value is None else str(value)


def is_accuracy(arm: ArmSummary, metric: str) -> bool:
    """Whether the benchmark's own metric says again what the accuracy says."""
    return abs((arm.official or {}).get(metric, math.nan) - 100 * arm.accuracy.value) < 1e-6


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


# --- renderings --------------------------------------------------------------------------------------------------


def print_summary(summary: Summary, console: Console) -> None:
    """Tables for a terminal, the verdict behind the first; at most 80 columns where the arms' names allow."""
    for grid in grids(summary, brief=True):
        console.print(_rich(grid))
        for note in grid.notes:
            console.print(Text(note))
        console.print()
        if grid.title == "Results":
            console.print(Text(summary.verdict, style="bold"))
            console.print()
    if summary.axes:
        axes = ", ".join(axis.replace("_", " ") for axis in summary.axes)
        console.print(Text(f"By {axes}, and by budget: in table.md and the report."))


def _rich(grid: Grid) -> Table:
    # Narrow, so that 80 columns leave room for the arms' names.
    options = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    title = None if grid.title == "Results" else Text(grid.title)
    table = Table(title=title, title_justify="left", **options)
    table.add_column(grid.columns[0], overflow="fold")
    for column in grid.columns[1:]:
        text = column in ("minus", "equal in")
        table.add_column(
            column.replace("/ ", "/\n").replace(" ", "\n", 1), justify="left" if text else "right", no_wrap=not text
        )
    for row in grid.rows:
        table.add_row(*map(Text, row))
    return table


def markdown(summary: Summary) -> str:
    """All tables as Markdown, the verdict first."""
    parts = [_markdown_text(summary.verdict)]
    for grid in grids(summary):
        lines = [grid.columns, [":--"] + ["--:"] * (len(grid.columns) - 1), *grid.rows] if grid.rows else []
        table = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
        parts += [f"## {grid.title}", table, *map(_markdown_text, grid.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_text(text: str) -> str:
    return text.replace("|", r"\|").replace("<", r"\<")


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "→": r"$\to$", "−": "$-$", "–": "--", "<": "$<$",
    ">": "$>$", "\u00a0": "~",
}  # fmt: skip


def latex(summary: Summary) -> str:
    """All tables as LaTeX tabulars (package booktabs), notes as comments' text below each."""
    parts = [f"% {' '.join(summary.verdict.split())}"]
    for grid in grids(summary):
        if not grid.rows:
            continue
        lines = [f"% {grid.title}", rf"\begin{{tabular}}{{l{'r' * (len(grid.columns) - 1)}}}", r"\toprule"]
        lines.append(_latex_row(grid.columns))
        lines += [r"\midrule", *map(_latex_row, grid.rows), r"\bottomrule", r"\end{tabular}"]
        lines += [f"% {' '.join(note.split())}" for note in grid.notes]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join("".join(_LATEX.get(c, c) for c in " ".join(cell.split(" "))) for cell in cells) + r" \\"


def comma_separated(summary: Summary) -> str:
    """A row an arm, every number in full. Seconds have a column a run where hardware differs."""
    rows = [_csv_row(summary, arm) for arm in summary.arms]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _csv_row(summary: Summary, arm: ArmSummary) -> dict[str, object]:
    share = arm.accuracy
    row: dict[str, object] = {"arm": arm.name, "run": arm.run, "group": arm.group, "seed": arm.seed}
    row |= {"accuracy": share.value, "accuracy_low": share.low, "accuracy_high": share.high, "method": share.method}
    row |= {"correct": share.correct, "questions": share.n, "videos": share.num_videos}
    row |= {"errors": arm.errors, "unanswered": arm.unanswered}
    for key in ("accuracy_asked", "hard"):
        value = getattr(arm, key)
        row |= {key: None if value is None else value.value, f"{key}_n": None if value is None else value.n}
    names = ("frames", "tokens_given", "tokens_in", "tokens_out", "kv_tokens", "total_macs", "event_recall")
    row |= {name: getattr(arm, name) for name in names}
    row |= {f"macs_{stage}": value for stage, value in arm.macs.items()}
    on = "" if summary.seconds_comparable else f" on {arm.run}"
    for name in ("total_seconds", "total_seconds_amortised", "seconds_waiting", "harness", "harness_share"):
        row[f"{name}{on}"] = getattr(arm, name)
    row |= {f"seconds_{stage}{on}": value for stage, value in arm.seconds.items()}
    row |= {f"seconds_amortised_{stage}{on}": value for stage, value in arm.seconds_amortised.items()}
    row |= {f"peak_memory_{name}": value for name, value in arm.peak_memory.items()}
    row |= {f"official_{name}": value for name, value in (arm.official or {}).items()}
    row |= {f"published_{name}": value for name, value in arm.published.items()}
    for axis, shares in arm.labels.items():
        for label, label_share in shares.items():
            row |= {f"{axis}: {label}": label_share.value, f"{axis}: {label}, n": label_share.n}
    difference = next((d for d in summary.differences if (d.a, d.b) == (arm.name, summary.reference)), None)
    if difference is not None:
        keys = ("difference", "low", "high", "wins", "ties", "losses", "p", "p_holm", "mcnemar", "mcnemar_holm")
        row |= {f"minus_reference_{key}": getattr(difference, key) for key in (*keys, "detectable")}
    return row

"""From a finished run to something to read: tables, results.json, three pictures and one self-contained HTML page.

``write_report`` reads what the runner left in a run's directory (``run.json``, ``records.jsonl``) and can be called
again at any time; every file is written whole or not at all.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich import box
from rich.table import Table
from rich.text import Text

from xcomp.compare import plots
from xcomp.compare.explain import CSS, explanation
from xcomp.compare.plots import Legend
from xcomp.compare.records import read_records
from xcomp.compare.statistics import ArmSummary, PairedDifference, Proportion, Record, holm, paired, summarise
from xcomp.config import Decoding
from xcomp.run import SCHEMA

RESULTS_SCHEMA = 2
# What each number in results.json is counted in, and which way is better.
METRICS = {
    "accuracy": {"unit": "share of questions", "direction": "higher"},
    "accuracy_asked": {"unit": "share of the questions that could be asked", "direction": "higher"},
    "tokens_in": {"unit": "visual tokens entering the LLM", "direction": "lower"},
    "tokens_out": {"unit": "visual tokens in the last layer", "direction": "lower"},
    "macs": {"unit": "multiply-accumulates a question, alone on a fresh video, by stage", "direction": "lower"},
    "seconds": {"unit": "seconds a question, alone on a fresh video, by stage (means)", "direction": "lower"},
    "seconds_amortised": {"unit": "seconds a question, shared work divided, by stage (means)", "direction": "lower"},
    "peak_memory": {"unit": "bytes", "direction": "lower"},
    "event_recall": {"unit": "share of a question's events of which a frame was shown", "direction": "higher"},
}


@dataclass(frozen=True)
class Results:
    """Everything the report shows: the run's description and records, and what was computed from them.

    ``paired`` compares each arm with the first; ``holm`` are its p-values adjusted for the number of arms. ``unpaired``
    names the arms that share no question with the first.
    """

    run: Mapping[str, Any]
    records: list[Record]
    arms: dict[str, Legend]
    summaries: list[ArmSummary]
    paired: list[PairedDifference]
    holm: list[float]
    unpaired: list[str]


# --- tables ------------------------------------------------------------------------------------------------------


def table(summaries: Sequence[ArmSummary]) -> Table:
    """The comparison for a terminal, a row an arm."""
    columns, rows = _cells(summaries)
    # Narrow, so that 80 columns leave room for the arms' names.
    options = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True, "caption_justify": "left"}
    result = Table(caption=Text(_footnote(summaries)), **options)
    result.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        result.add_column(column.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for row in rows:
        result.add_row(*map(Text, row))
    return result


def markdown_table(summaries: Sequence[ArmSummary]) -> str:
    """The comparison as a Markdown table, with a line below that says what the numbers are."""
    columns, rows = _cells(summaries)
    lines = [columns, [":--"] + ["--:"] * (len(columns) - 1), *rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
    return f"{text}\n\n{_footnote(summaries)}\n"


def _cells(summaries: Sequence[ArmSummary]) -> tuple[list[str], list[list[str]]]:
    """Column names and, for each arm, its cells as text.

    Where questions failed to run, accuracy without them stands beside accuracy over all.
    """
    unit, scale = _macs_unit(summaries)
    columns = [
        "arm",
        "frames",
        "accuracy % (95\u00a0%)",
        "tokens in\u00a0→\u00a0out",
        f"total {unit}",
        "s/question alone\u00a0(shared)",
    ]
    failed = any(summary.errors for summary in summaries)
    rows = [
        [
            summary.arm,
            _number(summary.num_frames),
            _percent_with_interval(summary.accuracy),
            f"{_number(summary.tokens_in)} → {_number(summary.tokens_out)}",
            _significant(summary.total_macs / scale),
            f"{_significant(summary.total_seconds)} ({_significant(summary.total_seconds_amortised)})",
        ]
        for summary in summaries
    ]
    if failed:
        columns.insert(3, "of\u00a0those asked\u00a0%")
        for row, summary in zip(rows, summaries, strict=True):
            row.insert(3, "–" if summary.accuracy_asked is None else f"{100 * summary.accuracy_asked.value:.1f}")
    return columns, rows


def _footnote(summaries: Sequence[ArmSummary]) -> str:
    """What the table's numbers are, how many questions stand behind them and how many failed."""
    questions = _span([summary.accuracy.n for summary in summaries], "question")
    videos = _span([summary.num_videos for summary in summaries], "video")
    parts = [
        f"{questions} on {videos}; means a question. MACs: vision, selection and language model. Seconds: alone on a "
        "fresh video, and with shared work divided among those who shared it."
    ]
    errors = [f"{summary.arm}: {summary.errors}" for summary in summaries if summary.errors]
    if errors:
        parts.append(f"Questions that failed to run (counted as wrong, but for those asked): {', '.join(errors)}.")
    unanswered = [f"{summary.arm}: {summary.unanswered}" for summary in summaries if summary.unanswered]
    if unanswered:
        parts.append(f"Answers that named no option (counted as wrong): {', '.join(unanswered)}.")
    return " ".join(parts)


def _span(counts: Sequence[int], noun: str) -> str:
    """ "96 questions", or "90–96 questions" where arms differ."""
    low, high = min(counts), max(counts)
    number = f"{high:,}" if low == high else f"{low:,}–{high:,}"
    return f"{number} {noun}{'' if high == 1 else 's'}"


def _macs_unit(summaries: Sequence[ArmSummary]) -> tuple[str, float]:
    largest = max((s.total_macs for s in summaries if not math.isnan(s.total_macs)), default=0)
    units = {"TMACs": 1e12, "GMACs": 1e9, "MMACs": 1e6}
    return next((item for item in units.items() if largest >= item[1]), ("MMACs", 1e6))


def _percent_with_interval(share: Proportion) -> str:
    return f"{100 * share.value:.1f} ({100 * share.low:.1f}–{100 * share.high:.1f})"


def _number(value: float) -> str:
    """A count, or a mean of counts to one decimal; a dash if unknown."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if round(value, 1) == round(value) else f"{value:,.1f}"


def _significant(value: float) -> str:
    """Three significant digits, but at most three decimals; a dash if unknown."""
    if math.isnan(value):
        return "–"
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(decimals, 0), 3)}f}"


# --- reading and computing ---------------------------------------------------------------------------------------


def write_report(run_dir: str | Path) -> Path:
    """Writes results.json, the pictures and report.html into ``run_dir``; returns the path of report.html.

    Raises ValueError, in one line, if the directory holds no run, no records or damaged ones.
    """
    run_dir = Path(run_dir)
    results = analyse(*read_run(run_dir))
    pictures = {name: plots.png(figure) for name, figure in _figures(results).items() if figure is not None}
    for name in ("accuracy", "tokens_per_layer", "selected_frames"):
        if name in pictures:
            _write(run_dir / f"{name}.png", pictures[name])
        else:
            (run_dir / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
    text = json.dumps(_without_nan(_as_dict(results)), indent=2, ensure_ascii=False)
    _write(run_dir / "results.json", f"{text}\n".encode())
    _write(run_dir / "report.html", _page(results, pictures).encode())
    return run_dir / "report.html"


def read_run(run_dir: Path) -> tuple[dict[str, Any], list[Record]]:
    """The run's description and its records; ValueError if there are none or a line is damaged."""
    if not (run_dir / "run.json").is_file():
        raise ValueError(f"{run_dir} holds no run: run.json is missing")
    run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    if run.get("schema") != SCHEMA:
        raise ValueError(f"{run_dir / 'run.json'} has schema {run.get('schema')!r}; this version reads {SCHEMA}")
    records = read_records(run_dir)
    if not records:
        raise ValueError(f"{run_dir / 'records.jsonl'} has no records: the run has not answered a question yet")
    return run, records


def analyse(run: Mapping[str, Any], records: Iterable[Record]) -> Results:
    """Summaries of all arms, in the run's order, and each arm's difference from the first."""
    arms = {arm.name: arm for arm in map(Legend.from_dict, run.get("arms") or [])}
    order = {name: position for position, name in enumerate(arms)}
    records = sorted(records, key=lambda record: order.get(record["arm"], len(order)))
    summaries = summarise(records)
    groups = {summary.arm: [r for r in records if r["arm"] == summary.arm] for summary in summaries}
    first, *others = groups
    asked = {record["question_id"] for record in groups[first]}
    shares = {arm: any(record["question_id"] in asked for record in groups[arm]) for arm in others}
    differences = [paired(groups[arm], groups[first]) for arm in others if shares[arm]]
    return Results(
        run=run,
        records=records,
        arms=arms,
        summaries=summaries,
        paired=differences,
        holm=holm([difference.p for difference in differences]),
        unpaired=[arm for arm in others if not shares[arm]],
    )


def _figures(results: Results) -> dict[str, Figure | None]:
    return {
        "accuracy": plots.accuracy_plot(results.summaries, results.arms),
        "tokens_per_layer": plots.tokens_plot(results.records, results.arms),
        "selected_frames": plots.selection_plot(plots.selection_example(results.records, results.arms)),
    }


def _as_dict(results: Results) -> dict[str, Any]:
    """The content of results.json."""
    described = ("name", "benchmark", "versions", "hardware", "git_commit", "config")
    described_arms = {str(arm["name"]): arm for arm in results.run.get("arms") or []}
    pairs = zip(results.paired, results.holm, strict=True)
    return {
        "schema": RESULTS_SCHEMA,
        **{key: results.run.get(key) for key in described},
        "records": "records.jsonl",
        "metrics": METRICS,
        "arms": [{**described_arms.get(s.arm, {}), "summary": asdict(s)} for s in results.summaries],
        "paired": [{**asdict(difference), "p_holm": adjusted} for difference, adjusted in pairs],
        "unpaired": results.unpaired,
    }


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: null instead."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: bytes) -> None:
    """Writes beside the file, then renames, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(content)
        with suppress(FileNotFoundError):  # a run that began meanwhile has taken it away, and will write its own
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# --- the page ----------------------------------------------------------------------------------------------------


_CAPTIONS = {
    "accuracy": "Share of questions answered rightly, with 95 % intervals.",
    "tokens_per_layer": "Visual tokens each LLM layer works on, for every frame shown (means over questions).",
    "selected_frames": "What each selector showed the model, for the first question that all of them were asked.",
}


def _page(results: Results, pictures: Mapping[str, bytes]) -> str:
    name = escape(str(results.run.get("name") or "comparison"))
    sections = [
        _header(results, name),
        _section("Results", _results_table(results) + _note(_results_note(results)) + _image("accuracy", pictures)),
        _section("Differences", _paired_table(results)),
        _section("Cost by stage", _cost_table(results)),
        _section("Accuracy by category", _category_table(results)),
        _section("Tokens through the layers", _image("tokens_per_layer", pictures)),
        _section("Frames shown", _recall_table(results) + _image("selected_frames", pictures) + _frames(results)),
        _section("Questions that failed to run", _error_table(results)),
        _section("Run it again", _rerun(results)),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name} – xcomp comparison</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"{''.join(sections)}</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    """A titled part of the page; nothing where there is no content."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}</section>\n" if content else ""


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>\n'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; column names are text, cells are HTML."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def _arm(name: str) -> str:
    """An arm's name as HTML; a long one breaks between its parts."""
    return re.sub(r"([+@_/])", r"\1<wbr>", escape(name))


def _image(name: str, pictures: Mapping[str, bytes]) -> str:
    if name not in pictures:
        return ""
    data = base64.b64encode(pictures[name]).decode()
    caption = escape(_CAPTIONS[name])
    return f'<img alt="{caption}" src="data:image/png;base64,{data}">\n{_note(caption)}'


def _header(results: Results, name: str) -> str:
    """What was compared, and on what."""
    summaries, run = results.summaries, results.run
    arms = f"{len(summaries)} arm{'' if len(summaries) == 1 else 's'}"
    questions = _span([summary.accuracy.n for summary in summaries], "question")
    videos = _span([summary.num_videos for summary in summaries], "video")
    facts = {
        "Benchmark": _inline(run.get("benchmark")),
        "Backbone": ", ".join(dict.fromkeys(arm.backbone for arm in results.arms.values())),
        "Hardware": _inline(run.get("hardware")),
        "Versions": _inline(run.get("versions")),
        "Commit": _inline(run.get("git_commit")),
    }
    rows = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>\n" for key, value in facts.items() if value)
    return f'<h1>{name}</h1>\n<p class="lead">{arms} compared on {questions} about {videos}.</p>\n<dl>\n{rows}</dl>\n'


def _inline(value: Any) -> str:
    """A value of run.json as one line of text."""
    if isinstance(value, Mapping):
        items = [(key, _inline(item)) for key, item in value.items() if item not in (None, "", {}, [])]
        return ", ".join(text if key == "name" else f"{key} {text}" for key, text in items)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_inline, value))
    return "" if value is None else str(value)


def _results_table(results: Results) -> str:
    columns, rows = _cells(results.summaries)
    cells = [[escape(cell) for cell in row] for row in rows]
    for row, summary in zip(cells, results.summaries, strict=True):
        row[0] = _arm(summary.arm)
        quartiles = "–".join(map(_significant, summary.seconds_quartiles))
        row[2] = row[2].replace(" (", " <small>(", 1) + "</small>"
        row[-1] = row[-1].replace(" (", " <small>(", 1) + f"; {quartiles}</small>"
    return _table(columns, cells)


def _cost_table(results: Results) -> str:
    """Where each arm's seconds and MACs go, stage by stage, and its peak memory."""
    unit, scale = _macs_unit(results.summaries)
    ran = [summary for summary in results.summaries if summary.seconds]
    if not ran:
        return ""
    stages = list(ran[0].seconds)
    rows = []
    for summary in ran:
        alone = [_significant(summary.seconds[stage]) for stage in stages]
        shared = [_significant(summary.seconds_amortised[stage]) for stage in stages]
        macs = [_significant(summary.macs[stage] / scale) for stage in stages if stage != "decode"]
        memory = ", ".join(f"{name} {_significant(size / 1e9)}" for name, size in summary.peak_memory.items())
        rows.append([_arm(summary.arm), *(f"{a} <small>({s})</small>" for a, s in zip(alone, shared)), *macs, memory])
    columns = [*(f"{s}, s" for s in stages), *(f"{s}, {unit}" for s in stages if s != "decode"), "peak memory, GB"]
    note = (
        "Means a question. Seconds alone on a fresh video, in brackets with shared work divided among those who shared "
        "it; decoding runs beside the model, its seconds are those of the decoding processes divided by their number. "
        "MACs as run: attention causally, with dropping early; vision towers in full."
    )
    return _table(["arm", *columns], rows) + _note(note)


def _results_note(results: Results) -> str:
    methods = {summary.accuracy.method for summary in results.summaries}
    how = {
        "bootstrap": "from a bootstrap over videos, because questions about one video are not independent",
        "wilson": "Wilson's, one question a video",
        "wilson over videos": "Wilson's with the number of videos as the count, because all videos scored alike",
    }
    intervals = "; ".join(text for method, text in how.items() if method in methods)
    few = " With so few videos, intervals are rough." if min(s.num_videos for s in results.summaries) < 20 else ""
    return (
        f"{_footnote(results.summaries)} Intervals are {intervals}.{few} Behind the seconds stand the quartiles of "
        "those alone. One MAC is one multiply-accumulate, two FLOPs."
    )


def _paired_table(results: Results) -> str:
    """Each arm against the first, on the questions both were asked."""
    if len(results.summaries) < 2:
        return ""
    first = results.summaries[0].arm
    columns = [
        "arm",
        "questions",
        "points (95\u00a0%)",
        "only this arm right",
        "only the first right",
        "p",
        "p\u00a0(Holm)",
    ]
    rows = [
        [
            _arm(difference.a),
            f"{difference.n:,}",
            f"{_signed(difference.difference)} "
            f"<small>({_signed(difference.low)} to {_signed(difference.high)})</small>",
            f"{difference.a_only:,}",
            f"{difference.b_only:,}",
            _p(difference.p),
            _p(adjusted),
        ]
        for difference, adjusted in zip(results.paired, results.holm, strict=True)
    ]
    text = (
        f"Accuracy minus that of {first}, in percentage points, on the questions both were asked. Intervals come from "
        "a bootstrap over videos; p is McNemar's exact test, which takes questions as independent: where videos have "
        "several, trust the interval. Holm's p is adjusted for the number of arms."
    )
    if results.unpaired:
        text += f" No question in common with {first}: {', '.join(results.unpaired)}."
    return (_table(columns, rows) if rows else "") + _note(text)


def _signed(share: float) -> str:
    """Percentage points with a sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def _p(value: float) -> str:
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def _category_table(results: Results) -> str:
    """A row an arm, a column a category; nothing where the benchmark has fewer than two categories."""
    names = sorted({name for summary in results.summaries for name in summary.categories})
    if len(names) < 2:
        return ""
    rows = [[_arm(s.arm), *(_category_cell(s, name) for name in names)] for s in results.summaries]
    note = _note("Accuracy in %, and right answers of questions asked. Small groups scatter: read with care.")
    return _table(["arm", *(name or "(none)" for name in names)], rows) + note


def _category_cell(summary: ArmSummary, name: str) -> str:
    share = summary.categories.get(name)
    return f"{100 * share.value:.1f} <small>({share.correct}/{share.n})</small>" if share else "–"


def _recall_table(results: Results) -> str:
    """How often each arm showed the evidence; nothing where no benchmark knows it."""
    known = [summary for summary in results.summaries if not math.isnan(summary.event_recall)]
    rows = [[_arm(s.arm), _number(s.num_frames), f"{100 * s.event_recall:.1f}"] for s in known]
    note = "Of the events that a question is about, the share of which at least one frame was shown (mean)."
    return _table(["arm", "frames", "events shown %"], rows) + _note(note) if rows else ""


def _frames(results: Results) -> str:
    """The frames of the picture above, as pictures on the video's time axis."""
    rows = plots.selection_example(results.records, results.arms)
    config = results.run.get("config", {})
    reader, given = config.get("sampling", {}).get("reader", "auto"), config.get("decoding", {})
    # As the run was written: an interpolation stays one, and means the default here.
    decoding = Decoding(**{name: value for name, value in given.items() if not isinstance(value, str)})
    return explanation([(row.label, row.record) for row in rows], reader, decoding)


def _error_table(results: Results) -> str:
    errors = Counter((str(r["arm"]), str(r["error"])) for r in results.records if r.get("error"))
    if not errors:
        return ""
    rows = [
        [escape(arm), f"{n:,}", f'<span class="text">{escape(error[:300])}</span>']
        for (arm, error), n in errors.most_common(20)
    ]
    return _table(["arm", "questions", "error"], rows)


def _rerun(results: Results) -> str:
    """The command, and the configuration it needs."""
    name = f"{results.run.get('name') or 'comparison'}.yaml"
    command = results.run.get("command") or f"xcomp compare {shlex.quote(name)}"
    commit = results.run.get("git_commit")
    where = f" (at commit {commit})" if commit else ""
    intro = f"<p>Save the configuration below as <code>{escape(name)}</code>, then run{escape(where)}:</p>\n"
    config = OmegaConf.to_yaml(OmegaConf.create(dict(results.run.get("config") or {})))
    details = f"<details><summary>Configuration</summary>\n<pre><code>{escape(config)}</code></pre></details>\n"
    return f"{intro}<pre><code>{escape(command)}</code></pre>\n{details}"

"""From finished runs to something to read: summary.json, tables, three pictures and one self-contained HTML page.

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
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf

from xcomp.compare import plots, tables
from xcomp.compare.analysis import Analysis, Options, analyse, read_runs
from xcomp.compare.explain import CSS, explanation
from xcomp.compare.tables import Grid, span
from xcomp.config import ConfigError, Decoding


def write_report(
    folders: Sequence[str | Path], out: str | Path | None = None, options: Options | None = None
) -> Analysis:
    """Writes the report of one run into its folder, or of several into ``out``; returns what it is made of.

    Raises ConfigError, in one line, if a folder holds no run, no records or damaged ones.
    """
    analysis = analyse(read_runs(folders), options)
    write_files(analysis, report_folder(folders, out))
    return analysis


def report_folder(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Where a report goes: into the folder of a single run, unless another is named."""
    if out is None and len(folders) > 1:
        raise ConfigError("a report of several runs needs a folder of its own: name one with --out")
    return Path(folders[0] if out is None else out)


def write_files(analysis: Analysis, folder: Path) -> Path:
    """All files of a report; returns the path of report.html."""
    summary = analysis.summary
    pictures = {name: plots.png(figure) for name, figure in _figures(analysis).items() if figure is not None}
    text = json.dumps(_without_nan(summary.to_dict()), indent=2, ensure_ascii=False)
    content = {
        **{f"{name}.png": pictures[name] for name in pictures},
        "summary.json": f"{text}\n".encode(),
        "table.csv": tables.comma_separated(summary).encode(),
        "table.md": tables.markdown(summary).encode(),
        "table.tex": tables.latex(summary).encode(),
        "report.html": _page(analysis, pictures).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("accuracy.png", "tokens_per_layer.png", "selected_frames.png", "results.json"):
        if name not in content:
            (folder / name).unlink(missing_ok=True)  # of an earlier report
    for name, data in content.items():
        _write(folder / name, data)
    return folder / "report.html"


def _figures(analysis: Analysis) -> dict[str, Figure | None]:
    summary, records = analysis.summary, analysis.records
    arms = plots.legends(summary.arms)
    return {
        "accuracy": plots.accuracy_plot(summary.arms, arms),
        "tokens_per_layer": plots.tokens_plot(records, arms),
        "selected_frames": plots.selection_plot(plots.selection_example(records, arms)),
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


def _page(analysis: Analysis, pictures: Mapping[str, bytes]) -> str:
    summary = analysis.summary
    name = escape(summary.name)
    notes = {"Results": _image("accuracy", pictures)}
    sections = [
        _header(analysis, name),
        *(_section(g.title, _grid(g) + notes.get(g.title, "")) for g in tables.grids(summary)),
        _section("Tokens through the layers", _image("tokens_per_layer", pictures)),
        _section("Frames shown", _image("selected_frames", pictures) + _frames(analysis)),
        _section("Questions that failed to run", _error_table(analysis)),
        _section("Run it again", _rerun(analysis)),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name} – xcomp comparison</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"{''.join(sections)}</body>\n</html>\n"
    )


def _grid(grid: Grid) -> str:
    rows = [[_arm(row[0]), *map(escape, row[1:])] for row in grid.rows]
    return (_table(grid.columns, rows) if rows else "") + "".join(map(_note, grid.notes))


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


def _header(analysis: Analysis, name: str) -> str:
    """What was compared, and on what."""
    summary = analysis.summary
    arms = f"{len(summary.arms)} arm{'' if len(summary.arms) == 1 else 's'}"
    questions = span([arm.num_questions for arm in summary.arms], "question")
    videos = span([arm.num_videos for arm in summary.arms], "video")
    rows = ""
    for run in summary.runs:
        backbones = dict.fromkeys(leg.backbone for leg in plots.legends(analysis.summary.arms).values())
        facts = {
            "Run": run.name if len(summary.runs) > 1 else "",
            "Benchmark": _inline(run.benchmark),
            "Backbone": ", ".join(backbones),
            "Hardware": _inline(run.hardware),
            "Versions": _inline(run.versions),
            "Commit": _inline(run.git_commit),
        }
        rows += "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>\n" for key, value in facts.items() if value)
    lead = f"{arms} compared on {questions} about {videos}. {summary.verdict}"
    return f'<h1>{name}</h1>\n<p class="lead">{escape(lead)}</p>\n<dl>\n{rows}</dl>\n'


def _inline(value: Any) -> str:
    """A value of run.json as one line of text."""
    if isinstance(value, Mapping):
        items = [(key, _inline(item)) for key, item in value.items() if item not in (None, "", {}, [])]
        return ", ".join(text if key == "name" else f"{key} {text}" for key, text in items)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_inline, value))
    return "" if value is None else str(value)


def _frames(analysis: Analysis) -> str:
    """The frames of the picture above, as pictures on the video's time axis."""
    rows = plots.selection_example(analysis.records, plots.legends(analysis.summary.arms))
    config = analysis.summary.runs[0].config
    reader, given = config.get("sampling", {}).get("reader", "auto"), config.get("decoding", {})
    # As the run was written: an interpolation stays one, and means the default here.
    decoding = Decoding(**{name: value for name, value in given.items() if not isinstance(value, str)})
    return explanation([(row.label, row.record) for row in rows], reader, decoding)


def _error_table(analysis: Analysis) -> str:
    errors = Counter((str(r["arm"]), str(r["error"])) for r in analysis.records if r.get("error"))
    if not errors:
        return ""
    rows = [
        [escape(arm), f"{n:,}", f'<span class="text">{escape(error[:300])}</span>']
        for (arm, error), n in errors.most_common(20)
    ]
    return _table(["arm", "questions", "error"], rows)


def _rerun(analysis: Analysis) -> str:
    """The command, and the configuration it needs."""
    text = ""
    for run in analysis.summary.runs:
        name = f"{run.name}.yaml"
        command = run.command or f"xcomp {run.kind} {shlex.quote(name)}"
        where = f" (at commit {run.git_commit})" if run.git_commit else ""
        text += f"<p>Save the configuration below as <code>{escape(name)}</code>, then run{escape(where)}:</p>\n"
        config = OmegaConf.to_yaml(OmegaConf.create(run.config))
        details = f"<details><summary>Configuration</summary>\n<pre><code>{escape(config)}</code></pre></details>\n"
        text += f"<pre><code>{escape(command)}</code></pre>\n{details}"
    return text

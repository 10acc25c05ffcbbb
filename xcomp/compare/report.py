"""From finished runs to something to read: summary.json, tables, three pictures and one self-contained HTML page.

``write_report`` reads what the runner left in a run's directory (``run.json``, ``records.jsonl``) and can be called
again at any time; every file is written whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from xcomp.compare import plots, tables
from xcomp.compare.analysis import Analysis, Options, analyse, read_runs
from xcomp.compare.page import render_page
from xcomp.config import ConfigError


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
        "report.html": render_page(summary, analysis.records).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("accuracy.png", "cost.png", "tokens_per_layer.png", "selected_frames.png", "results.json"):
        if name not in content:
            (folder / name).unlink(missing_ok=True)  # of an earlier report
    for name, data in content.items():
        _write(folder / name, data)
    return folder / "report.html"


def _figures(analysis: Analysis) -> dict[str, Figure | None]:
    summary = analysis.summary
    return {
        "accuracy": plots.accuracy_plot(summary),
        "cost": plots.cost_plot(summary),
        "tokens_per_layer": plots.tokens_plot(summary),
        "selected_frames": plots.selection_plot(plots.selection_example(analysis.records, summary)),
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

"""What there is to choose from, as a table: compressors by what their classes and their ``about`` tell.

``xcomp plugins compressors`` prints it, and docs/compressors.md holds it as Markdown.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from xcomp.compressor import About, Compressor
from xcomp.describe import wrapped
from xcomp.registry import Plugin, PluginError, load, plugins

COLUMNS = ("name", "acts", "needs", "question", "tuned", "held", "source", "deviations")
LAYERS, TOKENS = 28, 64  # what ``held`` is told for


def compressor_rows(folders: Iterable[str | Path] = ()) -> list[dict[str, str]]:
    """One row a compressor, by ``COLUMNS``; a broken plugin's says what is wrong with it.

    ``needs``: what beside tokens the vision path must give. ``question``: whether what stays depends on it, so that a
    video is run anew for each. ``tuned``: whether the published method tunes the model. ``held``: share of the tokens
    that default options hold, mean over 28 layers, where they alone decide it.
    """
    return [_row(plugin) for plugin in plugins("compressor", folders).values()]


def _row(plugin: Plugin) -> dict[str, str]:
    row = dict.fromkeys(COLUMNS, "") | {"name": plugin.name}
    try:
        found = load(plugin)
    except PluginError as error:
        return row | {"deviations": f"broken: {str(error).removeprefix(f'{plugin.who} ')}"}
    about = vars(found).get("about")  # its own: a class derived from a published method is another
    try:
        row |= _of_options(found(found.Config()))
    except (TypeError, ValueError):  # options without a default
        row["needs"] = ", ".join(found.needs)
    if not isinstance(about, About):
        return row
    row |= {"acts": about.acts, "tuned": "yes" if about.trained else "no", "source": about.source}
    row["deviations"] = about.deviates
    return row if about.keeps is None else row | {"held": f"{about.keeps:.2f}"}


def _of_options(made: Compressor) -> dict[str, str]:
    """What follows from an instance with default options."""
    row = {"needs": ", ".join(made.needs)}
    plan = None if made.uses_question else made.plan(LAYERS, TOKENS)
    row["question"] = "yes" if plan is None else "no"
    if plan is not None and len(plan[-1]) < TOKENS:
        row["held"] = f"{sum(map(len, plan)) / (LAYERS * TOKENS):.2f}"
    return row


def markdown(rows: Iterable[dict[str, str]]) -> str:
    """The table, a line a row."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [[f"`{row['name']}`", *(row[column] for column in COLUMNS[1:])] for row in rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def plain(rows: Iterable[dict[str, str]], width: int | None = None) -> str:
    """The table for a terminal: columns, and source and deviations of each below its line.

    Where the columns do not fit into ``width`` characters, all but the first stand below it too.
    """
    rows = [{column: column for column in COLUMNS}, *rows]
    first = COLUMNS[:-2]
    widths = {column: max(len(row[column]) for row in rows) for column in first}
    fits = width is None or sum(widths.values()) + 2 * (len(first) - 1) <= width
    lines = []
    for number, row in enumerate(rows):
        if fits:
            lines.append("  ".join(row[column].ljust(widths[column]) for column in first).rstrip())
        elif number:
            told = "; ".join(f"{column}: {row[column]}" for column in first[1:] if row[column])
            lines += [row["name"], *wrapped(told, width, "    ")]
        for text in (row[column] for column in COLUMNS[-2:] if row[column] and number):
            lines += [f"    {text}"] if width is None else wrapped(text, width, "    ")
    return "\n".join(lines)

"""Rows of a file that somebody wrote: JSON lines, a JSON list, CSV or parquet. All that is wrong is told in one go."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SHOWN = 10  # problems that a message tells


@dataclass(frozen=True)
class Row:
    """Named values; ``place`` is the line of the file ("line 3"), or where it has none the record ("record 3")."""

    number: int
    place: str
    values: dict[str, Any]


@dataclass
class Problems:
    """What is wrong with a file, by place; equal ones are told once."""

    path: Path
    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, place: str, problem: object) -> None:
        self.found.setdefault(" ".join(str(problem).split()), []).append(place)

    def check(self) -> None:
        """ValueError, one line with the first ten problems and how many more there are, unless there are none."""
        if not self.found:
            return
        places = {place for those in self.found.values() for place in those}
        told = []
        ordered = sorted(self.found.items(), key=lambda item: int(item[1][0].split()[-1]))
        for problem, those in ordered[:SHOWN]:
            others = f" and {len(those) - 1} more" if len(those) > 1 else ""
            told.append(f"{those[0]}{others}: {problem}")
        more = f"; … and {len(self.found) - SHOWN} more problems" if len(self.found) > SHOWN else ""
        noun = f"{len(places)} bad {next(iter(places)).split()[0]}{'s' if len(places) > 1 else ''}"
        raise ValueError(f"'{self.path}' has {noun}: {'; '.join(told)}{more}")


def read_rows(path: Path, problems: Problems, *, keep_empty: bool = False) -> list[Row]:
    """The rows of a file, by its suffix; those that are none go to ``problems``.

    What is empty or null is left out, unless ``keep_empty``.

    Text is UTF-8 and may begin with a byte order mark. In CSV, whose first line names the columns, every value is text.

    Raises:
        ValueError: if the file cannot be read at all, naming it.
    """
    readers: dict[str, Callable[[Path, Problems], Iterator[Row]]]
    readers = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ValueError(f"'{path}' is of an unknown kind; known: {', '.join(SUFFIXES)}")
    try:
        rows = list(readers[path.suffix.lower()](path, problems))
        rows = rows if keep_empty else [replace(row, values=_given(row.values)) for row in rows]
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if not rows and not problems.found:
        raise ValueError(f"'{path}' is empty")
    return rows


def from_json(text: str, *, strict: bool = True) -> Any:
    """The value of a text of JSON; ValueError if it is none, however deep it nests.

    ``strict`` refuses what Python reads without a word: a key that stands twice, NaN and infinity.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant) if strict else json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def json_lines(text: str, *, strict: bool = True) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of each line that is not blank; a line that is no JSON has its ValueError as value."""
    # Not splitlines: it also breaks at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, from_json(line, strict=strict)
            except ValueError as error:
                yield number, error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"'{next(key for key in keys if keys.count(key) > 1)}' stands twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value != ""}


def _json_lines(path: Path, problems: Problems) -> Iterator[Row]:
    for number, values in json_lines(_text(path)):
        if isinstance(values, dict):
            yield Row(number, f"line {number}", values)
        elif isinstance(values, ValueError):
            problems.add(f"line {number}", f"not JSON ({values})")
        else:
            problems.add(f"line {number}", f"not an object of fields but {values!r:.40}")


def _json_list(path: Path, problems: Problems) -> Iterator[Row]:
    try:
        records = from_json(_text(path))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON ({error})") from error
    if not isinstance(records, list):
        raise ValueError(f"'{path}' must hold a list of objects; of one object a line, the file's name ends in .jsonl")
    for number, values in enumerate(records, start=1):
        if isinstance(values, dict):
            yield Row(number, f"record {number}", values)
        else:
            problems.add(f"record {number}", f"not an object of fields but {values!r:.40}")


def _csv(path: Path, problems: Problems) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    names: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(f"line {first}", f"not CSV ({error})")
            return
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            if len(set(names)) < len(names):
                double = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"'{path}': the column '{double}' stands twice")
        elif len(cells) > len(names):
            problems.add(f"line {first}", f"{len(cells)} cells for {len(names)} columns; commas within one need quotes")
        else:
            yield Row(first, f"line {first}", dict(zip(names, cells)))


def _parquet(path: Path, problems: Problems) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"'{path}' is not parquet ({' '.join(str(error).split())})") from error
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(number, f"record {number}", values)

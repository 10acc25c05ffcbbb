"""Where a run's records come from: files of records, mixtures of them, benchmarks. All is read before a model is.

A mixture is a YAML file as VideoChat-Flash and XComp have it: ``datasets``, a list of ``{json_path, sampling_strategy,
data_root, video_read_type, media_type}``.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from xcomp.config import ConfigError, Sampling, build_component, merged_sampling
from xcomp.data.media import spellings
from xcomp.data.records import KINDS, READ_TYPES, Conversation, parse_record
from xcomp.messages import nearest
from xcomp.tables import from_json, json_lines

# Of a source: what says where its records are, what holds for each kind of it, and what holds for all.
_PLACES = ("records", "mixture", "benchmark")
_COMMON = ("frames", "sampling", "repeat", "seconds", "kinds")
_FILES = ("root", "roots", "rule", "seed", "share", "allow_missing")
_DATASET = ("sampling_strategy", "video_read_type", "media_type")
_SOURCE_KEYS = {
    "records": ("records", *_COMMON, *_FILES, *_DATASET),
    "mixture": ("mixture", "only", "without", *_COMMON, *_FILES),
    "benchmark": ("benchmark", "tasks", *_COMMON, "root"),
}
_OWN = ("frames", "sampling", "repeat", "seconds")
_MIXTURE_KEYS = ("json_path", "data_root", *_DATASET, *_OWN)
_MEDIA_TYPES = ("image", "video", "text", "mix")
RULES = ("videochat_flash", "xcomp")
FIRST_MEDIA = 3  # one of a data set's first media files must be there
SLICES = 6  # first, first2, … first6
SHUFFLE_SEED = 12345  # of the released subset rule


@dataclass(frozen=True)
class Refused:
    """A record that is not trained on: which one, what it is about, and why."""

    where: str
    reason: str
    media: str | None = None


@dataclass
class Records:
    """What a list of sources holds: conversations, the records among them that are refused, and what to tell of it."""

    conversations: list[Conversation] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # data sets, one line each
    empty: list[str] = field(default_factory=list)
    told: dict[str, list[int]] = field(default_factory=dict)  # what → of how many records, in how many data sets

    @property
    def notes(self) -> list[str]:
        """What is not taken, or not read, of the records: one line each."""
        return [f"{what}: {records} records in {sets} data sets" for what, (records, sets) in self.told.items()]

    @property
    def digest(self) -> str:
        """Of all that a run's steps follow from; which file a record stands in is not among it."""
        found = hashlib.sha256()
        for conversation in self.conversations:
            found.update(repr(replace(conversation, where="")).encode())
        return found.hexdigest()[:16]

    @property
    def kinds(self) -> Counter[str]:
        return Counter(conversation.kind for conversation in self.conversations)


class MissingData(ConfigError):
    """Data sets that are not there; ``lines`` says of each where it was looked for."""

    def __init__(self, message: str, lines: Sequence[str]):
        super().__init__(message)
        self.lines = list(lines)


@dataclass(frozen=True)
class DataSet:
    """One file of records with what holds for it; ``name`` is what messages call it."""

    name: str
    path: str
    root: str = ""
    strategy: str = "all"
    media_type: str | None = None
    read_type: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # those of _OWN that it has


def read_records(
    sources: Sequence[Any],
    plugins: Sequence[str] = (),
    where: str = "tune.data",
    *,
    sampling: Sampling | None = None,
    max_skipped: float = 0.0,
) -> Records:
    """All records of a list of sources, checked; errors call the list ``where``.

    A source is ``{records: FILE.json|.jsonl, root: DIR}``, ``{mixture: FILE.yaml, root: DIR}`` or ``{benchmark: …,
    tasks: […]}``. ``frames: [8, 16]`` are the frame counts its videos are shown with (default: the run's),
    ``sampling`` what differs from the run's, ``repeat: n`` takes it n times an epoch, ``seconds`` is about how long its
    videos are, where records do not tell, ``kinds`` are those of its records that are taken, ``only`` and
    ``without`` which data sets of a mixture are. The options of files are described in docs/tuning.md.

    Raises:
        MissingData: if data sets are not there, and ``allow_missing`` does not let their source go on without.
        ConfigError: if a source, a file or more than the share ``max_skipped`` of the records is no good, or nothing
            is left.
    """
    found, refuse = Records(), []
    for number, source in enumerate(sources):
        name = f"{where}[{number}]"
        _check_source(source, name)
        before = len(found.missing)
        for data_set in list(_data_sets(source, name)):  # all are checked before the first is read
            _read_data_set(data_set, source, name, plugins, sampling, found)
        if not source.get("allow_missing", False):
            refuse += found.missing[before:]
    if refuse:
        ways_out = "'root' and 'roots' say where data lie, 'allow_missing: true' goes on without"
        if len(refuse) == 1:
            raise MissingData(f"{refuse[0]}; {ways_out}", ())
        raise MissingData(f"{len(refuse)} data sets of {where} are missing, as listed; {ways_out}", refuse)
    if not found.conversations and not found.refused:
        nothing = [*found.missing, *found.empty]
        raise MissingData(f"there are no records; '{where}' lists where they come from", nothing)
    total = len(found.conversations) + len(found.refused)
    if len(found.refused) > max_skipped * total:
        first, others = found.refused[0], len(found.refused) - 1
        more = f" ({others} more of {total} records are refused; tune.max_skipped is {max_skipped:g})" if others else ""
        raise ConfigError(f"{first.reason}{more}")
    return found


# --- sources ----------------------------------------------------------------------------------------------------------


def _check_source(source: Any, where: str) -> None:
    places = [key for key in _PLACES if isinstance(source, Mapping) and key in source]
    if len(places) != 1:
        raise ConfigError(
            f"{where} must be a mapping with either 'records' (a file), 'mixture' (a YAML file) or 'benchmark'"
        )
    _check_known(source, _SOURCE_KEYS[places[0]], where)
    for key in ("records", "mixture", "root", "rule"):
        if not isinstance(source.get(key) or "", str):
            raise ConfigError(f"{where}: {key} is {source[key]!r}; it must be {'a file' if key in _PLACES else 'text'}")
    if not isinstance(source.get("tasks", []), list):
        raise ConfigError(f"{where}: tasks is {source['tasks']!r}; it must be a list")
    _check_options(source, where)
    _check_choice(source, "rule", RULES, where)
    if not isinstance(source.get("allow_missing", False), bool) and source["allow_missing"] not in (0, 1):
        raise ConfigError(f"{where}: allow_missing is {source['allow_missing']!r}; it must be true or false")
    roots = source.get("roots") or {}
    if not isinstance(roots, Mapping) or not all(isinstance(text, str) for pair in roots.items() for text in pair):
        raise ConfigError(f"{where}: roots is {roots!r}; it must map beginnings of paths to folders")
    for key in ("only", "without"):
        names = source.get(key, ["*"])
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{where}: {key} is {names!r}; it must be a list of names, * standing for any text")
    kinds = source.get("kinds") or []
    if not isinstance(kinds, list) or not all(kind in KINDS for kind in kinds):
        raise ConfigError(f"{where}: kinds is {kinds!r}; it must be a list of {', '.join(KINDS)}")
    share = source.get("share", [0, 1])
    if not _is_share(share):
        raise ConfigError(f"{where}: share is {share!r}; it must be two numbers, 0 <= from < to <= 1")
    if source.get("rule") != "xcomp" and "share" in source:
        raise ConfigError(f"{where}: share is part of the rule 'xcomp'; add rule: xcomp, or take share out")
    if not _is_whole(source.get("seed", 0), 0):
        raise ConfigError(f"{where}: seed is {source['seed']!r}; it must be a whole number of at least 0")


def _check_known(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{where} has no key '{key}';{nearest(str(key), known)} keys: {', '.join(known)}")


def _check_options(given: Mapping[str, Any], where: str) -> None:
    """What a source and an entry of a mixture have in common."""
    repeat, frames = given.get("repeat", 1), given.get("frames") or []
    if not _is_whole(repeat, 1):
        raise ConfigError(f"{where}: repeat is {repeat!r}; it must be a whole number of at least 1")
    if not isinstance(frames, list) or not all(_is_whole(n, 1) for n in frames):
        raise ConfigError(f"{where}: frames is {frames!r}; it must be a list of whole numbers of at least 1")
    seconds = given.get("seconds", 1)
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds < math.inf:
        raise ConfigError(f"{where}: seconds is {seconds!r}; it must be a number above 0, how long its videos are")
    _check_choice(given, "media_type", _MEDIA_TYPES, where)
    _check_choice(given, "video_read_type", READ_TYPES, where)
    amount(str(given.get("sampling_strategy", "all")), 100, where)  # what it says of 100 records, of any


def _check_choice(given: Mapping[str, Any], key: str, known: Sequence[str], where: str) -> None:
    value = given.get(key)
    if value is not None and value not in known:
        raise ConfigError(f"{where}: {key} is {value!r};{nearest(str(value), known)} known: {', '.join(known)}")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_share(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(isinstance(x, (int, float)) for x in value)
    return numbers and 0 <= value[0] < value[1] <= 1


def _data_sets(source: Mapping[str, Any], where: str) -> Iterator[DataSet]:
    if "mixture" in source:
        yield from _of_mixture(source, where)
    elif "benchmark" in source:
        yield DataSet(where, "", str(source.get("root") or ""))
    else:
        path, root = (_moved(str(source.get(key) or ""), source) for key in ("records", "root"))
        strategy = str(source.get("sampling_strategy", "all"))
        yield DataSet(where, path, root, strategy, source.get("media_type"), source.get("video_read_type"))


def _of_mixture(source: Mapping[str, Any], where: str) -> Iterator[DataSet]:
    file = Path(source["mixture"])
    content = _read_yaml(file)
    if not isinstance(content, Mapping) or not isinstance(content.get("datasets"), list):
        raise ConfigError(f"mixture '{file}' must be a mapping with 'datasets', a list")
    _check_known(content, ("datasets",), f"mixture '{file}'")
    unmatched = {*source.get("only", ()), *source.get("without", ())}
    for number, entry in enumerate(content["datasets"], 1):
        name = f"mixture '{file}', data set {number}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("json_path"), str) or not entry["json_path"]:
            raise ConfigError(f"{name} must be a mapping with 'json_path', a file of records, not {entry!r:.200}")
        name += f" ({Path(entry['json_path']).name})"
        _check_known(entry, _MIXTURE_KEYS, name)
        _check_options(entry, name)
        if not isinstance(entry.get("data_root") or "", str):
            raise ConfigError(f"{name}: data_root is {entry['data_root']!r}; it must be a folder")
        path, root = (_within(source, str(entry.get(key) or "")) for key in ("json_path", "data_root"))
        strategy = str(entry.get("sampling_strategy", "all"))
        own = {key: entry[key] for key in _OWN if key in entry}
        only, without = (_matching(entry["json_path"], source.get(key, ())) for key in ("only", "without"))
        unmatched -= {*only, *without}
        if not without and (only or "only" not in source):
            yield DataSet(name, path, root, strategy, entry.get("media_type"), entry.get("video_read_type"), own)
    if unmatched:
        raise ConfigError(f"{where}: no json_path of mixture '{file}' is like '{min(unmatched)}'")


def _matching(path: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if fnmatchcase(path, name)]


def _within(source: Mapping[str, Any], path: str) -> str:
    """A mixture's path, under the source's ``root`` unless it is absolute or an address."""
    moved = _moved(path, source)
    root = _moved(str(source.get("root") or ""), source)
    return moved if _is_address(moved) or moved != path else os.path.join(root, moved)


def _moved(path: str, source: Mapping[str, Any]) -> str:
    """The path with the longest of its beginnings that ``roots`` names replaced."""
    roots = source.get("roots") or {}
    for start in sorted(roots, key=len, reverse=True):
        rest = path.removeprefix(start.rstrip("/"))
        if rest != path and (not rest or rest.startswith("/")):
            return os.path.join(roots[start], rest.lstrip("/"))
    return path


def _is_address(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


class _OnceLoader(yaml.SafeLoader):
    """YAML in which a key may stand twice only with one value; the released mixtures have such."""


def _mapping(loader: _OnceLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key, value = loader.construct_object(key_node, deep=True), loader.construct_object(value_node, deep=True)
        if found.get(key, value) != value:
            line = key_node.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: '{key}' stands twice, with {found[key]!r} and {value!r}")
        found[key] = value
    return found


_OnceLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read_yaml(file: Path) -> Any:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _OnceLoader)
    except OSError as error:
        raise ConfigError(f"mixture '{file}' cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"mixture '{file}' is not YAML: {' '.join(str(error).split())}") from error


# --- one data set -----------------------------------------------------------------------------------------------------


def _read_data_set(
    data_set: DataSet,
    source: Mapping[str, Any],
    where: str,
    plugins: Sequence[str],
    sampling: Sampling | None,
    found: Records,
) -> None:
    """Adds a data set's records to those that were found."""
    if "benchmark" in source:
        rows = [(f"{where}, record {i}", record) for i, record in enumerate(_of_benchmark(source, plugins))]
    else:
        if _is_address(data_set.path) or not os.path.isfile(data_set.path):
            found.missing.append(f"{data_set.name}: '{data_set.path}' {_absence(data_set.path)}")
            return
        rows = select(list(_read_file(Path(data_set.path))), data_set, source)
        if not rows:
            found.empty.append(f"{data_set.name}: '{data_set.path}' has no records ({data_set.strategy})")
            return
    kinds, notes = source.get("kinds") or KINDS, Counter()
    taken, refused, left_out = [], [], 0
    for place, record in rows:
        if source.get("rule") == "xcomp" and not _has_one_medium(record):
            left_out += 1
            continue
        try:
            if isinstance(record, ValueError):
                raise ConfigError(f"{place} is not JSON: {record}")
            taken.append(
                parse_record(
                    record,
                    data_set.root,
                    place,
                    media_type=data_set.media_type,
                    read_type=data_set.read_type,
                    notes=notes,
                )
            )
        except ConfigError as error:
            refused.append(Refused(place, str(error)))
    wanted = [conversation for conversation in taken if conversation.kind in kinds]
    joined = "" if data_set.media_type in ("text", "mix") else data_set.root
    if (lacking := _lacking_media(wanted, joined)) and "benchmark" not in source:
        found.missing.append(f"{data_set.name}: {lacking}")
        return
    options = {**source, **data_set.options}
    frames, given = tuple(options.get("frames") or ()), options.get("sampling")
    own = None if given is None else merged_sampling(sampling or Sampling(), given, f"{data_set.name}: sampling")
    seconds = options.get("seconds")
    wanted = [replace(c, frames=frames, sampling=own, duration=c.duration or seconds) for c in wanted]
    found.conversations += wanted * options.get("repeat", 1)
    found.refused += refused
    if "benchmark" in source:  # whose records have keys of their own
        notes.clear()
    notes["left out by the rule 'xcomp' (text alone, several pictures, or a picture and a video)"] = left_out
    notes["left out as of other kinds"] = len(taken) - len(wanted)
    for what, count in notes.items():
        if count:
            records, sets = found.told.get(what, (0, 0))
            found.told[what] = [records + count, sets + 1]


def _absence(path: str) -> str:
    if _is_address(path):
        return "is an address; fetch what is there, and say with 'roots' where it lies"
    return "is a folder" if os.path.isdir(path) else "does not exist"


def _has_one_medium(record: Any) -> bool:
    """The released filter: a picture or a video, not both, by a path and not a list."""
    given = [record.get(key) for key in ("image", "video")] if isinstance(record, Mapping) else []
    given = [path for path in given if path is not None]
    return not isinstance(record, Mapping) or (len(given) == 1 and not isinstance(given[0], list))


def _lacking_media(conversations: Sequence[Conversation], root: str) -> str | None:
    """Where the first media were looked for, if none of them is there."""
    first = [c.media[0] for c in conversations if c.media and c.read_type != "fake"][:FIRST_MEDIA]
    if first and _is_address(root):
        return f"its media are under the address '{root}'; fetch them, and say with 'roots' where they lie"
    if not first or any(os.path.exists(there) for path in first for there in spellings(path)):
        return None
    return f"none of its first {len(first)} media is there: '{first[0]}' does not exist"


def _of_benchmark(source: Mapping[str, Any], plugins: Sequence[str]) -> list[dict[str, Any]]:
    benchmark = build_component("benchmark", source["benchmark"], plugins)
    if not hasattr(benchmark, "training_records"):
        raise ConfigError(f"benchmark {source['benchmark']} has no training records")
    return benchmark.training_records(**({"tasks": tuple(source["tasks"])} if "tasks" in source else {}))


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """(which record, its content) of a file; a line that is no JSON has its error for content."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"records file '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"records file '{path}' is no text in UTF-8: {error}") from error
    if path.suffix == ".jsonl":
        yield from ((f"records file '{path}', line {n}", value) for n, value in json_lines(text, strict=False))
        return
    try:
        records = from_json(text, strict=False)
    except ValueError as error:
        raise ConfigError(f"records file '{path}' is not JSON: {error}") from error
    if not isinstance(records, list):
        raise ConfigError(f"records file '{path}' must hold a list of records, not a {type(records).__name__}")
    yield from ((f"records file '{path}', record {number}", record) for number, record in enumerate(records))


# --- which of its records ---------------------------------------------------------------------------------------------


def select(rows: list[Any], data_set: DataSet, source: Mapping[str, Any]) -> list[Any]:
    """The records that a data set's sampling strategy takes, in order.

    Under the rule ``xcomp`` they are shuffled before that and after, and of the result the ``share`` is kept: the
    paper's 2.5 % are a tenth of the base's amounts, and of these the first quarter. Shuffles are Python's own, with
    the seeds of the released code, begun anew for each data set.
    """
    seed = source.get("seed", 42)
    if source.get("rule") == "xcomp":
        rows = _shuffled(rows, SHUFFLE_SEED)
    name, number = amount(data_set.strategy, len(rows), data_set.name)
    if name == "random":
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), min(number, len(rows))))]
    elif name == "end":
        rows = rows[len(rows) - min(number, len(rows)) :]
    elif name != "all":
        start = (int(name.removeprefix("first") or 1) - 1) * number
        rows = rows[start : start + number]
    if source.get("rule") != "xcomp":
        return rows
    rows = _shuffled(rows, seed)
    first, last = source.get("share", [0, 0.25])
    return rows[int(len(rows) * first) : int(len(rows) * last)]


def _shuffled(rows: list[Any], seed: int) -> list[Any]:
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    return rows


def amount(strategy: str, total: int, where: str) -> tuple[str, int]:
    """A sampling strategy (``first2:10%``) as its name and how many of ``total`` records it means, rounded up."""
    if strategy == "all":
        return strategy, total
    found = re.fullmatch(r"(first[2-9]?|end|random):(\d+|\d+(?:\.\d+)?%)", strategy)
    if not found or int(found[1].removeprefix("first") or 1 if found[1].startswith("first") else 1) > SLICES:
        raise ConfigError(
            f"{where}: sampling_strategy is '{strategy}'; it must be all, or first, first2 … first{SLICES}, end or "
            "random with an amount: first:100, end:2.5%"
        )
    name, given = found.groups()
    if not given.endswith("%"):
        return name, int(given)
    if (percentage := Fraction(given[:-1])) > 100:
        raise ConfigError(f"{where}: sampling_strategy is '{strategy}'; at most 100%")
    return name, math.ceil(percentage * total / 100)

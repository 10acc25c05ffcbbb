"""From the records of one or several runs to a :class:`Summary`: everything that reports are rendered from.

``summary.json`` holds a ``Summary`` as JSON (None: not known). Tables, plots and the page read it, and for single
questions the records; they compute nothing of their own.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from xcomp.compare.records import event_recall, read_run_records
from xcomp.compare.statistics import (
    Accuracy,
    Paired,
    accuracy,
    equal_within,
    holm,
    paired,
    pareto_front,
    seeds_accuracy,
)
from xcomp.config import BUDGETS, ConfigError, check_equal
from xcomp.messages import nearest
from xcomp.registry import PluginError, load_class
from xcomp.run import SCHEMA
from xcomp.shipped import is_toy

Record = Mapping[str, Any]
SUMMARY_SCHEMA = 3
ALPHA = 0.05  # of Holm's p: two arms below it can be told apart
TOLERANCE = 0.05  # budgets are equal that differ by no more than this
# What each number of an arm is counted in, and which way is better.
METRICS = {
    "accuracy": {"unit": "mean score of the questions; those that failed to run count 0", "direction": "higher"},
    "accuracy_asked": {"unit": "mean score of the questions that could be asked", "direction": "higher"},
    "frames": {"unit": "frames shown to the model, mean a question", "direction": "lower"},
    "tokens_given": {"unit": "visual tokens of the vision path, mean a question", "direction": "lower"},
    "tokens_in": {"unit": "visual tokens entering the language model, mean a question", "direction": "lower"},
    "tokens_out": {"unit": "visual tokens in the last layer, mean a question", "direction": "lower"},
    "kv_tokens": {"unit": "visual tokens in the key-value cache, mean over layers and questions", "direction": "lower"},
    "macs": {"unit": "multiply-accumulates, mean a question, alone on a fresh video, by stage", "direction": "lower"},
    "seconds": {"unit": "seconds, mean a question, alone on a fresh video, by stage", "direction": "lower"},
    "seconds_amortised": {"unit": "seconds, mean a question, shared work divided, by stage", "direction": "lower"},
    "harness": {"unit": "seconds, mean a question, that are no stage's", "direction": "lower"},
    "harness_share": {"unit": "of the seconds of the model's process, but for waiting", "direction": "lower"},
    "peak_memory": {"unit": "bytes, the largest seen", "direction": "lower"},
    "event_recall": {"unit": "share of a question's events of which a frame was shown, mean", "direction": "higher"},
}


@dataclass(frozen=True)
class RunFacts:
    """A run as its run.json describes it. ``missing`` videos were not there, ``defects`` counts unusable questions."""

    name: str
    folder: str
    kind: str
    command: str | None
    benchmark: dict[str, Any]
    num_questions: int | None
    missing: list[str]
    defects: dict[str, int]
    versions: dict[str, str]
    hardware: dict[str, Any]
    git_commit: str | None
    config: dict[str, Any]


@dataclass(frozen=True)
class ArmSummary:
    """One arm's results. Costs are means over the questions that ran without an error; None if there are none.

    ``name`` is the arm's in this summary, ``name_in_run`` in its records. ``group`` is the name that arms share which
    differ in frames or seed. ``errors`` counts questions that failed to run and ``unanswered`` choices whose text
    named no option; both score 0 in ``accuracy``. ``accuracy_asked`` leaves out those that failed.

    ``tokens_given`` leave the vision path, ``tokens_in`` enter the language model, ``tokens_out`` are left in its last
    layer; ``tokens_per_layer`` are the mean of each layer and ``kv_tokens`` the mean over layers. ``macs`` and
    ``seconds`` are by stage, as a question would take them alone on a fresh video; ``seconds_amortised`` divides what
    was shared by those who shared it. ``seconds_waiting`` the model stood still for decoding; ``harness`` is time
    between the stages, ``harness_share`` its share of the model's process but for waiting. All are means; ``total_…``
    are sums over stages. ``peak_memory`` is the largest seen, in bytes.

    ``labels`` are accuracies by axis and label, ``official`` the benchmark's own metrics in per cent (None where there
    are none), ``hard`` the accuracy on the hard part of the questions, ``published`` what the configuration quotes.
    ``equal`` names for each kind of budget the arms that have the same within 5 %.
    """

    name: str
    name_in_run: str
    run: str
    group: str
    seed: int | None
    description: dict[str, Any]
    accuracy: Accuracy
    accuracy_asked: Accuracy | None
    num_questions: int
    num_videos: int
    errors: int
    unanswered: int
    frames: float | None
    tokens_given: float | None
    tokens_in: float | None
    tokens_out: float | None
    kv_tokens: float | None
    tokens_per_layer: list[float]
    macs: dict[str, float]
    total_macs: float | None
    seconds: dict[str, float]
    total_seconds: float | None
    seconds_amortised: dict[str, float]
    total_seconds_amortised: float | None
    seconds_waiting: float | None
    harness: float | None
    harness_share: float | None
    peak_memory: dict[str, int]
    event_recall: float | None
    labels: dict[str, dict[str, Accuracy]]
    official: dict[str, float] | None
    published: dict[str, Any]
    hard: Accuracy | None = None
    equal: dict[str, list[str]] = field(default_factory=dict)

    def budget(self, kind: str) -> float | None:
        """What the arm spends of ``frames``, ``tokens_in``, ``kv_tokens`` or ``macs``."""
        return self.total_macs if kind == "macs" else getattr(self, kind)


@dataclass(frozen=True)
class Difference(Paired):
    """Arm (or group of seeds) ``a`` minus ``b`` on the same questions; fields as in ``Paired``.

    ``p_holm`` and ``mcnemar_holm`` are adjusted for all differences of their table; ``told_apart``: ``p_holm`` is below
    0.05. ``macs_ratio`` is what ``a`` takes of ``b``'s MACs; ``equal`` the budgets in which the two are equal;
    ``num_seeds`` how many seeds were paired (0: seeds do not agree, or there is one each).
    """

    a: str = ""
    b: str = ""
    p_holm: float = 1.0
    mcnemar_holm: float | None = None
    told_apart: bool = False
    macs_ratio: float | None = None
    equal: tuple[str, ...] = ()
    num_seeds: int = 0


def _difference(a: str, b: str, found: Paired, **more: Any) -> Difference:
    return Difference(**vars(found), a=a, b=b, **more)


@dataclass(frozen=True)
class Refusal:
    """Two arms that cannot be compared in pairs, and why."""

    a: str
    b: str
    reason: str


@dataclass(frozen=True)
class SeedGroup:
    """Arms that differ in the seed alone, as one: mean over seeds, interval over seeds and videos."""

    name: str
    seeds: list[int]
    arms: list[str]
    accuracy: Accuracy
    deviation: float  # of the accuracies from seed to seed


@dataclass(frozen=True)
class EqualBudget:
    """Arms that spend the same within 5 %; ``value`` is their mean."""

    kind: str
    value: float
    arms: list[str]


@dataclass(frozen=True)
class Front:
    """Arms that no other beats in accuracy at no more of a cost; ``run``: the one whose seconds these are."""

    cost: str
    run: str | None
    arms: list[str]


@dataclass(frozen=True)
class Hard:
    """The questions that plain down-sampling gets wrong: by which arm, how many."""

    arm: str
    n: int
    found: str  # "named" or "by its description"


@dataclass(frozen=True)
class Summary:
    """Everything that a report shows but single questions.

    ``differences`` are each arm minus ``reference`` (``pairs``: "reference") or all pairs ("all"); ``refused`` says
    which cannot be compared. ``seconds_comparable``: all runs had the same hardware; else each run's stand alone.
    ``cautions`` (missing videos, defective questions) belong under every table, ``remarks`` under the first.
    """

    name: str
    runs: list[RunFacts]
    reference: str
    pairs: str
    equal_budget: str | None
    arms: list[ArmSummary]
    differences: list[Difference]
    refused: list[Refusal]
    groups: list[SeedGroup]
    group_differences: list[Difference]
    equal: list[EqualBudget]
    pareto: list[Front]
    hard: Hard | None
    axes: list[str]
    seconds_comparable: bool
    verdict: str
    cautions: list[str]
    remarks: list[str]
    metrics: dict[str, dict[str, str]] = field(default_factory=lambda: METRICS)
    schema: int = SUMMARY_SCHEMA

    def arm(self, name: str) -> ArmSummary:
        return next(arm for arm in self.arms if arm.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {"schema": self.schema, **asdict(self)}


@dataclass(frozen=True)
class Options:
    """What a report is asked for; None: as the run's configuration says."""

    reference: str | None = None
    hard: str | None = None
    equal: str | None = None
    all_pairs: bool = False
    allow_versions: bool = False


@dataclass(frozen=True)
class Run:
    """A run folder as read: its description, and one record an arm and question."""

    folder: Path
    about: dict[str, Any]
    records: list[Record]


@dataclass(frozen=True)
class Analysis:
    """A summary, and the records behind it (``arm`` as the summary calls it)."""

    summary: Summary
    records: list[Record]


# --- reading -----------------------------------------------------------------------------------------------------


def read_run(folder: str | Path) -> Run:
    """A run and its records so far; ConfigError in one line if there are none or something is damaged."""
    folder = Path(folder)
    path = folder / "run.json"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no run: run.json is missing")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise ConfigError(f"{path} is not JSON ({error})") from error
    schema = about.get("schema") if isinstance(about, dict) else None
    if schema != SCHEMA:
        raise ConfigError(f"{path} has schema {schema!r}; this version reads {SCHEMA}")
    records = read_run_records(folder)
    if not records:
        raise ConfigError(f"{folder / 'records.jsonl'} has no records: the run has not answered a question yet")
    return Run(folder, about, records)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Several runs, each folder once."""
    seen: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if folder.resolve() in seen:
            raise ConfigError(f"run folder {folder} is given twice")
        seen[folder.resolve()] = folder
    return [read_run(folder) for folder in seen.values()]


def _run_names(runs: Sequence[Run]) -> list[str]:
    """Names that tell the runs apart: their own, with the folder where two are called the same."""
    own = [str(run.about.get("name") or run.folder.name) for run in runs]
    return [name if own.count(name) == 1 else f"{name} in {run.folder}" for name, run in zip(own, runs)]


def _facts(run: Run, name: str) -> RunFacts:
    about = run.about
    benchmark = about.get("benchmark")
    benchmark = dict(benchmark) if isinstance(benchmark, Mapping) else {"name": benchmark}
    return RunFacts(
        name=name,
        folder=str(run.folder),
        kind=str(about.get("kind") or "compare"),
        command=about.get("command"),
        benchmark=benchmark,
        num_questions=benchmark.get("num_questions"),
        missing=list(benchmark.get("missing") or []),
        defects=dict(benchmark.get("defects") or {}),
        versions=dict(about.get("versions") or {}),
        hardware=dict(about.get("hardware") or {}),
        git_commit=about.get("git_commit"),
        config=dict(about.get("config") or {}),
    )


# --- one arm -----------------------------------------------------------------------------------------------------


def score(record: Record) -> float:
    """What a question counts, 0..1; one that failed to run counts 0."""
    if record.get("error"):
        return 0.0
    value = record.get("score")
    return float(record["correct"]) if value is None else float(value)


def accuracy_of(records: Sequence[Record]) -> Accuracy:
    return accuracy([score(record) for record in records], [str(record["video"]) for record in records])


def _arm_summary(
    name: str,
    name_in_run: str,
    run: str,
    description: Mapping[str, Any],
    records: Sequence[Record],
    axes: Sequence[str],
    official: Callable[[Sequence[Record]], dict[str, float] | None],
) -> ArmSummary:
    _by_question(records)  # refuses a question answered twice
    ran = [record for record in records if not record.get("error")]
    macs, seconds, amortised = (_stage_means(ran, key) for key in ("macs", "seconds", "seconds_amortised"))
    per_layer, harness = _layer_means(ran), _mean(ran, "seconds_harness")
    return ArmSummary(
        name=name,
        name_in_run=name_in_run,
        run=run,
        group=str(description.get("group") or name_in_run),
        seed=description.get("seed"),
        description=dict(description),
        accuracy=accuracy_of(records),
        accuracy_asked=accuracy_of(ran) if ran else None,
        num_questions=len(records),
        num_videos=len({record["video"] for record in records}),
        errors=len(records) - len(ran),
        unanswered=sum(r.get("prediction") is None and bool(r.get("options", True)) for r in ran),
        frames=_mean(ran, "num_frames"),
        tokens_given=_mean_of(_tokens_given(record) for record in ran),
        tokens_in=_mean(ran, "tokens_in"),
        tokens_out=_mean(ran, "tokens_out"),
        kv_tokens=float(np.mean(per_layer)) if per_layer else None,
        tokens_per_layer=per_layer,
        macs=macs,
        total_macs=_total(macs),
        seconds=seconds,
        total_seconds=_total(seconds),
        seconds_amortised=amortised,
        total_seconds_amortised=_total(amortised),
        seconds_waiting=_mean(ran, "seconds_waiting"),
        harness=harness,
        harness_share=_share(harness, amortised),
        peak_memory=_largest(ran, "peak_memory"),
        event_recall=_mean_of(map(event_recall, ran)),
        labels=_label_accuracies(records, axes),
        official=official(records),
        published=dict(description.get("published") or {}),
    )


def _tokens_given(record: Record) -> float | None:
    """Visual tokens of the vision path: those of the record, or what it says was kept of them."""
    if record.get("tokens_given") is not None:
        return record["tokens_given"]
    share = (record.get("kept") or {}).get("input")
    return record["tokens_in"] / share if share and record.get("tokens_in") is not None else None


def _label_accuracies(records: Sequence[Record], axes: Sequence[str]) -> dict[str, dict[str, Accuracy]]:
    """Accuracy by axis and label; a question with several labels of an axis counts for each."""
    found: dict[str, dict[str, list[Record]]] = {axis: {} for axis in axes}
    for record in records:
        labels = record.get("labels") or ({"category": [record["category"]]} if record.get("category") else {})
        for axis, names in labels.items():
            for label in names:
                found.setdefault(axis, {}).setdefault(str(label), []).append(record)
    return {
        axis: {label: accuracy_of(group) for label, group in sorted(groups.items())}
        for axis, groups in found.items()
        if groups
    }


def _layer_means(records: Iterable[Record]) -> list[float]:
    """Mean visual tokens of each layer; empty where records do not say, or have different numbers of layers."""
    rows = [record["tokens_per_layer"] for record in records if record.get("tokens_per_layer")]
    if not rows or len({len(row) for row in rows}) > 1:
        return []
    return [float(x) for x in np.mean(np.asarray(rows, dtype=np.float64), axis=0)]


def _stage_means(records: Iterable[Record], key: str) -> dict[str, float]:
    """Means by stage, in the order of stages; empty if there are no records."""
    rows = [record[key] for record in records if record.get(key)]
    stages = dict.fromkeys(stage for row in rows for stage in row)
    return {stage: float(np.mean([row.get(stage, 0) for row in rows])) for stage in stages}


def _largest(records: Iterable[Record], key: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for record in records:
        for name, value in (record.get(key) or {}).items():
            if value is not None:
                found[name] = max(value, found.get(name, 0))
    return found


def _total(by_stage: Mapping[str, float]) -> float | None:
    return float(sum(by_stage.values())) if by_stage else None


def _share(harness: float | None, amortised: Mapping[str, float]) -> float | None:
    """Of the time of the model's process: decoding runs in others."""
    total = (harness or 0) + sum(seconds for stage, seconds in amortised.items() if stage != "decode")
    return None if harness is None or not total else harness / total


def _mean(records: Iterable[Record], key: str) -> float | None:
    return _mean_of(record.get(key) for record in records)


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    known = [value for value in known if math.isfinite(value)]
    return float(np.mean(known)) if known else None


def _by(records: Iterable[Record], key: str) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[str(record.get(key) or "")].append(record)
    return dict(groups)


def _by_question(records: Iterable[Record]) -> dict[str, Record]:
    """One arm's records by question; ConfigError if one appears twice."""
    questions: dict[str, Record] = {}
    for record in records:
        key = record["question_id"]
        if key in questions:
            raise ConfigError(f"arm {record['arm']!r} answers question {key!r} twice: keep one of the two records")
        questions[key] = record
    return questions


# --- all of them -------------------------------------------------------------------------------------------------


def analyse(runs: Sequence[Run], options: Options | None = None) -> Analysis:
    """What the runs show; ConfigError where an option names an arm that there is not."""
    return _Analyser(runs, options or Options()).analyse()


class _Analyser:
    """The steps of ``analyse``, with what they share: arms by name, and their records by question."""

    def __init__(self, runs: Sequence[Run], options: Options):
        self.runs = dict(zip(_run_names(runs), runs, strict=True))
        self.options = options
        self.cautions: list[str] = []
        self.remarks: list[str] = []
        self.facts = {name: _facts(run, name) for name, run in self.runs.items()}
        self.arms: dict[str, ArmSummary] = {}
        self.records: dict[str, list[Record]] = {}
        self.questions: dict[str, dict[str, Record]] = {}
        self.axes: list[str] = []

    def analyse(self) -> Analysis:
        self._read_arms()
        reference = self._arm_named("reference") or next(iter(self.arms))
        hard = self._hard_part()
        budgets = self._budgets()
        equal_budget = self._option("equal")
        if equal_budget is not None:
            check_equal(equal_budget)
        differences, refused = self._differences(reference)
        groups = self._groups()
        group_differences = self._group_differences(groups, reference)
        same_hardware = len({_machine(facts.hardware) for facts in self.facts.values()}) == 1
        self._remark_on_runs(same_hardware)
        summary = Summary(
            name=" and ".join(self.runs) if len(self.runs) < 4 else f"{len(self.runs)} runs",
            runs=list(self.facts.values()),
            reference=reference,
            pairs="all" if self.options.all_pairs else "reference",
            equal_budget=equal_budget,
            arms=list(self.arms.values()),
            differences=differences,
            refused=refused,
            groups=groups,
            group_differences=group_differences,
            equal=budgets,
            pareto=self._fronts(reference, refused, same_hardware),
            hard=hard,
            axes=self.axes,
            seconds_comparable=same_hardware,
            verdict="",
            cautions=self.cautions,
            remarks=self.remarks,
        )
        records = [record for arm in self.records.values() for record in arm]
        return Analysis(replace(summary, verdict=verdict(summary)), records)

    # --- arms --------------------------------------------------------------------------------------------------------

    def _read_arms(self) -> None:
        described = {name: list(run.about.get("arms") or []) for name, run in self.runs.items()}
        by_arm = {name: _by(run.records, "arm") for name, run in self.runs.items()}
        count = Counter(arm for arms in by_arm.values() for arm in arms)
        for run_name, arms in by_arm.items():
            texts = {str(arm["name"]): arm for arm in described[run_name]}
            axes, official = self._benchmark(run_name)
            self.axes += [axis for axis in axes if axis not in self.axes]
            order = {name: place for place, name in enumerate(texts)}
            for arm, records in sorted(arms.items(), key=lambda item: order.get(item[0], len(order))):
                name = arm if count[arm] == 1 else f"{arm} ({run_name})"
                self.records[name] = [{**record, "arm": name} for record in records] if name != arm else records
                self.questions[name] = _by_question(self.records[name])
                description = texts.get(arm, {})
                self.arms[name] = _arm_summary(name, arm, run_name, description, self.records[name], axes, official)
        found = dict.fromkeys(axis for arm in self.arms.values() for axis in arm.labels)
        self.axes = [*(axis for axis in self.axes if axis in found), *(axis for axis in found if axis not in self.axes)]

    def _benchmark(
        self, run_name: str
    ) -> tuple[tuple[str, ...], Callable[[Sequence[Record]], dict[str, float] | None]]:
        """The benchmark's label axes and its own metrics of an arm's records, by its class."""
        facts = self.facts[run_name]
        name = _component_name(facts.benchmark.get("name"))
        absent = f"{self._of(run_name)}The official metrics of benchmark '{name}' are left out:"
        try:
            if name is None:
                raise PluginError("the run does not say which it is")
            found = load_class("benchmark", name, facts.config.get("plugins") or ())
        except (PluginError, OSError, ValueError) as error:
            self.remarks.append(f"{absent} {error}")
            return (), lambda records: None

        def official(records: Sequence[Record]) -> dict[str, float] | None:
            try:
                return {str(key): float(value) for key, value in found.metrics(list(records)).items()}
            except Exception as error:  # of a plugin, or of records that an earlier version wrote
                remark = f"{absent} {type(error).__name__}: {error}"
                self.remarks += [remark] if remark not in self.remarks else []
                return None

        toys = {name for arm in self.runs[run_name].about.get("arms") or [] if is_toy(name := arm.get("checkpoint"))}
        if toys and not found.generated:
            told = _list(f"'{name}'" for name in sorted(toys))
            self.cautions.append(f"{told}: trained on generated videos alone, of real ones its answers mean nothing.")
        return tuple(found.axes), official

    def _of(self, run_name: str) -> str:
        return f"{run_name}: " if len(self.runs) > 1 else ""

    def _option(self, key: str) -> Any:
        """What the report was asked for, else what the first run that says so was configured with."""
        given = getattr(self.options, key)
        if given is not None:
            return given
        return next((f.config[key] for f in self.facts.values() if f.config.get(key) is not None), None)

    def _arm_named(self, key: str) -> str | None:
        """The arm that option ``key`` names: as in the summary, in its run, or (the first of) a group of seeds."""
        given = self._option(key)
        if given is None or given in self.arms:
            return given
        for arm in self.arms.values():
            if given in (arm.name_in_run, arm.group):
                return arm.name
        raise ConfigError(
            f"{key} is '{given}', which is no arm;{nearest(str(given), self.arms)} arms: {_list(self.arms)}"
        )

    # --- pairs -------------------------------------------------------------------------------------------------------

    def _why_not(self, a: str, b: str) -> str | None:
        """Why two arms cannot be compared in pairs; None where they can."""
        runs = [self.facts[self.arms[name].run] for name in (a, b)]
        versions = [facts.versions.get("xcomp") for facts in runs]
        if versions[0] != versions[1] and not self.options.allow_versions:
            return f"made by xcomp {versions[0]} and {versions[1]}; --allow-versions compares them all the same"
        first, second = self.questions[a], self.questions[b]
        only = [[q for q in x if q not in y] for x, y in ((first, second), (second, first))]
        if any(only):
            if len(only[0]) == len(first):
                return "they have no question in common (by 'id')"
            if any(f.num_questions and len(x) < f.num_questions for f, x in zip(runs, (first, second))):
                return "not all of their questions are answered yet"
            told = [f"{len(q):,} that '{n}' was not asked" for q, n in zip(only, (b, a)) if q]
            return f"different questions: {' and '.join(told)}, '{(only[0] or only[1])[0]}' for one"
        for key, what in (
            ("answer", "right answers"),
            ("references", "right answers"),
            ("prompt_sha", "prompts"),
            ("video", "videos"),
            ("span", "spans"),
        ):
            wrong = [q for q in first if _differ(key, first[q], second[q])]
            if wrong:
                return f"different {what} of {len(wrong):,} questions, '{wrong[0]}' for one"
        return None

    def _pair(self, a: Sequence[str], b: Sequence[str]) -> Paired:
        """The arms of ``a`` against those of ``b``, the i-th of each together (one: with all)."""
        order = sorted(self.questions[a[0]])
        videos = [str(self.questions[a[0]][q]["video"]) for q in order]
        scores = [np.array([[score(self.questions[arm][q]) for q in order] for arm in arms]) for arms in (a, b)]
        rows = max(map(len, scores))
        return paired(*(np.broadcast_to(s, (rows, len(order))) for s in scores), videos)

    def _differences(self, reference: str) -> tuple[list[Difference], list[Refusal]]:
        others = [name for name in self.arms if name != reference]
        pairs = [(name, reference) for name in others]
        if self.options.all_pairs:
            pairs += [(b, a) for a, b in combinations(others, 2)]
        found, refused = [], []
        for a, b in pairs:
            reason = self._why_not(a, b)
            if reason is None:
                found.append(self._told(a, b, self._pair([a], [b]), self.arms[a], self.arms[b]))
            else:
                refused.append(Refusal(a, b, reason))
        return _adjusted(found), refused

    def _told(self, a: str, b: str, found: Paired, of: ArmSummary, to: ArmSummary, num_seeds: int = 0) -> Difference:
        ratio = of.total_macs / to.total_macs if of.total_macs and to.total_macs else None
        equal = tuple(kind for kind in BUDGETS if to.name in of.equal.get(kind, ()))
        return _difference(a, b, found, macs_ratio=ratio, equal=equal, num_seeds=num_seeds)

    # --- seeds -------------------------------------------------------------------------------------------------------

    def _groups(self) -> list[SeedGroup]:
        """Arms that differ in the seed alone, where there are several and all were asked the same."""
        members: dict[tuple, list[ArmSummary]] = defaultdict(list)
        for arm in self.arms.values():
            if arm.seed is not None:
                members[arm.group, str(arm.description.get("frames")), arm.description.get("method")].append(arm)
        names = Counter(group for group, *_ in members)
        groups = []
        for (group, frames, _), arms in members.items():
            name = group if names[group] == 1 else f"{group}, {frames} frames"
            while name in self.arms or any(name == other.name for other in groups):
                name += " (seeds)"
            seeds = [arm.seed for arm in arms]
            reasons = [r for a, b in combinations(arms, 2) if (r := self._why_not(b.name, a.name))]
            if len(arms) < 2 or len(set(seeds)) < len(seeds) or reasons:
                why = reasons[0] if reasons else "a seed is there twice"
                if len(arms) > 1:
                    self.remarks.append(f"The seeds of {name} are not taken together: {why}.")
                continue
            order = sorted(self.questions[arms[0].name])
            said = {tuple(str(self.questions[arm.name][q].get("text")) for q in order) for arm in arms}
            if len(said) == 1:
                self.remarks.append(f"All seeds of {name} gave the same answers: what they stand for changed nothing.")
            scores = np.array([[score(self.questions[arm.name][q]) for q in order] for arm in arms])
            videos = [str(self.questions[arms[0].name][q]["video"]) for q in order]
            deviation = float(np.std(scores.mean(axis=1), ddof=1))
            groups.append(SeedGroup(name, seeds, [a.name for a in arms], seeds_accuracy(scores, videos), deviation))
        return groups

    def _group_differences(self, groups: Sequence[SeedGroup], reference: str) -> list[Difference]:
        """Each group, and each arm of no group, minus the reference's; seeds are paired where they agree."""
        if not groups:
            return []
        units = {group.name: dict(zip(group.seeds, group.arms)) for group in groups}
        grouped = {arm for group in groups for arm in group.arms}
        units |= {name: {None: name} for name in self.arms if name not in grouped}
        base = next(name for name, arms in units.items() if reference in arms.values())
        found = []
        for name, arms in units.items():
            if name == base or self._why_not(next(iter(arms.values())), reference):
                continue
            seeds = [seed for seed in arms if seed in units[base]]
            if seeds and seeds != [None]:
                pair = self._pair([arms[s] for s in seeds], [units[base][s] for s in seeds])
            elif len(arms) == 1 or len(units[base]) == 1:
                pair = self._pair(list(arms.values()), list(units[base].values()))
            else:
                pair = self._means(arms.values(), units[base].values())
            of, to = (self.arms[next(iter(unit.values()))] for unit in (arms, units[base]))
            found.append(self._told(name, base, pair, of, to, len([s for s in seeds if s is not None])))
        return _adjusted(found)

    def _means(self, a: Iterable[str], b: Iterable[str]) -> Paired:
        """Mean scores over seeds that do not agree: drawing seeds is not in the interval."""
        order = sorted(self.questions[next(iter(a))])
        videos = [str(self.questions[next(iter(a))][q]["video"]) for q in order]
        means = [np.mean([[score(self.questions[arm][q]) for q in order] for arm in arms], axis=0) for arms in (a, b)]
        return paired(*means, videos)

    # --- the hard part, budgets, fronts ------------------------------------------------------------------------------

    def _hard_part(self) -> Hard | None:
        """Accuracy on the questions that plain down-sampling gets wrong (arXiv 2510.07143), where an arm is that."""
        named = self._arm_named("hard")
        arm = named or self._down_sampling()
        if arm is None:
            return None
        wrong = {q for q, record in self.questions[arm].items() if score(record) < 1}
        for name, summary in self.arms.items():
            records = [record for q, record in self.questions[name].items() if q in wrong]
            if name != arm and records and self._why_not(name, arm) is None:
                self.arms[name] = replace(summary, hard=accuracy_of(records))
        return Hard(arm, len(wrong), "named" if named else "by its description")

    def _down_sampling(self) -> str | None:
        """The arm with the fewest tokens whose selector and compressor look at nothing; None where none has fewer
        tokens than another arm is given."""
        plain = [
            arm
            for arm in self.arms.values()
            if arm.tokens_in is not None
            and self._is_plain("selector", arm)
            and self._is_plain("compressor", arm)
            and arm.accuracy_asked is not None
        ]
        if not plain:
            return None
        least = min(plain, key=lambda arm: (arm.tokens_in, arm.frames))
        return least.name if any((arm.tokens_given or 0) > least.tokens_in for arm in self.arms.values()) else None

    def _is_plain(self, kind: str, arm: ArmSummary) -> bool:
        """Whether the plugin that the arm names says of itself that it is plain down-sampling."""
        node = arm.description.get(kind)
        name = _component_name(node)
        if name is None:
            return False
        try:
            found = load_class(kind, name, self.facts[arm.run].config.get("plugins") or ())
        except (PluginError, OSError, ValueError):
            return False
        return bool(getattr(found, "downsamples", False))

    def _budgets(self) -> list[EqualBudget]:
        """Arms of equal budgets, of every kind; each arm learns which it shares."""
        found = []
        shared: dict[str, dict[str, set[str]]] = {name: {} for name in self.arms}
        for kind in BUDGETS:
            values = {name: arm.budget(kind) for name, arm in self.arms.items()}
            values = {name: value for name, value in values.items() if value is not None}
            for names in equal_within(values, TOLERANCE):
                members = [name for name in self.arms if name in names]  # in their own order
                found.append(EqualBudget(kind, float(np.mean([values[name] for name in names])), members))
                for name in names:
                    shared[name].setdefault(kind, set()).update(n for n in names if n != name)
        for name, arm in self.arms.items():
            equal = {kind: [n for n in self.arms if n in names] for kind, names in shared[name].items()}
            self.arms[name] = replace(arm, equal=equal)
        return found

    def _fronts(self, reference: str, refused: Iterable[Refusal], same_hardware: bool) -> list[Front]:
        """Pareto fronts of the arms that can be compared with the reference; seconds of one hardware only."""
        out = {refusal.a for refusal in refused if refusal.b == reference}
        arms = [arm for name, arm in self.arms.items() if name not in out]
        fronts = []
        for cost in (*BUDGETS, "seconds"):
            runs = [None] if cost != "seconds" or same_hardware else list(self.runs)
            for run in runs:
                points = {
                    arm.name: (value, arm.accuracy.value)
                    for arm in arms
                    if run in (None, arm.run)
                    and (value := arm.total_seconds if cost == "seconds" else arm.budget(cost)) is not None
                }
                if points:
                    fronts.append(Front(cost, run, pareto_front(points)))
        return fronts

    # --- remarks -----------------------------------------------------------------------------------------------------

    def _remark_on_runs(self, same_hardware: bool) -> None:
        """What must be known to read any of the tables."""
        for name, facts in self.facts.items():
            of = self._of(name)
            if facts.missing:
                there = facts.benchmark.get("num_videos")
                total = "" if there is None else f" of {there + len(facts.missing)}"
                self.cautions.append(
                    f"{of}{len(facts.missing)}{total} videos are missing, their questions not asked: "
                    f"{_list(Path(path).name for path in facts.missing)}."
                )
            if any(facts.defects.values()):
                told = ", ".join(f"{what} {count:,}" for what, count in facts.defects.items() if count)
                self.cautions.append(f"{of}Defects of the benchmark's questions: {told}.")
            asked = [arm for arm in self.arms.values() if arm.run == name]
            opened = [r for r in self.questions[asked[0].name].values() if not r.get("options") and r.get("metrics")]
            if 0 < len(opened) < asked[0].num_questions:
                self.remarks.append(
                    f"{of}Accuracy is the mean score of {asked[0].num_questions - len(opened):,} choices and "
                    f"{len(opened):,} open questions (of these by {next(iter(opened[0]['metrics']))})."
                )
            behind = [a for a in asked if facts.num_questions and a.num_questions < facts.num_questions]
            if behind:
                told = _list(f"{arm.name}: {arm.num_questions:,}" for arm in behind)
                self.remarks.append(f"{of}Not all {facts.num_questions:,} questions are answered yet ({told}).")
        for what, counts in (
            ("Questions that failed to run (counted as wrong)", {a.name: a.errors for a in self.arms.values()}),
            ("Answers that named no option (counted as wrong)", {a.name: a.unanswered for a in self.arms.values()}),
        ):
            if any(counts.values()):
                self.remarks.append(f"{what}: {_list((f'{k}: {n:,}' for k, n in counts.items() if n), most=8)}.")
        if len(self.runs) > 1:
            for package in ("xcomp", "torch", "transformers"):
                found = dict.fromkeys(facts.versions.get(package) for facts in self.facts.values())
                if len(found) > 1:
                    self.remarks.append(f"Runs differ in the version of {package}: {_list(map(str, found))}.")
            if not same_hardware:
                self.remarks.append("Runs were made on different hardware: their seconds cannot be compared.")


def _adjusted(differences: Sequence[Difference]) -> list[Difference]:
    """The differences of one table with p-values adjusted for their number."""
    ps = holm([difference.p for difference in differences])
    mcnemars = holm([difference.mcnemar for difference in differences])
    return [
        replace(d, p_holm=p, mcnemar_holm=exact, told_apart=p < ALPHA)
        for d, p, exact in zip(differences, ps, mcnemars, strict=True)
    ]


def _differ(key: str, a: Record, b: Record) -> bool:
    """Whether two records say different things of a question; one that says nothing does not."""
    if key == "video":  # its folders differ from machine to machine
        return Path(a[key]).name != Path(b[key]).name
    if key == "span":  # none is the whole video
        return a.get(key) != b.get(key)
    return a.get(key) not in (None, []) and b.get(key) not in (None, []) and a[key] != b[key]


def _component_name(node: Any) -> str | None:
    """A component's name; None of several that act one after the other, and of none."""
    if isinstance(node, Mapping):
        node = node.get("name")
    return node if isinstance(node, str) else None


def _machine(hardware: Mapping[str, Any]) -> str:
    """What of the hardware makes seconds differ; the system's version does not."""
    return json.dumps({key: value for key, value in hardware.items() if key != "system"}, sort_keys=True, default=str)


def _list(names: Iterable[str], most: int = 10) -> str:
    """Names with commas, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- in words ----------------------------------------------------------------------------------------------------


def verdict(summary: Summary) -> str:
    """The outcome in a sentence or two. Only what Holm's p tells apart is said to beat or fall behind."""
    differences = summary.group_differences if summary.groups else summary.differences
    base = next((group.name for group in summary.groups if summary.reference in group.arms), summary.reference)
    told = [d for d in differences if d.b == base]
    if len(summary.arms) == 1:
        return _scores(summary.arms[0].name, summary.arms[0].accuracy)
    if not told and summary.refused:
        return f"No arm can be compared with {base}: {summary.refused[0].reason}."
    if not told:  # nothing but one group of seeds
        (group,) = (group for group in summary.groups if group.name == base)
        over = f", the mean of {len(group.seeds)} seeds ({100 * group.deviation:.1f} points from seed to seed)"
        return _scores(base, group.accuracy)[:-1] + f"{over}."
    unequal = [d for d in told if summary.equal_budget is not None and summary.equal_budget not in d.equal]
    told = [d for d in told if d not in unequal]
    better = sorted((d for d in told if d.told_apart and d.difference > 0), key=lambda d: -d.difference)
    worse = sorted((d for d in told if d.told_apart and d.difference < 0), key=lambda d: d.difference)
    same = [d for d in told if not d.told_apart]
    parts = []
    if better:
        parts.append(f"{better[0].a} beats {base} by {_points(better[0])}{_at(better[0])}")
        if better[1:]:
            parts.append(f"{_names(better[1:])} {'beats' if len(better) == 2 else 'beat'} it too")
    if worse:
        parts.append(f"{base} beats {worse[0].a} by {_points(worse[0])}")
        if worse[1:]:
            parts.append(f"{_names(worse[1:])} {'falls' if len(worse) == 2 else 'fall'} behind it too")
    if same:
        seen = max((d.detectable for d in same if d.detectable is not None), default=None)
        least = f"a difference below {100 * seen:.1f} points would hardly have been seen" if seen and seen < 1 else ""
        least = "there are too few videos to see any difference" if seen and seen >= 1 else least
        least = f" ({least})" if least else ""
        parts.append(f"{_names(same)} cannot be told apart from {base}{least}")
    if unequal:
        verb = "has" if len(unequal) == 1 else "have"
        parts.append(f"{_names(unequal)} {verb} another budget of {BUDGETS[summary.equal_budget]}")
    return "; ".join(parts) + "."


def _scores(name: str, share: Accuracy) -> str:
    interval = f"{100 * share.value:.1f} % ({100 * share.low:.1f}–{100 * share.high:.1f})"
    return f"{name} scores {interval} on {share.n:,} questions about {share.num_videos:,} videos."


def _points(difference: Difference) -> str:
    """ "3.1 points (1.2–5.0)", of the arm that is ahead."""
    d = difference
    low, high = (d.low, d.high) if d.difference >= 0 else (-d.high, -d.low)
    low_text, high_text = (f"{100 * x:.1f}".replace("-", "−") for x in (low, high))
    return f"{100 * abs(d.difference):.1f} points ({low_text}{' to ' if low < 0 else '–'}{high_text})"


def _at(difference: Difference) -> str:
    return "" if difference.macs_ratio is None else f" at {difference.macs_ratio:.2f} of its MACs"


def _names(differences: Sequence[Difference], most: int = 4) -> str:
    """ "A", "A and B", "A, B and C", "A, B, C, D and 12 more"."""
    names = [difference.a for difference in differences]
    names = names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

"""From records to numbers: accuracy with intervals, mean costs, and paired differences between arms.

A record is one answered question (one line of ``records.jsonl``). Questions about one video are not independent, so
intervals come from a bootstrap that draws whole videos (Field and Welsh, 2007, "Bootstrapping clustered data");
where every video has one question, from Wilson's score interval (Wilson, 1927). All intervals are 95 %.

Everything here is deterministic: the bootstrap is seeded and does not depend on the order of the records.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Record = Mapping[str, Any]
LEVEL = 0.95
RESAMPLES = 5000
# Draws held in memory at once.
_CHUNK = 2**22


@dataclass(frozen=True)
class Proportion:
    """A share of right answers with its 95 % interval.

    ``method`` is "wilson" (one question a video), "bootstrap" (over videos) or "wilson over videos" (see ``accuracy``).
    """

    correct: int
    n: int
    value: float
    low: float
    high: float
    method: str


@dataclass(frozen=True)
class ArmSummary:
    """One arm's results. Costs are means over the questions that ran without an error; NaN if there are none.

    ``errors`` counts questions that failed to run and ``unanswered`` those whose text named no option; both are wrong
    answers in ``accuracy``. ``accuracy_asked`` leaves out those that failed to run; None if all did. ``macs`` and
    ``seconds`` are by stage, as a question would take them alone on a fresh video; ``seconds_amortised`` divides what
    was shared by those who shared it. ``seconds_quartiles`` are those of a whole question alone. ``peak_memory`` is the
    largest seen, in bytes, of the host and (on CUDA) of the device. ``event_recall`` is the share of a question's
    events of which at least one frame was shown, where the benchmark knows them; NaN where it does not.
    """

    arm: str
    accuracy: Proportion
    accuracy_asked: Proportion | None
    num_videos: int
    errors: int
    unanswered: int
    num_frames: float
    tokens_in: float
    tokens_out: float
    macs: dict[str, float]
    seconds: dict[str, float]
    seconds_amortised: dict[str, float]
    seconds_quartiles: tuple[float, float]
    peak_memory: dict[str, int]
    categories: dict[str, Proportion]
    event_recall: float = math.nan

    @property
    def total_macs(self) -> float:
        return _total(self.macs)

    @property
    def total_seconds(self) -> float:
        return _total(self.seconds)

    @property
    def total_seconds_amortised(self) -> float:
        return _total(self.seconds_amortised)


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of arm ``a`` minus that of arm ``b`` on the questions both were asked.

    ``a_only`` and ``b_only`` count the questions that one arm alone got right. ``low`` and ``high`` bound the
    difference (bootstrap over videos); ``p`` is McNemar's exact two-sided p-value, which takes questions as
    independent: where videos have several questions, trust the interval.
    """

    a: str
    b: str
    n: int
    num_videos: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    low: float
    high: float
    a_only: int
    b_only: int
    p: float


def is_correct(record: Record) -> bool:
    """Whether the question counts as answered rightly; one that failed to run does not."""
    return bool(record["correct"]) and not record.get("error")


def summarise(records: Iterable[Record], *, resamples: int = RESAMPLES, seed: int = 0) -> list[ArmSummary]:
    """One summary an arm, in the order in which arms first appear.

    Raises ValueError if there are no records, or if an arm answers a question twice.
    """
    arms = _by(records, "arm")
    if not arms:
        raise ValueError("no records to summarise: the run has not answered a question yet")
    return [_summarise_arm(arm, answers, resamples, seed) for arm, answers in arms.items()]


def _summarise_arm(arm: str, records: list[Record], resamples: int, seed: int) -> ArmSummary:
    _by_question(records)  # refuses a question answered twice
    ran = [record for record in records if not record.get("error")]
    seconds = [sum(record["seconds"].values()) for record in ran]
    low, high = (float(np.quantile(seconds, q)) if seconds else math.nan for q in (0.25, 0.75))
    categories = sorted(_by(records, "category").items())
    return ArmSummary(
        arm=arm,
        accuracy=accuracy(records, resamples=resamples, seed=seed),
        accuracy_asked=accuracy(ran, resamples=resamples, seed=seed) if ran else None,
        num_videos=len({record["video"] for record in records}),
        errors=len(records) - len(ran),
        unanswered=sum(record.get("prediction") is None for record in ran),
        num_frames=_mean(ran, "num_frames"),
        tokens_in=_mean(ran, "tokens_in"),
        tokens_out=_mean(ran, "tokens_out"),
        macs=_stage_means(ran, "macs"),
        seconds=_stage_means(ran, "seconds"),
        seconds_amortised=_stage_means(ran, "seconds_amortised"),
        seconds_quartiles=(low, high),
        peak_memory=_largest(ran, "peak_memory"),
        categories={name: accuracy(group, resamples=resamples, seed=seed) for name, group in categories},
        event_recall=_event_recall(ran),
    )


def _event_recall(records: Iterable[Record]) -> float:
    shares = []
    for record in records:
        events, times = record.get("events") or [], record.get("times") or []
        if events:
            shares.append(sum(any(start <= t <= end for t in times) for start, end in events) / len(events))
    return sum(shares) / len(shares) if shares else math.nan


def accuracy(records: Sequence[Record], *, resamples: int = RESAMPLES, seed: int = 0) -> Proportion:
    """Share of right answers and its interval.

    Drawing videos shows no spread when there is one video or all have the same share (all right, for instance), though
    the next video may well differ. The interval is then Wilson's with the number of videos as the count: wide, as it
    should be.
    """
    correct, counts = _per_video(records, is_correct)
    right, n, num_videos = int(correct.sum()), int(counts.sum()), len(counts)
    value = right / n
    if n == num_videos:
        return Proportion(right, n, value, *wilson(right, n), "wilson")
    if np.ptp(correct / counts) == 0:
        return Proportion(right, n, value, *wilson(value * num_videos, num_videos), "wilson over videos")
    return Proportion(right, n, value, *cluster_interval(correct, counts, resamples=resamples, seed=seed), "bootstrap")


def paired(
    records_a: Iterable[Record], records_b: Iterable[Record], *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedDifference:
    """Compares two arms, question by question.

    Raises ValueError if they have no question in common, or if a question has different answers in the two.
    """
    all_a, all_b = _by_question(records_a), _by_question(records_b)
    common = [(all_a[key], all_b[key]) for key in all_a if key in all_b]
    if not common:
        raise ValueError("the two arms have no question in common, so they cannot be compared in pairs")
    for a, b in common:
        if a["answer"] != b["answer"]:
            raise ValueError(f"question {a['question_id']!r} has different right answers in the two arms")
    return _difference(common, resamples, seed)


def _difference(common: list[tuple[Record, Record]], resamples: int, seed: int) -> PairedDifference:
    right = [(is_correct(a), is_correct(b)) for a, b in common]
    gains = [{"video": a["video"], "gain": x - y} for (a, _), (x, y) in zip(common, right, strict=True)]
    sums, counts = _per_video(gains, lambda row: row["gain"])
    a_only, b_only = right.count((True, False)), right.count((False, True))
    n = len(common)
    difference = (a_only - b_only) / n
    if np.ptp(sums / counts) > 0:
        low, high = cluster_interval(sums, counts, resamples=resamples, seed=seed)
    else:
        low, high = _difference_without_spread(difference, a_only + b_only, len(counts))
    return PairedDifference(
        a=common[0][0]["arm"],
        b=common[0][1]["arm"],
        n=n,
        num_videos=len(counts),
        accuracy_a=sum(x for x, _ in right) / n,
        accuracy_b=sum(y for _, y in right) / n,
        difference=difference,
        low=low,
        high=high,
        a_only=a_only,
        b_only=b_only,
        p=mcnemar(a_only, b_only),
    )


def _difference_without_spread(difference: float, discordant: int, num_videos: int) -> tuple[float, float]:
    """A wide interval for the case in which all videos show the same difference, where drawing videos shows none.

    Arms that never differ: at most as many differ as Wilson's upper bound allows. Otherwise the difference, moved from
    [−1, 1] to [0, 1], is treated as a share of the videos.
    """
    if not discordant:
        bound = wilson(0, num_videos)[1]
        return -bound, bound
    low, high = wilson((difference + 1) / 2 * num_videos, num_videos)
    return 2 * low - 1, 2 * high - 1


def cluster_interval(
    sums: np.ndarray, counts: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of Σ sums / Σ counts when clusters (videos) are drawn with replacement.

    ``sums`` and ``counts`` have one entry a cluster: the sum of its values and how many there are.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    ratios = [sums[d].sum(axis=1) / counts[d].sum(axis=1) for d in _draws(len(counts), resamples, seed)]
    low, high = np.quantile(np.concatenate(ratios), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _draws(num_clusters: int, resamples: int, seed: int) -> Iterable[np.ndarray]:
    """``resamples`` rows of cluster indices drawn with replacement, a bounded number of rows at a time."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // num_clusters)
    for start in range(0, resamples, rows):
        yield rng.integers(num_clusters, size=(min(rows, resamples - start), num_clusters))


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion, without continuity correction; ``correct`` may be fractional."""
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"need 0 ≤ correct ≤ n and n ≥ 1, got correct = {correct}, n = {n}")
    z = stats.norm.ppf((1 + LEVEL) / 2)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is 0 or 1 exactly; the formula leaves rounding error there.
    return (0.0 if correct == 0 else float(centre - half)), (1.0 if correct == n else float(centre + half))


def mcnemar(a_only: int, b_only: int) -> float:
    """McNemar's exact two-sided p-value from the two counts of questions that one arm alone got right."""
    discordant = a_only + b_only
    return float(stats.binomtest(a_only, discordant, 0.5).pvalue) if discordant else 1.0


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's adjustment for testing several hypotheses: adjusted p-values, in the order given (Holm, 1979)."""
    adjusted, largest = [0.0] * len(pvalues), 0.0
    for rank, index in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        adjusted[index] = largest
    return adjusted


def _by(records: Iterable[Record], key: str) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.get(key) or ""].append(record)
    return dict(groups)


def _by_question(records: Iterable[Record]) -> dict[str, Record]:
    """One arm's records by question; ValueError if one appears twice."""
    questions: dict[str, Record] = {}
    for record in records:
        key = record["question_id"]
        if key in questions:
            raise ValueError(f"arm {record['arm']!r} answers question {key!r} twice: keep one of the two records")
        questions[key] = record
    return questions


def _per_video(records: Iterable[Record], value: Callable[[Record], float]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of ``value`` and number of records of each video, videos in the order of their names."""
    groups = sorted(_by(records, "video").items())
    sums = np.array([sum(value(record) for record in group) for _, group in groups], dtype=np.float64)
    return sums, np.array([len(group) for _, group in groups], dtype=np.float64)


def _stage_means(records: Sequence[Record], key: str) -> dict[str, float]:
    """Means by stage, in the order of stages; empty if there are no records."""
    stages = records[0][key] if records else {}
    return {stage: float(np.mean([record[key][stage] for record in records])) for stage in stages}


def _largest(records: Iterable[Record], key: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for record in records:
        for name, value in record[key].items():
            if value is not None:
                found[name] = max(value, found.get(name, 0))
    return found


def _total(by_stage: Mapping[str, float]) -> float:
    return sum(by_stage.values()) if by_stage else math.nan


def _numbers(records: Iterable[Record], key: str) -> list[float]:
    return [record[key] for record in records if record.get(key) is not None]


def _mean(records: Iterable[Record], key: str) -> float:
    numbers = _numbers(records, key)
    return float(np.mean(numbers)) if numbers else math.nan

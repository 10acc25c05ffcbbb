"""The statistics of a comparison: accuracies and differences with intervals that hold for questions in clusters.

Questions about one video are not independent, so videos, not questions, are what is drawn from a population. The
percentile bootstrap over videos falls short of its level where videos are few, so the intervals here are built on the
cluster-robust standard error CR2 of the mean with Bell and McCaffrey's degrees of freedom (2002, "Bias reduction in
standard errors for linear regression with multi-stage samples"): Student's t for differences, and for accuracies
Wilson's score interval (1927) at the effective number of questions that this standard error amounts to (Korn and
Graubard, 1998, "Confidence intervals for proportions with small expected number of positive counts estimated from
survey data"). Where arms have several seeds, videos and seeds are both taken as drawn (:func:`crossed`).

Scores are 0 or 1, or fractions (open questions). All intervals are 95 %. Everything here is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

LEVEL = 0.95
ROUNDING = 1e-9  # below which a spread is none
POWER = 0.8


@dataclass(frozen=True)
class Accuracy:
    """A mean score with its 95 % interval.

    ``correct`` is the sum of the scores of ``n`` questions about ``num_videos`` videos. ``method`` says how the
    interval was made: "wilson" (one question a video, each right or wrong), "clustered wilson" (at the number of
    questions they are worth), "wilson over videos" (all videos scored alike), "seeds and videos" (both are drawn).
    """

    value: float
    low: float
    high: float
    correct: float
    n: int
    num_videos: int
    method: str


@dataclass(frozen=True)
class Clustered:
    """A mean over questions in clusters: its CR2 standard error and degrees of freedom (NaN of a single cluster)."""

    value: float
    standard_error: float
    degrees: float


@dataclass(frozen=True)
class Paired:
    """The mean difference of paired scores with its interval, and what can be said of it.

    ``p`` is that of the t test that the interval belongs to (of the sign test over videos where they all show the same
    difference); ``mcnemar`` the exact test's, which takes questions as independent, None where scores are not 0 or 1.
    ``detectable`` is the smallest difference that the t test would find with 80 % power, None where videos do not vary.
    """

    n: int
    num_videos: int
    value_a: float
    value_b: float
    difference: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    standard_error: float | None
    degrees: float | None
    p: float
    mcnemar: float | None
    detectable: float | None


# --- means over clusters -----------------------------------------------------------------------------------------


def by_cluster(values: Iterable[float], clusters: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and their number in each cluster, clusters in the order of their names."""
    totals: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        total = totals.setdefault(cluster, [0.0, 0.0])
        total[0] += value
        total[1] += 1
    sums, counts = zip(*(totals[cluster] for cluster in sorted(totals)))
    return np.array(sums), np.array(counts)


def clustered_moments(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, CR2 standard error and Bell–McCaffrey degrees of freedom of Σ sums / Σ counts; clusters on the last axis.

    The mean is a least-squares fit of a constant, and has cluster leverages h = counts / Σ counts: residual sums are
    divided by √(1 − h), and the degrees of freedom are tr(M)² / tr(M²), where the quadratic form M would be the
    variance's if questions were independent. NaN of a single cluster.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    total = counts.sum(axis=-1, keepdims=True)
    mean = sums.sum(axis=-1, keepdims=True) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 1 / (1 - counts / total)
        error = np.sqrt((scale * (sums - mean * counts) ** 2).sum(axis=-1)) / total[..., 0]
        own, shared = scale * counts, scale * counts**2 / total
        trace = (own - shared).sum(axis=-1)
        squares = (own**2).sum(axis=-1) - 2 * (own * shared).sum(axis=-1) + shared.sum(axis=-1) ** 2
        return mean[..., 0], error, trace**2 / squares


def accuracy(scores: Sequence[float], videos: Sequence[str]) -> Accuracy:
    """Mean score and its interval.

    Where videos do not differ (there is one, or all have the same share of right answers) they show no spread, though
    the next may well differ: the interval is Wilson's with the number of videos as the count, wide, as it should be.
    """
    if not len(scores):
        raise ValueError("no scores: the mean of nothing has no interval")
    sums, counts = by_cluster(scores, videos)
    n, num_videos, value = len(scores), len(counts), float(np.mean(scores))
    value = min(max(value, 0.0), 1.0)
    if np.ptp(sums / counts) < ROUNDING:
        low, high = wilson(value * num_videos, num_videos)
        method = "wilson" if n == num_videos and is_binary(scores) else "wilson over videos"
    elif n == num_videos and is_binary(scores):
        low, high = wilson(float(sums.sum()), n)
        method = "wilson"
    else:
        low, high = (float(bound) for bound in clustered_wilson(*clustered_moments(sums, counts)))
        method = "clustered wilson"
    return Accuracy(value, low, high, round(float(sums.sum()), 9), n, num_videos, method)


def clustered_wilson(mean: np.ndarray, error: np.ndarray, degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval at the number of questions n with mean (1 − mean) / n = error², less for Student's t."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = stats.norm.ppf((1 + LEVEL) / 2)
        effective = mean * (1 - mean) / error**2 * (z / stats.t.ppf((1 + LEVEL) / 2, degrees)) ** 2
        return _wilson(mean, effective)


def wilson(correct: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion, without continuity correction; ``correct`` may be fractional."""
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"need 0 ≤ correct ≤ n and n ≥ 1, got correct = {correct}, n = {n}")
    low, high = _wilson(correct / n, n)
    # At the ends the bound is 0 or 1 exactly; the formula leaves rounding error there.
    return (0.0 if correct == 0 else float(low)), (1.0 if correct == n else float(high))


def _wilson(share: np.ndarray | float, n: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    z = stats.norm.ppf((1 + LEVEL) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


# --- differences -------------------------------------------------------------------------------------------------


def paired(scores_a: np.ndarray, scores_b: np.ndarray, videos: Sequence[str]) -> Paired:
    """Compares two arms' scores on the same questions, (questions) or (seeds, questions); the i-th belong together.

    With several seeds, wins, ties and losses are counted over seeds and questions, and there is no McNemar's test.
    """
    a, b = np.atleast_2d(np.asarray(scores_a, dtype=np.float64)), np.atleast_2d(np.asarray(scores_b, dtype=np.float64))
    gains = a - b
    sums, counts = _seeds_by_cluster(gains, videos)
    num_videos = counts.shape[1]
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    found = crossed(sums, counts)
    spread = num_videos > 1 and found.standard_error > ROUNDING
    if spread:
        low, high = t_interval(found)
        p = float(2 * stats.t.sf(abs(found.value) / found.standard_error, found.degrees))
    else:
        low, high = _without_spread(found.value, wins + losses, num_videos)
        p = float(stats.binomtest(num_videos, num_videos).pvalue) if wins + losses else 1.0  # the sign test of videos
    return Paired(
        n=gains.shape[1],
        num_videos=num_videos,
        value_a=float(a.mean()),
        value_b=float(b.mean()),
        difference=found.value,
        low=low,
        high=high,
        wins=wins,
        ties=gains.size - wins - losses,
        losses=losses,
        standard_error=found.standard_error if spread else None,
        degrees=found.degrees if spread else None,
        p=p,
        mcnemar=mcnemar(wins, losses) if len(gains) == 1 and is_binary(a) and is_binary(b) else None,
        detectable=detectable(found.standard_error, found.degrees) if spread else None,
    )


def t_interval(found: Clustered) -> tuple[float, float]:
    """Student's t interval of a difference of scores, within −1 … 1."""
    half = stats.t.ppf((1 + LEVEL) / 2, found.degrees) * found.standard_error
    return max(-1.0, float(found.value - half)), min(1.0, float(found.value + half))


def _without_spread(difference: float, discordant: int, num_videos: int) -> tuple[float, float]:
    """A wide interval for the case in which all videos show the same difference.

    Arms that never differ: at most as many differ as Wilson's upper bound allows. Otherwise the difference, moved from
    [−1, 1] to [0, 1], is treated as a share of the videos.
    """
    if not discordant:
        bound = wilson(0, num_videos)[1]
        return -bound, bound
    low, high = wilson((difference + 1) / 2 * num_videos, num_videos)
    return 2 * low - 1, 2 * high - 1


def detectable(standard_error: float, degrees: float) -> float:
    """The smallest true difference that a two-sided t test at the 5 % level finds with 80 % power."""
    return _noncentrality(round(degrees, 3)) * standard_error


@lru_cache(maxsize=4096)
def _noncentrality(degrees: float) -> float:
    from statsmodels.stats.power import TTestPower

    observations = degrees + 1
    effect = TTestPower().solve_power(nobs=observations, alpha=1 - LEVEL, power=POWER, alternative="two-sided")
    return float(np.squeeze(effect)) * math.sqrt(observations)


def mcnemar(a_only: int, b_only: int) -> float:
    """McNemar's exact two-sided p-value from the two counts of questions that one arm alone got right."""
    from statsmodels.stats.contingency_tables import mcnemar as test

    return float(test([[0, a_only], [b_only, 0]], exact=True).pvalue) if a_only + b_only else 1.0


def holm(pvalues: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment for testing several hypotheses, in the order given; None stays None and is not counted."""
    from statsmodels.stats.multitest import multipletests

    known = [p for p in pvalues if p is not None]
    adjusted = iter(multipletests(known, method="holm")[1].tolist() if known else ())
    return [None if p is None else next(adjusted) for p in pvalues]


def is_binary(scores: Sequence[float]) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(np.isin(np.asarray(scores, dtype=np.float64), (0.0, 1.0)).all())


# --- several seeds -----------------------------------------------------------------------------------------------


def crossed(sums: np.ndarray, counts: np.ndarray) -> Clustered:
    """The mean over seeds of Σ sums / Σ counts when both seeds and videos are drawn; arrays of (seeds, videos).

    Its variance is that of drawing videos (``clustered_moments`` of the means over seeds) and that of drawing seeds
    together, its degrees of freedom Satterthwaite's (1946). Variation of a video from seed to seed is in both, so the
    error is rather too large than too small (as of a bootstrap that draws rows and columns: Owen, 2007, "The pigeonhole
    bootstrap").
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    mean, error, degrees = (float(x) for x in clustered_moments(sums.mean(axis=0), counts.mean(axis=0)))
    num_seeds = len(sums)
    if num_seeds == 1:
        return Clustered(mean, error, degrees)
    seeds = float(np.var(sums.sum(axis=1) / counts.sum(axis=1), ddof=1)) / num_seeds
    variance = error**2 + seeds
    if variance > 0:
        degrees = variance**2 / (error**4 / degrees + seeds**2 / (num_seeds - 1))
    return Clustered(mean, math.sqrt(variance), degrees)


def seeds_accuracy(scores: np.ndarray, videos: Sequence[str]) -> Accuracy:
    """Mean over seeds of the mean score; ``scores`` are (seeds, questions)."""
    scores = np.asarray(scores, dtype=np.float64)
    sums, counts = _seeds_by_cluster(scores, videos)
    found = crossed(sums, counts)
    value = min(max(float(scores.mean()), 0.0), 1.0)
    num_videos = counts.shape[1]
    if num_videos > 1 and found.standard_error > ROUNDING:
        low, high = (float(b) for b in clustered_wilson(np.float64(value), found.standard_error, found.degrees))
        method = "seeds and videos"
    else:
        (low, high), method = wilson(value * num_videos, num_videos), "wilson over videos"
    correct = round(float(scores.sum() / len(scores)), 9)
    return Accuracy(value, low, high, correct, scores.shape[1], num_videos, method)


def _seeds_by_cluster(scores: np.ndarray, videos: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    sums, counts = zip(*(by_cluster(row, videos) for row in scores))
    return np.stack(sums), np.stack(counts)


# --- budgets and costs -------------------------------------------------------------------------------------------


def equal_within(values: Mapping[str, float], tolerance: float) -> list[list[str]]:
    """The largest sets of two or more whose values differ by no more than ``tolerance`` of the smallest."""
    ordered = sorted(values, key=lambda name: values[name])
    found: list[list[str]] = []
    for start, name in enumerate(ordered):
        limit = values[name] * (1 + tolerance) + 1e-12
        group = [other for other in ordered[start:] if values[other] <= limit]
        if len(group) > 1 and not (found and set(group) <= set(found[-1])):
            found.append(group)
    return found


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Of (cost, value) by name, those that no other beats: none is as cheap and better, or cheaper and as good."""
    front = [
        name
        for name, (cost, value) in points.items()
        if not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points.values())
    ]
    return sorted(front, key=lambda name: points[name])

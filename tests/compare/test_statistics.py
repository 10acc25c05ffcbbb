"""Statistics against slow references, scipy, statsmodels and simulations of questions in clusters."""

import math
import random

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as exact_mcnemar
from statsmodels.stats.multitest import multipletests

from xcomp.compare.statistics import (
    Clustered,
    accuracy,
    by_cluster,
    clustered_moments,
    clustered_wilson,
    crossed,
    detectable,
    equal_within,
    holm,
    mcnemar,
    paired,
    pareto_front,
    seeds_accuracy,
    t_interval,
    wilson,
)

QUANTILE = stats.norm.ppf(0.975)


def ragged(seed=0, videos=6, chance=None):
    """Scores of videos with one to four questions, right with a chance that differs from video to video."""
    rng = random.Random(seed)
    rows = [(float(rng.random() < (v + 1) / (videos + 1)), f"v{v}") for v in range(videos) for _ in range(1 + v % 4)]
    return [score for score, _ in rows], [video for _, video in rows]


# --- standard errors -------------------------------------------------------------------------------------------------


def test_the_standard_error_equals_matrices_written_out():
    """CR2 and its degrees of freedom as they are defined: residuals times (I − H)^(−1/2) of each cluster."""
    scores, videos = ragged(seed=4, videos=7)
    y, n = np.array(scores), len(scores)
    hat = np.full((n, n), 1 / n)
    rest = np.eye(n) - hat
    rows, moments = [], []
    for video in sorted(set(videos)):
        own = np.array([v == video for v in videos])
        values, vectors = np.linalg.eigh(rest[np.ix_(own, own)])
        root = vectors @ np.diag(values**-0.5) @ vectors.T
        weight = root @ np.ones(own.sum()) / n
        moments.append(weight @ (rest @ y)[own])
        rows.append(rest[:, own] @ weight)
    form = np.array(rows) @ np.array(rows).T  # of independent questions of equal variance
    expected = math.sqrt(sum(m**2 for m in moments)), np.trace(form) ** 2 / np.trace(form @ form)
    mean, error, degrees = clustered_moments(*by_cluster(scores, videos))
    assert mean == pytest.approx(np.mean(scores)) and (error, degrees) == pytest.approx(expected)


def test_the_standard_error_is_statsmodels_but_for_the_small_sample_correction():
    scores, videos = ragged(seed=1, videos=200)
    fit = sm.OLS(np.array(scores), np.ones(len(scores))).fit(
        cov_type="cluster", cov_kwds={"groups": np.unique(videos, return_inverse=True)[1], "use_correction": False}
    )
    mean, error, degrees = clustered_moments(*by_cluster(scores, videos))
    assert mean == pytest.approx(fit.params[0])
    assert error == pytest.approx(fit.bse[0], rel=0.01) and error > fit.bse[0]
    assert 100 < degrees < 199


def test_questions_of_one_video_each_are_a_t_test():
    values = np.random.default_rng(0).normal(size=30)
    mean, error, degrees = clustered_moments(values, np.ones(30))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert degrees == pytest.approx(29)
    found = Clustered(float(mean) / 10, float(error) / 10, float(degrees))  # differences of scores stay within ±1
    assert t_interval(found) == pytest.approx((expected.low / 10, expected.high / 10))


# --- coverage --------------------------------------------------------------------------------------------------------


def simulated(rng, clusters, chance, correlation, simulations=4000):
    """Right answers and questions of each video: sizes from 2 to about 30, chances drawn from a beta distribution."""
    counts = 1 + rng.geometric(1 / 6, size=(simulations, clusters))
    own = rng.beta(chance * (1 / correlation - 1), (1 - chance) * (1 / correlation - 1), size=counts.shape)
    return rng.binomial(counts, own).astype(float), counts.astype(float)


@pytest.mark.parametrize("clusters", [10, 20, 40, 100])
@pytest.mark.parametrize("chance, correlation", [(0.5, 0.2), (0.25, 0.05), (0.8, 0.3)])
def test_accuracy_intervals_cover_what_they_say(clusters, chance, correlation):
    rng = np.random.default_rng([clusters, int(100 * chance)])
    sums, counts = simulated(rng, clusters, chance, correlation)
    low, high = clustered_wilson(*clustered_moments(sums, counts))
    assert 0.93 <= np.mean((low <= chance) & (chance <= high)) <= 0.97


@pytest.mark.parametrize("clusters", [10, 20, 40, 100])
@pytest.mark.parametrize("gain", [0.05, 0.15])
def test_difference_intervals_cover_what_they_say(clusters, gain):
    """A third of the questions one arm alone gets right, with shares that differ from video to video."""
    rng = np.random.default_rng([clusters, int(100 * gain)])
    counts = 1 + rng.geometric(1 / 6, size=(4000, clusters))
    shares = rng.dirichlet(np.array([(0.33 + gain) / 2, (0.33 - gain) / 2, 0.67]) * 4, size=counts.shape)
    wins = rng.binomial(counts, shares[..., 0])
    losses = rng.binomial(counts - wins, shares[..., 1] / (1 - shares[..., 0]))
    mean, error, degrees = clustered_moments(wins - losses, counts)
    half = stats.t.ppf(0.975, degrees) * error
    assert 0.93 <= np.mean(np.abs(mean - gain) <= half) <= 0.97


def test_the_percentile_bootstrap_falls_short_where_these_do_not():
    """Why there is none: ten videos of unequal size, the same samples."""
    rng = np.random.default_rng(3)
    sums, counts = simulated(rng, 10, 0.8, 0.3, simulations=500)
    draws = rng.integers(10, size=(500, 10))
    ratios = sums[:, draws].sum(axis=2) / counts[:, draws].sum(axis=2)
    low, high = np.quantile(ratios, [0.025, 0.975], axis=1)
    assert np.mean((low <= 0.8) & (high >= 0.8)) < 0.9
    low, high = clustered_wilson(*clustered_moments(sums, counts))
    assert np.mean((low <= 0.8) & (high >= 0.8)) > 0.93


def test_p_values_of_equal_arms_are_below_five_per_cent_in_five_of_hundred():
    rng, below = np.random.default_rng(8), 0
    for _ in range(600):
        counts = 1 + rng.geometric(1 / 4, size=25)
        hard = np.repeat(rng.beta(2, 2, size=25), counts)
        tilt = np.repeat(rng.normal(0, 0.15, size=25), counts)  # what one arm does better on a video
        a, b = (rng.random(len(hard)) < np.clip(hard + x, 0, 1) for x in (tilt, -tilt))
        below += paired(a, b, [f"v{v}" for v in np.repeat(np.arange(25), counts)]).p < 0.05
    assert 0.03 <= below / 600 <= 0.07


# --- accuracies ------------------------------------------------------------------------------------------------------


def test_clustered_interval_is_wider_than_wilson_when_questions_repeat():
    single = accuracy([float(v % 2) for v in range(20)], [f"v{v}" for v in range(20)])
    repeated = accuracy([float(v % 2) for v in range(20)] * 10, [f"v{v}" for v in range(20)] * 10)
    assert (single.method, repeated.method) == ("wilson", "clustered wilson")
    assert (single.low, single.high) == wilson(10, 20)
    low, high = wilson(100, 200)
    assert repeated.high - repeated.low > 2.5 * (high - low)
    # Ten copies of a question tell nothing new.
    assert repeated.high - repeated.low == pytest.approx(single.high - single.low, abs=0.05)


def test_the_order_of_the_questions_does_not_matter():
    scores, videos = ragged()
    rows = list(zip(scores, videos))
    random.Random(1).shuffle(rows)
    assert accuracy(*zip(*rows)) == accuracy(scores, videos)


@pytest.mark.parametrize(
    ("scores", "videos", "count"),
    [([0.0, 1.0] * 4, ["only"] * 8, (0.5, 1)), ([1.0] * 8, [f"v{i // 2}" for i in range(8)], (4, 4))],
)
def test_no_spread_between_videos_is_not_certainty(scores, videos, count):
    result = accuracy(scores, videos)
    assert result.method == "wilson over videos"
    assert (result.low, result.high) == wilson(*count)


def test_fractions_have_narrower_intervals_than_coins():
    rng, videos = np.random.default_rng(2), [f"v{i // 3}" for i in range(90)]
    near = accuracy(list(rng.uniform(0.5, 0.7, 90)), videos)
    coins = accuracy(list((rng.random(90) < 0.6).astype(float)), videos)
    assert near.low < near.value < near.high and near.high - near.low < (coins.high - coins.low) / 3
    assert near.correct == pytest.approx(90 * near.value)


def test_no_scores_are_refused():
    with pytest.raises(ValueError, match="no scores"):
        accuracy([], [])


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (0, 7), (3, 7), (7, 7), (50, 103), (1548, 1549)])
def test_wilson_equals_scipy(correct, n):
    expected = stats.binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ValueError, match="got correct = 3, n = 2"):
        wilson(3, 2)


# --- differences -----------------------------------------------------------------------------------------------------


def test_a_paired_difference_equals_a_loop():
    a, videos = ragged(seed=1)
    b, _ = ragged(seed=2)
    result = paired(a, b, videos)
    gains = [x - y for x, y in zip(a, b)]
    assert (result.n, result.num_videos) == (len(a), 6)
    assert result.difference == pytest.approx(sum(gains) / len(gains))
    assert result.difference == pytest.approx(result.value_a - result.value_b)
    assert (result.wins, result.ties, result.losses) == (gains.count(1), gains.count(0), gains.count(-1))
    table = [[0, result.wins], [result.losses, 0]]
    assert result.mcnemar == pytest.approx(exact_mcnemar(table, exact=True).pvalue)
    opposite = paired(b, a, videos)
    assert (opposite.difference, opposite.p) == pytest.approx((-result.difference, result.p))
    assert (opposite.low, opposite.high) == pytest.approx((-result.high, -result.low))


def test_the_interval_leaves_zero_out_where_p_is_below_five_per_cent():
    rng, seen = random.Random(5), set()
    for _ in range(60):
        videos = [f"v{i // 3}" for i in range(60)]
        a = [float(rng.random() < 0.7) for _ in videos]
        b = [float(rng.random() < 0.5) for _ in videos]
        result = paired(a, b, videos)
        seen.add(result.p < 0.05)
        assert (result.p < 0.05) == (not result.low <= 0 <= result.high)
    assert seen == {True, False}


def test_one_question_a_video_is_scipys_paired_t_test():
    rng = np.random.default_rng(4)
    a, b = rng.random(40), rng.random(40)
    result, expected = paired(a, b, [f"v{i}" for i in range(40)]), stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert (result.p, result.low, result.high) == pytest.approx((expected.pvalue, interval.low, interval.high))
    assert result.mcnemar is None  # which is for right and wrong alone


def test_pairs_without_spread():
    videos = [f"v{i}" for i in range(10)]
    same = paired([1.0] * 10, [1.0] * 10, videos)
    assert (same.difference, same.p, same.mcnemar, same.detectable) == (0, 1, 1, None)
    assert (same.low, same.high) == pytest.approx((-wilson(0, 10)[1], wilson(0, 10)[1]))
    always = paired([1.0] * 10, [0.0] * 10, videos)
    assert always.low > 0 and always.p == pytest.approx(2 * 0.5**10)
    one_video = paired([1.0], [0.0], ["v"])
    assert one_video.low < 0 < one_video.difference == one_video.high == 1 and one_video.p == 1


@pytest.mark.parametrize(("a_only", "b_only"), [(0, 0), (1, 0), (5, 5), (2, 9), (30, 14)])
def test_mcnemar_equals_the_binomial_sum(a_only, b_only):
    n, smaller = a_only + b_only, min(a_only, b_only)
    tail = sum(math.comb(n, k) for k in range(smaller + 1)) / 2**n
    assert mcnemar(a_only, b_only) == pytest.approx(min(1.0, 2 * tail)) == mcnemar(b_only, a_only)


def test_holm_known_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, None, 0.04]) == [0.02, None, 0.04] and holm([0.9, 0.8]) == [1, 1] and holm([]) == []
    ps = list(np.random.default_rng(0).random(50) ** 4)
    assert holm(ps) == pytest.approx(list(multipletests(ps, method="holm")[1]))


def test_the_detectable_difference_is_found_four_times_in_five():
    rng, clusters = np.random.default_rng(6), 30
    counts = 1 + rng.geometric(1 / 5, size=(6000, clusters)).astype(float)
    noise = rng.normal(0, 0.3, size=counts.shape) + rng.normal(size=counts.shape) * 0.5 / np.sqrt(counts)
    _, errors, degrees = clustered_moments(counts * noise, counts)
    least = detectable(float(np.median(errors)), float(np.median(degrees)))
    mean, error, degrees = clustered_moments(counts * (noise + least), counts)
    found = np.abs(mean) / error > stats.t.ppf(0.975, degrees)
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)
    assert detectable(0.01, 10**6) == pytest.approx(0.01 * (QUANTILE + stats.norm.ppf(0.8)), rel=1e-4)


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_seeds_and_videos_drawn_have_the_spread_of_a_bootstrap_of_both():
    rng = np.random.default_rng(1)
    counts = np.broadcast_to(rng.integers(1, 6, size=60).astype(float), (12, 60))
    chance = 0.6 + rng.normal(0, 0.1, size=(12, 1)) + rng.normal(0, 0.2, size=60)
    sums = rng.binomial(counts.astype(int), np.clip(chance, 0, 1)).astype(float)
    means = []
    for _ in range(3000):
        rows, columns = rng.integers(12, size=12), rng.integers(60, size=60)
        means.append((sums[rows][:, columns].sum(axis=1) / counts[rows][:, columns].sum(axis=1)).mean())
    found = crossed(sums, counts)
    assert found.value == pytest.approx((sums.sum(axis=1) / counts.sum(axis=1)).mean())
    assert found.standard_error == pytest.approx(np.std(means), rel=0.1)


@pytest.mark.parametrize("num_seeds, spread", [(3, 0.1), (3, 0.4), (5, 0.4)])
def test_intervals_over_seeds_cover_what_they_say(num_seeds, spread):
    rng, inside = np.random.default_rng([num_seeds, int(10 * spread)]), 0
    draws = rng.normal(0.5, math.hypot(spread, 1.0), 10**6)
    true = np.mean(1 / (1 + np.exp(-draws)))
    videos = [f"v{v:02d}" for v in np.repeat(np.arange(40), 3)]
    for _ in range(500):
        chance = 0.5 + rng.normal(0, spread, (num_seeds, 1)) + np.repeat(rng.normal(0, 1.0, 40), 3)
        found = seeds_accuracy(rng.random(chance.shape) < 1 / (1 + np.exp(-chance)), videos)
        inside += found.low <= true <= found.high
    assert 0.92 <= inside / 500 <= 0.985


def test_seeds_are_paired_one_by_one():
    videos = [f"v{i // 4}" for i in range(40)]
    rng = np.random.default_rng(3)
    base = (rng.random((3, 40)) < 0.5).astype(float)
    better = np.maximum(base, rng.random((3, 40)) < 0.3)
    found = paired(better, base, videos)
    assert found.wins == (better - base).sum() and found.losses == 0 and found.mcnemar is None and found.n == 40
    assert found.difference == pytest.approx((better - base).mean()) and found.low > 0


# --- budgets and fronts ----------------------------------------------------------------------------------------------


def test_budgets_are_equal_within_a_tolerance():
    values = {"a": 100.0, "b": 104.0, "c": 108.0, "d": 200.0, "e": 0.0, "f": 0.0}
    assert equal_within(values, 0.05) == [["e", "f"], ["a", "b"], ["b", "c"]]
    assert equal_within({"a": 1.0}, 0.05) == []


def test_the_front_is_what_no_other_point_beats():
    points = {
        "cheap": (1, 0.5),
        "worse": (2, 0.4),
        "good": (2, 0.6),
        "same": (2, 0.6),
        "dear": (9, 0.6),
        "top": (9, 0.7),
    }
    assert pareto_front(points) == ["cheap", "good", "same", "top"]

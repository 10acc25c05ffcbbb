"""Statistics against slow references, scipy and values worked out by hand."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from xcomp.compare import statistics
from xcomp.compare.statistics import accuracy, cluster_interval, holm, mcnemar, paired, summarise, wilson


def record(arm, question, video, correct, **fields):
    defaults = {
        "category": "plot", "answer": 1, "prediction": 1 if correct else 0, "num_frames": 8, "tokens_in": 128,
        "tokens_out": 8, "macs": {"vision": 1000}, "seconds": {"vision": 2.0}, "seconds_amortised": {"vision": 0.5},
        "peak_memory": {"host": 7, "device": None}, "error": None,
    }  # fmt: skip
    return {"arm": arm, "question_id": question, "video": video, "correct": correct, **defaults, **fields}


def ragged(arm="a", seed=0, videos=6):
    """Videos with one to four questions, right with a chance that differs from video to video."""
    rng = random.Random(seed)
    return [
        record(arm, f"v{v}q{q}", f"v{v}", rng.random() < (v + 1) / (videos + 1))
        for v in range(videos)
        for q in range(1 + v % 4)
    ]


def test_bootstrap_equals_a_loop_over_the_same_draws():
    records = ragged()
    videos = sorted({r["video"] for r in records})
    shares = []
    for draw in np.random.default_rng(3).integers(len(videos), size=(200, len(videos))):
        drawn = [r for v in draw for r in records if r["video"] == videos[v]]
        shares.append(sum(r["correct"] for r in drawn) / len(drawn))
    result = accuracy(records, resamples=200, seed=3)
    assert result.method == "bootstrap"
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])), abs=1e-12)
    assert result.value == sum(r["correct"] for r in records) / len(records)


def test_bootstrap_in_chunks_and_in_any_order_is_the_same(monkeypatch):
    records = ragged()
    whole = summarise(records)
    assert summarise(records) == whole
    assert summarise(random.Random(1).sample(records, len(records)))[0].accuracy == whole[0].accuracy
    monkeypatch.setattr(statistics, "_CHUNK", 64)
    assert summarise(records) == whole


def test_clustered_interval_is_wider_than_wilson_when_questions_repeat():
    videos = [(f"v{v}", v % 2 == 0) for v in range(20)]
    repeated = [record("a", f"{v}q{q}", v, right) for v, right in videos for q in range(10)]
    one_each = [record("a", v, v, right) for v, right in videos]
    clustered, single = accuracy(repeated), accuracy(one_each)
    assert single.method == "wilson"
    assert (single.low, single.high) == wilson(10, 20)
    low, high = wilson(100, 200)
    assert clustered.high - clustered.low > 2.5 * (high - low)
    # Ten copies of a question tell nothing new.
    assert clustered.high - clustered.low == pytest.approx(single.high - single.low, abs=0.05)


def test_bootstrap_agrees_with_the_binomial_it_estimates():
    sums = np.array([1.0] * 60 + [0.0] * 40)
    low, high = cluster_interval(sums, np.ones(100), resamples=20000)
    assert (low, high) == pytest.approx(tuple(stats.binom.ppf([0.025, 0.975], 100, 0.6) / 100), abs=0.011)


@pytest.mark.parametrize(
    ("records", "count"),
    [
        ([record("a", f"q{i}", "only", i % 2 == 0) for i in range(8)], (0.5, 1)),
        ([record("a", f"q{i}", f"v{i // 2}", True) for i in range(8)], (4, 4)),
    ],
)
def test_no_spread_between_videos_is_not_certainty(records, count):
    result = accuracy(records)
    assert result.method == "wilson over videos"
    assert (result.low, result.high) == wilson(*count)


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (0, 7), (3, 7), (7, 7), (50, 103), (1548, 1549)])
def test_wilson_equals_scipy(correct, n):
    expected = stats.binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ValueError, match="got correct = 3, n = 2"):
        wilson(3, 2)


@pytest.mark.parametrize(("a_only", "b_only"), [(0, 0), (1, 0), (5, 5), (2, 9), (30, 14)])
def test_mcnemar_equals_the_binomial_sum(a_only, b_only):
    n, smaller = a_only + b_only, min(a_only, b_only)
    tail = sum(math.comb(n, k) for k in range(smaller + 1)) / 2**n
    assert mcnemar(a_only, b_only) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(b_only, a_only) == pytest.approx(mcnemar(a_only, b_only))


def test_holm_known_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_paired_difference_equals_a_loop():
    a, b = ragged("a", seed=1), ragged("b", seed=2)
    result = paired(a, b[:-1], resamples=200, seed=5)
    assert (result.a, result.b, result.n, result.num_videos) == ("a", "b", len(a) - 1, 6)
    gains = {x["question_id"]: x["correct"] - y["correct"] for x, y in zip(a, b[:-1], strict=False)}
    assert result.difference == pytest.approx(sum(gains.values()) / len(gains))
    assert result.difference == pytest.approx(result.accuracy_a - result.accuracy_b)
    assert result.a_only == sum(g == 1 for g in gains.values())
    assert result.b_only == sum(g == -1 for g in gains.values())
    means = []
    for draw in np.random.default_rng(5).integers(6, size=(200, 6)):
        drawn = [gain for v in draw for key, gain in gains.items() if key.startswith(f"v{v}q")]
        means.append(sum(drawn) / len(drawn))
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)
    opposite = paired(b[:-1], a, resamples=200, seed=5)
    assert (opposite.difference, opposite.p) == (-result.difference, result.p)


def test_paired_without_spread():
    same = paired([record("a", f"q{i}", f"v{i}", True) for i in range(10)],
                  [record("b", f"q{i}", f"v{i}", True) for i in range(10)])  # fmt: skip
    assert (same.difference, same.p) == (0, 1)
    assert (same.low, same.high) == pytest.approx((-wilson(0, 10)[1], wilson(0, 10)[1]))
    one_video = paired([record("a", "q", "v", True)], [record("b", "q", "v", False)])
    assert one_video.low < 0 < one_video.difference == one_video.high == 1


def test_paired_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="no question in common"):
        paired([record("a", "q1", "v", True)], [record("b", "q2", "v", True)])
    with pytest.raises(ValueError, match="different right answers"):
        paired([record("a", "q1", "v", True)], [record("b", "q1", "v", True, answer=2)])


def test_summary_counts_errors_as_wrong_and_leaves_them_out_of_costs():
    failed = {"error": "cannot decode", "prediction": None, "macs": None, "seconds": {"vision": 99.0}, "num_frames": 0}
    records = [
        record("b", "q1", "v1", True, macs={"vision": 10}, seconds={"vision": 0.5, "answer": 0.5}),
        record("b", "q2", "v2", True, macs={"vision": 30}, seconds={"vision": 2.0, "answer": 0.0}, category="order"),
        record("b", "q3", "v3", False, macs={"vision": 20}, seconds={"vision": 3.5, "answer": 2.5}, prediction=None),
        record("b", "q4", "v4", True, **failed),  # claims to be right: an error never is
        record("a", "q1", "v1", False),
    ]
    first, second = summarise(records)
    assert (first.arm, second.arm) == ("b", "a")
    assert (first.accuracy.correct, first.accuracy.n, first.errors, first.unanswered) == (2, 4, 1, 1)
    assert (first.macs, first.total_macs, first.num_frames) == ({"vision": 20}, 20, 8)
    assert (first.seconds, first.total_seconds) == ({"vision": 2, "answer": 1}, 3)
    assert (first.seconds_amortised, first.peak_memory) == ({"vision": 0.5}, {"host": 7})
    assert first.seconds_quartiles == (1.5, 4.0)
    assert {name: (c.correct, c.n) for name, c in first.categories.items()} == {"order": (1, 1), "plot": (1, 3)}


def test_summary_of_an_arm_that_never_ran():
    (summary,) = summarise([record("a", "q1", "v1", False, error="no memory")])
    assert summary.accuracy.value == 0
    assert math.isnan(summary.total_macs) and math.isnan(summary.total_seconds) and summary.peak_memory == {}


def test_summary_refuses_no_records_and_repeated_questions():
    with pytest.raises(ValueError, match="no records"):
        summarise([])
    with pytest.raises(ValueError, match="'q1' twice"):
        summarise([record("a", "q1", "v", True), record("a", "q1", "v", False)])

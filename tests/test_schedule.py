"""Schedules and keep rules against the method's printed numbers and slow versions written out here."""

import itertools
import math
from fractions import Fraction

import pytest

import xcomp
from xcomp.schedule import RULES, check_counts, keep_slots, token_counts

NEAREST = [16, 16, 16, 15, 15, 14, 14, 13, 12, 12, 11, 10, 9, 9, 8, 7, 6, 5, 5, 4, 3, 3, 2, 2, 1, 1, 1, 1]
CEIL = [16, 16, 16, 16, 15, 15, 14, 14, 13, 12, 11, 11, 10, 9, 8, 7, 7, 6, 5, 4, 4, 3, 3, 2, 2, 2, 2, 1]
UNIFORM_REMOVAL = [8, 4, 13, 6, 11, 1, 15, 3, 10, 7, 14, 2, 9, 12, 5]  # of 16, 1-based


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding, printed", [("nearest", NEAREST), ("ceil", CEIL)])
def test_cosine_for_16_tokens_and_28_layers(rounding, printed):
    assert token_counts("cosine", 28, 16, rounding=rounding) == printed


def test_mean_of_the_default_schedule():
    counts = token_counts("cosine", 28, 16)
    assert sum(counts) / 28 == 8.25
    assert round(sum(n * n for n in counts) / 28 / 16**2, 3) == 0.376


@pytest.mark.parametrize(
    "layers, tokens", [(1, 1), (1, 7), (2, 16), (3, 5), (3, 144), (4, 8), (12, 16), (28, 144), (32, 5)]
)
def test_cosine_equals_the_formulas(layers, tokens):
    """Both formulas as they are printed. Where cos(π·l/L) is rational, its float must not move the rounding."""
    exact = {Fraction(1, 3): 0.5, Fraction(1, 2): 0.0, Fraction(2, 3): -0.5, Fraction(1): -1.0}
    nearest, ceil = [], []
    for layer in range(1, layers + 1):
        cosine = exact.get(Fraction(layer, layers), math.cos(math.pi * layer / layers))
        nearest.append(1 + math.floor((tokens - 1) / 2 * (1 + cosine) + 0.5))
        ceil.append(math.ceil((tokens - 1) / 2 * cosine + (tokens + 1) / 2))
    assert token_counts("cosine", layers, tokens) == nearest
    assert token_counts("cosine", layers, tokens, rounding="ceil") == ceil
    assert nearest[-1] == ceil[-1] == 1


def test_start_and_end():
    assert token_counts("cosine", 28, 16, start=8, end=2)[-1] == 2
    assert max(token_counts("cosine", 28, 16, start=8, end=2)) == 8
    assert token_counts("cosine", 28, 32, start=16) == NEAREST


@pytest.mark.parametrize("rounding", ["nearest", "ceil"])
def test_linear_falls_by_equal_steps(rounding):
    assert token_counts("linear", 4, 17, rounding=rounding) == [13, 9, 5, 1]


def test_linear_rounds_half_up_or_always_up():
    assert token_counts("linear", 8, 5) == [5, 4, 4, 3, 3, 2, 2, 1]  # 4.5 4 3.5 3 2.5 2 1.5 1
    assert token_counts("linear", 10, 6) == [6, 5, 5, 4, 4, 3, 3, 2, 2, 1]  # 5.5 5 4.5 … 1.5 1
    assert token_counts("linear", 3, 6) == [4, 3, 1]  # 4⅓ 2⅔ 1
    assert token_counts("linear", 3, 6, rounding="ceil") == [5, 3, 1]
    assert token_counts("linear", 4, 16, start=8, end=4) == [7, 6, 5, 4]


def test_steps():
    counts = token_counts("steps", 28, 16, steps={20: 1, 10: 4})
    assert counts == [16] * 10 + [4] * 10 + [1] * 8
    assert token_counts("steps", 3, 16, start=8, steps={1: 2}) == [8, 2, 2]


def test_constant():
    assert token_counts("constant", 5, 16, end=3) == [3] * 5
    assert token_counts("constant", 2, 16) == [1, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("cosine", 4, 8, dict(start=2, end=5)), "grows from 2 to 4 tokens a frame at layer 2"),
        (("steps", 4, 8, dict(steps={1: 2, 2: 4})), "grows from 2 to 4 tokens a frame at layer 3"),
        (("cosine", 4, 8, dict(end=0)), "keeps 0 tokens a frame at layer 4; at least 1"),
        (("constant", 4, 8, dict(end=0)), "keeps 0 tokens a frame at layer 1"),
        (("constant", 4, 8, dict(end=9)), "keeps 9 tokens a frame at layer 1; a frame has 8"),
        (("cosine", 28, 8, dict(start=16)), "keeps 16 tokens a frame at layer 1; a frame has 8"),
        (("steps", 4, 8, dict(start=9, steps={1: 2})), "keeps 9 tokens a frame at layer 1; a frame has 8"),
        (("steps", 4, 8, {}), "needs 'steps'"),
        (("steps", 4, 8, dict(steps={2: 4, 6: 1})), r"name layer 6, but a step comes after one of layers 1\.\.3"),
        (("steps", 4, 8, dict(steps={4: 1})), r"name layer 4, but .* layers 1\.\.3"),
        (("steps", 4, 8, dict(steps={0: 1})), "name layer 0"),
        (("steps", 4, 8, dict(steps={1: 0})), "keeps 0 tokens a frame at layer 2"),
        (("cosin", 4, 8, {}), "unknown schedule 'cosin'; did you mean 'cosine'"),
        (("linear", 4, 8, dict(rounding="floor")), "unknown rounding 'floor'; known: nearest, ceil"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    *positional, options = arguments
    with pytest.raises(ValueError, match=message):
        token_counts(*positional, **options)


def test_check_counts_returns_what_it_is_given():
    assert check_counts((4, 4, 1), 4) == [4, 4, 1]


# --- rules ------------------------------------------------------------------------------------------------------------


def removal_order(tokens):
    """The order (1-based) in which a rule removes tokens one at a time."""
    plan = [set(range(tokens))] + [set(kept) for kept in keep_slots("uniform", range(tokens - 1, 0, -1), tokens)]
    return [(a - b).pop() + 1 for a, b in zip(plan, plan[1:])]


def slow_uniform(tokens):
    """Each time, of all sets with one token less and the last one in it, the most even one; the first of ties."""
    kept, order = tuple(range(1, tokens + 1)), []
    while len(kept) > 1:
        best, best_cost = None, math.inf
        for rest in reversed(list(itertools.combinations(kept, len(kept) - 1))):  # without the 1st, the 2nd, …
            n, cost = len(rest), 0.0
            for i in range(1, n):
                cost += (rest[i - 1] - (i / n) * tokens) ** 2
            if rest[-1] == tokens and cost < best_cost:
                best, best_cost = rest, cost
        order.append((set(kept) - set(best)).pop())
        kept = best
    return order


def test_uniform_removal_of_16_tokens():
    assert removal_order(16) == UNIFORM_REMOVAL


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 7, 8, 9, 12, 25])
def test_uniform_removal_equals_brute_force(tokens):
    assert removal_order(tokens) == slow_uniform(tokens)


def test_uniform_counts_may_skip():
    removed = set(UNIFORM_REMOVAL[:12])
    assert keep_slots("uniform", [16, 4], 16)[1] == tuple(s - 1 for s in range(1, 17) if s not in removed)


@pytest.mark.parametrize(
    "rule, counts, plan",
    [
        ("suffix", [4, 2, 2, 1], [(0, 1, 2, 3), (2, 3), (2, 3), (3,)]),
        ("prefix", [4, 3, 1], [(0, 1, 2, 3), (0, 1, 2), (0,)]),
        ("last_of_group", [4, 2, 1], [(0, 1, 2, 3), (1, 3), (3,)]),
        ("last_of_group", [2, 2, 1], [(1, 3), (1, 3), (3,)]),
    ],
)
def test_rules_on_four_tokens(rule, counts, plan):
    assert keep_slots(rule, counts, 4) == plan


def test_step_wise_ablation():
    plan = keep_slots("last_of_group", token_counts("steps", 28, 16, steps={10: 4, 20: 1}), 16)
    assert plan[9] == tuple(range(16)) and plan[10] == plan[19] == (3, 7, 11, 15) and plan[20] == plan[27] == (15,)


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"last_of_group"}))
@pytest.mark.parametrize("tokens", [1, 6, 16])
def test_every_rule_keeps_the_counts_and_never_brings_back(rule, tokens):
    counts = token_counts("cosine", 28, tokens)
    plan = keep_slots(rule, counts, tokens)
    assert [len(kept) for kept in plan] == counts
    for before, kept in zip([tuple(range(tokens)), *plan], plan):
        assert set(kept) <= set(before) and list(kept) == sorted(kept)


def test_random_follows_the_seed():
    first, same, other = (keep_slots("random", NEAREST, 16, seed=s) for s in (3, 3, 4))
    assert first == same != other
    assert keep_slots("random", NEAREST, 16) != keep_slots("suffix", NEAREST, 16)
    ends = {keep_slots("random", [1], 16, seed=s)[0] for s in range(40)}
    assert len(ends) > 8  # any token can be the last one


@pytest.mark.parametrize(
    "rule, counts, message",
    [
        ("sufix", [2], "unknown keep rule 'sufix'; did you mean 'suffix'"),
        ("last_of_group", [3], "cannot cut 8 tokens into 3 equal groups"),
        ("last_of_group", [4, 3], "cannot cut 4 tokens into 3 equal groups"),
    ],
)
def test_impossible_rules_are_refused(rule, counts, message):
    with pytest.raises(ValueError, match=message):
        keep_slots(rule, counts, 8)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("schedule", "cosin", "unknown schedule 'cosin'; did you mean 'cosine'"),
        ("rounding", "up", "unknown rounding 'up'"),
        ("end", 0, "end is 0"),
        ("steps", {"ten": 4}, "steps"),
    ],
)
@pytest.mark.parametrize("name", ["lp_comp", "uniform_drop"])
def test_wrong_options_are_refused_before_anything_runs(name, option, value, message):
    with pytest.raises(ValueError, match=f"compressor '{name}'.*{message}"):
        xcomp.load_compressor(name, **{option: value})


def test_the_rule_is_an_option_of_lp_comp_only():
    assert xcomp.load_compressor("lp_comp", rule="prefix").plan(4, 8)[-1] == (0,)
    with pytest.raises(ValueError, match="unknown keep rule 'sufix'; did you mean 'suffix'"):
        xcomp.load_compressor("lp_comp", rule="sufix")
    with pytest.raises(ValueError, match="uniform_drop' has no option 'rule'"):
        xcomp.load_compressor("uniform_drop", rule="prefix")

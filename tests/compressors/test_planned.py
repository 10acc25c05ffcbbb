"""The planned rules as plugins: what their options mean in a plan of 28 layers and 16 tokens."""

import pytest
import torch

import xcomp

COUNTS = {
    "nearest": [16, 16, 16, 15, 15, 14, 14, 13, 12, 12, 11, 10, 9, 9, 8, 7, 6, 5, 5, 4, 3, 3, 2, 2, 1, 1, 1, 1],
    "ceil": [16, 16, 16, 16, 15, 15, 14, 14, 13, 12, 11, 11, 10, 9, 8, 7, 7, 6, 5, 4, 4, 3, 3, 2, 2, 2, 2, 1],
}


@pytest.mark.parametrize("rounding", COUNTS)
def test_lp_comp_keeps_the_suffix(rounding):
    plan = xcomp.load_compressor("lp_comp", rounding=rounding).plan(28, 16)
    assert plan == [tuple(range(16 - count, 16)) for count in COUNTS[rounding]]


def test_uniform_drop_keeps_the_same_counts_spread_out():
    plan = xcomp.load_compressor("uniform_drop").plan(28, 16)
    assert [len(kept) for kept in plan] == COUNTS["nearest"]
    assert all(kept[-1] == 15 for kept in plan)
    gone = [8, 4, 13, 6, 11, 1, 15, 3, 10]  # 1-based, in this order
    assert plan[15] == tuple(slot for slot in range(16) if slot + 1 not in gone)
    assert plan == xcomp.load_compressor("lp_comp", rule="uniform").plan(28, 16)


def test_none_keeps_everything():
    rule, tokens = xcomp.load_compressor("none"), torch.randn(2, 16, 4)
    assert rule.plan(3, 16) == [tuple(range(16))] * 3
    assert rule.before_llm(tokens) is tokens


def test_random_rule_follows_its_seed():
    plans = [xcomp.load_compressor("lp_comp", rule="random", seed=seed).plan(28, 16) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert [len(kept) for kept in plans[2]] == COUNTS["nearest"]

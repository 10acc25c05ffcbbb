"""DART: the released code's pivots and choice; a slow reference, budgets and edges."""

import math

import pytest
import torch
from golden import each_case
from torch.nn.functional import cosine_similarity
from xcomp.compressors.dart import DART, find_pivots, num_taken, unlike

import xcomp
from xcomp.compressor import Budget


def rule(**options):
    return xcomp.load_compressor("dart", **options)


def marked(length, start, count):
    visual = torch.zeros(length, dtype=torch.bool)
    visual[start : start + count] = True
    return visual


@each_case("dart")
def test_equals_the_released_code(case):
    p, hidden, keys = case.params, case.inputs["normed_hidden"][0], case.inputs["keys"][0]
    visual = marked(len(hidden), p["image_start"], p["image_length"])
    pivots, text = find_pivots(keys, visual, p["pivot_image_token"], p["pivot_text_token"])
    assert pivots.tolist() == case.outputs["pivots_image"].tolist()
    assert text.tolist() == case.outputs["pivots_text"].tolist()
    num_pivots = p["pivot_image_token"] + p["pivot_text_token"]
    each = num_taken(p["image_length"], p["reduction_ratio"], num_pivots, p["max_num_trunction"])
    assert each == p["per_pivot"]
    kept = torch.cat([pivots, unlike(hidden, visual, case.outputs["pivot_order"], each)]).sort().values
    assert kept.tolist() == case.outputs["keep"].tolist()
    # ours visits the pivots in another order: as many stay, and all visual pivots do
    config = dict(visual_pivots=p["pivot_image_token"], text_pivots=p["pivot_text_token"])
    compressor = rule(ratio=p["reduction_ratio"], num_tokens=p["max_num_trunction"], **config)
    ours, values = compressor.reduce(hidden, keys, visual)
    assert values is None and visual[ours].sum() == len(kept) and set(pivots.tolist()) <= set(ours.tolist())
    assert (~visual)[ours].sum() == (~visual).sum()


def slow(hidden, keys, visual, c):
    places = [i for i in range(len(visual)) if visual[i]]
    norm = {i: sum(float(keys[h, i].abs().sum()) for h in range(len(keys))) for i in range(len(visual))}
    by_norm = lambda among, count: sorted(among, key=lambda i: (-norm[i], i))[:count]  # noqa: E731
    pivots = by_norm(places, c.visual_pivots)
    text = by_norm(range(places[-1] + 1, len(visual)), c.text_pivots)
    each = math.ceil((len(places) * (1 - c.ratio)) // (c.visual_pivots + c.text_pivots))
    taken = list(pivots)
    for pivot in pivots + text:
        left = [i for i in places if i not in taken]
        cosines = {i: float(cosine_similarity(hidden[pivot], hidden[i], dim=0)) for i in left}
        taken += sorted(left, key=lambda i: (cosines[i], i))[:each]
    return sorted(taken + [i for i in range(len(visual)) if not visual[i]])


@pytest.mark.parametrize("before, count, after", [(3, 40, 9), (0, 17, 2), (5, 8, 0), (2, 3, 4), (1, 1, 1)])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.778])
def test_chooses_as_written_out(before, count, after, ratio):
    torch.manual_seed(count)
    length = before + count + after
    hidden, keys, visual = torch.randn(length, 12), torch.randn(2, length, 6), marked(length, before, count)
    compressor = rule(ratio=ratio)
    assert compressor.reduce(hidden, keys, visual)[0].tolist() == slow(hidden, keys, visual, compressor.config)


@pytest.mark.device
def test_the_device_chooses_as_the_cpu_does(device):
    torch.manual_seed(0)
    hidden, keys, visual = torch.randn(300, 64), torch.randn(2, 300, 16), marked(300, 5, 280)
    kept, _ = rule().reduce(hidden.to(device), keys.to(device), visual.to(device))
    assert kept.device.type == device and kept.tolist() == slow(hidden, keys, visual, rule().config)


def test_identical_tokens_go_by_position():
    visual = marked(30, 2, 20)
    kept, _ = rule(ratio=0.2).reduce(torch.ones(30, 4), torch.ones(1, 30, 4), visual)
    # pivots 2..5; sixteen tokens, two a pivot, are the next eight twice over
    assert kept.tolist() == [*range(22), *range(22, 30)]
    assert num_taken(20, 0.2, 8) == 2
    kept, _ = rule(ratio=0.5).reduce(torch.ones(30, 4), torch.ones(1, 30, 4), visual)
    assert kept.tolist() == [*range(2 + 4 + 8), *range(22, 30)]


def test_more_to_keep_than_there_is_keeps_all():
    visual = marked(30, 2, 20)
    assert len(rule(num_tokens=500).reduce(torch.randn(30, 4), torch.randn(1, 30, 4), visual)[0]) == 30


def test_bfloat16_and_autocast_choose_the_same_up_to_near_ties():
    torch.manual_seed(0)
    hidden, keys, visual = torch.randn(90, 64), torch.randn(2, 90, 16), marked(90, 5, 70)
    exact = rule(ratio=0.6).reduce(hidden, keys, visual)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rule(ratio=0.6).reduce(hidden, keys, visual)[0], exact)
    short = rule(ratio=0.6).reduce(hidden.bfloat16(), keys.bfloat16(), visual)[0]
    assert len(short) == len(exact) and len(set(short.tolist()) & set(exact.tolist())) >= len(exact) - 4


@pytest.mark.parametrize("num_layers", [4, 28, 32])
@pytest.mark.parametrize("budget", [Budget(0.6), Budget(1.0), Budget(0.1, "final"), Budget(0.25, "final")])
def test_budgets_are_met_up_to_the_number_of_pivots(num_layers, budget):
    config = DART.for_budget(DART.Config(num_tokens=7), budget, num_layers, 196)
    kept = min(1960, 4 + 8 * num_taken(1960, config.ratio, 8))
    counts = [1960] * 2 + [kept] * (num_layers - 2)
    got = counts[-1] if budget.of == "final" else sum(counts) / num_layers
    assert abs(got / 1960 - budget.keep) < 8 / 1960


def test_budgets_out_of_reach_name_the_nearest():
    with pytest.raises(ValueError, match="dart: a budget of 0.05 of layers .* nearest possible is 0.072") as error:
        DART.for_budget(DART.Config(), Budget(0.05), 28, 196)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="budget of 0.5 of input .* nearest possible is 1"):
        DART.for_budget(DART.Config(), Budget(0.5, "input"), 28, 196)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"visual_pivots": 0}, "visual_pivots is 0"),
        ({"text_pivots": -1}, "text_pivots is -1"),
        ({"layer": -1}, "layer numbers from 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        rule(**options)
    assert "\n" not in str(error.value)


def test_layers_that_the_model_has_not_are_refused():
    with pytest.raises(ValueError, match=r"dart: layers \[4(.0)?\] are \[4\] of 4 layers"):
        rule(layer=4).plan(4, 8)

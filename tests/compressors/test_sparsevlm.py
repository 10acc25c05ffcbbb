"""SparseVLM: the released code's raters, scores, choices and merged tokens; a slow reference, budgets and edges."""

import math

import pytest
import torch
from conftest import relative_error
from golden import each_case
from xcomp.compressors.sparsevlm import (
    SparseVLM,
    choose_heads,
    choose_raters,
    merge,
    num_kept,
    rater_scores,
    recycle,
)

import xcomp
from xcomp.compressor import Budget


def rule(**options):
    return xcomp.load_compressor("sparsevlm", **options)


def marked(length, start, count):
    visual = torch.zeros(length, dtype=torch.bool)
    visual[start : start + count] = True
    return visual


@each_case("sparsevlm", "case")
def test_equals_the_released_code(case):
    p, embeddings, hidden = case.params, case.inputs["embeddings"][0], case.inputs["in_hidden"][0]
    pre, count = p["pre"], p["visual"]
    visual = marked(len(hidden), pre, count)
    text = embeddings[pre + count : pre + count + p["text"]]
    assert relative_error(rater_scores(embeddings[visual], text), case.outputs["rater_scores"]) < 1e-5
    raters = choose_raters(embeddings[visual], text)
    assert torch.equal(raters, case.outputs["raters"])
    scores = case.inputs["attention"][0][:, raters + pre + count][..., visual].mean((0, 1))
    assert relative_error(scores, case.outputs["scores"]) < 1e-5
    kept = scores.topk(num_kept(p["keep"] / count, count, count)).indices.sort().values
    assert torch.equal(kept, case.outputs["keep_visual"])
    recycled = recycle(scores, kept, SparseVLM.Config().recycle)
    assert torch.equal(recycled, case.outputs["recycled_visual"])
    others = [i for i in range(count) if i not in kept.tolist()]
    assert [others.index(i) for i in recycled.tolist()] == case.outputs["recycled_relative"].tolist()
    values, centres, joined = merge(hidden[visual][recycled], SparseVLM.Config().cluster)
    assert len(centres) == p["merged"] and torch.equal(joined, case.outputs["assignment"])
    assert relative_error(values, case.outputs["merged_tokens"]) < 1e-5
    compressor = rule(layers=[1], keep=[p["keep"] / count])
    order, out = compressor.reduce(hidden, visual, scores, 0, count)
    assert relative_error(out, case.outputs["out_hidden"]) < 1e-5
    assert order[:pre].tolist() == list(range(pre)) and len(order) == len(case.outputs["position_ids"])
    assert order[pre:][: len(kept)].tolist() == (kept + pre).tolist()
    assert order[-(len(hidden) - pre - count) :].tolist() == list(range(pre + count, len(hidden)))


@each_case("sparsevlm", "plus_heads")
def test_chooses_the_heads_of_version_2(case):
    p = case.params
    attention = case.inputs["attention"][0][:, case.inputs["rater_positions"]]
    heads = choose_heads(attention[..., p["pre"] : p["pre"] + p["visual"]], p["heads_kept"])
    assert torch.equal(heads, case.outputs["heads"])


def slow_clusters(x, count):
    """DPC-KNN token by token: centres and each token's."""
    n = len(x)
    d = [[float((x[i] - x[j]).double().norm()) / x.shape[1] ** 0.5 for j in range(n)] for i in range(n)]
    density = [math.exp(-sum(v * v for v in sorted(row)[:count]) / count) for row in d]
    far = max(max(row) for row in d)
    apart = [min((d[i][j] for j in range(n) if density[j] > density[i]), default=far) for i in range(n)]
    centres = sorted(range(n), key=lambda i: (-apart[i] * density[i], i))[:count]
    joined = [centres.index(i) if i in centres else min(range(count), key=lambda c: d[i][centres[c]]) for i in range(n)]
    return centres, joined


def slow(hidden, visual, scores, keep, num_visual):
    places = [i for i in range(len(visual)) if visual[i]]
    falling = sorted(range(len(places)), key=lambda i: (-float(scores[i]), i))
    count = min(max(1, round(keep * num_visual)), len(places) - 1)
    kept, left = sorted(falling[:count]), falling[count:]
    recycled = left[: int(len(left) * 0.3) + 1]
    tokens = hidden[[places[i] for i in recycled]]
    clusters = min(len(recycled) // 10 + 1, len(recycled))
    centres, joined = slow_clusters(tokens, clusters)
    means = [tokens[[i for i, c in enumerate(joined) if c == k]].mean(0) for k in range(clusters)]
    last = places[kept[-1]]
    stay = [i for i in range(len(visual)) if not visual[i] or i in {places[k] for k in kept}]
    order = [i for i in stay if i <= last] + [places[recycled[c]] for c in centres] + [i for i in stay if i > last]
    at = len([i for i in stay if i <= last])
    values = hidden[order].clone()
    values[at : at + clusters] = torch.stack(means)
    return order, values


@pytest.mark.parametrize("before, count, after", [(3, 60, 5), (0, 12, 2), (2, 2, 1), (1, 150, 0)])
@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_reduces_as_written_out(before, count, after, keep):
    torch.manual_seed(count)
    length = before + count + after
    hidden, scores, visual = torch.randn(length, 6), torch.rand(count), marked(length, before, count)
    order, values = rule(layers=[1], keep=[keep]).reduce(hidden, visual, scores, 0, count)
    expected, means = slow(hidden, visual, scores, keep, count)
    assert order.tolist() == expected
    torch.testing.assert_close(values, means)


@pytest.mark.device
def test_the_device_chooses_and_merges_as_the_cpu_does(device):
    torch.manual_seed(0)
    hidden, scores, visual = torch.randn(100, 16), torch.rand(90), marked(100, 4, 90)
    inputs = [t.to(device) for t in (hidden, visual, scores)]
    order, values = rule(layers=[1], keep=[0.2]).reduce(*inputs, 0, 90)
    expected, means = slow(hidden, visual, scores, 0.2, 90)
    assert order.tolist() == expected
    torch.testing.assert_close(values.cpu(), means)
    raters = choose_raters(hidden[visual].to(device), hidden[~visual].to(device))
    assert raters.tolist() == choose_raters(hidden[visual], hidden[~visual]).tolist()


def test_text_between_frames_stays_where_it_is():
    visual = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0], dtype=torch.bool)
    scores, hidden = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.arange(8.0).unsqueeze(1)
    order, values = rule(layers=[1], keep=[0.5]).reduce(hidden, visual, scores, 0, 4)
    assert order.tolist() == [0, 1, 2, 4, 3, 6, 7] and values[:, 0].tolist() == order.tolist()


def test_one_token_stays_and_identical_tokens_go_by_position():
    order, values = rule().reduce(torch.randn(4, 8), marked(4, 1, 1), torch.ones(1), 0, 1)
    assert order.tolist() == [0, 1, 2, 3] and values is None
    hidden, visual = torch.ones(44, 8), marked(44, 2, 40)
    order, values = rule(layers=[1], keep=[0.25]).reduce(hidden, visual, torch.ones(40), 0, 40)
    assert order.tolist() == [*range(12), 12, 13, 42, 43] and torch.equal(values, torch.ones(16, 8))
    # one question token, or several of one kind: all rate
    assert choose_raters(hidden, torch.ones(1, 8)).tolist() == [0]
    assert choose_raters(hidden, torch.ones(2, 8)).tolist() == [0, 1]


def test_raters_in_blocks_are_the_same():
    torch.manual_seed(0)
    visual, text = torch.randn(9000, 8), torch.randn(5, 8)
    torch.testing.assert_close(rater_scores(visual, text), (visual @ text.T).softmax(1).mean(0))


def test_gradients_flow_through_the_means():
    torch.manual_seed(0)
    hidden, visual = torch.randn(40, 8, requires_grad=True), marked(40, 2, 30)
    order, values = rule(layers=[1], keep=[0.2]).reduce(hidden, visual, torch.rand(30), 0, 30)
    values.square().sum().backward()
    assert hidden.grad.isfinite().all() and (hidden.grad.abs().sum(1) > 0).sum() == 10 + 6 + int(24 * 0.3) + 1


def test_bfloat16_and_autocast_choose_the_same_up_to_near_ties():
    torch.manual_seed(0)
    hidden, visual, scores = torch.randn(90, 32), marked(90, 5, 80), torch.rand(80)
    order, values = rule(layers=[1], keep=[0.3]).reduce(hidden, visual, scores, 0, 80)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = rule(layers=[1], keep=[0.3]).reduce(hidden, visual, scores, 0, 80)
        assert torch.equal(rater_scores(hidden, hidden[:4]), rater_scores(hidden.float(), hidden[:4].float()))
    assert torch.equal(again[0], order) and torch.equal(again[1], values)
    short, less = rule(layers=[1], keep=[0.3]).reduce(hidden.bfloat16(), visual, scores, 0, 80)
    assert less.dtype == torch.bfloat16 and len(short) == len(order)
    assert len(set(short.tolist()) ^ set(order.tolist())) <= 2


def simulated(config, n, num_layers):
    """Tokens at each layer."""
    counts, present, stages = [], n, SparseVLM(config).stages(num_layers)
    for layer in range(1, num_layers + 1):
        counts.append(present)
        if layer in stages:
            kept = num_kept(config.keep[stages.index(layer)], n, present)
            recycled = int((present - kept) * config.recycle) + 1
            present = kept + min(recycled // config.cluster + 1, recycled)
    return counts


@pytest.mark.parametrize("num_layers", [4, 28, 32])
@pytest.mark.parametrize(
    "keep, of", [(0.5, "layers"), (0.65, "layers"), (0.95, "layers"), (0.1, "final"), (0.9, "final")]
)
def test_budgets_are_met_up_to_a_few_clusters(num_layers, keep, of):
    n = 19600
    config = SparseVLM.for_budget(SparseVLM.Config(), Budget(keep, of), num_layers, 196)
    counts = simulated(config, n, num_layers)
    got = counts[-1] if of == "final" else sum(counts) / num_layers
    assert abs(got / n - keep) < 6 / n
    assert all(a >= b for a, b in zip(counts, counts[1:]))


def test_the_table_of_the_released_code_is_the_default():
    counts = simulated(SparseVLM.Config(), 576, 32)
    assert [counts[i] for i in (2, 3, 7, 16)] == [576, 300 + 9, 200 + 4, 110 + 3]


def test_budgets_out_of_reach_name_the_nearest():
    message = r"sparsevlm: a budget of 0.09 of layers cannot be met: .* nearest possible is (0\.\d+)"
    with pytest.raises(ValueError, match=message) as error:
        SparseVLM.for_budget(SparseVLM.Config(), Budget(0.09), 32, 196)
    assert "\n" not in str(error.value)
    nearest = float(str(error.value).rsplit(" ", 1)[1])
    config = SparseVLM.for_budget(SparseVLM.Config(), Budget(nearest), 32, 196)
    assert abs(sum(simulated(config, 19600, 32)) / 32 / 19600 - nearest) < 6 / 19600
    with pytest.raises(ValueError, match="budget of 0.5 of input .* nearest possible is 1"):
        SparseVLM.for_budget(SparseVLM.Config(), Budget(0.5, "input"), 32, 196)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": [2]}, "must be as many"),
        ({"layers": [0, 1, 2]}, "layer numbers from 1"),
        ({"keep": [0.2, 0.3, 0.1]}, "never grow"),
        ({"keep": [1.2, 0.3, 0.1]}, "never grow"),
        ({"recycle": 1.5}, "recycle is 1.5"),
        ({"cluster": 0}, "cluster is 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        rule(**options)
    assert "\n" not in str(error.value)


def test_layers_that_the_model_has_not_are_refused():
    with pytest.raises(ValueError, match=r"sparsevlm: layers .* must ascend within 1\.\.3"):
        rule(layers=[1, 2, 4]).plan(4, 8)

"""FrameFusion: the released code's similarities, merges and whole lives; a slow reference, budgets and edges."""

import pytest
import torch
from conftest import relative_error
from golden import each_case
from torch.nn.functional import cosine_similarity
from xcomp.compressors.framefusion import FrameFusion, Progress, left_over, merge_runs, similarity_by_patch, sparsity

import xcomp
from xcomp.compressor import Budget


def rule(**options):
    return xcomp.load_compressor("framefusion", **options)


def never():
    raise AssertionError("attention is asked only to prune")


@each_case("framefusion", "merge")
def test_equals_one_released_merge(case):
    hidden, slot = case.inputs["hidden"][0], case.inputs["patch_type"][0]
    similarity, order = similarity_by_patch(hidden, slot)
    torch.testing.assert_close(similarity, case.outputs["similarity_by_patch"][0], rtol=1e-5, atol=1e-6)
    assert torch.equal(order, case.outputs["token_index_by_patch"][0])
    merge = similarity >= case.params["similarity_lower_bound"]
    assert torch.equal(merge.nonzero()[:, 0], case.outputs["merge_index_by_patch"])
    kept, values = merge_runs(hidden, slot, order, merge)
    assert torch.equal(kept, case.outputs["keep"])
    assert torch.equal(kept, case.outputs["keep_mask"][0].nonzero()[:, 0])
    assert relative_error(values, case.outputs["merged"][0]) < 1e-5


@each_case("framefusion", "life")
def test_equals_a_whole_released_life(case):
    p, slot, at = case.params, case.inputs["patch_type"][0], torch.arange(case.inputs["patch_type"].shape[1])
    compressor = rule(
        cost=p["cost"], threshold=p["similarity_lower_bound"], least_merged=p["ratio_lower_bound"], released=True
    )
    assert compressor.num_layers(4) == p["num_layers_constant"]
    hidden, progress = case.inputs["hidden"][0], Progress()
    for call, told in enumerate(p["calls"]):
        assert len(at) == told["tokens_in"]
        before = {"finish_merging": progress.merging_done, "finish_pruning": progress.done}
        assert before == told["before"]
        if call:
            # noise goes on what the call before left
            hidden = hidden + case.inputs[f"noise{call}"][at]
        row = case.inputs[f"attention{call}"][0].mean(0)[0]
        found = compressor.reduce(hidden, slot[at], lambda row=row, at=at: row[at], progress, 4)
        if found is not None:
            kept, values = found
            hidden, at = hidden[kept] if values is None else values, at[kept]
        assert torch.equal(at, case.outputs[f"keep{call}"]) and len(at) == told["tokens_out"]
        assert relative_error(hidden, case.outputs[f"hidden{call}"][0]) < 1e-4
        assert (progress.merging_done, progress.done) == (told["finish_merging"], told["finish_pruning"])
        assert progress.merged == pytest.approx(told["sparsity_list"], rel=1e-12)
    assert progress.merged == pytest.approx(case.outputs["sparsity_list"].tolist(), rel=1e-12)


def slow(hidden, slot, threshold):
    """Positions and values after all similar tokens merge, one token after the other."""
    runs, last = {}, {}  # first position of a run → positions; patch → the run and the token before
    for i, patch in enumerate(slot.tolist()):
        if patch < 0:
            runs[i] = [i]
            continue
        if patch in last and float(cosine_similarity(hidden[i], hidden[last[patch][1]], dim=0)) >= threshold:
            runs[last[patch][0]].append(i)
            last[patch] = last[patch][0], i
        else:
            runs[i] = [i]
            last[patch] = i, i
    return list(runs), torch.stack([sum(hidden[i] for i in run) / len(run) for run in runs.values()])


def video(frames, tokens, before=2, after=3, width=8, drop=0.0, seed=0):
    """Hidden states of a slowly changing video with text around it, some of its tokens gone, and each one's patch."""
    torch.manual_seed(seed)
    steps = 0.6 * torch.randn(frames, tokens, width) * torch.rand(frames, tokens, 1)
    text = torch.randn(before + after, width)
    hidden = torch.cat([text[:before], steps.cumsum(0).flatten(0, 1), text[before:]])
    slot = torch.cat([torch.full((before,), -1), torch.arange(tokens).repeat(frames), torch.full((after,), -1)])
    stay = (slot < 0) | (torch.rand(len(slot)) >= drop)
    return hidden[stay], slot[stay]


@pytest.mark.parametrize("frames, tokens", [(1, 5), (12, 1), (6, 9), (9, 4)])
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_merges_as_written_out(frames, tokens, drop):
    hidden, slot = video(frames, tokens, drop=drop)
    similarity, order = similarity_by_patch(hidden, slot)
    kept, values = merge_runs(hidden, slot, order, similarity >= 0.7)
    expected, means = slow(hidden, slot, 0.7)
    assert kept.tolist() == expected
    torch.testing.assert_close(values, means)
    assert frames == 1 or 0 < len(kept) < len(slot)


@pytest.mark.device
def test_the_device_merges_and_prunes_as_the_cpu_does(device):
    hidden, slot = video(20, 9, width=32, drop=0.3)
    row = torch.rand(len(slot))
    for progress in (Progress(), Progress(merged=[0.2], merging_done=True)):
        found = []
        for place in (device, "cpu"):
            own = Progress(list(progress.merged), progress.merging_done)
            kept, values = rule().reduce(hidden.to(place), slot.to(place), lambda p=place: row.to(p), own, 28)
            found.append((kept.tolist(), None if values is None else values.cpu()))
        (kept, values), (expected, means) = found
        assert kept == expected and (values is None) == (means is None)
        if means is not None:
            torch.testing.assert_close(values, means)


def test_similarities_in_blocks_are_the_same():
    hidden, slot = video(1500, 6, width=4)
    similarity, order = similarity_by_patch(hidden, slot)
    at = torch.randint(1, len(order), (50,))
    for i in at.tolist():
        if slot[order[i]] == slot[order[i - 1]]:
            expected = cosine_similarity(hidden[order[i]], hidden[order[i - 1]], dim=0)
            torch.testing.assert_close(similarity[i], expected)
    assert int((similarity == -2).sum()) == 6


def live(compressor, frames, tokens, num_layers, seed=0, drop=0.0):
    """A pass of the rule over hidden states that change a little: visual tokens that enter each layer's attention, and
    what its MLP sees."""
    hidden, slot = video(frames, tokens, seed=seed)
    n, progress, entered = int((slot >= 0).sum()), Progress(), []

    def call(attention):
        nonlocal hidden, slot
        found = compressor.reduce(hidden, slot, attention, progress, num_layers)
        if found is not None:
            kept, values = found
            hidden, slot = hidden[kept] if values is None else values, slot[kept]

    call(never)
    for _ in range(num_layers):
        entered.append(int((slot >= 0).sum()))
        hidden = hidden + 0.05 * torch.randn_like(hidden)
        call(lambda: torch.rand(len(slot)))
    return n, entered, progress


@pytest.mark.parametrize("num_layers", [4, 28, 36])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.6, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("keep", [0.26, 0.3, 0.5, 0.9, 1.0])
def test_the_mean_over_layers_is_the_budget(num_layers, threshold, keep):
    config = FrameFusion.for_budget(FrameFusion.Config(threshold=threshold), Budget(keep), num_layers, 40)
    n, entered, progress = live(FrameFusion(config), 25, 40, num_layers, seed=num_layers)
    assert progress.done and sorted(entered, reverse=True) == entered
    # A count is rounded once; what layers enter before the choice is known exactly.
    assert abs(sum(entered) / num_layers / n - keep) <= 1.5 / n


def test_many_small_merges_end_in_pruning_before_the_budget_is_gone():
    config = FrameFusion.Config(cost=0.3, least_merged=0.0, threshold=0.9)
    n, entered, progress = live(FrameFusion(config), 25, 40, 4, seed=3)
    assert left_over(0.3, progress.merged, 4) >= 0 and progress.done
    assert abs(sum(entered) / 4 / n - 0.3) < 1.5 / n


def test_sparsity_is_what_is_left_over():
    assert sparsity(0.3, [], 28) == pytest.approx(0.7) and sparsity(1.0, [0.5], 28) == 0
    for merged in ([0.2], [0.3, 0.1], [0.0]):
        u, share, held = sparsity(0.4, merged, 10), 1.0, 0.0
        for part in merged:
            share *= 1 - part
            held += share
        assert held + (10 - len(merged)) * share * (1 - u) == pytest.approx(4.0)


def test_enough_similar_tokens_merge_the_most_similar_of_them():
    hidden, slot = torch.ones(2 + 24, 4), torch.tensor([-1] + [0, 1, 2] * 8 + [-1])
    progress = Progress()
    kept, values = rule(cost=0.5).reduce(hidden, slot, never, progress, 28)
    # all are alike: the first 12 that may merge do, from the second frame on
    assert kept.tolist() == [0, 1, 2, 3, *range(16, 26)] and torch.equal(values, hidden[kept])
    assert progress.done and progress.merged == []
    assert rule(cost=0.5).reduce(hidden, slot, never, progress, 28) is None


@pytest.mark.parametrize("frames, tokens", [(1, 1), (1, 7), (2, 1)])
def test_next_to_nothing(frames, tokens):
    n, entered, progress = live(rule(), frames, tokens, 28)
    assert progress.done and n >= entered[0] and entered[-1] >= 1


def test_gradients_flow_through_the_means():
    hidden, slot = video(6, 5)
    hidden.requires_grad_()
    rule(threshold=0.3).reduce(hidden, slot, never, Progress(), 28)[1].square().sum().backward()
    assert hidden.grad.isfinite().all() and (hidden.grad.abs().sum(1) > 0).all()


def test_bfloat16_and_autocast_merge_the_same_up_to_near_ties():
    hidden, slot = video(8, 9, width=64)
    exact, values = rule(threshold=0.7).reduce(hidden, slot, never, Progress(), 28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = rule(threshold=0.7).reduce(hidden, slot, never, Progress(), 28)
    assert torch.equal(again[0], exact) and torch.equal(again[1], values)
    short, less = rule(threshold=0.7).reduce(hidden.bfloat16(), slot, never, Progress(), 28)
    assert less.dtype == torch.bfloat16
    similarity, order = similarity_by_patch(hidden, slot)
    differ = set(short.tolist()) ^ set(exact.tolist())
    near = set(order[(similarity - 0.7).abs() < 0.02].tolist())
    assert differ <= near


def test_budgets_out_of_reach_name_the_nearest():
    with pytest.raises(ValueError, match="framefusion: a cost of 0.02 of 28 layers .* nearest possible is 0.036") as e:
        FrameFusion.for_budget(FrameFusion.Config(), Budget(0.02), 28, 196)
    assert "\n" not in str(e.value)
    FrameFusion.for_budget(FrameFusion.Config(), Budget(0.036), 28, 196)
    for of in ("final", "input"):
        with pytest.raises(ValueError, match=f"a budget of 0.3 of {of} .* nearest possible is 0.3 of layers"):
            FrameFusion.for_budget(FrameFusion.Config(), Budget(0.3, of), 28, 196)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cost": 0.0}, "cost is 0.0"),
        ({"cost": 1.1}, "cost is 1.1"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"least_merged": -0.1}, "least_merged is -0.1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        rule(**options)
    assert "\n" not in str(error.value)

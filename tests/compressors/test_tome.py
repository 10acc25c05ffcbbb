"""ToMe against the released code and against merging done token by token."""

import json

import pytest
import torch
from golden import ROOT, each_case
from made_visual import class_of, cosines, make, visual
from xcomp.compressors.tome import layer_schedule, match, merge_every_kth, merge_pairs, merge_rounds

close = {"rtol": 1e-5, "atol": 1e-6}


@each_case("tome", "step")
def test_released_round(case):
    x, metric = case.inputs["x"], case.inputs["metric"]
    with_class = case.params["class_token"]
    pairs = match(metric, case.params["r"], class_token=with_class, released_order=True)
    for ours, theirs in zip(pairs, ("unm_idx", "src_idx", "dst_idx")):
        assert ours.tolist() == case.outputs[theirs].tolist()
    ones = torch.ones(x.shape[:2])
    merged, size, _ = merge_pairs(x, ones, *pairs, restore=False)
    torch.testing.assert_close(merged, case.outputs["merged"], **close)
    torch.testing.assert_close(size, case.outputs["size"][..., 0], **close)
    torch.testing.assert_close(merged, case.outputs["merged_plain_mean"], **close)
    source = merge_pairs(torch.eye(x.shape[1]).expand(len(x), -1, -1), ones, *pairs, restore=False)[0] > 0
    assert torch.equal(source.float(), case.outputs["source"])


@each_case("tome", "chain")
def test_released_rounds(case):
    x, size = case.inputs["x"], torch.ones(case.inputs["x"].shape[:2])
    for number, r in enumerate(case.params["r"]):
        x, size, _ = merge_rounds(x, size, x.shape[1] - r, released_order=True)
        torch.testing.assert_close(x, case.outputs[f"merged{number}"], **close)
        torch.testing.assert_close(size, case.outputs[f"size{number}"][..., 0], **close)


@each_case("tome", "kth")
def test_released_every_kth(case):
    merged, size, partner = merge_every_kth(case.inputs["x"], case.params["k"])
    assert partner.tolist() == case.outputs["dst_idx"].tolist()
    torch.testing.assert_close(merged, case.outputs["merged"], **close)
    torch.testing.assert_close(size, case.outputs["size"][..., 0], **close)


def test_released_schedules():
    path = ROOT / "baselines" / "tome.json"
    for example in json.loads(path.read_text())["parse_r_examples"] if path.is_file() else []:
        r = example["r"] if isinstance(example["r"], list) else [example["r"]]
        assert layer_schedule(example["num_layers"], *r) == example["out"]
    assert layer_schedule(1, 5) == [5]


def by_hand(tokens, target):
    """One frame's tokens as (position, vector, size), a pair at a time; float64."""
    left = [(i, v.double(), 1.0) for i, v in enumerate(tokens)]
    while len(left) > target:
        even, odd = left[::2], left[1::2]
        likeness = cosines(torch.stack([v for _, v, _ in even]), torch.stack([v for _, v, _ in odd]))
        r = min(len(left) - target, len(left) // 2)
        merging = sorted(range(len(even)), key=lambda i: -likeness[i].max().item())[:r]
        for o in range(len(odd)):
            place, vector, size = odd[o]
            for e in merging:
                if likeness[e].argmax() == o:
                    vector, size = (vector * size + even[e][1] * even[e][2]) / (size + even[e][2]), size + even[e][2]
            odd[o] = (place, vector, size)
        left = sorted([e for i, e in enumerate(even) if i not in merging] + odd, key=lambda t: t[0])
    return left


@pytest.mark.parametrize("num_frames, width, ratio", [(3, 16, 0.5), (2, 15, 0.4), (1, 9, 0.12), (4, 5, 0.9)])
def test_equals_merging_by_hand(num_frames, width, ratio):
    video = visual(num_frames, width)
    out = make("tome", ratio=ratio).compress(video, None)
    expected = [t for frame in video.frames() for t in by_hand(frame, round(ratio * width))]
    assert out.slot.tolist() == [place for place, _, _ in expected]
    torch.testing.assert_close(out.tokens, torch.stack([v for _, v, _ in expected]).float(), **close)
    assert out.size.tolist() == [s for _, _, s in expected]


def test_released_order_comes_out():
    video = visual(2, 8)
    out = make("tome", ratio=0.75, released_order=True).compress(video, None)
    expected = merge_rounds(video.frames(), torch.ones(2, 8), 6, released_order=True)
    assert torch.equal(out.tokens.view(2, 6, -1), expected[0]) and out.slot.tolist() == expected[2].flatten().tolist()
    assert out.slot.view(2, 6)[:, 2:].tolist() == [[1, 3, 5, 7]] * 2


def test_what_merged_before_weighs_more():
    video = visual(1, 4)
    first = make("tome", ratio=0.5).compress(video, None)
    again = first.from_frames(first.tokens.view(1, 2, -1)).with_tokens(first.tokens, first.size)
    whole = make("tome", ratio=0.5).compress(again, None)
    torch.testing.assert_close(whole.tokens[0], video.tokens.mean(0))
    assert whole.size.tolist() == [4.0]


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_wrong_options_are_refused(ratio):
    with pytest.raises(ValueError, match=f"^ratio is {ratio}; it must be a share above 0 and at most 1$"):
        class_of("tome").Config(ratio=ratio)

"""DyCoke against the released code, and the rule frame by frame."""

import pytest
import torch
from golden import each_case
from made_visual import class_of, cosines, make, visual
from xcomp.compressors.dycoke import keys_to_keep

from xcomp.compressor import Budget
from xcomp.visual import VisualTokens


@each_case("dycoke", "ttm")
def test_released(case):
    frames = case.inputs["x"].view(case.params["frames"], case.params["tokens_per_frame"], -1)
    rule = make("dycoke", merging_ratio=case.params["merging_ratio"], released=True)
    out = rule.compress(VisualTokens.from_frames(frames), None)
    assert out.index.tolist() == case.outputs["keep_official_order"].tolist()
    assert out.index.sort().values.tolist() == case.outputs["keep"].tolist()
    assert out.counts().tolist() == case.outputs["per_frame"].tolist()
    assert torch.equal(out.tokens, case.outputs["tokens"])


def by_hand(frames, ratio):
    keep = int((1 - ratio) * frames.shape[1])
    places = []
    for t, frame in enumerate(frames):
        other = {0: t, 1: t - 1, 2: t - 2, 3: t - 1}[t % 4]
        likeness = [cosines(frame[j : j + 1], frames[other, j : j + 1])[0, 0] for j in range(len(frame))]
        slots = sorted(sorted(range(len(frame)), key=lambda j: likeness[j])[:keep])
        places += [t * len(frame) + j for j in (range(len(frame)) if other == t else slots)]
    return places


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 7, 8, 10])
@pytest.mark.parametrize("ratio", [0.7, 0.4])
def test_default_prunes_every_group_alike(num_frames, ratio):
    video = visual(num_frames, 9)
    out = make("dycoke", merging_ratio=ratio).compress(video, None)
    assert out.index.tolist() == by_hand(video.frames(), ratio)


def test_released_needs_more_than_a_group():
    with pytest.raises(ValueError, match="needs more than 4 frames, not 4"):
        make("dycoke", released=True).compress(visual(4, 9), None)


def test_budget_has_a_floor():
    rule = class_of("dycoke")
    with pytest.raises(ValueError, match="^dycoke cannot keep 0.2, .* nearest: 0.25$"):
        rule.for_budget(rule.Config(), Budget(0.2), 28, 16)
    assert rule.for_budget(rule.Config(), Budget(0.25), 28, 16).merging_ratio == 1
    assert rule.for_budget(rule.Config(), Budget(0.475), 28, 16).merging_ratio == pytest.approx(0.7)


@pytest.mark.parametrize("num_frames", range(1, 11))
@pytest.mark.parametrize("keep", [0.25, 0.4, 0.8, 1])
def test_budget_of_any_number_of_frames(num_frames, keep):
    out = make("dycoke", keep=keep).compress(visual(num_frames, 9), None)
    whole = -(-num_frames // 4)
    assert abs(len(out) - max(keep * num_frames, whole) * 9) <= num_frames / 2


def test_keys_while_decoding():
    attention = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3, 0.05, 0.4, 0.6, 0.7, 0.15])
    kept = keys_to_keep(attention, None, None, drop=0.7)
    assert kept.nonzero()[:, 0].tolist() == [3, 7, 8]
    assert torch.equal(keys_to_keep(attention + 0.01, attention, ~kept), ~kept)
    assert keys_to_keep(attention.flip(0), attention, ~kept).nonzero()[:, 0].tolist() == [1, 2, 6]
    assert keys_to_keep(torch.ones(4), None, None, drop=0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_wrong_options_are_refused(ratio):
    with pytest.raises(ValueError, match="^merging_ratio is .*; it must be a share from 0 to 1$"):
        class_of("dycoke").Config(merging_ratio=ratio)
    with pytest.raises(ValueError, match="^keep is 0;"):
        class_of("dycoke").Config(keep=0)

"""EVS against its released functions, and the rule token by token."""

import pytest
import torch
from golden import each_case
from made_visual import class_of, cosines, make, visual
from xcomp.compressors.evs import num_kept

from xcomp.visual import VisualTokens


@each_case("evs")
def test_released(case):
    p = case.params
    width = p["H"] * p["W"] // p["spatial_merge_size"] ** 2
    assert num_kept(p["T"], width, p["q"]) == p["retained"]
    video = VisualTokens.from_frames(case.inputs["x"].view(p["T"], width, -1))
    out = make("evs", q=p["q"]).compress(video, None)
    assert out.index.tolist() == case.outputs["keep"].tolist()
    assert torch.equal(torch.zeros(len(video), dtype=torch.bool).index_fill(0, out.index, True), case.outputs["mask"])


@pytest.mark.parametrize("num_frames, width, q", [(5, 9, 0.5), (4, 6, 0.0), (3, 8, 0.9), (1, 4, 0.7), (7, 1, 0.6)])
def test_equals_the_rule_by_hand(num_frames, width, q):
    frames = visual(num_frames, width).frames()
    score = {(0, j): 255.0 for j in range(width)}
    for t in range(1, num_frames):
        for j in range(width):
            score[t, j] = 1 - cosines(frames[t, j : j + 1], frames[t - 1, j : j + 1])[0, 0].item()
    best = sorted(score, key=lambda place: -score[place])[: max(width, int(num_frames * width * (1 - q)))]
    out = make("evs", q=q).compress(visual(num_frames, width), None)
    assert list(zip(out.frame.tolist(), out.slot.tolist())) == sorted(best)


def test_a_still_video_keeps_its_first_places():
    still = VisualTokens.from_frames(visual(1, 6).frames().expand(4, -1, -1))
    assert make("evs", q=0.5).compress(still, None).index.tolist()[:6] == list(range(6))


def test_missing_patches_are_refused():
    with pytest.raises(ValueError, match="what needs whole frames must come first"):
        make("evs").compress(visual(2, 4).select(torch.arange(7)), None)


@pytest.mark.parametrize("q", [-0.1, 1.0])
def test_wrong_options_are_refused(q):
    with pytest.raises(ValueError, match="^q is .*; it must be a share of at least 0 and below 1$"):
        class_of("evs").Config(q=q)

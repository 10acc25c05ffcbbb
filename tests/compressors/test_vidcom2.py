"""VidCom² against the released code, and the rule written out in loops."""

import math

import pytest
import torch
from golden import each_case
from made_visual import class_of, make, visual
from xcomp.compressors.vidcom2 import channels, closeness, frame_shares, with_row_ends

from xcomp.visual import VisualTokens


@each_case("vidcom2")
def test_released(case):
    p = case.params
    frames = case.inputs["x"].unflatten(0, (-1, p["tokens_per_frame"]))
    chosen = channels(frames, p["channel_ratio"])
    assert chosen.tolist() == case.outputs["channels"].tolist()
    for ours, theirs in zip(closeness(frames, chosen, p["alphas"]), ("video_score", "frame_score")):
        torch.testing.assert_close(ours, case.outputs[theirs], rtol=1e-5, atol=1e-6)
    shares = frame_shares(closeness(frames, chosen, p["alphas"])[0], p["base_scale"], p["temperature"])
    torch.testing.assert_close(shares, case.outputs["scales"], rtol=1e-5, atol=0)
    options = {name: p[name] for name in ("channel_ratio", "temperature", "alphas")}
    rule = make("vidcom2", ratio=p["base_scale"], **options)
    out = rule.compress(VisualTokens.from_frames(frames), None)
    assert out.counts().tolist() == case.outputs["per_frame"].tolist()
    assert out.index.tolist() == case.outputs["keep"].tolist()
    if "grid_keep" in case.outputs:
        side = math.isqrt(p["tokens_per_frame"])
        grid_keep = with_row_ends(out.index, len(frames), (side, side), released_order=True)
        assert grid_keep.tolist() == case.outputs["grid_keep"].tolist()


def by_hand(frames, ratio, temperature=0.01):
    frames = frames.double()
    num_frames, width, dim = frames.shape
    tokens = frames.flatten(0, 1)
    variance = [(tokens[:, d] - tokens[:, d].mean()).square().mean() for d in range(dim)]
    chosen = sorted(sorted(range(dim), key=lambda d: variance[d])[: dim // 2])
    x = [[v[chosen] / v[chosen].norm() for v in frame] for frame in frames]
    of_video = sum(v for frame in x for v in frame) / len(tokens)

    def g(a, b):
        return sum(math.exp(-((a - b) ** 2).sum().item() / 2 / w) for w in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    unusual = [-sum(g(v, of_video) for v in frame) / width / temperature for frame in x]
    largest = max(unusual)
    weights = [math.exp(u - largest) for u in unusual]
    places = []
    for t, frame in enumerate(x):
        share = min(1, ratio * (1 + weights[t] / sum(weights) - 1 / num_frames))
        mean = sum(frame) / width
        scores = [g(v, of_video) + g(v, mean) for v in frame]
        best = sorted(range(width), key=lambda j: scores[j])[: max(1, round(share * width))]
        places += [t * width + j for j in sorted(best)]
    return places


@pytest.mark.parametrize("num_frames, width, ratio", [(4, 12, 0.25), (1, 9, 0.4), (6, 5, 0.05), (3, 10, 0.8)])
def test_equals_the_rule_by_hand(num_frames, width, ratio):
    video = visual(num_frames, width)
    assert make("vidcom2", ratio=ratio).compress(video, None).index.tolist() == by_hand(video.frames(), ratio)


def test_refill_gives_what_is_cut_to_the_others():
    of_video = torch.tensor([[1.0], [1.02], [1.03], [3.0]])
    cut, filled = (frame_shares(of_video, 0.8, 0.01, refill=refill) for refill in (False, True))
    assert cut.max() == 1 and cut.sum() < 3.19 and filled.sum().item() == pytest.approx(3.2) and filled.max() <= 1
    assert frame_shares(of_video, 1.0, 0.01, refill=True).tolist() == pytest.approx([1] * 4)


def test_row_ends_stand_in_their_rows():
    index = torch.tensor([0, 3, 5, 7])  # two frames of two rows of two
    assert with_row_ends(index, 2, (2, 2)).tolist() == [0, 2, 4, 5, 7, 8, 10, 11]
    assert with_row_ends(index, 2, (2, 2), released_order=True).tolist() == [0, 4, 2, 5, 7, 10, 8, 11]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 0}, "^ratio is 0;"),
        ({"channel_ratio": 2}, "^channel_ratio is 2;"),
        ({"temperature": 0}, "^temperature is 0; it must be above 0$"),
        ({"alphas": []}, "^alphas is"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        class_of("vidcom2").Config(**options)

"""Random dropping: how many stay, and that chance is the seed's."""

import pytest
import torch
from made_visual import class_of, make, visual


def test_any_tokens_of_the_video():
    video = visual(8, 16)
    out = make("random_drop", ratio=0.3).compress(video, None)
    assert len(out) == round(0.3 * 128) and len(set(out.counts().tolist())) > 1
    assert torch.equal(out.tokens, video.tokens[out.index]) and out.index.tolist() == sorted(set(out.index.tolist()))


def test_a_share_of_each_frame():
    out = make("random_drop", ratio=0.25, scope="frame").compress(visual(6, 16), None)
    assert out.counts().tolist() == [4] * 6
    assert len({tuple(out.slot.view(6, 4)[t].tolist()) for t in range(6)}) > 1


def test_ragged_frames_keep_their_shares():
    ragged = visual(3, 8).select(torch.tensor([0, 1, 2, 3, 9, 16, 17, 18, 19, 20, 23]))
    out = make("random_drop", ratio=0.5, scope="frame").compress(ragged, None)
    assert out.counts().tolist() == [2, 1, 3] and set(out.index.tolist()) <= set(ragged.index.tolist())


def test_the_seed_decides():
    video = visual(4, 16)
    chosen = [make("random_drop", seed=s).compress(video, None).index.tolist() for s in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_every_place_is_as_likely():
    video, kept = visual(1, 8), torch.zeros(8)
    for seed in range(400):
        kept[make("random_drop", seed=seed).compress(video, None).slot] += 1
    assert kept.sum() == 800 and (kept - 100).abs().max() < 40


@pytest.mark.parametrize("options, message", [({"ratio": 2}, "^ratio is 2;"), ({"scope": "clip"}, "^scope is 'clip'")])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        class_of("random_drop").Config(**options)

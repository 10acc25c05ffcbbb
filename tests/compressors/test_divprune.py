"""DivPrune against the released code and against picking by hand."""

import pytest
import torch
from golden import each_case
from made_visual import class_of, cosines, make, visual
from xcomp.compressors.divprune import most_diverse, nearest_other

from xcomp import merging
from xcomp.merging import unit
from xcomp.visual import VisualTokens


@each_case("divprune")
def test_released(case):
    x, keep = case.inputs["x"], case.outputs["keep"]
    nearest = case.outputs["distance"].clone().fill_diagonal_(torch.inf).amin(1)
    torch.testing.assert_close(nearest_other(unit(x)[None])[0], nearest, rtol=1e-5, atol=1e-6)
    assert most_diverse(x[None], case.params["keep"])[0].tolist() == case.outputs["selection_order"].tolist()
    video = VisualTokens.from_frames(x[None])
    out = make("divprune", ratio=case.params["ratio"]).compress(video, None)
    assert out.slot.tolist() == keep.tolist() and torch.equal(out.tokens, x[keep])


def by_hand(x, count):
    distance = 1 - cosines(x, x)
    n = len(x)
    nearest = [min(distance[i, j] for j in range(n) if j != i) for i in range(n)]
    picks = [max(range(n), key=lambda i: nearest[i])]
    while len(picks) < count:
        left = [i for i in range(n) if i not in picks]
        picks.append(max(left, key=lambda i: min(distance[i, j] for j in picks)))
    return picks


@pytest.mark.parametrize("n, dim, count", [(12, 8, 5), (30, 4, 30), (2, 3, 1), (25, 16, 1)])
def test_equals_picking_by_hand(n, dim, count):
    x = visual(1, n, dim).tokens
    assert most_diverse(x[None], count)[0].tolist() == by_hand(x, count)


def test_blocks_change_nothing(monkeypatch):
    x = visual(2, 20).frames()
    whole = most_diverse(x, 7)
    monkeypatch.setattr(merging, "BLOCK", 130)
    assert torch.equal(most_diverse(x, 7), whole)


def test_scope_frame_chooses_in_each_frame():
    video = visual(3, 12)
    out = make("divprune", ratio=0.4, scope="frame").compress(video, None)
    assert out.counts().tolist() == [5, 5, 5]
    assert out.slot.tolist() == [slot for frame in video.frames() for slot in sorted(by_hand(frame, 5))]


def test_takes_ragged_frames():
    video = visual(3, 12)
    ragged = video.select(torch.tensor([0, 1, 5, 13, 14, 20, 30, 35]))
    out = make("divprune", ratio=0.5).compress(ragged, None)
    assert out.index.tolist() == ragged.index[sorted(by_hand(ragged.tokens, 4))].tolist()


@pytest.mark.parametrize("options, message", [({"ratio": 0}, "^ratio is 0;"), ({"scope": "clip"}, "^scope is 'clip'")])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        class_of("divprune").Config(**options)

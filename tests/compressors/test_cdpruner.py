"""CDPruner against the released code, and against determinants computed one by one."""

import pytest
import torch
from golden import each_case
from made_visual import class_of, cosines, make, question, visual
from xcomp.compressors.cdpruner import kernel, largest_determinant, most_conditionally_diverse, relevance

from xcomp import merging

close = {"rtol": 1e-5, "atol": 1e-6}


@each_case("cdpruner")
def test_released(case):
    frames = case.inputs["features"]
    relevant = relevance(case.inputs["image_embeds"], case.inputs["text_embeds"])
    torch.testing.assert_close(relevant, case.outputs["relevance"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(kernel(frames, torch.ones_like(relevant)), case.outputs["similarity"], **close)
    torch.testing.assert_close(kernel(frames, relevant), case.outputs["kernel"], **close)
    kept = most_conditionally_diverse(frames, relevant, case.params["keep_per_frame"])
    assert kept.tolist() == case.outputs["keep"].tolist()
    mask = torch.zeros_like(case.outputs["mask"]).scatter(1, kept, True)
    assert torch.equal(mask, case.outputs["mask"])


def by_hand(matrix, count):
    picks = []
    while len(picks) < count:
        left = [j for j in range(len(matrix)) if j not in picks]
        picks.append(max(left, key=lambda j: torch.det(matrix[picks + [j]][:, picks + [j]]).item()))
    return picks


@pytest.mark.parametrize("num_frames, width, count", [(3, 10, 5), (1, 6, 6), (2, 12, 1)])
def test_equals_determinants_by_hand(num_frames, width, count):
    video, asked = visual(num_frames, width, 16), question(16)
    out = make("cdpruner", ratio=count / width).compress(video, asked)
    scores = cosines(video.tokens, asked.embeddings).mean(1)
    scores = ((scores - scores.min() + 1e-6) / (scores.max() - scores.min())).view(num_frames, width)
    expected = []
    for frame, r in zip(video.frames(), scores):
        expected += sorted(by_hand(r[:, None] * cosines(frame, frame) * r, count))
    assert out.slot.tolist() == expected and out.counts().tolist() == [count] * num_frames


def test_what_the_picks_span_is_left_to_the_end():
    x = torch.eye(3)[[0, 0, 1, 0, 2, 1]]
    assert largest_determinant((x @ x.T)[None], 6).tolist() == [[0, 2, 4, 1, 3, 5]]
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))  # five independent ones at most
    order = largest_determinant(kernel(x[None], torch.full((1, 40), 0.3)), 40)[0].tolist()
    assert sorted(order) == list(range(40)) and order[5:] == sorted(order[5:])


def test_options():
    video, asked = visual(3, 10, 16), question(16)
    assert make("cdpruner").uses_question and not make("cdpruner", relevance="none").uses_question
    alone = make("cdpruner", relevance="none", ratio=0.4).compress(video, None)
    expected = largest_determinant(kernel(video.frames(), torch.ones(3, 10)), 4).sort(-1).values
    assert alone.slot.tolist() == expected.flatten().tolist()
    minus = make("cdpruner", relevance_sign=-1, ratio=0.4).compress(video, asked)
    assert minus.index.tolist() != make("cdpruner", ratio=0.4).compress(video, asked).index.tolist()
    scaled = relevance(video.frames(), asked.embeddings, per_frame=True)
    assert scaled.amin(1) == pytest.approx(torch.zeros(3), abs=1e-4) and (scaled.amax(1) >= 1).all()
    with pytest.raises(ValueError, match="^cdpruner needs the question; relevance: none chooses without$"):
        make("cdpruner").compress(video, None)


def test_blocks_change_nothing(monkeypatch):
    video = visual(5, 10, 16)
    whole = most_conditionally_diverse(video.frames(), torch.ones(5, 10), 4)
    monkeypatch.setattr(merging, "BLOCK", 220)
    assert torch.equal(most_conditionally_diverse(video.frames(), torch.ones(5, 10), 4), whole)


@pytest.mark.parametrize(
    "options, message",
    [({"ratio": 0}, "^ratio is 0;"), ({"relevance": "clip"}, "^relevance is"), ({"relevance_sign": 2}, "^relevance_s")],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        class_of("cdpruner").Config(**options)

"""VisionZip against the released code in both forms, and the rule token by token."""

from fractions import Fraction

import pytest
import torch
from golden import each_case
from made_visual import class_of, cosines, make, visual
from xcomp.compressors.visionzip import split, zip_frames

close = {"rtol": 1e-5, "atol": 1e-6}


@each_case("visionzip", "clip")
def test_released_clip(case):
    p, o = case.params, case.outputs
    attention = case.inputs["cls_attention"].sum(1)
    scores = torch.cat([torch.full((len(attention), 1), torch.inf), attention], dim=1)  # the class token stays
    tokens, slot, size = zip_frames(
        case.inputs["hidden"], scores, case.inputs["metric"], p["dominant"], p["contextual"]
    )
    torch.testing.assert_close(tokens, o["tokens"], **close)
    assert slot[:, : p["dominant"]].tolist() == o["dominant_indices"].sort(-1).values.tolist()
    for frame in range(len(tokens)):
        rest = [i for i in range(scores.shape[1]) if i not in o["dominant_indices"][frame].tolist()]
        assert slot[frame, p["dominant"] :].tolist() == [rest[i] for i in o["contextual_targets_in_rest"]]
        joined = torch.bincount(o["assignment"][frame], minlength=p["contextual"])
        assert size[frame, p["dominant"] :].tolist() == (joined + 1).tolist()


@each_case("visionzip", "siglip")
def test_released_siglip(case):
    p, o = case.params, case.outputs
    assert split(p["spatial_tokens"], float(Fraction(p["dominant_ratio"]))) == (p["dominant"], p["contextual"])
    tokens, slot, _ = zip_frames(
        case.inputs["hidden"], case.inputs["attention"], case.inputs["metric"], p["dominant"], p["contextual"]
    )
    torch.testing.assert_close(tokens, o["tokens"], **close)
    assert slot[:, : p["dominant"]].tolist() == o["dominant_indices"].sort(-1).values.tolist()


def by_hand(frame, scores, keys, count, mean):
    num_dominant = max(1, int(count * 54 / 64))
    num_targets = count - num_dominant
    dominant = sorted(sorted(range(len(frame)), key=lambda i: -scores[i])[:num_dominant])
    rest = [i for i in range(len(frame)) if i not in dominant]
    step = max(1, len(rest) // max(num_targets, 1))
    targets = rest[::step][:num_targets]
    joined = {t: [] for t in targets}
    for i in rest:
        if i not in targets and targets:
            likeness = cosines(keys[i : i + 1], keys[targets])[0]
            joined[targets[likeness.argmax()]].append(i)
    out = [(i, frame[i], 1) for i in dominant]
    for t in targets:
        value = frame[t]
        if joined[t]:
            value = frame[[t] + joined[t]].mean(0) if mean else value + frame[joined[t]].mean(0)
        out.append((t, value, 1 + len(joined[t])))
    return sorted(out, key=lambda item: item[0])


@pytest.mark.parametrize("form, attention", [("received", "attention"), ("class", "cls_attention")])
@pytest.mark.parametrize("contextual", ["sum", "mean"])
@pytest.mark.parametrize("num_frames, width, count", [(3, 20, 9), (1, 16, 1), (2, 12, 12), (2, 7, 6)])
def test_equals_the_rule_by_hand(num_frames, width, count, contextual, form, attention):
    video = visual(num_frames, width)
    rule = make("visionzip", ratio=count / width, contextual=contextual, attention=form)
    assert rule.needs == (attention, "keys")
    out = rule.compress(video, None)
    expected = []
    for t, frame in enumerate(video.frames()):
        part = slice(t * width, (t + 1) * width)
        scores, keys = video.tower[attention][part].tolist(), video.tower["keys"][part]
        expected += by_hand(frame, scores, keys, count, contextual == "mean")
    assert out.slot.tolist() == [place for place, _, _ in expected]
    torch.testing.assert_close(out.tokens, torch.stack([v for _, v, _ in expected]), **close)
    assert out.size.tolist() == [s for _, _, s in expected]


def test_released_order_has_the_dominant_first():
    video = visual(1, 20)
    out = make("visionzip", ratio=0.5, released_order=True).compress(video, None)
    assert out.slot[:8].tolist() == video.tower["attention"].topk(8).indices.sort().values.tolist()
    assert sorted(out.slot.tolist()) != out.slot.tolist()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 0}, "^ratio is 0;"),
        ({"dominant": 1.5}, "^dominant is 1.5;"),
        ({"attention": "cls"}, "^attention is 'cls'; it must be received or class$"),
        ({"contextual": "both"}, "^contextual is 'both'; it must be sum or mean$"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        class_of("visionzip").Config(**options)

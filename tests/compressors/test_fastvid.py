"""FastVID against the released code, and the rule in loops."""

import math

import pytest
import torch
from golden import each_case
from made_visual import class_of, cosines, make, visual
from xcomp.compressors.fastvid import anchor_counts, counts, segments

from xcomp.compressor import Budget
from xcomp.merging import density_peaks, others
from xcomp.visual import VisualTokens

close = {"rtol": 1e-5, "atol": 1e-6}


@each_case("fastvid")
def test_released(case):
    p, o = case.params, case.outputs
    num_frames, width, start = p["frames"], p["tokens_per_frame"], p["video_start"]
    hidden = case.inputs["in_hidden"][0]
    frames = hidden[start : start + num_frames * width].view(num_frames, width, -1)
    lengths = segments(case.inputs["frame_global"], p["c"], p["tau"])
    assert lengths == o["segment_sizes"].tolist()
    num_salient, context = counts(width, p["retention_ratio"], p["d"])
    salient = case.inputs["frame_attention"].topk(num_salient).indices
    assert salient.tolist() == o["salient"].tolist()
    rest = frames[torch.arange(num_frames)[:, None], others(salient, width)]
    torch.testing.assert_close(density_peaks(rest, 4), o["density_score"], **close)
    per_frame = torch.zeros(num_frames, dtype=torch.long)
    for number, (length, count) in enumerate(zip(lengths, anchor_counts(lengths, context, p["p"]))):
        end = sum(lengths[: number + 1])
        per_frame[list(range(end - 1, end - 1 - length, -p["p"]))] = count
    assert per_frame.tolist() == o["context_per_frame"].tolist()

    tower = {"frame": case.inputs["frame_global"], "pooling_attention": case.inputs["frame_attention"].flatten()}
    rule = make("fastvid", ratio=p["retention_ratio"], **{name: p[name] for name in ("c", "tau", "d", "p", "beta")})
    out = rule.compress(VisualTokens.from_frames(frames, None, tower), None)
    kept = torch.tensor([*range(start), *(start + out.index).tolist(), *range(start + num_frames * width, len(hidden))])
    assert kept.tolist() == o["keep"].tolist()
    visible = (o["keep"] >= start) & (o["keep"] < start + num_frames * width)
    torch.testing.assert_close(out.tokens, o["out_hidden"][0][visible], **close)


def by_hand(video, ratio, c, tau, d, p, beta):
    """(place, value, size) of each token, float64."""
    frames, num_frames, width = video.frames().double(), video.num_frames, video.frame_tokens
    attention = video.tower["pooling_attention"].view(num_frames, width)
    likeness = [cosines(a[None], b[None])[0, 0].item() for a, b in zip(video.tower["frame"][1:], video.tower["frame"])]
    cuts = {t + 1 for t in sorted(range(num_frames - 1), key=lambda t: likeness[t])[: c - 1]}
    cuts |= {t + 1 for t in range(num_frames - 1) if likeness[t] < tau}
    bounds = [0, *sorted(cuts), num_frames]
    kept = max(1, int(width * ratio))
    context = int(kept * d)
    salient = [sorted(range(width), key=lambda j: -attention[t, j])[: kept - context] for t in range(num_frames)]
    rest = [[j for j in range(width) if j not in salient[t]] for t in range(num_frames)]
    out = [(t * width + j, frames[t, j], 1.0) for t in range(num_frames) for j in salient[t]]
    for start, end in zip(bounds, bounds[1:]):
        pool = torch.stack([frames[t, j] for t in range(start, end) for j in rest[t]])
        at = list(range(end - 1, start - 1, -p))
        for t in at:
            x = frames[t, rest[t]]
            distance = [[(a - b).norm().item() / math.sqrt(x.shape[1]) for b in x] for a in x]
            density = [math.exp(-sum(v * v for v in sorted(row)[:4]) / min(4, len(x))) for row in distance]
            score = []
            for i in range(len(x)):
                denser = [distance[i][j] for j in range(len(x)) if density[j] > density[i]]
                score.append(density[i] * (min(denser) if denser else max(map(max, distance))))
            anchors = sorted(sorted(range(len(x)), key=lambda i: -score[i])[: context * (end - start) // len(at)])
            if not anchors:
                continue
            joined = cosines(pool, x[anchors]).argmax(1)
            for number, anchor in enumerate(anchors):
                members = pool[joined == number]
                w = max(beta, 1 / (len(members) + 1))
                value = w * x[anchor] + (1 - w) * members.mean(0)
                out.append((t * width + rest[t][anchor], value, len(members) / len(at)))
    return sorted(out, key=lambda item: item[0])


@pytest.mark.parametrize(
    "num_frames, width, options",
    [
        (9, 12, {"ratio": 0.5, "c": 2, "tau": 0.3, "d": 0.4, "p": 4, "beta": 0.6}),
        (5, 10, {"ratio": 0.3, "c": 8, "tau": 0.9, "d": 0.7, "p": 4, "beta": 0.0}),
        (6, 7, {"ratio": 0.6, "c": 1, "tau": -1.0, "d": 0.5, "p": 2, "beta": 0.1}),
        (1, 8, {"ratio": 0.5, "c": 8, "tau": 0.9, "d": 0.5, "p": 4, "beta": 0.6}),
    ],
)
def test_equals_the_rule_by_hand(num_frames, width, options):
    video = visual(num_frames, width)
    out = make("fastvid", **options).compress(video, None)
    expected = by_hand(video, **options)
    assert out.index.tolist() == [place for place, _, _ in expected]
    torch.testing.assert_close(out.tokens, torch.stack([v for _, v, _ in expected]).float(), **close)
    assert out.size.tolist() == pytest.approx([s for _, _, s in expected])


def test_a_large_budget_has_an_anchor_frame_more_often():
    rule = class_of("fastvid")
    assert rule.for_budget(rule.Config(), Budget(0.1), 28, 196).p == 4
    assert rule.for_budget(rule.Config(), Budget(0.7), 28, 196).p == 2
    with pytest.raises(ValueError, match="^fastvid asks for .* lower p, now 4, or ratio, now 0.9$"):
        make("fastvid", ratio=0.9, c=1, tau=-1).compress(visual(8, 20), None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 0}, "^ratio is 0;"),
        ({"c": 0}, "^c is 0; it must be at least 1$"),
        ({"p": 0}, "^p is 0; it must be at least 1$"),
        ({"d": 2}, "^d is 2; it must be a share from 0 to 1$"),
        ({"beta": -1}, "^beta is -1; it must be a share from 0 to 1$"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        class_of("fastvid").Config(**options)

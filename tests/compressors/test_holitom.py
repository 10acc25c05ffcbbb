"""HoliTom against the released code, and the rule in loops, windows by trying all."""

import itertools
import math

import pytest
import torch
from golden import each_case
from made_visual import class_of, cosines, make, visual
from xcomp.compressors.holitom import inner_merge, static_patches, static_windows

from xcomp.merging import cosine
from xcomp.visual import VisualTokens

close = {"rtol": 1e-5, "atol": 1e-6}


@each_case("holitom", "case")
def test_released(case):
    p, frames = case.params, case.inputs["features"]
    likeness = cosine(frames[1:], frames[:-1])
    torch.testing.assert_close(likeness, case.outputs["similarity"], **close)
    windows = static_windows(likeness, p["tau"], p["max_window_size"])
    assert [[start, end - 1] for start, end in windows] == case.outputs["windows"].tolist()
    lengths = torch.tensor([end - start for start, end in windows])
    saved = (static_patches(likeness, windows, p["tau"]).sum(1) * (lengths - 1)).sum()
    assert saved == p["total_reduced"]
    rule = make(
        "holitom",
        ratio=p["retain_ratio"],
        tau=p["tau"],
        beta=None if p["NO_BETA"] == "1" else p["beta"],
        k=p["K"],
        max_window=p["max_window_size"],
        released_order=True,
    )
    video = VisualTokens.from_frames(frames, None, {"attention": case.inputs["attention"].flatten()})
    out = rule.compress(video, None)
    torch.testing.assert_close(out.tokens, case.outputs["tokens"], **close)
    counts = [((out.frame >= start) & (out.frame < end)).sum().item() for start, end in windows]
    assert counts == case.outputs["tokens_per_window"].tolist()


@each_case("holitom", "inner")
def test_released_inner_merge(case):
    p, hidden = case.params, case.inputs["hidden"][0]
    is_visual = torch.zeros(len(hidden), dtype=torch.bool)
    is_visual[p["image_start"] : p["image_start"] + p["image_length"]] = True
    keep, merged = inner_merge(hidden, case.inputs["attention_last_row"].mean(0), is_visual, p["r"])
    assert keep.tolist() == case.outputs["keep"].tolist()
    torch.testing.assert_close(merged, case.outputs["merged"][0], **close)


def static_in(frames, start, end, tau):
    return [
        j
        for j in range(frames.shape[1])
        if end - start > 1
        and all(cosines(frames[t, j : j + 1], frames[t + 1, j : j + 1])[0, 0] > tau for t in range(start, end - 1))
    ]


def by_hand(video, ratio, tau, beta, exact=False):
    """(place, value, size) of each token, and how many averaging over time saved."""
    frames, (num_frames, width) = video.frames().double(), (video.num_frames, video.frame_tokens)
    attention = video.tower["attention"].view(num_frames, width)
    best = None
    for cuts in itertools.product([False, True], repeat=num_frames - 1):
        bounds = [0, *(t + 1 for t, cut in enumerate(cuts) if cut), num_frames]
        windows = list(zip(bounds, bounds[1:]))
        saved = sum(len(static_in(frames, a, b, tau)) * (b - a - 1) for a, b in windows)
        order = (saved, [a - b for a, b in windows[::-1]])  # then the shorter, from the last window on
        if best is None or order > best[0]:
            best = (order, windows)
    (saved, _), windows = best
    share = min(1, ratio * (num_frames * width) / (num_frames * width - saved))
    out = []
    for a, b in windows:
        static = static_in(frames, a, b, tau)
        x = frames[a:b, static].mean(0)
        if static:
            count = max(1, round(len(static) * share))
            d = [[(u - v).norm().item() / math.sqrt(x.shape[1]) for v in x] for u in x]
            density = [math.exp(-sum(v * v for v in sorted(row)[: min(7, count)]) / min(7, count)) for row in d]
            score = []
            for i in range(len(x)):
                denser = [d[i][j] for j in range(len(x)) if density[j] > density[i]]
                score.append(density[i] * (min(denser) if denser else max(map(max, d))))
            centres = sorted(sorted(range(len(x)), key=lambda i: -score[i])[:count])
            group = [i if i in centres else min(centres, key=lambda c: d[i][c]) for i in range(len(x))]
            for c in centres:
                others = [x[i] for i in range(len(x)) if group[i] == c and i != c]
                value = beta * x[c] + (1 - beta) * sum(others) / len(others) if others else x[c]
                out.append((a * width + static[c], value, (len(others) + 1) * (b - a)))
        for t in range(a, b):
            rest = sorted((j for j in range(width) if j not in static), key=lambda j: -attention[t, j])
            out += [(t * width + j, frames[t, j], 1) for j in rest[: math.ceil(len(rest) * share)]]
    return sorted(out, key=lambda item: item[0]), saved


@pytest.mark.parametrize(
    "num_frames, width, ratio, tau, beta",
    [(6, 12, 0.3, 0.8, 0.6), (5, 16, 0.6, 0.7, 0.2), (1, 9, 0.5, 0.8, 0.6), (7, 5, 0.25, 0.9, 1.0)],
)
def test_equals_the_rule_by_hand(num_frames, width, ratio, tau, beta):
    video = visual(num_frames, width, seed=2)
    expected, saved = by_hand(video, ratio, tau, beta)
    assert saved or num_frames == 1
    out = make("holitom", ratio=ratio, tau=tau, beta=beta).compress(video, None)
    assert out.index.tolist() == [place for place, _, _ in expected]
    torch.testing.assert_close(out.tokens, torch.stack([v for _, v, _ in expected]).float(), **close)
    assert out.size.tolist() == [s for _, _, s in expected]


def test_windows_prefer_the_shorter_and_have_a_maximum():
    likeness = torch.full((5, 4), 0.9)
    assert static_windows(likeness, 0.8, 1024) == [(0, 6)]
    assert static_windows(likeness, 0.8, 3) == [(0, 3), (3, 6)]
    assert static_windows(likeness, 0.8, 1) == [(t, t + 1) for t in range(6)]
    assert static_windows(likeness, 0.95, 1024) == [(t, t + 1) for t in range(6)]


def test_a_still_video_keeps_its_share_where_it_must():
    still = visual(6, 10)
    still = still.with_tokens(still.frames()[:1].expand(6, -1, -1).flatten(0, 1))
    assert len(make("holitom", ratio=0.5).compress(still, None)) == 10
    out = make("holitom", ratio=0.5, exact=True).compress(still, None)
    assert len(out) == 30 and out.size.sum() == 60


def test_inner_merge_averages_in_turn():
    torch.manual_seed(0)
    hidden, scores = torch.randn(20, 6), torch.rand(20)
    is_visual = torch.zeros(20, dtype=torch.bool)
    is_visual[3:18] = True
    best = sorted(sorted(range(3, 18), key=lambda i: -scores[i])[:6])
    expected, likeness = hidden.clone().double(), cosines(hidden, hidden)
    for i in [i for i in range(3, 18) if i not in best]:
        target = max(best, key=lambda j: likeness[i, j])
        expected[target] = (expected[target] + hidden[i].double()) / 2
    keep, merged = inner_merge(hidden, scores, is_visual, 0.6)
    assert keep.tolist() == sorted([0, 1, 2, *best, 18, 19])
    torch.testing.assert_close(merged, expected[keep].float(), **close)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 0}, "^ratio is 0;"),
        ({"k": 0}, "^k is 0; it must be at least 1$"),
        ({"max_window": 0}, "^max_window is 0;"),
        ({"beta": 2}, "^beta is 2; it must be a share from 0 to 1, or null$"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        class_of("holitom").Config(**options)

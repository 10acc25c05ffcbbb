"""PruneVid against the released code, and the rule in loops."""

import math

import pytest
import torch
from golden import each_case
from made_visual import class_of, cosines, make, visual
from xcomp.compressors.prunevid import attended, contiguous, likeness_over_time, scenes

from xcomp.merging import dpc_knn
from xcomp.visual import VisualTokens

close = {"rtol": 1e-5, "atol": 1e-6}


@each_case("prunevid")
def test_released(case):
    p, o, frames = case.params, case.outputs, case.inputs["features"]
    count = int(len(frames) * p["temporal_segment_ratio"])
    raw = dpc_knn(frames.mean(1)[None], count, p["k"])[1]
    refined = contiguous(raw[0].tolist())
    assert raw.tolist() == o["frame_clusters"].tolist() and [refined] == o["frame_clusters_refined"].tolist()
    windows = scenes(frames, p["temporal_segment_ratio"], p["k"])
    assert [end - start for start, end in windows] == p["window_sizes"]
    options = {"segments": p["temporal_segment_ratio"], "tau": p["tau"], "cluster_ratio": p["cluster_ratio"]}
    rule = make("prunevid", k=p["k"], released_order=True, **options)
    out = rule.compress(VisualTokens.from_frames(frames), None)
    torch.testing.assert_close(out.tokens, o["merged"], **close)
    sets = [
        size
        for length, static, dynamic in zip(p["window_sizes"], p["static_sizes"], p["dynamic_sizes"])
        for size in [static, *[dynamic // length] * length]
    ]
    group = torch.arange(len(sets)).repeat_interleave(torch.tensor(sets))
    kept = attended(case.inputs["text_to_image_attention"][0], group, p["alpha"])
    assert kept.tolist() == o["attention_keep"].tolist()


@pytest.mark.parametrize(
    "label, expected",
    [
        ([0, 0, 1, 1, 0], [0, 0, 1, 1, 1]),  # the shorter run of 0 goes to its neighbour
        ([0, 0, 1, 2, 2], [0, 0, 0, 2, 2]),  # as long on both sides: left
        ([0, 0, 1, 2, 2, 2], [0, 0, 2, 2, 2, 2]),
        ([0, 0, 1, 3, 2, 2], [0, 0, 0, 0, 2, 2]),
        ([1, 0, 0, 1], [0, 0, 0, 0]),
        ([0, 0, 1, 0, 0], [0, 0, 0, 0, 0]),
        ([1, 0, 2, 2, 0, 0], [2, 2, 2, 2, 0, 0]),  # both runs of one frame of 1 and 0 go
        ([0], [-1]),
        ([0, 1, 0, 1], [-1] * 4),  # no run at all: one window
    ],
)
def test_clusters_become_contiguous(label, expected):
    assert contiguous(label) == expected


def clusters_by_hand(x, count, k):
    """(centre, mean, members) of DPC-KNN over (n, D), float64."""
    d = [[(u - v).norm().item() / math.sqrt(x.shape[1]) for v in x] for u in x]
    density = [math.exp(-sum(v * v for v in sorted(row)[:k]) / min(k, len(x))) for row in d]
    score = []
    for i in range(len(x)):
        denser = [d[i][j] for j in range(len(x)) if density[j] > density[i]]
        score.append(density[i] * (min(denser) if denser else max(map(max, d))))
    centres = sorted(range(len(x)), key=lambda i: -score[i])[:count]
    group = [i if i in centres else min(centres, key=lambda c: d[i][c]) for i in range(len(x))]
    return [(c, x[[i for i in range(len(x)) if group[i] == c]].mean(0), group.count(c)) for c in centres]


@pytest.mark.parametrize(
    "num_frames, width, options",
    [
        (8, 36, {"tau": 0.7}),
        (6, 20, {"tau": 0.8, "cluster_ratio": 0.3, "k": 3, "segments": 0.5}),
        (1, 30, {}),
        (3, 16, {"tau": -1.0}),
        (5, 9, {"tau": 0.9}),  # nothing to cluster, only averages over time
    ],
)
def test_equals_the_rule_by_hand(num_frames, width, options):
    video = visual(num_frames, width)
    rule = make("prunevid", **options)
    c, frames, expected = rule.config, video.frames().double(), []
    for start, end in scenes(video.frames(), c.segments, c.k):
        length = end - start
        pairs = [(s, t) for s in range(start, end) for t in range(start, end) if s != t]
        mean = [
            sum(cosines(frames[s, j : j + 1], frames[t, j : j + 1])[0, 0].item() for s, t in pairs) / max(len(pairs), 1)
            for j in range(width)
        ]
        static = [j for j in range(width) if pairs and mean[j] > c.tau]
        rest = [j for j in range(width) if j not in static]
        sets = [(start, static, frames[start:end, static].mean(0), length)]
        sets += [(t, rest, frames[t, rest], 1) for t in range(start, end)]
        for t, slots, x, times in sets:
            count = int(c.cluster_ratio * len(slots)) if len(slots) > 14 else len(slots)
            for centre, value, members in clusters_by_hand(x, count, c.k) if count else []:
                expected.append((t * width + slots[centre], value, members * times))
    expected.sort(key=lambda item: item[0])
    out = rule.compress(video, None)
    assert out.index.tolist() == [place for place, _, _ in expected]
    torch.testing.assert_close(out.tokens, torch.stack([v for _, v, _ in expected]).float(), **close)
    assert out.size.tolist() == [s for _, _, s in expected] and out.size.sum() == len(video)


def test_likeness_is_the_mean_of_different_frames():
    window = visual(4, 3).frames()
    pairs = [cosines(window[s], window[t]).diagonal() for s in range(4) for t in range(4) if s != t]
    torch.testing.assert_close(likeness_over_time(window), torch.stack(pairs).mean(0).float())
    assert likeness_over_time(window[:1]).tolist() == [-2.0] * 3


@pytest.mark.parametrize("keep", [0.15, 0.5, 0.9])
def test_a_still_video_keeps_its_share(keep):
    still = visual(6, 20)
    still = still.with_tokens(still.frames()[:1].expand(6, -1, -1).flatten(0, 1))
    out = make("prunevid", keep=keep).compress(still, None)
    assert abs(len(out) - keep * 120) <= 6 and out.size.sum() == 120


@pytest.mark.parametrize(
    "options, message",
    [
        ({"segments": 0}, "^segments is 0;"),
        ({"cluster_ratio": 2}, "^cluster_ratio is 2;"),
        ({"k": 0}, "^k is 0; it must be at least 1$"),
        ({"keep": 0}, "^keep is 0;"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        class_of("prunevid").Config(**options)

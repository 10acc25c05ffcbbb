"""What pruning and merging compressors share, against the same in loops."""

import math

import pytest
import torch

from xcomp import merging
from xcomp.merging import (
    at_places,
    density_peaks,
    dpc_knn,
    exact,
    fitting,
    group_sums,
    merge_into,
    nearest_by_cosine,
    others,
    places,
    rows,
    top,
    top_ascending,
    top_each,
)
from xcomp.visual import VisualTokens


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_of_equal_scores_the_lower_position_comes_first():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert top(scores, 2).tolist() == [[1, 2], [0, 1]] and top(scores, 4).tolist() == [[1, 2, 4, 3], [0, 1, 2, 3]]
    assert top_ascending(scores, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    assert top_each(scores, torch.tensor([2, 3])).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert top(torch.zeros(3000), 2500).tolist() == list(range(2500))


def test_others_are_what_is_left():
    index = torch.tensor([[3, 0], [1, 2]])
    assert others(index, 5).tolist() == [[1, 2, 4], [0, 3, 4]]
    assert others(index[:, :0], 2).tolist() == [[0, 1], [0, 1]] and others(torch.tensor([[0, 1]]), 2).shape == (1, 0)
    assert rows(torch.arange(10).view(2, 5), index).tolist() == [[3, 0], [6, 7]]
    assert places(index, 5).tolist() == [3, 0, 6, 7]


def test_nearest_by_cosine_does_not_depend_on_blocks(monkeypatch):
    x, targets = random(2, 50, 4), random(2, 7, 4, seed=1)
    expected = torch.cosine_similarity(x.unsqueeze(2), targets.unsqueeze(1), dim=-1).argmax(-1)
    assert torch.equal(nearest_by_cosine(x, targets), expected)
    monkeypatch.setattr(merging, "BLOCK", 60)
    assert torch.equal(nearest_by_cosine(x, targets), expected)


def test_sums_of_groups():
    values, group = random(9, 3).requires_grad_(), torch.tensor([2, 0, 2, 4, 0, 2, 4, 0, 0])
    sums = group_sums(values, group, 6)
    for number in range(6):
        torch.testing.assert_close(sums[number], values[group == number].sum(0))
    sums.square().sum().backward()
    torch.testing.assert_close(values.grad, 2 * sums.detach()[group])
    assert group_sums(values[:0], group[:0], 2).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("weighted", [False, True])
def test_means_of_groups(weighted):
    values, size, group = (
        random(2, 6, 3),
        1 + random(2, 6).abs(),
        torch.tensor([[0, 1, 1, 3, 0, 1], [2, 2, 2, 2, 2, 0]]),
    )
    weights = random(2, 6, seed=3).abs() if weighted else None
    means, sizes = merge_into(values.bfloat16(), size, group, 4, weights)
    assert means.dtype == torch.float32
    used = size if weights is None else weights
    for b in range(2):
        for number in range(4):
            member = group[b] == number
            w = used[b, member].unsqueeze(1)
            expected = (values[b].bfloat16().float()[member] * w).sum(0) / w.sum() if member.any() else torch.zeros(3)
            torch.testing.assert_close(means[b, number], expected)
            torch.testing.assert_close(sizes[b, number], size[b, member].sum())


@pytest.mark.parametrize("n, count, k", [(12, 4, 5), (5, 5, 7), (1, 1, 7), (20, 1, 1)])
def test_density_peaks_by_hand(n, count, k, monkeypatch):
    x = random(3, n, 6)
    centres, label = dpc_knn(x, count, k)
    for b in range(3):
        d = [[(u - v).norm().item() / math.sqrt(6) for v in x[b].double()] for u in x[b].double()]
        density = [math.exp(-sum(v * v for v in sorted(row)[:k]) / min(k, n)) for row in d]
        score = []
        for i in range(n):
            denser = [d[i][j] for j in range(n) if density[j] > density[i]]
            score.append(density[i] * (min(denser) if denser else max(map(max, d))))
        torch.testing.assert_close(density_peaks(x, k)[b], torch.tensor(score))
        best = sorted(range(n), key=lambda i: -score[i])[:count]
        assert centres[b].tolist() == best
        nearest = [best.index(i) if i in best else min(range(count), key=lambda c: d[i][best[c]]) for i in range(n)]
        assert label[b].tolist() == nearest
    whole = density_peaks(x, k)
    monkeypatch.setattr(merging, "BLOCK", 1)
    assert torch.equal(density_peaks(x, k), whole)


def test_equal_tokens_have_distance_zero():
    """A matrix product would leave some 1e-3 between them, and which of them is a centre to chance."""
    x = (100 + random(1, 1, 512)).expand(1, 40, -1)
    assert density_peaks(x, 4).eq(0).all()
    assert dpc_knn(x, 3, 4)[0].tolist() == [[0, 1, 2]]


def test_what_fits_into_a_limit():
    savings, scores = torch.tensor([3, 1, 2, 5]), torch.tensor([0.9, 0.1, 0.8, 0.5])
    assert fitting(savings, scores, 5).tolist() == [True, False, True, False]
    assert fitting(savings, scores, 4.9).tolist() == [True, False, False, False]
    assert fitting(savings, scores, 0).tolist() == [False] * 4 and fitting(savings, scores, 11).all()
    assert fitting(savings[:0], scores[:0], 1).shape == (0,)


def test_tokens_at_places_are_put_in_order():
    video = VisualTokens.from_frames(random(3, 4, 2).bfloat16())
    index = torch.tensor([9, 2, 5])
    out = at_places(video, video.tokens[index].float(), index, torch.tensor([1.0, 2.0, 3.0]))
    assert out.index.tolist() == [2, 5, 9] and out.frame.tolist() == [0, 1, 2] and out.size.tolist() == [2.0, 3.0, 1.0]
    assert out.tokens.dtype == torch.bfloat16 and torch.equal(out.tokens, video.tokens[[2, 5, 9]])
    assert at_places(video, video.tokens[index], index, torch.ones(3), sort=False).index.tolist() == [9, 2, 5]


def test_exact_switches_autocast_off():
    @exact
    def product(x):
        return x @ x

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(random(4, 4)).dtype == torch.float32
        assert (random(4, 4) @ random(4, 4)).dtype == torch.bfloat16

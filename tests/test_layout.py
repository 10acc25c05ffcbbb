"""TokenLayout against loops over plain lists, on random batches."""

import random

import pytest
import torch

from xcomp.layout import TEXT, TokenLayout, gather, merged_lengths
from xcomp.visual import VisualTokens

PADDING = (TEXT, TEXT, False)


def random_parts(seed, slots=None):
    """(prefix length, frames, tokens a frame, suffix length) of one to four samples."""
    rng = random.Random(seed)
    width = slots or rng.randint(1, 5)
    return [(rng.randint(0, 4), rng.randint(0, 3), width, rng.randint(0, 4)) for _ in range(rng.randint(1, 4))]


def rows_of(layout):
    """A layout as lists of (frame, slot, real)."""
    return [list(zip(*(t.tolist() for t in row))) for row in zip(layout.frame, layout.slot, layout.real)]


def padded(rows):
    width = max(map(len, rows), default=0)
    return [row + [PADDING] * (width - len(row)) for row in rows]


def slow_sequence(parts):
    rows = []
    for prefix, frames, tokens, suffix in parts:
        row = [(TEXT, TEXT, True)] * prefix
        for frame in range(frames):
            for slot in range(tokens):
                row.append((frame, slot, True))
        rows.append(row + [(TEXT, TEXT, True)] * suffix)
    return padded(rows)


def random_keep(layout, seed):
    return torch.rand(layout.real.shape, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("seed", range(12))
def test_sequence(seed):
    parts = random_parts(seed)
    layout = TokenLayout.sequence(parts)
    assert rows_of(layout) == slow_sequence(parts)
    assert layout.width == max(p + t * n + s for p, t, n, s in parts)
    assert layout.counts.tolist() == [p + t * n + s for p, t, n, s in parts]
    assert layout.visual_counts == [t * n for _, t, n, _ in parts]
    assert layout.padded == (len(set(layout.counts.tolist())) > 1)


def test_text():
    layout = TokenLayout.text([2, 0, 3])
    text = (TEXT, TEXT, True)
    assert rows_of(layout) == [[text, text, PADDING], [PADDING] * 3, [text] * 3]
    assert not layout.visual.any()


@pytest.mark.parametrize("seed", range(12))
def test_select(seed):
    layout = TokenLayout.sequence(random_parts(seed))
    keep = random_keep(layout, seed)
    index, kept = layout.select(keep)
    expected_rows, expected_index = [], []
    for row, wanted in zip(rows_of(layout), keep.tolist()):
        places = [i for i, (cell, w) in enumerate(zip(row, wanted)) if w and cell[2]]
        expected_index.append(places)
        expected_rows.append([row[i] for i in places])
    assert rows_of(kept) == padded(expected_rows)
    width = max(map(len, expected_index))
    assert index.tolist() == [places + [0] * (width - len(places)) for places in expected_index]


def test_select_keeps_nothing_of_a_sample():
    layout = TokenLayout.sequence([(1, 1, 2, 0), (0, 1, 2, 0)])
    index, kept = layout.select(torch.tensor([[True, False, True], [False, False, False]]))
    assert index.tolist() == [[0, 2], [0, 0]]
    assert rows_of(kept) == [[(TEXT, TEXT, True), (0, 1, True)], [PADDING, PADDING]]


@pytest.mark.parametrize("seed", range(12))
def test_keep_slots(seed):
    parts = random_parts(seed, slots=4)
    layout = TokenLayout.sequence(parts)
    for slots in ([0], [3], [0, 2], [1, 2, 3], [0, 1, 2, 3]):
        expected = [[real and (slot == TEXT or slot in slots) for _, slot, real in row] for row in rows_of(layout)]
        assert layout.keep_slots(slots, 4).tolist() == expected


@pytest.mark.parametrize("seed", range(12))
def test_append_and_last_index(seed):
    first = TokenLayout.sequence(random_parts(seed))
    samples = first.real.shape[0]
    rng = random.Random(seed + 100)
    lengths = [rng.randint(1, 3) for _ in range(samples)]
    joined = first.append(TokenLayout.text(lengths))
    expected = [a + b for a, b in zip(slow_sequence(random_parts(seed)), rows_of(TokenLayout.text(lengths)))]
    assert rows_of(joined) == expected
    last = [max(i for i, cell in enumerate(row) if cell[2]) for row in expected]
    assert joined.last_index().tolist() == last
    assert joined.counts.tolist() == [sum(cell[2] for cell in row) for row in expected]


def test_last_index_of_nothing_is_before_the_first():
    assert TokenLayout.text([2, 0]).last_index().tolist() == [1, -1]


@pytest.mark.parametrize("seed", range(12))
def test_causal_mask(seed):
    parts = random_parts(seed)
    first = TokenLayout.sequence(parts)
    joined = first.append(TokenLayout.text([1 + i % 2 for i in range(len(parts))]))
    rows = torch.randint(0, joined.width, (len(parts), 3), generator=torch.Generator().manual_seed(seed))
    expected = [
        [[cell[2] and i <= row for i, cell in enumerate(cells)] for row in wanted]
        for cells, wanted in zip(rows_of(joined), rows.tolist())
    ]
    mask = joined.causal_mask(rows)
    if mask is None:
        assert all(see for sample in expected for row in sample for see in row)
    else:
        assert mask.shape == (len(parts), 1, 3, joined.width)
        assert mask[:, 0].tolist() == expected
        assert not mask.all()


def test_rows_that_see_everything_need_no_mask():
    layout = TokenLayout.sequence([(1, 1, 2, 1), (2, 1, 2, 0)])
    assert layout.causal_mask(torch.tensor([[3], [3]])) is None
    assert layout.causal_mask(torch.tensor([[3], [2]])) is not None


@pytest.mark.parametrize("samples", [1, 3])
def test_gather(samples):
    hidden = torch.randn(samples, 7, 2, 3)
    index = torch.randint(0, 7, (samples, 4))
    expected = torch.stack([torch.stack([hidden[b, i] for i in index[b].tolist()]) for b in range(samples)])
    assert torch.equal(gather(hidden, index), expected)


def test_the_tokens_that_a_frame_entered_with_are_kept():
    layout = TokenLayout.sequence([(2, 3, 5, 1), (1, 1, 5, 4)])
    assert layout.frame_tokens == 5 and TokenLayout.text([3]).frame_tokens == 0
    kept = layout.select(layout.keep_slots([4], 5))[1]
    grown = kept.append(TokenLayout.text([1, 1]))
    assert {part.frame_tokens for part in (kept, grown, grown.repeat(2), layout.window([(0, 4)]))} == {5}


# --- text between frames ----------------------------------------------------------------------------------------------


def random_video(rng, width, frames, ragged):
    """Visual tokens of some frames, whole or with tokens left out, and each frame's (before, behind)."""
    visual = VisualTokens.from_frames(torch.randn(frames, width, 2))
    if ragged:
        keep = sorted(rng.sample(range(frames * width), rng.randint(1, frames * width)))
        visual = visual.select(torch.tensor(keep))
    return visual, [(rng.randint(0, 3), rng.randint(0, 2)) for _ in range(frames)]


def slow_rows(parts, texts):
    """Rows of (frame, beside, place, real), a token at a time."""
    rows = []
    for (prefix, visual, suffix), lengths in zip(parts, texts):
        row = [(TEXT, TEXT, TEXT, True)] * prefix
        given = len(lengths) or visual.num_frames
        for number in range(given):
            # The merged frame that this one went into stands here if this is the first that went into it.
            merged = number * visual.num_frames // given
            first = number == min(i for i in range(given) if i * visual.num_frames // given == merged)
            before, behind = lengths[number] if lengths else (0, 0)
            row += [(TEXT, merged, TEXT, True)] * before
            if first:
                places = visual.slot[visual.frame == merged].tolist()
                row += [(merged, TEXT, place, True) for place in places]
            row += [(TEXT, merged, TEXT, True)] * behind
        rows.append(row + [(TEXT, TEXT, TEXT, True)] * suffix)
    width = max(map(len, rows))
    return [row + [(TEXT, TEXT, TEXT, False)] * (width - len(row)) for row in rows]


def rows_with_text(layout):
    beside = torch.full_like(layout.frame, TEXT) if layout.beside is None else layout.beside
    fields = (layout.frame, beside, layout.places, layout.real)
    return [list(zip(*(t.tolist() for t in row))) for row in zip(*fields)]


@pytest.mark.parametrize("merged", [1, 2, 3])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_text_between_frames(seed, ragged, merged):
    """``merged``: how many of the frames that have a text became one frame of tokens."""
    rng = random.Random(seed)
    parts, texts = [], []
    for sample in range(3):
        visual, lengths = random_video(rng, 4, rng.randint(1, 5), ragged)
        parts.append((rng.randint(0, 3), visual, rng.randint(0, 3)))
        more = [(rng.randint(0, 3), rng.randint(0, 2)) for _ in range(rng.randint(0, merged - 1) * len(lengths))]
        texts.append(lengths + more if sample else [])  # the first sample has no text
    layout = TokenLayout.of(parts, texts)
    assert rows_with_text(layout) == slow_rows(parts, texts)
    assert (layout.place is None) == all(visual.is_whole for _, visual, _ in parts)
    assert layout.owner.tolist() == [[max(f, b) for f, b, _, _ in row] for row in slow_rows(parts, texts)]
    for row, ((_, visual, _), lengths) in enumerate(zip(parts, texts)):
        found = merged_lengths(lengths, visual.num_frames)
        assert sum(map(sum, found)) == sum(map(sum, lengths)) == int(layout.between[row].sum())
        if visual.is_whole and sum(map(sum, lengths)):
            assert layout.text_lengths(row) == [*found]
    kept = layout.select(layout.keep_slots([1, 3], 4))[1]
    assert torch.equal(kept.between.sum(1), layout.between.sum(1))
    grown = kept.append(TokenLayout.text([1] * 3))
    assert torch.equal(grown.between.sum(1), layout.between.sum(1)) and not grown.between[:, -1].any()


def test_a_window_keeps_the_text_of_its_frames():
    visual = VisualTokens.from_frames(torch.zeros(4, 2, 1))
    layout = TokenLayout.of([(1, visual, 2)], [[(1, 0), (2, 1), (0, 1), (1, 1)]])
    assert layout.owner[0].tolist() == [-1, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, -1, -1]
    part = layout.window([(0, 1), (4, 12), (16, 18)])
    assert part.owner[0].tolist() == [-1, 0, 0, 0, 0, 0, 1, 1, 1, -1, -1]
    assert part.frame[0].tolist() == [-1, -1, -1, 0, 0, -1, 1, 1, -1, -1, -1]
    without = layout.select(layout.frame != 1)[1]  # the frame's tokens are gone, its text is not
    assert without.owner[0].tolist() == [-1, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, -1, -1]
    assert without.window([(0, 1), (4, 10), (14, 16)]).owner[0].tolist() == [-1, 0, 0, 0, 1, 1, 1, -1, -1]


def test_empty_texts_are_none():
    visual = VisualTokens.from_frames(torch.zeros(2, 3, 1))
    layout = TokenLayout.of([(1, visual, 2)], [[(0, 0), (0, 0)]])
    assert rows_of(layout) == slow_sequence([(1, 2, 3, 2)]) and not layout.between.any()

"""Uniform selection: evenly spread, whatever the scores."""

import pytest
import torch

import xcomp


@pytest.fixture
def selector():
    return xcomp.load_selector("uniform")


@pytest.mark.parametrize(
    "frames, budget, chosen",
    [(8, 2, [2, 6]), (8, 4, [1, 3, 5, 7]), (9, 3, [1, 4, 7]), (5, 1, [2]), (4, 4, [0, 1, 2, 3]), (3, 9, [0, 1, 2])],
)
def test_the_middle_of_each_stretch(selector, frames, budget, chosen):
    assert selector.select(torch.zeros(frames), budget) == chosen


@pytest.mark.parametrize("frames, budget", [(1000, 7), (513, 512), (64, 48), (101, 10)])
def test_stretches_are_as_equal_as_can_be(selector, frames, budget):
    chosen = selector.select(torch.zeros(frames), budget)
    gaps = [b - a for a, b in zip(chosen, chosen[1:])]
    assert len(chosen) == budget and max(gaps) - min(gaps) <= 1 and min(gaps) >= 1
    # as far from the start as from the end, to within a frame
    assert abs(chosen[0] - (frames - 1 - chosen[-1])) <= 1


def test_scores_do_not_matter(selector):
    assert not selector.uses_video and selector.pixel_formats(None) == ()
    assert selector.select(torch.rand(6), 2) == selector.select(torch.zeros(6), 2)

"""Every selector against its contract, and the contract check against selectors that break it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from contracts.plugin_options import selector_names, selector_options

import xcomp
from xcomp.checkpoint import DTYPES
from xcomp.registry import load_class
from xcomp.selector import Candidates, Embeddings
from xcomp.testing import ContractError, check_selector, tiny_backbone


@pytest.mark.device
@pytest.mark.parametrize("name", selector_names())
def test_contract(name, tmp_path, device, dtype):
    backbone = tiny_backbone().to(device, DTYPES[dtype])
    check_selector(load_class("selector", name), backbone=backbone, **selector_options(name, tmp_path))


@pytest.mark.device
@pytest.mark.parametrize("name", selector_names())
def test_contract_with_another_language_model(name, tmp_path, device, dtype):
    backbone = tiny_backbone(family="llama", tokens_per_frame=3, layers=2).to(device, DTYPES[dtype])
    check_selector(load_class("selector", name), backbone=backbone, **selector_options(name, tmp_path))


@pytest.mark.parametrize("name", selector_names())
def test_equal_scores_are_chosen_from_by_number(name, tmp_path):
    """Whatever the score is that all frames have."""
    selector = xcomp.load_selector(name, **selector_options(name, tmp_path))
    vectors = torch.nn.functional.normalize(torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    frames = Candidates([float(i) for i in range(9)], 9.0, embed=lambda: Embeddings(vectors[:9], vectors[9:]))
    chosen = []
    for value in (0.0, 1.0, -3.0):
        scores = torch.full((9,), value)
        frames.asked, frames.score = {}, lambda places, scores=scores: scores[list(places)]
        chosen.append(selector.pick(scores, 4, frames))
    assert chosen[0] == chosen[1] == chosen[2] and len(chosen[0]) == 4


def test_the_best_are_chosen_and_of_ties_the_earlier():
    scores = torch.randint(0, 4, (500,), generator=torch.Generator().manual_seed(0)).float()
    ranked = sorted(range(500), key=lambda i: (-scores[i].item(), i))
    for budget in (1, 30, 200, 499):
        assert Brightness(None).select(scores, budget) == sorted(ranked[:budget])


# --- broken in one way each -------------------------------------------------------------------------------------------


class Brightness(xcomp.FrameSelector):
    """A sound one: the brightest frames."""

    @dataclass
    class Config:
        pass

    def score_frames(self, backbone, pixels, prefix_ids, question_ids, header_ids, compressor=None, *, question=None):
        return pixels.flatten(1).mean(1)


class NoScores(Brightness):
    score_frames = xcomp.FrameSelector.score_frames


class NoConfig(Brightness):
    Config = None


class UsesPerhaps(Brightness):
    uses_video = "sometimes"


class ScoresTheVideo(Brightness):
    def score_frames(self, backbone, pixels, *args, **kwargs):
        return pixels.mean()[None]


class ScoresInWholeNumbers(Brightness):
    def score_frames(self, backbone, pixels, *args, **kwargs):
        return torch.arange(len(pixels))


class LeavesFramesOut(Brightness):
    def score_frames(self, backbone, pixels, *args, **kwargs):
        return torch.where(torch.arange(len(pixels)) > 0, 1.0, torch.nan)


class KeepsTheGraph(Brightness):
    def score_frames(self, backbone, pixels, *args, **kwargs):
        return backbone.encode(pixels).flatten(1).mean(1)


class Guesses(Brightness):
    def score_frames(self, backbone, pixels, *args, **kwargs):
        return torch.rand(len(pixels))


class WritesIntoPixels(Brightness):
    def score_frames(self, backbone, pixels, *args, **kwargs):
        return pixels.sub_(0.5).flatten(1).mean(1)


class KnowsNoQuestion(Brightness):
    def score_frames(self, backbone, pixels, prefix_ids, question_ids, header_ids, compressor=None):
        return pixels.flatten(1).mean(1)


class ReturnsATensor(Brightness):
    def select(self, scores, budget):
        return torch.tensor(super().select(scores, budget))


class BestFirst(Brightness):
    def select(self, scores, budget):
        super().select(scores, budget)
        return scores.argsort(descending=True)[:budget].tolist()


class TakesOneTwice(Brightness):
    def select(self, scores, budget):
        chosen = super().select(scores, budget)
        return sorted(chosen[:-1] + chosen[:1])


class OneTooFew(Brightness):
    def select(self, scores, budget):
        return super().select(scores, budget)[1:]


class AlwaysTheBudget(Brightness):
    def select(self, scores, budget):
        super().select(scores, budget)
        return list(range(budget))


class CountsFromOne(Brightness):
    def select(self, scores, budget):
        return [i + 1 for i in super().select(scores, budget)]


class WritesIntoScores(Brightness):
    def select(self, scores, budget):
        chosen = super().select(scores, budget)
        scores[chosen] = -1
        return chosen


class PicksAtRandom(Brightness):
    def select(self, scores, budget):
        super().select(scores, budget)
        return sorted(torch.randperm(len(scores))[:budget].tolist())


class TakesAnyBudget(Brightness):
    def select(self, scores, budget):
        return super().select(scores, max(budget, 1))


BROKEN = {
    NoScores: r"score_frames\(\) is missing",
    NoConfig: "must have a Config dataclass",
    UsesPerhaps: "uses_video must be True or False",
    ScoresTheVideo: r"score_frames\(\) must return one floating-point score a frame, \(2,\)",
    ScoresInWholeNumbers: r"score_frames\(\) must return one floating-point score a frame",
    LeavesFramesOut: r"score_frames\(\) must give every frame a finite score",
    KeepsTheGraph: r"score_frames\(\) must run without a gradient",
    Guesses: r"score_frames\(\) must give the same for the same inputs",
    WritesIntoPixels: r"score_frames\(\) must leave its inputs as they are",
    KnowsNoQuestion: r"score_frames\(\) must not fail; TypeError",
    ReturnsATensor: r"select\(\) must return a list of int, not tensor",
    BestFirst: r"select\(\) must be ascending and name a frame once",
    TakesOneTwice: r"select\(\) must be ascending and name a frame once, not \[0, 0\]",
    OneTooFew: r"select\(\) must meet the budget: 1 of 2, not \[\]",
    AlwaysTheBudget: r"select\(\) must name frames within 0\.\.1, not \[0, 1, 2, 3, 4\]",
    CountsFromOne: r"select\(\) must name frames within 0\.\.1",
    WritesIntoScores: r"select\(\) must leave its inputs as they are",
    PicksAtRandom: r"select\(\) must give the same for the same inputs",
    TakesAnyBudget: r"select\(\) must refuse a budget of 0",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda c: c.__name__)
def test_a_broken_selector_is_caught(broken):
    torch.manual_seed(0)
    with pytest.raises(ContractError, match=f"selector '{broken.__name__}': {BROKEN[broken]}"):
        check_selector(broken)


def test_a_sound_selector_passes():
    check_selector(Brightness)
    check_selector(lambda: Brightness(None))

"""MDP³: a determinantal point process over frames and question, segment by segment, by dynamic programming.

A set of frames is worth how near they are to the question and how little they resemble one another (and the last frame
of the segment before): (2 / λ) Σ log k(text, i) + log det K, with a mixture of Gaussian kernels. Within a segment of
``segment`` frames the set grows greedily; over segments the best split of the budget is found.

Source: "MDP3: A Training-free Approach for List-wise Frame Selection in Video-LLMs" (arXiv 2501.02885) and its released
code: the condition's own term is counted again and there is no normaliser, as there. The released default is a single
segment (``segment: -1``); the paper's Markov part is the default here, and the last segment may be shorter, where the
released code fails. SigLIP's embeddings are the default, of long questions the mean over pieces.

A scorer without embeddings (``qc_comp``) can be combined too, which nobody has published: its scores, scaled to 0..1,
stand for the cosines between question and frames, and frames are compared by the backbone's mean visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xcomp.selector import Candidates, FrameSelector, Picker, SelectionCost, check_budget

UNREACHABLE = -float(2**31 - 1)


class MDP3(Picker):
    """Near the question, unlike one another."""

    @dataclass
    class Config:
        scorer: Any = field(
            default_factory=lambda: {
                "name": "clip_similarity",
                "checkpoint": "google/siglip-so400m-patch14-384",
                "long_text": "mean",
            }
        )  # the selector whose scores it picks from, with its options
        trade_off: float = 0.2  # λ: higher weighs variety against nearness
        segment: int = 32  # frames in a segment; -1: the whole video
        condition: int = 1  # last frames of the segment before that count as chosen; 0 or 1
        alphas: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5, 1.0, 2.0])  # widths of the kernels

        def __post_init__(self) -> None:
            if self.trade_off <= 0:
                raise ValueError(f"trade_off is {self.trade_off}; it must be above 0")
            if self.segment != -1 and self.segment < 1:
                raise ValueError(f"segment is {self.segment}; it must be at least 1, or -1 for the whole video")
            if self.condition not in (0, 1):
                raise ValueError(f"condition is {self.condition}; it must be 0 or 1")
            if not self.alphas or min(self.alphas) <= 0:
                raise ValueError(f"alphas are {self.alphas}; they must be above 0, at least one")

    @property
    def uses_video(self) -> bool:
        return True

    def cost(self, backbone, num_frames, query, compressor) -> SelectionCost | None:
        """The scorer's; where it has no embeddings, the backbone's tokens of all frames too."""
        cost = super().cost(backbone, num_frames, query, compressor)
        if cost is None or type(self.scorer).embed is not FrameSelector.embed:
            return cost
        return SelectionCost(cost.frames_encoded + num_frames, cost.video_macs, cost.question_macs)

    def pick(self, scores: Tensor, budget: int, frames: Candidates) -> list[int]:
        check_budget(budget)
        if budget >= len(scores):
            return list(range(len(scores)))
        seen, alphas = frames.embeddings(), self.config.alphas
        if seen.text is None:
            spread = scores.max() - scores.min()
            cosines = (scores - scores.min()) / spread if spread > 0 else torch.zeros_like(scores)
            nearness = gaussians((2 - 2 * cosines.float()).clamp(min=0), alphas)
        else:
            nearness = multi_gaussian(seen.text.float(), seen.frames.float(), alphas)[0]
        kernel = multi_gaussian(seen.frames.float(), seen.frames.float(), alphas)
        options = self.config.trade_off, self.config.segment, self.config.condition
        return mdp3_frames(nearness, kernel, budget, *options)[0]


def multi_gaussian(x: Tensor, y: Tensor, alphas: Sequence[float]) -> Tensor:
    """(n, m): the sum over ``alphas`` of exp(−‖x − y‖² / 2a); x (n, E), y (m, E)."""
    return gaussians(torch.cdist(x, y).square(), alphas)


def gaussians(squared: Tensor, alphas: Sequence[float]) -> Tensor:
    return torch.stack([torch.exp(-squared / (2 * a)) for a in alphas]).sum(0)


def mdp3_frames(
    nearness: Tensor, kernel: Tensor, budget: int, trade_off: float, segment: int, condition: int = 1
) -> tuple[list[int], Tensor]:
    """Ascending indices of ``budget`` frames, and the best values (budget + 1,) with each number of frames.

    ``nearness`` (T,) is the kernel of the text with each frame, ``kernel`` (T, T) that of the frames.
    """
    count = len(nearness)
    segment = count if segment == -1 else segment
    worth = 2 / trade_off * nearness.double().log()
    kernel = kernel.double()
    values, chosen = [0.0] + [UNREACHABLE] * budget, [[] for _ in range(budget + 1)]
    for first in range(0, count, segment):
        members = list(range(first, min(first + segment, count)))
        new_values, new_chosen = list(values), list(chosen)
        for before in range(min(budget, first) + 1):
            if values[before] == UNREACHABLE:
                continue
            given = chosen[before][-condition:] if condition else []
            for added, (gain, picked) in enumerate(greedy(worth, kernel, members, budget - before, given), start=1):
                if values[before] + gain > new_values[before + added]:
                    new_values[before + added] = values[before] + gain
                    new_chosen[before + added] = chosen[before] + sorted(picked)
        values, chosen = new_values, new_chosen
    return chosen[budget], torch.tensor(values)


def greedy(
    worth: Tensor, kernel: Tensor, members: list[int], most: int, given: list[int]
) -> list[tuple[float, list[int]]]:
    """For 1, 2, … frames of ``members``: the value of the best set found and the set, each one larger by one frame.

    The determinant grows by the rest of a frame's kernel that the frames before it do not explain (Cholesky, row by
    row), which is how greedy search over a determinant is done (Chen et al., 2018).
    """
    rest = kernel.diagonal().clone()
    rows = kernel.new_zeros(0, len(kernel))

    def take(i: int) -> float:
        nonlocal rows, rest
        own = rest[i].clamp(min=1e-12)
        row = (kernel[i] - rows[:, i] @ rows) / own.sqrt()
        rows, rest = torch.cat([rows, row[None]]), rest - row.square()
        return own.log().item()

    value = sum(take(i) + worth[i].item() for i in given)
    left, picked, found = torch.tensor(members), [], []
    for _ in range(min(most, len(members))):
        gains = worth[left] + rest[left].clamp(min=1e-12).log()
        place = int(gains.argmax())
        i = int(left[place])
        value += worth[i].item() + take(i)
        picked = [*picked, i]
        left = torch.cat([left[:place], left[place + 1 :]])
        found.append((value, picked))
    return found

"""BOLT: inverse transform sampling. Scores, sharpened by a power, are a density that equal shares are drawn from.

Source: "BOLT: Boost Large Vision-Language Model Without Training for Long-form Video Understanding" (arXiv 2503.21483);
its released code scores frames at one a second by CLIP ViT-L/14. ``power`` is 3 on Video-MME and MLVU, 2.5 on
LongVideoBench; −1 leaves scores as they are.

The released rule shows a frame several times where the density is high, and so does the default here; ``unique: true``
takes the nearest unused frame instead. Deviation: for a budget of one frame the released rule names a frame behind the
last; here it is the last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from xcomp.selector import Candidates, Picker, check_budget


class BOLT(Picker):
    """Frames at equal shares of the scores' cumulative distribution."""

    @dataclass
    class Config:
        scorer: Any = field(
            default_factory=lambda: {"name": "clip_similarity", "checkpoint": "openai/clip-vit-large-patch14"}
        )  # the selector whose scores it picks from, with its options
        power: float = 3.0  # scores are raised to it; -1: taken as they are
        unique: bool = False  # the nearest unused frame in place of one that was taken

        def __post_init__(self) -> None:
            if self.power != -1 and self.power <= 0:
                raise ValueError(f"power is {self.power}; it must be above 0, or -1 for none")

    @property
    def repeats(self) -> bool:
        return not self.config.unique

    def pick(self, scores: Tensor, budget: int, frames: Candidates) -> list[int]:
        check_budget(budget)
        if budget >= len(scores):
            return list(range(len(scores)))
        chosen = inverse_transform(scores.float().numpy(), budget, self.config.power).clip(max=len(scores) - 1).tolist()
        return nearest_unused(chosen, len(scores)) if self.config.unique else chosen


def inverse_transform(scores: np.ndarray, num_frames: int, power: float) -> np.ndarray:
    """(num_frames,) indices, ascending, repeats possible; scores (T,) float32. T itself where no share is so high."""
    scores = scores - scores.min()
    largest = scores.max()
    weights = scores / largest if largest > 0 else np.ones_like(scores)
    if power != -1:
        weights = weights**power
    shares = np.cumsum(weights / weights.sum())
    return np.searchsorted(shares, np.linspace(1 / num_frames, 1 - 1 / num_frames, num_frames))


def nearest_unused(chosen: list[int], num_candidates: int) -> list[int]:
    """Each repeat becomes the nearest frame that is not taken, the earlier of two as near; ascending."""
    taken = set(chosen)
    for i in [b for a, b in zip(chosen, chosen[1:]) if a == b]:
        free = (j for j in range(num_candidates) if j not in taken)
        taken.add(min(free, key=lambda j: (abs(j - i), j)))
    return sorted(taken)

"""Top-k: the best frames of any scorer, if need be a minimum time apart.

With ``min_seconds: 0`` it is what every scorer does by itself. Otherwise frames are taken from the best downwards, each
at least so far from those taken; where the video is too short for that, the best of the others fill the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xcomp.selector import Candidates, Picker, best, check_budget, fill_up


class TopK(Picker):
    """The highest scores, a minimum distance apart."""

    @dataclass
    class Config:
        scorer: Any = "clip_similarity"  # the selector whose scores it picks from, with its options
        min_seconds: float = 0.0  # least time between two frames

        def __post_init__(self) -> None:
            if self.min_seconds < 0:
                raise ValueError(f"min_seconds is {self.min_seconds}; it must be at least 0")

    def pick(self, scores: Tensor, budget: int, frames: Candidates) -> list[int]:
        check_budget(budget)
        if self.config.min_seconds == 0:
            return best(scores, budget)
        chosen: list[int] = []
        for i in torch.sort(scores, descending=True, stable=True).indices.tolist():
            if len(chosen) == budget:
                break
            apart = (abs(frames.times[i] - frames.times[j]) for j in chosen)
            # Times are rounded to milliseconds.
            if all(seconds >= self.config.min_seconds - 1e-3 for seconds in apart):
                chosen.append(i)
        return fill_up(chosen, scores, budget)

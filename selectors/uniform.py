"""Uniform selection: frames evenly spaced over the candidates, whatever the question; what others are held against."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from xcomp.sampling import uniform_indices
from xcomp.selector import FrameSelector


class Uniform(FrameSelector):
    """The middle frame of each of ``budget`` equal stretches."""

    uses_video = False
    downsamples = True

    @dataclass
    class Config:
        pass

    def select(self, scores: Tensor, budget: int) -> list[int]:
        if budget < 1:
            raise ValueError(f"a frame budget of {budget} was asked for; it must be at least 1")
        return uniform_indices(len(scores), min(budget, len(scores)))

"""merge_frames: the tokens of neighbouring frames are averaged before the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xcomp import Compressor


class MergeFrames(Compressor):
    """(T, N, D) → (T / frames, N, D), rounded up: the last run of frames may be shorter."""

    @dataclass
    class Config:
        frames: int = 2  # in a row that become one

        def __post_init__(self) -> None:
            if self.frames < 1:
                raise ValueError(f"frames is {self.frames}; it must be at least 1")

    def before_llm(self, tokens: Tensor) -> Tensor:
        return torch.stack([run.mean(0) for run in tokens.split(self.config.frames)])

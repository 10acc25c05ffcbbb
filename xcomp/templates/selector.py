"""skeleton: the frames that differ most from the one before them, whatever the question.

A selector gives every candidate frame a score for a question; the budget's number of best frames is shown. It may
override ``select(scores, budget)`` too, to pick otherwise. With ``uses_video = False`` nothing is scored: ``select``
is given zeros, and only the frames that it picks are decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xcomp import FrameSelector


class Skeleton(FrameSelector):
    """Mean change of a frame's pixels since ``back`` frames before."""

    @dataclass
    class Config:
        """The options that YAML can set, their types and defaults, and what `xcomp plugins skeleton` says of them."""

        back: int = 1  # frames to the one it is held against

        def __post_init__(self) -> None:
            if self.back < 1:
                raise ValueError(f"back is {self.back}; it must be at least 1")

    @torch.no_grad()
    def score_frames(
        self,
        backbone,  # for its tokens: backbone.encode(pixels) is (T, N, D)
        pixels: Tensor,  # (T, 3, h, w), as the backbone preprocessed them
        prefix_ids: Tensor,  # the prompt's token ids: prefix | video | question | header
        question_ids: Tensor,
        header_ids: Tensor,
        compressor=None,  # the run's, for selectors that run the language model
        *,
        question: str | None = None,  # in words, for selectors with a text encoder of their own
    ) -> Tensor:
        """(T,) scores, finite, higher is better."""
        before = pixels[(torch.arange(len(pixels)) - self.config.back).clamp(min=0)]
        return (pixels - before).abs().float().flatten(1).mean(1)

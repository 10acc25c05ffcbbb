"""EVS: patches that hardly change from the frame before leave.

Paper: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference" (arXiv 2510.14624). A
token's score is one minus its cosine to the token at the same place one frame earlier; the first frame stays whole.
Over the whole video the highest scores stay: of n tokens ⌊n(1 − q)⌋, but never fewer than one frame has.

Default q = 0.7; the authors' implementation has none. The kept tokens' original positions (three-dimensional RoPE) are
the backbone's matter: frame and slot are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xcomp.compressor import About, Budget, Compressor, QuestionTokens
from xcomp.merging import cosine, top_ascending
from xcomp.visual import VisualTokens


class EVS(Compressor):
    """Keeps what changes."""

    about = About("Efficient Video Sampling (arXiv 2510.14624)", "before the language model", keeps=0.3)

    @dataclass
    class Config:
        q: float = 0.7  # share of the video's tokens that leave

        def __post_init__(self) -> None:
            if not 0 <= self.q < 1:
                raise ValueError(f"q is {self.q}; it must be a share of at least 0 and below 1")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        """A video of fewer than 1 / keep frames keeps more: its first frame."""
        return replace(config, q=1 - budget.keep)

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        frames = visual.frames()
        return visual.select(top_ascending(change(frames).flatten(), num_kept(*frames.shape[:2], self.config.q)))


def num_kept(num_frames: int, tokens_per_frame: int, q: float) -> int:
    """Tokens that stay of a video."""
    return max(tokens_per_frame, int(num_frames * tokens_per_frame * (1 - q)))


def change(frames: Tensor) -> Tensor:
    """(T, N, D) → (T, N) float32: one minus the cosine to the same place one frame earlier, 255 in the first frame."""
    first = torch.full((1, frames.shape[1]), 255.0, device=frames.device)
    return torch.cat([first, 1 - cosine(frames[1:], frames[:-1])])

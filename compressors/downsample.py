"""Down-sampling: every frame at a lower resolution, the baseline that many pruning methods fail to beat.

Paper: "Are We Using the Right Benchmark: An Evaluation Framework for Visual Token Compression Methods" (arXiv
2510.07143). The authors shrink pictures by r = 2, 3, 4, 5 or 10 to a side (Pillow, bicubic), which leaves 1 / r² of
the tokens.

Deviation: the visual tokens are pooled instead, by area over the frame's grid, as many towers take one size only; a
frame's grid must be known. :func:`shrink` is the authors' resizing of frames, for towers that take any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from xcomp.compressor import About, Budget, Compressor, QuestionTokens
from xcomp.merging import at_places, exact, frame_sizes, places
from xcomp.visual import VisualTokens


class Downsample(Compressor):
    """Area pooling of a frame's grid (h, w) to (⌊h / ratio⌋, ⌊w / ratio⌋)."""

    about = About(
        "Are We Using the Right Benchmark (arXiv 2510.07143)",
        "before the language model",
        deviates="pools the grid of visual tokens instead of shrinking the pictures",
        keeps=0.25,
    )

    needs = ("grid",)
    downsamples = True

    @dataclass
    class Config:
        ratio: float = 2.0  # each side is divided by it; 1 / ratio² of the tokens stay

        def __post_init__(self) -> None:
            if not 1 <= self.ratio < math.inf:
                raise ValueError(f"ratio is {self.ratio}; it must be at least 1")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        """The grid is not known here: it is taken for the one nearest to a square."""
        height = next(h for h in range(math.isqrt(tokens_per_frame), 0, -1) if tokens_per_frame % h == 0)
        grid = (height, tokens_per_frame // height)
        wanted = budget.keep * tokens_per_frame
        ratios = {side / part for side in grid for part in range(1, side + 1)}
        # Of equally near ones the ratio nearest to what the budget means.
        best = min(ratios, key=lambda r: (abs(math.prod(smaller(grid, r)) - wanted), abs(r - budget.keep**-0.5)))
        reached = math.prod(smaller(grid, best))
        if abs(reached - wanted) > 1:
            raise ValueError(
                f"downsample cannot keep {budget.keep:g} of a grid of {grid[0]} x {grid[1]}; "
                f"nearest: {reached / tokens_per_frame:.4g}"
            )
        return replace(config, ratio=best)

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        if visual.grid is None:
            raise ValueError("downsample needs to know the grid of a frame's tokens, and this backbone has none")
        if self.config.ratio == 1:
            return visual
        tokens, slots, size = pool(visual.frames(), frame_sizes(visual), visual.grid, self.config.ratio)
        index = places(slots.expand(len(tokens), -1), visual.frame_tokens)
        return at_places(visual, tokens.flatten(0, 1), index, size.flatten())


def smaller(grid: tuple[int, int], ratio: float) -> tuple[int, int]:
    """The grid's sides divided by the ratio, rounded down, at least 1."""
    height, width = (max(1, int(side / ratio + 1e-9)) for side in grid)
    return height, width


@exact
def pool(frames: Tensor, size: Tensor, grid: tuple[int, int], ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """(T, N, D) → means of the smaller grid's areas (T, N', D) float32, the slot amid each area (N',), sizes (T, N').

    Where sides do not divide, neighbouring areas overlap by a row or column, and a token's size is its share.
    """
    height, width = smaller(grid, ratio)
    pooled = adaptive_avg_pool2d(frames.float().transpose(1, 2).unflatten(2, grid), (height, width))
    mean_size = adaptive_avg_pool2d(size.unflatten(1, grid).unsqueeze(1), (height, width)).flatten(1)
    rows = (2 * torch.arange(height, device=frames.device) + 1) * grid[0] // (2 * height)
    columns = (2 * torch.arange(width, device=frames.device) + 1) * grid[1] // (2 * width)
    slots = (rows.unsqueeze(1) * grid[1] + columns).flatten()
    return pooled.flatten(2).transpose(1, 2), slots, mean_size * (frames.shape[1] / (height * width))


def shrink(frames: Tensor, ratio: int) -> Tensor:
    """(T, H, W, 3) uint8 → (T, H // ratio, W // ratio, 3): Pillow's bicubic resizing, as the authors do it."""
    size = frames.shape[2] // ratio, frames.shape[1] // ratio
    if min(size) < 1:
        raise ValueError(f"ratio {ratio} leaves nothing of pictures of {frames.shape[2]} x {frames.shape[1]}")
    pictures = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames.cpu().numpy()]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).to(frames.device)

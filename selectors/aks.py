"""AKS: adaptive keyframe sampling, which weighs the best frames against an even spread over the video.

The video is halved again and again; a part whose best frames stand out from its mean is left whole. Every part gives
its share of the budget, its own best frames.

Source: "Adaptive Keyframe Sampling for Long Video Understanding" (arXiv 2502.21271); its released code scores frames at
one a second by BLIP's image-text matching, the default here. Set ``sampling.rate: 1`` for the same candidates.

Deviations. The released rule gives nothing where the budget is below 2^depth, too little where it is no power of two or
a part has few frames, and NaN for equal scores. Here the depth stays within the budget's logarithm, the best unused
frames fill it up, and equal scores count as zero. ``released: true`` follows the code; where that gives too few frames
it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcomp.backbone import QuestionError
from xcomp.selector import Candidates, Picker, check_budget, fill_up


class AKS(Picker):
    """Halving, with the best frames of each part."""

    @dataclass
    class Config:
        scorer: Any = field(
            default_factory=lambda: {"name": "clip_similarity", "checkpoint": "Salesforce/blip-itm-large-coco"}
        )  # the selector whose scores it picks from, with its options
        threshold: float = 0.8  # t1: a part stays whole if its best frames' mean is further above its mean (of 0..1)
        min_std: float = -100.0  # t2: … and its scores scatter more than this
        depth: int = 5  # halvings at most
        released: bool = False  # as the released code, which may give too few frames

        def __post_init__(self) -> None:
            if self.depth < 0:
                raise ValueError(f"depth is {self.depth}; it must be at least 0")

    def pick(self, scores: Tensor, budget: int, frames: Candidates) -> list[int]:
        check_budget(budget)
        if budget >= len(scores):
            return list(range(len(scores)))
        depth = self.config.depth if self.config.released else min(self.config.depth, budget.bit_length() - 1)
        limits = self.config.threshold, self.config.min_std, depth
        chosen = aks_frames(scores.double().numpy(), budget, *limits)
        if self.config.released and len(chosen) < budget:
            raise QuestionError(
                f"aks: the released rule gives {len(chosen)} of {budget} frames at depth {depth}; lower depth, or "
                "leave out released"
            )
        return fill_up(chosen, scores, budget)


def aks_frames(scores: np.ndarray, budget: int, threshold: float, min_std: float, depth: int) -> list[int]:
    """Ascending indices of frames of scores (T,), at most ``budget``; all if there are fewer candidates."""
    if len(scores) < budget:
        return list(range(len(scores)))
    spread = scores.max() - scores.min()
    scaled = (scores - scores.min()) / spread if spread > 0 else np.zeros_like(scores)
    chosen: list[int] = []
    for first, last, level in aks_segments(scaled, budget, threshold, min_std, depth):
        part = torch.from_numpy(scaled[first : last + 1])
        order = torch.sort(part, descending=True, stable=True).indices[: budget >> level]
        chosen += (order + first).tolist()
    return sorted(chosen)


def aks_segments(
    scaled: np.ndarray, budget: int, threshold: float, min_std: float, depth: int
) -> list[tuple[int, int, int]]:
    """The parts that are not halved further: first and last frame, and how often they were halved."""
    final, open_parts = [], [(0, len(scaled))]
    for level in range(depth + 1):
        halves = []
        for first, stop in open_parts:
            part = scaled[first:stop]
            gap = np.sort(part)[::-1][:budget].mean() - part.mean() if len(part) else 0.0
            if level == depth or (gap > threshold and part.std() > min_std):
                if len(part):
                    final.append((first, stop - 1, level))
                continue
            middle = first + (stop - first) // 2
            halves += [(first, middle), (middle, stop)]
        open_parts = halves
    return final

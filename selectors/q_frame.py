"""Q-Frame: frames drawn without replacement by the softmax of their scores (Gumbel's trick), in three resolutions.

Source: "Q-Frame: Query-aware Frame Selection and Multi-Resolution Adaptation for Video-LLMs" (arXiv 2506.22139). 128
frames are scored by Long-CLIP-L, of which the ``high`` best are shown at half the width and height, the next ``mid`` at
a quarter, the next ``low`` at an eighth. The default is the published combination.

Deviations. The draws are seeded by the run and the question; the released code's are not. ``transformers`` has no
Long-CLIP: CLIP ViT-L/14 with plain dot products stands in, and cuts questions of more than 77 tokens. A backbone that
shows all frames of a video at one size cannot follow the published choice and is refused; ``one_resolution: true``
shows the budget's number of frames in the same order of preference, all at the backbone's size, and takes no notice of
``high``, ``mid`` and ``low``. No backbone here takes several sizes; one that does says so by ``frame_sizes = True``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcomp.backbone import Backbone
from xcomp.contract import name_of
from xcomp.selector import Candidates, Picker, check_budget


class QFrame(Picker):
    """Gumbel top-k of the scores."""

    @dataclass
    class Config:
        scorer: Any = field(
            default_factory=lambda: {
                "name": "clip_similarity",
                "checkpoint": "openai/clip-vit-large-patch14",
                "similarity": "dot",
            }
        )  # the selector whose scores it picks from, with its options
        tau: float = 0.8  # temperature: higher draws are less decided
        high: int = 4  # frames at half the width and height, …
        mid: int = 8  # … a quarter, …
        low: int = 32  # … and an eighth
        one_resolution: bool = False  # show the budget's number of frames, all at the backbone's size

        def __post_init__(self) -> None:
            if self.tau <= 0:
                raise ValueError(f"tau is {self.tau}; it must be above 0")
            if min(self.high, self.mid, self.low) < 0:
                raise ValueError("high, mid and low must be at least 0")

    def check_backbone(self, backbone: Backbone) -> None:
        super().check_backbone(backbone)
        if not self.config.one_resolution:
            sizes = f"{self.config.high} high, {self.config.mid} mid and {self.config.low} low"
            raise ValueError(
                f"q_frame: {name_of('backbone', backbone)} shows all frames of a video at one size, so {sizes} ones "
                "cannot be shown; with one_resolution: true the budget's number of frames is, all at that size"
            )

    def pick(self, scores: Tensor, budget: int, frames: Candidates) -> list[int]:
        check_budget(budget)
        uniform = torch.from_numpy(frames.rng().random(len(scores), dtype=np.float32))
        return sorted(gumbel_order(scores.float(), uniform, self.config.tau)[1][:budget].tolist())


def gumbel_order(logits: Tensor, uniform: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Perturbed log-probabilities (T,) of logits (T,), and the frames in descending order of them."""
    noise = -torch.log(-torch.log(uniform + 1e-10) + 1e-10)
    perturbed = torch.log((logits / tau).softmax(-1) + 1e-10) + noise
    return perturbed, torch.sort(perturbed, descending=True, stable=True).indices


def resolution_levels(order: Tensor, high: int, mid: int, low: int) -> Tensor:
    """(T,): 1 high, 2 mid, 3 low, 0 not shown, for frames in order of preference."""
    levels = torch.zeros(len(order), dtype=torch.long)
    for level, (first, count) in enumerate(((0, high), (high, mid), (high + mid, low)), start=1):
        levels[order[first : first + count]] = level
    return levels

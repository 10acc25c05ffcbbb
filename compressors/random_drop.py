"""Random dropping: tokens stay by chance. What every method that chooses has to beat.

No paper of its own; the control row of most pruning papers. The choice follows ``seed`` and the number of tokens alone,
so the same video keeps the same tokens every time, on every device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from xcomp.compressor import About, Budget, Compressor, QuestionTokens
from xcomp.merging import check_share
from xcomp.visual import VisualTokens


class RandomDrop(Compressor):
    """Keeps a random share of the tokens."""

    about = About("random control of pruning papers", "before the language model", keeps=0.25)

    @dataclass
    class Config:
        ratio: float = 0.25  # share of the tokens kept
        scope: str = "video"  # video: any tokens of all; frame: the same share of every frame
        seed: int = 0  # of the draws

        def __post_init__(self) -> None:
            check_share("ratio", self.ratio)
            if self.scope not in ("video", "frame"):
                raise ValueError(f"scope is '{self.scope}'; it must be video or frame")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        return replace(config, ratio=budget.keep)

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        generator = torch.Generator().manual_seed(self.config.seed)
        order = torch.rand(len(visual), generator=generator).argsort()
        if self.config.scope == "video":
            kept = order[: max(1, round(len(visual) * self.config.ratio))]
        else:
            frame = visual.frame.cpu()
            order = order[frame[order].argsort(stable=True)]  # frame by frame, at random within each
            counts = visual.counts().cpu()
            rank = torch.arange(len(visual)) - (counts.cumsum(0) - counts)[frame[order]]
            share = (counts * self.config.ratio).round().clamp(min=1)
            kept = order[rank < share[frame[order]]]
        return visual.select(kept.sort().values.to(visual.tokens.device))

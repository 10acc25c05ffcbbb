"""DivPrune: the kept tokens are as far from one another as can be.

Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv 2503.02175). Distance is one
minus cosine. The first pick is the token farthest from its nearest other; then, again and again, the one farthest from
its nearest pick.

All tokens of a video are one set; ``scope: frame`` chooses the same share of each frame. No matrix of all distances is
made: the first pick computes them in blocks, each later pick its own row. Time is O(n² D · ratio) over a whole video.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xcomp import merging
from xcomp.compressor import About, Budget, Compressor, QuestionTokens
from xcomp.merging import check_share, exact, places, unit
from xcomp.visual import VisualTokens


class DivPrune(Compressor):
    """Max-min diversity."""

    about = About("DivPrune (arXiv 2503.02175)", "before the language model", keeps=0.098)

    @dataclass
    class Config:
        ratio: float = 0.098  # share of the tokens kept
        scope: str = "video"  # video: all tokens are one set; frame: every frame is one

        def __post_init__(self) -> None:
            check_share("ratio", self.ratio)
            if self.scope not in ("video", "frame"):
                raise ValueError(f"scope is '{self.scope}'; it must be video or frame")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        return replace(config, ratio=budget.keep)

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        if self.config.scope == "video":
            kept = most_diverse(visual.tokens.unsqueeze(0), self._count(len(visual)))[0]
        else:
            frames = visual.frames()
            kept = most_diverse(frames, self._count(frames.shape[1]))
            kept = places(kept, visual.frame_tokens)
        return visual.select(kept.sort().values)

    def _count(self, num_tokens: int) -> int:
        return max(1, round(num_tokens * self.config.ratio))


@exact
def most_diverse(x: Tensor, count: int) -> Tensor:
    """(B, n, D) → (B, count): what is picked of each set, in order."""
    x, sets = unit(x), torch.arange(len(x), device=x.device)
    far = nearest_other(x)
    picks = [far.argmax(-1)]
    far = torch.full_like(far, torch.inf)
    for _ in range(count - 1):
        row = (x @ x[sets, picks[-1]].unsqueeze(-1)).squeeze(-1)
        far = torch.minimum(far, 1 - row)
        far[sets, picks[-1]] = -torch.inf
        picks.append(far.argmax(-1))
    return torch.stack(picks, dim=1)


def nearest_other(x: Tensor) -> Tensor:
    """Vectors of length one (B, n, D) → (B, n) distance to the nearest other, in blocks of similarities."""
    found = []
    step = max(1, merging.BLOCK // max(x.shape[0] * x.shape[1], 1))
    for start in range(0, x.shape[1], step):
        part = x[:, start : start + step]
        similarity = part @ x.transpose(1, 2)
        similarity.diagonal(start, dim1=1, dim2=2).fill_(-torch.inf)
        found.append(1 - similarity.amax(-1))
    return torch.cat(found, dim=1)

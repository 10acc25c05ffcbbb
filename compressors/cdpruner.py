"""CDPruner: in each frame, tokens that matter to the question and differ from one another, by a determinantal process.

Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (arXiv 2506.10967).
With S the cosines of a frame's tokens and r their relevance, scaled to 0..1 over the video, the kernel is r_i S_ij r_j;
tokens are picked one by one so that its determinant grows most.

Deviation: the released relevance is minus the mean cosine of CLIP's patch and text embeddings (minus, as CLIP's patches
are anti-aligned with text). Most backbones have no text tower at hand, so ours is the cosine of the projected
tokens to the question's embeddings, mean over its tokens, with a plus (``relevance_sign``). :func:`relevance` is the
formula for any embeddings. A frame cannot have more independent tokens than channels: further picks go by position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xcomp import merging
from xcomp.compressor import About, Budget, Compressor, QuestionTokens
from xcomp.merging import check_share, exact, places, unit
from xcomp.visual import VisualTokens


class CDPruner(Compressor):
    """Keeps round(ratio · N) tokens of each frame."""

    about = About(
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning (arXiv 2506.10967)",
        "before the language model",
        deviates="relevance by the language model's embeddings instead of CLIP's text tower",
        keeps=1 / 9,
    )
    uses_question = True

    @dataclass
    class Config:
        ratio: float = 1 / 9  # share of each frame's tokens kept; 64 of 576
        relevance: str = "embeddings"  # embeddings: likeness to the question's; none: diversity alone
        relevance_sign: float = 1.0  # -1: what is least like the question matters most
        per_frame: bool = False  # relevance is scaled to 0..1 in each frame, not over the video

        def __post_init__(self) -> None:
            check_share("ratio", self.ratio)
            if self.relevance not in ("embeddings", "none"):
                raise ValueError(f"relevance is '{self.relevance}'; it must be embeddings or none")
            if self.relevance_sign not in (1, -1):
                raise ValueError(f"relevance_sign is {self.relevance_sign}; it must be 1 or -1")

    def __init__(self, config: Config):
        super().__init__(config)
        self.uses_question = config.relevance != "none"

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        return replace(config, ratio=budget.keep)

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        c, frames = self.config, visual.frames()
        if c.relevance == "none":
            relevant = torch.ones(frames.shape[:2], device=frames.device)
        elif question is None:
            raise ValueError("cdpruner needs the question; relevance: none chooses without")
        else:
            relevant = relevance(frames, question.embeddings, c.relevance_sign, per_frame=c.per_frame)
        kept = most_conditionally_diverse(frames, relevant, max(1, round(frames.shape[1] * c.ratio)))
        return visual.select(places(kept, frames.shape[1]))


@exact
def relevance(patches: Tensor, texts: Tensor, sign: float = -1.0, *, per_frame: bool = False) -> Tensor:
    """Patch embeddings (T, N, C) and text embeddings (Q, C) → (T, N): mean cosine over texts, scaled to 0..1.

    All ones where all are equal.
    """
    mean = sign * (unit(patches) @ unit(texts).to(patches.device).T).mean(-1)
    low, high = (f(mean, (1,) if per_frame else (0, 1), keepdim=True) for f in (torch.amin, torch.amax))
    return torch.where(high > low, (mean - low + 1e-6) / (high - low).clamp(min=1e-30), 1.0)


@exact
def kernel(frames: Tensor, relevance: Tensor) -> Tensor:
    """(T, N, D) and (T, N) → (T, N, N) r_i S_ij r_j."""
    x = unit(frames)
    return relevance.unsqueeze(2) * (x @ x.transpose(1, 2)) * relevance.unsqueeze(1)


def most_conditionally_diverse(frames: Tensor, relevance: Tensor, count: int) -> Tensor:
    """(T, N, D) and (T, N) → (T, count) ascending. At most BLOCK elements of kernels at once, or those of a frame."""
    step = max(1, merging.BLOCK // frames.shape[1] ** 2)
    parts = zip(frames.split(step), relevance.split(step))
    return torch.cat([largest_determinant(kernel(*part), count) for part in parts]).sort(-1).values


@exact
def largest_determinant(kernel: Tensor, count: int) -> Tensor:
    """Greedy choice of (B, n, n) → (B, count) in the order of picking, by a Cholesky decomposition that grows.

    What the picks so far span is left to the end.
    """
    sets = torch.arange(len(kernel), device=kernel.device)
    rest = kernel.diagonal(dim1=1, dim2=2)  # what the picks so far do not span of each
    floor = 1e-6 * rest
    factors = kernel.new_zeros(len(kernel), count, kernel.shape[1])
    picked = torch.zeros_like(rest, dtype=torch.bool)
    picks = []
    for step in range(count):
        pick = rest.masked_fill(picked, -torch.inf).argmax(-1)
        left = rest[sets, pick].unsqueeze(1)
        known = factors[sets, :step, pick].unsqueeze(1) @ factors[:, :step]
        factor = (kernel[sets, pick] - known.squeeze(1)) / left.sqrt()
        factors[:, step] = torch.where(left > 0, factor, 0.0)
        rest = rest - factors[:, step].square()
        rest = torch.where(rest > floor, rest, 0.0)
        picked[sets, pick] = True
        picks.append(pick)
    return torch.stack(picks, dim=1)

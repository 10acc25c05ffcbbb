"""VisionZip: the tokens that get most of the tower's attention stay, the rest merge into a few of themselves.

Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv 2412.04467). Per frame, of k
tokens ⌊k · 54/64⌋ are dominant: those of highest attention. Of the rest, at even steps, targets are taken; every other
token joins the target whose keys are most alike, and a target becomes the sum of itself and the mean of its joiners.

``attention: received`` is the form used for video with towers that have no class token (SigLIP): attention that a token
receives; ``class`` is CLIP's form, attention that the class token pays. Deviations: both work on the projected and
pooled tokens, as the form for video does (the authors merge CLIP's before the projector and hand the class token on,
which is no visual token here); tokens come in the order of position, unless ``released_order``; one dominant token at
least.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xcomp.compressor import About, Budget, Compressor, QuestionTokens
from xcomp.merging import (
    at_places,
    check_share,
    exact,
    frame_sizes,
    merge_into,
    nearest_by_cosine,
    others,
    places,
    rows,
    top_ascending,
)
from xcomp.visual import VisualTokens


class VisionZip(Compressor):
    """Keeps round(ratio · N) tokens of each frame, dominant and contextual ones."""

    about = About(
        "VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467)",
        "before the language model",
        deviates="after the projector also with CLIP; position order",
        keeps=1 / 9,
    )
    needs: tuple[str, ...] = ("attention", "keys")

    @dataclass
    class Config:
        ratio: float = 1 / 9  # share of each frame's tokens left; 64 of 576
        dominant: float = 54 / 64  # share of these that stay as they are
        attention: str = "received"  # received (towers without a class token) or class
        contextual: str = "sum"  # sum: target plus mean of what joins it (released); mean: of all of them
        released_order: bool = False  # dominant tokens first, then contextual ones

        def __post_init__(self) -> None:
            check_share("ratio", self.ratio)
            check_share("dominant", self.dominant)
            if self.attention not in ("received", "class"):
                raise ValueError(f"attention is '{self.attention}'; it must be received or class")
            if self.contextual not in ("sum", "mean"):
                raise ValueError(f"contextual is '{self.contextual}'; it must be sum or mean")

    def __init__(self, config: Config):
        super().__init__(config)
        self.needs = ("cls_attention" if config.attention == "class" else "attention", "keys")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        return replace(config, ratio=budget.keep)

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        c, frames = self.config, visual.frames()
        scores, keys = (visual.tower[name].unflatten(0, frames.shape[:2]) for name in self.needs)
        dominant, contextual = split(max(1, round(frames.shape[1] * c.ratio)), c.dominant)
        tokens, slot, size = zip_frames(
            frames, scores, keys, dominant, contextual, size=frame_sizes(visual), mean=c.contextual == "mean"
        )
        return at_places(
            visual, tokens.flatten(0, 1), places(slot, frames.shape[1]), size.flatten(), sort=not c.released_order
        )


def split(count: int, dominant: float) -> tuple[int, int]:
    """How many of ``count`` tokens are dominant, and how many contextual."""
    first = max(1, int(count * dominant))
    return first, count - first


@exact
def zip_frames(
    frames: Tensor,
    scores: Tensor,
    keys: Tensor,
    dominant: int,
    contextual: int,
    *,
    size: Tensor | None = None,
    mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(T, N, D), (T, N), (T, N, K) → tokens (T, dominant + contextual, D) float32, their slots and sizes.

    A class token among them, to be kept, is one whose score is infinite.
    """
    size = torch.ones(frames.shape[:2], device=frames.device) if size is None else size
    stays = top_ascending(scores.detach().float(), dominant)
    rest = others(stays, frames.shape[1])
    step = max(1, rest.shape[1] // max(contextual, 1))
    number = torch.arange(rest.shape[1], device=rest.device)
    is_target = (number % step == 0) & (number // step < contextual)
    targets, joining = rest[:, is_target], rest[:, ~is_target]
    merged, merged_size = rows(frames, targets).float(), rows(size, targets)
    if joining.shape[1] and targets.shape[1]:
        group = nearest_by_cosine(rows(keys, joining), rows(keys, targets))
        ones = torch.ones_like(group, dtype=torch.float32)
        means, joined = merge_into(rows(frames, joining), rows(size, joining), group, targets.shape[1], ones)
        count = torch.zeros_like(merged_size).scatter_add_(1, group, ones)  # whole numbers: any order gives the same
        share = (count / (count + 1)).unsqueeze(-1)
        merged = merged + (means - merged) * share if mean else merged + means
        merged_size = merged_size + joined
    tokens = torch.cat([rows(frames, stays).float(), merged], dim=1)
    return tokens, torch.cat([stays, targets], dim=1), torch.cat([rows(size, stays), merged_size], dim=1)

"""DART: a few pivot tokens stay, and with them the visual tokens that resemble them least.

"Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More" (arXiv 2502.11494). After
layer K, the visual tokens and the text tokens behind them with the largest L1 norm of their keys in layer K (after
RoPE, over all heads) become pivots, by default four of each. One after the other, each takes t of the visual tokens
that are left: those of lowest cosine to it, of hidden states after the model's final norm. Visual pivots and what was
taken stay and keep their positions. t is ⌈n(1−R) // pivots⌉, as the authors compute it: the count that stays differs
from n(1−R) by less than the number of pivots.

Deviation: the released code visits the pivots in the order of a Python set; here visual pivots by falling norm, then
those of text. Batches and padding work. Of equal norms or cosines the earlier token is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xcomp.budgets import check_input, share_after
from xcomp.compressor import About, Budget, Compressor, LayerOutput
from xcomp.merging import exact, top, unit
from xcomp.schedule import check_stages, stage_layers


class DART(Compressor):
    """Keeps pivots and what is unlike them."""

    about = About(
        "Stop Looking for Important Tokens in Multimodal Language Models, arXiv 2502.11494",
        "after layer 2",
        deviates="pivots are visited in a fixed order: visual by falling norm, then text",
        keeps=(2 + 26 * 0.222) / 28,
    )
    uses_question = True  # pivots are also taken from the text behind the video
    keeps_positions = True

    @dataclass
    class Config:
        layer: float = 2  # K: number (1-based), below 1: depth; tokens leave after it
        ratio: float = 0.778  # R: share of the visual tokens that leaves
        num_tokens: int | None = None  # tokens that stay, in place of n(1−R)
        visual_pivots: int = 4  # pivots among the visual tokens
        text_pivots: int = 4  # … and among the text tokens behind them

        def __post_init__(self) -> None:
            check_stages([self.layer])
            if not 0 <= self.ratio < 1:
                raise ValueError(f"ratio is {self.ratio}; it is the share that leaves, at least 0 and below 1")
            if self.num_tokens is not None and self.num_tokens < 1:
                raise ValueError(f"num_tokens is {self.num_tokens}; at least 1 must stay")
            if self.visual_pivots < 1:
                raise ValueError(f"visual_pivots is {self.visual_pivots}; at least 1 visual token must stay")
            if self.text_pivots < 0:
                raise ValueError(f"text_pivots is {self.text_pivots}; it must be 0 or more")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        """The ratio with which the share of tokens is met, up to the number of pivots."""
        check_input("dart", budget)
        if budget.of == "input":
            return config
        (stage,) = stage_layers("dart", [config.layer], num_layers)
        return replace(config, ratio=1 - share_after("dart", budget, stage, num_layers), num_tokens=None)

    def plan(self, num_layers: int, tokens_per_frame: int) -> None:
        self.stage(num_layers)  # wrong options are found before anything runs
        return None

    def stage(self, num_layers: int) -> int:
        """The layer (1-based) after which tokens leave."""
        return stage_layers("dart", [self.config.layer], num_layers)[0]

    @torch.no_grad()
    def after_layer(self, output: LayerOutput) -> Tensor | None:
        if output.layer + 1 != self.stage(output.num_layers):
            return None
        normed, keys = output.backbone.final_norm(output.hidden), output.keys("this")
        keep = torch.zeros_like(output.layout.visual)
        for row, size in enumerate(output.layout.counts.tolist()):
            visual = output.layout.visual[row, :size].to(keys.device)
            text = output.text_behind(row).to(keys.device)
            kept, _ = self.reduce(normed[row, :size], keys[row, :, :size], visual, text)
            keep[row, kept.cpu()] = True
        return keep

    @torch.no_grad()
    def reduce(self, normed: Tensor, keys: Tensor, visual: Tensor, text: Tensor | None = None) -> tuple[Tensor, None]:
        """What stays of one sample after the stage's layer: positions, ascending, text included.

        ``normed`` (S, D) is the layer's output after the model's final norm, ``keys`` (H, S, K) the layer's keys after
        RoPE, ``visual`` (S,) bool, ``text`` the positions of the question (None: all behind the video). No hidden
        value changes.
        """
        c, num_visual = self.config, int(visual.sum())
        pivots, text = find_pivots(keys, visual, c.visual_pivots, c.text_pivots, text)
        each = num_taken(num_visual, c.ratio, c.visual_pivots + c.text_pivots, c.num_tokens)
        keep = ~visual
        keep[unlike(normed, visual, torch.cat([pivots, text]), each)] = True
        keep[pivots] = True
        return keep.nonzero()[:, 0], None


def num_taken(num_visual: int, ratio: float, num_pivots: int, num_tokens: int | None = None) -> int:
    """t: how many tokens each pivot takes."""
    # The authors' expression, floor division of floats included: for 100 tokens 100 · (1 − 0.9) is a little below 10.
    return math.ceil((num_visual * (1 - ratio) if num_tokens is None else num_tokens) // num_pivots)


def find_pivots(
    keys: Tensor, visual: Tensor, num_visual: int, num_text: int, behind: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positions of the visual and of the text pivots, each by falling L1 norm of their ``keys`` (H, S, K)."""
    norms = keys.float().abs().sum((0, 2))
    places = visual.nonzero()[:, 0]
    if behind is None:
        behind = torch.arange(int(places[-1]) + 1, len(visual), device=places.device)
    return places[top(norms[places], num_visual)], behind[top(norms[behind], num_text)]


@exact
def unlike(hidden: Tensor, visual: Tensor, pivots: Tensor, each: int) -> Tensor:
    """Positions that ``pivots``, in turn, take: ``each`` the visual tokens of lowest cosine that are no pivots."""
    places = visual.nonzero()[:, 0]
    directions = unit(hidden[pivots])
    cosines = torch.cat([directions @ unit(hidden[part]).T for part in places.split(4096)], 1)
    gone = torch.isin(places, pivots)
    left = int((~gone).sum())
    taken = []
    for cosine in cosines:
        chosen = top(-cosine.masked_fill(gone, torch.inf), min(each, left))
        gone[chosen] = True
        left -= len(chosen)
        taken.append(places[chosen])
    return torch.cat(taken)

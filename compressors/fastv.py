"""FastV: after a few layers, the visual tokens that the prompt's end looks at least leave for good.

"An Image is Worth 1/2 Tokens After Layer 2" (arXiv 2403.06764). A visual token's score is the attention that the last
prompt token paid to it in layer K, mean over heads. Behind layer K the share R with the lowest scores is gone; the
rest keep their positions. The choice is made once, while the prompt runs; what is generated sees it.

The released code has variants: this is the one that drops in place and keeps a KV cache. Layers up to K store all
tokens. Deviations: batches and padding work, at least 1 token stays, and of equal scores the earlier token stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xcomp.budgets import check_input, share_after
from xcomp.compressor import About, Budget, Compressor, LayerOutput
from xcomp.merging import top_ascending
from xcomp.schedule import check_stages, stage_layers


class FastV(Compressor):
    """Keeps what the last prompt token attended to in layer K."""

    about = About(
        "An Image is Worth 1/2 Tokens After Layer 2, arXiv 2403.06764",
        "after layer 2",
        deviates="batches; at least one token stays",
        keeps=(2 + 26 * 0.5) / 28,
    )
    uses_question = True
    keeps_positions = True

    @dataclass
    class Config:
        layer: float = 2  # K: number (1-based), below 1: depth; tokens leave after it, by its attention
        ratio: float = 0.5  # R: share of the visual tokens that leaves

        def __post_init__(self) -> None:
            check_stages([self.layer])
            if not 0 <= self.ratio < 1:
                raise ValueError(f"ratio is {self.ratio}; it is the share that leaves, at least 0 and below 1")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        """The ratio with which the share of tokens is met."""
        check_input("fastv", budget)
        if budget.of == "input":
            return config
        (stage,) = stage_layers("fastv", [config.layer], num_layers)
        return replace(config, ratio=1 - share_after("fastv", budget, stage, num_layers))

    def plan(self, num_layers: int, tokens_per_frame: int) -> None:
        self.stage(num_layers)  # wrong options are found before anything runs
        return None

    def stage(self, num_layers: int) -> int:
        """The layer (1-based) after which tokens leave."""
        return stage_layers("fastv", [self.config.layer], num_layers)[0]

    @torch.no_grad()
    def after_layer(self, output: LayerOutput) -> Tensor | None:
        if output.layer + 1 != self.stage(output.num_layers):
            return None
        scores = output.attention(output.query_index.unsqueeze(1), layer="this")[:, 0].cpu()
        keep = torch.zeros_like(output.layout.visual)
        for row, visual in enumerate(output.layout.visual):
            places = visual.nonzero()[:, 0]
            keep[row, places[most_attended(scores[row, places], self.config.ratio)]] = True
        return keep


def num_kept(num_visual: int, ratio: float) -> int:
    """How many of the visual tokens stay where the share ``ratio`` leaves."""
    return min(num_visual, max(1, round(num_visual * (1 - ratio))))


def most_attended(scores: Tensor, ratio: float) -> Tensor:
    """Ascending indices of the visual tokens that stay, of scores (n,)."""
    return top_ascending(scores, num_kept(len(scores), ratio))

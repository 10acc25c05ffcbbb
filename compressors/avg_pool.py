"""Average pooling before the language model: each frame's tokens are averaged in equal runs of neighbours.

The simplest heuristic baseline; training-free, and the same number of tokens at every layer. The runs are those of
``adaptive_avg_pool1d``: where the counts do not divide, they overlap and differ in length by at most one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from xcomp.budgets import refuse
from xcomp.compressor import About, Budget, Compressor


class AvgPool(Compressor):
    """(T, N, D) → (T, tokens, D)."""

    about = About("average pooling, a heuristic baseline", "before the language model")
    downsamples = True

    @dataclass
    class Config:
        tokens: int = 4  # tokens a frame after pooling

        def __post_init__(self) -> None:
            if self.tokens < 1:
                raise ValueError(f"tokens is {self.tokens}; a frame must keep at least 1")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        tokens = max(1, round(budget.keep * tokens_per_frame))
        if abs(tokens - budget.keep * tokens_per_frame) > 0.5:
            raise refuse("avg_pool", budget, "a frame keeps at least 1 token", 1 / tokens_per_frame)
        return replace(config, tokens=tokens)

    def before_llm(self, tokens: Tensor) -> Tensor:
        if self.config.tokens > tokens.shape[1]:
            raise ValueError(f"avg_pool: tokens is {self.config.tokens}, but a frame has only {tokens.shape[1]}")
        return adaptive_avg_pool1d(tokens.transpose(1, 2), self.config.tokens).transpose(1, 2)

"""No compression: every visual token goes through every layer. The arm that others are held against."""

from __future__ import annotations

from dataclasses import dataclass

from xcomp.budgets import refuse
from xcomp.compressor import About, Budget, Compressor


class NoCompression(Compressor):
    """Keeps all tokens."""

    about = About("the model as it is", "nowhere", keeps=1.0)
    downsamples = True

    @dataclass
    class Config:
        pass

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        if budget.keep < 1:
            raise refuse("none", budget, "nothing leaves", 1.0)
        return config

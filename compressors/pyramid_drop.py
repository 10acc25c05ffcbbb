"""PyramidDrop: fewer visual tokens at each quarter of the depth, chosen by what the prompt's end looks at.

"PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction" (arXiv
2410.17247). After each stage the share λ, λ², λ³ … of the visual tokens that entered the language model stays: those
to which the last prompt token pays most attention (mean over heads) with the queries and keys of the next layer.
Positions are counted anew. The rule itself is that of ``attention_drop``; this is its published setting.

Deviations: the released code cuts what is left to ``tokenizer_model_max_length`` (2048 if unset) after each drop,
fails on grouped queries and drops nothing where there is a mask; none of that happens here. At least 1 token stays.
While tuning, the token before the first answer is the one that looks (the paper averages over all answers).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from xcomp.compressors.attention_drop import AttentionDrop

from xcomp.budgets import check_input, just_above, mean_share, refuse, solve
from xcomp.compressor import About, Budget
from xcomp.schedule import stage_layers


class PyramidDrop(AttentionDrop):
    """Keeps half after each quarter of the depth."""

    about = About(
        "PyramidDrop, arXiv 2410.17247",
        "after a quarter, a half and three quarters of the layers",
        deviates="sequences are never cut; grouped queries, masks and batches work",
        keeps=(1 + 0.5 + 0.25 + 0.125) / 4,
    )
    uses_question = True

    @dataclass
    class Config(AttentionDrop.Config):
        layers: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])  # number (1-based), below 1: depth
        ratios: list[float] = field(default_factory=lambda: [0.5, 0.25, 0.125])  # of the tokens at the start

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        """The λ with which the share of tokens is met; ``layers`` stay where they are."""
        check_input("pyramid_drop", budget)
        if budget.of == "input":
            return config
        stages = stage_layers("pyramid_drop", config.layers, num_layers)
        powers = range(1, len(stages) + 1)
        if budget.of == "final":
            # Not the last power of a root: rounded down, it would lose a token of budget · n.
            kept = [budget.keep ** (i / len(stages)) for i in powers[:-1]] + [budget.keep]
            return replace(config, ratios=kept)
        if budget.keep * num_layers <= stages[0]:
            why = f"the first {stages[0]} of {num_layers} layers hold all tokens (move `layers` forward)"
            raise refuse("pyramid_drop", budget, why, just_above(stages[0] / num_layers))
        factor = solve(lambda f: mean_share(stages, [f**i for i in powers], num_layers), budget.keep, 0.0, 1.0)
        return replace(config, ratios=[factor**i for i in powers])

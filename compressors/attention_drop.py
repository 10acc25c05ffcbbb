"""Attention-based dropping: after a few chosen layers, only the visual tokens that the prompt's end looks at stay.

After layer ``layers[i]`` the share ``ratios[i]`` of the visual tokens that entered the language model is kept: those to
which the last prompt token, with the *next* layer's queries and keys, pays most attention (softmax over all positions,
mean over heads). The first ``uniform_stages`` drops keep evenly spread tokens instead.

Sources: HiCo of "VideoChat-Flash" (arXiv 2501.00574), the "heuristic" row of "One Token per Highly Selective Frame"
(arXiv 2604.14149), whose setting ``layers: [4, 18], ratios: [0.75, 0.25]`` of 28 layers is the default; PyramidDrop
(arXiv 2410.17247) is ``layers: [8, 16, 24], ratios: [0.5, 0.25, 0.125]`` of 32. While tuning, the token before the
first answer is the one that looks (the sources average over all answers).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xcomp.budgets import check_input, just_above, mean_share, refuse, solve
from xcomp.compressor import About, Budget, Compressor, LayerOutput
from xcomp.schedule import check_stages, stage_layers


class AttentionDrop(Compressor):
    """Keeps what the last prompt token attends to."""

    about = About(
        "HiCo of VideoChat-Flash (arXiv 2501.00574); heuristic of One Token per Highly Selective Frame (2604.14149)",
        "after layers 4 and 18 of 28",
        deviates="while tuning, the token before the first answer looks, instead of a mean over answers",
        keeps=(4 + 0.75 * 14 + 0.25 * 10) / 28,
    )

    @dataclass
    class Config:
        layers: list[float] = field(default_factory=lambda: [4 / 28, 18 / 28])  # number (1-based), below 1: depth
        ratios: list[float] = field(default_factory=lambda: [0.75, 0.25])  # of the tokens at the start, kept after each
        uniform_stages: int = 0  # how many of the drops, from the first, spread evenly instead

        def __post_init__(self) -> None:
            if not self.layers or len(self.layers) != len(self.ratios):
                raise ValueError(f"layers {self.layers} and ratios {self.ratios} must be as many, and at least one")
            check_stages(self.layers)
            before = 1.0
            for ratio in self.ratios:
                if not 0 < ratio <= before:
                    raise ValueError(f"ratios {self.ratios} must be shares above 0 and at most 1 that never grow")
                before = ratio
            if not 0 <= self.uniform_stages <= len(self.layers):
                raise ValueError(f"uniform_stages is {self.uniform_stages}; it must be 0..{len(self.layers)}")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        """``ratios`` times the factor with which the share of tokens is met; ``layers`` stay where they are."""
        check_input("attention_drop", budget)
        if budget.of == "input":
            return config
        stages = stage_layers("attention_drop", config.layers, num_layers)

        def scaled(factor: float) -> list[float]:
            return [min(1.0, factor * ratio) for ratio in config.ratios]

        if budget.of == "final":
            return replace(config, ratios=[*scaled(budget.keep / config.ratios[-1])[:-1], budget.keep])
        if budget.keep * num_layers <= stages[0]:
            why = f"the first {stages[0]} of {num_layers} layers hold all tokens (move `layers` forward)"
            raise refuse("attention_drop", budget, why, just_above(stages[0] / num_layers))
        factor = solve(lambda f: mean_share(stages, scaled(f), num_layers), budget.keep, 0.0, 1 / min(config.ratios))
        return replace(config, ratios=scaled(factor))

    def plan(self, num_layers: int, tokens_per_frame: int) -> None:
        self.stages(num_layers)  # wrong options are found before anything runs
        return None

    def stages(self, num_layers: int) -> list[int]:
        """The layers (1-based) after which tokens leave. ValueError if they are not ascending or out of range."""
        return stage_layers(getattr(self, "plugin_name", "attention_drop"), self.config.layers, num_layers)

    @torch.no_grad()
    def after_layer(self, output: LayerOutput) -> Tensor | None:
        stages = self.stages(output.num_layers)
        if output.layer + 1 not in stages:
            return None
        stage = stages.index(output.layer + 1)
        visual = output.layout.visual
        scores = None if stage < self.config.uniform_stages else output.attention_of_query().cpu()
        keep = torch.zeros_like(visual)
        for row, num_visual in enumerate(output.num_visual):
            places = visual[row].nonzero()[:, 0]
            count = min(max(1, int(num_visual * self.config.ratios[stage])), len(places))
            chosen = evenly(len(places), count) if scores is None else largest(scores[row, places], count)
            keep[row, places[chosen]] = True
        return keep


def evenly(length: int, count: int) -> Tensor:
    """``count`` of ``length`` indices from the first to the last, evenly spread and rounded down."""
    return torch.tensor([i * (length - 1) // max(count - 1, 1) for i in range(count)])


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest; of equal ones the earlier."""
    return scores.argsort(descending=True, stable=True)[:count]

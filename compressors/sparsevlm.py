"""SparseVLM: the question's visual words say which visual tokens stay; some of the others are merged and stay too.

"SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (arXiv 2410.04417), version 1.
Raters are the text tokens behind the video whose embeddings the visual embeddings resemble more than on average. After
each of a few layers, the visual tokens with the highest attention from the raters in that layer (mean over heads and
raters) stay. Of the others, three tenths with the highest scores are clustered (DPC-KNN, about ten a cluster), and
each cluster's mean stands behind the last visual token that stays. Positions are counted anew.

The released code keeps the numbers of a table made for 576 tokens, 300, 200 and 110 for a mean of 192; here ``keep``
is their share (the paper speaks of the rank of the attention matrix). Deviations: the 1e-6 of random noise on
densities is left out. Where no text token is above the mean all are raters (the released code divides by zero).
Version 2 ("SparseVLM+") rates by the heads that :func:`choose_heads` picks; the rest of it is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xcomp.budgets import check_input, just_above, mean_share, refuse, solve
from xcomp.compressor import About, Budget, Compressor, LayerOutput, Reduction
from xcomp.merging import dpc_knn, exact, group_sums, top, top_ascending
from xcomp.schedule import check_stages, stage_layers


class SparseVLM(Compressor):
    """Keeps what the raters attend to, and merges some of the rest."""

    about = About(
        "SparseVLM, arXiv 2410.04417",
        "after layers 3, 7 and 16 of 32",
        deviates="numbers of tokens are shares of the video's; no random noise",
        keeps=0.364,
    )
    uses_question = True

    @dataclass
    class Config:
        # The released code counts its layers 2, 6 and 15 from 0.
        layers: list[float] = field(default_factory=lambda: [3 / 32, 7 / 32, 16 / 32])  # number (1-based), or depth
        keep: list[float] = field(
            default_factory=lambda: [300 / 576, 200 / 576, 110 / 576]
        )  # of the tokens at the start
        recycle: float = 0.3  # share of those that leave that is merged instead
        cluster: int = 10  # about how many of these become one token

        def __post_init__(self) -> None:
            if not self.layers or len(self.layers) != len(self.keep):
                raise ValueError(f"layers {self.layers} and keep {self.keep} must be as many, and at least one")
            check_stages(self.layers)
            if not all(0 < share <= before for share, before in zip(self.keep, [1.0, *self.keep])):
                raise ValueError(f"keep {self.keep} must be shares above 0 and at most 1 that never grow")
            if not 0 <= self.recycle <= 1:
                raise ValueError(f"recycle is {self.recycle}; it must be a share, 0 to 1")
            if self.cluster < 1:
                raise ValueError(f"cluster is {self.cluster}; at least 1 token becomes one")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        """``keep`` times the factor with which the share of tokens is met, merged ones counted."""
        check_input("sparsevlm", budget)
        if budget.of == "input":
            return config
        stages = stage_layers("sparsevlm", config.layers, num_layers)

        def scaled(factor: float) -> list[float]:
            return [min(1.0, factor * share) for share in config.keep]

        def met(factor: float) -> float:
            shares = expected(scaled(factor), config.recycle / config.cluster)
            return shares[-1] if budget.of == "final" else mean_share(stages, shares, num_layers)

        if budget.keep <= met(0.0):
            why = f"{met(0.0):.3f} is what stays even if all tokens leave that can (`layers`, `recycle`)"
            raise refuse("sparsevlm", budget, why, just_above(met(0.0)))
        return replace(config, keep=scaled(solve(met, budget.keep, 0.0, 1 / min(config.keep))))

    def plan(self, num_layers: int, tokens_per_frame: int) -> None:
        self.stages(num_layers)  # wrong options are found before anything runs
        return None

    def stages(self, num_layers: int) -> list[int]:
        """The layers (1-based) after which tokens leave."""
        return stage_layers("sparsevlm", self.config.layers, num_layers)

    def before_layers(self, output: LayerOutput) -> None:
        """Chooses the raters, as numbers of the text behind the video."""
        raters = []
        for row, visual in enumerate(output.layout.visual):
            behind = output.text_behind(row)
            hidden = output.hidden[row]
            raters.append(choose_raters(hidden[visual.to(hidden.device)], hidden[behind.to(hidden.device)]).cpu())
        output.state["raters"] = raters

    def after_layer(self, output: LayerOutput) -> Reduction | None:
        stages = self.stages(output.num_layers)
        if output.layer + 1 not in stages:
            return None
        stage, order, values, device = stages.index(output.layer + 1), [], [], output.hidden.device
        rows = [output.text_behind(row)[raters] for row, raters in enumerate(output.state["raters"])]
        widest = max(map(len, rows))  # a sample with fewer raters repeats one, which is left out of the mean
        asked = torch.stack([torch.cat([r, r[:1].expand(widest - len(r))]) for r in rows])
        attention = output.attention(asked, layer="this")
        for row, size in enumerate(output.layout.counts.tolist()):
            visual = output.layout.visual[row, :size].to(device)
            scores = attention[row, : len(rows[row]), :size].mean(0)[visual]
            kept, new = self.reduce(output.hidden[row, :size], visual, scores, stage, output.num_visual[row])
            order.append(kept)
            values.append(output.hidden[row, :size][kept] if new is None else new)
        return Reduction(order, values)

    def reduce(
        self, hidden: Tensor, visual: Tensor, scores: Tensor, stage: int, num_visual: int
    ) -> tuple[Tensor, Tensor | None]:
        """What stays of one sample after the layer of ``stage`` (0-based): positions in their new order, and values.

        ``hidden`` (S, D) is the layer's output, ``visual`` (S,) bool, ``scores`` (m,) of the visual tokens that are
        there, float32; ``num_visual`` is how many entered the language model. A merged token stands for its cluster's
        centre: its position is among those that stay, and its value is new. Gradients flow through the means.
        """
        places = visual.nonzero()[:, 0]
        if len(places) < 2:
            return torch.arange(len(visual), device=visual.device), None
        kept = top_ascending(scores, num_kept(self.config.keep[stage], num_visual, len(places)))
        recycled = recycle(scores, kept, self.config.recycle)
        values, centres, _ = merge(hidden[places[recycled]], self.config.cluster)
        merged, stay = places[recycled[centres]], ~visual
        stay[places[kept]] = True
        positions = stay.nonzero()[:, 0]
        behind = positions > places[kept[-1]]
        order = torch.cat([positions[~behind], merged, positions[behind]])
        return order, hidden.index_copy(0, merged, values.to(hidden.dtype))[order]


def num_kept(share: float, num_visual: int, present: int) -> int:
    """How many of the visual tokens that are there stay as they are; one at the least leaves."""
    return min(max(1, round(share * num_visual)), present - 1)


def expected(keep: list[float], merged: float) -> list[float]:
    """Share of all visual tokens after each stage, where the share ``merged`` of those that leave comes back as one."""
    shares, present = [], 1.0
    for share in keep:
        kept = min(share, present)
        present = kept + merged * (present - kept)
        shares.append(present)
    return shares


@torch.no_grad()
@exact
def rater_scores(visual: Tensor, text: Tensor) -> Tensor:
    """Embeddings (n, D) and (q, D) → (q,) how much visual tokens resemble each text token: mean softmax over text."""
    text = text.float()
    return sum((part.float() @ text.T).softmax(-1).sum(0) for part in visual.split(4096)) / len(visual)


def choose_raters(visual: Tensor, text: Tensor) -> Tensor:
    """Ascending numbers of the text tokens that rate, of the embeddings before the first layer."""
    scores = rater_scores(visual, text)
    raters = (scores > scores.mean()).nonzero()[:, 0]
    return raters if len(raters) else torch.arange(len(text), device=text.device)


@torch.no_grad()
def recycle(scores: Tensor, kept: Tensor, share: float) -> Tensor:
    """Of scores (m,), the best that are not ``kept``, falling: ⌊share · others⌋ + 1 of them."""
    others = torch.ones_like(scores, dtype=torch.bool)
    others[kept] = False
    others = others.nonzero()[:, 0]
    return others[top(scores[others], int(len(others) * share) + 1)]


def merge(tokens: Tensor, cluster: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (r, D) → means of ⌊r / cluster⌋ + 1 clusters (c, D) float32, their centres (c,), and each one's (r,)."""
    count = min(len(tokens) // cluster + 1, len(tokens))
    centres, joined = dpc_knn(tokens.unsqueeze(0), count, count)
    sizes = torch.bincount(joined[0], minlength=count).unsqueeze(1)
    return group_sums(tokens, joined[0], count) / sizes, centres[0], joined[0]


@torch.no_grad()
def choose_heads(attention: Tensor, count: int = 14) -> Tensor:
    """Version 2: the heads with most attention of raters to visual tokens, (H, R, n) → (count,), falling."""
    return top(attention.float().sum((1, 2)), count)

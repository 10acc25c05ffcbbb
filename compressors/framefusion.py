"""FrameFusion: visual tokens that resemble the same patch one frame earlier melt into it; then unimportant ones leave.

"FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Vision Language Models" (arXiv
2501.01986). On the input of the first layer, and between attention and MLP of every layer from the first on, runs of
tokens of one patch (place in the frame) whose hidden states have a cosine of at least ``threshold`` to the surviving
token of that patch before them become one token, their plain mean, at the run's first position. Once a call merges
less than ``least_merged`` of the tokens, the next one prunes: the visual tokens that the last prompt token pays most
attention to in that layer (mean over heads) stay, as many as the mean over all layers, ``cost``, allows. Where a
call's merging is enough for the cost, the most similar tokens merge and nothing more happens. Positions stay.

Deviations: the released code counts 28 layers whatever the model's depth (``released: true``). Where one more merging
call would leave more than the cost allows for all layers after it, the released code stops with an error in the next;
here pruning comes at once. At least 1 token stays, and of equal ones the earlier merges or stays.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xcomp.budgets import just_above
from xcomp.compressor import About, Budget, Compressor, LayerOutput, Reduction
from xcomp.merging import cosine, top, top_ascending

NUM_LAYERS = 28  # of the released code


@dataclass
class Progress:
    """What is known of one sample's pass: the share that each call merged, and what is over."""

    merged: list[float] = field(default_factory=list)
    merging_done: bool = False
    done: bool = False


class FrameFusion(Compressor):
    """Merges what is alike from frame to frame, then prunes by attention."""

    about = About(
        "FrameFusion, arXiv 2501.01986",
        "before the first layer and inside layers",
        deviates="the cost counts the model's own layers; prunes instead of an error where merging costs too much",
        keeps=0.3,
    )
    uses_question = True
    keeps_positions = True

    @dataclass
    class Config:
        cost: float = 0.3  # share of the visual tokens, mean over layers
        threshold: float = 0.6  # cosine from which a token merges; the paper sets it for each model
        least_merged: float = 0.1  # a call that merges a smaller share is the last to merge
        released: bool = False  # count 28 layers whatever the model has

        def __post_init__(self) -> None:
            if not 0 < self.cost <= 1:
                raise ValueError(f"cost is {self.cost}; it must be a share above 0 and at most 1")
            if not -1 <= self.threshold <= 1:
                raise ValueError(f"threshold is {self.threshold}; it is a cosine, -1 to 1")
            if not 0 <= self.least_merged <= 1:
                raise ValueError(f"least_merged is {self.least_merged}; it must be a share, 0 to 1")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        """The cost, which is the mean over layers; the other measures depend on the video."""
        if budget.of != "layers":
            why = f"a budget of {budget.keep:g} of {budget.of} cannot be met: what a layer merges depends on the video"
            raise ValueError(f"framefusion: {why}; the nearest possible is {budget.keep:g} of layers")
        config = replace(config, cost=budget.keep)
        cls(config).plan(num_layers, tokens_per_frame)
        return config

    def plan(self, num_layers: int, tokens_per_frame: int) -> None:
        cost, layers = self.config.cost, self.num_layers(num_layers)
        if cost * layers < 1:  # the first layer's share is not known before it has run
            why = f"a cost of {cost:g} of {layers} layers cannot be met: the first may hold all tokens"
            raise ValueError(f"framefusion: {why}; the nearest possible is {just_above(1 / layers):g}")
        return None

    def num_layers(self, num_layers: int) -> int:
        """How many layers the cost is a mean of."""
        return NUM_LAYERS if self.config.released else num_layers

    def before_layers(self, output: LayerOutput) -> Reduction | None:
        return self._call(output)

    def after_attention(self, output: LayerOutput) -> Reduction | None:
        return self._call(output)

    def _call(self, output: LayerOutput) -> Reduction | None:
        samples = output.state.setdefault("progress", [Progress() for _ in output.num_visual])
        if all(progress.done for progress in samples):
            return None
        order, values, device = [], [], output.hidden.device
        for row, (progress, size) in enumerate(zip(samples, output.layout.counts.tolist())):
            hidden, slot = output.hidden[row, :size], output.layout.places[row, :size].to(device)

            def attention(row: int = row, size: int = size) -> Tensor:
                return output.attention_of_query("this")[row, :size]

            found = self.reduce(hidden, slot, attention, progress, output.num_layers)
            kept, new = (torch.arange(size, device=device), None) if found is None else found
            order.append(kept)
            values.append(hidden[kept] if new is None else new.to(hidden.dtype))
        return Reduction(order, values)

    @torch.no_grad()
    def choose(self, hidden: Tensor, slot: Tensor, progress: Progress, num_layers: int) -> tuple[Tensor, Tensor] | None:
        """By-patch order (m,) of the visual positions, and which of them merge (m,) bool; None if it is time to prune.

        ``hidden`` (S, D) of one sample, ``slot`` (S,) the patch of each position, −1 for text.
        """
        c, layers = self.config, self.num_layers(num_layers)
        similarity, order = similarity_by_patch(hidden, slot)
        wanted = sparsity(c.cost, progress.merged, layers)
        similar = similarity >= c.threshold
        share = int(similar.sum()) / len(order)
        if share >= wanted:
            progress.merging_done = progress.done = True
            places = order.argsort()  # so that of equal ones the lower position merges
            merge = torch.zeros_like(similar)
            merge[places[top(similarity[places], int(wanted * len(order)))]] = True
            return order, merge
        if left_over(c.cost, [*progress.merged, share], layers) < 0:
            return None
        progress.merged.append(share)
        progress.merging_done = share < c.least_merged
        return order, similar

    def reduce(
        self, hidden: Tensor, slot: Tensor, attention: Callable[[], Tensor], progress: Progress, num_layers: int
    ) -> tuple[Tensor, Tensor | None] | None:
        """One call on one sample: positions that stay, ascending, and their values (S', D) where they are new.

        None where nothing happens any more. ``attention()`` is what the last prompt token pays to each position in
        this layer, (S,) float32, mean over heads; it is asked once in a pass, and never before the first layer.
        """
        if progress.done:
            return None
        if not progress.merging_done:
            chosen = self.choose(hidden, slot, progress, num_layers)
            if chosen is not None:
                return merge_runs(hidden, slot, *chosen)
        progress.merging_done = progress.done = True
        places = (slot >= 0).nonzero()[:, 0]
        share = 1 - sparsity(self.config.cost, progress.merged, self.num_layers(num_layers))
        keep = slot < 0
        keep[places[top_ascending(attention()[places], max(1, round(len(places) * share)))]] = True
        return keep.nonzero()[:, 0], None


def held(merged: list[float]) -> list[float]:
    """The share of all visual tokens that each layer so far has held."""
    return list(itertools.accumulate((1 - part for part in merged), operator.mul))


def left_over(cost: float, merged: list[float], num_layers: int) -> float:
    """What the layers after the first ``len(merged)`` may hold in sum, in shares of all visual tokens."""
    return cost * num_layers - sum(held(merged))


def sparsity(cost: float, merged: list[float], num_layers: int) -> float:
    """Share of the present visual tokens that has to go now, so that the mean over layers becomes ``cost``."""
    rest = (num_layers - len(merged)) * (held(merged)[-1] if merged else 1.0)
    return min(1.0, max(0.0, 1 - left_over(cost, merged, num_layers) / rest))


@torch.no_grad()
def similarity_by_patch(hidden: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of each visual token to the one of its patch before it, −2 where there is none: (m,), by patch and then by
    position, and the positions (m,) in this order."""
    places = (slot >= 0).nonzero()[:, 0]
    order = places[slot[places].argsort(stable=True)]
    pairs = zip(order[1:].split(4096), order[:-1].split(4096))
    similarity = [cosine(hidden[here], hidden[before]) for here, before in pairs]
    similarity = torch.cat([hidden.new_full((1,), -2.0, dtype=torch.float32), *similarity])
    first = slot[order] != slot[order].roll(1)
    return similarity.masked_fill(first, -2.0), order


def merge_runs(hidden: Tensor, slot: Tensor, order: Tensor, merge: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that stay, ascending, and their values: the mean of each run of merged tokens and the one before it.

    ``order`` (m,) and ``merge`` (m,) as of :meth:`FrameFusion.choose`; gradients flow through the means.
    """
    run = (~merge).cumsum(0) - 1
    lengths = torch.bincount(run, minlength=int(run[-1]) + 1)
    means = torch.segment_reduce(hidden[order].float(), "sum", lengths=lengths, unsafe=True) / lengths.unsqueeze(1)
    values = hidden.index_copy(0, order[~merge], means.to(hidden.dtype))
    stay = torch.ones_like(slot, dtype=torch.bool)
    stay[order[merge]] = False
    kept = stay.nonzero()[:, 0]
    return kept, values[kept]

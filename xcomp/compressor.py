"""The compressor contract: which visual tokens survive, before the language model and between its layers.

A compressor acts in one or more of three places:

- ``before_llm`` changes the tokens themselves (pooling, merging);
- ``plan`` names, ahead of time, the slots of each frame that every layer keeps (LP-Comp and its ablations);
- ``after_layer`` decides from the data what the next layer keeps (attention-based rules).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xcomp.backbone import Backbone, Rotary, attention_probabilities
from xcomp.layout import TokenLayout, gather
from xcomp.schedule import keep_slots, token_counts


@dataclass(frozen=True)
class LayerOutput:
    """What a data-dependent rule sees after layer ``layer`` (0-based): ``hidden`` (B, S, D) and who is where.

    ``rotary`` has the tables of the positions. ``asking`` (B,) is where each sample's prompt ends, the position that
    the answer is read from; ``entered`` how many visual tokens each brought into the language model.
    """

    layer: int
    num_layers: int
    hidden: Tensor
    layout: TokenLayout
    backbone: Backbone
    rotary: Rotary
    asking: Tensor
    entered: list[int]

    def attention_of_asking(self) -> Tensor:
        """(B, S) attention that ``asking`` pays in the next layer to what it sees, float32, mean over heads."""
        if self.layer + 1 == self.num_layers:
            raise ValueError(f"there is no layer after layer {self.num_layers}")
        backbone, layer, rows = self.backbone, self.layer + 1, self.asking.unsqueeze(1)
        normed = backbone.input_norm(layer, self.hidden)
        keys = self.rotary.turn(backbone.project_keys_values(layer, normed)[0])
        queries = self.rotary.rows(rows).turn(backbone.project_queries(layer, gather(normed, rows)))
        mask = self.layout.causal_mask(rows, self.hidden.device)
        return attention_probabilities(queries, keys, mask).mean(1)[:, 0]


class Compressor(nn.Module):
    """Base class of all compressors; the defaults keep every token."""

    Config: type

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def before_llm(self, tokens: Tensor) -> Tensor:
        """Visual tokens (T, N, D) → (T', N', D) before the first layer."""
        return tokens

    def plan(self, num_layers: int, tokens_per_frame: int) -> list[tuple[int, ...]] | None:
        """Ascending slots (0-based, of the N that enter the language model) kept at each layer.

        None means that it depends on the data: then ``after_layer`` is asked.
        """
        return [tuple(range(tokens_per_frame))] * num_layers

    def after_layer(self, output: LayerOutput) -> Tensor | None:
        """After a layer: (B, S) bool, True for visual positions to keep; None keeps all. Text always stays."""
        return None


class PlannedDrop(Compressor):
    """Progressive dropping by a schedule and a keep rule: the common part of LP-Comp and its ablations."""

    rule: str | None = None  # a subclass's fixed rule; else the option of that name

    def plan(self, num_layers: int, tokens_per_frame: int) -> list[tuple[int, ...]]:
        c = self.config
        counts = token_counts(
            c.schedule,
            num_layers,
            tokens_per_frame,
            start=c.start,
            end=c.end,
            rounding=c.rounding,
            steps=c.steps,
        )
        rule = self.rule or c.rule
        return keep_slots(rule, counts, tokens_per_frame, seed=getattr(c, "seed", 0))


def check_plan(plan: list[tuple[int, ...]], num_layers: int, tokens_per_frame: int, who: str) -> None:
    """ValueError unless every layer keeps at least one slot, in range, once, out of those of the layer before."""
    layers = list(plan) if isinstance(plan, Sequence) else [None]
    if not all(isinstance(slots, Sequence) and all(isinstance(slot, int) for slot in slots) for slots in layers):
        raise ValueError(f"{who}.plan must return the slots of each layer, a list of tuples of int, not {plan!r:.60}")
    if len(plan) != num_layers:
        raise ValueError(f"{who}.plan names {len(plan)} layers, but the language model has {num_layers}")
    before = set(range(tokens_per_frame))
    for layer, slots in enumerate(plan, start=1):
        if not slots:
            raise ValueError(f"{who}.plan keeps no token of a frame at layer {layer}; at least 1 must stay")
        if list(slots) != sorted(set(slots)):
            raise ValueError(f"{who}.plan must name each slot once and ascending; layer {layer} has {list(slots)}")
        if slots[0] < 0 or slots[-1] >= tokens_per_frame:
            raise ValueError(f"{who}.plan names slot {slots[0] if slots[0] < 0 else slots[-1]} at layer {layer}; "
                             f"a frame has slots 0..{tokens_per_frame - 1}")
        if not before.issuperset(slots):
            raise ValueError(f"{who}.plan brings back slots dropped earlier, at layer {layer}")
        before = set(slots)

"""The compressor contract: which visual tokens survive, before the language model and between its layers.

A compressor acts in one or more of three places:

- ``before_llm`` changes the tokens themselves (pooling, merging);
- ``plan`` names, ahead of time, the slots of each frame that every layer keeps (LP-Comp and its ablations);
- ``after_layer`` decides from the data what the next layer keeps (attention-based rules).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xcomp.backbone import ATTENTION_BLOCK, Backbone, Rotary, attention_probabilities
from xcomp.layout import TokenLayout, gather
from xcomp.schedule import keep_slots, token_counts


@dataclass(frozen=True)
class About:
    """What `xcomp plugins compressors` and the documentation tell of a method."""

    source: str  # title or name of the paper and its arXiv number
    acts: str  # where: "before the language model", "after layer 2", ...
    trained: bool = False  # whether the published method needs tuning
    deviates: str = ""  # where the default differs from the released code or the paper


@dataclass(frozen=True)
class Budget:
    """A share of the visual tokens, by one of three measures.

    ``of``: ``input`` (tokens that enter the language model), ``final`` (tokens at its last layer) or ``layers`` (the
    mean over layers), each as a share of the tokens that the vision path gives.
    """

    keep: float
    of: str = "layers"

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not 0 < self.keep <= 1:
            raise ValueError(f"budget.keep is {self.keep}; it must be a share above 0 and at most 1")
        if self.of not in ("input", "final", "layers"):
            raise ValueError(f"budget.of is '{self.of}'; it must be input, final or layers")


@dataclass(frozen=True)
class QuestionTokens:
    """What is asked, for compressors that look at it: the text behind the video, ids (Q,) and embeddings (Q, D)."""

    ids: Tensor
    embeddings: Tensor
    text: str | None = None  # the question's own words, where they are known


@dataclass(frozen=True)
class LayerOutput:
    """What a data-dependent rule sees after layer ``layer`` (0-based): ``hidden`` (B, S, D) and who is where.

    ``rotary`` has the tables of the positions. ``query_index`` (B,) is where each sample's prompt ends, the position
    that the answer is read from; ``num_visual`` how many visual tokens each brought into the language model.
    """

    layer: int
    num_layers: int
    hidden: Tensor
    layout: TokenLayout
    backbone: Backbone
    rotary: Rotary
    query_index: Tensor
    num_visual: list[int]
    entered: Tensor | None = None  # (B, S, D) the layer's input

    def attention(self, rows: Tensor, layer: str = "next", heads: str = "mean") -> Tensor:
        """Attention that the positions ``rows`` (B, R) pay in the next layer, or in ``this`` one, to what they see.

        (B, R, S) float32, the ``mean`` or ``max`` over heads, or (B, H, R, S) for ``all``. Computed for these rows
        alone, as many at a time as ``ATTENTION_BLOCK`` allows.
        """
        number, hidden = (self.layer, self.entered) if layer == "this" else (self.layer + 1, self.hidden)
        if number == self.num_layers:
            raise ValueError(f"there is no layer after layer {self.num_layers}")
        if hidden is None:
            raise ValueError(f"what entered layer {self.layer + 1} is not known here")
        normed = self.backbone.input_norm(number, hidden)
        keys = self.rotary.apply(self.backbone.project_keys_values(number, normed)[0])
        num_heads = self.backbone.text_config.num_attention_heads
        over_heads = {"mean": lambda x: x.mean(1), "max": lambda x: x.amax(1), "all": lambda x: x}[heads]
        blocks = []
        for part in rows.split(max(1, ATTENTION_BLOCK // (len(hidden) * num_heads * hidden.shape[1])), 1):
            queries = self.rotary.rows(part).apply(self.backbone.project_queries(number, gather(normed, part)))
            mask = self.layout.causal_mask(part, hidden.device)
            blocks.append(over_heads(attention_probabilities(queries, keys, mask)))
        return torch.cat(blocks, -2)

    def attention_of_query(self) -> Tensor:
        """(B, S) attention that ``query_index`` pays in the next layer to what it sees, float32, mean over heads."""
        return self.attention(self.query_index.unsqueeze(1))[:, 0]


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

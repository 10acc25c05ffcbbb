"""What one prefill of the LLM costs, computed from shapes alone: nothing is run and torch is not imported.

Counted: one multiply-accumulate (MAC) for every product of the matrix multiplications, that is the query, key, value
and output projections, attention scores and weighted sums, the gated MLP (three matrices) and the language-model head.
Not counted: embedding look-ups, norms, RoPE, softmax, activations, biases and residual sums (well below 1 % together).
FLOPs are 2 · MACs. Papers often print MACs under the name FLOPs, and most count attention in full although it is
causal; a ``Cost`` says which of the two was counted.

Letters: S positions · D width · H heads · K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LLMShape:
    """The sizes of a decoder-only LLM with grouped-query attention and a gated MLP."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int

    @classmethod
    def from_config(cls, config: Any) -> LLMShape:
        """Reads a transformers config; of a multimodal one, its text part."""
        config = getattr(config, "text_config", None) or config
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            layers=config.num_hidden_layers,
            vocab=config.vocab_size,
        )

    @property
    def query_width(self) -> int:
        """H · K, the width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads together."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Cost:
    """MACs of one prefill, by part, and the bytes of the KV cache it leaves behind.

    ``causal`` says how attention was counted: only the keys each row sees (True) or every key for every row (False).
    """

    projections: int
    attention: int
    mlp: int
    head: int
    kv_bytes: int
    causal: bool

    @property
    def macs(self) -> int:
        """All multiply-accumulates."""
        return self.projections + self.attention + self.mlp + self.head

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiply and an add for each MAC."""
        return 2 * self.macs


def prefill_cost(
    shape: LLMShape,
    tokens_per_layer: Sequence[int],
    text_tokens: int,
    *,
    computed_per_layer: Sequence[int] | None = None,
    causal: bool = False,
    head_positions: int = 1,
    num_frames: int | None = None,
    prefix_tokens: int = 0,
    kv_value_bytes: int = 2,
) -> Cost:
    """Cost of one pass over a video and its text.

    ``tokens_per_layer`` are the visual tokens each layer has as keys and values. ``computed_per_layer`` are those whose
    query, attention, output projection and MLP are computed too: fewer where tokens that the layer is the last to see
    are skipped. By default all are computed. Text is computed in every layer, and the head at ``head_positions``.

    ``num_frames`` and ``prefix_tokens`` (text before the video, part of ``text_tokens``) are needed only for a causal
    count with skipped rows, which depends on where the computed rows stand: the last ones of each frame, frames of
    equal size. ``kv_value_bytes`` is the size of a cached number: 2 for bfloat16.

    Raises ValueError for lists that do not fit the model or each other.
    """
    computed = tokens_per_layer if computed_per_layer is None else computed_per_layer
    _check(shape, tokens_per_layer, computed, text_tokens, prefix_tokens)
    keys = [visual + text_tokens for visual in tokens_per_layer]
    rows = [visual + text_tokens for visual in computed]
    if causal:
        layers = zip(tokens_per_layer, computed, strict=True)
        pairs = sum(_causal_pairs(n, c, text_tokens, prefix_tokens, num_frames) for n, c in layers)
    else:
        pairs = sum(row * key for row, key in zip(rows, keys, strict=True))
    return Cost(
        projections=2 * shape.hidden * (sum(rows) * shape.query_width + sum(keys) * shape.kv_width),
        attention=2 * pairs * shape.query_width,
        mlp=3 * sum(rows) * shape.hidden * shape.intermediate,
        head=head_positions * shape.hidden * shape.vocab,
        kv_bytes=2 * sum(keys) * shape.kv_width * kv_value_bytes,
        causal=causal,
    )


def _causal_pairs(visual: int, computed: int, text: int, prefix: int, num_frames: int | None) -> int:
    """(row, key) pairs of one layer under a causal mask: the row at position p sees p + 1 keys."""
    positions = visual + text
    every_row = positions * (positions + 1) // 2
    if computed == visual:
        return every_row
    if num_frames is None or num_frames < 1 or visual % num_frames or computed % num_frames:
        raise ValueError(
            f"a causal count with skipped rows ({computed} of {visual} computed) needs num_frames, a divisor of both; "
            f"got {num_frames}. Pass it, or count with causal=False"
        )
    size, skipped = visual // num_frames, (visual - computed) // num_frames
    # Frame f starts at prefix + f·size, and its first `skipped` rows are left out.
    starts = num_frames * prefix + size * num_frames * (num_frames - 1) // 2
    return every_row - skipped * starts - num_frames * skipped * (skipped + 1) // 2


def _check(shape: LLMShape, tokens: Sequence[int], computed: Sequence[int], text: int, prefix: int) -> None:
    """Raises ValueError unless there is one entry a layer and 0 ≤ computed ≤ tokens in each."""
    if len(tokens) != shape.layers or len(computed) != shape.layers:
        raise ValueError(
            f"the model has {shape.layers} layers, but tokens_per_layer has {len(tokens)} entries "
            f"and computed_per_layer {len(computed)}: give one a layer"
        )
    for layer, (all_rows, some) in enumerate(zip(tokens, computed, strict=True)):
        if not 0 <= some <= all_rows:
            raise ValueError(f"layer {layer}: {some} computed of {all_rows} visual tokens; need 0 ≤ computed ≤ tokens")
    if not 0 <= prefix <= text:
        raise ValueError(f"prefix_tokens ({prefix}) must lie between 0 and text_tokens ({text})")

"""What a pass costs, computed from shapes alone: multiply-accumulates and the bytes of the KV cache.

Counted: one multiply-accumulate (MAC) for every product of the matrix multiplications, that is the query, key, value
and output projections, attention scores and weighted sums, the gated MLP (three matrices) and the language-model head.
Not counted: embedding look-ups, norms, RoPE, softmax, activations, biases and residual sums (well below 1 % together).
FLOPs are 2 · MACs.

Convention "as run", for everything that a run reports: attention causally (a row at position p sees p + 1 keys), rows
that leave after a layer without its output projection and MLP (``drop_early: output``), in the last layer only the
position that is read, no head but there. Convention "paper" (:func:`paper_layers`), for tables that others printed:
attention in full and every row in every layer; papers often print MACs under the name FLOPs.

A pass is a list of :class:`LayerWork`, one a layer; whatever runs the language model (an answer, a stored video, a
selector's chunk that stops half-way) is such a list. Nothing here imports torch before it is needed.

Letters: S positions · D width · H heads · K head size · N tokens a frame · T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


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
class LayerWork:
    """What one layer computes: new ``keys`` (and values), ``queries``, (query, key) ``pairs`` and ``outputs``.

    ``outputs`` are the positions that go through the output projection and the MLP.
    """

    keys: int
    queries: int
    pairs: int
    outputs: int


@dataclass(frozen=True)
class Cost:
    """MACs of a pass by part, and the bytes of the KV cache that it adds."""

    projections: int
    attention: int
    mlp: int
    head: int
    kv_bytes: int

    @property
    def macs(self) -> int:
        """All multiply-accumulates."""
        return self.projections + self.attention + self.mlp + self.head

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiply and an add for each MAC."""
        return 2 * self.macs


def pass_cost(
    shape: LLMShape, layers: Sequence[LayerWork], *, head_positions: int = 0, kv_value_bytes: int = 2
) -> Cost:
    """Cost of a pass. ``kv_value_bytes`` is the size of a cached number: 2 for bfloat16.

    Raises:
        ValueError: if the pass has more layers than the model.
    """
    if len(layers) > shape.layers:
        raise ValueError(f"the model has {shape.layers} layers, but the pass {len(layers)}")
    keys, queries = sum(work.keys for work in layers), sum(work.queries for work in layers)
    pairs, outputs = sum(work.pairs for work in layers), sum(work.outputs for work in layers)
    return Cost(
        projections=shape.hidden * (2 * keys * shape.kv_width + (queries + outputs) * shape.query_width),
        attention=2 * pairs * shape.query_width,
        mlp=3 * outputs * shape.hidden * shape.intermediate,
        head=head_positions * shape.hidden * shape.vocab,
        kv_bytes=2 * keys * shape.kv_width * kv_value_bytes,
    )


# --- passes -----------------------------------------------------------------------------------------------------------


def planned_layers(
    plan: Sequence[Sequence[int]],
    num_frames: int,
    prefix: int,
    suffix: int = 0,
    *,
    drop_early: str = "output",
    texts: Sequence[tuple[int, int]] = (),
) -> list[LayerWork]:
    """``[prefix | T frames | suffix]`` under a planned rule: ``plan[l]`` are the slots of a frame that layer l has.

    ``texts`` are the tokens of text before and behind each frame, where there is any; they stay as all text does.
    With a suffix the last layer computes the last position alone; without one (a stored video) only keys and values.
    ``drop_early`` as in :class:`xcomp.decoder.Decoder`. A pass that stops early is given the layers it runs.
    """
    last = 1 if suffix else 0
    text = sum(before + behind for before, behind in texts)
    ahead = 0  # over all frames: text that stands between the prefix and the frame
    for number, (before, behind) in enumerate(texts):
        ahead += before * (num_frames - number) + behind * (num_frames - number - 1)
    layers = []
    for layer, slots in enumerate(plan):
        size = prefix + num_frames * len(slots) + text + suffix
        if layer == len(plan) - 1:
            layers.append(LayerWork(size, last, size * last, last))
            continue
        stays = set(plan[layer + 1])
        gone = [rank for rank, slot in enumerate(slots) if slot not in stays]
        staying = size - num_frames * len(gone)
        if drop_early == "query" and staying < size:
            unseen = sum(frame * len(slots) + rank + 1 + prefix for frame in range(num_frames) for rank in gone)
            pairs = _triangle(size) - unseen - ahead * len(gone)
            layers.append(LayerWork(size, staying, pairs, staying))
        else:
            layers.append(LayerWork(size, size, _triangle(size), size if drop_early == "off" else staying))
    return layers


def counted_layers(
    sizes: Sequence[int], outputs: Sequence[int], *, whole: bool = False, rows: int = 1
) -> list[LayerWork]:
    """A pass whose layers hold ``sizes`` positions, of which ``outputs`` (but in the last) go through the MLP.

    ``rows`` of the last layer are computed, at the end; ``whole`` as in :func:`appended_layers`.
    """
    last = LayerWork(sizes[-1], sizes[-1], 0, 0) if whole else LayerWork(sizes[-1], rows, rows * sizes[-1], rows)
    return [LayerWork(n, n, _triangle(n), out) for n, out in zip(sizes[:-1], outputs)] + [last]


def appended_layers(stored: Sequence[int], rows: int, *, whole: bool = False, every: bool = False) -> list[LayerWork]:
    """``rows`` tokens of text behind caches of the sizes ``stored``, one a layer; only the last leaves the last layer,
    or, with ``every``, all do.

    ``whole``: of a pass that stops early and is only looked at, where the last layer's queries are made for all rows
    and attend to nothing.
    """
    layers = [LayerWork(rows, rows, rows * size + _triangle(rows), rows) for size in stored]
    if every:
        return layers
    return layers[:-1] + [LayerWork(rows, rows, 0, 0) if whole else LayerWork(rows, 1, stored[-1] + rows, 1)]


def paper_layers(tokens_per_layer: Sequence[int], text: int = 0) -> list[LayerWork]:
    """The convention of the paper's Table E: full attention, every row in every layer."""
    return [LayerWork(n, n, n * n, n) for n in (tokens + text for tokens in tokens_per_layer)]


def _triangle(rows: int) -> int:
    """Pairs of a causal square: 1 + 2 + … + rows."""
    return rows * (rows + 1) // 2


# --- other models -----------------------------------------------------------------------------------------------------


def count_macs(run: Callable[[], Result]) -> tuple[Result, int]:
    """What ``run()`` returns, and the MACs of the matrix products that it makes (attention in full), counted by torch.

    For vision towers and CLIP, whose shape is their own affair; it works on tensors of ``meta`` too, where nothing is
    computed.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(query, key, value)

    # torch counts attention on a GPU, but not the kernel that a CPU takes.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        result = run()
    return result, counter.get_total_flops() // 2

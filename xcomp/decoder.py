"""Decoder: one pass through the language model's layers with a compressor between them.

Visual tokens leave the sequence between layers; each layer's KV cache has its own length, and positions (RoPE) at a
layer are the running count of the tokens that are still there. Source: "One Token per Highly Selective Frame"
(arXiv 2604.14149), Section 3.

Batches of unequal sequences are padded on the right: under plain causal attention no real token ever sees padding, so
a prefill needs no mask; flash-attention is told what is padding and leaves it out. Masks appear only where few rows
meet a longer cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from xcomp.backbone import Backbone, Rotary
from xcomp.compressor import Compressor, LayerOutput, check_plan
from xcomp.contract import check_before_llm, check_keep, name_of
from xcomp.generation import generate
from xcomp.layout import TokenLayout, gather

DROP_EARLY = ("auto", "off", "output", "query")


class QuestionNeeded(ValueError):
    """A video cannot be run without its question: the compressor decides from both."""


@dataclass
class State:
    """What a pass leaves behind: the caches, who is where in them, and the logits after the last token."""

    cache: DynamicCache
    layouts: list[TokenLayout]  # of each layer's cache
    logits: Tensor | None  # (B, V)
    batched: bool

    @property
    def tokens_per_layer(self) -> list[Any]:
        """Visual tokens in each layer's KV cache; for a batch, a list of one count a sample for each layer."""
        counts = [layout.visual_counts() for layout in self.layouts]
        return counts if self.batched else [c[0] for c in counts]

    def fork(self) -> State:
        """A state that grows on its own; the stored keys and values are shared and never written to."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return State(cache, list(self.layouts), self.logits, self.batched)

    def repeat(self, times: int) -> State:
        """A state of its own in which every sample stands ``times`` in a row."""
        state = self.fork()
        state.cache.batch_repeat_interleave(times)
        known: dict[int, TokenLayout] = {}  # layers share layouts
        state.layouts = [known.setdefault(id(layout), layout.repeat(times)) for layout in self.layouts]
        state.logits = self.logits.repeat_interleave(times, 0)
        state.batched = True
        return state


@dataclass(frozen=True)
class Observation:
    """What an observer sees at a layer: ``queries`` (B, H, R, K) of the suffix before RoPE, ``keys`` (B, H_kv, S, K)
    as cached (after RoPE), and the cache's ``layout``; the R rows of the suffix are its last R positions."""

    layer: int
    queries: Tensor
    keys: Tensor
    layout: TokenLayout


class Decoder:
    """A backbone's language model with a compressor between its layers.

    ``drop_early`` says what a token that a planned rule drops after a layer skips in that layer: ``output`` its output
    projection and MLP, ``query`` its query too (under an explicit mask), ``off`` nothing; ``auto`` picks per device.
    ``observer`` is called with an :class:`Observation` at the layers below ``stop_layer`` when a suffix runs, over a
    stored video or in one pass with it (one sample at a time), and the pass ends at ``stop_layer``.
    """

    def __init__(
        self,
        backbone: Backbone,
        compressor: Compressor | None = None,
        *,
        drop_early: str = "auto",
        checkpointing: bool = False,
        observer: Callable[[Observation], None] | None = None,
        stop_layer: int | None = None,
    ):
        if drop_early not in DROP_EARLY:
            raise ValueError(f"drop_early is '{drop_early}'; it must be one of {', '.join(DROP_EARLY)}")
        self.backbone = backbone
        self.compressor = compressor or Compressor(None)
        # Measured on a CPU: rows under a mask cost what they save, so plain causal attention stays.
        self.drop_early = "output" if drop_early == "auto" else drop_early
        self.checkpointing = checkpointing
        self.observer = observer
        self.stop_layer = backbone.num_layers if stop_layer is None else stop_layer

    # --- public -----------------------------------------------------------------------------------------------------

    def prefill(self, tokens: Any, prefix_ids: Any, suffix_ids: Any) -> State:
        """Run ``[prefix | video | suffix]``: tokens (T, N, D) and 1-D ids, or lists of each for a batch."""
        hidden, layout, tokens_per_frame, batched = self._assemble(tokens, prefix_ids, suffix_ids)
        state = State(DynamicCache(), [], None, batched)
        last = layout.last_index().unsqueeze(1)
        observed = 0
        if self.observer is not None:
            if len(hidden) > 1:
                raise ValueError(f"an observer follows one sample at a time, not {len(hidden)}")
            observed = len(_as_list(suffix_ids)[0]) if batched else len(suffix_ids)
        rows = self._run(hidden, layout, tokens_per_frame, wanted=last, state=state, observed=observed)
        if self.stop_layer == self.backbone.num_layers:
            state.logits = self.backbone.head(rows[:, 0])
        return state

    def logits(self, tokens: Any, prefix_ids: Any, suffix_ids: Any, num_logits: Sequence[int]) -> Tensor:
        """Logits at the last ``num_logits[b]`` positions of each sample, packed: (sum, V). No cache: for training."""
        hidden, layout, tokens_per_frame, _ = self._assemble(tokens, prefix_ids, suffix_ids)
        counts = torch.tensor(num_logits)
        back = torch.arange(int(counts.max()))
        wanted = (layout.counts.unsqueeze(1) - counts.unsqueeze(1) + back).clamp(max=layout.width - 1)
        rows = self._run(hidden, layout, tokens_per_frame, wanted=wanted, state=None)
        return self.backbone.head(rows[(back < counts.unsqueeze(1)).to(rows.device)])

    def prefill_video(self, tokens: Any, prefix_ids: Any) -> State:
        """Run ``[prefix | video]`` alone, for any number of questions. Needs a rule that does not see the question."""
        batched = isinstance(tokens, (list, tuple))
        empty = torch.empty(0, dtype=torch.long)
        suffixes = [empty] * len(tokens) if batched else empty
        hidden, layout, tokens_per_frame, _ = self._assemble(tokens, prefix_ids, suffixes)
        if self._plan(tokens_per_frame) is None:
            raise QuestionNeeded(
                f"{type(self.compressor).__name__} decides from the question, so a video cannot be stored without one"
            )
        state = State(DynamicCache(), [], None, batched)
        self._run(hidden, layout, tokens_per_frame, wanted=None, state=state)
        return state

    def extend(self, state: State, suffix_ids: Any) -> State:
        """Append text (1-D ids, or a list of them for a batch) to a state, in place, and return it."""
        ids = _as_list(suffix_ids) if state.batched else [_ids(suffix_ids)]
        new = TokenLayout.text([len(i) for i in ids])
        padded = pad_sequence([_ids(i) for i in ids], batch_first=True).to(self.backbone.device)
        self._append(self.backbone.embed(padded), new, state)
        return state

    def decode(self, state: State, token_ids: Any) -> Tensor:
        """One step: a token a sample, (B,) or (B, 1) → logits (B, V). The state grows in place."""
        ids = torch.as_tensor(token_ids, device=self.backbone.device).reshape(-1, 1)
        self._append(self.backbone.embed(ids), TokenLayout.text([1] * len(ids)), state)
        return state.logits

    @torch.no_grad()
    def generate(self, state: State, **options: Any) -> list[list[int]]:
        """Answers to a state whose prompt has been run: token ids of each sample, stop token left out.

        Greedy by default; ``options`` are those of :func:`xcomp.generation.generate`.
        """
        return generate(self, state, **options)

    # --- the pass ---------------------------------------------------------------------------------------------------

    def _plan(self, tokens_per_frame: int) -> list[tuple[int, ...]] | None:
        plan = self.compressor.plan(self.backbone.num_layers, tokens_per_frame)
        if plan is not None:
            check_plan(plan, self.backbone.num_layers, tokens_per_frame, name_of("compressor", self.compressor))
        return plan

    def _assemble(self, tokens: Any, prefix_ids: Any, suffix_ids: Any) -> tuple[Tensor, TokenLayout, int, bool]:
        """Embedded sequences (B, S, D) padded on the right, their layout, tokens a frame, and if it was a batch."""
        batched = isinstance(tokens, (list, tuple))
        videos = [self._before_llm(t) for t in (tokens if batched else [tokens])]
        prefixes = [_ids(i) for i in (_as_list(prefix_ids) if batched else [prefix_ids])]
        suffixes = [_ids(i) for i in (_as_list(suffix_ids) if batched else [suffix_ids])]
        if not len(videos) == len(prefixes) == len(suffixes):
            raise ValueError(f"a batch needs as many videos ({len(videos)}) as prefixes ({len(prefixes)}) "
                             f"and suffixes ({len(suffixes)})")
        widths = {v.shape[1] for v in videos}
        if len(widths) != 1:
            raise ValueError(f"all videos of a batch need the same number of tokens a frame, not {sorted(widths)}")
        layout = TokenLayout.sequence(
            [(len(p), v.shape[0], v.shape[1], len(s)) for p, v, s in zip(prefixes, videos, suffixes)]
        )
        self._check_length(layout, videos)
        samples = [
            torch.cat([self._embed(p), v.flatten(0, 1).to(self.backbone.dtype), self._embed(s)])
            for p, v, s in zip(prefixes, videos, suffixes)
        ]
        return pad_sequence(samples, batch_first=True), layout, widths.pop(), batched

    def _before_llm(self, tokens: Tensor) -> Tensor:
        compressed = self.compressor.before_llm(tokens)
        check_before_llm(name_of("compressor", self.compressor), tokens, compressed)
        return compressed

    def _embed(self, ids: Tensor) -> Tensor:
        return self.backbone.embed(ids.to(self.backbone.device))

    def _check_length(self, layout: TokenLayout, videos: list[Tensor]) -> None:
        limit = self.backbone.text_config.max_position_embeddings
        for count, video in zip(layout.counts.tolist(), videos):
            if count > limit:
                groups, width = video.shape[:2]
                merged = self.backbone.merged_frames
                fits = max(0, (limit - count + groups * width) // width) * merged
                raise ValueError(f"{groups * merged} frames make a sequence of {count} tokens, but the language model "
                                 f"takes {limit}; at most {fits} frames fit")

    def _run(
        self,
        hidden: Tensor,
        layout: TokenLayout,
        tokens_per_frame: int,
        *,
        wanted: Tensor | None,
        state: State | None,
        observed: int = 0,
    ) -> Tensor | None:
        """All layers over whole sequences. ``wanted`` (B, R): positions whose last-layer output is returned (B, R, D).

        With ``wanted`` None the last layer only stores keys and values. ``observed``: last positions that are observed.
        """
        plan, entered = self._plan(tokens_per_frame), layout.visual_counts()
        if plan is not None:
            index, layout, wanted = _reduce(layout, layout.keep_slots(plan[0], tokens_per_frame), wanted)
            hidden = hidden if index is None else gather(hidden, index)
        tables = _Tables(self.backbone)
        for layer in range(self.stop_layer):
            rotary = tables.of(layout)
            if state is not None:
                state.layouts.append(layout)
            entering, inside = hidden, layout
            if layer == self.stop_layer - 1:
                rows = self._layer(layer, hidden, layout, rotary, state, wanted, masked=True, none=wanted is None)
                self._observe(layer, entering, inside, state, observed)
                return rows
            if plan is not None and len(plan[layer + 1]) < len(plan[layer]):
                keep = layout.keep_slots(plan[layer + 1], tokens_per_frame)
                index, kept, wanted = _reduce(layout, keep, wanted)
                early = index if self.drop_early != "off" else None
                hidden = self._layer(layer, hidden, layout, rotary, state, early, masked=self.drop_early == "query")
                hidden = hidden if early is not None else gather(hidden, index)
                layout = kept
            else:
                hidden = self._layer(layer, hidden, layout, rotary, state, None)
            self._observe(layer, entering, inside, state, observed)
            if plan is None:
                asking = wanted[:, 0]  # the first wanted position ends the prompt
                output = LayerOutput(
                    layer, self.backbone.num_layers, hidden, layout, self.backbone, rotary, asking, entered
                )
                keep = self.compressor.after_layer(output)
                if keep is not None:
                    index, layout, wanted = _reduce(layout, self._check_keep(keep, layout), wanted)
                    hidden = hidden if index is None else gather(hidden, index)
        raise AssertionError("a language model has at least one layer")

    def _observe(self, layer: int, hidden: Tensor, layout: TokenLayout, state: State | None, rows: int) -> None:
        """Show the observer the last ``rows`` positions of a layer's input, beside the keys that the layer stored."""
        if rows:
            queries = self.backbone.queries(layer, hidden[:, -rows:])
            self.observer(Observation(layer, queries, state.cache.layers[layer].keys, layout))

    def _check_keep(self, keep: Tensor, layout: TokenLayout) -> Tensor:
        check_keep(name_of("compressor", self.compressor), keep, layout)
        return keep.cpu() | ~layout.visual

    def _layer(self, layer: int, *args: Any, **kwargs: Any) -> Tensor | None:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._layer_body, layer, *args, use_reentrant=False, **kwargs)
        return self._layer_body(layer, *args, **kwargs)

    def _layer_body(
        self,
        layer: int,
        hidden: Tensor,
        layout: TokenLayout,
        rotary: Rotary,
        state: State | None,
        rows: Tensor | None,
        masked: bool = False,
        none: bool = False,
    ) -> Tensor | None:
        """One layer under causal attention. ``rows`` (B, R): positions whose output is computed (all if None).

        ``masked`` computes only their queries too, under an explicit mask. ``none``: keys and values only.
        """
        backbone = self.backbone
        normed = backbone.input_norm(layer, hidden)
        keys, values = backbone.project_keys_values(layer, normed)
        keys = rotary.turn(keys)
        if state is not None:
            keys, values = state.cache.update(keys, values, layer)
        if none:
            return None
        if rows is None or not masked:
            queries = rotary.turn(backbone.project_queries(layer, normed))
            attended = backbone.attend(layer, queries, keys, values, layout)
            if rows is not None:
                hidden, attended = gather(hidden, rows), gather(attended, rows)
            return backbone.output(layer, hidden, attended)
        queries = rotary.rows(rows).turn(backbone.project_queries(layer, gather(normed, rows)))
        attended = backbone.attend(layer, queries, keys, values, layout, rows)
        return backbone.output(layer, gather(hidden, rows), attended)

    def _append(self, hidden: Tensor, new: TokenLayout, state: State) -> None:
        """Run new text rows (B, R, D) over the stored caches; only each sample's last row leaves the last layer."""
        backbone = self.backbone
        tables = _Tables(backbone)
        offset = torch.arange(new.width)
        for layer in range(self.stop_layer):
            stored = state.layouts[layer]
            layout = state.layouts[layer] = stored.append(new)
            rotary = tables.of(layout, new.width)
            normed = backbone.input_norm(layer, hidden)
            keys, values = backbone.project_keys_values(layer, normed)
            keys, values = state.cache.update(rotary.turn(keys), values, layer)
            last_layer = layer == backbone.num_layers - 1
            rows = new.last_index().unsqueeze(1) if last_layer else None
            if rows is not None and self.observer is None:
                hidden, normed = gather(hidden, rows), gather(normed, rows)
                rotary = rotary.rows(rows)
            queries = backbone.project_queries(layer, normed)
            if self.observer is not None:
                self.observer(Observation(layer, queries, keys, layout))
                if layer == self.stop_layer - 1:
                    state.logits = None
                    return
            seen = stored.width + (offset.expand(len(hidden), -1) if rows is None else rows)
            attended = backbone.attend(layer, rotary.turn(queries), keys, values, layout, seen)
            hidden = backbone.output(layer, hidden, attended)
        state.logits = backbone.head(hidden[:, -1])


class _Tables:
    """Rotary tables of one pass, computed anew only where the positions are new."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.positions: Tensor | None = None
        self.rotary: Rotary | None = None

    def of(self, layout: TokenLayout, last: int | None = None) -> Rotary:
        """Tables of a layout's positions, or of its ``last`` ones."""
        positions = self.backbone.positions(layout)[..., -(last or 0) :]
        width = positions.shape[-1]
        if self.positions is None or not torch.equal(self.positions[..., :width], positions):
            self.positions = positions
            self.rotary = Rotary(*self.backbone.rotary(positions.to(self.backbone.device)))
        return self.rotary.first(width)


def _reduce(
    layout: TokenLayout, keep: Tensor, wanted: Tensor | None
) -> tuple[Tensor | None, TokenLayout, Tensor | None]:
    """Indices that stay (None if all do), the layout after, and the wanted positions renumbered."""
    if bool((keep == layout.real).all()):
        return None, layout, wanted
    index, kept = layout.select(keep)
    if wanted is not None:
        wanted = (keep.cumsum(1) - 1).gather(1, wanted)
    return index, kept, wanted


def _as_list(ids: Any) -> list[Any]:
    return list(ids)


def _ids(ids: Any) -> Tensor:
    ids = torch.as_tensor(ids, dtype=torch.long)
    if ids.dim() != 1:
        raise ValueError(f"token ids must be 1-D, not of shape {tuple(ids.shape)}")
    return ids

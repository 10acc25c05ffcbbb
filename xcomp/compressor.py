"""The compressor contract: which visual tokens survive, before the language model and between its layers.

A compressor acts in one or more of these places and inherits the others, which keep everything:

- ``before_llm`` pools or merges frames that are whole; ``compress`` does anything to a video's tokens before the first
  layer (prune, merge, leave frames of unequal length, look at the question);
- ``plan`` names, ahead of time, the slots of each frame that every layer keeps (LP-Comp and its ablations);
- ``before_layers``, ``after_attention`` and ``after_layer`` decide from the data what goes on (``plan`` is then None);
- ``while_decoding`` hides stored visual tokens from an answer's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from xcomp.backbone import ATTENTION_BLOCK, Backbone, Rotary, attention_probabilities
from xcomp.budgets import Budget
from xcomp.layout import TokenLayout, gather
from xcomp.messages import nearest
from xcomp.schedule import keep_slots, token_counts
from xcomp.visual import TOWER_FEATURES, VisualTokens


@dataclass(frozen=True)
class About:
    """What `xcomp plugins compressors` and the documentation tell of a method."""

    source: str  # title or name of the paper and its arXiv number
    acts: str  # where: "before the language model", "after layer 2", ...
    trained: bool = False  # whether the published method needs tuning
    deviates: str = ""  # where the default differs from the released code or the paper
    keeps: float | None = None  # share of the tokens that default options hold over 28 layers, if they alone decide it


@dataclass(frozen=True)
class QuestionTokens:
    """What is asked, for compressors that look at it: the text behind the video, ids (Q,) and embeddings (Q, D)."""

    ids: Tensor
    embeddings: Tensor


@dataclass(frozen=True)
class Reduction:
    """What goes on after a rule, sample by sample.

    ``order``: of each sample the positions that go on, long, in their new order: all of the text, and at least one
    visual token. A merged token is named by the position of one of those that it stands for. ``hidden``: new values of
    these positions, (len(order), D) a sample; None: as they were. ``size``: how many tokens of the vision path each
    stands for, text one; None: as before.
    """

    order: Sequence[Tensor]
    hidden: Sequence[Tensor] | None = None
    size: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class LayerOutput:
    """What a rule inside the language model sees: ``hidden`` (B, S, D) and who is where (``layout``).

    ``layer`` is 0-based; after a layer ``hidden`` is its output, after its attention what its MLP is about to take, and
    before the first layer (``layer`` −1) the embeddings. ``query_index`` (B,) is where each sample's prompt ends, the
    position that the answer is read from; ``num_visual`` how many visual tokens each brought into the language model;
    ``embeddings`` (B, S₀, D) and ``entered`` what all of them were there. ``state`` lives as long as the pass: whatever
    a rule has to remember stands there, not on the rule, which serves many passes.
    """

    layer: int
    num_layers: int
    hidden: Tensor
    layout: TokenLayout
    backbone: Backbone
    rotary: Rotary
    query_index: Tensor
    num_visual: list[int]
    embeddings: Tensor
    entered: TokenLayout
    state: dict[str, Any] = field(default_factory=dict)
    layer_input: Tensor | None = None  # (B, S, D): where no token left within the layer
    layer_keys: Tensor | None = None  # (B, H_kv, S, K) after RoPE, where they are cached
    macs: list[Tensor] = field(default_factory=list)  # (B,) each: of what was asked here; a rule adds its own

    def text_behind(self, row: int) -> Tensor:
        """Positions of the question: a sample's text behind its video (text between the frames is none of it) up to
        ``query_index``, for while tuning answers stand behind that."""
        real, visual = self.layout.real[row], self.layout.visual[row]
        behind = (real & ~visual & ~self.layout.between[row] & (visual.cumsum(0) > 0)).nonzero()[:, 0]
        return behind[behind <= int(self.query_index[row])]

    def keys(self, layer: str = "this") -> Tensor:
        """(B, H_kv, S, K) keys after RoPE of ``this`` layer, or of the ``next``."""
        if layer == "this" and self.layer_keys is not None:
            return self.layer_keys
        number, hidden = self._at(layer)
        normed = self.backbone.input_norm(number, hidden)
        keys = self.rotary.apply(self.backbone.project_keys_values(number, normed)[0])
        heads, size = keys.shape[1], keys.shape[3]
        self.macs.append(2 * heads * size * hidden.shape[-1] * self.layout.counts)  # values are projected, too
        return keys

    def attention(self, rows: Tensor, layer: str = "next", heads: str = "mean") -> Tensor:
        """Attention that the positions ``rows`` (B, R) pay in the next layer, or in ``this`` one, to what they see.

        (B, R, S) float32, the ``mean`` or ``max`` over heads, or (B, H, R, S) for ``all``. Computed for these rows
        alone, as many at a time as ``ATTENTION_BLOCK`` allows.
        """
        number, hidden = self._at(layer)
        keys = self.keys(layer)
        num_heads = self.backbone.text_config.num_attention_heads
        over_heads = {"mean": lambda x: x.mean(1), "max": lambda x: x.amax(1), "all": lambda x: x}[heads]
        blocks = []
        for part in rows.split(max(1, ATTENTION_BLOCK // (len(hidden) * num_heads * hidden.shape[1])), 1):
            normed = self.backbone.input_norm(number, gather(hidden, part))
            queries = self.rotary.rows(part).apply(self.backbone.project_queries(number, normed))
            mask = self.layout.causal_mask(part, hidden.device)
            blocks.append(over_heads(attention_probabilities(queries, keys, mask)))
        width = num_heads * keys.shape[3]
        self.macs.append(rows.shape[1] * width * (hidden.shape[-1] + self.layout.counts))
        return torch.cat(blocks, -2)

    def attention_of_query(self, layer: str = "next") -> Tensor:
        """(B, S) attention that ``query_index`` pays to what it sees, float32, mean over heads."""
        return self.attention(self.query_index.unsqueeze(1), layer)[:, 0]

    def _at(self, layer: str) -> tuple[int, Tensor]:
        if layer not in ("this", "next"):
            raise ValueError(f"layer is '{layer}'; it must be this or next")
        if layer == "next":
            if self.layer + 1 == self.num_layers:
                raise ValueError(f"there is no layer after layer {self.num_layers}")
            return self.layer + 1, self.hidden
        if self.layer_input is None:
            raise ValueError(
                "this layer's attention is known neither before the first layer nor once tokens left in it"
            )
        return self.layer, self.layer_input


@dataclass(frozen=True)
class DecodingStep:
    """What a rule sees at a layer for one new token of each answer: ``queries`` (B, H, 1, K) and ``keys``
    (B, H_kv, S, K) after RoPE, the keys' ``layout``, and a ``state`` that lives as long as the answers."""

    layer: int
    num_layers: int
    queries: Tensor
    keys: Tensor
    layout: TokenLayout
    state: dict[str, Any]

    def attention(self) -> Tensor:
        """(B, S) attention of the new token, float32, mean over heads."""
        real = self.layout.real.to(self.keys.device)[:, None, None]
        return attention_probabilities(self.queries, self.keys, real).mean(1)[:, 0]


class Compressor(nn.Module):
    """Base class of all compressors; the defaults keep every token.

    A compressor with parameters of its own makes them in ``build(width)``, so that they have the backbone's width;
    they are trained where ``tune.train`` names ``compressor``, saved with the model and loaded from there.
    """

    Config: type
    about: About | None = None
    needs: tuple[str, ...] = ()  # of xcomp.visual.TOWER_FEATURES what ``compress`` reads; ``grid``: it uses the grid
    downsamples: bool = False  # plain down-sampling, or nothing: what questions must withstand to be of the hard part
    uses_question: bool = False  # whether ``compress`` looks at the question: videos are then not stored without it
    keeps_positions: bool = False  # inside the language model: tokens keep their positions when others leave
    budget: Budget | None = None  # what YAML asks for beside the method's own options

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        object.__setattr__(self, "_fits", None)

    def fit(self, backbone: Backbone) -> None:
        """Make ready for a backbone, once: what it cannot give is refused, the budget met, parameters made.

        Raises:
            ValueError: one line that names the compressor, and the backbone or the budget.
        """
        if self._fits is backbone:
            return
        who = self._name
        given = (*backbone.tower_features, *([] if backbone.grid is None else ["grid"]))
        for need in self.needs:
            if need not in (known := [*TOWER_FEATURES, "grid", *given]):
                raise ValueError(
                    f"compressor '{who}': needs names '{need}';{nearest(need, known)} it may name {', '.join(known)}"
                )
        if missing := [need for need in self.needs if need not in given]:
            raise ValueError(
                f"compressor '{who}' needs '{', '.join(missing)}' of the vision path, but backbone "
                f"'{getattr(backbone, 'plugin_name', type(backbone).__name__)}' gives {', '.join(given) or 'none'}"
            )
        if self.budget is not None:
            try:
                args = self.budget, backbone.num_layers, backbone.tokens_per_frame
                self.config = self.for_budget(self.config, *args)
            except ValueError as error:
                raise ValueError(f"compressor '{who}': {str(error).removeprefix(f'{who}: ')}") from error
        if self._fits is None:
            self.build(backbone.text_config.hidden_size)
        object.__setattr__(self, "_fits", backbone)  # no part of this module

    def check(self, backbone: Backbone) -> None:
        """ValueError, one line, unless it has a plan, or options of a rule inside, for a backbone's whole frames."""
        try:
            self.plan(backbone.num_layers, backbone.tokens_per_frame)
        except ValueError as error:
            raise ValueError(f"compressor '{self._name}': {str(error).removeprefix(f'{self._name}: ')}") from error

    @property
    def _name(self) -> str:
        return getattr(self, "plugin_name", type(self).__name__)

    def build(self, width: int) -> None:
        """Make modules and parameters for a language model of that width (D); asked once, before anything runs."""

    def before_llm(self, tokens: Tensor) -> Tensor:
        """Visual tokens (T, N, D) → (T', N', D) before the first layer."""
        return tokens

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        """A video's tokens → those that enter the language model.

        ``question`` is None unless the class says ``uses_question``.
        """
        if type(self).before_llm is Compressor.before_llm and "before_llm" not in self.__dict__:
            return visual
        frames = self.before_llm(visual.frames())
        return VisualTokens.from_frames(frames) if isinstance(frames, Tensor) and frames.ndim == 3 else frames

    def plan(self, num_layers: int, tokens_per_frame: int) -> list[tuple[int, ...]] | None:
        """Ascending slots (0-based, of the N that enter the language model) kept at each layer.

        None means that it depends on the data: then the rules below are asked. By default every slot stays, or, where
        one of the rules is defined, None.
        """
        if any(defines(self, rule) for rule in RULES if rule != "while_decoding"):
            return None
        return [tuple(range(tokens_per_frame))] * num_layers

    def before_layers(self, output: LayerOutput) -> Tensor | Reduction | None:
        """Before the first layer: (B, S) bool, True for visual positions to keep; a Reduction; None keeps all."""
        return None

    def after_attention(self, output: LayerOutput) -> Tensor | Reduction | None:
        """Between a layer's attention and its MLP; the answers as ``before_layers``'. Text always stays."""
        return None

    def after_layer(self, output: LayerOutput) -> Tensor | Reduction | None:
        """After a layer, not asked after the last; the answers as ``before_layers``'."""
        return None

    def while_decoding(self, step: DecodingStep) -> Tensor | None:
        """After a layer's attention, for one token of an answer: (B, S) bool, False for visual keys that this token is
        not to see in the layers that follow; None hides nothing new."""
        return None

    @classmethod
    def for_budget(cls, config: Any, budget: Budget, num_layers: int, tokens_per_frame: int) -> Any:
        """The options (a Config) that give a budget on such a model. ValueError, one line, if none do."""
        if budget.keep == 1:
            return config
        raise ValueError(f"a budget of {budget.keep:g} of {budget.of} means nothing to it: set its own options")


class PlannedDrop(Compressor):
    """Progressive dropping by a schedule and a keep rule: the common part of LP-Comp and its ablations."""

    rule: str | None = None  # a subclass's fixed rule; else the option of that name

    def plan(self, num_layers: int, tokens_per_frame: int) -> list[tuple[int, ...]]:
        c = self.config
        rule = self.rule or c.rule
        return keep_slots(rule, _counts(c, num_layers, tokens_per_frame), tokens_per_frame, seed=getattr(c, "seed", 0))

    @classmethod
    def for_budget(cls, config: Any, budget: Budget, num_layers: int, tokens_per_frame: int) -> Any:
        """``start`` falls, or ``end`` rises, until what is held is as near the budget as whole tokens of a frame allow.

        Schedule, rounding and rule stay. As published (all tokens to 1 along a cosine) about half is held; a smaller
        mean over layers begins with fewer tokens, a larger one ends with more. Of ``input``, what the first layer
        holds, ``start`` changes; of ``final`` ``end``.
        """
        first, most = config.start or tokens_per_frame, tokens_per_frame
        falling = [(start, min(config.end, start)) for start in range(1, most + 1)]
        rising = [(max(first, end), end) for end in range(1, most + 1)]
        tried = {"input": falling, "final": rising, "layers": [*falling, *rising]}[budget.of]
        if config.schedule == "constant":
            tried = rising
        if config.schedule == "steps":
            tried = []

        def held(ends: tuple[int, int]) -> float:
            counts = _counts(replace(config, start=ends[0], end=ends[1]), num_layers, most)
            return {"input": counts[0], "final": counts[-1], "layers": sum(counts) / num_layers}[budget.of]

        wanted = budget.keep * most
        start, end = min([(first, min(config.end, first)), *tried], key=lambda ends: abs(held(ends) - wanted))
        if abs(met := held((start, end)) - wanted) > 0.5 + 1e-9:
            why = (
                "steps say what stays"
                if config.schedule == "steps"
                else f"a frame has {most} tokens, and neither end of the schedule comes nearer"
            )
            raise ValueError(
                f"a budget of {budget.keep:g} of {budget.of} cannot be met: {why}; the nearest possible is "
                f"{(wanted + met) / most:g}"
            )
        return replace(config, start=start, end=end)


def _counts(config: Any, num_layers: int, tokens_per_frame: int) -> list[int]:
    """Tokens a frame at each layer, by the options of a planned rule."""
    return token_counts(
        config.schedule,
        num_layers,
        tokens_per_frame,
        start=config.start,
        end=config.end,
        rounding=config.rounding,
        steps=config.steps,
    )


class Chain(Compressor):
    """Compressors one after the other: each before the language model in turn, at most one inside it."""

    def __init__(self, parts: Sequence[Compressor]):
        super().__init__(None)
        inside = [part for part in parts if acts_inside(part)]
        if len(inside) > 1:
            names = " and ".join(f"'{part._name}'" for part in inside)
            raise ValueError(f"{names} all act inside the language model; at most one of a list may")
        self.plugin_name = " + ".join(part._name for part in parts)
        self.parts = nn.ModuleList(parts)
        self.inside = inside[0] if inside else Compressor(None)
        self.needs = tuple(dict.fromkeys(need for part in parts for need in part.needs))
        self.uses_question = any(part.uses_question for part in parts)
        self.keeps_positions = self.inside.keeps_positions
        for name in ("plan", "before_layers", "after_attention", "after_layer", "while_decoding"):
            setattr(self, name, getattr(self.inside, name))

    def fit(self, backbone: Backbone) -> None:
        if self._fits is backbone:
            return
        for part in self.parts:
            part.fit(backbone)
        if backbone.device.type != "meta":
            self._check_order(backbone)
        object.__setattr__(self, "_fits", backbone)

    @torch.no_grad()
    def _check_order(self, backbone: Backbone) -> None:
        """ValueError unless each can take what those before it leave, as seen on a little noise."""
        groups, per_frame = 8, backbone.tokens_per_frame
        noise = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, generator=noise).to(backbone.device)

        rows = {"frame": groups}
        tower = {name: random(rows.get(name, groups * per_frame), 8) for name in self.needs if name != "grid"}
        tower = {name: values if name in ("keys", "frame") else values[:, 0] for name, values in tower.items()}
        tokens = random(groups, per_frame, backbone.text_config.hidden_size).to(backbone.dtype)
        visual = VisualTokens.from_frames(tokens, backbone.grid, tower)
        ids = torch.zeros(8, dtype=torch.long, device=backbone.device)
        question = QuestionTokens(ids, backbone.embed(ids))
        for part in self.parts:
            try:
                visual = part.compress(visual, question if part.uses_question else None)
            except ValueError as error:
                raise ValueError(f"compressors '{self._name}': '{part._name}' cannot stand there: {error}") from error

    def check(self, backbone: Backbone) -> None:
        """Of a rule that looks at the data; a plan depends on what the parts before leave of a frame."""
        if any(defines(self, method) for method in RULES):
            super().check(backbone)

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        for part in self.parts:
            visual = part.compress(visual, question if part.uses_question else None)
        return visual


RULES = ("before_layers", "after_attention", "after_layer", "while_decoding")


def defines(compressor: Compressor, method: str) -> bool:
    """Whether a compressor has a method of its own, not the contract's."""
    own = getattr(compressor, method)
    return getattr(own, "__func__", own) is not getattr(Compressor, method)


def acts_inside(compressor: Compressor) -> bool:
    """Whether a compressor does anything inside the language model."""
    return any(defines(compressor, method) for method in ("plan", *RULES))

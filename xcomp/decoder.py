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
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from xcomp.backbone import Backbone, FrameText, QuestionError, Rotary, RotaryTables
from xcomp.compressor import Compressor, DecodingStep, QuestionTokens, defines
from xcomp.contract import blamed, check_compressed, check_keep, check_plan, name_of
from xcomp.cost import LLMShape, appended_layers, counted_layers, pass_cost, planned_layers
from xcomp.generation import generate
from xcomp.layout import TextBehind, TokenLayout, gather
from xcomp.rules import Rules, select
from xcomp.visual import VisualTokens

DROP_EARLY = ("auto", "off", "output", "query")
Ids = Tensor | Sequence[int]
Video = Tensor | VisualTokens
# Text between the frames of one video, as in xcomp.backbone.Prompt: ids before and behind each; None: there is none.
FrameTexts = Sequence[tuple[Ids, Ids]] | None


class QuestionNeeded(ValueError):
    """A video cannot be run without its question: the compressor decides from both."""


@dataclass
class State:
    """What a pass leaves behind: the caches, who is where in them, and the logits after the last token.

    ``prefilled`` describes what each layer kept of the first pass (layers that kept the same share a layout); ``text``
    what was appended since, which is the same at every layer.
    """

    cache: DynamicCache
    prefilled: list[TokenLayout]
    text: TokenLayout
    logits: Tensor | None  # (B, V)
    batched: bool
    # Of each layout in ``prefilled`` (by identity): where text behind it begins, (1 or B) or (axes, B).
    starts: dict[int, Tensor] = field(default_factory=dict)
    # Under rules that look at the data: positions of each sample that went through each layer's MLP.
    outputs: list[Tensor] = field(default_factory=list)
    answer_state: dict[str, Any] = field(default_factory=dict)  # of a rule that looks on while answers are written
    rule_macs: list[int] = field(default_factory=list)  # of a rule's own look at the data, for each sample

    @classmethod
    def empty(cls, batch: int, batched: bool) -> State:
        """Before anything has run."""
        return cls(DynamicCache(), [], TokenLayout.text([0] * batch), None, batched, rule_macs=[0] * batch)

    @property
    def layouts(self) -> list[TokenLayout]:
        """Who is where in each layer's cache."""
        known = {id(layout): layout.append(self.text) for layout in self.prefilled}
        return [known[id(layout)] for layout in self.prefilled]

    @property
    def tokens_per_layer(self) -> list[Any]:
        """Visual tokens in each layer's KV cache; for a batch, a list of one count a sample for each layer."""
        return [layout.visual_counts if self.batched else layout.visual_counts[0] for layout in self.prefilled]

    def fork(self) -> State:
        """A state that grows on its own; the stored keys and values are shared and never written to."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return replace(self, cache=cache, answer_state={})

    def repeat(self, times: int) -> State:
        """A state of its own in which every sample stands ``times`` in a row."""
        state = self.fork()
        if times > 1:
            state.cache.batch_repeat_interleave(times)
        known = {id(layout): layout.repeat(times) for layout in self.prefilled}
        state.prefilled = [known[id(layout)] for layout in self.prefilled]
        state.text = self.text.repeat(times)
        state.logits = None if self.logits is None else self.logits.repeat_interleave(times, 0)
        outputs = [counts.repeat_interleave(times) for counts in self.outputs]
        return replace(state, batched=True, starts={}, outputs=outputs)

    def text_start(self, backbone: Backbone, layer: int) -> Tensor:
        """Position of the first token of ``text`` at a layer: (1 or B) or (axes, B)."""
        layout = self.prefilled[layer]
        if id(layout) not in self.starts:
            one_more = layout.append(TokenLayout.text([1] * len(layout.counts)))
            self.starts[id(layout)] = backbone.positions(one_more)[..., -1]
        return self.starts[id(layout)]


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
        self.compressor.fit(backbone)
        self.compressor.check(backbone)
        # Measured on a CPU: rows under a mask cost what they save, so plain causal attention stays.
        self.drop_early = "output" if drop_early == "auto" else drop_early
        self.checkpointing = checkpointing
        self.observer = observer
        self.stop_layer = backbone.num_layers if stop_layer is None else stop_layer

    # --- public -----------------------------------------------------------------------------------------------------

    def prefill(
        self,
        tokens: Video | Sequence[Video],
        prefix_ids: Ids | Sequence[Ids],
        suffix_ids: Ids | Sequence[Ids],
        frame_texts: FrameTexts | Sequence[FrameTexts] = None,
    ) -> State:
        """Run ``[prefix | video | suffix]``: tokens (T, N, D) or VisualTokens and 1-D ids, or lists for a batch.

        ``frame_texts`` are the (before, behind) ids of the text beside each of the T frames, where there is any
        (``Prompt.frame_texts``). All of it stays: that of a frame whose tokens have left, too, and where a compressor
        merged frames before the first layer, their tokens stand where the first of them was.
        """
        hidden, layout, tokens_per_frame, batched = self._assemble(tokens, prefix_ids, suffix_ids, frame_texts)
        state = State.empty(len(hidden), batched)
        observed = 0
        if self.observer is not None:
            if len(hidden) > 1:
                raise ValueError(f"an observer follows one sample at a time, not {len(hidden)}")
            observed = len(suffix_ids[0] if batched else suffix_ids)
        wanted = layout.last_index().unsqueeze(1)
        last = self._run(hidden, layout, tokens_per_frame, wanted=wanted, state=state, observed=observed)
        if last is not None:
            state.logits = self.backbone.head(last[:, 0])
        return state

    def logits(
        self,
        tokens: Sequence[Video | None],
        prefix_ids: Sequence[Ids],
        suffix_ids: Sequence[Ids],
        num_logits: Sequence[int],
        frame_texts: Sequence[FrameTexts] | None = None,
        predicted: Sequence[Ids] | None = None,
    ) -> Tensor:
        """Logits at the last ``num_logits[b]`` positions of each sample, packed: (sum, V). No cache: for training.

        One sample's tokens and ids may stand without a list. A sample without a video (None) is text alone; no rule
        is asked about it. ``predicted``: of each sample further text tokens, numbered through prefix and suffix, whose
        predictions are wanted too: the logits of whatever stands before each at the last layer, behind the sample's
        others. ``num_logits`` says where the prompt ends, at the first of the positions that it counts.
        """
        batched = isinstance(tokens, (list, tuple))
        batch = tokens if batched else [tokens]
        further = [
            _ids(ids) for ids in ([()] * len(batch) if predicted is None else predicted if batched else [predicted])
        ]
        mixed = 0 < sum(video is None for video in batch) < len(batch)
        if mixed and self.compressor.plan(self.backbone.num_layers, self.backbone.tokens_per_frame) is None:
            return self._apart(tokens, prefix_ids, suffix_ids, num_logits, frame_texts, further)
        hidden, layout, tokens_per_frame, _ = self._assemble(tokens, prefix_ids, suffix_ids, frame_texts, num_logits)
        prefixes, suffixes = (ids if batched else [ids] for ids in (prefix_ids, suffix_ids))
        rows = []
        for row, length in enumerate(layout.counts.tolist()):
            before, behind = len(prefixes[row]), length - len(suffixes[row])
            last = torch.arange(length - num_logits[row], length)
            more = torch.where(further[row] < before, further[row], further[row] - before + behind) - 1
            rows.append(torch.cat([last, more]))
        counts = torch.tensor([len(row) for row in rows])
        # Where samples want unequally many, padding repeats a position.
        wanted = torch.stack([row[torch.arange(int(counts.max())).clamp(max=len(row) - 1)] for row in rows])
        found = self._run(hidden, layout, tokens_per_frame, wanted=wanted, state=None)
        real = torch.arange(wanted.shape[1]) < counts.unsqueeze(1)
        return self.backbone.head(found[real.to(found.device)])

    def _apart(
        self,
        tokens: Sequence[Video | None],
        prefix_ids: Sequence[Ids],
        suffix_ids: Sequence[Ids],
        num_logits: Sequence[int],
        frame_texts: Sequence[FrameTexts] | None,
        predicted: Sequence[Tensor],
    ) -> Tensor:
        """``logits`` of a batch in which some samples have a video and others none: a pass each, as rules that look at
        the data are about samples with a video."""
        texts = [None] * len(tokens) if frame_texts is None else frame_texts
        given = tokens, prefix_ids, suffix_ids, num_logits, texts, predicted
        found: dict[int, Tensor] = {}
        for rows in ([i for i, v in enumerate(tokens) if (v is None) == alone] for alone in (False, True)):
            packed = self.logits(*([values[i] for i in rows] for values in given))
            found |= zip(rows, packed.split([num_logits[i] + len(predicted[i]) for i in rows]))
        return torch.cat([found[i] for i in range(len(tokens))])

    def prefill_video(
        self,
        tokens: Video | Sequence[Video],
        prefix_ids: Ids | Sequence[Ids],
        frame_texts: FrameTexts | Sequence[FrameTexts] = None,
    ) -> State:
        """Run ``[prefix | video]`` alone, for any number of questions; text between the frames is part of the video.

        Raises:
            QuestionNeeded: if the compressor decides from the question too.
        """
        batched = isinstance(tokens, (list, tuple))
        empty = torch.empty(0, dtype=torch.long)
        suffixes = [empty] * len(tokens) if batched else empty
        if self.compressor.uses_question:
            self._refuse_to_store()
        hidden, layout, tokens_per_frame, _ = self._assemble(tokens, prefix_ids, suffixes, frame_texts)
        if self.plan(tokens_per_frame) is None:
            self._refuse_to_store()
        state = State.empty(len(hidden), batched)
        self._run(hidden, layout, tokens_per_frame, wanted=None, state=state)
        return state

    def _refuse_to_store(self) -> None:
        raise QuestionNeeded(
            f"{type(self.compressor).__name__} decides from the question, so a video cannot be stored without one"
        )

    def extend(self, state: State, suffix_ids: Ids | Sequence[Ids]) -> State:
        """Append text (1-D ids, or a list of them for a batch) to a state, in place, and return it."""
        ids = [_ids(i) for i in (suffix_ids if state.batched else [suffix_ids])]
        self._check_text(state, ids)
        padded = pad_sequence(ids, batch_first=True).to(self.backbone.device)
        self._append(self.backbone.embed(padded), TokenLayout.text([len(i) for i in ids]), state)
        return state

    def decode(self, state: State, token_ids: Tensor | Sequence[int] | int) -> Tensor:
        """One step: a token a sample, (B,) or (B, 1) → logits (B, V). The state grows in place."""
        ids = torch.as_tensor(token_ids, device=self.backbone.device).reshape(-1, 1)
        self._append(self.backbone.embed(ids), TokenLayout.text([1] * len(ids)), state, decoding=True)
        return state.logits

    @torch.no_grad()
    def generate(self, state: State, **options: Any) -> list[list[int]]:
        """Answers to a state whose prompt has been run: token ids of each sample, stop token left out.

        Greedy by default; ``options`` are those of :func:`xcomp.generation.generate`.
        """
        return generate(self, state, **options)

    @torch.no_grad()
    def score(self, state: State, continuations: Sequence[Ids]) -> list[tuple[Tensor, bool]]:
        """For each sample of a state whose prompt has been run: the log-probability of every token of a given
        continuation, (n,) float32 on the CPU, and whether greedy search would write just that.

        All are run in one pass; under a compressor that looks on while answers are written one token at a time, as an
        answer's are. The state grows with them.
        """
        ids = [_ids(i) for i in continuations]
        if len(ids) != len(state.logits) or not all(map(len, ids)):
            raise ValueError(f"{len(state.logits)} samples take as many continuations of at least one token")
        padded = pad_sequence(ids, batch_first=True).to(self.backbone.device)
        real = torch.arange(padded.shape[1]) < torch.tensor([len(i) for i in ids]).unsqueeze(1)
        scores, greedy = torch.zeros(padded.shape), torch.ones(padded.shape, dtype=torch.bool)
        scores[:, 0], greedy[:, 0] = _told(state.logits, padded[:, 0])
        if self._steps_while_decoding:
            for step in range(1, padded.shape[1]):
                logits = self.decode(state, padded[:, step - 1])
                scores[:, step], greedy[:, step] = _told(logits, padded[:, step])
        elif padded.shape[1] > 1:
            behind = real[:, 1:]
            text = TokenLayout.text(behind.sum(1).tolist())
            hidden = self._append(self.backbone.embed(padded[:, :-1]), text, state, every=True)
            rows = behind.to(hidden.device)
            told = _told(self.backbone.head(hidden[rows]), padded[:, 1:][rows])
            scores[:, 1:][behind], greedy[:, 1:][behind] = told
        return [(scores[row, : len(i)], bool(greedy[row, : len(i)].all())) for row, i in enumerate(ids)]

    @property
    def _steps_while_decoding(self) -> bool:
        """Whether tokens behind a prompt must be run one at a time."""
        return defines(self.compressor, "while_decoding")

    def plan(self, tokens_per_frame: int) -> list[tuple[int, ...]] | None:
        """The slots of a frame that each layer keeps, checked; None where it depends on the data."""
        plan = self.compressor.plan(self.backbone.num_layers, tokens_per_frame)
        if plan is not None:
            check_plan(plan, self.backbone.num_layers, tokens_per_frame, name_of("compressor", self.compressor))
        return plan

    def observed_by(self, observer: Callable[[Observation], None]) -> Decoder:
        """The same decoder with an observer."""
        options = {"drop_early": self.drop_early, "stop_layer": self.stop_layer}
        return Decoder(self.backbone, self.compressor, observer=observer, **options)

    # --- cost -------------------------------------------------------------------------------------------------------

    def prefill_macs(self, state: State, num_prefix: int, num_suffix: int = 0, *, row: int = 0) -> int:
        """MACs of the pass that left ``state``, for one of its samples: a prefix, the video, and a suffix if any."""
        layout = state.prefilled[0]
        plan = self.plan(layout.frame_tokens)
        if plan is None or layout.place is not None:
            sizes = [int(layout.counts[row]) for layout in state.prefilled]
            outputs = [int(counts[row]) for counts in state.outputs]
            layers = counted_layers(sizes, outputs, whole=self.observer is not None, rows=min(1, num_suffix))
        else:
            plan, frames = plan[: self.stop_layer], int(layout.frame[row].max()) + 1
            texts = layout.text_lengths(row)
            layers = planned_layers(plan, frames, num_prefix, num_suffix, drop_early=self.drop_early, texts=texts)
        heads = 1 if num_suffix and self.stop_layer == self.backbone.num_layers else 0
        return pass_cost(self.shape, layers, head_positions=heads).macs

    @cached_property
    def shape(self) -> LLMShape:
        """The language model's sizes."""
        return LLMShape.from_config(self.backbone.text_config)

    def append_macs(self, state: State, *texts: int, row: int = 0) -> int:
        """MACs of texts of so many tokens, run one after the other behind what one sample of ``state`` prefilled."""
        stored = [int(layout.counts[row]) for layout in state.prefilled]
        whole = self.stop_layer < self.backbone.num_layers or self.observer is not None
        total = 0
        for new in filter(None, texts):
            layers = appended_layers(stored, new, whole=whole)
            total += pass_cost(self.shape, layers, head_positions=0 if whole else 1).macs
            stored = [size + new for size in stored]
        return total

    def score_macs(self, state: State, question: int, lengths: Sequence[int], *, row: int = 0) -> int:
        """MACs of :meth:`score` for continuations of so many tokens, behind ``question`` tokens of text behind what one
        sample of ``state`` prefilled; those of the question are not counted."""
        if self._steps_while_decoding:
            asked = self.append_macs(state, question, row=row)
            return sum(self.append_macs(state, question, *[1] * (n - 1), row=row) - asked for n in lengths)
        shape = LLMShape.from_config(self.backbone.text_config)
        stored = [int(layout.counts[row]) + question for layout in state.prefilled]
        passes = (appended_layers(stored, n - 1, every=True) for n in lengths if n > 1)
        heads = (n - 1 for n in lengths if n > 1)
        return sum(pass_cost(shape, layers, head_positions=n).macs for layers, n in zip(passes, heads))

    # --- the pass ---------------------------------------------------------------------------------------------------

    def _assemble(
        self,
        tokens: Video | Sequence[Video],
        prefix_ids: Ids | Sequence[Ids],
        suffix_ids: Ids | Sequence[Ids],
        frame_texts: FrameTexts | Sequence[FrameTexts],
        num_logits: Sequence[int] | None = None,
    ) -> tuple[Tensor, TokenLayout, int, bool]:
        """Embedded sequences (B, S, D) padded on the right, their layout, slots a frame, and if it was a batch.

        ``num_logits``: positions at the end of each suffix whose logits are wanted; the first ends the question.
        """
        batched = isinstance(tokens, (list, tuple))
        videos = list(tokens) if batched else [tokens]
        prefixes = [_ids(i) for i in (prefix_ids if batched else [prefix_ids])]
        suffixes = [_ids(i) for i in (suffix_ids if batched else [suffix_ids])]
        texts = [None] * len(videos) if frame_texts is None else list(frame_texts) if batched else [frame_texts]
        if not len(videos) == len(prefixes) == len(suffixes) == len(texts):
            raise ValueError(
                f"a batch needs as many videos ({len(videos)}) as prefixes ({len(prefixes)}), "
                f"suffixes ({len(suffixes)}) and texts between frames ({len(texts)})"
            )
        ends = [len(suffix) + 1 - count for suffix, count in zip(suffixes, num_logits or [1] * len(suffixes))]
        videos = [self.compress(video, suffix[:end]) for video, suffix, end in zip(videos, suffixes, ends)]
        widths = {video.frame_tokens for video in videos if len(video)} or {self.backbone.tokens_per_frame}
        if len(widths) != 1:
            raise ValueError(f"all videos of a batch need the same number of tokens a frame, not {sorted(widths)}")
        videos = [video if len(video) else replace(video, frame_tokens=min(widths)) for video in videos]
        texts = [_frame_texts(given, video) for given, video in zip(texts, videos)]
        lengths = [[(len(text.before), len(text.behind)) for text in of_video] for of_video in texts]
        layout = TokenLayout.of([(len(p), v, len(s)) for p, v, s in zip(prefixes, videos, suffixes)], lengths)
        self._check_length(layout, videos)
        samples = [
            torch.cat([self._embed(p), self._embed_video(v, text, layout.between[row, len(p) :]), self._embed(s)])
            for row, (p, v, s, text) in enumerate(zip(prefixes, videos, suffixes, texts))
        ]
        return pad_sequence(samples, batch_first=True), layout, widths.pop(), batched

    def _embed_video(self, video: VisualTokens, texts: list[FrameText], between: Tensor) -> Tensor:
        """A video's tokens with the text between its frames, (L + M, D); ``between`` says where that stands."""
        tokens = video.tokens.to(self.backbone.dtype)
        if not texts:
            return tokens
        text = self._embed(torch.cat([ids for of_frame in texts for ids in of_frame]))
        between = between[: len(text) + len(tokens)]
        order = torch.where(between, between.cumsum(0) - 1, len(text) + (~between).cumsum(0) - 1)
        return torch.cat([text, tokens])[order.to(tokens.device)]

    def compress(self, tokens: Video | None, suffix_ids: Ids = ()) -> VisualTokens:
        """The tokens of one video that enter the language model. What this returned is not compressed again."""
        if tokens is None:
            none = torch.empty(0, self.backbone.tokens_per_frame, self.backbone.text_config.hidden_size)
            tokens = VisualTokens.from_frames(none.to(self.backbone.device, self.backbone.dtype))
            return replace(tokens, compressed=True, shown_frames=0)
        visual = tokens
        if not isinstance(visual, VisualTokens):
            grid = self.backbone.grid if tokens.shape[1] == self.backbone.tokens_per_frame else None
            visual = VisualTokens.from_frames(tokens, grid)
        if visual.compressed:
            return visual
        if missing := [need for need in self.compressor.needs if need != "grid" and need not in visual.tower]:
            raise ValueError(
                f"{name_of('compressor', self.compressor)} needs '{', '.join(missing)}' of the vision tower: "
                "give it what backbone.visual(pixels, compressor.needs) returns"
            )
        question = None
        if self.compressor.uses_question:
            ids = _ids(suffix_ids)
            question = QuestionTokens(ids, self._embed(ids))
        who = name_of("compressor", self.compressor)
        with blamed(who, self.compressor, "compress"):
            found = self.compressor.compress(visual, question)
        check_compressed(who, visual, found)
        return replace(found, compressed=True, shown_frames=visual.num_frames)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.backbone.embed(ids.to(self.backbone.device))

    def _check_length(self, layout: TokenLayout, videos: list[VisualTokens]) -> None:
        limit = self.backbone.text_config.max_position_embeddings
        of_videos = (layout.visual | layout.between).sum(1).tolist()  # with the text between the frames
        for count, of_video, video in zip(layout.counts.tolist(), of_videos, videos):
            if count > limit:
                if not of_video:
                    raise QuestionError(f"a text of {count} tokens is longer than the {limit} of the language model")
                frames, merged = video.shown_frames or video.num_frames, self.backbone.merged_frames
                fits = max(0, (limit - count + of_video) * frames // of_video) * merged
                raise QuestionError(
                    f"{frames * merged} frames make a sequence of {count} tokens, but the language "
                    f"model takes {limit}; at most {fits} frames fit"
                )

    def _check_text(self, state: State, ids: list[Tensor]) -> None:
        limit = self.backbone.text_config.max_position_embeddings
        for before, after, new in zip(state.prefilled[0].counts.tolist(), state.text.counts.tolist(), map(len, ids)):
            if before + after + new > limit:
                raise QuestionError(
                    f"a text of {new} tokens behind {before + after} others makes a sequence of "
                    f"{before + after + new}, but the language model takes {limit}; show fewer frames"
                )

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

        With ``wanted`` None the last layer only stores keys and values, and nothing is returned; nor is it where an
        observer ends the pass. ``observed``: how many last positions the observer sees.
        """
        plan = self.plan(tokens_per_frame)
        if plan is None and not any(layout.visual_counts):  # text alone: nothing can leave
            plan = [tuple(range(tokens_per_frame))] * self.backbone.num_layers
        tables = RotaryTables(self.backbone)
        if plan is None:
            rules = Rules(self.compressor, self.backbone, tables, hidden, layout)
            if state is not None:
                state.rule_macs = rules.macs
            hidden, layout, wanted = rules.reduce("before_layers", -1, hidden, rules.layout, wanted)
        else:
            index, layout, wanted = select(layout, layout.keep_slots(plan[0], tokens_per_frame), wanted)
            hidden = hidden if index is None else gather(hidden, index)
        cache = None if state is None else state.cache
        for layer in range(self.stop_layer):
            rotary = tables.of(layout)
            if state is not None:
                state.prefilled.append(layout)
            observe = partial(self._observe, layer, layout, observed) if observed else None
            if layer == self.stop_layer - 1:
                if wanted is None or observed:
                    self._store(layer, hidden, rotary, cache, observe)
                    return None
                return self._layer(layer, hidden, rotary, cache, layout, wanted, wanted)
            if plan is None:
                args = layer, hidden, rotary, cache, layout, wanted, observe
                hidden, layout, wanted = self._layer_under_rules(rules, *args, state)
                continue
            index = after = None
            if len(plan[layer + 1]) < len(plan[layer]):
                index, after, wanted = select(layout, layout.keep_slots(plan[layer + 1], tokens_per_frame), wanted)
            outputs = None if self.drop_early == "off" else index
            queries = outputs if self.drop_early == "query" else None
            hidden = self._layer(layer, hidden, rotary, cache, layout, queries, outputs, observe)
            if state is not None:
                state.outputs.append((layout if outputs is None else after).counts)
            if index is not None:
                hidden = gather(hidden, index) if outputs is None else hidden
                layout = after
        raise AssertionError("a language model has at least one layer")

    def _layer_under_rules(
        self,
        rules: Rules,
        layer: int,
        hidden: Tensor,
        rotary: Rotary,
        cache: DynamicCache | None,
        layout: TokenLayout,
        wanted: Tensor,
        observe: Callable[[Tensor, Tensor], None] | None,
        state: State | None,
    ) -> tuple[Tensor, TokenLayout, Tensor]:
        """One whole layer, with what rules that look at the data take away in it and after it: hidden states, layout
        and wanted positions."""
        args = (hidden, rotary, cache, layout, None, None, observe)
        between = "after_attention" in rules.asked
        run = partial(self._checkpointed, self._attention_half) if between else self._layer
        given, hidden = hidden, run(layer, *args)
        keys = None if cache is None else cache.layers[layer].keys
        if between:
            before = layout
            hidden, layout, wanted = rules.reduce("after_attention", layer, hidden, layout, wanted, given, keys)
            hidden = self._checkpointed(self.backbone.add_mlp, layer, hidden)
            if layout is not before:
                given = keys = None
        if state is not None:
            state.outputs.append(layout.counts)
        return rules.reduce("after_layer", layer, hidden, layout, wanted, given, keys)

    def _append(
        self, hidden: Tensor, new: TokenLayout, state: State, *, decoding: bool = False, every: bool = False
    ) -> Tensor | None:
        """Run new text (B, R, D) over the stored caches; only each sample's last row leaves the last layer, to become
        the state's logits. With ``every`` all rows do, (B, R, D), and the state has none."""
        watches = decoding and defines(self.compressor, "while_decoding")
        before = state.text
        state.text = before.append(new)
        # (1 or B, R): how far each new token stands behind the first text after the prefill.
        offsets = before.counts.unsqueeze(1) + torch.arange(new.width)
        last = new.last_index().unsqueeze(1)
        known: dict[int, tuple[Rotary, TextBehind]] = {}  # layers share layouts
        for layer in range(self.stop_layer):
            stored = state.prefilled[layer]
            if id(stored) not in known:
                positions = state.text_start(self.backbone, layer).unsqueeze(-1) + offsets
                rotary = Rotary(*self.backbone.rotary(positions.to(hidden.device)))
                known[id(stored)] = rotary, TextBehind(stored, state.text)
            rotary, layout = known[id(stored)]
            observe = partial(self._ask_while_decoding, layer, rotary, stored, state, known) if watches else None
            if self.observer is not None:
                observe = partial(self._observe, layer, stored.append(state.text), new.width)
                if layer == self.stop_layer - 1:
                    self._store(layer, hidden, rotary, state.cache, observe)
                    state.logits = None
                    return None
            queries = last if layer == self.backbone.num_layers - 1 and not every else None
            hidden = self._layer(
                layer, hidden, rotary, state.cache, layout, queries, queries, observe, layout.width - new.width
            )
        if every:
            state.logits = None
            return hidden
        state.logits = self.backbone.head(hidden[:, -1])
        return None

    def _observe(self, layer: int, layout: TokenLayout, rows: int, queries: Tensor, keys: Tensor) -> None:
        self.observer(Observation(layer, queries[:, :, -rows:], keys, layout))

    def _ask_while_decoding(
        self,
        layer: int,
        rotary: Rotary,
        stored: TokenLayout,
        state: State,
        known: dict[int, tuple[Rotary, TextBehind]],
        queries: Tensor,
        keys: Tensor,
    ) -> None:
        """Let the rule hide stored tokens from the layers that follow."""
        layout = stored.append(state.text)
        step = DecodingStep(layer, self.backbone.num_layers, rotary.apply(queries), keys, layout, state.answer_state)
        seen = self.compressor.while_decoding(step)
        if seen is not None:
            check_keep(name_of("compressor", self.compressor), seen, layout, "while_decoding")
            real = stored.real & (seen.cpu()[:, : stored.width] | ~stored.visual)
            known[id(stored)] = rotary, TextBehind(replace(stored, real=real), state.text)

    # --- one layer --------------------------------------------------------------------------------------------------

    def _layer(self, layer: int, *args: Any) -> Tensor:
        within = getattr(
            self.backbone.language_model.layers[layer], "within", None
        )  # weights in pieces: xcomp.sharding
        if within is not None:
            return within(self._checkpointed, self._layer_body, layer, *args)
        return self._checkpointed(self._layer_body, layer, *args)

    def _checkpointed(self, part: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)

    def _layer_body(self, layer: int, *args: Any) -> Tensor:
        """One transformer layer: the arguments of :meth:`_attention_half`."""
        return self.backbone.add_mlp(layer, self._attention_half(layer, *args))

    def _attention_half(
        self,
        layer: int,
        hidden: Tensor,
        rotary: Rotary,
        cache: DynamicCache | None,
        layout: TokenLayout | TextBehind,
        queries: Tensor | None,
        outputs: Tensor | None,
        observe: Callable[[Tensor, Tensor], None] | None = None,
        offset: int = 0,
    ) -> Tensor:
        """First half of a layer over new positions (B, S, D), whose keys follow those of the cache: what the MLP takes.

        ``queries`` (B, R) are the new positions that attend (None: all), ``outputs`` those that leave the layer (None:
        those that attend). ``layout`` describes all keys, and ``offset`` is the first new position's place in it.
        """
        backbone = self.backbone
        normed, keys, values = self._keys_values(layer, hidden, rotary, cache)
        rows = queries
        if queries is not None:
            hidden, normed = gather(hidden, queries), gather(normed, queries)
            rotary, rows = rotary.rows(queries), queries + offset
        elif offset:
            rows = offset + torch.arange(hidden.shape[1]).expand(len(hidden), -1)
        projected = backbone.project_queries(layer, normed)
        if observe is not None:
            observe(projected, keys)
        attended = backbone.attend(layer, rotary.apply(projected), keys, values, layout, rows)
        if outputs is not None and outputs is not queries:
            hidden, attended = gather(hidden, outputs), gather(attended, outputs)
        return backbone.add_attention(layer, hidden, attended)

    def _store(
        self,
        layer: int,
        hidden: Tensor,
        rotary: Rotary,
        cache: DynamicCache | None,
        observe: Callable[[Tensor, Tensor], None] | None,
    ) -> None:
        """What is left of a layer whose output nobody reads: its keys and values, and a look at its queries."""
        normed, keys, _ = self._keys_values(layer, hidden, rotary, cache)
        if observe is not None:
            observe(self.backbone.project_queries(layer, normed), keys)

    def _keys_values(
        self, layer: int, hidden: Tensor, rotary: Rotary, cache: DynamicCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed input of the new positions; keys (after RoPE) and values of all."""
        normed = self.backbone.input_norm(layer, hidden)
        keys, values = self.backbone.project_keys_values(layer, normed)
        keys = rotary.apply(keys)
        if cache is not None:
            keys, values = cache.update(keys, values, layer)
        return normed, keys, values


def _told(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of (N, V) logits and (N,) tokens: log-probabilities in float32, and whether they are likeliest; on the CPU."""
    logits = logits.float()
    return logits.log_softmax(-1).gather(1, tokens.unsqueeze(1))[:, 0].cpu(), (logits.argmax(-1) == tokens).cpu()


def _frame_texts(texts: FrameTexts, video: VisualTokens) -> list[FrameText]:
    """Ids of the text beside each frame, checked; an empty list where there is none."""
    texts = [FrameText(*map(_ids, text)) for text in texts or ()]
    shown = video.shown_frames or video.num_frames
    if texts and len(texts) != shown:
        raise ValueError(
            f"{len(texts)} texts between frames were given for a video of {shown} frames (groups, where the backbone "
            "merges frames); a prompt for as many frames as are shown has one for each"
        )
    return texts if any(len(ids) for text in texts for ids in text) else []


def _ids(ids: Ids) -> Tensor:
    ids = torch.as_tensor(ids, dtype=torch.long)
    if ids.dim() != 1:
        raise ValueError(f"token ids must be 1-D, not of shape {tuple(ids.shape)}")
    return ids

"""QC-Comp: question-conditioned frame selection by the language model's own attention.

Candidate frames go through the language model in overlapping circular chunks, with the question behind them. At the
layers in the middle of the model, the attention that question tokens pay to a clip of frames is the clip's score; a
frame's score is the mean over the clips that cover it, summed over layers.

Source: "One Token per Highly Selective Frame" (arXiv 2604.14149), Section 3.2, with the released code's behaviour as
the default: the scoring attention has no causal mask (``causal: true`` is the paper's reading).

Deviations. Only the rows of attention that are scored are computed, from the keys as the chunk's own pass caches them:
attention depends on differences of positions, so a window's numbering is had by rotating the queries. A partial last
window is one more window that ends at the end; videos shorter than a chunk are scored too, as one circular chunk.
Where the prompt has text between the frames (time stamps), a chunk and a window hold the text of their own frames; it
takes part in the softmax, and only attention to visual tokens is counted. The prefix is that of all candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from xcomp.backbone import Backbone, FrameText, Prompt, QuestionError, apply_rope, attention_scores
from xcomp.compressor import Compressor
from xcomp.cost import LLMShape, appended_layers, pass_cost, planned_layers
from xcomp.decoder import Decoder, Observation, QuestionNeeded, State
from xcomp.inflight import VideoInFlight
from xcomp.layout import TextLengths, merged_lengths
from xcomp.ledger import Work
from xcomp.selector import FrameQuery, FrameSelector, SelectionCost
from xcomp.visual import VisualTokens


@dataclass(frozen=True)
class Spans:
    """Key positions of a layer's cache: ``prefix`` tokens, then the ``video``'s, then ``question`` and ``header``.

    The video's are visual tokens and what text stands between its frames. The rows that are scored are the question's,
    without its first ``skipped``.
    """

    prefix: int
    video: int
    question: int
    header: int
    skipped: int

    @property
    def rows(self) -> int:
        return self.question - self.skipped


@dataclass(frozen=True)
class Chunk:
    """Consecutive frames as the language model has them, with the caches of their pass if no question was needed.

    ``frames`` are their places among the candidates, ``tokens`` the visual tokens of ``groups`` frames as the backbone
    merges them, ``texts`` the text beside each group, if there is any.
    """

    frames: list[int]
    groups: int
    tokens: Tensor | VisualTokens
    state: State | None
    texts: Sequence[FrameText] | None = None


class FrameTotals:
    """Sums of clip scores over the frames that they cover, layer by layer."""

    def __init__(self, num_layers: int, num_frames: int):
        # float32 is said wherever scores are kept: torch's default type may be a shorter one.
        self.sums = torch.zeros(num_layers, num_frames, dtype=torch.float32)
        self.counts = torch.zeros(num_layers, num_frames, dtype=torch.float32)

    def add(self, frames: list[int], scores: Tensor, clip_frames: int) -> None:
        """``scores`` (layers, clips) of a chunk; NaN is no score."""
        index = torch.tensor(frames)
        scores = scores.repeat_interleave(clip_frames, 1)[:, : len(frames)]
        self.sums.index_add_(1, index, scores.nan_to_num(0.0))
        self.counts.index_add_(1, index, (~scores.isnan()).float())

    def frame_scores(self) -> Tensor:
        """(T,): mean over the clips that cover a frame, summed over layers."""
        return (self.sums / self.counts).sum(0)


class QCComp(FrameSelector):
    """Attention of question tokens to clips, by segments (default) or over the whole chunk."""

    @dataclass
    class Config:
        variant: str = "segmented"  # segmented (windows with positions of their own) or global
        chunk_frames: int = 512  # frames from one chunk to the next
        clip_frames: int = 8  # frames scored together
        window_clips: int = 8  # clips in a window
        window_stride: int = 4  # clips from one window to the next
        n_repeat: int = 2  # rounds, each with shifted chunks: how often every frame is scored
        query_bias: int | None = None  # tokens after the video that are not counted as question; None: the backbone's
        causal: bool = False  # question tokens see earlier question tokens only (the paper)
        first_layer: float = 6 / 28  # scores are summed from this depth …
        last_layer: float = 24 / 28  # … up to this one

        def __post_init__(self) -> None:
            if self.variant not in ("segmented", "global"):
                raise ValueError(f"variant is '{self.variant}'; it must be segmented or global")
            for name in ("chunk_frames", "clip_frames", "window_clips", "window_stride", "n_repeat"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
            if self.chunk_frames % self.clip_frames:
                raise ValueError(f"chunk_frames {self.chunk_frames} is no multiple of clip_frames {self.clip_frames}")
            if self.window_clips % self.window_stride:
                raise ValueError(
                    f"window_clips {self.window_clips} is no multiple of window_stride {self.window_stride}"
                )
            if self.query_bias is not None and self.query_bias < 0:
                raise ValueError(f"query_bias is {self.query_bias}; it must be at least 0")
            if not 0 <= self.first_layer < self.last_layer <= 1:
                raise ValueError("first_layer and last_layer are depths with 0 <= first_layer < last_layer <= 1")

    def layers(self, num_layers: int) -> range:
        """The layers (0-based) whose scores count."""
        first, last = (round(depth * num_layers) for depth in (self.config.first_layer, self.config.last_layer))
        first = min(first, num_layers - 1)
        return range(first, max(last, first + 1))

    # --- scoring ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self, video: VideoInFlight, queries: Sequence[FrameQuery], compressor: Compressor | None = None
    ) -> list[Tensor]:
        """Each chunk is run once, and all questions look at it."""
        backbone, candidates = video.backbone, video.candidates
        layers = self.layers(backbone.num_layers)
        decoder = self._decoder(backbone, compressor, layers)
        totals = [FrameTotals(len(layers), len(candidates)) for _ in queries]

        def tokens_of(places: list[int], groups: int) -> VisualTokens:
            return video.visual([candidates[i] for i in places]).first(groups)

        for frames, groups, tokens in self._chunks(backbone, len(candidates), tokens_of):
            prompt = queries[0].prompt
            texts = texts_of(prompt.frame_texts, frames, backbone.merged_frames)

            def run(work: Work, tokens=tokens, prefix_ids=prompt.prefix_ids, texts=texts) -> State:
                stored = decoder.prefill_video(tokens, prefix_ids, texts)
                work.macs += decoder.prefill_macs(stored, len(prefix_ids))
                return stored

            try:
                state = video.state((id(self), id(compressor), frames[0], prompt.before_question), "select", run)
            except QuestionNeeded:
                state = None
            chunk = Chunk(frames, groups, tokens, state, texts)
            for query, total in zip(queries, totals):
                with video.ledger.charge(query.work):
                    scores, macs = self._clip_scores(decoder, chunk, query.prompt, layers)
                    query.work.macs += macs
                    total.add(frames, scores[list(layers)], self.config.clip_frames)
        video.release_states()
        return [total.frame_scores() for total in totals]

    @torch.no_grad()
    def score_frames(
        self, backbone, pixels, prefix_ids, question_ids, header_ids, compressor=None, *, question=None,
        frame_texts: Sequence[FrameText] | None = None,
    ) -> Tensor:  # fmt: skip
        """Scores (T,) of frames (T, 3, h, w) for one question; the clips of an alignment are encoded once.

        ``frame_texts`` is the text beside each frame (or group of them), as in the prompt for all candidates.
        """
        prompt, layers = Prompt(prefix_ids, question_ids, header_ids), self.layers(backbone.num_layers)
        decoder = self._decoder(backbone, compressor, layers)
        encoded: dict[int, Tensor] = {}
        clip, merged = backbone.clip_frames, backbone.merged_frames

        def tokens_of(places: list[int], count: int) -> Tensor:
            alignment = places[0] % clip
            if alignment not in encoded:
                encoded.clear()
                encoded[alignment] = backbone.encode(pixels.roll(-alignment, 0))
            groups = (torch.tensor(places[::merged]) - alignment) % len(pixels) // merged
            return encoded[alignment][groups][:count]

        total = FrameTotals(len(layers), len(pixels))
        for frames, groups, tokens in self._chunks(backbone, len(pixels), tokens_of):
            chunk = Chunk(frames, groups, tokens, None, texts_of(frame_texts, frames, merged))
            scores, _ = self._clip_scores(decoder, chunk, prompt, layers)
            total.add(frames, scores[list(layers)], self.config.clip_frames)
        return total.frame_scores()

    @torch.no_grad()
    def clip_scores(
        self, backbone, tokens, prefix_ids, question_ids, header_ids, compressor=None, *, layers: range | None = None,
        frame_texts: Sequence[FrameText] | None = None,
    ) -> Tensor:  # fmt: skip
        """Scores (L, clips) of one chunk of visual tokens (T, N, D), a clip being ``clip_frames`` frames.

        Where the backbone merges frames, T counts groups of them. ``frame_texts`` is the text beside each of the T.

        NaN marks what has no score: clips that too few windows cover, and layers outside ``layers`` (default: all).
        """
        layers = range(backbone.num_layers) if layers is None else layers
        decoder = self._decoder(backbone, compressor, layers)
        prompt = Prompt(*map(torch.as_tensor, (prefix_ids, question_ids, header_ids)))
        return self._clip_scores(decoder, Chunk([], len(tokens), tokens, None, frame_texts), prompt, layers)[0]

    def _decoder(self, backbone: Backbone, compressor: Compressor | None, layers: range) -> Decoder:
        return Decoder(backbone, compressor, stop_layer=layers[-1] + 1)

    def _chunks(
        self, backbone: Backbone, num_frames: int, tokens_of: Callable[[list[int], int], Tensor | VisualTokens]
    ) -> Iterator[tuple[list[int], int, Tensor | VisualTokens]]:
        """Of each chunk the places of its frames among the candidates, how many groups they are, and their tokens.

        ``tokens_of`` is given whole clips, and how many groups of them count.
        """
        length, starts = chunk_starts(num_frames, self.config)
        whole = math.ceil(length / backbone.clip_frames) * backbone.clip_frames
        for start in starts:
            frames = [(start + i) % num_frames for i in range(whole)]
            groups = math.ceil(length / backbone.merged_frames)
            yield frames[:length], groups, tokens_of(frames, groups)

    def _clip_scores(self, decoder: Decoder, chunk: Chunk, prompt: Prompt, layers: range) -> tuple[Tensor, int]:
        """As ``clip_scores``, and the MACs of the question's part (of the chunk too, where it was not run before)."""
        backbone = decoder.backbone
        skipped = self._skipped(backbone, prompt)
        clip_groups = self._clip_groups(backbone)
        num_clips = math.ceil(chunk.groups / clip_groups)
        scores = torch.full((backbone.num_layers, num_clips), math.nan, dtype=torch.float32)
        spans = Spans(len(prompt.prefix_ids), 0, len(prompt.question_ids), len(prompt.header_ids), skipped)
        clip_of, macs = torch.empty(0), 0

        def observe(seen: Observation) -> None:
            nonlocal clip_of, macs
            here = replace(spans, video=seen.layout.width - spans.prefix - spans.question - spans.header)
            frame = seen.layout.owner[0, spans.prefix : spans.prefix + here.video]
            if seen.layer == 0:  # frames as the language model has them: merging in time makes them fewer
                shown = int(frame.max()) + 1
                clip_of = torch.arange(shown) * chunk.groups // shown // clip_groups
            if seen.layer in layers:
                # The first position of each clip: that of the text before it, or of its first token.
                edges = torch.searchsorted(clip_of[frame], torch.arange(num_clips + 1))
                scores[seen.layer] = self._layer_scores(backbone, seen, here, edges)
                macs += self._scoring_macs(backbone, spans, edges.tolist())

        observed = decoder.observed_by(observe)
        state, suffix_ids = chunk.state, prompt.suffix_ids
        try:
            if state is None:
                state = observed.prefill_video(chunk.tokens, prompt.prefix_ids, chunk.texts)
                macs += observed.prefill_macs(state, spans.prefix)
        except QuestionNeeded:  # the compressor looks at the question
            state = observed.prefill(chunk.tokens, prompt.prefix_ids, suffix_ids, chunk.texts)
            macs += observed.prefill_macs(state, spans.prefix, len(suffix_ids))
        else:
            macs += observed.append_macs(state, len(suffix_ids))
            observed.extend(state.fork(), suffix_ids)
        return scores, macs

    def _skipped(self, backbone: Backbone, prompt: Prompt) -> int:
        """Tokens behind the video that are not counted as question."""
        skipped = backbone.message_tokens if self.config.query_bias is None else self.config.query_bias
        if skipped >= len(prompt.question_ids):
            raise QuestionError(
                f"query_bias {skipped} leaves no token of a question of {len(prompt.question_ids)}; lower query_bias"
            )
        return skipped

    def _clip_groups(self, backbone: Backbone) -> int:
        """Groups of frames (as the language model counts them) in a clip that is scored."""
        groups = self.config.clip_frames // backbone.merged_frames
        if groups * backbone.merged_frames != self.config.clip_frames:
            raise ValueError(
                f"clip_frames {self.config.clip_frames} is no multiple of the {backbone.merged_frames} frames that the "
                "backbone merges"
            )
        return groups

    def _layer_scores(self, backbone: Backbone, seen: Observation, spans: Spans, edges: Tensor) -> Tensor:
        """Scores (clips,) at one layer; ``edges`` (clips + 1,) are the clips' first positions in the video."""
        num_clips = len(edges) - 1
        visual = seen.layout.visual[0, spans.prefix : spans.prefix + spans.video]
        if self.config.variant == "global":
            attention = global_attention(backbone, seen, spans, causal=self.config.causal)
            return clip_means(attention, visual, edges)
        total, covered = torch.zeros(2, num_clips, dtype=torch.float32)
        for first, last in window_clips(num_clips, self.config.window_clips, self.config.window_stride):
            start, stop = int(edges[first]), int(edges[last])
            attention = window_attention(backbone, seen, spans, start, stop, causal=self.config.causal)
            total[first:last] += clip_means(attention, visual[start:stop], edges[first : last + 1] - start)
            covered[first:last] += 1
        needed = min(self.config.window_clips // self.config.window_stride, int(covered.max()))
        return (total / covered).masked_fill(covered < needed, math.nan)

    # --- cost -------------------------------------------------------------------------------------------------------

    def _scoring_macs(self, backbone: Backbone, spans: Spans, edges: Sequence[int]) -> int:
        """MACs of one layer's scores: the question's rows with the keys of every window."""
        windows = window_clips(len(edges) - 1, self.config.window_clips, self.config.window_stride)
        if self.config.variant == "global":
            keys = spans.prefix + edges[-1] + spans.question + spans.header
        else:
            keys = sum(spans.prefix + edges[last] - edges[first] + spans.question for first, last in windows)
        return spans.rows * keys * LLMShape.from_config(backbone.text_config).query_width

    def cost(
        self, backbone: Backbone, num_frames: int, query: FrameQuery, compressor: Compressor
    ) -> SelectionCost | None:
        """Of the chunks' passes, and of one question over them; None for a compressor that decides from the data."""
        layers, clip_groups = self.layers(backbone.num_layers), self._clip_groups(backbone)
        length, starts = chunk_starts(num_frames, self.config)
        prompt, groups = query.prompt, math.ceil(length / backbone.merged_frames)
        width = backbone.text_config.hidden_size
        whole = torch.empty(groups, backbone.tokens_per_frame, width, device="meta")
        try:
            visual = Decoder(backbone, compressor).compress(whole, prompt.suffix_ids)
        except (RuntimeError, NotImplementedError):  # it looks at the numbers
            return None
        plan, frames = compressor.plan(backbone.num_layers, visual.frame_tokens), visual.num_frames
        if plan is None or not visual.is_whole:
            return None
        plan, shape = plan[: layers[-1] + 1], LLMShape.from_config(backbone.text_config)
        spans = Spans(len(prompt.prefix_ids), 0, len(prompt.question_ids), len(prompt.header_ids), 0)
        spans = replace(spans, skipped=self._skipped(backbone, prompt))
        num_clips = math.ceil(groups / clip_groups)
        frame_clip = torch.arange(frames) * groups // frames // clip_groups
        firsts = torch.searchsorted(frame_clip, torch.arange(num_clips + 1)).tolist()

        def of_chunk(texts: TextLengths) -> tuple[int, int]:
            """MACs of a chunk's pass, and of a question over it."""
            text = [0, *accumulate(map(sum, texts or [(0, 0)] * frames))]  # before each frame
            chunk = pass_cost(shape, planned_layers(plan, frames, spans.prefix, texts=texts)).macs
            sizes = [spans.prefix + frames * len(slots) + text[-1] for slots in plan]
            question = pass_cost(shape, appended_layers(sizes, len(prompt.suffix_ids), whole=True)).macs
            for layer in layers:
                edges = [first * len(plan[layer]) + text[first] for first in firsts]
                question += self._scoring_macs(backbone, spans, edges)
            return chunk, question

        found: dict[tuple, tuple[int, int]] = {}  # chunks differ in their text alone
        video_macs = question_macs = 0
        for start in starts:
            places = [(start + i) % num_frames for i in range(length)]
            of_groups = texts_of(prompt.text_lengths, places, backbone.merged_frames)
            texts = tuple(merged_lengths(of_groups or (), frames))
            if texts not in found:
                found[texts] = of_chunk(texts)
            video_macs, question_macs = video_macs + found[texts][0], question_macs + found[texts][1]
        alignments = len({start % backbone.clip_frames for start in starts})
        return SelectionCost(alignments * num_frames, video_macs, question_macs)


def chunk_starts(num_frames: int, config: QCComp.Config) -> tuple[int, list[int]]:
    """Frames a chunk (margins included) and the first frame of each, all taken modulo the video's length.

    Round r shifts by r·(clip / n_repeat), which moves the clips' bounds, and r·(chunk / n_repeat).
    """
    stride = min(config.chunk_frames, math.ceil(num_frames / config.clip_frames) * config.clip_frames)
    discarded = config.window_clips - config.window_stride  # clips at either end of a chunk
    margin = 2 * discarded * config.clip_frames if config.variant == "segmented" else 0
    starts = []
    for round_number in range(config.n_repeat):
        shift = round_number * (config.clip_frames // config.n_repeat + stride // config.n_repeat)
        starts += [(shift + i * stride) % num_frames for i in range(math.ceil(num_frames / stride))]
    return stride + margin, starts


def texts_of(texts: Sequence[Any] | None, frames: Sequence[int], merged: int) -> list[Any] | None:
    """Of the text beside all candidates' groups of ``merged`` frames, that of a chunk's; ``frames`` are its places."""
    return [texts[place // merged] for place in frames[::merged]] if texts else None


def window_clips(num_clips: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Windows of ``size`` clips as (first, past the last), the last one ending at the end."""
    if num_clips <= size:
        return [(0, num_clips)]
    starts = list(range(0, num_clips - size + 1, stride))
    if starts[-1] + size < num_clips:
        starts.append(num_clips - size)
    return [(s, s + size) for s in starts]


def window_attention(
    backbone, seen: Observation, spans: Spans, start: int, stop: int, *, causal: bool = False
) -> Tensor:
    """Attention of the question's rows to the video's positions ``start:stop``, a window: (stop − start,).

    Softmax over ``[prefix | window | question]`` with positions of its own; mean over heads and rows. The cached keys
    carry the positions of the whole pass, so the queries are rotated by what differs for prefix, window and question.
    """
    keys, width = seen.keys, stop - start
    queries = seen.queries[:, :, spans.skipped : spans.question]
    first = spans.prefix + spans.video  # the question's first key
    pieces = (0, spans.prefix), (spans.prefix + start, spans.prefix + stop), (first, first + spans.question)
    whole = backbone.positions(seen.layout)
    own = backbone.positions(seen.layout.window(pieces))
    rows = own[..., spans.prefix + width + spans.skipped : spans.prefix + width + spans.question]

    def logits(begin: int, end: int, place: int) -> Tensor:
        """To the keys from ``begin``, the first of which stands at ``place`` in the window."""
        shifts = whole[..., begin:end] - own[..., place : place + end - begin]
        found = queries.new_empty(*queries.shape[:3], end - begin, dtype=torch.float32)
        # One shift for all, but where times are rounded: there it may differ by one from frame to frame.
        for shift, same in equal_columns(shifts):
            cos, sin = backbone.rotary((rows + shift).to(keys.device))
            found[..., same] = attention_scores(apply_rope(queries, cos, sin), keys[:, :, begin:end][:, :, same])
        return found

    places = (0, spans.prefix, spans.prefix + width)
    prefix, window, question = (logits(*span, place) for span, place in zip(pieces, places))
    if causal:
        later = torch.arange(spans.question) > torch.arange(spans.skipped, spans.question).unsqueeze(1)
        question = question.masked_fill(later.to(question.device), -math.inf)
    every = torch.cat([prefix, window, question], -1)
    return _mean_probability(every, queries.shape[-1], slice(spans.prefix, spans.prefix + width))


def equal_columns(x: Tensor) -> list[tuple[Tensor, slice | Tensor]]:
    """The distinct columns of ``x`` (…, S) as (…, 1), each with where it stands."""
    if bool((x == x[..., :1]).all()):
        return [(x[..., :1], slice(None))] if x.shape[-1] else []
    values, which = x.unique(dim=-1, return_inverse=True)
    return [(values[..., i : i + 1], (which == i).nonzero()[:, 0]) for i in range(values.shape[-1])]


def global_attention(backbone, seen: Observation, spans: Spans, *, causal: bool = False) -> Tensor:
    """Attention of the question's rows to the whole video, softmax over the whole sequence, header included."""
    rows = torch.arange(spans.skipped, spans.question)
    first = spans.prefix + spans.video
    own = backbone.positions(seen.layout)[..., first + spans.skipped : first + spans.question]
    cos, sin = backbone.rotary(own.to(seen.keys.device))
    queries = apply_rope(seen.queries[:, :, spans.skipped : spans.question], cos, sin)
    every = attention_scores(queries, seen.keys)
    if causal:
        later = torch.arange(every.shape[-1]) > (first + rows).unsqueeze(1)
        every = every.masked_fill(later.to(every.device), -math.inf)
    return _mean_probability(every, queries.shape[-1], slice(spans.prefix, first))


def _mean_probability(logits: Tensor, head_size: int, part: slice) -> Tensor:
    """Softmax of (1, H, R, S) logits, its ``part`` of the keys, mean over heads and rows."""
    return (logits * head_size**-0.5).softmax(-1)[0, :, :, part].mean((0, 1)).cpu()


def clip_means(attention: Tensor, visual: Tensor, edges: Tensor) -> Tensor:
    """Mean ``attention`` (S,) to the ``visual`` positions (S,) of each clip ``edges[i]:edges[i + 1]``; 0 for a clip
    that has no token left."""
    attention = attention.double().masked_fill(~visual, 0.0)
    sums, counts = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (attention, visual.long()))
    return ((sums[edges[1:]] - sums[edges[:-1]]) / (counts[edges[1:]] - counts[edges[:-1]]).clamp(min=1)).float()

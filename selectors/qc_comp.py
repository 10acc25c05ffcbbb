"""QC-Comp: question-conditioned frame selection by the language model's own attention.

Candidate frames go through the language model in overlapping circular chunks, with the question behind them. At the
layers in the middle of the model, the attention that question tokens pay to a clip of frames is the clip's score; a
frame's score is the mean over the clips that cover it, summed over layers.

Source: "One Token per Highly Selective Frame" (arXiv 2604.14149), Section 3.2, with the released code's behaviour as
the default: the scoring attention has no causal mask (``causal: true`` is the paper's reading).

Deviations. Only the rows of attention that are scored are computed, from the keys as the chunk's own pass caches them:
attention depends on differences of positions, so a window's numbering is had by turning the queries. A partial last
window is one more window that ends at the end; videos shorter than a chunk are scored too, as one circular chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xcomp.backbone import attention_scores, rotate
from xcomp.decoder import Decoder, Observation, QuestionNeeded
from xcomp.selector import FrameSelector


@dataclass(frozen=True)
class Parts:
    """Key positions of a layer's cache: ``prefix`` tokens, then ``visual`` ones, then the rest; how many rows ask."""

    prefix: int
    visual: int
    question: int  # keys of the question, the first `skipped` of which are not counted as rows
    header: int
    skipped: int


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

    @torch.no_grad()
    def score_frames(
        self, backbone, pixels, prefix_ids, question_ids, header_ids, compressor=None, *, question=None
    ) -> Tensor:
        num_frames = len(pixels)
        layers, merged = self.layers(backbone.num_layers), backbone.merged_frames
        total = torch.zeros(len(layers), num_frames)
        count = torch.zeros(len(layers), num_frames)
        tokens: dict[int, Tensor] = {}
        length, starts = chunk_starts(num_frames, self.config)
        for start in starts:
            alignment = start % backbone.clip_frames
            if alignment not in tokens:  # clips are encoded once for each way the chunks cut them
                tokens = {alignment: backbone.encode(pixels.roll(-alignment, 0))}
            frames = (start + torch.arange(length)) % num_frames
            groups = (frames[::merged] - alignment) % num_frames // merged
            scores = self.clip_scores(
                backbone, tokens[alignment][groups], prefix_ids, question_ids, header_ids, compressor, layers=layers
            )
            scores = scores[list(layers)].repeat_interleave(self.config.clip_frames, 1)[:, :length]
            kept = ~scores.isnan()
            total.index_add_(1, frames, scores.nan_to_num(0.0))
            count.index_add_(1, frames, kept.float())
        return (total / count).sum(0)

    @torch.no_grad()
    def clip_scores(
        self, backbone, tokens, prefix_ids, question_ids, header_ids, compressor=None, *, layers: range | None = None
    ) -> Tensor:
        """Scores (L, clips) of one chunk of visual tokens (T, N, D), a clip being ``clip_frames`` frames.

        Where the backbone merges frames, T counts groups of them.

        NaN marks what has no score: clips that too few windows cover, and layers outside ``layers`` (default: all).
        """
        layers = range(backbone.num_layers) if layers is None else layers
        skipped = backbone.message_tokens if self.config.query_bias is None else self.config.query_bias
        if skipped >= len(question_ids):
            raise ValueError(
                f"query_bias {skipped} leaves no token of a question of {len(question_ids)}; lower query_bias"
            )
        clip_groups = self.config.clip_frames // backbone.merged_frames
        if clip_groups * backbone.merged_frames != self.config.clip_frames:
            raise ValueError(
                f"clip_frames {self.config.clip_frames} is no multiple of the {backbone.merged_frames} frames that the "
                "backbone merges"
            )
        num_clips = math.ceil(len(tokens) / clip_groups)
        scores = torch.full((backbone.num_layers, num_clips), math.nan)
        clip_of = torch.empty(0)

        def observe(seen: Observation) -> None:
            nonlocal clip_of
            frame = seen.layout.frame[0, seen.layout.visual[0]]
            if seen.layer == 0:  # frames as the language model has them: merging in time makes them fewer
                shown = int(frame.max()) + 1
                clip_of = torch.arange(shown) * len(tokens) // shown // clip_groups
            if seen.layer in layers:
                scores[seen.layer] = self._layer_scores(backbone, seen, parts, clip_of[frame], num_clips)

        decoder = Decoder(backbone, compressor, observer=observe, stop_layer=layers[-1] + 1)
        parts = Parts(len(prefix_ids), 0, len(question_ids), len(header_ids), skipped)
        suffix_ids = torch.cat([torch.as_tensor(question_ids), torch.as_tensor(header_ids)])
        try:
            video = decoder.prefill_video(tokens, prefix_ids)
        except QuestionNeeded:  # the compressor looks at the question
            decoder.prefill(tokens, prefix_ids, suffix_ids)
        else:
            decoder.extend(video, suffix_ids)
        return scores

    def _layer_scores(self, backbone, seen: Observation, parts: Parts, clip: Tensor, num_clips: int) -> Tensor:
        """Scores (clips,) at one layer; ``clip`` says of each visual token in which clip it is."""
        edges = torch.searchsorted(clip, torch.arange(num_clips + 1))  # first token of each clip
        parts = Parts(parts.prefix, len(clip), parts.question, parts.header, parts.skipped)
        if self.config.variant == "global":
            attention = global_attention(backbone, seen, parts, causal=self.config.causal)
            return clip_means(attention, edges)
        windows = window_clips(num_clips, self.config.window_clips, self.config.window_stride)
        total, covered = torch.zeros(num_clips), torch.zeros(num_clips)
        for first, last in windows:
            start, stop = int(edges[first]), int(edges[last])
            attention = window_attention(backbone, seen, parts, start, stop, causal=self.config.causal)
            total[first:last] += clip_means(attention, edges[first : last + 1] - start)
            covered[first:last] += 1
        needed = min(self.config.window_clips // self.config.window_stride, int(covered.max()))
        return (total / covered).masked_fill(covered < needed, math.nan)


def chunk_starts(num_frames: int, config: QCComp.Config) -> tuple[int, list[int]]:
    """Frames a chunk (margins included) and the first frame of each, all taken modulo the video's length.

    Round r shifts by r·(clip / n_repeat), which moves the clips' bounds, and r·(chunk / n_repeat).
    """
    stride = min(config.chunk_frames, math.ceil(num_frames / config.clip_frames) * config.clip_frames)
    discarded = config.window_clips - config.window_stride  # clips at either end of a chunk
    margin = 2 * discarded * config.clip_frames if config.variant == "segmented" else 0
    starts = []
    for turn in range(config.n_repeat):
        shift = turn * (config.clip_frames // config.n_repeat) + turn * (stride // config.n_repeat)
        starts += [(shift + i * stride) % num_frames for i in range(math.ceil(num_frames / stride))]
    return stride + margin, starts


def window_clips(num_clips: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Windows of ``size`` clips as (first, past the last), the last one ending at the end."""
    if num_clips <= size:
        return [(0, num_clips)]
    starts = list(range(0, num_clips - size + 1, stride))
    if starts[-1] + size < num_clips:
        starts.append(num_clips - size)
    return [(s, s + size) for s in starts]


def window_attention(
    backbone, seen: Observation, parts: Parts, start: int, stop: int, *, causal: bool = False
) -> Tensor:
    """Attention of the question's rows to the visual tokens ``start:stop`` of a window: (stop − start,).

    Softmax over ``[prefix | window | question]`` with positions of its own; mean over heads and rows. The cached keys
    carry the positions of the whole pass, so the queries are turned by what differs for prefix, window and question.
    """
    keys, width = seen.keys, stop - start
    queries = seen.queries[:, :, parts.skipped : parts.question]
    first = parts.prefix + parts.visual  # the question's first key
    spans = (0, parts.prefix), (parts.prefix + start, parts.prefix + stop), (first, first + parts.question)
    whole = backbone.positions(seen.layout)
    own = backbone.positions(seen.layout.window(spans))
    rows = own[..., parts.prefix + width + parts.skipped : parts.prefix + width + parts.question]

    def logits(begin: int, end: int, place: int) -> Tensor:
        """To the keys from ``begin``, the first of which stands at ``place`` in the window."""
        shifts = whole[..., begin:end] - own[..., place : place + end - begin]
        found = queries.new_empty(*queries.shape[:3], end - begin, dtype=torch.float32)
        # One shift for all, but where times are rounded: there it may differ by one from frame to frame.
        for shift, same in equal_columns(shifts):
            cos, sin = backbone.rotary((rows + shift).to(keys.device))
            found[..., same] = attention_scores(rotate(queries, cos, sin), keys[:, :, begin:end][:, :, same])
        return found

    places = (0, parts.prefix, parts.prefix + width)
    prefix, window, question = (logits(*span, place) for span, place in zip(spans, places))
    if causal:
        later = torch.arange(parts.question) > torch.arange(parts.skipped, parts.question).unsqueeze(1)
        question = question.masked_fill(later.to(question.device), -math.inf)
    every = torch.cat([prefix, window, question], -1)
    return _mean_probability(every, queries.shape[-1], slice(parts.prefix, parts.prefix + width))


def equal_columns(x: Tensor) -> list[tuple[Tensor, slice | Tensor]]:
    """The distinct columns of ``x`` (…, S) as (…, 1), each with where it stands."""
    if bool((x == x[..., :1]).all()):
        return [(x[..., :1], slice(None))] if x.shape[-1] else []
    values, which = x.unique(dim=-1, return_inverse=True)
    return [(values[..., i : i + 1], (which == i).nonzero()[:, 0]) for i in range(values.shape[-1])]


def global_attention(backbone, seen: Observation, parts: Parts, *, causal: bool = False) -> Tensor:
    """Attention of the question's rows to all visual tokens, softmax over the whole sequence, header included."""
    rows = torch.arange(parts.skipped, parts.question)
    first = parts.prefix + parts.visual
    own = backbone.positions(seen.layout)[..., first + parts.skipped : first + parts.question]
    cos, sin = backbone.rotary(own.to(seen.keys.device))
    queries = rotate(seen.queries[:, :, parts.skipped : parts.question], cos, sin)
    every = attention_scores(queries, seen.keys)
    if causal:
        later = torch.arange(every.shape[-1]) > (first + rows).unsqueeze(1)
        every = every.masked_fill(later.to(every.device), -math.inf)
    return _mean_probability(every, queries.shape[-1], slice(parts.prefix, first))


def _mean_probability(logits: Tensor, head_size: int, part: slice) -> Tensor:
    """Softmax of (1, H, R, S) logits, its ``part`` of the keys, mean over heads and rows."""
    return (logits * head_size**-0.5).softmax(-1)[0, :, :, part].mean((0, 1)).cpu()


def clip_means(attention: Tensor, edges: Tensor) -> Tensor:
    """Mean of per-token ``attention`` over each clip ``edges[i]:edges[i + 1]``; 0 for a clip that has no token left."""
    sums = torch.cat([attention.new_zeros(1, dtype=torch.float64), attention.double().cumsum(0)])
    return ((sums[edges[1:]] - sums[edges[:-1]]) / (edges[1:] - edges[:-1]).clamp(min=1)).float()

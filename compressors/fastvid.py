"""FastVID: the video is cut where it changes; in each segment salient tokens stay, the rest merges into anchor frames.

Paper: "FastVID: Dynamic Density Pruning for Fast Video Large Language Models" (arXiv 2503.11187). Cuts are the c − 1
lowest cosines of neighbouring frames' global features and all below tau. Of a frame's b = ⌊ratio · N⌋ tokens,
b − ⌊b · d⌋ are salient: those of highest pooling attention. The others' budget goes to anchor frames, every p-th from
a segment's end: there the density peaks (k = 4) of the tokens that are not salient are anchors, and all such tokens of
the segment join, once in each anchor frame, the anchor that they are most like. An anchor becomes w times itself plus
1 − w times its members' mean, w = max(beta, 1 / (members + 1)).

Deviations: a video of fewer than c frames is cut between all of them (the released code fails); a frame keeps one token
at least; where the ratio leaves nothing to merge, all stays as it is. A segment's share is divided among its anchor
frames rounded down, as released. Memory: the density of a frame is N², a segment's cosines come in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xcomp.compressor import About, Budget, Compressor, QuestionTokens
from xcomp.merging import (
    at_places,
    check_share,
    cosine,
    density_peaks,
    exact,
    frame_sizes,
    nearest_by_cosine,
    others,
    places,
    rows,
    top,
    top_ascending,
)
from xcomp.visual import VisualTokens


class FastVID(Compressor):
    """Salient tokens of every frame, and density peaks of anchor frames."""

    about = About(
        "FastVID: Dynamic Density Pruning for Fast Video LLMs (arXiv 2503.11187)",
        "before the language model",
        deviates="also for videos of fewer frames than segments",
        keeps=0.1,
    )
    needs: tuple[str, ...] = ("frame", "pooling_attention")

    @dataclass
    class Config:
        ratio: float = 0.1  # share of each frame's tokens kept
        c: int = 8  # fewest segments
        tau: float = 0.9  # neighbouring frames less alike are cut apart
        d: float = 0.4  # share of the budget for merged tokens
        p: int = 4  # every p-th frame of a segment is an anchor frame
        beta: float = 0.6  # least weight of an anchor's own value

        def __post_init__(self) -> None:
            check_share("ratio", self.ratio)
            for name in ("c", "p"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
            for name in ("d", "beta"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be a share from 0 to 1")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        """Where p-th frames have too few tokens to be the anchors of p frames, a smaller p serves."""
        kept = max(1, round(budget.keep * tokens_per_frame))
        # Half a token more where the share would be rounded down to one less.
        ratio = budget.keep if int(budget.keep * tokens_per_frame) == kept else (kept + 0.5) / tokens_per_frame
        config = replace(config, ratio=min(1.0, ratio))
        salient, context = counts(tokens_per_frame, config.ratio, config.d)
        most = (tokens_per_frame - salient) // context if context else config.p
        return replace(config, p=min(config.p, max(1, most)))

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        c, frames = self.config, visual.frames()
        num_salient, context = counts(frames.shape[1], c.ratio, c.d)
        if num_salient + context >= frames.shape[1]:
            return visual
        attention = visual.tower["pooling_attention"].view(frames.shape[:2])
        salient = top(attention.detach().float(), num_salient)
        lengths = segments(visual.tower["frame"], c.c, c.tau)
        anchors = anchor_counts(lengths, context, c.p)
        if max(anchors) > frames.shape[1] - num_salient:
            raise ValueError(
                f"fastvid asks for {max(anchors)} anchors of frames with {frames.shape[1] - num_salient} tokens left; "
                f"lower p, now {c.p}, or ratio, now {c.ratio:g}"
            )
        merged, index, size = merge_segments(frames, frame_sizes(visual), salient, lengths, anchors, c.p, c.beta)
        stay = places(salient, frames.shape[1])
        tokens = torch.cat([visual.tokens[stay].float(), merged])
        sizes = torch.cat([frame_sizes(visual).flatten()[stay], size])
        return at_places(visual, tokens, torch.cat([stay, index]), sizes)


def counts(tokens_per_frame: int, ratio: float, d: float) -> tuple[int, int]:
    """A frame's salient tokens and its share of merged ones."""
    kept = max(1, int(tokens_per_frame * ratio))
    context = int(kept * d)
    return kept - context, context


@exact
def segments(frame: Tensor, c: int, tau: float) -> list[int]:
    """Global features (T, C) → lengths of the segments."""
    likeness = cosine(frame[1:], frame[:-1])
    cut = likeness < tau
    cut[top(-likeness, c - 1)] = True
    ends = [t + 1 for t in cut.nonzero()[:, 0].tolist()] + [len(frame)]
    return [end - start for start, end in zip([0, *ends], ends)]


def anchor_counts(lengths: list[int], context: int, p: int) -> list[int]:
    """Anchors in each anchor frame of the segments: context · length // number of anchor frames."""
    return [context * length // -(-length // p) for length in lengths]


@exact
def merge_segments(
    frames: Tensor, size: Tensor, salient: Tensor, lengths: list[int], anchors: list[int], p: int, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors of (T, N, D) without the ``salient`` (T, s): merged tokens (M, D) float32, their places, their sizes.

    A token that joins one anchor in each of several anchor frames counts in each for its part.
    """
    slots = others(salient, frames.shape[1])
    rest, rest_size = rows(frames, slots), rows(size, slots)
    peaks = density_peaks(rest, 4)
    out = [(rest.new_zeros(0, rest.shape[2], dtype=torch.float32), slots.new_zeros(0), size.new_zeros(0))]
    end = 0
    for length, count in zip(lengths, anchors):
        start, end = end, end + length
        pool, pool_size = rest[start:end].flatten(0, 1), rest_size[start:end].flatten()
        at = range(end - 1, start - 1, -p) if count else ()
        for frame in at:
            chosen = top_ascending(peaks[frame], count)
            values, sizes = merge_into_anchors(pool, pool_size, rest[frame, chosen], beta)
            out.append((values, frame * frames.shape[1] + slots[frame, chosen], sizes / len(at)))
    values, index, sizes = (torch.cat(parts) for parts in zip(*out))
    return values, index, sizes


@exact
def merge_into_anchors(pool: Tensor, size: Tensor, anchors: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Tokens (n, D) with sizes (n,) join the most alike of anchors (c, D), which are among them: values and sizes."""
    group = nearest_by_cosine(pool[None], anchors[None])
    # A product with zeros and ones, as the same tokens are summed for many anchor frames: no sorted copy of them.
    joins = torch.zeros(len(anchors), len(pool), device=pool.device).scatter_(0, group, 1.0)
    members = joins.sum(1, keepdim=True)
    weight = (1 / (members + 1)).clamp(min=beta)
    values = weight * anchors.float() + (1 - weight) * (joins @ pool.float()) / members.clamp(min=1)
    return values, joins @ size

"""HoliTom: patches that stay the same over a window of frames become one, then both kinds are thinned to the budget.

Paper: "HoliTom: Holistic Token Merging for Fast Video Large Language Models" (arXiv 2505.21334). A patch is static in a
window of frames if all its cosines from frame to frame there are above tau; windows are chosen so that most tokens are
saved, and static patches are averaged over theirs. With R' = ratio · n / (n − saved), cut at 1, a window's static
patches are clustered to c = round(R' · number) density peaks (k = min(7, c)), each becoming beta times itself plus
1 − beta times its members' mean; of each frame's other patches the ⌈R' · number⌉ of most attention stay.

Deviations: tokens come in the order of position, a window's static ones in its first frame (``released_order``: first);
a window's static patches leave one cluster at least. Where merging alone saves more than asked, the released code keeps
fewer than ratio; with ``exact``, which a budget asks for, the least static patches of windows are then not averaged,
and all numbers are rounded to the nearest. Memory: a window's density is N².

The merge inside the language model is part of the published method but off by default, as no video can be stored
without its question then; ``inner_layer: 0.643`` (18 of 28 layers; the authors take 60 of 80 for the 72B model) turns
it on. After that layer the share ``inner_ratio`` of visual tokens that the prompt's end looks at least there, mean over
heads, is averaged half and half into the most similar ones that stay, one after the other. Positions stay. A budget
counts it: the share that enters makes up for it, and only where all enter does less leave inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xcomp.budgets import entering_and_staying
from xcomp.compressor import About, Budget, Compressor, LayerOutput, QuestionTokens, Reduction
from xcomp.merging import (
    at_places,
    check_share,
    cosine,
    dpc_knn,
    exact,
    fitting,
    frame_sizes,
    merge_into,
    nearest_by_cosine,
    top_ascending,
    top_each,
)
from xcomp.schedule import check_stages, stage_layers
from xcomp.visual import VisualTokens


class HoliTom(Compressor):
    """Static patches merge over time, then clusters and attention; as an option, merging inside the language model."""

    about = About(
        "HoliTom: Holistic Token Merging for Fast Video LLMs (arXiv 2505.21334)",
        "before the language model",
        deviates="merging inside the language model is an option, off by default; position order",
        keeps=0.25,
    )
    needs: tuple[str, ...] = ("attention",)

    @dataclass
    class Config:
        ratio: float = 0.25  # share of the tokens kept
        tau: float = 0.8  # a patch is static while its cosine to the frame before is above
        beta: float | None = 0.6  # weight of a cluster's centre against its members; null: plain mean
        k: int = 7  # neighbours that density is measured by, at most as many as clusters
        max_window: int = 1024  # frames
        exact: bool = False  # keep ratio also where merging alone would keep fewer
        released_order: bool = False  # a window's static tokens first, then its frames
        inner_layer: float | None = None  # number (1-based), below 1: depth; null: nothing merges inside
        inner_ratio: float = 0.5  # share of the visual tokens that merges into the others there

        def __post_init__(self) -> None:
            check_share("ratio", self.ratio)
            for name in ("k", "max_window"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
            if self.beta is not None and not 0 <= self.beta <= 1:
                raise ValueError(f"beta is {self.beta}; it must be a share from 0 to 1, or null")
            if self.inner_layer is not None:
                check_stages([self.inner_layer])
            if not 0 <= self.inner_ratio < 1:
                raise ValueError(f"inner_ratio is {self.inner_ratio}; it must be a share of at least 0 and below 1")

    def __init__(self, config: Config):
        super().__init__(config)
        if config.inner_layer is not None:
            self.uses_question = self.keeps_positions = True
            self.plan, self.after_layer = self._by_attention, self._merge_inside

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        if config.inner_layer is None:
            return replace(config, ratio=budget.keep, exact=True)
        (stage,) = stage_layers("holitom", [config.inner_layer], num_layers)
        enters, stays = entering_and_staying(budget, stage, num_layers, 1 - config.inner_ratio)
        return replace(config, ratio=enters, exact=True, inner_ratio=1 - stays)

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        c, frames, size = self.config, visual.frames(), frame_sizes(visual)
        num_frames, width = frames.shape[:2]
        likeness = cosine(frames[1:], frames[:-1])
        windows = static_windows(likeness, c.tau, c.max_window)
        static = static_patches(likeness, windows, c.tau)
        lengths = torch.tensor([end - start for start, end in windows], device=frames.device)
        if c.exact:
            static = least_static_left_out(static, lengths, likeness, windows, limit=len(visual) * (1 - c.ratio))
        saved = int((static.sum(1) * (lengths - 1)).sum())
        share = min(1.0, c.ratio * len(visual) / (len(visual) - saved))

        # Patches that are not static: each frame's own number of most attention.
        dynamic = ~static.repeat_interleave(lengths, dim=0)
        attention = visual.tower["attention"].detach().float().view(num_frames, width)
        numbers = dynamic.sum(1).tolist()
        numbers = [max(min(1, m), round(m * share)) if c.exact else math.ceil(m * share) for m in numbers]
        stay = top_each(attention.masked_fill(~dynamic, -torch.inf), torch.tensor(numbers, device=frames.device))

        parts = []
        for (start, end), patches in zip(windows, static):
            slots = patches.nonzero()[:, 0]
            if len(slots):
                count = max(1, round(len(slots) * share))
                over_time = frames[start:end, slots].float().mean(0)
                values, centres, sizes = merge_clusters(over_time, size[start:end, slots].sum(0), count, c.k, c.beta)
                parts.append((values, start * width + slots[centres], sizes))
            places = start * width + stay[start:end].flatten().nonzero()[:, 0]
            parts.append((visual.tokens[places].float(), places, size.flatten()[places]))
        return at_places(visual, *(torch.cat(part) for part in zip(*parts)), sort=not c.released_order)

    def _by_attention(self, num_layers: int, tokens_per_frame: int) -> None:
        self._stage(num_layers)  # a wrong layer is found before anything runs
        return None

    def _stage(self, num_layers: int) -> int:
        return stage_layers("holitom", [self.config.inner_layer], num_layers)[0]

    def _merge_inside(self, output: LayerOutput) -> Reduction | None:
        if output.layer + 1 != self._stage(output.num_layers) or self.config.inner_ratio == 0:
            return None
        with torch.no_grad():
            scores = output.attention(output.query_index.unsqueeze(1), layer="this")[:, 0]
        order, hidden = [], []
        for row, size in enumerate(output.layout.counts.tolist()):
            visual = output.layout.visual[row, :size].to(output.hidden.device)
            kept, values = inner_merge(output.hidden[row, :size], scores[row, :size], visual, self.config.inner_ratio)
            order.append(kept)
            hidden.append(values)
        return Reduction(order, hidden)


def static_windows(likeness: Tensor, tau: float, max_window: int) -> list[tuple[int, int]]:
    """Cosines from frame to frame (T − 1, N) → windows [start, end) that save most; of equal ones the last is shorter.

    A window saves its static patches times its length less one.
    """
    length, width = likeness.shape[0] + 1, likeness.shape[1]
    run = torch.zeros(width, dtype=torch.long)
    best, begin = [0.0], []
    for end, above in enumerate([torch.zeros(width, dtype=torch.bool), *(likeness > tau).cpu()], start=1):
        run = (run + 1) * above  # how many cosines in a row, up to the last frame of the window, are above
        # number[m]: patches of at least m in a row, that is static in a window of m + 1 frames
        number = torch.bincount(run, minlength=1).flip(0).cumsum(0).flip(0).tolist()
        saved = [best[end - 1]]  # a window of one frame saves nothing, nor does one in which no patch is static
        for m in range(1, min(len(number), max_window)):
            saved.append(best[end - 1 - m] + number[m] * m)
        m = max(range(len(saved)), key=lambda m: (saved[m], -m))
        best.append(saved[m])
        begin.append(end - 1 - m)
    windows, end = [], length
    while end:
        windows.append((begin[end - 1], end))
        end = begin[end - 1]
    return windows[::-1]


def static_patches(likeness: Tensor, windows: list[tuple[int, int]], tau: float) -> Tensor:
    """(W, N) bool: patches whose cosines within the window are all above; none in a window of one frame."""
    above = likeness > tau
    none = torch.zeros(likeness.shape[1], dtype=torch.bool, device=likeness.device)
    return torch.stack([above[start : end - 1].all(0) if end - start > 1 else none for start, end in windows])


def least_static_left_out(
    static: Tensor, lengths: Tensor, likeness: Tensor, windows: list[tuple[int, int]], limit: float
) -> Tensor:
    """``static`` (W, N) without the least alike, so that averaging over time saves at most ``limit`` tokens."""
    where = static.nonzero()
    lowest = torch.stack(
        [likeness[a : b - 1].amin(0) if b - a > 1 else torch.zeros_like(likeness.sum(0)) for a, b in windows]
    )
    fits = fitting((lengths - 1)[where[:, 0]], lowest[static], limit)
    kept = torch.zeros_like(static)
    kept[where[fits, 0], where[fits, 1]] = True
    return kept


@exact
def merge_clusters(
    tokens: Tensor, size: Tensor, count: int, k: int, beta: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, D) → clusters: values (count, D) float32, where their centres stood, ascending, and sizes."""
    centres, label = (found[0] for found in dpc_knn(tokens[None], count, min(k, count)))
    order = centres.argsort()
    centres, label = centres[order], order.argsort()[label]
    ones = torch.ones(1, len(tokens), device=tokens.device)
    mean, sizes = (found[0] for found in merge_into(tokens[None], size[None], label[None], count, ones))
    if beta is not None:
        own = tokens[centres].float()
        members = torch.bincount(label, minlength=count).unsqueeze(1)
        rest = (mean * members - own) / (members - 1).clamp(min=1)
        mean = torch.where(members > 1, beta * own + (1 - beta) * rest, own)
    return mean, centres, sizes


@exact
def inner_merge(hidden: Tensor, scores: Tensor, visual: Tensor, r: float) -> tuple[Tensor, Tensor]:
    """Inside the language model: of (S, D) the share ``r`` of the ``visual`` (S,) of lowest score merges into others.

    Each is averaged half and half into the most similar visual one that stays, in the order of position. Returns the
    places that stay, ascending, and their values float32.
    """
    places = visual.nonzero()[:, 0]
    chosen = places[top_ascending(scores.detach().float()[places], max(1, round(len(places) * (1 - r))))]
    stays = (~visual).scatter(0, chosen, True)
    away = (~stays).nonzero()[:, 0]
    group = nearest_by_cosine(hidden[None, away], hidden[None, chosen])[0]
    # Averaging in turn leaves the last its half, the one before a quarter, and so on; the target has the rest.
    members = torch.bincount(group, minlength=len(chosen))
    order = group.argsort(stable=True)
    after = torch.empty_like(group)  # how many come into the same target after each
    after[order] = (members.cumsum(0)[group[order]] - 1) - torch.arange(len(group), device=group.device)
    weights = torch.cat([0.5 ** members.float(), 0.5 ** (after + 1.0)])
    groups = torch.cat([torch.arange(len(chosen), device=group.device), group])
    tokens = torch.cat([hidden[chosen], hidden[away]])[None]
    merged = merge_into(tokens, torch.ones_like(weights)[None], groups[None], len(chosen), weights[None])[0][0]
    return stays.nonzero()[:, 0], hidden.float().index_copy(0, chosen, merged)[stays]

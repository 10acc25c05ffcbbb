"""PruneVid: patches that stay the same over a scene become one, and both kinds are clustered, frame by frame.

Paper: "PruneVid: Visual Token Pruning for Efficient Video Large Language Models" (arXiv 2412.16117). Frames are
clustered by their means (DPC-KNN, ⌊segments · T⌋ clusters, k = 7) and the clusters made contiguous. In each window a
patch is static if the mean cosine between its frames is above tau; it is averaged over time. The static patches of a
window, and the others of each frame, are clustered to ⌊cluster_ratio · number⌋ means where they are more than 14.

How clusters become contiguous: each keeps its longest runs, none if that is one frame; other frames, from left to
right, go to the longer of the neighbouring runs as they then are, the left one if equal. Deviations: a window of one
frame has no static patches (the released code divides by zero); tokens come in the order of position, a window's static
ones in its first frame (``released_order``: first). How many are left depends on the video; ``keep``, which a budget
sets, clusters every set so far that this share of all tokens is left, and averages fewer patches over time where that
alone would leave too few. Memory: density of a window's patches is N² a frame, of frames T².

After layer ``layer`` (the released code counts its layer 10 of 32 from 0) of every window's static tokens and of every
frame's others ⌊alpha · number⌋ stay: those that some head of some token of the text behind the video looks at most
there. Positions stay. Deviations: at least one token stays, and keys of that layer and those before stay stored, which
the released code drops for decoding. ``layer: null`` leaves this out, and the video can then be stored without a
question. A budget counts it: more tokens enter, and only where all do does a larger share stay inside; with ``keep``
the numbers are rounded so that alpha holds over all sets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xcomp.budgets import entering_and_staying
from xcomp.compressor import About, Budget, Compressor, LayerOutput, QuestionTokens
from xcomp.merging import at_places, check_share, dpc_knn, exact, fitting, frame_sizes, merge_into, top, unit
from xcomp.schedule import check_stages, stage_layers
from xcomp.visual import VisualTokens

SMALL = 14  # sets of so many tokens are not clustered, as released


class PruneVid(Compressor):
    """Scenes, static patches averaged over them, clusters; then what the question looks at."""

    about = About(
        "PruneVid: Visual Token Pruning for Efficient Video LLMs (arXiv 2412.16117)",
        "before the language model and after layer 11 of 32",
        deviates="keys of layers before the choice stay stored; position order",
    )

    @dataclass
    class Config:
        segments: float = 0.25  # clusters of frames, as a share of the frames
        tau: float = 0.8  # a patch is static if the mean cosine between its frames is above
        cluster_ratio: float = 0.5  # clusters, as a share of the tokens of a set
        k: int = 7  # neighbours that density is measured by
        layer: float | None = 11 / 32  # number (1-based), below 1: depth; null: nothing leaves inside
        alpha: float = 0.4  # share of each set that stays after it
        keep: float | None = None  # share of all tokens left, whatever the video; replaces cluster_ratio
        released_order: bool = False  # a window's static clusters first, then its frames

        def __post_init__(self) -> None:
            for name in ("segments", "cluster_ratio", "alpha"):
                check_share(name, getattr(self, name))
            if self.k < 1:
                raise ValueError(f"k is {self.k}; it must be at least 1")
            if self.keep is not None:
                check_share("keep", self.keep)
            if self.layer is not None:
                check_stages([self.layer])

    def __init__(self, config: Config):
        super().__init__(config)
        if config.layer is not None:
            self.uses_question = self.keeps_positions = True
            self.plan, self.after_layer = self._by_attention, self._most_attended

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        if config.layer is None:
            return replace(config, keep=budget.keep)
        (stage,) = stage_layers("prunevid", [config.layer], num_layers)
        enters, stays = entering_and_staying(budget, stage, num_layers, config.alpha)
        return replace(config, keep=enters, alpha=stays)

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        c, frames, size = self.config, visual.frames(), frame_sizes(visual)
        width = frames.shape[1]
        windows = scenes(frames, c.segments, c.k)
        likeness = torch.stack([likeness_over_time(frames[start:end]) for start, end in windows])
        lengths = torch.tensor([end - start for start, end in windows], device=frames.device).unsqueeze(1)
        static, ratio = likeness > c.tau, c.cluster_ratio
        if c.keep is not None:
            savings = (lengths - 1).expand_as(static)[static]
            static[static.clone()] = fitting(savings, likeness[static], len(visual) * (1 - c.keep))
            ratio = c.keep * len(visual) / (len(visual) - int((static * (lengths - 1)).sum()))

        def clusters(tokens: Tensor, sizes: Tensor, slots: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
            """Of sets (B, n, D), one a frame from ``first``: tokens, places and sizes, each flat."""
            number = tokens.shape[1]
            if c.keep is not None:
                count = min(number, max(1, round(number * ratio)))
            else:
                count = number if number <= SMALL else int(number * ratio)
            values, centres, sizes = cluster_means(tokens, sizes, count, c.k)
            frame = torch.arange(first, first + len(tokens), device=slots.device).unsqueeze(1)
            return values.flatten(0, 1), (frame * width + slots[centres]).flatten(), sizes.flatten()

        parts = []
        for number, ((start, end), still) in enumerate(zip(windows, static)):
            same, other = still.nonzero()[:, 0], (~still).nonzero()[:, 0]
            window, window_size = frames[start:end], size[start:end]
            if len(same):
                over_time = window[:, same].float().mean(0, keepdim=True)
                tokens, place, sizes = clusters(over_time, window_size[:, same].sum(0, keepdim=True), same, start)
                parts.append((tokens, place, sizes, torch.full_like(place, start + number)))
            if len(other):
                tokens, place, sizes = clusters(window[:, other], window_size[:, other], other, start)
                parts.append((tokens, place, sizes, place // width + number + 1))  # in the order of ``attended``
        return at_places(visual, *(torch.cat(part) for part in zip(*parts)), sort=not c.released_order)

    def _by_attention(self, num_layers: int, tokens_per_frame: int) -> None:
        self._stage(num_layers)  # a wrong layer is found before anything runs
        return None

    def _stage(self, num_layers: int) -> int:
        return stage_layers("prunevid", [self.config.layer], num_layers)[0]

    @torch.no_grad()
    def _most_attended(self, output: LayerOutput) -> Tensor | None:
        if output.layer + 1 != self._stage(output.num_layers):
            return None
        layout, c = output.layout, self.config
        rows = [output.text_behind(row) for row in range(len(layout.real))]
        rows = [behind if len(behind) else last[None] for behind, last in zip(rows, output.query_index.cpu())]
        widest = max(map(len, rows))  # a sample with less text repeats some of it, which no maximum tells
        asked = torch.stack([torch.cat([behind, behind[:1].expand(widest - len(behind))]) for behind in rows])
        scores = output.attention(asked, layer="this", heads="max").amax(1).cpu()
        keep = torch.zeros_like(layout.visual)
        group = layout.frame if layout.group is None else layout.group  # None: a later compressor made tokens anew
        for row, visual in enumerate(layout.visual):
            places = visual.nonzero()[:, 0]
            chosen = most_of_each(scores[row, places], group[row, places], c.alpha, exact=c.keep is not None)
            keep[row, places[chosen]] = True
        return keep


def scenes(frames: Tensor, segments: float, k: int) -> list[tuple[int, int]]:
    """(T, N, D) → windows [start, end)."""
    means = frames.detach().float().mean(1)
    label = dpc_knn(means[None], max(1, int(len(means) * segments)), k)[1][0].tolist()
    return [(start, start + length) for start, length, _ in runs(contiguous(label))]


def runs(label: list[int]) -> list[tuple[int, int, int]]:
    """(start, length, label) of each run of equal labels."""
    starts = [t for t in range(len(label)) if t == 0 or label[t] != label[t - 1]]
    return [(start, end - start, label[start]) for start, end in zip(starts, [*starts[1:], len(label)])]


def contiguous(label: list[int]) -> list[int]:
    """Clusters of frames with the frames outside of their longest runs given to neighbouring runs."""
    found = runs(label)
    longest = {cluster: max(length for _, length, of in found if of == cluster) for cluster in set(label)}
    out = [-1] * len(label)
    for start, length, cluster in found:
        if length == longest[cluster] > 1:
            out[start : start + length] = [cluster] * length
    for t in [t for t, cluster in enumerate(out) if cluster == -1]:
        before, after = runs(out[:t]), [run for run in runs(out[t:]) if run[2] != -1]
        left = before[-1] if before and before[-1][2] != -1 else (0, 0, -1)
        right = after[0] if after else (0, 0, -1)
        out[t] = left[2] if left[1] >= right[1] else right[2]
    return out


@exact
def likeness_over_time(window: Tensor) -> Tensor:
    """(w, N, D) → (N,) mean cosine between each patch's different frames; below any threshold for one frame."""
    length = len(window)
    if length == 1:
        return torch.full(window.shape[1:2], -2.0, device=window.device)
    # The sum's square is the sum of all cosines, the w of each frame with itself among them.
    return (unit(window).sum(0).square().sum(-1) - length) / (length * (length - 1))


@exact
def cluster_means(tokens: Tensor, size: Tensor, count: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, n, D) → means (B, count, D) float32, where their centres stood (B, count), best score first, and sizes."""
    if count == tokens.shape[1]:
        return tokens.float(), torch.arange(count, device=tokens.device).expand(len(tokens), -1), size
    centres, label = dpc_knn(tokens, count, k)
    means, sizes = merge_into(tokens, size, label, count, torch.ones_like(size))
    return means, centres, sizes


def attended(attention: Tensor, group: Tensor, alpha: float) -> Tensor:
    """Inside the language model: attention of the text behind to visual tokens (H, Q, M) → places kept, ascending.

    A token's score is the most that any head and query pays it. Of each group (M,) ⌊alpha · size⌋ stay: a group is a
    window's static tokens, or a frame's others.
    """
    return most_of_each(attention.detach().float().amax(dim=(0, 1)), group, alpha)


def most_of_each(scores: Tensor, group: Tensor, alpha: float, exact: bool = False) -> Tensor:
    """Of scores (M,) and groups (M,) the places kept, ascending: ⌊alpha · size⌋ of each group, but one of all at least.

    ``exact``: groups' numbers are rounded in turn so that alpha holds over all of them.
    """
    kept, seen, taken = [top(scores, 1)], 0, 0
    for number in group.unique():
        places = (group == number).nonzero()[:, 0]
        seen += len(places)
        count = round(alpha * seen) - taken if exact else int(alpha * len(places))
        taken += count
        kept.append(places[top(scores[places], count)])
    return (torch.cat(kept[1:]) if any(map(len, kept[1:])) else kept[0]).sort().values

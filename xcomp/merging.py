"""What compressors share that prune or merge tokens by their likeness: choices, cosines, sums, density peaks, matching.

Scores are float32 whatever the tokens' type, carry no gradient, and of equal ones the lower position comes first, so a
choice depends neither on autocast nor on the sorting kernel. Merged values are computed in float32, let gradients
through, and sum in the same order every time on a GPU too.

Shape letters: B sets (mostly frames) · T frames · N tokens a frame · D width · n tokens of a set · c centres.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from xcomp.backbone import no_autocast
from xcomp.visual import VisualTokens

# Most elements of a matrix of similarities or distances that is made at once (one row, or one set, at the least).
BLOCK = 2**24

Function = TypeVar("Function", bound=Callable[..., Any])


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """No autocast and no TF32 inside: a rounded score would change which tokens merge."""
    modules = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    with no_autocast(device_type):
        if not all(hasattr(module, "fp32_precision") for module in modules):  # before torch 2.9
            modules, before = [], torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        saved = [module.fp32_precision for module in modules]
        try:
            for module in modules:
                module.fp32_precision = "ieee"
            yield
        finally:
            for module, precision in zip(modules, saved):
                module.fp32_precision = precision
            if not modules:
                torch.set_float32_matmul_precision(before)


def exact(function: Function) -> Function:
    """Decorator: runs under :func:`exact_float32` of its first argument's device."""

    @functools.wraps(function)
    def inside(first: Any, *args: Any, **kwargs: Any) -> Any:
        tensor = first.tokens if isinstance(first, VisualTokens) else first
        with exact_float32(tensor.device.type):
            return function(first, *args, **kwargs)

    return inside  # type: ignore[return-value]


# --- Choosing ---------------------------------------------------------------------------------------------------------


def top(scores: Tensor, count: int) -> Tensor:
    """(…, n) → (…, count) indices of the largest, from the largest; of equal ones the lower position first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]


def top_ascending(scores: Tensor, count: int) -> Tensor:
    """(…, n) → (…, count) indices of the largest, in the order of position."""
    return top(scores, count).sort(dim=-1).values


def top_each(scores: Tensor, counts: Tensor) -> Tensor:
    """(B, n) and (B,) → (B, n) bool: of each row its own number of largest."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < counts.unsqueeze(-1)


def others(index: Tensor, length: int) -> Tensor:
    """(B, c) → (B, length − c) ascending: the positions that ``index`` leaves out."""
    left = torch.ones(len(index), length, dtype=torch.bool, device=index.device).scatter_(1, index, False)
    return left.nonzero()[:, 1].view(len(index), length - index.shape[1])


def rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, n, …) at (B, c) → (B, c, …)."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), index]


# --- Similarity -------------------------------------------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    """Vectors of length one along the last dimension, in float32 and without gradient."""
    return normalize(x.detach().float(), dim=-1)


@exact
def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the vectors at the same places, (…, D) and (…, D) → (…)."""
    return (unit(x) * unit(y)).sum(-1)


@exact
def nearest_by_cosine(x: Tensor, targets: Tensor) -> Tensor:
    """(B, n, D) and (B, c, D) → (B, n): the target most like each; at most BLOCK values or similarities at once."""
    targets = unit(targets).transpose(1, 2)
    step = max(1, BLOCK // max(len(x) * max(targets.shape[1:]), 1))
    return torch.cat([(unit(part) @ targets).argmax(-1) for part in x.split(step, dim=1)], dim=1)


# --- Merging ----------------------------------------------------------------------------------------------------------


def group_sums(values: Tensor, group: Tensor, count: int) -> Tensor:
    """(n, D) and (n,) group of each → (count, D) float32 sums; a group without members is zero."""
    order = group.argsort(stable=True)
    lengths = torch.bincount(group, minlength=count)
    return torch.segment_reduce(values.float()[order], "sum", lengths=lengths, initial=0.0, unsafe=True)


def merge_into(
    values: Tensor, size: Tensor, group: Tensor, count: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted means of groups of a set: (B, n, D), (B, n), (B, n) → (B, count, D) float32, sizes (B, count).

    ``weights`` (B, n), default the sizes. A group without members is zero, of size 0.
    """
    weights = (size if weights is None else weights).float().unsqueeze(-1)
    flat = (group + count * torch.arange(len(group), device=group.device).unsqueeze(1)).flatten()
    columns = torch.cat([values.float() * weights, weights, size.float().unsqueeze(-1)], dim=-1)
    sums = group_sums(columns.flatten(0, 1), flat, len(group) * count).unflatten(0, (len(group), count))
    return sums[..., :-2] / sums[..., -2:-1].clamp(min=torch.finfo(torch.float32).tiny), sums[..., -1]


def frame_sizes(visual: VisualTokens) -> Tensor:
    """(T, N) float32: how many original tokens each stands for; every frame must be whole."""
    size = visual.tokens.new_ones(len(visual)) if visual.size is None else visual.size
    return size.float().view(visual.num_frames, visual.frame_tokens)


def places(slots: Tensor, tokens_per_frame: int) -> Tensor:
    """Slots of each frame (T, c) → (T · c,) places among all tokens."""
    first = tokens_per_frame * torch.arange(len(slots), device=slots.device)
    return (slots + first.unsqueeze(1)).flatten()


def at_places(
    visual: VisualTokens,
    tokens: Tensor,
    index: Tensor,
    size: Tensor,
    group: Tensor | None = None,
    *,
    sort: bool = True,
) -> VisualTokens:
    """``visual`` with other tokens (M, D) at the places ``index`` (M,) of all that left the vision path.

    They come in the order of their places unless ``sort`` is False; the tokens' type stays that of ``visual``.
    """
    order = index.argsort(stable=True) if sort else torch.arange(len(index), device=index.device)
    index = index[order]
    return replace(
        visual,
        tokens=tokens.to(visual.tokens.dtype)[order],
        frame=index // visual.frame_tokens,
        slot=index % visual.frame_tokens,
        size=size.float()[order],
        group=None if group is None else group[order],
    )


# --- Density peaks (DPC-KNN) ------------------------------------------------------------------------------------------


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # By differences, not by products: a token's distance to its equal is then 0, and sums do not depend on the batch.
    d = torch.cdist(x.detach().float(), y.detach().float(), compute_mode="donot_use_mm_for_euclid_dist")
    return d / x.shape[-1] ** 0.5


@exact
def density_peaks(x: Tensor, k: int) -> Tensor:
    """(B, n, D) → (B, n) score of each token as a cluster centre: its density times its distance to a denser one.

    Density is exp(−mean of the k smallest squared distances / D, its own included); the densest token's distance is
    the largest of its set. At most BLOCK distances at once, or those of one set (n²).
    """
    sets = max(1, BLOCK // max(x.shape[1] ** 2, 1))
    return torch.cat([_peaks(_distances(part, part), min(k, x.shape[1])) for part in x.split(sets)])


def _peaks(distance: Tensor, k: int) -> Tensor:
    density = (-distance.topk(k, dim=-1, largest=False).values.square().mean(-1)).exp()
    denser = density.unsqueeze(1) > density.unsqueeze(2)
    to_denser = distance.masked_fill(~denser, torch.inf).amin(-1)
    largest = distance.amax(dim=(1, 2)).unsqueeze(1)
    return torch.where(to_denser.isinf(), largest, to_denser) * density


@exact
def dpc_knn(x: Tensor, count: int, k: int) -> tuple[Tensor, Tensor]:
    """Clusters of (B, n, D): centres (B, count), from the best score down, and each token's centre (B, n) of those."""
    centres = top(density_peaks(x, k), count)
    label = _distances(x, rows(x, centres)).argmin(-1)
    own = torch.arange(centres.shape[1], device=x.device).expand_as(centres)
    return centres, label.scatter(1, centres, own)


# --- Budgets ----------------------------------------------------------------------------------------------------------


def check_share(name: str, value: float) -> None:
    """ValueError unless an option is a share above 0 and at most 1."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}; it must be a share above 0 and at most 1")


def fitting(savings: Tensor, scores: Tensor, limit: float) -> Tensor:
    """(n,) bool: those that may be merged away, from the best score down while the savings' sum stays within limit."""
    order = scores.argsort(descending=True, stable=True)
    fits = savings[order].double().cumsum(0) <= limit + 1e-6
    return torch.zeros_like(fits).scatter_(0, order, fits)

"""ToMe: in rounds, the most alike pairs of a frame's tokens merge until the wanted number is left.

Paper: "Token Merging: Your ViT But Faster" (arXiv 2210.09461). A round splits a frame's tokens into even and odd ones;
each even token finds the odd one of highest cosine, and the r most alike pairs merge into means weighted by size.

Deviations: the authors merge between a vision transformer's attention and MLP, by the attention's keys, and add log
sizes to its attention; here finished visual tokens merge by their own likeness, in as many rounds as the share needs.
Tokens come back in the order of position after each round. The released code lists the unmerged even ones by falling
likeness, then the odd ones; ``released_order: true`` does so too, which also decides who is even in the next round.
:func:`layer_schedule` and :func:`merge_every_kth` are the released schedule in a tower, and the variant that merges all
but every k-th token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xcomp.compressor import About, Budget, Compressor, QuestionTokens
from xcomp.merging import at_places, check_share, exact, frame_sizes, merge_into, places, unit
from xcomp.visual import VisualTokens


class ToMe(Compressor):
    """Merges each frame to round(ratio · N) tokens."""

    about = About(
        "Token Merging: Your ViT But Faster (arXiv 2210.09461)",
        "before the language model",
        deviates="merges finished visual tokens instead of a tower's; position order",
        keeps=0.5,
    )

    @dataclass
    class Config:
        ratio: float = 0.5  # share of each frame's tokens left; one round removes half at most
        released_order: bool = False  # the released code's order of tokens after each round

        def __post_init__(self) -> None:
            check_share("ratio", self.ratio)

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        return replace(config, ratio=budget.keep)

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        frames, size = visual.frames(), frame_sizes(visual)
        target = max(1, round(frames.shape[1] * self.config.ratio))
        if target == frames.shape[1]:
            return visual
        merged, size, slot = merge_rounds(frames, size, target, released_order=self.config.released_order)
        index = places(slot, visual.frame_tokens)
        return at_places(visual, merged.flatten(0, 1), index, size.flatten(), sort=not self.config.released_order)


@exact
def merge_rounds(
    x: Tensor, size: Tensor, target: int, *, released_order: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds over (B, n, D) with sizes (B, n), each halving at most, until ``target`` are left.

    Returns float32 tokens (B, target, D), their sizes and the positions (B, target) that they stand at.
    """
    place = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    x = x.float()
    while x.shape[1] > target:
        pairs = match(x, x.shape[1] - target, released_order=released_order)
        x, size, index = merge_pairs(x, size, *pairs, restore=not released_order)
        place = place.gather(1, index)
    return x, size, place


@exact
def match(
    metric: Tensor, r: int, *, class_token: bool = False, released_order: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Who merges with whom: (B, n, D) → even tokens that stay, even tokens that merge (B, r) and their odd partners.

    All three are numbers within the even or odd tokens. ``r`` is cut to half of the tokens; a class token (position 0)
    never merges away. Those that stay are in the order of position, or (``released_order``) by falling likeness.
    """
    metric = unit(metric)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if class_token:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    r = min(r, (metric.shape[1] - class_token) // 2)
    merging, staying = order[:, :r], order[:, r:]
    if class_token or not released_order:
        staying = staying.sort(-1).values
    return staying, merging, partner.gather(1, merging)


def merge_pairs(
    x: Tensor, size: Tensor, staying: Tensor, merging: Tensor, partner: Tensor, *, restore: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One round over (B, n, D): means weighted by size, sizes, and the old position of each of the tokens left.

    The order is that of position if ``restore``, else even tokens that stay, then odd ones.
    """
    batch, num_odd = len(x), x.shape[1] // 2
    odd = torch.arange(num_odd, device=x.device).expand(batch, -1)
    left = torch.cat([2 * staying, 2 * odd + 1], dim=1)
    order = left.argsort(-1) if restore else torch.arange(left.shape[1], device=x.device).expand(batch, -1)
    rank = order.argsort(-1)  # where each of ``left`` comes to stand
    group = torch.empty(x.shape[:2], dtype=torch.long, device=x.device).scatter_(1, left, rank)
    group = group.scatter(1, 2 * merging, rank.gather(1, staying.shape[1] + partner))
    merged, size = merge_into(x, size, group, left.shape[1])
    return merged, size, left.gather(1, order)


@exact
def merge_every_kth(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """All but every k-th token (positions k − 1, 2k − 1, …) of (B, n, D) merge into the most alike of those.

    Tokens after the last whole k leave. Returns tokens (B, n // k, D), sizes, and the partner of each of the others.
    """
    groups = x[:, : x.shape[1] // k * k].float().unflatten(1, (-1, k))
    away, stays = groups[:, :, :-1].flatten(1, 2), groups[:, :, -1]
    partner = (unit(away) @ unit(stays).transpose(1, 2)).argmax(-1)
    own = torch.arange(stays.shape[1], device=x.device).expand(len(x), -1)
    tokens, group = torch.cat([stays, away], dim=1), torch.cat([own, partner], dim=1)
    merged, size = merge_into(tokens, tokens.new_ones(group.shape), group, stays.shape[1])
    return merged, size, partner


def layer_schedule(num_layers: int, r: int, inflection: float = 0.0) -> list[int]:
    """Tokens that merge in each layer of a tower: from ⌊r(1 − inflection)⌋ on a line to 2r minus that."""
    low = int(r * (1.0 - inflection))
    step = (2 * r - 2 * low) / max(num_layers - 1, 1)
    return [int(low + step * layer) for layer in range(num_layers)]

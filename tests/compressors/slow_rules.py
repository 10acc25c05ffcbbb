"""A pass through a language model written out: one sample, attention as a matrix, a rule between layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xcomp.backbone import Backbone, Rotary
from xcomp.visual import VisualTokens

# What a rule changes after a layer: (layer, 1-based; hidden (S, D); what each position is, (S,); attention (H, S, S))
# → places that stay, and the values of all.
Change = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def slow_pass(
    backbone: Backbone,
    visual: VisualTokens,
    prefix: Tensor,
    suffix: Tensor,
    change: Change | None = None,
    *,
    renumber: bool = False,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Logits (V,), and of each layer keys, values (1, H_kv, S, K) and what each position is: −1 text, else which token.

    Positions stay what they were before anything left, or (``renumber``) are counted anew.
    """
    hidden = torch.cat([backbone.embed(prefix), visual.tokens, backbone.embed(suffix)])
    token = torch.full((len(hidden),), -1)
    token[len(prefix) : len(prefix) + len(visual)] = torch.arange(len(visual))
    positions, stored = torch.arange(len(hidden)), []
    for layer in range(backbone.num_layers):
        out, keys, values, attention = slow_layer(backbone, layer, hidden, positions, [])
        stored.append((keys, values, token))
        if change is not None and layer + 1 < backbone.num_layers:
            stay, out = change(layer + 1, out, token, attention)
            out, positions, token = out[stay], positions[stay], token[stay]
            positions = torch.arange(len(stay)) if renumber else positions
        hidden = out
    return backbone.head(hidden[-1:])[0], stored


def slow_layer(
    backbone: Backbone, layer: int, hidden: Tensor, positions: Tensor, before: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New positions (R, D) behind the keys and values ``before``: output, all keys and values, attention (H, R, S)."""
    rotary = Rotary(*backbone.rotary(positions.unsqueeze(0)))
    normed = backbone.input_norm(layer, hidden[None])
    keys, values = backbone.project_keys_values(layer, normed)
    keys = torch.cat([*(k for k, _ in before), rotary.apply(keys)], 2)
    values = torch.cat([*(v for _, v in before), values], 2)
    queries = rotary.apply(backbone.project_queries(layer, normed))
    repeat = queries.shape[1] // keys.shape[1]
    scores = queries @ keys.repeat_interleave(repeat, 1).transpose(2, 3) / queries.shape[-1] ** 0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    attention = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    attended = (attention @ values.repeat_interleave(repeat, 1)).transpose(1, 2).flatten(2)
    out = backbone.add_mlp(layer, backbone.add_attention(layer, hidden[None], attended))
    return out[0], keys, values, attention[0]

"""What the rules of a compressor that looks at the data make of a pass between its layers: who is asked, what stays.

A rule answers with a mask of positions to keep or with a :class:`~xcomp.compressor.Reduction` (a new order, merged
values, sizes). Either way hidden states, layout and the positions whose outputs are wanted change together.

Shape letters: B batch · S positions · R wanted positions · D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xcomp.backbone import Backbone, RotaryTables
from xcomp.compressor import RULES, Compressor, LayerOutput, Reduction, defines
from xcomp.contract import blamed, check_keep, check_reduction, name_of
from xcomp.layout import TokenLayout, gather


class Rules:
    """The rules of a compressor through one pass over whole sequences: embeddings ``hidden`` (B, S, D)."""

    def __init__(
        self, compressor: Compressor, backbone: Backbone, tables: RotaryTables, hidden: Tensor, layout: TokenLayout
    ):
        self.compressor, self.backbone, self.tables = compressor, backbone, tables
        self.layout = layout.with_positions() if compressor.keeps_positions else layout
        self.asked = {name for name in RULES if defines(compressor, name)}
        self.embeddings = hidden
        self.memory: dict[str, Any] = {}  # of the rules, for the pass
        self.macs = [0] * len(hidden)  # of their own look at the data, for each sample

    def reduce(
        self,
        method: str,
        layer: int,
        hidden: Tensor,
        layout: TokenLayout,
        wanted: Tensor,
        layer_input: Tensor | None = None,
        layer_keys: Tensor | None = None,
    ) -> tuple[Tensor, TokenLayout, Tensor]:
        """Hidden states, layout and wanted positions (B, R) after the rule ``method``; the same where it has none."""
        if method not in self.asked:
            return hidden, layout, wanted
        who = name_of("compressor", self.compressor)
        output = LayerOutput(
            layer, self.backbone.num_layers, hidden, layout, self.backbone, self.tables.of(layout), wanted[:, 0],
            self.layout.visual_counts, self.embeddings, self.layout, self.memory, layer_input, layer_keys,
        )  # fmt: skip
        with blamed(who, self.compressor, method):
            found = getattr(self.compressor, method)(output)
        for macs in output.macs:
            for row, count in enumerate(macs.tolist()):
                self.macs[row] += count
        if found is None:
            return hidden, layout, wanted
        if isinstance(found, Reduction):
            check_reduction(who, found, layout, hidden.shape[-1], method)
            return apply_reduction(found, hidden, layout, wanted)
        check_keep(who, found, layout, method)
        index, layout, wanted = select(layout, found.cpu() | ~layout.visual, wanted)
        return hidden if index is None else gather(hidden, index), layout, wanted


def select(
    layout: TokenLayout, keep: Tensor, wanted: Tensor | None
) -> tuple[Tensor | None, TokenLayout, Tensor | None]:
    """Of positions to ``keep`` (B, S): their indices (None if all stay), the layout after, and the wanted positions
    (B, R), which are among them, renumbered."""
    if bool((keep == layout.real).all()):
        return None, layout, wanted
    index, after = layout.select(keep)
    if wanted is not None:
        wanted = (keep.cumsum(1) - 1).gather(1, wanted)
    return index, after, wanted


def apply_reduction(
    found: Reduction, hidden: Tensor, layout: TokenLayout, wanted: Tensor
) -> tuple[Tensor, TokenLayout, Tensor]:
    """Hidden states, layout and wanted positions (B, R) after a reduction. A wanted position that left is the last one
    before it that stays: what now stands before the text that follows."""
    index = pad_sequence([order.cpu() for order in found.order], batch_first=True)
    counts = torch.tensor([len(order) for order in found.order])
    real = torch.arange(index.shape[1]) < counts.unsqueeze(1)
    after = layout.take(index, real)
    if found.size is not None:
        size = pad_sequence([size.float().cpu() for size in found.size], batch_first=True, padding_value=1.0)
        after = replace(after, size=size)
    place = torch.zeros_like(layout.slot).scatter_(1, index, torch.arange(index.shape[1]) * real)
    stays = torch.zeros_like(layout.real)
    stays[torch.arange(len(index)).unsqueeze(1).expand_as(index)[real], index[real]] = True
    last = torch.arange(layout.width).expand_as(stays).masked_fill(~stays, 0).cummax(1).values
    wanted = place.gather(1, last.gather(1, wanted))
    if found.hidden is None:
        return gather(hidden, index), after, wanted
    return pad_sequence(list(found.hidden), batch_first=True).to(hidden.dtype), after, wanted

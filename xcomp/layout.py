"""TokenLayout: which position of a sequence holds which frame's token. All index arithmetic lives here.

A batch of sequences ``[prefix | video | suffix]`` is padded on the right. A layout says, for every position, the frame
it belongs to, the slot it had within that frame when it entered the language model, and whether it is real. Dropping
tokens is one selection: hidden states and layout are gathered with the same indices. Layouts stay on the CPU, so that
planned dropping never makes an accelerator wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TEXT = -1  # frame and slot of text


@dataclass(frozen=True)
class TokenLayout:
    """``frame`` and ``slot`` (B, S) long, both −1 for text; ``real`` (B, S) bool, False for padding; ``frame_tokens``
    tokens a frame had when it entered the language model (0: no frames)."""

    frame: Tensor
    slot: Tensor
    real: Tensor
    frame_tokens: int = 0

    @classmethod
    def text(cls, lengths: Sequence[int]) -> TokenLayout:
        """Text of the given lengths, padded to the longest."""
        return cls.sequence([(n, 0, 0, 0) for n in lengths])

    @classmethod
    def sequence(cls, parts: Sequence[tuple[int, int, int, int]]) -> TokenLayout:
        """One ``(prefix length, frames, tokens a frame, suffix length)`` a sample."""
        width = max((p + t * n + s for p, t, n, s in parts), default=0)
        frame = torch.full((len(parts), width), TEXT)
        slot = torch.full((len(parts), width), TEXT)
        real = torch.zeros(len(parts), width, dtype=torch.bool)
        for row, (prefix, frames, tokens, suffix) in enumerate(parts):
            video = slice(prefix, prefix + frames * tokens)
            frame[row, video] = torch.arange(frames).repeat_interleave(tokens)
            slot[row, video] = torch.arange(tokens).repeat(frames)
            real[row, : prefix + frames * tokens + suffix] = True
        return cls(frame, slot, real, max((tokens for _, _, tokens, _ in parts), default=0))

    @cached_property
    def visual(self) -> Tensor:
        """(B, S) bool: positions that hold a visual token."""
        return self.frame != TEXT

    @cached_property
    def counts(self) -> Tensor:
        """(B,) real tokens of each sample."""
        return self.real.sum(1)

    @cached_property
    def padded(self) -> bool:
        return not bool(self.real.all())

    @cached_property
    def gaps(self) -> bool:
        """Whether padding stands before a real token, as where text was appended to samples of unequal length."""
        return bool((self.real[:, 1:] & ~self.real[:, :-1]).any())

    @property
    def width(self) -> int:
        return self.real.shape[1]

    @cached_property
    def visual_counts(self) -> list[int]:
        """Visual tokens of each sample."""
        return self.visual.sum(1).tolist()

    def last_index(self) -> Tensor:
        """(B,) index of each sample's last real token, which padding between stored parts may follow."""
        where = torch.arange(self.width).expand_as(self.real)
        return where.masked_fill(~self.real, -1).amax(1)

    def keep_slots(self, slots: Sequence[int], tokens_per_frame: int) -> Tensor:
        """(B, S) bool: text, and visual tokens whose slot is listed."""
        table = torch.zeros(tokens_per_frame + 1, dtype=torch.bool)
        table[list(slots)] = True
        table[-1] = True  # text: slot −1 reads the last entry
        return table[self.slot] & self.real

    def select(self, keep: Tensor) -> tuple[Tensor, TokenLayout]:
        """Compact the positions where ``keep`` (B, S) is True: indices (B, S') and the new layout.

        Samples that keep fewer are padded on the right; their padding indices are 0.
        """
        keep = keep & self.real
        counts = keep.sum(1)
        width = int(counts.max()) if len(counts) else 0
        rows, columns = keep.nonzero(as_tuple=True)
        index = torch.zeros(len(counts), width, dtype=torch.long)
        index[rows, (keep.cumsum(1) - 1)[rows, columns]] = columns
        real = torch.arange(width) < counts.unsqueeze(1)
        frame = self.frame.gather(1, index).masked_fill(~real, TEXT)
        slot = self.slot.gather(1, index).masked_fill(~real, TEXT)
        return index, TokenLayout(frame, slot, real, self.frame_tokens)

    def window(self, spans: Sequence[tuple[int, int]]) -> TokenLayout:
        """The positions of some spans (first, past the last) alone, frames counted from the first that is there."""
        frame, slot, real = (
            torch.cat([getattr(self, k)[:, a:b] for a, b in spans], 1) for k in ("frame", "slot", "real")
        )
        visual = frame != TEXT
        first = frame.masked_fill(~visual, torch.iinfo(frame.dtype).max).amin(1, keepdim=True)
        return TokenLayout(torch.where(visual, frame - first, frame), slot, real, self.frame_tokens)

    def append(self, other: TokenLayout) -> TokenLayout:
        """This layout followed by another, as a cache grows; padding may then lie between them."""
        joined = [torch.cat([getattr(self, k), getattr(other, k)], 1) for k in ("frame", "slot", "real")]
        return TokenLayout(*joined, max(self.frame_tokens, other.frame_tokens))

    def repeat(self, times: int) -> TokenLayout:
        """Every sample ``times`` in a row."""
        repeated = (getattr(self, k).repeat_interleave(times, 0) for k in ("frame", "slot", "real"))
        return TokenLayout(*repeated, self.frame_tokens)

    def all_visible(self, rows: Tensor) -> bool:
        """Whether the queries at indices ``rows`` (B, R) may all see every key."""
        return not self.padded and bool((rows >= self.width - 1).all())

    def causal_mask(self, rows: Tensor, device: torch.device | str = "cpu") -> Tensor | None:
        """Keys that the queries at indices ``rows`` (B, R) may see: (B, 1, R, S) bool, or None if all see all.

        Made on ``device`` from the rows and, where there is padding, from ``real``: no mask is copied there.
        """
        if self.all_visible(rows):
            return None
        mask = torch.arange(self.width, device=device) <= rows.unsqueeze(-1).to(device)
        return (mask & self.real.unsqueeze(1).to(device) if self.padded else mask).unsqueeze(1)


class TextBehind:
    """A layout followed by text, as a cache is while answers are written: told without joining the two.

    What attention asks of a layout is all it has; ``before.append(text)`` has the rest.
    """

    def __init__(self, before: TokenLayout, text: TokenLayout):
        self.before, self.text = before, text
        self.width = before.width + text.width
        self.padded = before.padded or text.padded

    @cached_property
    def real(self) -> Tensor:
        return torch.cat([self.before.real, self.text.real], 1)

    all_visible = TokenLayout.all_visible
    causal_mask = TokenLayout.causal_mask


def gather(hidden: Tensor, index: Tensor) -> Tensor:
    """``hidden`` (B, S, …) at ``index`` (B, S') → (B, S', …)."""
    if hidden.shape[0] == 1:
        return hidden.index_select(1, index[0].to(hidden.device))
    index = index.to(hidden.device)
    return hidden[torch.arange(index.shape[0], device=hidden.device).unsqueeze(1), index]

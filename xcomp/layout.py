"""TokenLayout: which position of a sequence holds which frame's token. All index arithmetic lives here.

A batch of sequences ``[prefix | video | suffix]`` is padded on the right. Within the video, text may stand before and
behind every frame (time stamps, subtitles); it is text like any other, and knows the frame that it stands beside.

A layout says, for every position, the frame it belongs to, the slot it had within that frame when it entered the
language model, and whether it is real. Dropping tokens is one selection: hidden states and layout are gathered with the
same indices. Layouts stay on the CPU, so that planned dropping never makes an accelerator wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xcomp.visual import VisualTokens

TEXT = -1  # frame, slot, place and group of text
TextLengths = Sequence[tuple[int, int]]  # of each frame: tokens of text before and behind it

# What a layout says of each position beside ``real``, and what it says of padding.
_OF_EACH = {
    "frame": TEXT, "slot": TEXT, "place": TEXT, "group": TEXT, "size": 1.0, "position": 0, "beside": TEXT,
}  # fmt: skip


@dataclass(frozen=True)
class TokenLayout:
    """``frame`` and ``slot`` (B, S) long, both −1 for text; ``real`` (B, S) bool, False for padding; ``frame_tokens``
    slots that a frame has (0: no frames).

    The slot is what planned rules go by: frames that came with fewer tokens fill the last slots, as the last tokens of
    a frame are those that have seen the others. ``place`` (B, S) is where in its frame a token comes from, None: its
    slot. ``size`` (B, S) is how many tokens a merged one stands for, None: one each; ``group`` (B, S) is what the
    compressor numbered them by, None: nothing. Under rules that keep positions,
    ``position`` (B, S) is each token's place in the sequence before anything left and ``following`` (B,) the next
    text's; None: positions are the running count. ``beside`` (B, S) is the frame before or behind which text between
    frames stands, −1 for everything else; None: there is no such text.
    """

    frame: Tensor
    slot: Tensor
    real: Tensor
    frame_tokens: int = 0
    place: Tensor | None = None
    size: Tensor | None = None
    group: Tensor | None = None
    position: Tensor | None = None
    following: Tensor | None = None
    beside: Tensor | None = None

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

    @classmethod
    def of(
        cls, parts: Sequence[tuple[int, VisualTokens, int]], texts: Sequence[TextLengths | None] | None = None
    ) -> TokenLayout:
        """One ``(prefix length, visual tokens, suffix length)`` a sample; videos may have lost tokens anywhere.

        ``texts``: of each sample the lengths of the text between its frames, as many as it had before a compressor
        merged some (:func:`interleave`).
        """
        texts = [None] * len(parts) if texts is None else texts
        whole = all(visual.is_whole and visual.size is None and visual.group is None for _, visual, _ in parts)
        if whole and not any(texts):
            return cls.sequence([(p, v.num_frames, v.frame_tokens, s) for p, v, s in parts])
        frame_tokens = max(visual.frame_tokens for _, visual, _ in parts)
        rows: dict[str, list[Tensor]] = {name: [] for name in ("frame", "slot", "place", "size", "group", "beside")}
        lengths = []
        for (prefix, visual, suffix), text in zip(parts, texts):
            # Of a whole video this follows from its shape: nothing waits for an accelerator.
            index = torch.arange(len(visual)) if visual.is_whole else visual.index.cpu()
            frame, place = index // visual.frame_tokens, index % visual.frame_tokens
            counts = torch.bincount(frame, minlength=visual.num_frames)
            rank = torch.arange(len(frame)) - (counts.cumsum(0) - counts)[frame]
            size = torch.ones(len(frame)) if visual.size is None else visual.size.float().cpu()
            group = torch.full_like(frame, TEXT) if visual.group is None else visual.group.cpu()
            slot = frame_tokens - counts[frame] + rank
            order, beside = torch.arange(len(frame)), frame[:0]
            if text:
                order, beside = interleave(frame, visual.num_frames, text)
            found = (frame, slot, place, size, group, torch.full_like(frame, TEXT))
            for name, values in zip(rows, found):
                before, between, after = (values.new_full((n,), _OF_EACH[name]) for n in (prefix, len(beside), suffix))
                between = beside if name == "beside" else between
                rows[name].append(torch.cat([before, torch.cat([between, values])[order], after]))
            lengths.append(prefix + len(order) + suffix)
        padded = {name: pad_sequence(rows[name], True, _OF_EACH[name]) for name in rows}
        for name in ("size", "group"):
            if all(getattr(visual, name) is None for _, visual, _ in parts):
                padded[name] = None
        if whole:
            padded["place"] = None
        if not any(texts):
            padded["beside"] = None
        real = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
        return cls(real=real, frame_tokens=frame_tokens, **padded)

    def _with(self, change: Callable[[Tensor, str], Tensor], **fields: Any) -> TokenLayout:
        """A layout in which ``change(values, name)`` was made of everything that is known of each position."""
        known = {name: getattr(self, name) for name in _OF_EACH}
        changed = {name: None if values is None else change(values, name) for name, values in known.items()}
        return replace(self, **changed, **fields)

    @property
    def places(self) -> Tensor:
        """(B, S) where in its frame each token comes from; −1 for text."""
        return self.slot if self.place is None else self.place

    @property
    def sizes(self) -> Tensor:
        """(B, S) float: how many tokens each stands for."""
        return torch.ones(self.real.shape) if self.size is None else self.size

    @cached_property
    def between(self) -> Tensor:
        """(B, S) bool: text that stands between the frames."""
        return torch.zeros_like(self.real) if self.beside is None else self.beside != TEXT

    @property
    def owner(self) -> Tensor:
        """(B, S) the frame that a visual token is of, or that text between frames stands beside; −1 for other text."""
        return self.frame if self.beside is None else torch.maximum(self.frame, self.beside)

    def text_lengths(self, row: int) -> TextLengths:
        """Text between the frames of a sample whose frames are ascending, in tokens before and behind each."""
        if self.beside is None:
            return []
        beside, started = self.beside[row], self.frame[row].cummax(0).values
        text, count = self.between[row], int(self.owner[row].max()) + 1
        parts = (text & (started < beside), text & (started >= beside))
        return list(zip(*(torch.bincount(beside[part], minlength=count).tolist() for part in parts)))

    def with_positions(self) -> TokenLayout:
        """The same, but positions stay what they are now whatever leaves."""
        position = self.real.cumsum(1) - 1
        return replace(self, position=position, following=self.counts)

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
        return index, self.take(index, torch.arange(width) < counts.unsqueeze(1))

    def take(self, index: Tensor, real: Tensor) -> TokenLayout:
        """The positions ``index`` (B, S') in that order; where ``real`` is False is padding."""
        return self._with(lambda values, name: values.gather(1, index).masked_fill(~real, _OF_EACH[name]), real=real)

    def window(self, spans: Sequence[tuple[int, int]]) -> TokenLayout:
        """The positions of some spans (first, past the last) alone, frames counted from the first that is there.

        Text between frames counts as there: it keeps its frame's number even where the frame has lost all tokens.
        """

        def cut(values: Tensor, name: str = "") -> Tensor:
            return torch.cat([values[:, a:b] for a, b in spans], 1)

        part = self._with(cut, real=cut(self.real))
        if self.position is not None:  # gaps within a span stay, those between spans do not
            pieces, start = [], 0
            for a, b in spans:
                if a < b:
                    pieces.append(self.position[:, a:b] - self.position[:, a : a + 1] + start)
                    start = pieces[-1][:, -1:] + 1
            part = replace(part, position=torch.cat(pieces, 1))
        owner = part.owner
        first = owner.masked_fill(owner == TEXT, torch.iinfo(owner.dtype).max).amin(1, keepdim=True)
        if part.beside is not None:
            part = replace(part, beside=torch.where(part.between, part.beside - first, part.beside))
        return replace(part, frame=torch.where(part.visual, part.frame - first, part.frame))

    def append(self, other: TokenLayout) -> TokenLayout:
        """This layout followed by another, as a cache grows; padding may then lie between them."""
        more = {"frame": other.frame, "slot": other.slot, "place": other.places, "size": other.sizes}
        more["group"] = torch.full_like(other.frame, TEXT) if other.group is None else other.group
        more["beside"] = torch.full_like(other.frame, TEXT) if other.beside is None else other.beside
        following = self.following
        if following is not None:
            more["position"] = following.unsqueeze(1) + other.real.cumsum(1) - 1
            following = following + other.counts
        whole = self if other.place is None else replace(self, place=self.places)
        whole = whole if other.size is None else replace(whole, size=self.sizes)
        if self.beside is None and other.beside is not None:
            whole = replace(whole, beside=torch.full_like(self.frame, TEXT))
        return whole._with(
            lambda values, name: torch.cat([values, more[name].to(values.dtype)], 1),
            real=torch.cat([self.real, other.real], 1),
            frame_tokens=max(self.frame_tokens, other.frame_tokens),
            following=following,
        )

    def repeat(self, times: int) -> TokenLayout:
        """Every sample ``times`` in a row."""
        following = None if self.following is None else self.following.repeat_interleave(times, 0)
        real = self.real.repeat_interleave(times, 0)
        return self._with(lambda values, _: values.repeat_interleave(times, 0), real=real, following=following)

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


def interleave(frame: Tensor, num_frames: int, texts: TextLengths) -> tuple[Tensor, Tensor]:
    """How visual tokens of frames ``frame`` (M,), of ``num_frames``, and the text between them stand in one another.

    ``texts`` are the lengths of each frame's text, L in all. Returns ``order`` (L + M,), places in ``[text | visual
    tokens]``, and the frame that each text token stands beside (L,). No text is left out: that of a frame without
    tokens stays, and where frames were merged, so that there are fewer than texts, their tokens stand with the first.
    """
    owner = torch.arange(len(texts)) * num_frames // len(texts)
    parts = 3 * torch.arange(len(texts)).unsqueeze(1) + torch.tensor([0, 2])
    text = parts.flatten().repeat_interleave(torch.tensor(texts).flatten())
    visual = 3 * torch.searchsorted(owner, frame).clamp(max=len(texts) - 1) + 1
    return torch.cat([text, visual]).argsort(stable=True), owner[text // 3]


def merged_lengths(texts: TextLengths, num_frames: int) -> TextLengths:
    """Lengths of the text beside each of ``num_frames``, to which the frames of ``texts`` were merged."""
    if not texts or len(texts) == num_frames:
        return texts
    order, beside = interleave(torch.arange(num_frames), num_frames, texts)
    text, behind = order < len(beside), (order >= len(beside)).cumsum(0)
    lengths = [[0, 0] for _ in range(num_frames)]
    for place, seen in zip(order[text].tolist(), behind[text].tolist()):
        lengths[int(beside[place])][seen > int(beside[place])] += 1
    return [(before, after) for before, after in lengths]


def gather(hidden: Tensor, index: Tensor) -> Tensor:
    """``hidden`` (B, S, …) at ``index`` (B, S') → (B, S', …)."""
    if hidden.shape[0] == 1:
        return hidden.index_select(1, index[0].to(hidden.device))
    index = index.to(hidden.device)
    return hidden[torch.arange(index.shape[0], device=hidden.device).unsqueeze(1), index]

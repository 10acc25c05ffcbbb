"""VisualTokens: the visual tokens of one video on their way into the language model.

A vision path gives every frame the same number of tokens; what prunes or merges them leaves frames of unequal length.
Each token remembers its frame, its slot (the place that it had within the frame when it left the vision path) and,
where tokens were merged, for how many it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# What a vision tower can tell of its tokens beside their values, on request; n is the number of tokens, T of frames.
TOWER_FEATURES = {
    "attention": "(n,) attention that each token receives in the last layer used, mean over heads and queries",
    "cls_attention": "(n,) attention that the class token pays to each in the last layer used, summed over heads",
    "keys": "(n, K) keys of the last layer used, mean over heads",
    "frame": "(T, K) one vector a frame",
    "pooling_attention": "(n,) attention to each token of what makes that vector (pooling head, class token, all)",
}


@dataclass(frozen=True)
class VisualTokens:
    """``tokens`` (M, D), in the order in which they enter the language model, all frames of ``num_frames``.

    ``frame`` and ``slot`` (M,) long, on the tokens' device: the frame (ascending) and the place within it, of
    ``frame_tokens`` places. ``size`` (M,) is how many original tokens each stands for (None: one). ``group`` (M,)
    long is what a compressor numbers them by, from 0, for its rule inside the language model; None: nothing. ``grid``
    is the (height, width) of a frame's places where they are the pixels' order, row by row. ``tower`` has those of
    TOWER_FEATURES that a compressor asked for (``needs``); they describe the tokens as they left the vision path, n =
    num_frames · frame_tokens, and stay as they are when tokens leave.
    """

    tokens: Tensor
    frame: Tensor
    slot: Tensor
    num_frames: int
    frame_tokens: int
    size: Tensor | None = None
    grid: tuple[int, int] | None = None
    tower: Mapping[str, Tensor] = field(default_factory=dict)
    compressed: bool = False  # whether a run's compressor has been asked
    group: Tensor | None = None
    shown_frames: int | None = None  # frames before the compressor merged some; None: num_frames

    @classmethod
    def from_frames(
        cls, frames: Tensor, grid: tuple[int, int] | None = None, tower: Mapping[str, Tensor] | None = None
    ) -> VisualTokens:
        """Of (T, N, D): every frame whole."""
        num_frames, width = frames.shape[:2]
        places = torch.arange(num_frames * width, device=frames.device)
        frame, slot = places // max(width, 1), places % max(width, 1)
        return cls(frames.flatten(0, 1), frame, slot, num_frames, width, grid=grid, tower=tower or {})

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def index(self) -> Tensor:
        """(M,) each token's place among all that left the vision path."""
        return self.frame * self.frame_tokens + self.slot

    @property
    def is_whole(self) -> bool:
        """Whether every frame still has all its tokens, in order."""
        return len(self) == self.num_frames * self.frame_tokens

    def frames(self) -> Tensor:
        """(T, N, D). ValueError if tokens have left: then frames are of unequal length."""
        if not self.is_whole:
            raise ValueError(
                f"{self.num_frames} frames of {self.frame_tokens} tokens have {len(self)} left, so they are no "
                "(T, N, D); what needs whole frames must come first"
            )
        return self.tokens.unflatten(0, (self.num_frames, self.frame_tokens))

    def counts(self) -> Tensor:
        """(T,) tokens of each frame."""
        return torch.bincount(self.frame, minlength=self.num_frames)

    def first(self, num_frames: int) -> VisualTokens:
        """The first so many frames of a video that is whole."""
        return self.split([num_frames, self.num_frames - num_frames])[0]

    def split(self, counts: Sequence[int]) -> list[VisualTokens]:
        """Videos of so many frames each, of one that is whole."""
        tower = {}
        for name, values in self.tower.items():
            rows = counts if name == "frame" else [count * self.frame_tokens for count in counts]
            tower[name] = values.split(list(rows))
        return [
            VisualTokens.from_frames(frames, self.grid, {name: values[i] for name, values in tower.items()})
            for i, frames in enumerate(self.frames().split(list(counts)))
        ]

    @staticmethod
    def join(videos: Sequence[VisualTokens]) -> VisualTokens:
        """One video of the frames of several that are whole."""
        tower = {name: torch.cat([video.tower[name] for video in videos]) for name in videos[0].tower}
        return VisualTokens.from_frames(torch.cat([video.frames() for video in videos]), videos[0].grid, tower)

    @property
    def nbytes(self) -> int:
        """Of the tokens and of what is known of the tower."""
        return self.tokens.nbytes + sum(values.nbytes for values in self.tower.values())

    def select(self, index: Tensor) -> VisualTokens:
        """The tokens at ``index`` (M',) long or (M,) bool, in that order."""
        known = {"tokens", "frame", "slot", *(name for name in ("size", "group") if getattr(self, name) is not None)}
        return replace(self, **{name: getattr(self, name)[index] for name in known})

    def with_tokens(self, tokens: Tensor, size: Tensor | None = None) -> VisualTokens:
        """The same places with other values (M, D)."""
        return replace(self, tokens=tokens, size=self.size if size is None else size)

"""DyCoke, temporal part: in groups of four frames, three keep only the patches that changed.

Paper: "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models" (arXiv 2411.15024). With r the
merging ratio, k = ⌊(1 − r) N⌋. Every second frame keeps its k tokens of lowest cosine to the same place in the frame
before; of the others, every second keeps its k lowest against the one two frames earlier. Despite the name nothing
is averaged.

Deviations, undone by ``released: true``: the released code leaves the last group's third frame whole where four divides
the number of frames, loses an odd last frame, fails for four frames or fewer, and puts a pruned frame's tokens in the
order of rising similarity.

Its pruning while decoding is on where ``decoding_layer`` is given (the authors' is 3): after that layer each token of
an answer no longer sees the share ``decoding_drop`` of visual keys that it looked at least there, mean over heads.
Where its attention to them resembles that of the token before (cosine), the earlier choice stays; the released code
then reads the full cache. Keys stay stored, so budgets, which are of what is stored, do not change. With several beams
a beam is held against the one that stood in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xcomp.compressor import About, Budget, Compressor, DecodingStep, QuestionTokens
from xcomp.merging import check_share, cosine, top, top_ascending
from xcomp.schedule import check_stages, stage_layers
from xcomp.visual import VisualTokens


class DyCoke(Compressor):
    """Frames 0, 4, 8, … whole, the others pruned against an earlier frame."""

    about = About(
        "DyCoke: Dynamic Compression of Tokens for Fast Video LLMs (arXiv 2411.15024)",
        "before the language model",
        deviates="the last group and an odd last frame are pruned like all others; position order; "
        "pruning while decoding is an option",
        keeps=(1 + 3 * 0.3) / 4,
    )

    @dataclass
    class Config:
        merging_ratio: float = 0.7  # share of a pruned frame's tokens that leave
        keep: float | None = None  # share of all tokens kept, whatever the number of frames; replaces merging_ratio
        released: bool = False  # the released code's last frames, order of tokens, and full cache while decoding
        decoding_layer: float | None = None  # number (1-based), below 1: depth; null: answers see all keys
        decoding_drop: float = 0.7  # share of the visual keys hidden from a token (README; the code has 0.8)
        decoding_alike: float = 0.9  # cosine to the attention of the token before from which its choice stays

        def __post_init__(self) -> None:
            if not 0 <= self.merging_ratio <= 1:
                raise ValueError(f"merging_ratio is {self.merging_ratio}; it must be a share from 0 to 1")
            if self.keep is not None:
                check_share("keep", self.keep)
            if self.decoding_layer is not None:
                check_stages([self.decoding_layer])
            if not 0 <= self.decoding_drop < 1:
                raise ValueError(f"decoding_drop is {self.decoding_drop}; it must be a share of at least 0 and below 1")

    def __init__(self, config: Config):
        super().__init__(config)
        if config.decoding_layer is not None:
            self.plan, self.while_decoding = self._all_stored, self._hide_keys

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        """The ratio is right where four divides the number of frames; ``keep`` sees to others.

        A short video whose frames 0, 4, 8, … are more than the share keeps these.
        """
        if budget.keep < 0.25:
            raise ValueError(f"dycoke cannot keep {budget.keep:g}, as one frame in four stays whole; nearest: 0.25")
        return replace(config, merging_ratio=1 - (4 * budget.keep - 1) / 3, keep=budget.keep)

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        c, frames = self.config, visual.frames()
        num_frames, width = frames.shape[:2]
        against = references(num_frames, released=c.released)
        pruned = sum(other != t for t, other in against.items())
        if c.keep is None:
            count = int((1 - c.merging_ratio) * width)
        else:
            whole = len(against) - pruned
            count = min(width, max(0, round((c.keep * num_frames - whole) * width / max(pruned, 1))))
        return visual.select(kept(frames, against, count, released_order=c.released))

    def _all_stored(self, num_layers: int, tokens_per_frame: int) -> list[tuple[int, ...]]:
        self._stage(num_layers)  # a wrong layer is found before anything runs
        return super().plan(num_layers, tokens_per_frame)

    def _stage(self, num_layers: int) -> int:
        return stage_layers("dycoke", [self.config.decoding_layer], num_layers)[0]

    @torch.no_grad()
    def _hide_keys(self, step: DecodingStep) -> Tensor | None:
        c, visual = self.config, step.layout.visual
        if step.layer + 1 != self._stage(step.num_layers):
            return None
        attention = step.attention().cpu()
        now = [attention[row, places] for row, places in enumerate(visual)]
        before, chosen = step.state.get("dycoke", ([None] * len(now), [None] * len(now)))
        if c.released:
            chosen = [torch.ones_like(a, dtype=torch.bool) for a in now]
        options = {"drop": c.decoding_drop, "alike": c.decoding_alike}
        chosen = [keys_to_keep(*sample, **options) for sample in zip(now, before, chosen)]
        step.state["dycoke"] = now, chosen
        seen = torch.ones_like(visual)
        seen[visual] = torch.cat(chosen)
        return seen


def kept(frames: Tensor, against: dict[int, int], count: int, *, released_order: bool = False) -> Tensor:
    """(T, N, D) → (M,) the places that stay: ``count`` of each frame compared to another, all of those that are not."""
    width = frames.shape[1]
    pruned = [t for t, other in against.items() if other != t]
    likeness = cosine(frames[pruned], frames[[against[t] for t in pruned]])
    slots = (top if released_order else top_ascending)(-likeness, count)
    whole = torch.arange(width, device=frames.device)
    chosen = dict(zip(pruned, slots))
    return torch.cat([t * width + chosen.get(t, whole) for t in against])


def references(num_frames: int, *, released: bool = False) -> dict[int, int]:
    """Which frame each frame is compared to; itself where it stays whole."""
    if released and num_frames <= 4:
        raise ValueError(f"dycoke with released: true needs more than 4 frames, not {num_frames}")
    against = {t: t - 1 if t % 2 else t - 2 if t % 4 == 2 else t for t in range(num_frames)}
    if released:
        against = {t: t if t % 4 == 2 and t - 2 >= num_frames - 4 else other for t, other in against.items()}
        if num_frames % 2:
            del against[num_frames - 1]
    return against


def keys_to_keep(
    attention: Tensor, before: Tensor | None, kept: Tensor | None, *, drop: float = 0.7, alike: float = 0.9
) -> Tensor:
    """Decoding: which visual keys the next token sees, (V,) bool, from this token's ``attention`` (V,) to them.

    The share ``drop`` of least attention leaves; where attention resembles the token's ``before`` (cosine of at least
    ``alike``), the choice ``kept`` of then stays.
    """
    if before is not None and kept is not None and cosine(attention, before) >= alike:
        return kept
    chosen = top(attention.float(), max(1, round(len(attention) * (1 - drop))))
    return torch.zeros_like(attention, dtype=torch.bool).scatter(0, chosen, True)

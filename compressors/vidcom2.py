"""VidCom²: frames that stand out get more of the budget, and in each frame the tokens that stand out stay.

Paper: "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models" (arXiv
2505.14454). Tokens, on the half of their channels that varies least and with length one, are compared to the video's
mean and to their frame's mean by a sum of five Gaussians G. A frame's share is ratio · (1 + p − 1/T), cut at 1, where p
is the softmax over frames of −mean G(token, video) / temperature; the tokens of smallest G(video) + G(frame) stay.

The choice of channels is in the released code only; ``channel_ratio: 1`` is without. Cutting shares at 1 loses budget
where the ratio is large, in the released code and by default; ``refill: true`` gives it to the other frames, and a
budget asks for that. Row ends of LLaVA-Video's grid are no visual tokens here; :func:`with_row_ends` says where they
would stand.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from xcomp.compressor import About, Budget, Compressor, QuestionTokens
from xcomp.merging import check_share, exact, top_ascending, top_each, unit
from xcomp.visual import VisualTokens


class VidCom2(Compressor):
    """Keeps the most unusual tokens of each frame, more of unusual frames."""

    about = About("Video Compression Commander (arXiv 2505.14454)", "before the language model", keeps=0.25)

    @dataclass
    class Config:
        ratio: float = 0.25  # share of the tokens kept
        channel_ratio: float = 0.5  # share of the channels compared, those of lowest variance
        temperature: float = 0.01  # of the softmax over frames
        alphas: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5, 1.0, 2.0])  # variances of the Gaussians
        refill: bool = False  # what frames whose share is cut at 1 do not use goes to the others

        def __post_init__(self) -> None:
            check_share("ratio", self.ratio)
            check_share("channel_ratio", self.channel_ratio)
            if not self.temperature > 0:
                raise ValueError(f"temperature is {self.temperature}; it must be above 0")
            if not self.alphas or min(self.alphas) <= 0:
                raise ValueError(f"alphas is {self.alphas}; it must be numbers above 0, at least one")

    @classmethod
    def for_budget(cls, config: Config, budget: Budget, num_layers: int, tokens_per_frame: int) -> Config:
        return replace(config, ratio=budget.keep, refill=True)

    def compress(self, visual: VisualTokens, question: QuestionTokens | None) -> VisualTokens:
        c, frames = self.config, visual.frames()
        of_video, of_frame = closeness(frames, channels(frames, c.channel_ratio), c.alphas)
        shares = frame_shares(of_video, c.ratio, c.temperature, refill=c.refill)
        counts = (shares.double() * frames.shape[1]).round().clamp(min=1).long()
        return visual.select(top_each(-(of_video + of_frame), counts).flatten())


@exact
def channels(frames: Tensor, ratio: float) -> Tensor:
    """(T, N, D) → the ⌊ratio · D⌋ channels, ascending, of lowest variance over all tokens."""
    variance = frames.detach().float().flatten(0, 1).var(0, unbiased=False)
    return top_ascending(-variance, max(1, int(len(variance) * ratio)))


@exact
def closeness(frames: Tensor, channels: Tensor, alphas: list[float]) -> tuple[Tensor, Tensor]:
    """(T, N, D) → each token's G to the mean of the video and to that of its frame, both (T, N) float32."""
    x = unit(frames[..., channels])
    means = x.mean(dim=(0, 1), keepdim=True), x.mean(dim=1, keepdim=True)
    squares = [(x - mean).square().sum(-1) for mean in means]
    of_video, of_frame = (sum((-square / (2 * alpha)).exp() for alpha in alphas) for square in squares)
    return of_video, of_frame


def frame_shares(of_video: Tensor, ratio: float, temperature: float, *, refill: bool = False) -> Tensor:
    """(T, N) closeness to the video → (T,) share of its tokens that each frame keeps, at most 1."""
    unusual = (-of_video.mean(1) / temperature).softmax(0)
    shares = (ratio * (1 + unusual - 1 / len(unusual))).clamp(max=1)
    shares = shares.double() if refill else shares
    while refill:
        room = shares < 1
        spare = ratio * len(shares) - shares.sum()
        if spare < 1e-6 or not room.any():
            break
        shares = torch.where(room, shares + spare / room.sum(), shares).clamp(max=1)  # fills a frame, or ends
    return shares


def with_row_ends(index: Tensor, num_frames: int, grid: tuple[int, int], *, released_order: bool = False) -> Tensor:
    """Kept places (M,) of frames (h, w), in frames of h rows of w + 1 places, whose last is a row end that stays.

    Row ends come where they stand, or (``released_order``) after all patches of their frame.
    """
    height, width = grid
    frame, slot = index // (height * width), index % (height * width)
    patches = frame * height * (width + 1) + slot // width * (width + 1) + slot % width
    ends = torch.arange(1, num_frames * height + 1, device=index.device) * (width + 1) - 1
    both = torch.cat([patches, ends])
    rank = torch.cat([frame * 2, (torch.arange(len(ends), device=index.device) // height) * 2 + 1])
    return both[rank.argsort(stable=True)] if released_order else both.sort().values

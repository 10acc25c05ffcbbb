"""sharpest: the frames with the strongest edges, whatever the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xcomp import FrameSelector


class Sharpest(FrameSelector):
    """Mean difference between neighbouring pixels."""

    @dataclass
    class Config:
        pass

    @torch.no_grad()
    def score_frames(self, backbone, pixels: Tensor, *prompt, compressor=None, question=None) -> Tensor:
        across, down = pixels.float().diff(dim=3), pixels.float().diff(dim=2)
        return across.abs().mean((1, 2, 3)) + down.abs().mean((1, 2, 3))

"""Random frames, other ones for each question; with ``uniform`` what every selector has to beat.

A frame's score is a random number that follows from the run's seed and the question, so the best are a random set; as
a scorer of a picker it shows what the picker does by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xcomp.compressor import Compressor
from xcomp.inflight import VideoInFlight
from xcomp.selector import FrameQuery, FrameSelector


class Random(FrameSelector):
    """Scores drawn evenly from 0..1."""

    uses_video = False

    @dataclass
    class Config:
        pass

    def score(
        self, video: VideoInFlight, queries: Sequence[FrameQuery], compressor: Compressor | None = None
    ) -> list[Tensor]:
        count = len(video.candidates)
        return [torch.from_numpy(query.rng().random(count)).float() for query in queries]

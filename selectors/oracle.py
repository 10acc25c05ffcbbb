"""The true event, where the benchmark knows it: an upper bound, and no method.

The frames of each event are ranked from its middle outwards, so that a small budget shows all of a question's events
before it shows one of them twice; behind them stand the others, the nearest to an event first. An event that falls
between candidates has the nearest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xcomp.backbone import QuestionError
from xcomp.compressor import Compressor
from xcomp.inflight import VideoInFlight
from xcomp.selector import FrameQuery, FrameSelector


class Oracle(FrameSelector):
    """Frames of the evidence first."""

    uses_video = False

    @dataclass
    class Config:
        pass

    def score(
        self, video: VideoInFlight, queries: Sequence[FrameQuery], compressor: Compressor | None = None
    ) -> list[Tensor]:
        return [event_scores(video.info.times, query) for query in queries]


def event_scores(times: Sequence[float], query: FrameQuery) -> Tensor:
    """(T,): minus a frame's rank within its event; outside of events minus its seconds from one, below all of those."""
    if not query.events:
        raise QuestionError(f"oracle: nobody knows when what question '{query.name}' asks for happens")
    seconds = torch.tensor(times, dtype=torch.float32)
    outside = torch.stack(
        [(start - seconds).clamp(min=0) + (seconds - end).clamp(min=0) for start, end in query.events]
    )
    scores = -len(times) - outside.min(0).values
    for (start, end), away in zip(query.events, outside):
        inside = (away == 0).nonzero()[:, 0]
        inside = away.argmin()[None] if len(inside) == 0 else inside
        order = inside[(seconds[inside] - (start + end) / 2).abs().argsort(stable=True)]
        scores[order] = torch.maximum(scores[order], -torch.arange(len(order), dtype=torch.float32))
    return scores

"""The frame-selector contract: a score per candidate frame for a question, then the frames to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xcomp.ledger import Work

if TYPE_CHECKING:
    from xcomp.backbone import Backbone, Prompt
    from xcomp.compressor import Compressor
    from xcomp.inflight import VideoInFlight
    from xcomp.pixels import PixelFormat


@dataclass
class FrameQuery:
    """A question that frames are chosen for: in words, and as the prompt that all candidate frames would be put to.

    ``work`` is what this question alone takes, beside what all questions of the video share:
    ``with video.ledger.charge(query.work)`` measures it.
    """

    question: str
    prompt: Prompt
    work: Work = field(default_factory=lambda: Work("select"))


@dataclass(frozen=True)
class SelectionCost:
    """What choosing takes, from shapes alone: frames whose visual tokens are needed, MACs once a video and a question.

    Frames that are encoded in two ways, as clips of another cut, count twice.
    """

    frames_encoded: int = 0
    video_macs: int = 0
    question_macs: int = 0


class FrameSelector(nn.Module):
    """Base class of all selectors. A subclass defines ``score_frames``, or ``score`` for many questions at once."""

    Config: type
    uses_video = True  # False: frames are chosen by number alone, and only the chosen ones are decoded

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def pixel_formats(self, backbone: Backbone) -> tuple[PixelFormat, ...]:
        """The formats in which it looks at all candidate frames: they are decoded ahead."""
        return (backbone.pixel_format,) if self.uses_video else ()

    @torch.no_grad()
    def score(
        self, video: VideoInFlight, queries: Sequence[FrameQuery], compressor: Compressor | None = None
    ) -> list[Tensor]:
        """Scores (T,) of the video's candidate frames for each question, higher is better.

        What a selector takes from ``video`` (``pixels``, ``tokens``, ``features``) is computed once for all questions
        and arms. By default each question is scored by ``score_frames``, with all candidates' pixels at once.
        """
        pixels = video.normalised(video.candidates)
        scores = []
        for query in queries:
            with video.ledger.charge(query.work):
                ids = query.prompt.prefix_ids, query.prompt.question_ids, query.prompt.header_ids
                options = {"compressor": compressor, "question": query.question}
                scores.append(self.score_frames(video.backbone, pixels, *ids, **options))
        return scores

    def score_frames(
        self,
        backbone: Backbone,
        pixels: Tensor,
        prefix_ids: Tensor,
        question_ids: Tensor,
        header_ids: Tensor,
        compressor: Compressor | None = None,
        *,
        question: str | None = None,
    ) -> Tensor:
        """Candidate frames (T, 3, h, w) as the backbone preprocessed them → scores (T,), higher is better.

        ``question`` is the bare question, for selectors with a text tower of their own. Text between the frames is in
        the prompt alone: a selector that runs the language model on it defines ``score``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score_frames(...) or score(...)")

    def cost(
        self, backbone: Backbone, num_frames: int, query: FrameQuery, compressor: Compressor
    ) -> SelectionCost | None:
        """The cost of choosing among ``num_frames`` candidates; None where a selector does not say."""
        return None if self.uses_video else SelectionCost()

    def select(self, scores: Tensor, budget: int) -> list[int]:
        """Ascending indices of the ``budget`` best frames; ties go to the earlier one. All if there are no more."""
        if budget < 1:
            raise ValueError(f"a frame budget of {budget} was asked for; it must be at least 1")
        best = torch.sort(scores.float(), descending=True, stable=True).indices[:budget]
        return sorted(best.tolist())

"""The frame-selector contract: a score per candidate frame for a question, then the frames to show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from xcomp.backbone import Backbone
    from xcomp.compressor import Compressor


class FrameSelector(nn.Module):
    """Base class of all selectors."""

    Config: type
    uses_video = True  # False: frames are chosen by number alone, and only the chosen ones are decoded

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

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

        ``question`` is the bare question, for selectors with a text tower of their own; by default it is read back
        from ``question_ids``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score_frames(...)")

    def select(self, scores: Tensor, budget: int) -> list[int]:
        """Ascending indices of the ``budget`` best frames; ties go to the earlier one. All if there are no more."""
        if budget < 1:
            raise ValueError(f"a frame budget of {budget} was asked for; it must be at least 1")
        best = torch.sort(scores.float(), descending=True, stable=True).indices[:budget]
        return sorted(best.tolist())

"""Two ways to make supervised compression tuning gentler: compression that grows, and a teacher that sees everything.

Neither is part of the published method; both are off by default.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from xcomp.backbone import Backbone
from xcomp.compressor import Compressor, PlannedDrop
from xcomp.config import ConfigError, Curriculum
from xcomp.contract import name_of


def check_curriculum(compressor: Compressor) -> None:
    """ConfigError unless a compressor's tokens a frame follow a schedule whose end can be moved."""
    if not isinstance(compressor, PlannedDrop) or compressor.config.schedule == "steps":
        schedule = " with schedule 'steps'" if isinstance(compressor, PlannedDrop) else ""
        raise ConfigError(
            f"tune.curriculum moves the end of a planned schedule (cosine, linear, constant), which "
            f"{name_of('compressor', compressor)}{schedule} has not"
        )


def end_at(curriculum: Curriculum, step: int, steps: int, first: int, last: int) -> int:
    """Tokens a frame at the last layer in an optimizer step (from 0): from ``first``, in equal parts, to ``last``.

    ``last`` is reached after ``curriculum.share`` of the ``steps``; halves are rounded up.
    """
    done = min(1.0, step / (curriculum.share * steps))
    return int(first + (last - first) * done + 0.5)


@contextmanager
def eased(compressor: Compressor, end: int) -> Iterator[None]:
    """A compressor whose schedule ends at ``end`` tokens a frame."""
    own = compressor.config
    compressor.config = replace(own, end=end)
    try:
        yield
    finally:
        compressor.config = own


def frozen_copy(backbone: Backbone, shared: set[int]) -> Backbone:
    """A backbone's weights as they are now. The parameters of which ``shared`` has the ids never change: they are not
    copied."""
    same = {id(parameter): parameter for parameter in backbone.parameters() if id(parameter) in shared}
    return copy.deepcopy(backbone, same).requires_grad_(False).eval()


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of the softmax at temperature T: logits (R, V) twice → mean over R, float32.

    Source: "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), whose factor T² keeps the size of the
    gradients.
    """
    logs = [(logits.float() / temperature).log_softmax(-1) for logits in (student, teacher)]
    with torch.autocast(student.device.type, enabled=False):
        return kl_div(*logs, log_target=True, reduction="batchmean") * temperature**2

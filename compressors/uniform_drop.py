"""Uniform dropping: the same schedules as LP-Comp, but the kept tokens are spread evenly over the frame.

Source: the "uniform" ablation of "One Token per Highly Selective Frame" (arXiv 2604.14149), Table 3, in the order of
removal of the released code.
"""

from __future__ import annotations

from dataclasses import dataclass

from xcomp.compressor import About, PlannedDrop
from xcomp.schedule import check_names


class UniformDrop(PlannedDrop):
    """Cosine schedule, evenly spread tokens."""

    about = About(
        "uniform ablation of One Token per Highly Selective Frame (arXiv 2604.14149)",
        "after every layer",
        trained=True,
    )

    @dataclass
    class Config:
        schedule: str = "cosine"  # cosine, linear, steps, constant
        start: int | None = None  # tokens before the first layer; default all
        end: int = 1  # tokens at the last layer
        rounding: str = "nearest"  # nearest (released code) or ceil (paper)
        steps: dict[int, int] | None = None  # for schedule steps: layer (1-based) → tokens kept after it

        def __post_init__(self) -> None:
            check_names(schedule=self.schedule, rounding=self.rounding)
            if self.end < 1:
                raise ValueError(f"end is {self.end}; a frame must keep at least 1 token")

    rule = "uniform"

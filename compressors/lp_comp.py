"""LP-Comp: learnable, progressive compression inside the language model.

Each frame keeps its last N(l) tokens at layer l, N falling from N to 1 along a cosine. Under causal attention later
tokens of a frame can have absorbed the earlier ones, so the suffix is what stays. There are no new parameters: the
language model learns to move information there when it is tuned with the dropping on.

Source: "One Token per Highly Selective Frame" (arXiv 2604.14149), Section 3.1. The paper rounds up (``rounding:
ceil``); the default follows the released code, with which the released checkpoint was trained. The paper's "step-wise"
ablation is ``schedule: steps, steps: {10: 4, 20: 1}, rule: last_of_group``, its "uniform" one ``rule: uniform``.

Its natural budget is what the schedule gives, about half of the tokens as a mean over layers; another one changes
``start`` (less) or ``end`` (more) and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from xcomp.compressor import About, PlannedDrop
from xcomp.schedule import check_names


class LPComp(PlannedDrop):
    """Cosine schedule, suffix rule."""

    about = About(
        "One Token per Highly Selective Frame (arXiv 2604.14149)",
        "after every layer",
        trained=True,
        deviates="rounds to the nearest, as the released code; the paper rounds up",
    )

    @dataclass
    class Config:
        schedule: str = "cosine"  # cosine, linear, steps, constant
        start: int | None = None  # tokens before the first layer; default all
        end: int = 1  # tokens at the last layer
        rounding: str = "nearest"  # nearest (released code) or ceil (paper)
        steps: dict[int, int] | None = None  # for schedule steps: layer (1-based) → tokens kept after it
        rule: str = "suffix"  # suffix, uniform, prefix, last_of_group, random
        seed: int = 0  # for rule random

        def __post_init__(self) -> None:
            check_names(schedule=self.schedule, rounding=self.rounding, rule=self.rule)
            if self.end < 1:
                raise ValueError(f"end is {self.end}; a frame must keep at least 1 token")

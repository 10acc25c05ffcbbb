"""Visual tokens made up for tests of the compressors that act before the language model."""

from __future__ import annotations

from importlib import import_module
from inspect import getmembers, isclass

import torch
from torch import Tensor

from xcomp.compressor import Compressor, QuestionTokens
from xcomp.visual import VisualTokens


def class_of(name: str) -> type[Compressor]:
    module = import_module(f"xcomp.compressors.{name}")
    return next(c for _, c in getmembers(module, isclass) if c.__module__ == module.__name__ and hasattr(c, "Config"))


def make(name: str, **options) -> Compressor:
    rule = class_of(name)
    return rule(rule.Config(**options))


def visual(
    num_frames: int,
    width: int,
    dim: int = 8,
    *,
    grid: tuple[int, int] | None = None,
    change: float = 0.5,
    seed: int = 0,
) -> VisualTokens:
    """A video whose frames differ from the one before by noise, with all that a tower can tell of it."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.randn(num_frames, width, dim, generator=g)
    # Each patch changes at its own pace, and some frames are cuts.
    pace = 0.5 * torch.rand(1, width, 1, generator=g) * (1 + 4 * (torch.rand(num_frames, 1, 1, generator=g) > 0.8))
    steps[1:] *= pace.expand(num_frames, -1, -1)[1:]
    n = num_frames * width
    tower = {
        "attention": torch.rand(n, generator=g),
        "cls_attention": torch.rand(n, generator=g),
        "keys": torch.randn(n, 6, generator=g),
        "hidden": torch.randn(n, 7, generator=g),
        "frame": torch.randn(num_frames, 5, generator=g).cumsum(0),
        "pooling_attention": torch.rand(n, generator=g),
    }
    return VisualTokens.from_frames(steps.cumsum(0), grid, tower)


def question(dim: int = 8, seed: int = 0) -> QuestionTokens:
    g = torch.Generator().manual_seed(seed)
    return QuestionTokens(torch.arange(5), torch.randn(5, dim, generator=g))


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """(n, D), (m, D) → (n, m) float64, pair by pair."""
    x, y = x.double(), y.double()
    return torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in y]) for a in x])

"""Budgets, and from one to a method's own parameters: what the methods that drop inside the language model share.

``stages`` are the layers (1-based) after which tokens leave: before the first of them every layer holds all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """A share of the visual tokens, by one of three measures.

    ``of``: ``input`` (tokens that enter the language model), ``final`` (tokens at its last layer) or ``layers`` (the
    mean over layers), each as a share of the tokens that the vision path gives.
    """

    keep: float  # share of the tokens that the vision path gives, above 0 and at most 1
    of: str = "layers"  # input (first layer), final (last layer) or layers (mean over them)

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not 0 < self.keep <= 1:
            raise ValueError(f"budget.keep is {self.keep}; it must be a share above 0 and at most 1")
        if self.of not in ("input", "final", "layers"):
            raise ValueError(f"budget.of is '{self.of}'; it must be input, final or layers")


def refuse(name: str, budget: Budget, why: str, nearest: float) -> ValueError:
    """The error of a method that cannot meet a budget."""
    return ValueError(
        f"{name}: a budget of {budget.keep:g} of {budget.of} cannot be met: {why}; the nearest possible is {nearest:g}"
    )


def check_input(name: str, budget: Budget) -> None:
    """ValueError unless a method that drops nothing before the first layer can meet this budget of the input."""
    if budget.of == "input" and budget.keep < 1:
        raise refuse(name, budget, "all tokens enter the language model", 1.0)


def just_above(share: float) -> float:
    """The next share of three decimals: what can be asked where ``share`` itself is out of reach."""
    return (math.floor(share * 1000 + 1e-9) + 1) / 1000


def mean_share(stages: Sequence[int], shares: Sequence[float], num_layers: int) -> float:
    """Mean over layers of the share held, where ``shares[i]`` of all tokens stay after layer ``stages[i]``."""
    ends = [*stages, num_layers]
    held = [1.0, *shares]
    return sum(share * (b - a) for share, a, b in zip(held, [0, *stages], ends)) / num_layers


def share_after(name: str, budget: Budget, stage: int, num_layers: int) -> float:
    """What a method that drops once, after layer ``stage``, has to keep then."""
    if budget.of == "final":
        return budget.keep
    share = (budget.keep * num_layers - stage) / (num_layers - stage)
    if share <= 1e-9:
        raise refuse(
            name, budget, f"the first {stage} of {num_layers} layers hold all tokens", just_above(stage / num_layers)
        )
    return min(1.0, share)


def solve(mean: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """The argument within ``low..high`` at which a growing function is ``wanted``."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < wanted else (low, middle)
    return high


def entering_and_staying(budget: Budget, stage: int, num_layers: int, stays: float) -> tuple[float, float]:
    """What a method keeps that acts before the first layer, and again after layer ``stage``, where ``stays`` stay.

    The share that enters, and the share of these that stays, which grows only where all tokens enter.
    """
    if budget.of == "input":
        return budget.keep, stays
    before = 0.0 if budget.of == "final" else stage / num_layers
    most = before + (1 - before) * stays
    if budget.keep <= most:
        return budget.keep / most, stays
    return 1.0, (budget.keep - before) / (1 - before)

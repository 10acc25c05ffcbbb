"""Tokens per frame at each layer of the language model, and which slots of a frame they are.

Counts come from a *schedule* (cosine, linear, steps, constant), slots from a *keep rule* (suffix, uniform, prefix,
last_of_group, random). A plan is both together: for every layer the ascending slots of a frame that are still there.
Source: "One Token per Highly Selective Frame" (arXiv 2604.14149), Section 3, Eq. 1 and its ablations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from xcomp.messages import nearest

SCHEDULES = ("cosine", "linear", "steps", "constant")
ROUNDINGS = ("nearest", "ceil")
RULES = ("suffix", "uniform", "prefix", "last_of_group", "random")


def token_counts(
    schedule: str,
    num_layers: int,
    tokens_per_frame: int,
    *,
    start: int | None = None,
    end: int = 1,
    rounding: str = "nearest",
    steps: Mapping[int, int] | None = None,
) -> list[int]:
    """Tokens a frame at layers 1..L.

    ``cosine`` and ``linear`` fall from ``start`` (default: all) before the first layer to ``end`` at the last;
    ``constant`` keeps ``end`` everywhere. ``steps`` maps a layer (1-based) to the tokens kept *after* it. Rounding
    ``nearest`` (half up) is the released code's, ``ceil`` the paper's Eq. 1.
    """
    check_names(schedule=schedule, rounding=rounding)
    start = tokens_per_frame if start is None else start
    if schedule == "steps":
        counts = _step_counts(steps or {}, num_layers, start)
    elif schedule == "constant":
        counts = [end] * num_layers
    else:
        counts = _ramp(schedule, num_layers, start, end, rounding)
    return check_counts(counts, tokens_per_frame)


def check_names(*, schedule: str = "cosine", rounding: str = "nearest", rule: str = "suffix") -> None:
    """ValueError for a schedule, rounding or keep rule that does not exist."""
    chosen = (("schedule", schedule, SCHEDULES), ("rounding", rounding, ROUNDINGS), ("keep rule", rule, RULES))
    for what, name, known in chosen:
        if name not in known:
            raise ValueError(f"unknown {what} '{name}';{nearest(name, known)} known: {', '.join(known)}")


def _ramp(schedule: str, num_layers: int, start: int, end: int, rounding: str) -> list[int]:
    counts = []
    for layer in range(1, num_layers + 1):
        depth = layer / num_layers
        share = (1 + math.cos(math.pi * depth)) / 2 if schedule == "cosine" else 1 - depth
        extra = (start - end) * share
        # 1e-9: floating point must not push a half down (1 - 0.9 is less than 0.1) nor a whole number up (cos(pi/2)).
        counts.append(end + (math.floor(extra + 0.5 + 1e-9) if rounding == "nearest" else math.ceil(extra - 1e-9)))
    return counts


def _step_counts(steps: Mapping[int, int], num_layers: int, start: int) -> list[int]:
    if not steps:
        raise ValueError("schedule 'steps' needs 'steps', e.g. {10: 4, 20: 1}: tokens a frame kept after each layer")
    wrong = [layer for layer in steps if not 1 <= int(layer) < num_layers]
    if wrong:
        raise ValueError(f"steps name layer {wrong[0]}, but a step comes after one of layers 1..{num_layers - 1}")
    counts, current = [], start
    for layer in range(1, num_layers + 1):
        counts.append(current)
        current = int(steps.get(layer, current))
    return counts


def check_counts(counts: Sequence[int], tokens_per_frame: int) -> list[int]:
    """``counts`` unchanged if they never grow and stay within 1..N; else ValueError."""
    previous = tokens_per_frame
    for layer, count in enumerate(counts, start=1):
        if count < 1:
            raise ValueError(f"the schedule keeps {count} tokens a frame at layer {layer}; at least 1 must stay")
        if count > tokens_per_frame:
            have = f"a frame has {tokens_per_frame}"
            raise ValueError(f"the schedule keeps {count} tokens a frame at layer {layer}; {have}")
        if count > previous:
            raise ValueError(f"the schedule grows from {previous} to {count} tokens a frame at layer {layer}")
        previous = count
    return list(counts)


def keep_slots(rule: str, counts: Sequence[int], tokens_per_frame: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    """The ascending slots (0-based) of a frame that are kept at each layer, for counts that never grow."""
    check_names(rule=rule)
    plan: list[tuple[int, ...]] = []
    current = tuple(range(tokens_per_frame))
    order: tuple[int, ...] = ()
    if rule in ("uniform", "random"):
        order = _uniform_removal(tokens_per_frame) if rule == "uniform" else _random_removal(tokens_per_frame, seed)
    for count in counts:
        if rule == "suffix":
            current = current[len(current) - count :]
        elif rule == "prefix":
            current = current[:count]
        elif rule == "last_of_group":
            current = _last_of_group(current, count)
        else:
            removed = set(order[: tokens_per_frame - count])
            current = tuple(s for s in range(tokens_per_frame) if s not in removed)
        plan.append(current)
    return plan


def _last_of_group(slots: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The last slot of each of ``count`` equal groups."""
    if len(slots) % count:
        raise ValueError(f"rule 'last_of_group' cannot cut {len(slots)} tokens into {count} equal groups")
    return slots[len(slots) // count - 1 :: len(slots) // count]


@lru_cache(maxsize=64)
def _random_removal(tokens_per_frame: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).permutation(tokens_per_frame).tolist())


@lru_cache(maxsize=64)  # cubic in N, and asked for at every prefill
def _uniform_removal(tokens_per_frame: int) -> tuple[int, ...]:
    """The order (0-based) in which slots leave so that the rest stays evenly spread; the last slot never leaves.

    Each time the slot goes whose removal leaves positions p_1 < … < p_n with the smallest sum over i < n of
    (p_i − i·N/n)². The grid is evaluated as (i/n)·N in float64 because rounding decides exact ties.
    """
    left, order = list(range(1, tokens_per_frame + 1)), []
    while len(left) > 1:
        n = len(left) - 1
        grid = [(i / n) * tokens_per_frame for i in range(1, n)]
        costs = []
        for out in range(n):
            rest = left[:out] + left[out + 1 :]
            costs.append(sum((p - g) ** 2 for p, g in zip(rest, grid)))  # zip stops before p_n
        order.append(left.pop(costs.index(min(costs))) - 1)
    return tuple(order)


def check_stages(layers: list[float]) -> None:
    """ValueError unless these are layer numbers from 1, or depths between 0 and 1."""
    if any(layer <= 0 or (layer > 1 and layer != int(layer)) for layer in layers):
        raise ValueError(f"layers {layers} must be layer numbers from 1, or depths between 0 and 1")


def stage_layers(name: str, layers: list[float], num_layers: int) -> list[int]:
    """The layers (1-based) after which tokens leave: numbers as they are, depths below 1 as a share of ``num_layers``.

    ValueError, in the name of a method, if they are not ascending or out of range.
    """
    # A depth that is small for this model still means a layer of it, and one drop a layer.
    wanted = [round(depth * num_layers) if depth < 1 else int(depth) for depth in layers]
    found: list[int] = []
    for layer, given in zip(wanted, layers):
        found.append(max(layer, found[-1] + 1 if found else 1) if given < 1 else layer)
    if any(a >= b for a, b in zip(found, found[1:])) or not 1 <= found[0] <= found[-1] < num_layers:
        raise ValueError(
            f"{name}: layers {layers} are {found} of {num_layers} layers; they must ascend within 1..{num_layers - 1}"
        )
    return found

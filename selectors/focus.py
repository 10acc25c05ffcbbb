"""FOCUS: frames found as a bandit problem. A few frames of each stretch are scored, and the promising ones looked into.

The candidates are cut into arms. A first look scores a few frames of each; arms are ranked by an upper confidence bound
(Bernstein's), and more frames are scored around the centres of the best. A share of the budget goes to the best frames
scored; the rest is drawn from the best arms, the likelier the higher the nearest score.

Only the frames that it asks for are scored, and decoded: give it many candidates (``sampling: {rate: 8, max_frames:
100000}``). Its paper runs on all frames of a video; here it runs on the run's candidates, so that arms of a comparison
choose from the same. A scorer that needs all candidates at once (``qc_comp``) is asked for all of them.

Source: "FOCUS: Efficient Keyframe Selection for Long Video Understanding" (arXiv 2510.27280) and its released code,
which scores by BLIP's image-text matching. There, what the second look finds does not change the arms, and linear
interpolation takes its points unsorted; both are so here unless ``update_arms`` (the paper's reading) is set.

Deviations. Random numbers start from the run's seed at each question, where the released code draws on through a whole
data set. Where the best arms have too few frames for the budget, those of the others
with the best nearest scores fill it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from xcomp.selector import Candidates, Picker, SelectionCost, check_budget

Scores = Callable[[Sequence[int]], np.ndarray]


class FOCUS(Picker):
    """Upper confidence bounds over stretches of the video."""

    on_demand = True

    @dataclass
    class Config:
        scorer: Any = field(
            default_factory=lambda: {"name": "clip_similarity", "checkpoint": "Salesforce/blip-itm-large-coco"}
        )  # the selector whose scores it picks from, with its options
        coarse_seconds: float = 16.0  # an arm's length
        fine_seconds: float = 1.0  # between the frames of the second look
        zoom_ratio: float = 0.25  # share of the arms that are looked into, and drawn from
        extra_samples: int = 2  # of an arm at the first look, beside its centre
        fine_uniform: float = 0.5  # share of the second look that is spread evenly; the rest is random
        top_ratio: float = 0.2  # share of the budget for the best frames scored
        temperature: float = 0.06  # of the softmax that an arm's frames are drawn by
        min_gap: float | None = None  # seconds between frames of different arms; None: by the budget, at most 1
        interpolation: str = "nearest"  # or linear: how a frame's score is guessed from those scored
        update_arms: bool = False  # the second look counts for the arms too (the paper)
        min_arms: int = 8  # at least so many arms at the first look, …
        min_zoom: int = 4  # … at the second, …
        max_final: int = 32  # … and at most so many that frames are drawn from (at least min_zoom)

        def __post_init__(self) -> None:
            for name in ("coarse_seconds", "fine_seconds", "temperature"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
            for name in ("zoom_ratio", "fine_uniform", "top_ratio"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be 0..1")
            for name, least in (("extra_samples", 0), ("min_arms", 1), ("min_zoom", 1), ("max_final", 1)):
                if getattr(self, name) < least:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
            if self.interpolation not in ("nearest", "linear"):
                raise ValueError(f"interpolation is '{self.interpolation}'; it must be nearest or linear")

    def pick(self, scores: Tensor, budget: int, frames: Candidates) -> list[int]:
        check_budget(budget)
        if budget >= len(frames):
            return list(range(len(frames)))
        return focus_frames(frames.scores, len(frames), frames.rate, budget, self.config, frames.rng()).chosen

    def cost(self, backbone, num_frames, query, compressor) -> SelectionCost | None:
        """The scorer's, of the most frames that will be asked for, which follows from the video's length alone."""
        asked = num_frames
        if self.asks_for_few and query.shown is not None and query.shown.duration > 0:
            cut = Arms.cut(num_frames, num_frames / query.shown.duration, self.config)
            looked_into = min(len(cut.bounds), cut.num_zoomed(self.config))
            first = len(cut.bounds) * min(cut.size, 1 + self.config.extra_samples)
            asked = min(num_frames, first + looked_into * cut.num_fine(num_frames, self.config))
        return self.scorer.cost(backbone, asked, query, compressor)


@dataclass(frozen=True)
class Arms:
    """The stretches of a video: ``bounds`` are their first and last frames, each ``size`` long; ``rate`` frames a
    second, ``half`` the half width of a second look, in frames."""

    bounds: list[tuple[int, int]]
    size: int
    rate: float
    half: int

    @classmethod
    def cut(cls, num_frames: int, rate: float, config: FOCUS.Config) -> Arms:
        duration = num_frames / rate
        wanted = max(config.min_arms, math.ceil(duration / config.coarse_seconds))
        count = max(1, num_frames // max(1, num_frames // wanted))
        size = num_frames // count  # what is left over at the end belongs to none
        half = round(max(1 / rate, duration / wanted / 2) * rate)
        return cls([(i * size, (i + 1) * size - 1) for i in range(count)], size, rate, half)

    def num_zoomed(self, config: FOCUS.Config) -> int:
        return max(config.min_zoom, math.ceil(len(self.bounds) * config.zoom_ratio))

    def num_final(self, config: FOCUS.Config) -> int:
        most = min(config.max_final, self.num_zoomed(config))
        return min(len(self.bounds), most)

    def num_fine(self, num_frames: int, config: FOCUS.Config) -> int:
        """Frames of a second look that is not cut short."""
        width = min(num_frames, 2 * self.half + 1)
        return max(1, width // max(1, round(config.fine_seconds * self.rate)))

    def centre(self, arm: int) -> int:
        return sum(self.bounds[arm]) // 2


@dataclass(frozen=True)
class Found:
    """What each step gave: frames scored at the first and the second look, bounds of the arms, those looked into."""

    arms: Arms
    coarse: list[int]
    bounds: np.ndarray
    zoomed: list[int]
    fine: list[int]
    chosen: list[int]


def focus_frames(
    score: Scores, num_frames: int, rate: float, budget: int, config: FOCUS.Config, rng: np.random.Generator
) -> Found:
    """Chooses ``budget`` of ``num_frames`` candidates, ``rate`` a second; ``score`` gives float64 scores of some."""
    arms = Arms.cut(num_frames, rate, config)
    sampled = [_first_look(arms, arm, config, rng) for arm in range(len(arms.bounds))]
    coarse = [i for frames in sampled for i in frames]
    known = dict(zip(coarse, score(coarse)))
    bounds = confidence_bounds([[known[i] for i in frames] for frames in sampled])
    order = np.argsort(bounds)[::-1].tolist()
    zoomed, fine = order[: arms.num_zoomed(config)], []
    for arm in zoomed:
        fine += _second_look(arms, arm, num_frames, {*coarse, *fine}, config, rng)
    known |= dict(zip(fine, score(fine)))
    if config.update_arms:
        for i in fine:
            if i // arms.size < len(sampled):
                sampled[i // arms.size].append(i)
        order = np.argsort(confidence_bounds([[known[i] for i in frames] for frames in sampled]))[::-1].tolist()
    ranked = sorted(known, key=lambda i: -known[i])
    chosen = ranked[: round(config.top_ratio * min(budget, len(known)))]
    drawn_from = order[: arms.num_final(config)]
    share, more = divmod(budget - len(chosen), len(drawn_from))
    gap = _gap(num_frames / rate / budget, config) * rate
    for place, arm in enumerate(drawn_from):
        chosen += _draw(arms, arm, share + (place < more), chosen, gap, sampled[arm], known, config, rng)
    if len(chosen) < budget:
        every = np.array(sorted(known))
        left = [i for i in range(num_frames) if i not in set(chosen)]
        guessed = [known[every[np.abs(every - i).argmin()]] for i in left]
        chosen += [left[j] for j in np.argsort(-np.array(guessed), kind="stable")[: budget - len(chosen)]]
    return Found(arms, coarse, bounds, zoomed, fine, sorted(chosen))


def _first_look(arms: Arms, arm: int, config: FOCUS.Config, rng: np.random.Generator) -> list[int]:
    first, last = arms.bounds[arm]
    others = [i for i in range(first, last + 1) if i != arms.centre(arm)]
    count = min(config.extra_samples, len(others))
    return [arms.centre(arm), *(rng.choice(others, size=count, replace=False).tolist() if count else [])]


def _second_look(
    arms: Arms, arm: int, num_frames: int, seen: set[int], config: FOCUS.Config, rng: np.random.Generator
) -> list[int]:
    """Frames around an arm's centre that were not scored yet: some in the middles of equal cells, the rest random."""
    first, last = max(0, arms.centre(arm) - arms.half), min(num_frames - 1, arms.centre(arm) + arms.half)
    width = last - first + 1
    count = max(1, width // max(1, round(config.fine_seconds * arms.rate)))
    num_even = round(count * config.fine_uniform)
    even = dict.fromkeys(first + int((j + 0.5) * width / num_even) for j in range(num_even))
    found = [i for i in even if i not in seen]
    left = [i for i in range(first, last + 1) if i not in seen and i not in even]
    num_random = min(count - num_even, len(left))
    return found + (rng.choice(left, size=num_random, replace=False).tolist() if num_random else [])


def confidence_bounds(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """(arms,): mean and an upper bound of its error (Bernstein's) from the scores of each arm."""
    total = math.log(sum(map(len, scores)))
    bounds = []
    for values in scores:
        variance = max(np.var(values), 1e-6)
        bounds.append(np.mean(values) + math.sqrt(2 * total * variance / len(values)) + 3 * total / len(values))
    return np.array(bounds)


def _gap(seconds_a_frame: float, config: FOCUS.Config) -> float:
    """Seconds between frames of different arms."""
    if config.min_gap is not None:
        return config.min_gap
    return 0.0 if seconds_a_frame <= 0.2 else min(1.0, 0.25 * seconds_a_frame)


def _draw(
    arms: Arms,
    arm: int,
    count: int,
    chosen: Sequence[int],
    gap: float,
    sampled: Sequence[int],
    known: dict[int, float],
    config: FOCUS.Config,
    rng: np.random.Generator,
) -> list[int]:
    """``count`` frames of an arm that are not chosen yet, the likelier the higher their guessed score."""
    first, last = arms.bounds[arm]
    left = np.array([i for i in range(first, last + 1) if i not in set(chosen)], dtype=np.int64)
    count = min(count, len(left))
    if not count:
        return []
    if gap > 0 and len(chosen):
        far = np.abs(left[:, None] - np.array(chosen)).min(1) >= int(gap)
        left = left[far] if far.any() else left
    points = sorted(sampled) if config.update_arms else list(sampled)
    values = np.array([known[i] for i in points])
    if config.interpolation == "linear":
        guessed = np.interp(left, points, values)
    else:
        guessed = values[np.abs(left[:, None] - np.array(points)).argmin(1)]
    spread = guessed.max() - guessed.min()
    scaled = (guessed - guessed.min()) / (spread + 1e-12) if spread > 0 else np.zeros(len(left))
    weights = np.exp((scaled - scaled.max()) / config.temperature)
    return rng.choice(left, size=min(count, len(left)), replace=False, p=weights / weights.sum()).tolist()

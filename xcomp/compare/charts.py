"""Where the marks of a chart go: axes with round ticks, points with whiskers, numbers beside them that do not collide.

Places are per cent of the plotting area, so that the drawing (``templates/charts.html.j2``) fills any width while its
text keeps its size. Nothing is drawn here, and nothing is known of arms or runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The size in pixels at which collisions are looked for; wider areas only have more room.
NOMINAL = (400, 240)
_OFFSETS = ((9, 4), (-9, 4), (0, -10), (0, 18), (9, -8), (-9, -8), (9, 15), (-9, 15))  # of a number from its point
_APART = 9  # pixels between points that have the same place on the x axis
_SPREAD = 60  # that all of them together may take


@dataclass(frozen=True)
class Tick:
    """``at`` in per cent."""

    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A scale from ``low`` to ``high``; ``ticks`` lie within."""

    low: float
    high: float
    log: bool
    ticks: tuple[Tick, ...]

    def place(self, value: float) -> float:
        """Per cent of the way from low to high; what lies beyond is moved to the end."""
        return _place(value, self.low, self.high, self.log)


@dataclass(frozen=True)
class Point:
    """A mark at (x, y) with a whisker from ``low`` to ``high``, all in per cent from the top left.

    Points of one place stand side by side. ``dx``, ``dy`` (pixels) is where ``number`` goes.
    """

    number: int
    x: float
    y: float
    low: float
    high: float
    dx: float
    dy: float


def _place(value: float, low: float, high: float, log: bool) -> float:
    if log:
        value, low, high = (math.log(max(number, 1e-300)) for number in (value, low, high))
    return round(min(max(100 * (value - low) / (high - low), 0.0), 100.0), 2)


def round_steps(low: float, high: float, most: int = 6) -> list[float]:
    """Evenly spaced multiples of 1, 2 or 5 times a power of ten from the last at or below ``low`` to the first at or
    above ``high``: at most ``most`` of them."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    exponent = math.floor(math.log10((high - low) / most)) - 1
    while True:
        for factor in (1, 2, 5):
            step = factor * 10.0**exponent
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            if last - first + 1 <= most:
                return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
        exponent += 1


def linear(values: Sequence[float], label: Callable[[float], str], *, zero: bool = False, most: int = 6) -> Axis:
    """An axis over the values, from tick to tick; with ``zero`` it begins at 0."""
    steps = round_steps(0.0 if zero else min(values), max(values), most)
    low, high = steps[0], steps[-1]
    return Axis(low, high, False, tuple(Tick(_place(step, low, high, False), label(step)) for step in steps))


def spread(values: Sequence[float], label: Callable[[float], str], most: int = 6) -> Axis:
    """An axis for a cost: logarithmic where the values span more than a factor of three, else from zero."""
    lowest, highest = min(values), max(values)
    if lowest <= 0 or highest <= 3 * lowest:
        return linear(values, label, zero=True, most=most)
    low, high = lowest / 1.25, highest * 1.25
    own = sorted(set(values))
    whole = all(value == round(value) for value in own) and all(b >= 1.4 * a for a, b in zip(own, own[1:]))
    if not (whole and len(own) <= most):  # a few round budgets name themselves
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        series = ([f * 10.0**e for e in decades for f in factors] for factors in ((1, 2, 5), (1,)))
        within = [[value for value in values if low <= value <= high] for values in series]
        own = within[0] if len(within[0]) <= most + 1 else within[1]
        own = own[:: math.ceil(len(own) / most)] if len(own) > most + 1 else own
    return Axis(low, high, True, tuple(Tick(_place(value, low, high, True), label(value)) for value in own))


def points(marks: Sequence[tuple[int, float, float, float, float]], x: Axis, y: Axis) -> list[Point]:
    """Places of marks (number, cost, value, low, high); y grows upwards."""
    places = [(x.place(cost), *(100 - y.place(v) for v in (value, low, high))) for _, cost, value, low, high in marks]
    shifts = _side_by_side([place[0] * NOMINAL[0] / 100 for place in places])
    taken = [(p[0] * NOMINAL[0] / 100 + s, p[1] * NOMINAL[1] / 100) for p, s in zip(places, shifts)]
    result = []
    for (number, *_), place, (left, top) in zip(marks, places, list(taken)):

        def room(offset: tuple[int, int], left: float = left, top: float = top) -> float:
            spot = left + 1.3 * offset[0], top + offset[1] - 4
            inside = -4 <= spot[0] <= NOMINAL[0] + 10 and 0 <= spot[1] <= NOMINAL[1]
            nearest = min((math.hypot(spot[0] - a, spot[1] - b) for a, b in taken if (a, b) != (left, top)), default=99)
            return min(nearest, 14.0) if inside else -1.0

        dx, dy = max(_OFFSETS, key=room)
        taken.append((left + 1.3 * dx, top + dy - 4))
        result.append(Point(number, *(round(p, 2) for p in (100 * left / NOMINAL[0], *place[1:])), dx, dy))
    return result


def _side_by_side(lefts: Sequence[float]) -> list[float]:
    """How far to shift each point so that those within a few pixels of each other stand apart."""
    order, shifts = sorted(range(len(lefts)), key=lambda i: lefts[i]), [0.0] * len(lefts)
    while order:
        crowd = [order.pop(0)]
        while order and lefts[order[0]] - lefts[crowd[-1]] < _APART - 1:
            crowd.append(order.pop(0))
        middle, gap = (len(crowd) - 1) / 2, min(_APART, _SPREAD / len(crowd))
        centre = sum(lefts[i] for i in crowd) / len(crowd)
        if len(crowd) > 1:
            for place, i in enumerate(crowd):
                shifts[i] = centre + (place - middle) * gap - lefts[i]
    return shifts

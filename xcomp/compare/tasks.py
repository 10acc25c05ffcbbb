"""Which process takes which video: by expected cost, most expensive first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class VideoTask:
    """A video, or a span of it in seconds, and, for each arm, the ids of the questions that are open."""

    video: str
    open: dict[str, list[str]]
    span: tuple[float, float] | None = None

    @property
    def num_open(self) -> int:
        return sum(map(len, self.open.values()))


def share_out(tasks: Sequence[VideoTask], num_processes: int) -> list[list[VideoTask]]:
    """One list a process, each from the most expensive video to the cheapest; every video goes where least is to do.

    The expected cost of a video is half its share of all bytes, which decoding goes by, and half its share of all open
    questions. (Graham's rule of the longest first, which is at most 4/3 of the best division.)
    """
    sizes, counts = [_bytes(task.video) for task in tasks], [task.num_open for task in tasks]
    costs = [size / max(1, sum(sizes)) + count / max(1, sum(counts)) for size, count in zip(sizes, counts)]
    shares: list[list[VideoTask]] = [[] for _ in range(num_processes)]
    loads = [0.0] * num_processes
    for place in sorted(range(len(tasks)), key=lambda i: (-costs[i], tasks[i].video, tasks[i].span or ())):
        process = loads.index(min(loads))
        shares[process].append(tasks[place])
        loads[process] += costs[place]
    return shares


def _bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0

"""Who used what, and what it took: the cost of work that many questions share, told for each of them.

Everything that is computed for a video (a piece decoded, a clip encoded, a video run through the language model) is a
:class:`Work` with its own seconds and multiply-accumulates and the works that it needed. A question's cost *alone* is
the sum over all that its answer needed, directly or not: what it would have cost on a fresh video. Its *amortised* cost
divides each work by the number of questions that needed it; over all questions of a video these add up to what was
really spent.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

STAGES = ("decode", "vision", "select", "compress", "prefill", "answer")


@dataclass(eq=False)
class Work:
    """One piece of work of a stage. ``seconds`` are its own, without those of the works that it needed."""

    stage: str
    seconds: float = 0.0
    macs: int = 0
    needs: set[Work] = field(default_factory=set)

    def all(self) -> set[Work]:
        """This work and everything that it needed, directly or not."""
        found, left = {self}, [self]
        while left:
            new = left.pop().needs - found
            found |= new
            left += new
        return found


class Ledger:
    """Measures works. ``wait`` blocks until the device is idle, so that a stage's seconds are its own."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self._wait = wait
        self._open: list[Work] = []
        self._since = 0.0
        self.seconds_waiting = 0.0  # for works of other processes

    @contextmanager
    def work(self, stage: str) -> Iterator[Work]:
        """A new work, needed by the one that is being measured around it."""
        work = Work(stage)
        self.use(work)
        with self.charge(work):
            yield work

    @contextmanager
    def charge(self, work: Work) -> Iterator[None]:
        """Seconds inside, but for those of works inside, are added to ``work``."""
        self._stop()
        self._open.append(work)
        try:
            yield
        finally:
            self._stop()
            self._open.pop()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Seconds inside are nobody's: another process works meanwhile, and tells its own."""
        self._stop()
        started = self.clock()
        try:
            yield
        finally:
            self._since = self.clock()
            self.seconds_waiting += self._since - started

    def use(self, work: Work) -> None:
        """The work that is being measured needs ``work``, which may be done already."""
        if self._open and work is not self._open[-1]:
            self._open[-1].needs.add(work)

    def _stop(self) -> None:
        """The work measured so far gets its seconds; the clock goes on for the next."""
        self._wait()
        now = self.clock()
        if self._open:
            self._open[-1].seconds += now - self._since
        self._since = now


@dataclass(frozen=True)
class Share:
    """A question's cost by stage: seconds and MACs alone, seconds amortised."""

    seconds: dict[str, float]
    seconds_amortised: dict[str, float]
    macs: dict[str, int]


def shares(users: Mapping[Hashable, Work]) -> dict[Hashable, Share]:
    """The cost of each user's work, all users of a video known."""
    used = {user: work.all() for user, work in users.items()}
    counts = Counter(work for works in used.values() for work in works)
    found = {}
    for user, works in used.items():
        alone, amortised, macs = ({stage: 0 for stage in STAGES} for _ in range(3))
        for work in works:
            alone[work.stage] += work.seconds
            amortised[work.stage] += work.seconds / counts[work]
            macs[work.stage] += work.macs
        found[user] = Share(*({s: round(v, 6) for s, v in part.items()} for part in (alone, amortised)), macs)
    return found

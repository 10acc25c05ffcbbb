"""Records that a run does not train on: each is named, counted and known to the run that resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from xcomp.config import ConfigError
from xcomp.data.sources import Refused

FILE = "skipped.jsonl"


class Skipped:
    """The records of one set, ``train`` or ``validation``, that are left out, in a file of the run folder.

    One JSON line each: ``set``, ``record`` (its file and place), ``media``, ``reason``. Several processes may add to
    the file; lines that a kill cut short are passed over. ``most``: how many may be left out.
    """

    def __init__(self, folder: Path, name: str, most: int, total: int, share: float):
        self.path, self.name = folder / FILE, name
        self.most, self.total, self.share = most, total, share
        self.source = "tune.data" if name == "train" else f"tune.{name}"
        self.known: dict[str, str] = {}
        self._read()

    def _read(self) -> None:
        for line in self.path.read_text(encoding="utf-8").split("\n") if self.path.is_file() else ():
            try:
                entry = json.loads(line)
                if entry["set"] == self.name:
                    self.known[entry["record"]] = entry["reason"]
            except (ValueError, KeyError, TypeError):
                continue

    def __contains__(self, where: str) -> bool:
        return where in self.known

    def __len__(self) -> int:
        return len(self.known)

    def add(self, refused: Refused) -> None:
        """Note a record, once. ConfigError if it is one too many."""
        if refused.where not in self.known:
            self.known[refused.where] = refused.reason
            entry = {"set": self.name, "record": refused.where, "media": refused.media, "reason": refused.reason}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:  # one write: lines of several processes do not mix
                file.write(("" if self._ends_a_line() else "\n").encode() + (json.dumps(entry) + "\n").encode())
            self._read()  # what other processes have left out
        self.check()

    def check(self) -> None:
        """ConfigError if there are more than may be."""
        if len(self) > self.most:
            *_, last = self.known.values()
            raise ConfigError(
                f"{len(self)} of the {self.total} records of {self.source} are left out, more than "
                f"tune.max_skipped={self.share:g} allows; the last: {last}; all of them are in {self.path}, and one "
                "whose line is deleted there is tried again"
            )

    def _ends_a_line(self) -> bool:
        with self.path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return True
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

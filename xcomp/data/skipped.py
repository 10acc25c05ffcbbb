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
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").split("\n"):
                try:
                    entry = json.loads(line)
                    if entry["set"] == name:
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
        if len(self) > self.most:
            raise ConfigError(
                f"{len(self)} of the {self.total} records of {self.source} are "
                f"left out, more than tune.max_skipped={self.share:g} allows; the last: {refused.reason}; all of them "
                f"are in {self.path}"
            )

    def _ends_a_line(self) -> bool:
        with self.path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return True
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

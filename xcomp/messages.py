"""What error messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """`` did you mean 'x'?`` for the known word nearest to ``word``, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" did you mean '{found[0]}'?" if found else ""


def printable(name: str) -> str:
    """A file's name for a line of text: names may hold line breaks, and bytes that are no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)

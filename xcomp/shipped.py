"""What ships with the package: configurations and checkpoints, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xcomp


def built_in(folder: str, pattern: str) -> dict[str, Path]:
    """What lies in ``configs`` or ``checkpoints``, by name relative to it and without ``.yaml``."""
    found = {}
    for root in xcomp.__path__:
        for path in sorted((Path(root) / folder).glob(pattern)):
            found[path.relative_to(Path(root) / folder).with_suffix("").as_posix()] = path
    return found


def is_toy(checkpoint: Any) -> bool:
    """Whether a checkpoint is one that ships: trained on generated videos alone, it knows nothing of real ones."""
    return checkpoint in built_in("checkpoints", "*")

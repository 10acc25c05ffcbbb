"""Reference vectors: what released code computes. ``$XCOMP_GOLDEN``, else ``../shared/golden``, else the few in here.

``tests/vectors/`` has a small part of them, so that parity is tested in every clone.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

SMALL = Path(__file__).parent / "vectors"
_elsewhere = os.environ.get("XCOMP_GOLDEN") or Path(__file__).resolve().parents[2] / "shared" / "golden"
ROOT = Path(_elsewhere) if "XCOMP_GOLDEN" in os.environ or Path(_elsewhere).is_dir() else SMALL
FOLDER = ROOT / "videochat_flash_tiny"
needs_golden = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no reference vectors in {ROOT}; set XCOMP_GOLDEN to their folder"
)


@dataclass(frozen=True)
class Case:
    """One case of a method: parameters, and the tensors that go in and come out by name."""

    name: str
    params: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    note: str = ""

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.inputs, **self.outputs}


@cache
def cases(method: str) -> list[Case]:
    """All cases of a method in ``baselines/``; none where there is no such folder."""
    path = ROOT / "baselines" / f"{method}.json"
    if not path.is_file():
        return []
    tensors = load_file(path.with_suffix(".safetensors"))

    def named(case: dict[str, Any], side: str) -> dict[str, Tensor]:
        return {name: tensors[f"{case['name']}.{name}"] for name in case.get(side, {})}

    return [
        Case(case["name"], case["params"], named(case, "inputs"), named(case, "outputs"), case.get("note", ""))
        for case in json.loads(path.read_text())["cases"]
    ]


def each_case(method: str, prefix: str = "") -> pytest.MarkDecorator:
    """Parametrizes a test with ``case``: those of a method whose names begin so."""
    found = [case for case in cases(method) if case.name.startswith(prefix)]
    return pytest.mark.parametrize("case", found, ids=[case.name for case in found])

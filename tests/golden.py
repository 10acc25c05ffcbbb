"""Reference vectors: what released code computes. ``$XCOMP_GOLDEN``, else ``../shared/golden``, else the few in here.

``tests/vectors/`` has a small part of them, so that parity is tested in every clone.
"""

from __future__ import annotations

import atexit
import json
import lzma
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

SMALL = Path(__file__).resolve().parent / "vectors"


def _unpacked(folder: Path) -> Path:
    """A copy of the small checkpoint whose weights are stored compressed, for as long as the tests run."""
    place = Path(tempfile.mkdtemp(prefix="xcomp_vectors_"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for path in folder.iterdir():
        if path.suffix == ".xz":
            (place / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
        else:
            shutil.copy(path, place)
    return place


_given = os.environ.get("XCOMP_GOLDEN")
_beside = Path(__file__).resolve().parents[2] / "shared" / "golden"
ROOT = Path(_given).resolve() if _given else _beside if _beside.is_dir() else SMALL
FOLDER = _unpacked(SMALL / "videochat_flash_tiny") if ROOT == SMALL else ROOT / "videochat_flash_tiny"
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

"""The least that a plugin needs for a tiny form. A plugin that is not listed is checked with its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import ARCHITECTURE
from tiny_clip import save_tiny_clip

from xcomp.registry import plugins


def names_of(kind: str) -> list[str]:
    """All plugins of a kind. None at all is an error: a test over them would check nothing."""
    found = list(plugins(kind))
    assert found, f"the registry finds no {kind}"
    return found


def backbone_options(name: str, tokenizer: Path) -> dict[str, Any]:
    return {"videochat_flash": {"architecture": ARCHITECTURE, "tokenizer": str(tokenizer)}}.get(name, {})


def selector_options(name: str, folder: Path) -> dict[str, Any]:
    return {"checkpoint": save_tiny_clip(folder / "clip")} if name == "clip_similarity" else {}


def benchmark_options(name: str, folder: Path) -> dict[str, Any]:
    return {"num_videos": 3, "seconds": 4.0, "size": 32, "root": str(folder)} if name == "needle" else {}

"""Damage to checkpoint folders, and the check that a loader says what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], Any]


def edit(name: str, change: Callable[[dict], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def edit_tensors(change: Callable[[dict], Any]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def drop_tensors(part: str) -> Damage:
    """Takes out the tensors in whose name ``part`` occurs."""

    def drop(tensors: dict) -> None:
        for name in [n for n in tensors if part in n]:
            del tensors[name]

    return edit_tensors(drop)


def cut(folder: Path) -> None:
    """Takes the end off the weights' file."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_refused(sound: dict[str, bytes], folder: Path, damage: Damage, message: str, load: Callable) -> None:
    """A sound checkpoint, damaged in ``folder``, is refused in one line that matches ``message``."""
    for name, content in sound.items():
        (folder / name).write_bytes(content)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)

"""Tuning runs on needle videos that take moments, and what they leave behind."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def tuning_config(run: dict, videos: dict, name: str, top: dict | None = None, **options: Any) -> dict[str, Any]:
    """A tuning configuration: 8 records, 4 batches an epoch. Options of ``tune`` by name, others as ``top``."""
    needle = {"name": "needle", "split": "train", **videos}
    settings = {"data": [{"benchmark": needle, "tasks": ["open"]}], "frames": [4, 8], "steps": 6, "batch_size": 2}
    settings |= {"learning_rate": 1e-3, "save_every": 2, "num_workers": 0, "train": ["llm", "projector"], **options}
    if settings.get("validation") is True:
        settings["validation"] = settings["data"]
    trainer = {**run["trainer"], "log_every_n_steps": 1, **(top or {}).get("trainer", {})}
    return {**run, "name": name, **(top or {}), "tune": settings, "trainer": trainer}


def checkpoints(folder: Path) -> list[str]:
    """Names of all that lies in a run's folder of checkpoints, but the one with the lowest validation loss."""
    return sorted(path.name for path in (folder / "checkpoints").glob("*") if not path.name.startswith("best-"))


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logged(folder: Path, column: str = "train/loss") -> dict[int, str]:
    """Step → value over all starts of a run, later ones over earlier ones."""
    found = {}
    for path in sorted(folder.glob("logs/version_*/metrics.csv")):
        with path.open() as file:
            found |= {int(row["step"]): row[column] for row in csv.DictReader(file) if row.get(column)}
    return found

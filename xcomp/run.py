"""The run folder: what a command was asked to do, with which versions and hardware, so that it can be resumed and read.

A folder belongs to one configuration; running another one into it is an error, not a mixture.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xcomp
from xcomp.config import ConfigError, RunConfig
from xcomp.registry import nearest

if TYPE_CHECKING:
    from lightning import Trainer

SCHEMA = 1
_PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "omegaconf", "decord", "av", "numpy")
# What may change between a run and its continuation without changing a single record of it.
_FREE_KEYS = ("output",)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is either whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def open_run(config: RunConfig, command: str, **extra: Any) -> Path:
    """Create or reopen the run folder of a configuration and return it.

    Raises:
        ConfigError: as ``check_run`` does.
    """
    check_run(config, command)
    folder, written = config.folder, config.written()
    if "benchmark" in extra and extra["benchmark"]["name"] == config.benchmark:  # which may hold an interpolation
        extra["benchmark"] = {**extra["benchmark"], "name": written["benchmark"]}
    description = {
        "schema": SCHEMA,
        "kind": command,
        "name": config.name,
        "config": _plain(written),
        **extra,
        "versions": versions(),
        "hardware": hardware(),
        "git_commit": git_commit(),
    }
    path = folder / "run.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(description, indent=1))
    return folder


def check_run(config: RunConfig, command: str) -> None:
    """Writes nothing. Commands call it first, so that a folder they cannot use costs no time and leaves no files.

    Raises:
        ConfigError: if the run folder cannot be written, or belongs to a different configuration or command; the
            message names the first difference.
    """
    folder = config.folder
    there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = "is not writable" if there.is_dir() else "is a file"
        raise ConfigError(f"run folder '{folder}' cannot be made: '{there}' {problem}; choose another 'output'")
    if (folder / "run.json").is_file():
        _check_same(folder / "run.json", command, _plain(config.written()))


def _check_same(path: Path, command: str, config: dict[str, Any]) -> None:
    way_out = "choose another 'name', or delete the folder"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"'{path}' is not JSON ({error}); {way_out}") from error
    if not isinstance(before, dict) or not isinstance(before.get("config"), dict):
        raise ConfigError(f"'{path}' describes no run; {way_out}")
    if before.get("kind") != command:
        raise ConfigError(f"run folder '{path.parent}' belongs to 'xcomp {before.get('kind')}'; {way_out}")
    old, new = (_flat({k: v for k, v in c.items() if k not in _FREE_KEYS}) for c in (before["config"], config))
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"run folder '{path.parent}' belongs to a different config: {key} was {old.get(key)!r}, "
                f"now {new.get(key)!r}; {way_out}"
            )


def make_trainer(given: Mapping[str, Any], **defaults: Any) -> Trainer:
    """Lightning's Trainer with ``defaults`` overridden by ``given``, the ``trainer`` of a configuration.

    Raises:
        ConfigError: if Lightning does not know an option, or refuses its value.
    """
    from lightning import Trainer
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    # Not callbacks: they are objects, which a YAML file cannot name.
    known = [name for name in inspect.signature(Trainer).parameters if name != "callbacks"]
    for key in given:
        if key not in known:
            raise ConfigError(f"trainer has no option '{key}';{nearest(str(key), known)} see lightning.Trainer")
    try:
        return Trainer(**{**defaults, **given})
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as ``a.b[0].c`` keys."""
    if isinstance(value, dict):
        return {k: v for key, x in value.items() for k, v in _flat(x, f"{prefix}.{key}" if prefix else key).items()}
    if isinstance(value, list):
        return {k: v for i, x in enumerate(value) for k, v in _flat(x, f"{prefix}[{i}]").items()}
    return {prefix: value}


def versions() -> dict[str, str]:
    """Versions of Python, xcomp and the libraries that results depend on."""
    found = {"python": platform.python_version(), "xcomp": xcomp.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerators."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git_commit() -> str | None:
    """The checkout's commit, with ``+`` if it has changes; None outside one."""
    root = Path(xcomp.__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    if not (root / ".git").exists():
        return None
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None

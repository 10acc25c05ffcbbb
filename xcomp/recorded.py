"""What a tuned checkpoint says of its tuning: ``xcomp.json`` beside the released files, which others need not read.

It names the compressor that was on, with all options, so that ``compressor: recorded`` takes it from there, and an arm
that uses the checkpoint without it is told.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

from xcomp.checkpoint import find_folder, read_json, write_json
from xcomp.compressor import Chain, Compressor
from xcomp.config import ConfigError, component_parts, split_component
from xcomp.registry import PluginError, configure
from xcomp.shipped import built_in

RECORD, RECORDED = "xcomp.json", "recorded"


def write_record(folder: Path, compressor: Compressor, base: str | None = None, **tuned: Any) -> None:
    """Say in a checkpoint folder which compressor it was tuned with; ``tuned`` is for people.

    ``base``: the checkpoint that a folder of adapters belongs to.
    """
    parts = list(compressor.parts) if isinstance(compressor, Chain) else [compressor]
    nodes = [{"name": part.plugin_name, **dataclasses.asdict(part.config)} for part in parts]
    content = {"compressor": nodes[0] if len(nodes) == 1 else nodes, "tuned": tuned}
    write_json(Path(folder) / RECORD, content if base is None else {**content, "base": base})


def recorded_compressor(backbone: Any) -> Any:
    """The node of the compressor that a backbone node's checkpoint was tuned with; None where none is recorded.

    A hub id is not asked for: the released checkpoints record none.
    """
    checkpoint = backbone.get("checkpoint") if isinstance(backbone, dict) else None
    if not isinstance(checkpoint, str) or not (os.path.isdir(checkpoint) or checkpoint in built_in("checkpoints", "*")):
        return None
    path = find_folder(checkpoint) / RECORD
    if not path.is_file():
        return None
    node = read_json(path).get("compressor")
    for part in component_parts("compressor", node):
        split_component("compressor", part)
    return _whole_keys(node)


def _whole_keys(value: Any) -> Any:
    """JSON's keys are text; those of options may be numbers."""
    if isinstance(value, dict):
        return {int(k) if k.isdigit() else k: _whole_keys(v) for k, v in value.items()}
    return [_whole_keys(v) for v in value] if isinstance(value, list) else value


def resolved_compressor(node: Any, backbone: Any, where: str) -> Any:
    """``node``, or what the backbone's checkpoint records where it is ``recorded``."""
    if node not in (RECORDED, {"name": RECORDED}):
        return node
    found = recorded_compressor(backbone)
    if found is None:
        checkpoint = backbone.get("checkpoint") if isinstance(backbone, dict) else None
        raise ConfigError(f"{where}: compressor is 'recorded', but checkpoint '{checkpoint}' records none; name one")
    return found


@rank_zero_only
def tell_others(uses: Iterable[tuple[str, Any, Any]], plugins: Sequence[str]) -> None:
    """A line on stderr for each checkpoint that is used otherwise than it was tuned.

    ``uses``: what it is called, a backbone node and a compressor node.
    """
    others: dict[str, tuple[str, list[str]]] = {}
    for name, backbone, compressor in uses:
        recorded = recorded_compressor(backbone)
        if recorded is not None and (how := _difference(recorded, compressor, plugins)):
            others.setdefault(backbone["checkpoint"], (_named(recorded), []))[1].append(f"{name} ({how})")
    for checkpoint, (recorded, names) in others.items():
        print(
            f"xcomp: checkpoint '{checkpoint}' was tuned with {recorded}, not so: {', '.join(names)}", file=sys.stderr
        )


def _named(node: Any) -> str:
    return " + ".join(split_component("compressor", part)[0] for part in component_parts("compressor", node))


def _difference(recorded: Any, used: Any, plugins: Sequence[str]) -> str:
    """What another compressor than the recorded one is, in a few words; empty where it is the same."""
    if _named(recorded) != _named(used):
        return _named(used)
    for ours, theirs in zip(component_parts("compressor", used), component_parts("compressor", recorded)):
        name, options = split_component("compressor", ours)
        if "budget" in options:
            return "a budget of its own"
        try:
            own = dataclasses.asdict(configure("compressor", name, options, plugins)[1])
            then = dataclasses.asdict(configure("compressor", *split_component("compressor", theirs), plugins)[1])
        except PluginError:  # recorded by a version with other options
            return "other options"
        if wrong := next((key for key in own if json.dumps(own[key]) != json.dumps(then.get(key))), None):
            return f"{wrong}: {own[wrong]}, then {then.get(wrong)}"
    return ""

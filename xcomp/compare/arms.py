"""Arms: the rows of a comparison, each a backbone, a compressor, a selector and a frame budget."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from xcomp.config import (
    ConfigError,
    RunConfig,
    arm_seeds,
    check_component,
    check_equal,
    component_parts,
    frame_budgets,
    split_component,
)
from xcomp.messages import nearest
from xcomp.recorded import resolved_compressor
from xcomp.registry import load_class

PARTS = ("backbone", "compressor", "selector")
# Where and how a backbone computes: the run's holds for every arm, whatever backbone the arm names.
COMPUTING = ("device", "dtype", "attn_implementation")


@dataclass(frozen=True)
class ResolvedArm:
    """One arm with nothing left to default. ``group`` is its name without the frame budget and the seed, ``method``
    tells arms that differ in these alone from others.

    ``published`` is what a paper says of it; ``written`` holds its parts with interpolations as the file writes them.
    """

    name: str
    group: str
    backbone: Any
    compressor: Any
    selector: Any
    frames: int | None
    seed: int | None = None
    method: str = ""
    published: dict[str, float] = field(default_factory=dict, compare=False)
    written: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def description(self) -> dict[str, Any]:
        """As run.json lists it."""
        shown = {
            key: getattr(self, key) for key in ("name", "group", "method", *PARTS, "frames", "seed")
        } | self.written
        published = {"published": self.published} if self.published else {}
        return {**shown, "checkpoint": _options(shown["backbone"]).get("checkpoint"), **published}

    def config(self, run: RunConfig) -> RunConfig:
        """The run's configuration with this arm's parts."""
        parts = {k: getattr(self, k) for k in (*PARTS, "frames")}
        return replace(run, **parts, seed=run.seed if self.seed is None else self.seed, arms=[])


def single(config: RunConfig) -> RunConfig:
    """The run's own backbone, compressor and selector as the only arm, for ``xcomp evaluate``."""
    return replace(config, arms=[], reference=None, hard=None)


def resolve_arms(config: RunConfig) -> list[ResolvedArm]:
    """The arms of a run, checked: plugins exist, options fit, names differ. Without ``arms``, the run itself is one."""
    resolved, run, written = [], config.to_dict(), config.written()
    for number, (own, own_written) in enumerate(zip(run["arms"] or [{}], written["arms"] or [{}])):
        where = f"arms[{number}]"
        for seed in arm_seeds(own.get("seed"), where):
            resolved += _of_seed(config, run, written, own, own_written, seed, where)
    _check_names(resolved)
    _check_report(config, resolved)
    return resolved


def _of_seed(
    config: RunConfig,
    run: Mapping[str, Any],
    written: Mapping[str, Any],
    own: Mapping[str, Any],
    own_written: Mapping[str, Any],
    seed: int | None,
    where: str,
) -> list[ResolvedArm]:
    """An entry of ``arms`` with one of its seeds: an arm for each of its frame budgets."""
    unfilled, own, own_written = own, _filled(own, seed, where), _filled(own_written, seed, where)
    backbone = own.get("backbone") or config.backbone
    if backbone is None:
        raise ConfigError(f"{where}: no backbone; name one for the run or the arm")
    options = load_class("backbone", split_component("backbone", backbone)[0], config.plugins).Config
    computing = {f.name for f in fields(options)} & set(COMPUTING)
    parts, parts_written = _parts(run, own, computing), _parts(written, own_written, computing)
    if (found := resolved_compressor(parts["compressor"], parts["backbone"], where)) != parts["compressor"]:
        parts["compressor"] = parts_written["compressor"] = found
    for kind, node in parts.items():
        check_component(kind, node, config.plugins)
    names = [
        split_component(kind, part)[0]
        for kind in ("compressor", "selector")
        for part in component_parts(kind, parts[kind])
    ]
    group = " + ".join(names) if own.get("name") is None else unfilled["name"]
    method = hashlib.sha256(json.dumps([unfilled.get(kind) for kind in PARTS], sort_keys=True).encode()).hexdigest()
    name = group if own.get("name") is None else own["name"]
    several = isinstance(unfilled.get("seed"), (list, tuple)) and len(unfilled["seed"]) > 1
    behind = f", seed {seed}" if several and name == group else ""
    budgets = frame_budgets(config.frames if own.get("frames") is None else own["frames"], where)
    told = {"seed": seed, "method": method[:12], "published": own.get("published") or {}, "written": parts_written}
    names = [f"{name}, {n} frames{behind}" if len(budgets) > 1 else name + behind for n in budgets]
    return [ResolvedArm(name, group, **parts, frames=n, **told) for name, n in zip(names, budgets)]


def _filled(value: Any, seed: int | None, where: str) -> Any:
    """What an arm says, with its seed in place of ``{seed}``."""
    if isinstance(value, str) and "{seed}" in value:
        if seed is None:
            raise ConfigError(f"{where}: {value!r} names {{seed}}, but the arm has no 'seed'")
        return value.replace("{seed}", str(seed))
    if isinstance(value, Mapping):
        return {key: _filled(item, seed, where) for key, item in value.items()}
    return [_filled(item, seed, where) for item in value] if isinstance(value, list) else value


def _parts(run: Mapping[str, Any], arm: Mapping[str, Any], computing: set[str]) -> dict[str, Any]:
    """An arm's backbone, compressor and selector; ``computing``: which of ``COMPUTING`` are options of its backbone."""
    parts = {kind: _part(run[kind], arm.get(kind)) for kind in PARTS}
    given = {key: value for key, value in _options(run["backbone"]).items() if key in computing}
    if given:
        backbone = parts["backbone"]
        parts["backbone"] = {"name": _name(backbone), **given, **_options(backbone)}
    return parts


def _part(node: Any, own: Any) -> Any:
    """The run's component, or the arm's own; of the same plugin, the arm's options over the run's."""
    if own is None:
        return node
    same = isinstance(own, Mapping) and isinstance(node, Mapping) and _name(own) == _name(node)
    return {**node, **own} if same else own


def _name(node: Any) -> Any:
    return node.get("name") if isinstance(node, Mapping) else node


def _options(node: Any) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key != "name"} if isinstance(node, Mapping) else {}


def _check_report(config: RunConfig, arms: Sequence[ResolvedArm]) -> None:
    """ConfigError where what the report is asked for names no arm or no budget."""
    names = [arm.name for arm in arms]
    for key in ("reference", "hard"):
        given = getattr(config, key)
        if given is not None and given not in (*names, *(arm.group for arm in arms)):
            raise ConfigError(f"{key} is '{given}', which is no arm;{nearest(given, names)} arms: {', '.join(names)}")
    if config.equal is not None:
        check_equal(config.equal)


def _check_names(arms: Sequence[ResolvedArm]) -> None:
    """ConfigError where two rows of a report would have one name: arms, and arms of several seeds taken together."""
    groups = Counter((arm.group, arm.method) for arm in arms if arm.seed is not None)
    names = [arm.name for arm in arms] + [group for (group, _), count in groups.items() if count > 1]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two arms are called '{name}'; give each a 'name' of its own")

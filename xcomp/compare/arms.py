"""Arms: the rows of a comparison, each a backbone, a compressor, a selector and a frame budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from xcomp.config import ConfigError, RunConfig, check_component, frame_budgets, split_component


@dataclass(frozen=True)
class ResolvedArm:
    """One arm with nothing left to default. ``group`` is its name without the frame budget."""

    name: str
    group: str
    backbone: Any
    compressor: Any
    selector: Any
    frames: int | None

    @property
    def description(self) -> dict[str, Any]:
        """As run.json lists it."""
        checkpoint = split_component("backbone", self.backbone)[1].get("checkpoint")
        return {**asdict(self), "checkpoint": checkpoint}

    def config(self, run: RunConfig) -> RunConfig:
        """The run's configuration with this arm's parts."""
        parts = {k: getattr(self, k) for k in ("backbone", "compressor", "selector", "frames")}
        return replace(run, **parts, arms=[])


def resolve_arms(config: RunConfig) -> list[ResolvedArm]:
    """The arms of a run, checked: plugins exist, options fit, names differ. Without ``arms``, the run itself is one."""
    resolved = []
    for number, arm in enumerate(config.arms or [None]):
        where = f"arms[{number}]"
        own = {} if arm is None else {k: v for k, v in vars(arm).items() if v is not None}
        parts = {kind: own.get(kind, getattr(config, kind)) for kind in ("backbone", "compressor", "selector")}
        if parts["backbone"] is None:
            raise ConfigError(f"{where}: no backbone; name one for the run or the arm")
        for kind, node in parts.items():
            check_component(kind, node, config.plugins)
        names = [split_component(kind, parts[kind])[0] for kind in ("compressor", "selector")]
        group = own.get("name", " + ".join(names))
        budgets = frame_budgets(own.get("frames", config.frames), where)
        for frames in budgets:
            name = f"{group}, {frames} frames" if len(budgets) > 1 else group
            resolved.append(ResolvedArm(name, group, **parts, frames=frames))
    _check_names([arm.name for arm in resolved])
    return resolved


def _check_names(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two arms are called '{name}'; give each a 'name' of its own")

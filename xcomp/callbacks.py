"""Callbacks of a tuning run: those that ``tune.callbacks`` names, and the one that measures."""

from __future__ import annotations

import importlib
import inspect
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as of_lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from xcomp.config import ConfigError, Tune
from xcomp.memory import peak_bytes
from xcomp.messages import nearest

LOGGED = (
    "train/loss",
    "train/token_accuracy",
    "train/distillation",
    "train/gradient_norm",
    "validation/loss",
    "validation/token_accuracy",
)
MEASURED = ("tokens_per_second", "frames_per_second", "peak_memory_gb", "seconds_left")
# What a run does itself: callbacks of Lightning's that would do it another way.
INSTEAD = {
    "GradientAccumulationScheduler": "set trainer.accumulate_grad_batches",
    "LearningRateFinder": "set tune.learning_rate",
    "BatchSizeFinder": "set tune.batch_size",
    "LearningRateMonitor": "every run has one",
    "Timer": "SIGTERM ends a run with a checkpoint",
    # They change the weights after the last checkpoint, from which the model may have to be written.
    **dict.fromkeys(
        ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"), "tune.export=best chooses the weights"
    ),
}


def named_callbacks(tune: Tune, folder: Path) -> list[Callback]:
    """The callbacks of ``tune.callbacks``: ``{name: EarlyStopping, monitor: validation/loss}``.

    A name is one of lightning.pytorch.callbacks, or ``module:Class``; what else stands there are its arguments. A
    ModelCheckpoint that names no folder writes to ``<run>/checkpoints/named``.

    Raises:
        ConfigError: for a name, an argument or a metric that does not exist.
    """
    found = [_callback(node, f"tune.callbacks[{i}]", folder) for i, node in enumerate(tune.callbacks)]
    custom = any(not type(callback).__module__.startswith("lightning.") for callback in found)
    for number, node in enumerate(tune.callbacks):
        monitor = node.get("monitor") if isinstance(node, Mapping) else None
        where = f"tune.callbacks[{number}]"
        known = [name for name in (*LOGGED, *MEASURED) if tune.distillation or name != "train/distillation"]
        if monitor is not None and monitor not in known and not custom:
            raise ConfigError(
                f"{where}: monitor is {monitor!r};{nearest(str(monitor), known)} metrics: {', '.join(known)}"
            )
        if str(monitor).startswith("validation/") and not tune.validation:
            raise ConfigError(f"{where} monitors '{monitor}', but tune.validation is empty; list validation records")
    return found


def _callback(node: Any, where: str, folder: Path) -> Callback:
    if not isinstance(node, Mapping) or not isinstance(node.get("name"), str):
        raise ConfigError(f"{where} is {node!r}; it must be a mapping with 'name' and the callback's arguments")
    name, options = node["name"], {key: value for key, value in node.items() if key != "name"}
    made = _class(name, where)
    if done := next((of for of in INSTEAD if issubclass(made, getattr(of_lightning, of))), None):
        raise ConfigError(f"{where}: {done} does what a tuning run does itself; {INSTEAD[done]}")
    parameters = inspect.signature(made).parameters
    known = [p.name for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(known) == len(parameters) and (wrong := next((key for key in options if key not in known), None)):
        raise ConfigError(
            f"{where}: {name} has no argument '{wrong}';{nearest(wrong, known)} arguments: {', '.join(known)}"
        )
    if issubclass(made, of_lightning.ModelCheckpoint):
        options.setdefault("dirpath", str(folder / "checkpoints" / "named"))
    try:
        return made(**options)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {name}: {' '.join(str(error).split())}") from error


def _class(name: str, where: str) -> type[Callback]:
    module, _, attribute = name.partition(":")
    if not attribute:
        if name not in of_lightning.__all__ or name in ("Callback", "Checkpoint", "ProgressBar"):
            raise ConfigError(
                f"{where}: lightning.pytorch.callbacks has no '{name}';{nearest(name, of_lightning.__all__)} "
                "one of your own is named module:Class"
            )
        return getattr(of_lightning, name)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: '{name}' cannot be imported: {error}") from error
    if not inspect.isclass(found) or not issubclass(found, Callback):
        raise ConfigError(f"{where}: '{name}' is no class derived from lightning.pytorch.callbacks.Callback")
    return found


class Throughput(Callback):
    """What a run does a second (all ranks, mean over the last ``window`` steps), its peak memory, the time left.

    Tokens are those that enter the language model before anything leaves. Validations and checkpoints count as time.
    """

    def __init__(self, window: int = 20):
        self.past: deque[tuple[float, int, int]] = deque(maxlen=window + 1)  # time, tokens and frames up to a step

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.start, self.first = time.monotonic(), trainer.global_step
        self.tokens = self.frames = self.done = 0
        self.past.clear()
        self.past.append((self.start, 0, 0))

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: list[Any], batch_idx: int
    ) -> None:
        for sample in batch:
            tokens, frames = sample.size(module.backbone)
            self.tokens, self.frames = self.tokens + tokens, self.frames + frames
        done = trainer.global_step - self.first
        if done == self.done:  # in the middle of a step
            return
        self.done, now = done, time.monotonic()
        self.past.append((now, self.tokens, self.frames))
        then, tokens, frames = self.past[0]
        for name, count in (("tokens", self.tokens - tokens), ("frames", self.frames - frames)):
            options = {"prog_bar": True, "sync_dist": True, "reduce_fx": "sum"}
            module.log(f"{name}_per_second", count / (now - then), **options)
        if (peak := peak_bytes(module.device)) is not None:
            module.log("peak_memory_gb", peak / 1e9, prog_bar=True, sync_dist=True, reduce_fx="max")
        module.log("seconds_left", (now - self.start) / done * (trainer.max_steps - trainer.global_step))

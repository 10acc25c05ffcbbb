"""What lets a tuning run stop anywhere and go on to the same bits: its checkpoints, and how signals stop it.

A checkpoint is one file of tensors, numbers and text in torch's zip format, whole or not there. It is read with
``weights_only=True``, so that a file somebody prepared runs no code.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from pickle import PicklingError, UnpicklingError
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch.optim.lr_scheduler import LambdaLR

from xcomp.checkpoint import mend_folder
from xcomp.config import ConfigError, Tune
from xcomp.run import whole_file
from xcomp.stopping import Stopped

CHECKPOINTS = "checkpoints"
BEST = re.compile(r"best-step=(\d+)-loss=([\d.e+-]+)\.ckpt")
FILE = re.compile(r"step=(\d+)\.ckpt|last\.ckpt")  # last: a copy that earlier versions wrote

# --- files ------------------------------------------------------------------------------------------------------------


class WholeCheckpoints(CheckpointIO):
    """Lightning's checkpoints as files that are whole or not there, and whose reading runs no code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint. OSError of one line if the disk does not take it; earlier ones stay as they were."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_file(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            cause = _system_error(error)
            if cause is None:
                raise
            raise OSError(
                f"checkpoint '{path}' cannot be written: {cause.strerror}; the one before it is untouched, and once "
                "there is room the same command resumes from it"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint onto the CPU; whatever ``weights_only`` says, nothing but tensors and plain values."""
        return torch.load(path, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def _system_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error of torch's zip writer, which itself reports a wrong position."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


@dataclass(frozen=True)
class Resume:
    """Where a run goes on: a checkpoint, the optimizer steps it has behind it and of how many; what was no good.

    A step took the batches of ``ranks`` processes, ``accumulated`` of each.
    """

    path: Path
    step: int
    steps: int | None
    damaged: list[str] = field(default_factory=list)
    ranks: int | None = None
    accumulated: int | None = None


def newest_checkpoint(folder: Path) -> Resume | None:
    """The newest whole checkpoint of a run folder; None where there never was one.

    Raises:
        ConfigError: if one holds more than plain values, or none of those that are there is whole.
    """
    damaged = []
    for path in _checkpoints(folder):
        try:
            # Mapped, so that only the description is read, which torch writes last: a file that was cut off has none.
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            own = content["callbacks"].get(StepCheckpoints.__name__, {})
            ranks, accumulated = own.get("ranks"), own.get("accumulated")
            return Resume(path, content["global_step"], own.get("steps"), damaged, ranks, accumulated)
        except UnpicklingError as error:
            raise ConfigError(_forbidden(path, error)) from error
        except (RuntimeError, EOFError, KeyError, TypeError, AttributeError):  # torch has no error of its own for it
            damaged.append(path.name)
    if damaged:
        raise ConfigError(
            f"no checkpoint in '{folder / CHECKPOINTS}' is whole ({', '.join(damaged)}); delete that folder to start "
            "over"
        )
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, newest first. ConfigError for a folder, which Lightning reads in ways that may run code."""
    found = {path: FILE.fullmatch(path.name) for path in (folder / CHECKPOINTS).glob("*.ckpt")}
    paths = sorted((path for path in found if found[path]), key=lambda path: -int(found[path][1] or 0))
    if folders := [path for path in paths if path.is_dir()]:
        raise ConfigError(
            f"checkpoint '{folders[0]}' is a folder, whose reading may run code; only files are resumed from"
        )
    return paths


def best_checkpoint(folder: Path) -> Path | None:
    """The weights with the lowest validation loss in a run folder; None where no validation has run."""
    found = {path: BEST.fullmatch(path.name) for path in (folder / CHECKPOINTS).glob("best-*.ckpt")}
    return min((path for path in found if found[path]), key=lambda path: float(found[path][2]), default=None)


def _forbidden(path: Path, error: UnpicklingError) -> str:
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f" ({name[1]})" if name else ""
    return (
        f"checkpoint '{path}' holds more than tensors, numbers and text{what}; it was not written by xcomp and is not "
        "loaded, since that could run code; delete it"
    )


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written in a run folder. Nobody else may be working in it."""
    for path in (folder / "run.json.tmp", *(folder / CHECKPOINTS).glob("*.ckpt.tmp")):
        path.unlink(missing_ok=True)
    mend_folder(folder / "model")


# --- callbacks --------------------------------------------------------------------------------------------------------


class StopAtStep(Callback):
    """The first SIGTERM or Ctrl-C lets the step in progress finish, and a checkpoint be written, before ``Stopped``.

    A second Ctrl-C stops at once. Signals to any rank stop all of them after the same step. Whoever calls ``fit`` puts
    the handlers of ``SIGNALS`` back.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    number: int | None = None  # of the signal
    between = False  # two steps: no gradients are being accumulated
    due = False  # the step before was the last one; the same on all ranks
    _when = _before = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # In place of Lightning's handler: it does not know Ctrl-C, ends with status 0, and calls the other ranks from
        # within the signal, in the midst of whatever they are exchanging.
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # SIGTERM is often sent twice, to a process and to its group; stopping at once is what SIGKILL is for.
        if self.number is not None and number == signal.SIGINT and time.monotonic() - self._when > 1:
            raise Stopped(number)
        if self.number is None:
            self.number, self._when = number, time.monotonic()
            if number == signal.SIGINT and sys.stderr.isatty():
                os.write(2, b"\nstopping after this step; Ctrl-C again to stop at once\n")  # print() may be under way

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.due:
            raise self.stopped(trainer)
        self._before = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.between = trainer.global_step != self._before
        self._decide(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._decide(trainer)  # a validation may take longer than a batch system waits

    def _decide(self, trainer: L.Trainer) -> None:
        if self.between:
            self.due = trainer.strategy.reduce_boolean_decision(self.number is not None, all=False)

    def stopped(self, trainer: L.Trainer) -> Stopped:
        """The exception that says where the run stands."""
        stop = Stopped(self.number or signal.SIGTERM, self._line(trainer))
        if not trainer.is_global_zero:
            stop.line, stop.code = None, 0  # Lightning's launcher kills the first rank when another one fails
        return stop

    @staticmethod
    def _line(trainer: L.Trainer) -> str:
        if not trainer.checkpoint_callbacks:
            return f"after step {trainer.global_step}, without checkpoints: the same command starts over"
        return f"the same command resumes after step {trainer.global_step}"


class StepSeed(Callback):
    """Random numbers of a batch (dropout) follow from the run's seed and the batch's number among those of all ranks.

    A checkpoint then needs no generator's state, which would differ with the number of workers and of validations.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        number = trainer.fit_loop.total_batch_idx * trainer.world_size + trainer.global_rank  # over all epochs
        torch.manual_seed(hash((self.seed, number)) & 0x7FFFFFFF)


def _check_states(trainer: L.Trainer) -> None:
    """ConfigError if a callback's state would make checkpoints that are not read again."""
    for callback in trainer.callbacks:
        content = BytesIO()
        try:
            torch.save(callback.state_dict(), content)
            content.seek(0)
            torch.load(content, weights_only=True)
        except (PicklingError, UnpicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"callback {type(callback).__name__} has a state of more than tensors, numbers and text, so that no "
                f"checkpoint with it could be resumed from: {str(error).splitlines()[0]}"
            ) from error


class StepCheckpoints(Checkpoint):
    """A checkpoint every so many optimizer steps, at the last one, and where a run is stopped.

    The ``keep`` newest are kept (the second in case a disk loses the newest); while one is written there is another.
    Where a validation is due, it comes first, so that a run that goes on lacks none. A signal in a validation has one
    written at once; the validation then runs to its end, and is not run again.

    The weights with the lowest ``validation/loss`` so far are kept too, without optimizer states.
    """

    def __init__(self, folder: Path, tune: Tune, stop: StopAtStep):
        self.folder, self.stop = folder / CHECKPOINTS, stop
        self.every, self.steps, self.keep = tune.save_every, tune.steps, tune.keep
        self.validate_every = tune.steps_between_validations
        self.kept: list[Path] = []  # the newest last
        self.validation = json.dumps(tune.validation, sort_keys=True)
        self._loop: dict[str, Any] = {}
        self._ranks = self._accumulated = 1

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._ranks, self._accumulated = trainer.world_size, trainer.accumulate_grad_batches

    def state_dict(self) -> dict[str, Any]:
        own = {"steps": self.steps, "ranks": self._ranks, "accumulated": self._accumulated}
        return {**own, "validation": self.validation}

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning counts a rank's batches; with other ranks, as many steps are another number of them.
        own = checkpoint["callbacks"].get(self.state_key, {})
        before = own.get("accumulated") or self._accumulated
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in (progress["total"], progress["current"]):
            for name in count:
                count[name] = count[name] * self._accumulated // before
        if own.get("validation", self.validation) != self.validation and (best := best_checkpoint(self.folder.parent)):
            print(f"xcomp: tune.validation has changed: {best.name} is the best no longer", file=sys.stderr)
            best.unlink(missing_ok=True)  # losses on other records do not compare

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # A run that Lightning resumed at the end of an epoch does not count the next one as begun. Resumed once more,
        # from that one's end, it would take the epoch for another and its records in another order.
        for count in self._loop["epoch_progress"].values():  # current and total
            count["ready"] = count["started"] = count["processed"] + 1  # we are within an epoch
        checkpoint["loops"]["fit_loop"] = self._loop
        _check_states(trainer)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        _check_states(trainer)
        if trainer.ckpt_path:
            newest = Path(trainer.ckpt_path)
            found = _checkpoints(self.folder.parent)
            self.kept = found[found.index(newest) :][::-1] if newest in found else [newest]
        # The restored rates follow the schedule they were saved under, which may have been for another number of steps.
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            if isinstance(scheduler, LambdaLR):
                groups = scheduler.optimizer.param_groups
                for group, rate, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas):
                    group["lr"] = rate * factor(scheduler.last_epoch)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._loop = trainer.fit_loop.state_dict()  # as a run goes on from; within a validation Lightning's is not
        validates = self.validate_every is not None and trainer.global_step % self.validate_every == 0
        if self.stop.between and (self.stop.due or (self._is_due(trainer) and not validates)):
            self._save(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.stop.due:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        loss = float(trainer.callback_metrics.get("validation/loss", math.inf))
        before = best_checkpoint(self.folder.parent)
        # Rounded as in the name, so that a validation that is run again is no better than it was.
        lower = before is None or float(f"{loss:.6g}") < float(BEST.fullmatch(before.name)[2])
        if trainer.sanity_checking:
            return
        if math.isfinite(loss) and trainer.strategy.broadcast(lower):
            trainer.save_checkpoint(
                self.folder / f"best-step={trainer.global_step}-loss={loss:.6g}.ckpt", weights_only=True
            )
            if before is not None and trainer.is_global_zero:
                before.unlink()
        if self._is_due(trainer) or self.stop.due:
            self._save(trainer, again=True)  # with what callbacks made of the validation

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.stop.between:  # also where a callback ended the run
            self._save(trainer)

    def _is_due(self, trainer: L.Trainer) -> bool:
        return trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps

    def _save(self, trainer: L.Trainer, *, again: bool = False) -> None:
        path = self.folder / f"step={trainer.global_step}.ckpt"
        if path in self.kept:
            if again:
                trainer.save_checkpoint(path, weights_only=False)
            return
        self._tidy(trainer, max(1, self.keep - 1))
        trainer.save_checkpoint(path, weights_only=False)
        self.kept.append(path)
        self._tidy(trainer, self.keep)

    def _tidy(self, trainer: L.Trainer, keep: int) -> None:
        """Delete all but the ``keep`` newest, and what is no checkpoint of this run up to here."""
        self.kept = self.kept[-keep:]
        if trainer.is_global_zero:
            for old in self.folder.glob("*.ckpt"):
                if FILE.fullmatch(old.name) and old not in self.kept:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()

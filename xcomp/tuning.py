"""``xcomp tune``: supervised compression tuning with Lightning's Trainer.

The run folder holds ``checkpoints/`` (to resume from), ``logs/`` (CSV and TensorBoard) and, at the end, ``model/``: a
checkpoint folder that ``checkpoint:`` in any configuration can name.
"""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from safetensors import SafetensorError

from xcomp.checkpoint import save_compressor, whole_folder
from xcomp.config import ConfigError, RunConfig
from xcomp.contract import check_methods
from xcomp.data.module import ConversationData
from xcomp.messages import nearest
from xcomp.model import VideoQA
from xcomp.resuming import (
    Resume,
    StepCheckpoints,
    StepSeed,
    StopAtStep,
    WholeCheckpoints,
    clear_leftovers,
    newest_checkpoint,
)
from xcomp.run import check_run, hold_run, make_trainer, note_run, open_run
from xcomp.stopping import signals

LOGGERS = ("csv", "tensorboard", "wandb", "none")
SAVED = ("steps", "save_dtype")  # options of ``tune`` that decide what model is written, and may change on resuming


def tune(config: RunConfig) -> Path:
    """Tune as configured, resuming from the run folder's last checkpoint; returns the folder of the tuned model.

    SIGTERM and Ctrl-C end it with a checkpoint after the step in progress, as ``xcomp.stopping.Stopped``.
    """
    if not config.tune.data:
        raise ConfigError("tune.data is empty; list where the training records come from")
    check_run(config, "tune")
    if _is_tuned(config):
        return config.folder / "model"
    L.seed_everything(config.seed, workers=True, verbose=False)
    stop = StopAtStep()
    trainer = tuning_trainer(config, stop)
    with hold_run(config.folder) if trainer.is_global_zero else nullcontext():
        if not _is_tuned(config):  # as it may be by now
            _tune(config, trainer, stop)
    return config.folder / "model"


def _tune(config: RunConfig, trainer: L.Trainer, stop: StopAtStep) -> None:
    folder = config.folder
    resume = _resume(config)
    model = VideoQA.from_config(config)
    check_methods("backbone", model.backbone, "follow_up", "parts", "save_pretrained")  # before hours of work
    model.freeze_untrained()
    model.backbone.train()
    data = ConversationData(config, model.backbone)
    if trainer.is_global_zero:
        if (folder / "run.json").is_file():
            clear_leftovers(folder)
            _note_tuned(folder)
        open_run(config, "tune")
        _tell(config, resume)
    try:
        with signals(*stop.SIGNALS):
            trainer.fit(model, datamodule=data, ckpt_path=resume and str(resume.path), weights_only=True)
    except MisconfigurationException as error:  # an option that fits no data like these
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    if stop.number is not None and trainer.checkpoint_callbacks:  # in the last step, after which one was written
        raise stop.stopped(trainer)
    if trainer.is_global_zero:
        _save_model(model, folder / "model", config.tune.save_dtype)
        note_run(folder, tuned={name: getattr(config.tune, name) for name in SAVED})


def _save_model(model: VideoQA, folder: Path, dtype: str | None) -> None:
    try:
        with whole_folder(folder) as fresh:
            model.backbone.save_pretrained(str(fresh), dtype=dtype)
            save_compressor(model.compressor, fresh)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"model '{folder}' cannot be written: {reason}; once there is room the same command writes it"
        ) from error


# --- where a run stands -----------------------------------------------------------------------------------------------


def _is_tuned(config: RunConfig) -> bool:
    """Whether the run folder's model is the one asked for: ``tune.steps`` may have changed since it was written."""
    folder = config.folder
    if not (folder / "model").is_dir() or not (folder / "run.json").is_file():
        return (folder / "model").is_dir()
    tuned = _tuned(folder)
    return all(tuned.get(name) == getattr(config.tune, name) for name in SAVED)


def _tuned(folder: Path) -> dict[str, Any]:
    """``SAVED`` of the model that is there: noted once it was written, else as the run was started."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return run.get("tuned") or run["config"]["tune"]


def _note_tuned(folder: Path) -> None:
    """Before the run's description changes: what the model that is there was tuned for."""
    if (folder / "model").is_dir():
        note_run(folder, tuned={name: _tuned(folder)[name] for name in SAVED})


def _resume(config: RunConfig) -> Resume | None:
    """The checkpoint to go on from. ConfigError if what is in the run folder cannot become what is asked for."""
    folder, steps = config.folder, config.tune.steps
    resume = newest_checkpoint(folder)
    if resume is None and (folder / "model").is_dir():
        raise ConfigError(
            f"run folder '{folder}' holds a model tuned for {_tuned(folder)['steps']} steps and no checkpoint to go on "
            "from; choose another 'name', or delete the folder"
        )
    if resume is not None and resume.step > steps:
        raise ConfigError(
            f"tune.steps is {steps}, and run folder '{folder}' is at step {resume.step}; with tune.steps="
            f"{resume.step} the model is written as it is"
        )
    return resume


def _tell(config: RunConfig, resume: Resume | None) -> None:
    """One line on stderr for each thing about a resumed run that a user may not expect."""
    if resume is None:
        return
    if resume.damaged:
        print(
            f"xcomp: checkpoint {', '.join(resume.damaged)} is damaged; resuming after step {resume.step}, from "
            f"{resume.path.name}",
            file=sys.stderr,
        )
    if resume.steps not in (None, config.tune.steps) and resume.step < config.tune.steps:
        print(
            f"xcomp: tune.steps was {resume.steps}, now {config.tune.steps}: after step {resume.step} the learning "
            f"rate follows the schedule over {config.tune.steps} steps",
            file=sys.stderr,
        )


# --- the Trainer ------------------------------------------------------------------------------------------------------


def tuning_trainer(config: RunConfig, stop: StopAtStep) -> L.Trainer:
    """The Trainer of a tuning run; ``config.trainer`` overrides its arguments."""
    given = {name: value for name, value in config.trainer.items() if name != "logger"}
    loggers = _loggers(config)
    callbacks: list[Callback] = [stop, StepSeed(config.seed)]
    if given.get("enable_checkpointing", True):
        callbacks.append(StepCheckpoints(config.folder, config.tune.save_every, config.tune.steps, stop))
    if loggers:
        callbacks.append(LearningRateMonitor())
    if given.get("enable_progress_bar", True):
        callbacks.append(StepBar())
    trainer = make_trainer(
        given,
        max_steps=config.tune.steps,
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        logger=loggers,
        callbacks=callbacks,
        plugins=[WholeCheckpoints()],
        default_root_dir=config.folder,
        limit_val_batches=1.0 if config.tune.validation else 0,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    if isinstance(trainer.strategy, (DeepSpeedStrategy, ModelParallelStrategy)):
        name = type(trainer.strategy).__name__
        raise ConfigError(f"trainer.strategy: reading {name}'s checkpoints may run code; use ddp")
    return trainer


def _loggers(config: RunConfig) -> list[Logger]:
    """What ``trainer.logger`` names: one or a list of ``LOGGERS``; true: CSV and TensorBoard; false: none."""
    given = config.trainer.get("logger", True)
    names = ["csv", "tensorboard"] if given is True else given or []
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in LOGGERS:
            hint = nearest(str(name), LOGGERS)
            raise ConfigError(f"trainer.logger is {name!r};{hint} loggers: {', '.join(LOGGERS)}, or a list of them")
    # A folder for each start: the CSV logger deletes what it finds.
    where = {"name": "logs", "version": len(list(config.folder.glob("logs/version_*")))}
    made: dict[str, Any] = {
        "csv": lambda: CSVLogger(config.folder, **where, flush_logs_every_n_steps=1),  # kills leave no gap
        "tensorboard": lambda: TensorBoardLogger(config.folder, **where),
        "wandb": lambda: _wandb(config),
    }
    return [made[name]() for name in dict.fromkeys(names) if name != "none"]


def _wandb(config: RunConfig) -> Logger:
    try:
        importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(f"trainer.logger 'wandb' needs the package wandb ({error}): pip install wandb") from error
    return WandbLogger(name=config.name, save_dir=config.folder, project="xcomp")


class StepBar(ProgressBar):
    """Optimizer steps of the whole run. Epochs have no bar: a run is so many steps long, however few its records."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled, self._bar, self._training, self._validation = True, None, None, None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._enabled:
            return
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # or metrics would crowd out the numbers
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        metrics = TextColumn("{task.fields[metrics]}", table_column=rest)
        self._bar = Progress(*columns, TimeRemainingColumn(), metrics, expand=True)
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._training = self._bar.add_task("step", total=total, completed=trainer.global_step, metrics="")
        self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self._bar is not None:
            values = self.get_metrics(trainer, module).items()
            metrics = "  ".join(f"{name} {value:.3f}" for name, value in values if isinstance(value, float))
            self._bar.update(self._training, completed=trainer.global_step, metrics=metrics)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._bar is not None:
            self._validation = self._bar.add_task("validation", total=sum(trainer.num_val_batches), metrics="")

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.advance(self._validation)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._bar is not None:
            self._bar.remove_task(self._validation)

    def on_train_end(self, *_: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def print(self, *values: Any, **options: Any) -> None:
        (self._bar.console.print if self._bar else print)(*values, **options)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

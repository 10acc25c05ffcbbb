"""The Trainer of a tuning run: strategy, loggers, callbacks and the progress bar, by the names in its configuration."""

from __future__ import annotations

import importlib.util
import inspect
import math
import secrets
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from xcomp.callbacks import Throughput, named_callbacks
from xcomp.config import ConfigError, RunConfig
from xcomp.messages import nearest
from xcomp.resuming import StepCheckpoints, StepSeed, StopAtStep, WholeCheckpoints
from xcomp.run import make_trainer, noted

LOGGERS = ("csv", "tensorboard", "wandb", "none")
# Of the Trainer: how long a run is and what it goes over is the configuration's own business, and the schedule's.
INSTEAD = {
    **dict.fromkeys(("max_steps", "min_steps", "max_epochs", "min_epochs", "fast_dev_run"), "set tune.steps"),
    "max_time": "SIGTERM ends a run with a checkpoint that the same command resumes from",
    **dict.fromkeys(("limit_train_batches", "overfit_batches"), "a source's sampling_strategy takes a part of it"),
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch"), "set tune.validate_every"),
}
BAR = {  # what the progress bar tells first, in few letters: a terminal has 80
    "train/loss": "loss {:.3f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "frames_per_second": "{:,.1f} frames/s",
    "peak_memory_gb": "{:.1f} GB",
}
DEEPSPEED = (
    "deepspeed",
    "deepspeed_stage_1",
    "deepspeed_stage_1_offload",
    "deepspeed_stage_2",
    "deepspeed_stage_2_offload",
)


def tuning_trainer(config: RunConfig, stop: StopAtStep, steps: int) -> L.Trainer:
    """The Trainer of a tuning run of ``steps``; ``config.trainer`` overrides its arguments."""
    given = {name: value for name, value in config.trainer.items() if name != "logger"}
    for key, instead in INSTEAD.items():
        if key in given:
            raise ConfigError(f"trainer.{key} is not for tuning: {instead}")
    if config.tune.validation and given.get("limit_val_batches", 1) == 0:
        raise ConfigError("trainer.limit_val_batches is 0, so nothing would be validated; take tune.validation out")
    accumulated = given.get("accumulate_grad_batches", 1)
    if type(accumulated) is not int or accumulated < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches is {accumulated!r}; it must be a whole number, at least 1")
    given["strategy"] = _strategy(given, config.tune.train)
    loggers = _loggers(config)
    named = named_callbacks(config.tune, config.folder)
    callbacks: list[Callback] = [stop, StepSeed(config.seed), Throughput(), *named]
    if given.get("enable_checkpointing", True):
        callbacks.append(StepCheckpoints(config.folder, config.tune, stop))
    elif config.tune.export == "best":
        raise ConfigError("tune.export is best, but trainer.enable_checkpointing is false: no best one is kept")
    if loggers:
        callbacks.append(LearningRateMonitor())
    if given.get("enable_progress_bar", True) and not any(isinstance(c, ProgressBar) for c in named):
        callbacks.append(StepBar())
    trainer = make_trainer(
        given,
        max_steps=steps,
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        logger=loggers,
        callbacks=callbacks,
        plugins=[WholeCheckpoints()],
        default_root_dir=config.folder,
        limit_val_batches=1.0 if config.tune.validation else 0,
        check_val_every_n_epoch=None,
        val_check_interval=(config.tune.steps_between_validations or 1) * accumulated,  # batches of a rank
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    return trainer


def _strategy(given: dict[str, Any], train: list[str]) -> Any:
    """What ``trainer.strategy`` names, as Lightning has it. ``train``: the parts that learn."""
    name = given.get("strategy", "auto")
    processes = _processes(given)
    if not isinstance(name, str):
        raise ConfigError(f"trainer.strategy is {name!r}; it must be a name, like ddp or fsdp2")
    if name == "fsdp2":
        # Checkpoints of one file, as those of every other strategy.
        return ModelParallelStrategy(processes, tensor_parallel_size=1, save_distributed_checkpoint=False)
    if name.startswith("fsdp"):
        raise ConfigError(f"trainer.strategy is '{name}', which cannot clip gradients by their norm; use fsdp2")
    if name.startswith("deepspeed"):
        _check_deepspeed(name, given)
    if name in ("auto", "ddp") and processes > 1 and {"vision", "compressor"} & set(train):
        return "ddp_find_unused_parameters_true"  # of a tower the last layers may be unused, of a rule anything
    return name


def _processes(given: dict[str, Any]) -> int:
    """How many processes ``trainer.devices`` and ``trainer.num_nodes`` ask for."""
    devices = given.get("devices", 1)
    if devices in ("auto", "-1", -1):
        devices = 1 if given.get("accelerator") == "cpu" else max(1, torch.cuda.device_count())
    elif isinstance(devices, str):
        devices = len(devices.strip(",").split(",")) if "," in devices else int(devices) if devices.isdigit() else 1
    numbers = [len(devices) if isinstance(devices, list) else devices, given.get("num_nodes", 1)]
    return math.prod(number for number in numbers if isinstance(number, int))  # of others Lightning says what is wrong


def _check_deepspeed(name: str, given: dict[str, Any]) -> None:
    """ConfigError unless DeepSpeed is there and asked for what works with a model whose layers are run in halves."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"trainer.strategy '{name}' needs the package deepspeed: pip install deepspeed; or use fsdp2")
    if name not in DEEPSPEED:
        raise ConfigError(
            f"trainer.strategy is '{name}', which holds weights in pieces that it gathers for whole layers alone;"
            f"{nearest(name, DEEPSPEED)} possible: {', '.join(DEEPSPEED)}, fsdp2"
        )
    if given.get("enable_checkpointing", True):
        raise ConfigError(
            f"trainer.strategy is '{name}', whose checkpoints are folders, and reading these may run code; set "
            "trainer.enable_checkpointing=false (such a run cannot be resumed), or use fsdp2"
        )


def _loggers(config: RunConfig) -> list[Logger]:
    """What ``trainer.logger`` names: one or a list of ``LOGGERS``; true: CSV and TensorBoard; false: none.

    ``{name: wandb, …}``: with arguments of ``wandb.init``.
    """
    given = config.trainer.get("logger", True)
    nodes = ["csv", "tensorboard"] if given is True else given or []
    nodes = list(nodes) if isinstance(nodes, (list, tuple)) else [nodes]
    options: dict[str, Any] = {}
    for number, node in enumerate(nodes):
        if isinstance(node, Mapping) and node.get("name") == "wandb" and not options:
            nodes[number], options = "wandb", {key: value for key, value in node.items() if key != "name"}
        elif node not in LOGGERS:
            raise ConfigError(
                f"trainer.logger is {node!r};{nearest(str(node), LOGGERS)} loggers: {', '.join(LOGGERS)}, or a list of "
                "them; wandb alone has options: {name: wandb, project: …}"
            )
    # A folder for each start: the CSV logger deletes what it finds.
    where = {"name": "logs", "version": len(list(config.folder.glob("logs/version_*")))}
    made: dict[str, Any] = {
        "csv": lambda: CSVLogger(config.folder, **where, flush_logs_every_n_steps=1),  # kills leave no gap
        "tensorboard": lambda: TensorBoardLogger(config.folder, **where),
        "wandb": lambda: _wandb(config, options),
    }
    return [made[name]() for name in dict.fromkeys(nodes) if name != "none"]


def _wandb(config: RunConfig, options: dict[str, Any]) -> Logger:
    """One W&B run for a run folder, however often it is resumed: run.json keeps its id (:func:`wandb_id`)."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(f"trainer.logger 'wandb' needs the package wandb ({error}): pip install wandb") from error
    known = [name for name in inspect.signature(wandb.init).parameters if name not in ("name", "dir")]
    if wrong := next((key for key in options if key not in known), None):
        raise ConfigError(f"trainer.logger: wandb.init has no '{wrong}' to set;{nearest(wrong, known)} see wandb.init")
    own = {"project": "xcomp", "id": noted(config.folder).get("wandb") or secrets.token_hex(8), "resume": "allow"}
    return WandbLogger(**own | options, name=config.name, save_dir=config.folder)


def wandb_id(trainer: L.Trainer) -> str | None:
    """Of the W&B run that a Trainer logs to, if it does."""
    return next((str(logger.version) for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)


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
        columns = (TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn())
        metrics = TextColumn("{task.fields[metrics]}", table_column=rest)
        self._bar = Progress(*columns, TimeRemainingColumn(), metrics, expand=True)
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._training = self._bar.add_task("step", total=total, completed=trainer.global_step, metrics="")
        self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self._bar is not None:
            values = self.get_metrics(trainer, module)
            shown = [text.format(values[name]) for name, text in BAR.items() if name in values]
            shown += [f"{name} {values[name]:.4g}" for name in values if name not in BAR and name != "v_num"]
            self._bar.update(self._training, completed=trainer.global_step, metrics="  ".join(shown))

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

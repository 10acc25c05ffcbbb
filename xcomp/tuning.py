"""``xcomp tune``: supervised compression tuning with Lightning's Trainer.

The run folder holds ``checkpoints/`` (to resume from), ``logs/`` (CSV and TensorBoard) and, at the end, ``model/``: a
checkpoint folder that ``checkpoint:`` in any configuration can name.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from xcomp.config import ConfigError, RunConfig
from xcomp.contract import check_methods
from xcomp.data.module import ConversationData
from xcomp.model import VideoQA
from xcomp.run import check_run, make_trainer, open_run


def tune(config: RunConfig) -> Path:
    """Tune as configured, resuming from the run folder's last checkpoint; returns the folder of the tuned model."""
    if not config.tune.data:
        raise ConfigError("tune.data is empty; list where the training records come from")
    check_run(config, "tune")
    folder = config.folder
    if (folder / "model").is_dir():
        return folder / "model"
    L.seed_everything(config.seed, workers=True, verbose=False)
    trainer = tuning_trainer(config)
    model = VideoQA.from_config(config)
    check_methods("backbone", model.backbone, "follow_up", "parts", "save_pretrained")  # before hours of work
    model.freeze_untrained()
    model.backbone.train()
    data = ConversationData(config, model.backbone)
    open_run(config, "tune")
    last = folder / "checkpoints" / "last.ckpt"
    resume = str(last) if last.is_file() else None
    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=False)
    except MisconfigurationException as error:  # an option that fits no data like these
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    if trainer.is_global_zero:
        model.backbone.save_pretrained(str(folder / "model"), dtype=config.tune.save_dtype)
    return folder / "model"


def tuning_trainer(config: RunConfig) -> L.Trainer:
    """The Trainer of a tuning run; ``config.trainer`` overrides its arguments."""
    folder, given = config.folder, config.trainer
    callbacks: list[Callback] = []
    if given.get("enable_checkpointing", True):
        keep = ModelCheckpoint(
            dirpath=folder / "checkpoints",
            filename="{step}",
            save_last=True,
            every_n_train_steps=config.tune.save_every,
            enable_version_counter=False,  # or a run that was moved would write last-v1.ckpt, which is not resumed
        )
        callbacks.append(keep)
    if given.get("logger", True):
        callbacks.append(LearningRateMonitor())
    if given.get("enable_progress_bar", True):
        callbacks.append(RichProgressBar())
    start = len(list(folder.glob("logs/version_*")))  # a folder for each start: the CSV logger deletes what it finds
    return make_trainer(
        given,
        max_steps=config.tune.steps,
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        logger=[logger(folder, name="logs", version=start) for logger in (CSVLogger, TensorBoardLogger)],
        callbacks=callbacks,
        limit_val_batches=1.0 if config.tune.validation else 0,
        enable_model_summary=False,
        log_every_n_steps=10,
    )

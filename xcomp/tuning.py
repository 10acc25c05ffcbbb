"""``xcomp tune``: supervised compression tuning with Lightning's Trainer.

The run folder holds ``checkpoints/`` (to resume from), ``logs/`` (CSV and TensorBoard) and, at the end, ``model/``: a
checkpoint folder that ``checkpoint:`` in any configuration can name.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from xcomp.config import ConfigError, RunConfig
from xcomp.data.module import ConversationData
from xcomp.model import VideoQA
from xcomp.run import open_run


def tune(config: RunConfig) -> Path:
    """Tune as configured, resuming from the run folder's last checkpoint; returns the folder of the tuned model."""
    if not config.tune.data:
        raise ConfigError("tune.data is empty; list where the training records come from")
    L.seed_everything(config.seed, workers=True, verbose=False)
    model = VideoQA.from_config(config)
    model.freeze_untrained()
    model.backbone.train()
    data = ConversationData(config, model.backbone)
    folder = open_run(config, "tune")
    if (folder / "model").is_dir():
        return folder / "model"
    last = folder / "checkpoints" / "last.ckpt"
    trainer = make_trainer(config, folder)
    trainer.fit(model, datamodule=data, ckpt_path=str(last) if last.is_file() else None, weights_only=False)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        model.backbone.save_pretrained(str(folder / "model"), dtype=config.tune.save_dtype)
    return folder / "model"


def make_trainer(config: RunConfig, folder: Path) -> L.Trainer:
    """The Trainer of a tuning run; ``config.trainer`` overrides any of its arguments."""
    keep = ModelCheckpoint(
        dirpath=folder / "checkpoints", filename="{step}", save_last=True, every_n_train_steps=config.tune.save_every
    )
    callbacks = [keep, LearningRateMonitor()]
    if config.trainer.get("enable_progress_bar", True):
        callbacks.append(RichProgressBar())
    defaults = {
        "max_steps": config.tune.steps,
        "accelerator": "auto",
        "devices": 1,
        "gradient_clip_val": 1.0,
        "logger": [CSVLogger(folder, name="logs", version=""), TensorBoardLogger(folder, name="logs", version="")],
        "callbacks": callbacks,
        "enable_model_summary": False,
        "log_every_n_steps": 10,
    }
    return L.Trainer(**{**defaults, **config.trainer})

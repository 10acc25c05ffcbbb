"""``xcomp tune``: supervised compression tuning with Lightning's Trainer.

The run folder holds ``checkpoints/`` (to resume from), ``logs/`` (CSV and TensorBoard) and, at the end, ``model/``: a
checkpoint folder that ``checkpoint:`` in any configuration can name.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError
from torch import distributed

from xcomp.adapters import base_of, check_installed, merge_adapters, save_adapters
from xcomp.checkpoint import save_compressor, whole_folder
from xcomp.config import ConfigError, RunConfig, split_component
from xcomp.contract import check_methods
from xcomp.data.module import ConversationData
from xcomp.data.skipped import FILE as SKIPPED
from xcomp.data.sources import MissingData
from xcomp.model import VideoQA
from xcomp.recorded import write_record
from xcomp.registry import configure
from xcomp.resuming import Resume, StopAtStep, best_checkpoint, clear_leftovers, newest_checkpoint
from xcomp.run import check_run, flat, hold_run, note_run, noted, open_run
from xcomp.sharding import check_sharded, gather, is_sharded
from xcomp.stopping import signals
from xcomp.trainer import tuning_trainer, wandb_id

# Options of ``tune`` that decide what model is written, and may change on resuming.
SAVED = ("steps", "save_dtype", "export", "lora.merge")


def tune(config: RunConfig) -> Path:
    """Tune as configured, resuming from the run folder's last checkpoint; returns the folder of the tuned model.

    SIGTERM and Ctrl-C end it with a checkpoint after the step in progress, as ``xcomp.stopping.Stopped``.
    """
    if not config.tune.data:
        raise ConfigError("tune.data is empty; list where the training records come from")
    if config.tune.lora is not None:
        check_installed("tune.lora")
    check_run(config, "tune")
    if _is_tuned(config):
        return config.folder / "model"
    L.seed_everything(config.seed, workers=True, verbose=False)
    stop = StopAtStep()
    trainer = tuning_trainer(config, stop, _last_step(config))
    try:
        with hold_run(config.folder) if trainer.is_global_zero else nullcontext():
            if not _is_tuned(config):  # as it may be by now
                _tune(config, trainer, stop)
    finally:
        if is_sharded(trainer) and distributed.is_initialized():
            distributed.destroy_process_group()  # its threads may otherwise end the process with an error
    return config.folder / "model"


def _tune(config: RunConfig, trainer: L.Trainer, stop: StopAtStep) -> None:
    folder = config.folder
    resume = _resume(config, trainer)
    data = _read_data(config, trainer.is_global_zero)
    records = _check_records(folder, data, begun=resume is not None)
    model = VideoQA.from_config(config)
    check_methods("backbone", model.backbone, "follow_up", "parts", "save_pretrained")  # before hours of work
    if is_sharded(trainer):
        check_sharded(model.decoder)
    model.prepare_tuning(sharded=is_sharded(trainer))
    model.backbone.train()
    data.attach(model.backbone, model.compressor)
    if trainer.is_global_zero:
        if (folder / "run.json").is_file():
            clear_leftovers(folder)
            _note_tuned(folder)
        open_run(config, "tune")
        note_run(folder, records=records)
        if (run_id := wandb_id(trainer)) is not None:
            note_run(folder, wandb=run_id)
        _tell(config, resume)
        _tell_rounding(model)
        for logger in trainer.loggers:
            logger.log_hyperparams(config.written())
        data.note_refused()
    try:
        with signals(*stop.SIGNALS):
            trainer.fit(model, datamodule=data, ckpt_path=resume and str(resume.path), weights_only=True)
    except MisconfigurationException as error:  # an option that fits no data like these
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    finally:
        data.close()
        if trainer.is_global_zero:
            _tell_skipped(data)
    stopped = trainer.strategy.reduce_boolean_decision(stop.number is not None, all=False)
    if stopped and trainer.checkpoint_callbacks:  # in the last step, after which one was written
        raise stop.stopped(trainer)
    gather(model)
    if trainer.is_global_zero:
        step = _take_best(model, folder) if config.tune.export == "best" else trainer.global_step
        _save_model(model, config, step)
        ended = {"ended": trainer.global_step} if trainer.global_step < config.tune.steps else {}
        if ended:
            print(f"xcomp: a callback ended the run after step {trainer.global_step}", file=sys.stderr)
        if step != trainer.global_step:
            print(f"xcomp: the model is that of step {step}, with the lowest validation loss", file=sys.stderr)
        note_run(folder, tuned=_saved(config) | ended)
    trainer.strategy.barrier()


@torch.no_grad()
def _take_best(model: VideoQA, folder: Path) -> int:
    """Give a model whose parameters are whole those with the lowest validation loss; the step that they are of."""
    path = best_checkpoint(folder)
    if path is None:
        raise ConfigError(f"tune.export is best, but no validation has run in '{folder}'; take tune.export=last")
    best = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    for name, parameter in model.named_parameters():
        if name in best["state_dict"]:
            parameter.copy_(best["state_dict"][name])
    return best["global_step"]


def _save_model(model: VideoQA, config: RunConfig, step: int) -> None:
    folder, dtype = config.folder / "model", config.tune.save_dtype
    lora, base = config.tune.lora, None
    if lora is not None and lora.merge:
        merge_adapters(model.backbone.language_model)
    tuned = {"run": config.name, "steps": step, "train": config.tune.train, "seed": config.seed}
    try:
        with whole_folder(folder) as fresh:
            if lora is not None and not lora.merge:
                save_adapters(model.backbone, fresh, dtype)
                base = base_of(model.backbone)
            else:
                model.backbone.save_pretrained(str(fresh), dtype=dtype)
            save_compressor(model.compressor, fresh)
            write_record(fresh, model.compressor, base, **tuned)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"model '{folder}' cannot be written: {reason}; once there is room the same command writes it"
        ) from error


def _read_data(config: RunConfig, tell: bool) -> ConversationData:
    """The run's records, before a model is loaded for them; with ``tell``, lines on stderr about what is not taken."""
    try:
        data = ConversationData(config)
        name, options = split_component("backbone", config.backbone)
        data.check(configure("backbone", name, options, config.plugins)[0], f"backbone '{name}'")
    except MissingData as error:
        for line in error.lines if tell else ():
            print(f"xcomp: {line}", file=sys.stderr)
        raise
    for where, records in data.records.items() if tell else ():
        lines = [f"missing, and left out: {line}" for line in records.missing]
        lines += [*records.empty, *records.notes]
        if records.refused:
            first = records.refused[0].reason
            lines.append(f"{len(records.refused)} records are refused and left out (see {SKIPPED}), the first: {first}")
        for line in lines:
            print(f"xcomp: {'tune.data' if where == 'train' else 'tune.validation'}: {line}", file=sys.stderr)
    return data


def _tell_rounding(model: VideoQA) -> None:
    half = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if half:
        print(
            f"xcomp: weights that are trained are held in {str(half.pop()).removeprefix('torch.')}, where small steps "
            "round to none; backbone.dtype=float32 with trainer.precision=bf16-mixed computes in it alone",
            file=sys.stderr,
        )


def _tell_skipped(data: ConversationData) -> None:
    for name in data.records:
        if skipped := len(data.skipped(name)):
            print(
                f"xcomp: {skipped} {name} records left out; which and why: {data.skipped(name).path}", file=sys.stderr
            )


# --- where a run stands -----------------------------------------------------------------------------------------------


def _is_tuned(config: RunConfig) -> bool:
    """Whether the run folder's model is the one asked for: ``tune.steps`` may have changed since it was written."""
    folder = config.folder
    if not (folder / "model").is_dir():
        return False
    if not (folder / "run.json").is_file():
        raise ConfigError(
            f"run folder '{folder}' holds a model and no run.json; choose another 'name', or delete the folder"
        )
    tuned = _tuned(folder)
    return all(tuned.get(name, value) == value for name, value in _saved(config).items())


def _saved(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in flat(config.to_dict()["tune"]).items() if name in SAVED}


def _tuned(folder: Path) -> dict[str, Any]:
    """``SAVED`` of the model that is there: noted once it was written, else as the run was started."""
    run = noted(folder)
    return run.get("tuned") or {"export": "last", **flat(run["config"]["tune"])}


def _last_step(config: RunConfig) -> int:
    """``tune.steps``, or the step at which a callback ended this run."""
    steps = config.tune.steps
    if (config.folder / "run.json").is_file() and (tuned := _tuned(config.folder))["steps"] == steps:
        return tuned.get("ended", steps)
    return steps


def _note_tuned(folder: Path) -> None:
    """Before the run's description changes: what the model that is there was tuned for."""
    if (folder / "model").is_dir():
        tuned = _tuned(folder)
        note_run(folder, tuned={name: tuned.get(name) for name in (*SAVED, "ended") if name in tuned})


def _resume(config: RunConfig, trainer: L.Trainer) -> Resume | None:
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
    ranks, accumulated = trainer.world_size, trainer.accumulate_grad_batches
    if resume is not None and resume.ranks and resume.ranks * resume.accumulated != ranks * accumulated:
        before = resume.ranks * resume.accumulated
        raise ConfigError(
            f"run folder '{folder}': a step took {before} batches ({resume.ranks} devices, trainer."
            f"accumulate_grad_batches={resume.accumulated}), now it would take {ranks * accumulated} ({ranks} devices, "
            f"trainer.accumulate_grad_batches={accumulated}); devices times accumulate_grad_batches must stay {before}"
        )
    return resume


def _check_records(folder: Path, data: ConversationData, *, begun: bool) -> dict[str, Any]:
    """What run.json says of the training records. ConfigError if it says something else of a run that has ``begun``."""
    records = data.records["train"]
    now = {"number": len(records.conversations), "kinds": dict(records.kinds), "digest": records.digest}
    if begun:
        before = noted(folder).get("records", now)
        if before != now:
            raise ConfigError(
                f"run folder '{folder}': the records of tune.data are not those that it began with "
                f"({before['number']:,} then, {now['number']:,} now, of other content or in another order); put them "
                "back, or choose another 'name'"
            )
    return now


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
            f"rate follows the schedule over {config.tune.steps} steps"
            + (", and so does the curriculum" if config.tune.curriculum else ""),
            file=sys.stderr,
        )

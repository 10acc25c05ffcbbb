"""``xcomp compare`` and ``xcomp evaluate``: every arm answers the same questions; one JSON line an answer, as it goes.

A run that stopped, however it stopped, goes on where it was: questions that have a record are not asked again.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console
from torch.utils.data import DataLoader

from xcomp.benchmark import Benchmark, Question
from xcomp.compare.arms import ResolvedArm, resolve_arms
from xcomp.compare.report import read_run, table, write_report
from xcomp.compare.statistics import summarise
from xcomp.config import ConfigError, RunConfig, build_component
from xcomp.contract import check_methods, check_questions, name_of, require
from xcomp.model import Answer, Query, VideoQA
from xcomp.run import check_run, make_trainer, open_run, write_atomically
from xcomp.video import VideoError, check_budget

RECORDS = "records.jsonl"
Item = tuple[Question, Query]


def evaluate(config: RunConfig) -> Path:
    """One arm: the run's own backbone, compressor and selector."""
    return compare(replace(config, arms=[]), kind="evaluate")


def compare(config: RunConfig, kind: str = "compare") -> Path:
    """Run all arms, print the table, write the report; returns the run folder."""
    if config.benchmark is None:
        raise ConfigError("no benchmark; name one, e.g. benchmark: needle")
    L.seed_everything(config.seed, workers=True, verbose=False)
    # What can be wrong is found before anything is written.
    arms = resolve_arms(config)
    benchmark = build_component("benchmark", config.benchmark, config.plugins)
    check_methods("benchmark", benchmark, "questions")
    check_run(config, kind)
    make_trainer(config.trainer, logger=False, enable_checkpointing=False)
    models = _Models(config)
    models.build(arms[0])
    for arm in arms:
        if arm.frames is not None and arm.backbone == arms[0].backbone:
            check_budget(arm.frames, models.backbone.clip_frames)
    questions = benchmark.questions()
    check_questions(name_of("benchmark", benchmark), questions)
    questions = questions[: config.limit]
    about = {"name": config.benchmark, "num_questions": len(questions)}
    folder = open_run(config, kind, arms=[arm.description for arm in arms], benchmark=about)
    records = read_records(folder / RECORDS)
    for arm in arms:
        done = {r["question_id"] for r in records if r["arm"] == arm.name}
        items = [(q, Query(q.video, q.question, benchmark.prompt(q))) for q in questions if q.id not in done]
        if items:
            run_arm(config, arm, models.build(arm), benchmark, items, folder / RECORDS)
    return report(folder)


def report(folder: Path) -> Path:
    """Print the table of a finished run and write its report."""
    run, records = read_run(folder)
    console = Console()
    console.print(table(summarise(records)))
    failed = sum(1 for r in records if r.get("error"))
    if failed:
        console.print(f"{failed} questions could not be asked (see 'error' in {folder / RECORDS}); they count as wrong")
    console.print(f"report: {write_report(folder)}", soft_wrap=True)
    return folder


class _Models:
    """Builds an arm's model, keeping the backbone while arms in a row name the same one."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.node: Any = None
        self.backbone: Any = None

    def build(self, arm: ResolvedArm) -> VideoQA:
        if self.backbone is None or self.node != arm.backbone:
            self.backbone = None  # free the old one before the next is loaded
            self.backbone = build_component("backbone", arm.backbone, self.config.plugins)
            self.node = arm.backbone
        return VideoQA.from_config(arm.config(self.config), self.backbone).eval()


class RecordWriter(Callback):
    """Appends each batch's records to the file as soon as they are there."""

    def __init__(self, path: Path, arm: ResolvedArm, benchmark: Benchmark):
        self.path, self.arm, self.benchmark = path, arm, benchmark

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        lines = [record(self.arm, q, o, self.benchmark) for (q, _), o in zip(batch, outputs)]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def run_arm(
    config: RunConfig, arm: ResolvedArm, model: VideoQA, benchmark: Benchmark, items: list[Item], path: Path
) -> None:
    """Ask an arm its open questions through Lightning's Trainer. The first is asked once before, as a warm-up."""
    loader = DataLoader(items, batch_size=config.batch_size, collate_fn=list)
    callbacks: list[Callback] = [RecordWriter(path, arm, benchmark)]
    if config.trainer.get("enable_progress_bar", True):
        print(f"{arm.name}: {len(items)} questions", flush=True)
        callbacks.append(RichProgressBar())
    trainer = make_trainer(
        config.trainer,
        accelerator="cpu" if model.backbone.device.type == "cpu" else "auto",
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model.predict_step(items[:1])
    trainer.predict(model, loader, return_predictions=False)


def record(arm: ResolvedArm, question: Question, outcome: Answer | VideoError, benchmark: Benchmark) -> dict[str, Any]:
    """One line of records.jsonl."""
    line = {
        "arm": arm.name,
        "question_id": question.id,
        "video": question.video,
        "category": question.category,
        "answer": question.answer,
        "prediction": None,
        "correct": False,
        "events": [list(span) for span in question.events],
        "error": None,
    }
    if isinstance(outcome, VideoError):
        return {**line, "error": str(outcome)}
    prediction = benchmark.parse(outcome.text, question)
    right = prediction is None or (type(prediction) is int and 0 <= prediction < len(question.options))
    clause = f"parse() must return an option's number or None, not {prediction!r}"
    require(right, name_of("benchmark", benchmark), clause)
    return {
        **line,
        "prediction": prediction,
        "correct": prediction == question.answer,
        "text": outcome.text,
        "frames": outcome.frames,
        "times": outcome.times,
        "duration": outcome.duration,
        "num_frames": len(outcome.frames),
        "tokens_in": outcome.tokens_in,
        "tokens_out": outcome.tokens_per_layer[-1],
        "tokens_per_layer": outcome.tokens_per_layer,
        "macs": outcome.macs,
        "seconds": outcome.seconds,
        "seconds_select": outcome.seconds_select,
        "scores": outcome.scores,
        "candidate_times": outcome.candidate_times,
    }


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records written so far. A line that an interruption cut short is taken out of the file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # every record ends its line
    if whole != text:
        write_atomically(path, whole)
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except json.JSONDecodeError as error:
        raise ConfigError(f"'{path}' holds a line that is not JSON ({error}); delete that line") from error

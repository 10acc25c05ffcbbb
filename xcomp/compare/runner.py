"""``xcomp compare`` and ``xcomp evaluate``: every arm answers the same questions; one JSON line an answer, as it goes.

Videos are taken one at a time and asked all open questions of all arms of one backbone, so that each is decoded and
encoded once. Lightning's Trainer shares videos over however many processes were started. A run that stopped, however it
stopped, goes on where it was: questions that have an answer are not asked again.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset

from xcomp.answering import Answer, Answerer, Query
from xcomp.backbone import Backbone, check_device
from xcomp.benchmark import Benchmark, Question
from xcomp.compare.analysis import Analysis, Options
from xcomp.compare.arms import ResolvedArm, resolve_arms, single
from xcomp.compare.records import (
    RECORDS,
    Record,
    append_records,
    export_frames,
    merge_records,
    rank_file,
    read_run_records,
    record,
)
from xcomp.compare.report import report_folder, write_report
from xcomp.compare.tables import print_summary
from xcomp.compare.tasks import VideoTask, share_out
from xcomp.config import ConfigError, RunConfig, build_component, component_parts, split_component
from xcomp.contract import ContractError, check_methods
from xcomp.decoding import DecodingPool
from xcomp.inflight import PixelBudget, VideoInFlight
from xcomp.ledger import Ledger, Share, shares
from xcomp.memory import PeakMemory
from xcomp.messages import printable
from xcomp.recorded import tell_others
from xcomp.registry import configure
from xcomp.run import check_run, hold_run, make_trainer, open_run
from xcomp.scoring import check_mode, list_missing, missing_videos, query_of, read_questions
from xcomp.selector import shared_selector
from xcomp.video import VideoError


def evaluate(config: RunConfig) -> Path:
    """One arm: the run's own backbone, compressor and selector."""
    return compare(single(config), kind="evaluate")


def num_failed(records: Iterable[Record]) -> int:
    """How many questions could not be asked."""
    return sum(1 for line in records if line.get("error"))


def compare(config: RunConfig, kind: str = "compare") -> Path:
    """Run all arms, print the table, write the report; returns the run folder."""
    if config.benchmark is None:
        raise ConfigError("no benchmark; name one, e.g. benchmark: needle")
    arms = resolve_arms(config)
    tell_others([(arm.name, arm.backbone, arm.compressor) for arm in arms], config.plugins)
    benchmark = build_component("benchmark", config.benchmark, config.plugins)
    check_methods("benchmark", benchmark, "questions")
    check_run(config, kind)
    return Comparison(config, kind, arms, benchmark).run()


class Comparison:
    """A run of arms, as one of its processes sees it."""

    def __init__(self, config: RunConfig, kind: str, arms: list[ResolvedArm], benchmark: Benchmark):
        self.config, self.kind, self.arms, self.benchmark = config, kind, arms, benchmark
        self.groups: dict[str, list[ResolvedArm]] = {}  # arms that share a backbone
        for arm in arms:
            self.groups.setdefault(_key(arm.backbone), []).append(arm)
        self.questions: list[Question] = []
        self.about: dict[str, Any] = {}

    def run(self) -> Path:
        config, folder = self.config, self.config.folder
        trainers = {key: self._trainer(arms) for key, arms in self.groups.items()}
        trainer = next(iter(trainers.values()))
        if trainer.world_size == 1 and (folder / "run.json").is_file():
            self._read_questions()
            if not any(map(self.open_tasks, self.groups.values())):
                with hold_run(folder):
                    self._note()
                    self._export(merge_records(folder, self._order))
                    report([folder])
                    return folder
        with ExitStack() as stack:
            if trainer.is_global_zero:
                stack.enter_context(hold_run(folder))
            ranks = max(1, trainer.world_size // max(1, trainer.num_nodes))
            pool = stack.enter_context(DecodingPool(config.decoding, config.sampling, ranks=ranks))
            if not self.questions:
                self._read_questions()  # before anything large is loaded
            panels = self._build(trainers)
            if trainer.is_global_zero:
                self._note()
                merge_records(folder, self._order)
            for key, arms in self.groups.items():
                panel = panels.pop(key, None) or self._panel(arms, trainers[key])
                self._ask(panel, arms, pool, trainers[key])
            trainers[key].strategy.barrier()
            if not trainer.is_global_zero:
                return folder
            self._export(merge_records(folder, self._order))
            report([folder])
            return folder

    def _note(self) -> None:
        """What the run folder says of the run."""
        open_run(self.config, self.kind, arms=[arm.description for arm in self.arms], benchmark=self.about)

    def _export(self, records: Iterable[Record]) -> None:
        if self.config.export_frames is not None:
            export_frames(Path(self.config.export_frames), records)

    @property
    def _order(self) -> list[tuple[str, str]]:
        return [(arm.name, question.id) for arm in self.arms for question in self.questions]

    def _read_questions(self) -> None:
        """The questions that will be asked, and what ``run.json`` tells of the benchmark.

        Raises:
            ConfigError: if videos are missing, unless that is allowed and some are there.
        """
        questions = read_questions(self.benchmark)[: self.config.limit]
        check_mode(self.config.generation.mode, questions)
        missing, videos = missing_videos(questions), {question.video for question in questions}
        if missing and rank_zero_only.rank == 0:
            print("\n".join(list_missing(missing)), flush=True)
        if missing and not (self.config.allow_missing and len(missing) < len(videos)):
            raise ConfigError(_refusal(missing, len(videos)))
        gone = set(missing)
        self.questions = [question for question in questions if question.video not in gone]
        left_out = len(questions) - len(self.questions)
        self.about = {
            "name": self.config.benchmark,
            "num_questions": len(self.questions),
            "num_videos": len(videos) - len(missing),
            "missing": missing,
            "missing_questions": left_out,
            "defects": dict(self.benchmark.defects),
        }
        if missing and rank_zero_only.rank == 0:
            print(f"{len(missing)} of {len(videos)} videos are missing: {left_out} questions are left out", flush=True)
        self._check_answered()

    def _check_answered(self) -> None:
        """ConfigError if a question that has an answer in the run folder has changed since."""
        asked = {question.id: question for question in self.questions}
        for line in read_run_records(self.config.folder):
            question = asked.get(line["question_id"])
            if question is None or line.get("error") or "options" not in line:
                continue
            now = {name: getattr(question, name) for name in ("question", "answer", "video")}
            now |= {name: list(getattr(question, name)) for name in ("options", "references")}
            now["span"] = question.span and list(question.span)
            changed = [name for name, value in now.items() if line.get(name) != value]
            if changed:
                raise ConfigError(
                    f"question '{question.id}' is not the one that run folder '{self.config.folder}' has an answer to: "
                    f"other {', '.join(changed)}; choose another 'name', or delete the folder"
                )

    # --- models -----------------------------------------------------------------------------------------------------

    def _trainer(self, arms: Sequence[ResolvedArm]) -> L.Trainer:
        """Lightning's Trainer for the arms of a backbone; it decides how many processes there are, and where."""
        name, options = split_component("backbone", arms[0].backbone)
        device = getattr(configure("backbone", name, options, self.config.plugins)[1], "device", "cpu")
        check_device(device)
        device = torch.device(device)
        default = {"accelerator": device.type, "devices": 1 if device.index is None else [device.index]}
        callbacks: list[Callback] = []
        if self.config.trainer.get("enable_progress_bar", True):
            callbacks.append(RichProgressBar())
        return make_trainer(
            self.config.trainer,
            **default,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # videos are shared out by what they cost
        )

    def _build(self, trainers: Mapping[str, L.Trainer]) -> dict[str, Panel]:
        """Every arm is built and checked before the first question; only the first group's models stay."""
        kept: dict[str, Panel] = {}
        for key, arms in reversed(self.groups.items()):
            kept.clear()  # free one before the next is loaded
            kept[key] = self._panel(arms, trainers[key])
        return kept

    def _panel(self, arms: Sequence[ResolvedArm], trainer: L.Trainer) -> Panel:
        config, device = self.config, trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # `cuda` without a number is this process's own
        backbone = build_component("backbone", arms[0].backbone, config.plugins)
        backbone.check_sampling(config.sampling)
        parts: dict[str, Any] = {}  # arms that name the same part share it, and what was computed with it
        answerers = {}
        for arm in arms:
            own = []
            generation, seed = config.generation, config.seed if arm.seed is None else arm.seed
            if arm.seed is not None:  # draws of arms that differ in the seed differ
                generation = replace(generation, seed=generation.seed + arm.seed)
            for kind, node in (("compressor", arm.compressor), ("selector", arm.selector)):
                key = f"{kind} {_key(node)}"
                if key not in parts:
                    build = shared_selector if kind == "selector" else partial(build_component, kind)
                    parts[key] = build(node, config.plugins)
                own.append(parts[key])
            answerers[arm.name] = Answerer(
                backbone,
                *own,
                budget=arm.frames,
                generation=generation.limited(self.benchmark.max_new_tokens),
                batch_size=config.batch_size,
                seed=seed,
            )
        return Panel(backbone, answerers, self.benchmark).eval()

    # --- asking -----------------------------------------------------------------------------------------------------

    def _ask(self, panel: Panel, arms: Sequence[ResolvedArm], pool: DecodingPool, trainer: L.Trainer) -> None:
        """Ask the arms of one backbone all their open questions, through Lightning's Trainer."""
        data = OpenVideos(self, panel, arms, pool)
        device = panel.backbone.device
        try:
            trainer.predict(panel, datamodule=data, return_predictions=False)
        except BaseException:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)  # one process's failure is one of all
            raise
        finally:
            panel.to(device)  # Lightning's teardown leaves it on the CPU

    def open_tasks(self, arms: Sequence[ResolvedArm]) -> list[VideoTask]:
        """The videos about which some of the arms have questions without an answer."""
        answered = {(r["arm"], r["question_id"]) for r in read_run_records(self.config.folder) if not r.get("error")}
        tasks: dict[Any, VideoTask] = {}
        for question in self.questions:
            open_arms = [arm.name for arm in arms if (arm.name, question.id) not in answered]
            if open_arms:
                video, span = question.video, question.span
                task = tasks.setdefault((video, span), VideoTask(video, {}, span))
                for name in open_arms:
                    task.open.setdefault(name, []).append(question.id)
        return list(tasks.values())


class Panel(L.LightningModule):
    """The arms of one backbone. ``predict_step`` asks them all their open questions about a video."""

    def __init__(self, backbone: Backbone, answerers: Mapping[str, Answerer], benchmark: Benchmark):
        super().__init__()
        self.backbone = backbone
        self.answerers = dict(answerers)
        self.benchmark = benchmark
        parts = [part for a in answerers.values() for part in (a.compressor, a.selector) if part is not None]
        self.parts = nn.ModuleList(dict.fromkeys(parts))  # so that Lightning moves them with the backbone
        self.needs = dict.fromkeys(need for a in answerers.values() for need in a.compressor.needs)
        self.writes_to: Path | None = None
        self.told = 0.0  # up to when time is told in records

    def on_predict_start(self) -> None:
        for answerer in {id(a.compressor): a for a in self.answerers.values()}.values():
            answerer.warm_up()
        self.told = Ledger.clock()

    def expected(self, task: VideoTask):
        """What to decode of a video ahead of its questions: all that some arm will need."""

        def frames_of(info):
            wanted = [self.answerers[arm].expected(info) for arm in task.open]
            frames = sorted({frame for numbers, _ in wanted for frame in numbers})
            return frames, tuple(dict.fromkeys(f for _, formats in wanted for f in formats))

        return frames_of

    def predict_step(self, batch: tuple[VideoInFlight, VideoTask, Mapping[str, Question]], batch_idx: int = 0) -> int:
        """Writes the records of one video; returns how many."""
        video, task, questions = batch
        done: dict[str, list[tuple[Question, Query, Any]]] = {}
        peaks: dict[str, dict[str, int]] = {}
        try:
            for arm, ids in task.open.items():
                asked = [questions[i] for i in ids]
                queries = [query_of(self.benchmark, question) for question in asked]
                with PeakMemory(self.backbone.device) as peak:
                    outcomes = self._answer(arm, video, queries)
                done[arm], peaks[arm] = list(zip(asked, queries, outcomes)), peak.bytes
        finally:  # what was answered is kept, whatever ends the rest
            records, failed = self._records(video, done, peaks)
            append_records(self.writes_to, records)
            video.close()
            if failed is not None:
                raise failed
        return len(records)

    def _answer(self, arm: str, video: VideoInFlight, queries: list[Query]) -> list[Any]:
        try:
            return self.answerers[arm].answer(video, queries)
        except VideoError as error:
            return [error] * len(queries)

    def _records(
        self, video: VideoInFlight, done: dict[str, list], peaks: dict[str, dict[str, int]]
    ) -> tuple[list[Record], ContractError | None]:
        """The lines, without those of answers that the benchmark cannot judge; and the first such failure."""
        works = {(arm, q.id): out.work for arm, rows in done.items() for q, _, out in rows if isinstance(out, Answer)}
        costs, info = shares(works), video.known
        waiting = video.ledger.seconds_waiting / max(1, len(works))
        harness = self._harness(video, costs.values()) / max(1, len(works))
        lines, failed = [], None
        for arm, rows in done.items():
            mode = self.answerers[arm].generation.mode
            for question, query, outcome in rows:
                try:
                    line = record(arm, question, query, outcome, self.benchmark, info, mode)
                except ContractError as error:
                    failed = failed or error
                    continue
                if (cost := costs.get((arm, question.id))) is not None:
                    line |= {
                        "macs": cost.macs,
                        "seconds": cost.seconds,
                        "seconds_amortised": cost.seconds_amortised,
                        "seconds_waiting": round(waiting, 6),
                        "seconds_harness": round(harness, 6),
                        "peak_memory": peaks[arm],
                    }
                lines.append(line)
        return lines, failed

    def _harness(self, video: VideoInFlight, costs: Iterable[Share]) -> float:
        """Seconds since the last video's records were made that are no stage's of this process, nor waiting."""
        now = Ledger.clock()
        stages = sum(s for cost in costs for stage, s in cost.seconds_amortised.items() if stage != "decode")
        harness = now - self.told - video.ledger.seconds_waiting - stages
        self.told = now
        return max(0.0, harness)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch


class OpenVideos(L.LightningDataModule):
    """This process's share of the videos with open questions, each opened a while before it is needed."""

    def __init__(self, run: Comparison, panel: Panel, arms: Sequence[ResolvedArm], pool: DecodingPool):
        super().__init__()
        self.run, self.panel, self.arms, self.pool = run, panel, arms, pool
        self.tasks: list[VideoTask] = []

    def setup(self, stage: str) -> None:
        """The first process reads what is open and shares it out, so that all see the same."""
        trainer, shared = self.trainer, None
        if trainer.is_global_zero:
            shared = share_out(self.run.open_tasks(self.arms), trainer.world_size)
        shared = trainer.strategy.broadcast(shared)
        self.tasks = shared[trainer.global_rank]
        self.panel.writes_to = rank_file(self.run.config.folder, trainer.global_rank, trainer.world_size)
        if trainer.is_global_zero and trainer.progress_bar_callback is not None:
            count = sum(task.num_open for tasks in shared for task in tasks)
            names = ", ".join(arm.name for arm in self.arms)
            print(f"{count} questions about {sum(map(len, shared))} videos open for: {names}", flush=True)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(_Ahead(self), batch_size=None, collate_fn=_as_it_is)


class _Ahead(Dataset):
    """Videos in flight: when one is taken, the next begins to be opened and decoded."""

    def __init__(self, data: OpenVideos):
        self.data = data
        self.budget = PixelBudget(data.run.config.memory)
        self.started: dict[int, VideoInFlight] = {}
        self.questions = {question.id: question for question in data.run.questions}

    def __len__(self) -> int:
        return len(self.data.tasks)

    def __getitem__(self, index: int) -> tuple[VideoInFlight, VideoTask, dict[str, Question]]:
        video = self._start(index)
        if index + 1 < len(self):
            video.following = self._start(index + 1)
        del self.started[index]
        return video, self.data.tasks[index], self.questions

    def _start(self, index: int) -> VideoInFlight:
        if index not in self.started:
            task, data = self.data.tasks[index], self.data
            video = VideoInFlight(
                task.video,
                data.panel.backbone,
                data.pool,
                data.run.config.memory,
                span=task.span,
                budget=self.budget,
                needs=data.panel.needs,
            )
            video.expect(data.panel.expected(task))
            self.started[index] = video
        return self.started[index]


def _refusal(missing: Sequence[str], num_videos: int) -> str:
    try:
        where = os.path.commonpath([os.path.dirname(os.path.abspath(video)) for video in missing])
    except ValueError:  # no path, or on several drives
        where = os.path.dirname(missing[0])
    if len(missing) == num_videos:
        return f"none of the benchmark's {num_videos} videos is there, looked for in '{printable(where)}'"
    return (
        f"{len(missing)} of the benchmark's {num_videos} videos are missing, looked for in '{printable(where)}'; "
        "allow_missing: true goes on without them"
    )


def _key(node: Any) -> str:
    """What tells one component from another: its name and options."""
    nodes = [list(split_component("component", part)) for part in component_parts("compressor", node)]
    return json.dumps(nodes, sort_keys=True)


def _as_it_is(item: Any) -> Any:
    return item


def report(folders: Sequence[Path], out: Path | None = None, options: Options | None = None) -> Analysis:
    """Print the tables of one or several runs so far and write their report, into the folder of one or into ``out``."""
    analysis = write_report(folders, out, options)
    console = Console()
    print_summary(analysis.summary, console)
    failed = num_failed(analysis.records)
    if failed:
        where = ", ".join(str(folder / RECORDS) for folder in folders)
        console.print(
            f"{failed} questions could not be asked (see 'error' in {where}) and count as wrong; the same command asks "
            "them again",
            markup=False,
        )
    page = report_folder(folders, out) / "report.html"
    console.print(f"report: {page}", soft_wrap=True, markup=False)
    if failed == len(analysis.records):
        raise ConfigError(f"no question could be asked; the first: {analysis.records[0]['error']}")
    return analysis

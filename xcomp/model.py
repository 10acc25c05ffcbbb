"""VideoQA: a backbone, a compressor and a frame selector as one LightningModule.

``training_step`` tunes (supervised compression tuning), ``test_step`` evaluates questions, ``predict_step`` and ``ask``
answer them (:mod:`xcomp.answering`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import Module, ModuleDict, Parameter
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm
from torchmetrics import MeanMetric
from transformers import get_scheduler
from transformers.generation import BaseStreamer

from xcomp.adapters import adapter_parameters, add_adapters
from xcomp.answering import Answer, Answerer, AskError, Query
from xcomp.backbone import Backbone
from xcomp.benchmark import LETTERS, Benchmark, multiple_choice_prompt, parse_option
from xcomp.compressor import Compressor
from xcomp.config import (
    LR_SCHEDULES,
    ConfigError,
    Decoding,
    Generation,
    Memory,
    RunConfig,
    Sampling,
    Tune,
    build_component,
)
from xcomp.contract import name_of
from xcomp.curriculum import check_curriculum, distillation_loss, eased, end_at, frozen_copy
from xcomp.data.module import Sample
from xcomp.data.records import IGNORED
from xcomp.decoder import Decoder
from xcomp.decoding import DecodingPool
from xcomp.inflight import VideoInFlight
from xcomp.ledger import shares
from xcomp.recorded import resolved_compressor
from xcomp.scoring import verdict_on
from xcomp.selector import FrameSelector
from xcomp.sharding import is_sharded, shard
from xcomp.video import VideoError
from xcomp.visual import VisualTokens


def rename_states(state: dict[str, Any], names: Mapping[Any, Any]) -> None:
    """Call the parameters of an optimizer's ``state_dict`` by other names or numbers, in place, in their order."""
    order = {new: place for place, new in enumerate(names.values())}
    if not state or not all(key in names for group in state["param_groups"] for key in group["params"]):
        return  # of another process, or named so already
    state["state"] = {names[key]: value for key, value in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = sorted((names[key] for key in group["params"]), key=order.__getitem__)


class VideoQA(L.LightningModule):
    """Question answering on videos. ``frames`` is the budget given to the selector; None shows all candidates.

    ``benchmark`` says how long answers get where ``generation`` does not, and how ``test_step`` reads and scores them.
    """

    def __init__(
        self,
        backbone: Backbone,
        compressor: Compressor | None = None,
        selector: FrameSelector | None = None,
        *,
        frames: int | None = None,
        sampling: Sampling | None = None,
        generation: Generation | None = None,
        tune: Tune | None = None,
        decoding: Decoding | None = None,
        memory: Memory | None = None,
        batch_size: int = 1,
        seed: int = 0,
        benchmark: Benchmark | None = None,
    ):
        super().__init__()
        self.benchmark = benchmark or Benchmark(None)
        generation = (generation or Generation()).limited(self.benchmark.max_new_tokens)
        self.sampling = sampling or Sampling()
        backbone.check_sampling(self.sampling)
        self.answerer = Answerer(
            backbone, compressor, selector, budget=frames, generation=generation, batch_size=batch_size, seed=seed
        )
        self.backbone = backbone
        self.compressor = self.answerer.compressor.to(backbone.device)
        self.selector = selector if selector is None else selector.to(backbone.device)
        self.tune = tune or Tune()
        # Without processes of its own: a script may ask without the guard that starting processes needs.
        self.decoding = decoding or Decoding(workers=0)
        self.memory = memory or Memory()
        self.decoder = Decoder(self.backbone, self.compressor, checkpointing=self.tune.gradient_checkpointing)
        self.accuracy = MeanMetric()
        self.validation = ModuleDict({name: MeanMetric() for name in ("loss", "token_accuracy")})  # of all ranks
        self._of_step: list[dict[str, Tensor]] = []  # what is logged of the batches that one optimizer step takes
        object.__setattr__(self, "teacher", None)  # no part of this module: neither trained nor saved

    @classmethod
    def from_config(cls, config: RunConfig, backbone: Backbone | None = None) -> VideoQA:
        """The model that a run's configuration names; ``backbone`` in place of building its own."""
        if isinstance(config.frames, (list, tuple)):
            raise ConfigError(f"frames is {config.frames}; several budgets are for a comparison, here it must be one")
        compressor = resolved_compressor(config.compressor, config.backbone, "the run")
        nodes = {"compressor": compressor, "selector": config.selector}
        parts = [build_component(kind, node, config.plugins) for kind, node in nodes.items()]
        backbone = backbone or build_component("backbone", config.backbone, config.plugins)
        benchmark = config.benchmark and build_component("benchmark", config.benchmark, config.plugins)
        return cls(
            backbone,
            *parts,
            frames=config.frames,
            sampling=config.sampling,
            generation=config.generation,
            tune=config.tune,
            memory=config.memory,
            batch_size=config.batch_size,
            seed=config.seed,
            benchmark=benchmark,
        )

    # --- answering --------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self, video: str | Path, span: tuple[float, float] | None = None) -> Iterator[VideoInFlight]:
        """A video, or a ``span`` of it in seconds, to ask any number of questions: frames, tokens and the language
        model's pass over it are kept.

            with qa.open("video.mp4") as video:
                qa.ask(video, "What does the man pick up?")

        Raises:
            VideoError: if the file cannot be opened, or does not have the span.
        """
        with DecodingPool(self.decoding, self.sampling) as pool:
            needs = self.compressor.needs
            options = {"span": span, "keep_states": True, "needs": needs}
            with VideoInFlight(str(video), self.backbone, pool, self.memory, **options) as opened:
                opened.expect(self.answerer.expected)
                _ = opened.info  # what cannot be opened is said now
                yield opened

    def ask(
        self,
        video: str | Path | VideoInFlight,
        question: str,
        options: Sequence[str] | None = None,
        streamer: BaseStreamer | None = None,
    ) -> Answer:
        """Answer one question about a video file, or one that was opened. With ``options``, ``Answer.choice`` is the
        chosen one's index.

        ``streamer``, one of transformers', is handed each token as it is written.

        Raises:
            VideoError: if the file cannot be opened or decoded.
            QuestionError: if the question cannot be put to the model.
        """
        if not isinstance(video, VideoInFlight):
            with self.open(video) as opened:
                return self.ask(opened, question, options, streamer)
        text = multiple_choice_prompt(question, options) if options else question
        query = Query(video.path, question, text, continuations=tuple(LETTERS[: len(options or ())]))
        (answer,) = self.answerer.answer(video, [query], streamer)
        if not isinstance(answer, Answer):
            raise answer
        answer.share = shares({0: answer.work})[0]
        if options and answer.option_scores is None:
            answer.choice = parse_option(answer.text, options)
        return answer

    def answer(self, queries: Sequence[Query]) -> list[Answer | AskError]:
        """Answers in the order of the queries; the questions about one video share what they can."""
        outcomes: dict[int, Answer | AskError] = {}
        videos: dict[Any, list[int]] = {}
        for number, query in enumerate(queries):
            videos.setdefault((query.video, query.span), []).append(number)
        for (path, span), members in videos.items():
            try:
                with self.open(path, span) as video:
                    found = self.answerer.answer(video, [queries[i] for i in members])
            except VideoError as error:
                found = [error] * len(members)
            costs = shares({i: answer.work for i, answer in zip(members, found) if isinstance(answer, Answer)})
            for number, outcome in zip(members, found):
                if isinstance(outcome, Answer):
                    outcome.share = costs[number]
                outcomes[number] = outcome
        return [outcomes[number] for number in range(len(queries))]

    def _encode(self, samples: Sequence[Sample]) -> list[VisualTokens | None]:
        """Tokens of several videos in one pass of the vision path, where clips never interact, and of pictures in
        another; None of samples without any."""
        backbone = self.backbone
        found: list[VisualTokens | None] = [None] * len(samples)
        for images in (False, True):
            rows = [i for i, s in enumerate(samples) if s.pixels is not None and s.images == images]
            if not rows:
                continue
            together = torch.cat([samples[i].pixels for i in rows]).to(backbone.device)
            pixels = backbone.pixel_format.normalise(together, backbone.dtype)
            visual = backbone.images(pixels) if images else backbone.visual(pixels, self.compressor.needs)
            merged = 1 if images else backbone.merged_frames
            for row, tokens in zip(rows, visual.split([len(samples[i].pixels) // merged for i in rows])):
                found[row] = tokens
        return found

    # --- Lightning --------------------------------------------------------------------------------------------------

    def predict_step(self, batch: list[tuple[Any, Query]], batch_idx: int = 0) -> list[Answer | AskError]:
        """Answers to (question, query) pairs; what cannot be read or asked is that query's outcome, not the end."""
        return self.answer([query for _, query in batch])

    def test_step(self, batch: list[tuple[Any, Query]], batch_idx: int = 0) -> None:
        """Mean score over (question, query) pairs by the benchmark's rules; that of choices is their accuracy."""
        for (question, _), answer in zip(batch, self.answer([query for _, query in batch])):
            if not isinstance(answer, Answer):
                raise answer
            self.accuracy.update(verdict_on(self.benchmark, question, answer).score)
        self.log("test/accuracy", self.accuracy, batch_size=len(batch))

    def _answers(self, batch: list[Sample]) -> tuple[Tensor, Tensor]:
        """Logits (R, V) at the supervised tokens of a batch and between them, and the labels (R,) there."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._vision_is_blind(batch)):
            tokens = self._encode(batch)
        texts = [sample.text for sample in batch]
        # Where answers begin: a rule that asks for the question takes what stands before.
        first = [_first_label(t.labels) if t.prompt_length is None else t.prompt_length for t in texts]
        further, labels = [], []
        for text, start in zip(texts, first):
            known = torch.full_like(text.prefix_ids, IGNORED) if text.prefix_labels is None else text.prefix_labels
            before = torch.cat([known, text.labels[:start]])
            further.append((before != IGNORED).nonzero()[:, 0])
            labels += [text.labels[start:], before[further[-1]]]
        logits = self.decoder.logits(
            tokens,
            [text.prefix_ids for text in texts],
            [text.suffix_ids[:-1] for text in texts],  # the token before a label predicts it: the last need not be run
            [len(text.labels) - start for text, start in zip(texts, first)],
            [text.frame_texts for text in texts],
            further,
        )
        return logits, torch.cat(labels).to(logits.device)

    def _loss(self, batch: list[Sample]) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the supervised tokens of a batch, and the share of them that is predicted right."""
        return self._loss_of(*self._answers(batch))

    def _loss_of(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``_loss`` of what ``_answers`` gives."""
        right = (logits.argmax(-1) == labels)[labels != IGNORED].float().mean()
        return cross_entropy(logits.float(), labels, ignore_index=IGNORED), right

    def _vision_is_blind(self, batch: list[Sample]) -> bool:
        """Whether, as in the released training, a long video teaches the language model alone."""
        quirk = "no_vision_gradient_from_512_frames" in self.tune.quirks
        return quirk and sum(sample.size(self.backbone)[1] for sample in batch) >= 512

    def _nothing_of_unused(self, batch: list[Sample], like: Tensor) -> Tensor:
        """0, of which the trained parameters that a batch does not use get gradients of 0.

        Ranks exchange the gradients of all that is trained: they must have as many.
        """
        nothing = torch.zeros_like(like)
        if self._vision_is_blind(batch) or all(sample.pixels is None for sample in batch):
            modules = [module for part in ("vision", "projector", "compressor") for module in self._parts()[part]]
            for parameter in (p for module in modules for p in module.parameters() if p.requires_grad):
                nothing = nothing + 0 * parameter.float().sum()
        return nothing

    def training_step(self, batch: list[Sample], batch_idx: int) -> Tensor:
        logits, labels = self._answers_in_step(batch)
        loss, right = self._loss_of(logits, labels)
        loss = loss + self._nothing_of_unused(batch, loss)
        self._of_step.append({"loss": loss.detach().float(), "token_accuracy": right.detach()})
        if (distillation := self.tune.distillation) is None:
            return loss
        with torch.no_grad():
            taught, _ = self.teacher._answers(batch)
        rows = labels != IGNORED
        apart = distillation_loss(logits[rows], taught[rows], distillation.temperature)
        self._of_step[-1]["distillation"] = apart.detach()
        return (1 - distillation.weight) * loss + distillation.weight * apart

    def _answers_in_step(self, batch: list[Sample]) -> tuple[Tensor, Tensor]:
        """``_answers``, compressed as much as the curriculum says by now."""
        curriculum, config = self.tune.curriculum, self.compressor.config
        if curriculum is None:
            return self._answers(batch)
        first = self.backbone.tokens_per_frame
        if config.start is not None and config.schedule != "constant":
            first = config.start
        end = end_at(curriculum, self.trainer.global_step, self.tune.steps, first, config.end)
        with eased(self.compressor, end):
            return self._answers(batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the means over a step's batches, of all ranks, and the norm of the gradient before it is clipped.

        Raises:
            ValueError: on all ranks, if a loss or the gradient is not finite: the weights are still those of the step
                before. With ``16-mixed`` the Trainer passes over steps whose gradient is not.
        """
        found = [values["loss"] for values in self._of_step]
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients:  # DeepSpeed holds them elsewhere
            norm = get_total_norm(gradients)
            norm = norm.full_tensor() if is_sharded(self.trainer) else norm
            self.log("train/gradient_norm", norm)
            if self.trainer.precision != "16-mixed":
                found.append(norm.to(found[0].device))
        finite = bool(torch.stack(found).isfinite().all())
        if self.trainer.strategy.reduce_boolean_decision(not finite, all=False):
            raise ValueError(
                f"the loss or the gradient of step {self.trainer.global_step + 1} is not finite; checkpoints before it "
                "are kept. Under another 'name', a lower tune.learning_rate, a longer tune.warmup_ratio or "
                "trainer.precision=bf16-mixed may help"
            )
        for name in self._of_step[0]:
            mean = torch.stack([values[name] for values in self._of_step]).mean()
            self.log(f"train/{name}", mean, prog_bar=True, sync_dist=True)
        self._of_step.clear()

    def validation_step(self, batch: list[Sample], batch_idx: int) -> None:
        counted = [sample for sample in batch if sample.counted]
        found = self._loss(counted or batch)  # which ranks that hold a part of the model run together
        tokens = sum(sample.text.num_labels for sample in counted)  # which batches they came in is of no account
        for name, value in zip(("loss", "token_accuracy"), found):
            self.validation[name].update(value, weight=tokens)
            self.log(f"validation/{name}", self.validation[name], prog_bar=True, batch_size=len(batch))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # lists of unequal samples: each tensor moves where it is used

    def prepare_tuning(self, *, sharded: bool = False) -> None:
        """Before training: a teacher of the weights as they are now, adapters, and what is not trained frozen.

        With ``sharded`` parameters the teacher has all of its own.

        Raises:
            ConfigError: for an option of ``tune`` that does not fit the backbone or the compressor.
        """
        if self.tune.curriculum is not None:
            check_curriculum(self.compressor)
        if self.tune.distillation is not None:
            changing = [part for part in self.tune.train if part != "llm" or self.tune.lora is None]
            changing = {id(p) for part in changing for module in self._parts()[part] for p in module.parameters()}
            same = set() if sharded else {id(p) for p in self.backbone.parameters()} - changing
            object.__setattr__(self, "teacher", VideoQA(frozen_copy(self.backbone, same), sampling=self.sampling))
        if self.tune.lora is not None:
            add_adapters(self.backbone, self.tune.lora, self.answerer.seed)
        self.freeze_untrained()

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def configure_model(self) -> None:
        """Lightning's hook, on every process: where the strategy holds the model in pieces, cut it."""
        if is_sharded(self.trainer):
            mesh = self.device_mesh["data_parallel"]
            shard(self, self.backbone, mesh, "training_step", "validation_step")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the parameters of optimizer states, which strategies number in ways of their own."""
        for state, optimizer in zip(checkpoint.get("optimizer_states", []), self.trainer.optimizers):
            names = {id(parameter): name for name, parameter in self.named_parameters()}
            numbered = [id(p) for group in optimizer.param_groups for p in group["params"]]
            if is_sharded(self.trainer):  # there, all parameters are numbered
                numbered = list(names)
            rename_states(state, {number: names[parameter] for number, parameter in enumerate(numbered)})
        if self.tune.lora is not None and checkpoint["state_dict"]:  # of the first process, where it is one file
            checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in self._trained()}

    @property
    def strict_loading(self) -> bool:
        """Lightning's: whether a checkpoint holds all parameters, and not those of adapters alone."""
        return self.tune.lora is None

    def _trained(self) -> dict[str, Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not is_sharded(self.trainer):
            numbers = {name: i for i, name in enumerate(n for _, group in self._groups() for n in group)}
            for state in checkpoint.get("optimizer_states", []):
                rename_states(state, numbers)

    def _parts(self) -> dict[str, list[Module]]:
        """What ``tune.train`` can name."""
        return {**self.backbone.parts(), "compressor": [self.compressor]}

    def freeze_untrained(self) -> None:
        """Let gradients reach only the parts that ``tune.train`` names."""
        self.backbone.requires_grad_(False)
        self.compressor.requires_grad_(False)
        parts = self._parts()
        if "compressor" in self.tune.train and not any(True for _ in self.compressor.parameters()):
            name = name_of("compressor", self.compressor)
            raise ConfigError(f"tune.train names 'compressor', but {name} has no parameters")
        for name in self.tune.train:
            for module in parts[name]:
                adapted = name == "llm" and self.tune.lora is not None
                for parameter in adapter_parameters(module) if adapted else module.parameters():
                    parameter.requires_grad_(True)

    def _groups(self) -> list[tuple[str | None, dict[str, Parameter]]]:
        """(part, its trained parameters by name): a group of the optimizer for each learning rate."""
        trained = self._trained()
        if not self.tune.learning_rates:
            return [(None, trained)]
        groups = []
        for part, modules in self._parts().items():
            own = {id(p) for module in modules for p in module.parameters()}
            if group := {name: p for name, p in trained.items() if id(p) in own}:
                groups.append((part, group))
                trained = {name: p for name, p in trained.items() if name not in group}
        return groups

    def configure_optimizers(self) -> dict[str, Any]:
        tune = self.tune
        groups: list[dict[str, Any]] = [{"params": list(own.values())} for _, own in self._groups()]
        if tune.learning_rates:
            for group, (part, _) in zip(groups, self._groups()):
                group |= {"lr": tune.learning_rates.get(part, tune.learning_rate), "name": part}
        optimizer = torch.optim.AdamW(groups, lr=tune.learning_rate, weight_decay=tune.weight_decay)
        warmup = math.ceil(tune.warmup_ratio * tune.steps)
        schedule = get_scheduler(LR_SCHEDULES[tune.schedule], optimizer, warmup, tune.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _first_label(labels: Tensor) -> int:
    return int((labels != IGNORED).nonzero()[0])

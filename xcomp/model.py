"""VideoQA: a backbone, a compressor and a frame selector as one LightningModule.

``training_step`` tunes (supervised compression tuning), ``test_step`` evaluates questions, ``predict_step`` and ``ask``
answer them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from transformers import get_cosine_schedule_with_warmup
from transformers.generation import BaseStreamer

from xcomp.backbone import Backbone, Prompt, ShownVideo
from xcomp.benchmark import multiple_choice_prompt, parse_option
from xcomp.compressor import Compressor
from xcomp.config import ConfigError, Generation, RunConfig, Sampling, Tune, build_component
from xcomp.contract import check_chosen, check_encoded, check_methods, check_pixels, check_scores, name_of
from xcomp.cost import LLMShape, prefill_cost
from xcomp.data.module import Sample, candidate_indices
from xcomp.data.records import IGNORED
from xcomp.decoder import Decoder, State
from xcomp.selector import FrameSelector
from xcomp.video import Video, VideoError, check_budget


@dataclass(frozen=True)
class Query:
    """A video file, the bare question, and the text put to the model (question, options, request)."""

    video: str
    question: str
    text: str


@dataclass
class Shown:
    """The frames a query is answered from."""

    pixels: Tensor  # (T, 3, h, w)
    frames: list[int]  # their numbers in the video
    times: list[float]  # seconds
    duration: float
    scores: list[float] | None = None  # of every candidate frame
    candidate_times: list[float] | None = None


@dataclass
class Answer:
    """What the model wrote, what it saw and what that cost. ``seconds`` are wall-clock; of a batch, an equal share."""

    text: str
    frames: list[int]
    times: list[float]
    duration: float
    tokens_per_layer: list[int]
    tokens_in: int
    macs: int
    seconds: float
    seconds_select: float
    scores: list[float] | None = field(default=None, repr=False)
    candidate_times: list[float] | None = field(default=None, repr=False)
    choice: int | None = None


class VideoQA(L.LightningModule):
    """Question answering on videos. ``frames`` is the budget given to the selector; None shows all candidates."""

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
    ):
        super().__init__()
        check_methods("backbone", backbone, "preprocess", "encode", "prompt")
        if selector is not None and selector.uses_video:
            check_methods("selector", selector, "score_frames")
        self.backbone = backbone
        self.compressor = compressor or Compressor(None)
        self.selector = selector
        self.frames = frames
        self.sampling = sampling or Sampling()
        self.generation = generation or Generation()
        self.tune = tune or Tune()
        self.decoder = Decoder(self.backbone, self.compressor, checkpointing=self.tune.gradient_checkpointing)
        self.accuracy = MeanMetric()
        if frames is not None:
            check_budget(frames, backbone.clip_frames)
        for name in ("multiple", "min_frames"):
            count = getattr(self.sampling, name)
            if count % backbone.clip_frames:
                raise ValueError(
                    f"sampling.{name} is {count}; it must be a multiple of {backbone.clip_frames}, "
                    "the frames that the backbone encodes together"
                )

    @classmethod
    def from_config(cls, config: RunConfig, backbone: Backbone | None = None) -> VideoQA:
        """The model that a run's configuration names; ``backbone`` in place of building its own."""
        if isinstance(config.frames, (list, tuple)):
            raise ConfigError(f"frames is {config.frames}; several budgets are for a comparison, here it must be one")
        parts = [build_component(k, getattr(config, k), config.plugins) for k in ("compressor", "selector")]
        backbone = backbone or build_component("backbone", config.backbone, config.plugins)
        return cls(
            backbone,
            *parts,
            frames=config.frames,
            sampling=config.sampling,
            generation=config.generation,
            tune=config.tune,
        )

    # --- answering --------------------------------------------------------------------------------------------------

    def ask(
        self, video: str, question: str, options: Sequence[str] | None = None, streamer: BaseStreamer | None = None
    ) -> Answer:
        """Answer one question about a video file. With ``options``, ``Answer.choice`` is the chosen one's index.

        ``streamer``, one of transformers', is handed each token as it is written.
        """
        text = multiple_choice_prompt(question, options) if options else question
        answer = self.answer([Query(str(video), question, text)], streamer)[0]
        if options:
            answer.choice = parse_option(answer.text, options)
        return answer

    @torch.no_grad()
    def answer(self, queries: Sequence[Query], streamer: BaseStreamer | None = None) -> list[Answer]:
        """Answer queries together, in one batch."""
        started = time.perf_counter()
        shown = [self.show(query) for query in queries]
        selected = time.perf_counter()
        prompts = [self._prompt(q.text, s) for q, s in zip(queries, shown)]
        tokens = self._encode([s.pixels for s in shown])
        state = self.decoder.prefill(tokens, [p.prefix_ids for p in prompts], [p.suffix_ids for p in prompts])
        per_layer = [list(counts) for counts in zip(*state.tokens_per_layer)]
        written = self._write(state, streamer)
        texts = [self.backbone.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
        finished = time.perf_counter()
        return [
            Answer(
                text=texts[i],
                frames=s.frames,
                times=s.times,
                duration=s.duration,
                tokens_per_layer=per_layer[i],
                tokens_in=tokens[i].shape[0] * tokens[i].shape[1],
                macs=self._macs(per_layer[i], prompts[i]),
                seconds=(finished - started) / len(queries),
                seconds_select=(selected - started) / len(queries),
                scores=s.scores,
                candidate_times=s.candidate_times,
            )
            for i, s in enumerate(shown)
        ]

    def _write(self, state: State, streamer: BaseStreamer | None) -> list[list[int]]:
        """Token ids of the answers; draws leave the caller's random numbers as they are."""
        device = self.backbone.device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=self.generation.do_sample):
            if self.generation.do_sample:
                torch.manual_seed(self.generation.seed)
            return self.decoder.generate(state, streamer=streamer, **self.generation.options())

    def show(self, query: Query) -> Shown:
        """Decode the frames that the selector picks for a query."""
        with Video(query.video, reader=self.sampling.reader) as video:
            candidates = candidate_indices(video, self.sampling)
            budget = self.frames
            if budget is None or budget >= len(candidates) or self.selector is None:
                return self._shown(video, candidates, video.frames(candidates))
            if not self.selector.uses_video:
                chosen = self._select(torch.zeros(len(candidates)), budget)
                frames = [candidates[i] for i in chosen]
                return self._shown(video, frames, video.frames(frames))
            everything = self._shown(video, candidates, video.frames(candidates))
        prompt = self._prompt(query.text, everything)
        scores = self.selector.score_frames(
            self.backbone,
            everything.pixels,
            prompt.prefix_ids,
            prompt.question_ids,
            prompt.header_ids,
            compressor=self.compressor,
            question=query.question,
        )
        check_scores(name_of("selector", self.selector), scores, len(candidates))
        chosen = self._select(scores, budget)
        return Shown(
            everything.pixels[chosen],
            [candidates[i] for i in chosen],
            [everything.times[i] for i in chosen],
            everything.duration,
            [round(x, 6) for x in scores.tolist()],
            everything.times,
        )

    def _select(self, scores: Tensor, budget: int) -> list[int]:
        chosen = self.selector.select(scores, budget)
        check_chosen(name_of("selector", self.selector), chosen, len(scores), budget)
        return chosen

    def _shown(self, video: Video, indices: list[int], frames: Tensor) -> Shown:
        pixels = self.backbone.preprocess(frames)
        check_pixels(name_of("backbone", self.backbone), pixels, len(frames))
        pixels = pixels.to(self.backbone.device, self.backbone.dtype)
        return Shown(pixels, indices, [round(i / video.fps, 3) for i in indices], video.duration)

    def _prompt(self, text: str, shown: Shown) -> Prompt:
        return self.backbone.prompt(text, ShownVideo(shown.duration, len(shown.frames), tuple(shown.times)))

    def _encode(self, pixels: list[Tensor]) -> list[Tensor]:
        """Tokens of several videos in one pass of the vision path: clips never interact before the LLM."""
        groups = [len(p) // self.backbone.merged_frames for p in pixels]
        tokens = self.backbone.encode(torch.cat(pixels))
        shape = (sum(groups), self.backbone.tokens_per_frame, self.backbone.text_config.hidden_size)
        check_encoded(name_of("backbone", self.backbone), tokens, shape)
        return list(tokens.split(groups))

    def _macs(self, tokens_per_layer: list[int], prompt: Prompt) -> int:
        shape = LLMShape.from_config(self.backbone.text_config)
        return prefill_cost(shape, tokens_per_layer, len(prompt.prefix_ids) + len(prompt.suffix_ids)).macs

    # --- Lightning --------------------------------------------------------------------------------------------------

    def predict_step(self, batch: list[tuple[Any, Query]], batch_idx: int = 0) -> list[Answer | VideoError]:
        """Answers to (question, query) pairs; a video that cannot be read is that query's outcome, not the end."""
        try:
            return self.answer([query for _, query in batch])
        except VideoError as error:
            return [error] if len(batch) == 1 else [out for item in batch for out in self.predict_step([item])]

    def test_step(self, batch: list[tuple[Any, Query]], batch_idx: int = 0) -> None:
        """Accuracy over (question, query) pairs, answered by an option's letter or words."""
        for (question, _), answer in zip(batch, self.answer([query for _, query in batch])):
            self.accuracy.update(float(parse_option(answer.text, question.options) == question.answer))
        self.log("test/accuracy", self.accuracy, batch_size=len(batch))

    def _loss(self, batch: list[Sample]) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the answer tokens of a batch, and the share of them that is predicted right."""
        tokens = self._encode([s.pixels.to(self.device, self.backbone.dtype) for s in batch])
        first = [int((s.text.labels != IGNORED).nonzero()[0]) for s in batch]
        # The token before a label predicts it, so the last one need not be run.
        suffixes = [s.text.suffix_ids[:-1] for s in batch]
        logits = self.decoder.logits(
            tokens,
            [s.text.prefix_ids for s in batch],
            suffixes,
            [len(s.text.labels) - f for s, f in zip(batch, first)],
        )
        labels = torch.cat([s.text.labels[f:] for s, f in zip(batch, first)]).to(logits.device)
        right = (logits.argmax(-1) == labels)[labels != IGNORED].float().mean()
        return cross_entropy(logits.float(), labels, ignore_index=IGNORED), right

    def training_step(self, batch: list[Sample], batch_idx: int) -> Tensor:
        loss, right = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/token_accuracy", right, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: list[Sample], batch_idx: int) -> None:
        loss, right = self._loss(batch)
        self.log("validation/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("validation/token_accuracy", right, prog_bar=True, batch_size=len(batch))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # lists of unequal samples: each tensor moves where it is used

    def freeze_untrained(self) -> None:
        """Let gradients reach only the parts that ``tune.train`` names."""
        self.backbone.requires_grad_(False)
        for name in self.tune.train:
            for module in self.backbone.parts()[name]:
                module.requires_grad_(True)

    def configure_optimizers(self) -> dict[str, Any]:
        tune = self.tune
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=tune.learning_rate, weight_decay=tune.weight_decay)
        warmup = round(tune.warmup_ratio * tune.steps)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, tune.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

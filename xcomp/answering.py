"""Answering: questions about a video in flight, with one compressor, selector and budget of frames.

What does not depend on the question happens once for all of them: frames are chosen by number, a video is run through
the language model and stored (:meth:`xcomp.decoder.Decoder.prefill_video`), and its questions are appended in batches.
What a question gets does not depend on which others are asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from xcomp.backbone import Backbone, Prompt, QuestionError, ShownVideo
from xcomp.checkpoint import load_compressor
from xcomp.compressor import Compressor, defines
from xcomp.config import Generation
from xcomp.contract import check_chosen, check_frame_texts, check_methods, check_pixel_format, check_scores, name_of
from xcomp.cost import count_macs
from xcomp.decoder import Decoder, QuestionNeeded, State
from xcomp.decoding import VideoInfo
from xcomp.inflight import VideoInFlight
from xcomp.ledger import Share, Work
from xcomp.pixels import PixelFormat
from xcomp.prompts import ids_behind
from xcomp.selector import Candidates, FrameQuery, FrameSelector, Picker
from xcomp.video import VideoError
from xcomp.visual import VisualTokens

DEFAULT_TOKENS = 16  # of an answer, where neither configuration nor benchmark bound it
AskError = VideoError | QuestionError  # what is one question's outcome and not the end of a run


@dataclass(frozen=True)
class Query:
    """A video file, the bare question, and the text put to the model (question, options, request).

    ``id`` is the benchmark's name of the question, ``events`` the (start, end) seconds of the evidence where known,
    ``span`` the seconds of the video that it is about (None: all). ``continuations`` are what stands for each option
    as an answer, where the likeliest is taken.
    """

    video: str
    question: str
    text: str
    id: str = ""
    events: tuple[tuple[float, float], ...] = ()
    span: tuple[float, float] | None = None
    continuations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The frames that a question is answered from, and if they were scored, how (None: not asked) and by which work."""

    frames: tuple[int, ...]
    scores: tuple[float | None, ...] | None = None
    work: Work | None = None


@dataclass(frozen=True)
class Continuation:
    """How likely a model is to answer a question with a given text: the sum of its tokens' log-probabilities, their
    number, and whether greedy search would begin its answer with it."""

    text: str
    logprob: float
    num_tokens: int
    greedy: bool


@dataclass
class Answer:
    """What the model wrote, what it saw, and what that took.

    Visual tokens: ``tokens_given`` of the vision path, ``tokens_in`` into the language model, ``tokens_per_layer`` in
    each layer's cache. Where nothing was written, ``option_scores`` are the continuations' log-probabilities (or their
    means), ``choice`` the first of the highest and ``text`` its continuation. ``work`` is what a :mod:`xcomp.ledger`
    reads the cost from; ``share`` the cost once all questions of the video are known.
    """

    text: str
    frames: list[int]
    times: list[float]
    duration: float
    tokens_per_layer: list[int]
    tokens_in: int
    tokens_given: int
    work: Work = field(repr=False)
    share: Share | None = None
    scores: list[float | None] | None = field(default=None, repr=False)
    candidate_times: list[float] | None = field(default=None, repr=False)
    choice: int | None = None
    option_scores: list[float] | None = None

    @property
    def kept(self) -> dict[str, float]:
        """Shares of the vision path's tokens that the first layer, the last, and the mean layer held."""
        counts = self.tokens_per_layer
        held = {"input": counts[0], "final": counts[-1], "layers": sum(counts) / len(counts)}
        return {of: round(count / self.tokens_given, 4) for of, count in held.items()}


class Answerer:
    """A backbone, a compressor and a selector that answer questions.

    ``budget`` is how many frames the selector is asked for (None: all candidates are shown), ``batch_size`` how many
    questions are written answers to at once, ``seed`` the run's, for selectors that draw.
    """

    def __init__(
        self,
        backbone: Backbone,
        compressor: Compressor | None = None,
        selector: FrameSelector | None = None,
        *,
        budget: int | None = None,
        generation: Generation | None = None,
        batch_size: int = 1,
        seed: int = 0,
    ):
        check_methods("backbone", backbone, "encode", "prompt")
        check_pixel_format(name_of("backbone", backbone), backbone)
        if selector is not None and selector.uses_video and type(selector).score is FrameSelector.score:
            check_methods("selector", selector, "score_frames")
        if selector is not None and budget is not None:
            selector.check_backbone(backbone)
        if budget is not None:
            backbone.check_frames(budget)
        self.backbone = backbone
        self.compressor = compressor or Compressor(None)
        self.selector = selector
        self.budget = budget
        self.generation = (generation or Generation()).limited(DEFAULT_TOKENS)
        self.batch_size = batch_size
        self.seed = seed
        self.decoder = Decoder(backbone, self.compressor)
        load_compressor(self.compressor, backbone)
        self._compress_macs: dict[tuple, int] = {}
        self._needs_question = self.compressor.uses_question  # or, once it was asked, found to

    @torch.no_grad()
    def warm_up(self) -> None:
        """One clip of zeros and a word through everything, so that loading kernels is no question's time."""
        backbone = self.backbone
        backbone.clip_macs(backbone.pixel_format.largest)
        pixels = torch.zeros(backbone.clip_frames, 3, *backbone.pixel_format.largest, device=backbone.device)
        visual = backbone.visual(pixels.to(backbone.dtype), self.compressor.needs)
        prompt = backbone.prompt("?", ShownVideo(1.0, backbone.clip_frames))
        state = self.decoder.prefill(visual, prompt.prefix_ids, prompt.suffix_ids, prompt.frame_texts)
        self.decoder.generate(state, max_new_tokens=2)

    # --- which frames -----------------------------------------------------------------------------------------------

    def expected(self, info: VideoInfo) -> tuple[tuple[int, ...], tuple[PixelFormat, ...]]:
        """The frames that questions about a video will need, as far as it can be said, and in which formats."""
        own = (self.backbone.pixel_format,)
        if self._chooses(info):
            return tuple(self.selector.looks_at(info)), (*own, *self.selector.pixel_formats(self.backbone))
        return self._by_number(info), own

    def _chooses(self, info: VideoInfo) -> bool:
        """Whether frames are chosen for each question; if not, they are the same for all."""
        chooses = self.budget is not None and self.budget < len(info.candidates) and self.selector is not None
        return chooses and (self.selector.uses_video or self.selector.scores_frames)

    def _by_number(self, info: VideoInfo) -> tuple[int, ...]:
        if self.budget is None or self.budget >= len(info.candidates) or self.selector is None:
            return info.candidates
        chosen = self.selector.select(torch.zeros(len(info.candidates)), self.budget)
        self._check(chosen, len(info.candidates))
        return tuple(info.candidates[i] for i in chosen)

    def _check(self, chosen: list[int], num_candidates: int) -> None:
        who, repeats = name_of("selector", self.selector), self.selector.repeats
        check_chosen(who, chosen, num_candidates, self.budget, repeats=repeats)

    def choose(self, video: VideoInFlight, queries: Sequence[Query]) -> list[Choice]:
        """The frames for each question. Scores that another arm asked for with an equal scorer are taken from it."""
        if not self._chooses(video.info):
            return [Choice(self._by_number(video.info))] * len(queries)
        shown = _shown(video.info, video.info.times)
        asked = {q: self._frame_query(video, q, shown) for q in dict.fromkeys(queries)}
        few = isinstance(self.selector, Picker) and self.selector.asks_for_few
        if not few:
            self._score(video, asked)
        picked = {query: self._pick(video, query, frame_query, few) for query, frame_query in asked.items()}
        return [picked[query] for query in queries]

    def _frame_query(self, video: VideoInFlight, query: Query, shown: ShownVideo) -> FrameQuery:
        work = Work("select")
        with video.ledger.charge(work):
            prompt = self._prompt(query, shown)
        more = {"id": query.id, "events": query.events, "seed": self.seed, "video": query.video}
        return FrameQuery(query.question, prompt, work, shown=shown, **more)

    def _score(self, video: VideoInFlight, asked: Mapping[Query, FrameQuery]) -> None:
        """Scores of the questions that lack them, in ``video.scores``."""
        new = {q: frame_query for q, frame_query in asked.items() if self._key(q) not in video.scores}
        if not new:
            return
        with video.ledger.work("select") as shared:
            found = self.selector.score(video, list(new.values()), self.compressor)
        for (query, frame_query), scores in zip(new.items(), found, strict=True):
            check_scores(name_of("selector", self.selector), scores, len(video.candidates))
            frame_query.work.needs.add(shared)
            video.scores[self._key(query)] = scores, frame_query.work

    def _key(self, query: Query) -> tuple:
        return self.selector.key, id(self.compressor), self.seed, query

    def _pick(self, video: VideoInFlight, query: Query, frame_query: FrameQuery, few: bool) -> Choice:
        """Frames for one question, from scores that are there or (``few``) are computed as they are asked for."""
        work = Work("select")
        if few:
            scores = torch.zeros(len(video.candidates))
        else:
            scores, scored = video.scores[self._key(query)]
            work.needs.add(scored)
        frames = Candidates(
            frame_query.shown.times,
            frame_query.shown.duration,
            frame_query,
            score=(lambda i: self.selector.score_some(video, frame_query, i)) if few else (lambda i: scores[list(i)]),
            embed=lambda: self.selector.embed(video, frame_query),
        )
        with video.ledger.charge(work):
            chosen = self.selector.pick(scores.clone(), self.budget, frames)
        self._check(chosen, len(video.candidates))
        known = [frames.asked.get(i) for i in range(len(scores))] if few else scores.tolist()
        known = tuple(None if x is None else round(x, 6) for x in known)
        work.needs |= {frame_query.work} if few else set()
        return Choice(tuple(video.candidates[i] for i in chosen), known, work)

    def _prompt(self, query: Query, shown: ShownVideo) -> Prompt:
        try:
            query.text.encode()
        except UnicodeEncodeError as error:
            raise QuestionError(f"the question is no text: {error.reason} at character {error.start}") from error
        backbone = self.backbone
        prompt = backbone.prompt(query.text, shown)
        check_frame_texts(name_of("backbone", backbone), prompt.frame_texts, shown.num_frames // backbone.merged_frames)
        return prompt

    # --- answers ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(
        self, video: VideoInFlight, queries: Sequence[Query], streamer: BaseStreamer | None = None
    ) -> list[Answer | AskError]:
        """Answers in the order of the questions. What cannot be read or asked is that question's outcome."""
        try:
            choices = self.choose(video, queries)
        except (VideoError, QuestionError) as error:
            if isinstance(error, VideoError) or len(queries) == 1:
                return [error] * len(queries)
            return [outcome for query in queries for outcome in self.answer(video, [query], streamer)]
        outcomes: list[Answer | AskError | None] = [None] * len(queries)
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, choice in enumerate(choices):
            groups.setdefault(choice.frames, []).append(number)
        for members in groups.values():
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                asked = [queries[i] for i in batch], [choices[i] for i in batch]
                if self.generation.mode == "loglikelihood":
                    found = [self._likeliest(video, *one) for one in zip(*asked)]
                else:
                    found = self._batch(video, *asked, streamer)
                for number, outcome in zip(batch, found):
                    outcomes[number] = outcome
            video.release_states()
            video.advance()
        return outcomes

    @torch.no_grad()
    def score(
        self, video: VideoInFlight, queries: Sequence[Query], continuations: Sequence[Sequence[str]]
    ) -> list[list[Continuation] | AskError]:
        """How likely each of a question's ``continuations`` is as its answer, ``batch_size`` of them at once; what
        cannot be read or asked is that question's outcome. The frames are those that ``answer`` would choose."""
        try:
            choices = self.choose(video, queries)
        except (VideoError, QuestionError) as error:
            if isinstance(error, VideoError) or len(queries) == 1:
                return [error] * len(queries)
            return [self.score(video, [query], [texts])[0] for query, texts in zip(queries, continuations)]
        outcomes: list[list[Continuation] | AskError] = []
        for query, choice, texts in zip(queries, choices, continuations, strict=True):
            try:
                outcomes.append(self._score_texts(video, query, choice, texts))
            except (VideoError, QuestionError) as error:
                outcomes.append(error)
        video.release_states()
        video.advance()
        return outcomes

    def _score_texts(
        self, video: VideoInFlight, query: Query, choice: Choice, texts: Sequence[str]
    ) -> list[Continuation]:
        shown = _shown(video.info, video.times(choice.frames))
        prompt = self._prompt(query, shown)
        ids = self.answer_ids(prompt, texts)
        with video.ledger.work("answer"):
            state, _ = self._prefilled(video, choice.frames, [prompt])
            found = []
            for start in range(0, len(ids), self.batch_size):
                found += self._scored(state, ids[start : start + self.batch_size])
        return [Continuation(text, float(s.sum()), len(s), greedy) for text, (s, greedy) in zip(texts, found)]

    def answer_ids(self, prompt: Prompt, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as the answer to a prompt."""
        tokenizer = self.backbone.tokenizer
        header = tokenizer.decode(prompt.header_ids)
        ids = [ids_behind(tokenizer, text, header) for text in texts]
        for text, tokens in zip(texts, ids):
            if not tokens:
                raise QuestionError(f"the continuation {text!r} has no token to score")
        return ids

    def _scored(self, state: State, ids: list[list[int]]) -> list[tuple[Tensor, bool]]:
        """``Decoder.score`` of several continuations of one sample; what is stored is copied only where it must be."""
        if max(map(len, ids)) == 1:
            return self.decoder.score(replace(state, logits=state.logits.expand(len(ids), -1)), ids)
        return self.decoder.score(state.repeat(len(ids)), ids)

    def _likeliest(self, video: VideoInFlight, query: Query, choice: Choice) -> Answer | AskError:
        """The continuation that is most likely as the answer: all of a question's are scored in one pass."""
        try:
            if not query.continuations:
                raise QuestionError("generation.mode: loglikelihood chooses among options, and the question has none")
            times = video.times(choice.frames)
            prompt = self._prompt(query, _shown(video.info, times))
            ids, together = self.answer_ids(prompt, query.continuations), Work("answer")
            with video.ledger.charge(together):
                state, prefills = self._prefilled(video, choice.frames, [prompt])
                question = 0 if self._needs_question else len(prompt.suffix_ids)
                together.macs = self.decoder.append_macs(state, question)
                together.macs += self.decoder.score_macs(state, question, [len(tokens) for tokens in ids])
                found = [scores for scores, _ in self._scored(state, ids)]
        except (VideoError, QuestionError) as error:
            return error
        mean = self.generation.normalise == "length"
        scores = [float(s.mean() if mean else s.sum()) for s in found]
        best = scores.index(max(scores))
        work = Work("answer", needs={together, *prefills} | ({choice.work} if choice.work else set()))
        answer = self._answer(video, choice, times, [counts[0] for counts in state.tokens_per_layer], work)
        return replace(answer, text=query.continuations[best], choice=best, option_scores=scores)

    def _batch(
        self, video: VideoInFlight, queries: list[Query], choices: list[Choice], streamer: BaseStreamer | None
    ) -> list[Answer | AskError]:
        """Questions that are answered from the same frames; where one of several cannot be asked, each on its own."""
        frames = choices[0].frames
        try:
            times = video.times(frames)
            shown = _shown(video.info, times)
            together = Work("answer")
            with video.ledger.charge(together):
                prompts = [self._prompt(query, shown) for query in queries]
                state, prefills = self._prefilled(video, frames, prompts)
                written = self._write(state, streamer)
                said = [self.backbone.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
        except (VideoError, QuestionError) as error:
            if isinstance(error, VideoError) or len(queries) == 1:
                return [error] * len(queries)
            return [self._batch(video, [q], [c], streamer)[0] for q, c in zip(queries, choices)]
        per_layer = [list(counts) for counts in zip(*state.tokens_per_layer)]
        answers = []
        for row, (choice, prompt, ids, text) in enumerate(zip(choices, prompts, written, said)):
            work = Work("answer", macs=self._answer_macs(state, row, prompt, ids))
            work.needs |= {together, *prefills[row : row + 1]} | ({choice.work} if choice.work else set())
            answers.append(replace(self._answer(video, choice, times, per_layer[row], work), text=text))
        return answers

    def _answer(
        self, video: VideoInFlight, choice: Choice, times: list[float], tokens_per_layer: list[int], work: Work
    ) -> Answer:
        """An answer but for what it says."""
        return Answer(
            text="",
            frames=list(choice.frames),
            times=times,
            duration=video.info.duration,
            tokens_per_layer=tokens_per_layer,
            tokens_in=tokens_per_layer[0],
            tokens_given=len(choice.frames) // self.backbone.merged_frames * self.backbone.tokens_per_frame,
            work=work,
            scores=None if choice.scores is None else list(choice.scores),
            candidate_times=None if choice.scores is None else list(video.info.times),
        )

    def _prefilled(
        self, video: VideoInFlight, frames: tuple[int, ...], prompts: list[Prompt]
    ) -> tuple[State, list[Work]]:
        """The state after every prompt: the stored video with the questions behind it, or whole prompts in one pass.

        Of the latter, each question's own work too.
        """
        prefixes, suffixes = [p.prefix_ids for p in prompts], [p.suffix_ids for p in prompts]
        texts = [p.frame_texts for p in prompts]
        if not self._needs_question:

            def run(work: Work) -> State:
                stored = self.decoder.prefill_video(self._compressed(video, frames), prefixes[0], texts[0])
                work.macs = self.decoder.prefill_macs(stored, len(prefixes[0]))
                return stored

            try:
                state = video.state((id(self.compressor), frames, prompts[0].before_question), "prefill", run)
            except QuestionNeeded:
                self._needs_question = True
            else:
                return self.decoder.extend(state.repeat(len(prompts)), suffixes), []
        with video.ledger.work("prefill"):
            if self.compressor.uses_question:
                videos = [self._compressed(video, frames, suffix) for suffix in suffixes]
            else:
                videos = [self._compressed(video, frames)] * len(prompts)
            state = self.decoder.prefill(videos, prefixes, suffixes, texts)
        macs = [
            self.decoder.prefill_macs(state, len(prefix), len(suffix), row=row)
            for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes))
        ]
        works = [Work("prefill", macs=number) for number in macs]
        for work, own in zip(works, state.rule_macs):
            work.needs.add(Work("compress", macs=own))
        return state, works

    def _compressed(self, video: VideoInFlight, frames: tuple[int, ...], suffix: Tensor | None = None) -> VisualTokens:
        """The tokens that enter the language model; ``suffix`` ids where the compressor looks at the question."""
        tokens = video.visual(frames)
        if not (defines(self.compressor, "compress") or defines(self.compressor, "before_llm")):
            return self.decoder.compress(tokens)
        suffix = () if suffix is None else suffix
        with video.ledger.work("compress") as work:
            visual = self.decoder.compress(tokens, suffix)
        key = len(tokens), len(suffix)
        if key not in self._compress_macs:  # counting is slow, and no question's work
            with video.ledger.charge(Work("compress")):
                self._compress_macs[key] = count_macs(lambda: self.decoder.compress(tokens, suffix))[1]
        work.macs = self._compress_macs[key]
        return visual

    def _answer_macs(self, state: State, row: int, prompt: Prompt, ids: list[int]) -> int:
        """MACs of a question behind a stored video, and of writing its answer: a pass a token, but for the last."""
        question = 0 if self._needs_question else len(prompt.suffix_ids)
        steps = min(len(ids), self.generation.max_new_tokens - 1)
        written = self.decoder.append_macs(state, question, *[1] * steps, row=row)
        if self.generation.num_beams == 1:
            return written
        asked = self.decoder.append_macs(state, question, row=row)
        return asked + (written - asked) * self.generation.num_beams

    def _write(self, state: State, streamer: BaseStreamer | None) -> list[list[int]]:
        """Token ids of the answers; draws leave the caller's random numbers as they are."""
        device = self.backbone.device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=self.generation.do_sample):
            if self.generation.do_sample:
                torch.manual_seed(self.generation.seed)
            return self.decoder.generate(state, streamer=streamer, **self.generation.options())


def _shown(info: VideoInfo, times: Sequence[float]) -> ShownVideo:
    """What a prompt may say of frames at these seconds of the file: of a span, its length and times from its start."""
    return ShownVideo(info.shown_seconds, len(times), info.shown_times(times))

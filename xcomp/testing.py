"""Contract checks that plugin authors call on their own plugin, one line each; no weights are needed.

    from xcomp.testing import check_compressor

    def test_my_rule():
        check_compressor(MyRule, tokens=4)

A check takes the plugin's class and options (or an instance, or a function that makes one), asks of it what the
framework will ask, with a small random language model where one is needed, and raises a :class:`ContractError` that
names the plugin and the clause it breaks. Shape letters are those of :mod:`xcomp.backbone`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from xcomp.backbone import Backbone, Prompt, ShownVideo
from xcomp.benchmark import LETTERS, Question
from xcomp.compressor import (
    RULES,
    Compressor,
    DecodingStep,
    LayerOutput,
    QuestionTokens,
    Reduction,
    defines,
)
from xcomp.config import Decoding
from xcomp.contract import (
    ContractError,
    check_before_llm,
    check_chosen,
    check_compressed,
    check_continuations,
    check_encoded,
    check_frame_texts,
    check_keep,
    check_metrics,
    check_pixel_format,
    check_plan,
    check_questions,
    check_reduction,
    check_scores,
    require,
)
from xcomp.data.records import parse_record
from xcomp.decoder import Decoder, QuestionNeeded
from xcomp.decoding import Pending, Pixels, VideoInfo
from xcomp.inflight import VideoInFlight
from xcomp.layout import TokenLayout
from xcomp.pixels import PixelFormat
from xcomp.registry import KINDS, make_config
from xcomp.selector import Candidates, FrameQuery, FrameSelector
from xcomp.tiny import tiny_backbone
from xcomp.visual import VisualTokens

QUESTION = "Which symbol appears first, after the red one? (A) cross (B) ring"
PARTS = {"vision", "projector", "llm"}
__all__ = [
    "ContractError",
    "check_backbone",
    "check_benchmark",
    "check_compressor",
    "check_selector",
    "tiny_backbone",
    "video_of",
]


def _frames(count: int) -> Tensor:
    """(T, 48, 64, 3) uint8 noise, the same every time."""
    return torch.randint(0, 256, (count, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


# --- A plugin under test ----------------------------------------------------------------------------------------------


class Watch:
    """A plugin under test: whatever it does wrong is reported in its name."""

    def __init__(self, kind: str, plugin: Any, options: dict[str, Any]):
        contract = getattr(import_module(KINDS[kind][1]), KINDS[kind][2])
        self.who = f"{kind} '{getattr(plugin, '__name__', type(plugin).__name__)}'"
        if isinstance(plugin, type):
            self.require(issubclass(plugin, contract), f"must be a subclass of {contract.__name__}")
            has_config = dataclasses.is_dataclass(getattr(plugin, "Config", None))
            self.require(has_config, "must have a Config dataclass with its options")
            self.plugin = plugin(make_config(plugin.Config, options, self.who))
        else:
            self.plugin = plugin if isinstance(plugin, contract) else plugin(**options)
        self.require(isinstance(self.plugin, contract), f"must be a {contract.__name__}")

    def require(self, holds: Any, clause: str) -> None:
        require(holds, self.who, clause)

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        try:
            yield
        except ContractError:
            raise
        except NotImplementedError as error:
            raise ContractError(f"{self.who}: {what} is missing: {error}") from error
        except Exception as error:  # anything a plugin raises is its own
            raise ContractError(f"{self.who}: {what} must not fail; {type(error).__name__}: {error}") from error

    def call(self, method: str, *args: Any, times: int = 2, **kwargs: Any) -> Any:
        """The method's result. It must not fail, write into what it is given, or differ from call to call."""
        given = tensors_of([args, list(kwargs.values())])
        before = [tensor.detach().clone() for tensor in given]
        with self.guard(f"{method}()"):
            results = [getattr(self.plugin, method)(*args, **kwargs) for _ in range(times)]
        self.require(same(given, before), f"{method}() must leave its inputs as they are, but writes into them")
        self.require(same(results[0], results[-1]), f"{method}() must give the same for the same inputs")
        return results[0]

    def require_close(self, ours: Tensor, theirs: Tensor, clause: str) -> None:
        """Equal up to rounding: relative to the largest value, 1e-4 in float32 and 5e-2 in shorter types."""
        error = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-30)
        self.require(error < (1e-4 if ours.dtype == torch.float32 else 5e-2), f"{clause}; they differ by {error:.1e}")


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested lists and dataclasses."""
    if dataclasses.is_dataclass(value):
        value = list(vars(value).values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return [value] if isinstance(value, Tensor) else []


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return same(list(vars(a).values()), list(vars(b).values()))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def _pixels(backbone: Backbone, frames: Tensor) -> Tensor:
    """Frames as a run hands them to ``encode``: preprocessed, on the backbone's device."""
    return backbone.preprocess(frames).to(backbone.device)


def _check_passes(
    watch: Watch, backbone: Backbone, rule: Compressor, videos: list[Tensor | VisualTokens], prompts: list[Prompt]
) -> None:
    """Two videos through the language model: alone, as a batch in both orders, token by token, and stored."""
    decoder, before, after = Decoder(backbone, rule), [p.prefix_ids for p in prompts], [p.suffix_ids for p in prompts]
    texts = [p.frame_texts for p in prompts]
    alone = [decoder.prefill(*sample) for sample in zip(videos, before, after, texts)]
    for video, state, prefix, suffix, text in zip(videos, alone, before, after, texts):
        watch.require(state.logits.isfinite().all(), "the logits of a pass must be finite")
        again = decoder.prefill(video, prefix, suffix, text)
        watch.require(same(again.logits, state.logits), "a pass must give the same when it is repeated")
        step = decoder.decode(decoder.prefill(video, prefix, suffix[:-1], text), suffix[-1:])
        stored = None
        with suppress(QuestionNeeded):
            stored = decoder.prefill_video(video, prefix, text)
        if stored is not None:
            watch.require_close(step, state.logits, "decoding a token must give what a longer prefill gives")
            stored = decoder.extend(stored, suffix)
            watch.require_close(stored.logits, state.logits, "a question to a stored video must give what a pass gives")
    for order in ([0, 1], [1, 0]):
        batch = decoder.prefill(*([values[i] for i in order] for values in (videos, before, after, texts)))
        for row, i in enumerate(order):
            clause = "a batch must give what each sample gives alone (padding and order do not matter)"
            counts = [per_sample[row] for per_sample in batch.tokens_per_layer]
            watch.require(counts == alone[i].tokens_per_layer, f"{clause}; tokens kept differ")
            watch.require_close(batch.logits[row], alone[i].logits[0], clause)


# --- Backbones --------------------------------------------------------------------------------------------------------


def check_backbone(plugin: Any, **options: Any) -> None:
    """Vision path, prompts, the language model opened up, what can be tuned, and saving."""
    watch = Watch("backbone", plugin, options)
    backbone: Backbone = watch.plugin.eval()
    with torch.no_grad():
        pixels, tokens = _check_vision(watch, backbone)
        _check_prompts(watch, backbone)
        with watch.guard("the language model, opened up,"):
            videos = [tokens, tokens[: backbone.clip_frames // backbone.merged_frames]]
            asked = [_prompt_of(backbone, text, video) for text, video in zip((QUESTION, "Why is that so?"), videos)]
            _check_language_model(watch, backbone, tokens, asked[0])
            _check_passes(watch, backbone, Compressor(None), videos, asked)
            if type(backbone).image_prompt is not Backbone.image_prompt:
                _check_images(watch, backbone, pixels)
        _check_saving(watch, backbone, pixels, tokens)
    _check_parts(watch, backbone, pixels, asked[0])


def _check_vision(watch: Watch, backbone: Backbone) -> tuple[Tensor, Tensor]:
    for name in ("tokens_per_frame", "clip_frames"):
        value = getattr(backbone, name, None)
        watch.require(isinstance(value, int) and value >= 1, f"{name} must be a whole number from 1, not {value}")
    clip, merged = backbone.clip_frames, backbone.merged_frames
    clause = f"merged_frames must be a whole number from 1 that divides clip_frames {clip}, not {merged}"
    watch.require(isinstance(merged, int) and merged >= 1 and clip % merged == 0, clause)
    check_pixel_format(watch.who, backbone)
    groups, width = clip // merged, backbone.text_config.hidden_size
    frames = _frames(2 * clip)
    pixels = watch.call("preprocess", frames)
    watch.require_close(backbone.preprocess(frames[-1:]), pixels[-1:], "preprocess() must take each frame on its own")
    pixels = pixels.to(backbone.device)
    tokens, expected = watch.call("encode", pixels), (2 * groups, backbone.tokens_per_frame, width)
    check_encoded(watch.who, tokens, expected)
    right = tokens.dtype == backbone.dtype and bool(tokens.isfinite().all())
    watch.require(right, f"encode() must return finite {backbone.dtype}, as the language model's, not {tokens.dtype}")
    watch.require_close(backbone.encode(pixels[clip:]), tokens[groups:], "encode() must take each clip on its own")
    return pixels, tokens


def _prompt_of(backbone: Backbone, question: str, video: Tensor | VisualTokens) -> Prompt:
    """The prompt for a video of as many frames as were encoded, two a second."""
    groups = video.num_frames if isinstance(video, VisualTokens) else len(video)
    frames = groups * backbone.merged_frames
    return backbone.prompt(question, ShownVideo(frames / 2, frames, tuple(i / 2 for i in range(frames))))


def _are_ids(ids: Tensor, most: int) -> bool:
    return ids.ndim == 1 and ids.dtype == torch.long and bool(((ids >= 0) & (ids <= most)).all())


def _check_prompts(watch: Watch, backbone: Backbone) -> None:
    merged = backbone.merged_frames
    most = backbone.language_model.embed_tokens.num_embeddings - 1
    for shown in (
        ShownVideo(4.0 * merged, 4 * merged, tuple(map(float, range(4 * merged)))),
        ShownVideo(2.5, 2 * merged),
    ):
        prompts = [watch.call("prompt", text, shown) for text in (QUESTION, "Why is that so?")]
        parts = [ids for p in prompts for ids in (p.prefix_ids, p.question_ids, p.header_ids)]
        for ids in [*parts, watch.call("follow_up", QUESTION)]:
            clause = f"prompt() and follow_up() must give 1-D long ids, 0..{most}, at least one, not {ids}"
            watch.require(_are_ids(ids, most) and len(ids), clause)
        for ids in tensors_of([p.frame_texts for p in prompts]):
            watch.require(_are_ids(ids, most), f"prompt().frame_texts must hold 1-D long ids, 0..{most}, not {ids}")
        for part, equal in (("prefix_ids", True), ("question_ids", False), ("header_ids", True)):
            found = torch.equal(*(getattr(p, part) for p in prompts))
            watch.require(found == equal, f"prompt().{part} must {'not ' if equal else ''}depend on the question")
        texts = [p.frame_texts for p in prompts]
        watch.require(same(*texts), "prompt().frame_texts must not depend on the question")
        check_frame_texts(watch.who, texts[0], shown.num_frames // merged)
    stop = backbone.stop_ids
    watch.require(stop and all(isinstance(i, int) for i in stop), f"stop_ids must hold at least one id, not {stop}")


def _check_images(watch: Watch, backbone: Backbone, pixels: Tensor) -> None:
    """Pictures, and text alone, of backbones that train on them."""
    most, shape = backbone.language_model.embed_tokens.num_embeddings - 1, (2, backbone.tokens_per_frame)
    tokens = watch.call("encode_images", pixels[:2])
    check_encoded(watch.who, tokens, (*shape, backbone.text_config.hidden_size), "encode_images")
    alone = backbone.encode_images(pixels[1:2])
    watch.require_close(alone, tokens[1:], "encode_images() must take each picture on its own")
    for texts in ([QUESTION], ["", QUESTION], ["Between ", " and ", QUESTION]):
        prompt, count = watch.call("image_prompt", texts), len(texts) - 1
        ids = [prompt.prefix_ids, prompt.question_ids, prompt.header_ids, *tensors_of([prompt.frame_texts])]
        clause = f"image_prompt() must give 1-D long ids, 0..{most}, not {ids}"
        watch.require(all(_are_ids(part, most) for part in ids), clause)
        check_frame_texts(watch.who, prompt.frame_texts, count)
        video = VisualTokens.from_frames(tokens[:count]) if count else None
        logits = Decoder(backbone).logits([video], [prompt.prefix_ids], [prompt.suffix_ids], [1], [prompt.frame_texts])
        watch.require(bool(logits.isfinite().all()), "the logits of pictures, and of text alone, must be finite")


def _check_language_model(watch: Watch, backbone: Backbone, tokens: Tensor, prompt: Prompt) -> None:
    prefix, suffix = (backbone.embed(ids.to(backbone.device)) for ids in (prompt.prefix_ids, prompt.suffix_ids))
    embedded = [prefix]
    for number, frame in enumerate(tokens):
        texts = prompt.frame_texts[number] if prompt.frame_texts else (prompt.prefix_ids[:0],) * 2
        before, behind = (backbone.embed(ids.to(backbone.device)) for ids in texts)
        embedded += [before, frame, behind]
    embedded.append(suffix)
    part = len(prompt.prefix_ids), VisualTokens.from_frames(tokens), len(prompt.suffix_ids)
    layout = TokenLayout.of([part], [prompt.text_lengths])
    hidden = backbone.language_model(
        inputs_embeds=torch.cat(embedded)[None],
        position_ids=backbone.positions(layout).to(backbone.device),
        use_cache=False,
    ).last_hidden_state
    ours = Decoder(backbone).prefill(tokens, prompt.prefix_ids, prompt.suffix_ids, prompt.frame_texts).logits
    clause = "the opened-up layers must compute what the model's own forward does"
    watch.require_close(ours, backbone.lm_head(hidden[:, -1]), clause)


def _check_parts(watch: Watch, backbone: Backbone, pixels: Tensor, prompt: Prompt) -> None:
    with watch.guard("parts()"):
        parts = backbone.parts()
        parameters = {name: [p for module in modules for p in module.parameters()] for name, modules in parts.items()}
    watch.require(set(parts) == PARTS, f"parts() must name {', '.join(sorted(PARTS))}, not {', '.join(parts)}")
    backbone.zero_grad()
    with watch.guard("training"):
        tokens, ids = backbone.encode(pixels), (prompt.prefix_ids, prompt.suffix_ids)
        logits = Decoder(backbone).logits(tokens, *ids, [4], prompt.frame_texts)
        logits.float().square().mean().backward()
    for name, owned in parameters.items():
        reached = not owned or any(p.grad is not None and bool(p.grad.any()) for p in owned)
        watch.require(reached, f"a gradient must reach parts()['{name}']")
    backbone.zero_grad()


def _check_saving(watch: Watch, backbone: Backbone, pixels: Tensor, tokens: Tensor) -> None:
    """Only of backbones with an option ``checkpoint``: the others cannot be read back."""
    config_class = getattr(type(backbone), "Config", None)
    names = [f.name for f in dataclasses.fields(config_class)] if dataclasses.is_dataclass(config_class) else []
    if "checkpoint" not in names:
        return
    given = {"dtype": str(backbone.dtype).removeprefix("torch."), "device": str(backbone.device)}
    given = {name: value for name, value in given.items() if name in names}
    with TemporaryDirectory() as folder, watch.guard("save_pretrained()"):
        backbone.save_pretrained(str(Path(folder) / "model"))
        options = {"checkpoint": str(Path(folder) / "model")} | given
        again = type(backbone)(make_config(config_class, options, watch.who)).eval()
        clause = "what save_pretrained() writes must load with checkpoint=<folder> alone and be the same model"
        watch.require(same(again.state_dict(), backbone.state_dict()), clause)
        watch.require_close(again.encode(pixels), tokens, clause)


# --- Compressors ------------------------------------------------------------------------------------------------------


class _Watched(Compressor):
    """A compressor in a pass, with what it returns inside the language model checked."""

    def __init__(self, watch: Watch):
        super().__init__(None)
        plugin = watch.plugin
        self.fit, self.compress, self.plan = plugin.fit, plugin.compress, plugin.plan
        self.uses_question, self.keeps_positions = plugin.uses_question, plugin.keeps_positions
        for method in RULES:
            if defines(plugin, method):
                setattr(self, method, partial(self._watched, watch, method))

    @staticmethod
    def _watched(watch: Watch, method: str, given: LayerOutput | DecodingStep) -> Any:
        found = watch.call(method, given, times=1)
        if isinstance(found, Reduction):
            check_reduction(watch.who, found, given.layout, given.hidden.shape[-1], method)
        elif found is not None:
            check_keep(watch.who, found, given.layout, method)
        return found


def check_compressor(plugin: Any, *, backbone: Backbone | None = None, **options: Any) -> None:
    """Tokens before the language model, the plan, the rules inside it, whole passes, and the gradient."""
    watch, backbone = Watch("compressor", plugin, options), backbone or tiny_backbone()
    watch.plugin.eval()
    with watch.guard("fit()"):
        watch.plugin.fit(backbone)
    with torch.no_grad():
        pixels = [_pixels(backbone, _frames(n * backbone.clip_frames)) for n in (1, 6)]
        videos = [backbone.visual(p, watch.plugin.needs) for p in pixels]
        prompts = [_prompt_of(backbone, text, video) for text, video in zip(("Why?", QUESTION), videos)]
        for video, prompt in zip(videos, prompts):
            width = _check_compressed(watch, backbone, video, prompt)
            planned = watch.call("plan", backbone.num_layers, width)
            if planned is not None:
                with watch.guard("plan()"):
                    check_plan(planned, backbone.num_layers, width, "it")
        with watch.guard("a pass through the language model"):
            _check_passes(watch, backbone, _Watched(watch), videos, prompts)
            ids = prompts[1].prefix_ids, prompts[1].suffix_ids, prompts[1].frame_texts
            state = Decoder(backbone, watch.plugin).prefill(videos[1], *ids)
    counts = state.tokens_per_layer
    falls = all(a >= b >= 1 for a, b in zip(counts, counts[1:]))
    watch.require(falls, f"the tokens of a video must never grow from layer to layer, but are {counts}")
    _check_gradient(watch, backbone, videos[1], prompts[1])


def _check_compressed(watch: Watch, backbone: Backbone, video: VisualTokens, prompt: Prompt) -> int:
    """Slots a frame afterwards."""
    question, ids = None, prompt.suffix_ids.to(backbone.device)
    if watch.plugin.uses_question:
        question = QuestionTokens(ids, backbone.embed(ids))
    if defines(watch.plugin, "before_llm"):
        check_before_llm(watch.who, video.frames(), watch.call("before_llm", video.frames()))
    out = watch.call("compress", video, question)
    check_compressed(watch.who, video, out)
    method = "before_llm()" if defines(watch.plugin, "before_llm") else "compress()"
    clause = f"{method} must turn tokens into tokens of the same type, not {out.tokens.dtype}"
    watch.require(out.tokens.dtype == video.tokens.dtype, clause)
    half = dataclasses.replace(video, tokens=video.tokens.bfloat16())
    if question is not None:
        question = dataclasses.replace(question, embeddings=question.embeddings.bfloat16())
    with watch.guard(method):
        short = watch.plugin.compress(half, question).tokens
    watch.require(short.dtype == torch.bfloat16, f"{method} must keep the type: bfloat16 became {short.dtype}")
    return out.frame_tokens


def _check_gradient(watch: Watch, backbone: Backbone, video: VisualTokens, prompt: Prompt) -> None:
    tokens = video.tokens.clone().requires_grad_()
    video = dataclasses.replace(video, tokens=tokens)
    with watch.guard("training"):
        ids = prompt.prefix_ids, prompt.suffix_ids, [2], prompt.frame_texts
        logits = Decoder(backbone, watch.plugin).logits(video, *ids)
        logits.float().square().mean().backward()
    flows = tokens.grad is not None and bool(tokens.grad.isfinite().all()) and bool(tokens.grad.any())
    watch.require(flows, "a gradient must flow from the logits through the compressor to the visual tokens")
    backbone.zero_grad()


# --- Selectors --------------------------------------------------------------------------------------------------------


class _GivenFrames:
    """Takes the place of a pool of decoding processes: the video is a tensor of frames."""

    workers = 0
    options = Decoding(workers=0)

    def __init__(self, frames: Tensor):
        self.given = frames

    def inspect(self, path: str, span: Any = None) -> Pending:
        count = len(self.given)
        times = tuple(i / 2 for i in range(count))
        info = VideoInfo(path, count, 2.0, count / 2, "given", "given", tuple(range(count)), times)
        return Pending(path, 0, None, lambda: (info, 0.0))

    def decode(self, path: str, frames: Sequence[int], formats: Sequence[PixelFormat]) -> Pending:
        arrays = tuple(f.resize(self.given[list(frames)]).numpy() for f in formats)
        return Pending(path, 0, None, lambda: Pixels(arrays, 0.0))


def video_of(frames: Tensor, backbone: Backbone, **options: Any) -> VideoInFlight:
    """A video in flight of given frames (T, H, W, 3) uint8, two a second, all of them candidates; no file is needed."""
    return VideoInFlight("given frames", backbone, _GivenFrames(frames), **options)


def check_selector(plugin: Any, *, backbone: Backbone | None = None, **options: Any) -> None:
    """Scores of a short and a longer video, alone and beside another question, and the frames for all budgets."""
    watch, backbone = Watch("selector", plugin, options), backbone or tiny_backbone()
    watch.plugin.eval()
    watch.require(isinstance(watch.plugin.uses_video, bool), "uses_video must be True or False")
    for clips in (1, 7):
        num_frames = clips * backbone.clip_frames
        scores = torch.zeros(num_frames)
        if watch.plugin.uses_video or watch.plugin.scores_frames:
            scores = _check_scores(watch, backbone, num_frames)
        with video_of(_frames(num_frames), backbone) as video:
            for values in (scores, torch.arange(num_frames).float(), torch.zeros(num_frames)):
                for budget in (1, max(1, num_frames // 2), num_frames, num_frames + 3):
                    _check_chosen(watch, video, values, budget)
    try:
        watch.plugin.pick(torch.zeros(4), 0, Candidates.evenly(4))
    except ValueError:
        return
    watch.require(False, "select() must refuse a budget of 0 with a ValueError")


def _check_chosen(watch: Watch, video: VideoInFlight, scores: Tensor, budget: int) -> None:
    """What is chosen by these scores, twice from the same, and by an equal question once more."""
    plugin, count = watch.plugin, len(scores)
    if type(plugin).pick is FrameSelector.pick:
        check_chosen(watch.who, watch.call("select", scores, budget), count, budget, repeats=plugin.repeats)
        return

    def candidates() -> Candidates:
        query = _queries(video.backbone, video.info)[0]
        return Candidates(video.info.times, video.info.duration, query, lambda i: scores[list(i)],
                          lambda: plugin.embed(video, query))  # fmt: skip

    before = scores.clone()
    with watch.guard("pick()"):
        found = [plugin.pick(scores, budget, candidates()) for _ in range(2)]
    watch.require(same(scores, before), "pick() must leave its inputs as they are, but writes into them")
    watch.require(found[0] == found[1], "pick() must give the same for the same inputs")
    check_chosen(watch.who, found[0], count, budget, repeats=plugin.repeats)


def _queries(backbone: Backbone, info: VideoInfo) -> list[FrameQuery]:
    """Two questions; the second a benchmark would know nothing of but its words."""
    shown, events = ShownVideo(info.duration, len(info.candidates), info.times), ((0.0, info.duration / 3),)
    texts = QUESTION, "Where is the blue arch?"
    return [FrameQuery(t, backbone.prompt(t, shown), events=events, video=info.path, shown=shown) for t in texts]


def _check_scores(watch: Watch, backbone: Backbone, num_frames: int) -> Tensor:
    """(T,): the scores of noise for a question."""
    with video_of(_frames(num_frames), backbone) as video:
        queries = _queries(backbone, video.info)
    prompt = queries[0].prompt
    if type(watch.plugin).score is FrameSelector.score:
        pixels = _pixels(backbone, _frames(num_frames))
        parts = (prompt.prefix_ids, prompt.question_ids, prompt.header_ids)
        scores = watch.call("score_frames", backbone, pixels, *parts, compressor=Compressor(None), question=QUESTION)
        check_scores(watch.who, scores, num_frames)
        watch.require(not scores.requires_grad, "score_frames() must run without a gradient")
    results = []
    for asked in (queries, queries[:1], queries):
        with watch.guard("score()"), video_of(_frames(num_frames), backbone) as video:
            found = watch.plugin.score(video, asked, Compressor(None))
        right = isinstance(found, list) and len(found) == len(asked)
        watch.require(right, f"score() must return a list with the scores of each question, {len(asked)} here")
        for scores in found:
            check_scores(watch.who, scores, num_frames)
            watch.require(not scores.requires_grad, "score() must run without a gradient")
        results.append(found)
    watch.require(same(results[0], results[2]), "score() must give the same for the same inputs")
    clause = "score() must give a question what it gives it alone, whatever else is asked"
    watch.require_close(results[0][0], results[1][0], clause)
    return results[0][0]


# --- Benchmarks -------------------------------------------------------------------------------------------------------


def check_benchmark(plugin: Any, **options: Any) -> None:
    """Questions (stable, complete, their videos there), the prompt, the answers' parser, training records."""
    watch = Watch("benchmark", plugin, options)
    questions = watch.call("questions")
    check_questions(watch.who, watch.plugin, questions)
    fresh = Watch("benchmark", plugin, options).call("questions", times=1)
    watch.require(same(questions, fresh), "questions() must be the same, in the same order, in every run")
    for question in questions:
        _check_question(watch, question)
    _check_metrics(watch, questions)
    axes = watch.plugin.axes
    right = isinstance(axes, tuple) and {axis for q in questions for axis in q.labels}.issuperset(axes)
    watch.require(right, f"axes must be a tuple of axes that questions have labels of, not {axes!r}")
    tokens = watch.plugin.max_new_tokens
    watch.require(isinstance(tokens, int) and tokens >= 1, f"max_new_tokens must be at least 1, not {tokens}")
    if hasattr(watch.plugin, "training_records"):
        for record in watch.call("training_records"):
            with watch.guard("training_records()"):
                parse_record(record, "", "a record")


def _check_question(watch: Watch, q: Question) -> None:
    watch.require(q.id and q.question, "a question must have an id and a text")
    watch.require(Path(q.video).exists(), f"question '{q.id}' names a video that is not there: '{q.video}'")
    prompt = watch.call("prompt", q)
    missing = [text for text in (q.question, *q.options) if text not in prompt]
    watch.require(not missing, f"prompt() must contain the question and every option; '{q.id}' lacks {missing[:1]}")
    if not q.options:
        _check_score(watch, q)
        return
    continuations = watch.call("continuations", q)
    check_continuations(watch.who, continuations, q)
    for i, text in enumerate(continuations):
        found = watch.call("parse", text, q)
        clause = f"parse() must find option {i} of '{q.id}' in what continuations() has for it, {text!r:.40}"
        watch.require(found == i or q.options.index(q.options[i]) == found, clause)
    for i, option in enumerate(q.options):
        found = [watch.call("parse", text, q) for text in (LETTERS[i], option, str(i + 1))]
        watch.require(i in found, f"parse() must find option {i} of '{q.id}' in its letter, its text or its number")
    found = watch.call("parse", "", q)
    watch.require(found is None, f"parse() must give None for an empty answer, not {found!r}")


def _check_score(watch: Watch, q: Question) -> None:
    """What an open question's right answers, an empty one and another get: the same metrics, the right no worse."""
    texts = [*q.references, "", "something else altogether"]
    scores = [watch.call("score", text, q) for text in texts]
    for metrics in scores:
        check_metrics(watch.who, metrics)
    same_names = all(list(metrics) == list(scores[0]) for metrics in scores)
    watch.require(same_names, "score() must give every answer the same metrics, in the same order")
    *right, empty, _ = (next(iter(metrics.values())) for metrics in scores)
    watch.require(
        all(s >= empty for s in right), f"score() must not rate an empty answer to '{q.id}' above a right one"
    )


def _check_metrics(watch: Watch, questions: Sequence[Question]) -> None:
    """The benchmark's own figures, of an arm that answers all rightly and one that could ask nothing."""
    line = {"arm": "a", "error": None, "prediction": None, "text": "", "category": "", "correct": True, "score": 1.0}
    records = []
    for q in questions:
        metrics = {} if q.options else dict.fromkeys(watch.plugin.score((*q.references, "")[0], q), 1.0)
        own = {"question_id": q.id, "video": q.video, "question": q.question, "category": q.category, "meta": q.meta}
        own |= {"options": list(q.options), "answer": q.answer, "references": list(q.references), "metrics": metrics}
        labels = {axis: list(names) for axis, names in q.labels.items()}
        records.append(line | own | {"prediction": q.answer, "labels": labels})
    failed = [r | {"correct": False, "score": 0.0, "metrics": {}, "error": "x", "prediction": None} for r in records]
    for given in (records, failed):
        found = watch.call("metrics", given)
        right = isinstance(found, dict) and all(isinstance(k, str) and 0 <= v <= 100 for k, v in found.items())
        watch.require(right, f"metrics() must return name → per cent, 0..100, not {found!r}")

"""What a comparison will cost, before it is run: from shapes alone, without weights and, if need be, without videos.

``xcomp cost`` counts one question about one video for each arm; ``xcomp compare --dry-run`` counts a whole run and says
how long it may take, from what was answered already or else from a short calibration. What cannot be known is told as
such, with the reason.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xcomp.adapters import base_checkpoint
from xcomp.answering import Answerer, Query
from xcomp.backbone import Backbone, ShownVideo
from xcomp.benchmark import Benchmark, Question, multiple_choice_prompt
from xcomp.compare.arms import ResolvedArm, resolve_arms
from xcomp.compare.records import read_run_records
from xcomp.compare.stand_in import missing_weights, stand_in
from xcomp.compressor import Chain, Compressor, defines
from xcomp.config import ConfigError, RunConfig, build_component, split_component
from xcomp.contract import ContractError, name_of
from xcomp.cost import (
    LayerWork,
    LLMShape,
    appended_layers,
    counted_layers,
    paper_layers,
    pass_cost,
    planned_layers,
)
from xcomp.decoder import Decoder, QuestionNeeded
from xcomp.decoding import DecodingPool, Span, VideoInfo
from xcomp.layout import merged_lengths
from xcomp.registry import configure
from xcomp.run import check_run
from xcomp.schedule import keep_slots, token_counts
from xcomp.scoring import check_mode, list_missing, missing_videos, query_of, read_questions
from xcomp.selector import FrameQuery
from xcomp.tiny import tiny_backbone
from xcomp.video import VideoError

QUESTION = "What happens in the video, and who takes part in it?"
PROBED = 20  # videos that are opened for their length; the others are taken to be like them
NOISE = 2048  # visual tokens of the video that stands in where the data decide
GIGABYTE = 1024**3
# Qwen2-1.5B with 16 tokens a frame; frames → (TFLOPs of VideoChat-Flash, of XComp), as the paper prints them: MACs.
TABLE_E_SHAPE = LLMShape(hidden=1536, intermediate=8960, heads=12, kv_heads=2, head_dim=128, layers=28, vocab=151936)
TABLE_E = {1024: (43, 20), 2048: (132, 58), 4096: (448, 187)}


@dataclass
class QuestionCost:
    """One question of one arm, about one video, from shapes alone. MACs by stage; None where they are not known.

    ``writing_macs`` are those of the longest answer that generation allows, or of scoring the options' words, which are
    not in ``macs``. ``notes`` say
    what is not known, or is only a bound.
    """

    arm: str
    num_frames: int | None = None
    tokens_per_layer: list[int] | None = None
    macs: dict[str, int | None] = field(default_factory=dict)
    writing_macs: int = 0
    kv_bytes: int | None = None
    weight_bytes: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def total_macs(self) -> int | None:
        """None if a part is not known."""
        if not self.macs or None in self.macs.values():
            return None
        return sum(self.macs.values())


# --- one question -----------------------------------------------------------------------------------------------------


def skeleton(node: Any, plugins: Sequence[str]) -> Backbone:
    """A backbone of a node's shapes, without weights (``device: meta``)."""
    name, options = split_component("backbone", node)
    while (base := base_checkpoint(options.get("checkpoint"))) is not None:  # adapters change no shape
        options = {**options, "checkpoint": base}
    return build_component("backbone", {"name": name, **options, "device": "meta"}, plugins).eval()


def question_cost(answerer: Answerer, arm: str, info: VideoInfo, query: Query) -> QuestionCost:
    """The cost of a question about a video of which only the length is known."""
    backbone, found = answerer.backbone, QuestionCost(arm)
    chooses = answerer.budget is not None and answerer.selector is not None
    num_candidates = len(info.candidates)
    num_frames = min(answerer.budget, num_candidates) if chooses else num_candidates
    found.num_frames = num_frames
    every = ShownVideo(info.shown_seconds, num_candidates, info.shown_times(info.times))
    shown = ShownVideo(every.duration, num_frames, every.times[:num_frames])
    prompt = backbone.prompt(query.text, shown)
    prefix, suffix = len(prompt.prefix_ids), len(prompt.suffix_ids)
    groups, width = num_frames // backbone.merged_frames, backbone.text_config.hidden_size
    shape, size = LLMShape.from_config(backbone.text_config), backbone.dtype.itemsize
    whole = torch.empty(groups, backbone.tokens_per_frame, width, device="meta")
    question: list[LayerWork] = []
    if depends_on_data(answerer.compressor, backbone):
        found.notes.append("what stays depends on the data: counted as on noise")
        held, outputs, needs_question = on_noise(answerer.compressor, backbone, groups, suffix)
        texts = sum(before + behind for before, behind in prompt.text_lengths or [])
        text, rows = prefix + texts + (suffix if needs_question else 0), int(needs_question)
        layers = counted_layers([n + text for n in held], [n + text for n in outputs], rows=rows)
        found.tokens_per_layer = held
    else:
        visual = answerer.decoder.compress(whole, prompt.suffix_ids)
        plan, needs_question = answerer.decoder.plan(visual.frame_tokens), False
        texts = merged_lengths(prompt.text_lengths, visual.num_frames)
        layers = planned_layers(plan, visual.num_frames, prefix, drop_early=answerer.decoder.drop_early, texts=texts)
        found.tokens_per_layer = [visual.num_frames * len(slots) for slots in plan]
    if not needs_question:
        question = appended_layers([layer.keys for layer in layers], suffix)
    prefill, asked = (
        pass_cost(shape, work, head_positions=heads, kv_value_bytes=size)
        for work, heads in ((layers, int(needs_question)), (question, int(not needs_question)))
    )
    held, generation = [layer.keys + (0 if needs_question else suffix) for layer in layers], answerer.generation
    if generation.mode == "loglikelihood":  # the last token of an option, or of an answer, is not read again
        lengths = [len(ids) - 1 for ids in answerer.answer_ids(prompt, query.continuations)]
        scored = (pass_cost(shape, appended_layers(held, n, every=True), head_positions=n) for n in lengths if n)
        found.writing_macs = sum(cost.macs for cost in scored)
    else:
        for written in range(generation.max_new_tokens - 1):
            step = pass_cost(shape, appended_layers([n + written for n in held], 1), head_positions=1)
            found.writing_macs += step.macs * generation.num_beams
    found.kv_bytes = prefill.kv_bytes + asked.kv_bytes
    found.weight_bytes = sum(parameter.numel() for parameter in backbone.parameters()) * size
    encoded, found.macs = num_frames, {"vision": None, "select": 0, "prefill": prefill.macs, "answer": asked.macs}
    if chooses and answerer.budget < num_candidates and answerer.selector.uses_video:
        frame_query = FrameQuery(query.question, backbone.prompt(query.text, every), shown=every)
        cost = answerer.selector.cost(backbone, num_candidates, frame_query, answerer.compressor)
        if cost is None:
            found.macs["select"] = None
            found.notes.append(f"{name_of('selector', answerer.selector)} does not say what it costs")
        else:
            encoded += cost.frames_encoded
            found.macs["select"] = cost.video_macs + cost.question_macs
    try:
        found.macs["vision"] = encoded // backbone.clip_frames * backbone.clip_macs(backbone.pixel_format.largest)
    except (RuntimeError, NotImplementedError) as error:
        found.notes.append(f"the vision tower cannot be counted without weights ({str(error).splitlines()[0][:60]})")
    return found


def depends_on_data(compressor: Compressor, backbone: Backbone) -> bool:
    """Whether it takes the numbers to know which tokens stay."""
    if compressor.plan(backbone.num_layers, backbone.tokens_per_frame) is None or compressor.uses_question:
        return True
    parts = compressor.parts if isinstance(compressor, Chain) else [compressor]
    return any(defines(part, "compress") for part in parts)


@torch.no_grad()
def on_noise(compressor: Compressor, backbone: Backbone, groups: int, suffix: int) -> tuple[list[int], list[int], bool]:
    """Visual tokens that each layer holds, and that go through its MLP, of a video of so many groups of frames.

    Told by a small model of as many layers on a short video of noise, which most budgets do not depend on; and whether
    the question was needed.
    """
    per_frame = backbone.tokens_per_frame
    frames = min(groups, max(8, NOISE // per_frame))
    small = tiny_backbone(layers=backbone.num_layers, tokens_per_frame=per_frame)
    decoder = Decoder(small, copy.deepcopy(compressor))
    pixels = torch.rand(frames, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    visual, prefix = small.visual(pixels, compressor.needs), torch.arange(1, 4)
    try:
        state = decoder.prefill_video(visual, prefix)
    except QuestionNeeded:
        state = decoder.prefill(visual, prefix, torch.arange(suffix) % 90 + 1)
    asked = state.logits is not None
    text, scale = len(prefix) + (suffix if asked else 0), groups / frames
    held = [round(count * scale) for count in state.tokens_per_layer]
    outputs = [round((int(counts[0]) - text) * scale) for counts in state.outputs]
    return held, outputs, asked


def nominal_video(config: RunConfig, seconds: float, fps: float = 30.0) -> VideoInfo:
    """A video of so many seconds that is nowhere, as the sampling rule takes it."""
    candidates = tuple(config.sampling.candidates(max(1, round(seconds * fps)), fps))
    times = tuple(frame / fps for frame in candidates)
    return VideoInfo("", round(seconds * fps), fps, seconds, "none", "none", candidates, times)


class _Arms:
    """The arms of a run as far as they can be built without weights; what cannot is a note.

    ``absent``: arms whose weights are not here, and why; they are counted where ``shapes`` says what they would be.
    """

    def __init__(self, config: RunConfig, arms: Sequence[ResolvedArm], benchmark: Benchmark | None = None):
        generation = config.generation if benchmark is None else config.generation.limited(benchmark.max_new_tokens)
        self.answerers: dict[str, Answerer] = {}
        self.problems: dict[str, str] = {}
        self.absent = {arm.name: why for arm in arms if (why := missing_weights(arm.backbone)) is not None}
        self.shapes = config.shapes
        self._known: dict[str, Any] = {}  # what was built, or why it could not be
        for arm in arms:
            try:
                assumed = arm.name in self.absent and config.shapes is not None
                make = partial(stand_in, shapes=config.shapes) if assumed else skeleton
                backbone = self._build("backbone", arm.backbone, make, config.plugins)
                parts = [
                    self._build(kind, getattr(arm, kind), partial(build_component, kind), config.plugins)
                    for kind in ("compressor", "selector")
                ]
                self.answerers[arm.name] = Answerer(backbone, *parts, budget=arm.frames, generation=generation)
            except ValueError as error:
                self.problems[arm.name] = " ".join(str(error).split())

    def _build(self, kind: str, node: Any, make: Callable[..., Any], plugins: Sequence[str]) -> Any:
        key = f"{kind} {node}"
        if key not in self._known:
            try:
                self._known[key] = make(node, plugins)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                self._known[key] = ConfigError(str(error))
        if isinstance(self._known[key], ConfigError):
            raise self._known[key]
        return self._known[key]

    def costs(self, info: VideoInfo, query: Query) -> dict[str, QuestionCost]:
        found = {}
        for name, answerer in self.answerers.items():
            try:
                found[name] = question_cost(answerer, name, info, query)
                if name in self.absent:
                    assumed = f"counted with the shapes of '{self.shapes}', its text by the number of letters"
                    found[name].notes.append(f"{self.absent[name]}; {assumed}")
            except ValueError as error:
                found[name] = QuestionCost(name, notes=[str(error)])
        return found | {name: QuestionCost(name, notes=[reason]) for name, reason in self.problems.items()}


def print_cost(config: RunConfig, *, seconds: float, question: str = QUESTION) -> None:
    """``xcomp cost``: for each arm one question about a video of ``seconds``."""
    arms, info = resolve_arms(config), nominal_video(config, seconds)
    costs = _Arms(config, arms).costs(info, Query("", question, question))
    console = Console()
    console.print(f"one question about a video of {seconds:g} s, {len(info.candidates)} candidate frames", markup=False)
    console.print(_cost_table([costs[arm.name] for arm in arms]))
    _print_notes(console, costs.values())


def _cost_table(costs: Sequence[QuestionCost]) -> Table:
    caption = (
        "MACs as run: attention causally, rows that leave skip output projection and MLP (drop_early: output), vision "
        "towers in full; the question's text is counted, the answer's is not. FLOPs are twice as many."
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=Text(caption), caption_justify="left")
    table.add_column("arm", overflow="fold")
    unit, scale = _unit([cost.total_macs or 0 for cost in costs])
    counted = (f"{part}\n{unit}" for part in ("vision", "select", "LLM", "total"))
    for name in ("frames", "tokens\nin → out", *counted, "KV\nMB"):
        table.add_column(name, justify="right", no_wrap=True)
    for cost in costs:
        tokens, llm = cost.tokens_per_layer, None
        if cost.macs:
            llm = cost.macs["prefill"] + cost.macs["answer"]
        macs = [cost.macs.get("vision"), cost.macs.get("select"), llm, cost.total_macs]
        kept = "?" if tokens is None else f"{tokens[0]} → {tokens[-1]}"
        row = (cost.arm, "?" if cost.num_frames is None else f"{cost.num_frames:,}", kept)
        table.add_row(*map(Text, (*row, *(_scaled(m, scale) for m in macs), _scaled(cost.kv_bytes, 1e6))))
    return table


def _unit(macs: Sequence[int]) -> tuple[str, float]:
    return ("TMACs", 1e12) if max(macs, default=0) >= 1e12 else ("GMACs", 1e9)


def _print_notes(console: Console, costs: Sequence[QuestionCost]) -> None:
    arms: dict[str, list[str]] = {}
    for cost in costs:
        for note in cost.notes:
            arms.setdefault(note, []).append(cost.arm)
    for note, names in arms.items():
        console.print(f"{', '.join(names)}: {note}", markup=False, highlight=False, soft_wrap=True)


def _scaled(value: float | None, unit: float) -> str:
    return "?" if value is None else f"{value / unit:,.3g}"


def print_table_e() -> None:
    """``xcomp cost --table-e``: the paper's Table E beside ours, counted by its convention and as run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption=Text(
        "TMACs of a prefill by Qwen2-1.5B, 16 tokens a frame. The paper's convention: full attention, every row in "
        "every layer, no text; it prints them as TFLOPs. As run: causal attention, dropping early, 100 tokens of text."
    ))  # fmt: skip
    for name in ("frames", "model", "paper", "ours", "difference", "as run"):
        table.add_column(name, justify="right")
    layers = TABLE_E_SHAPE.layers
    plans = {
        "VideoChat-Flash": [tuple(range(16))] * layers,
        "XComp": keep_slots("suffix", token_counts("cosine", layers, 16), 16),
    }
    for frames, published in TABLE_E.items():
        for (model, plan), theirs in zip(plans.items(), published):
            ours = pass_cost(TABLE_E_SHAPE, paper_layers([frames * len(slots) for slots in plan])).macs / 1e12
            run = planned_layers(plan, frames, 40, 60)
            as_run = pass_cost(TABLE_E_SHAPE, run, head_positions=1).macs / 1e12
            cells = (f"{frames:,}", model, str(theirs), f"{ours:.1f}", f"{100 * (ours / theirs - 1):+.1f} %")
            table.add_row(*cells, f"{as_run:.1f}")
    Console().print(table)


# --- a whole run ------------------------------------------------------------------------------------------------------


def dry_run(config: RunConfig, kind: str = "compare") -> bool:
    """``--dry-run``: what there is and what it will take; whether a run could begin: weights, annotations, videos.

    Asks nothing, and writes nothing into the run folder.

    Raises:
        ConfigError: what the run would refuse, its folder included (:func:`xcomp.run.check_run`).
    """
    if config.benchmark is None:
        raise ConfigError("no benchmark; name one, e.g. benchmark: needle")
    arms, console = resolve_arms(config), Console()
    check_run(config, kind)
    benchmark = build_component("benchmark", config.benchmark, config.plugins)
    questions, problem = _questions(benchmark, config.limit, config.generation.mode)
    found = _find_videos(config, questions, console)
    for what, count in benchmark.defects.items():
        console.print(f"  {count} with a defect: {what}", markup=False, soft_wrap=True)
    if problem:
        console.print(f"questions: {problem}", markup=False, soft_wrap=True)
    here = set(found)
    parts = dict.fromkeys((q.video, q.span) for q in questions if q.video in here)
    infos, decode_seconds = _probe(config, list(parts))
    info, where = _typical(config, infos)
    if questions:
        first = questions[0]
        query = query_of(benchmark, first)
    else:
        query = Query("", QUESTION, multiple_choice_prompt(QUESTION, ["yes", "no", "neither", "both"]))
    known = _Arms(config, arms, benchmark)
    costs, impossible = known.costs(info, query), known.problems
    console.print(
        f"counted for {where}: {len(info.candidates)} candidate frames, {info.shown_seconds:.0f} s", markup=False
    )
    console.print(_cost_table([costs[arm.name] for arm in arms]))
    _print_notes(console, costs.values())
    _print_memory(config, costs, info, console)
    _print_time(config, arms, questions, found, costs, decode_seconds, console)
    _print_published(arms, config.published, console)
    lacking = not found if config.allow_missing else any(q.video not in here for q in questions)
    ready = not (impossible or known.absent or problem or lacking)
    if not ready:
        console.print("not ready: what is missing stands above", markup=False)
    return ready


def _print_published(arms: Sequence[ResolvedArm], others: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """The paper's numbers, of arms and of rows that are none."""
    rows = {**{arm.name: arm.published for arm in arms if arm.published}, **others}
    if rows:
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        table = Table("published", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in names:
            table.add_column(Text(name), justify="right")
        for row, numbers in rows.items():
            table.add_row(Text(row), *(f"{numbers[name]:g}" if name in numbers else "" for name in names))
        console.print(table)


def _questions(benchmark: Any, limit: int | None, mode: str) -> tuple[list[Question], str | None]:
    try:
        questions = read_questions(benchmark)[:limit]
    except ContractError:
        raise
    except (ValueError, OSError) as error:
        return [], " ".join(str(error).split())
    check_mode(mode, questions)
    return questions, None


def _find_videos(config: RunConfig, questions: Sequence[Question], console: Console) -> list[str]:
    missing = missing_videos(questions)
    videos = list(dict.fromkeys(question.video for question in questions))
    count = len(videos) - len(missing)
    console.print(f"{len(questions)} questions about {len(videos)} videos: {count} found, {len(missing)} missing")
    for line in list_missing(missing):
        console.print(line, markup=False, soft_wrap=True)
    if missing and not config.allow_missing:
        text = "a run ends before it begins where videos are missing; allow_missing: true goes on without them"
        console.print(text, soft_wrap=True)
    return [video for video in videos if video not in set(missing)]


def _probe(config: RunConfig, videos: Sequence[tuple[str, Span]]) -> tuple[list[VideoInfo], float | None]:
    """Some of the videos, or spans of them, opened; and the seconds that decoding one candidate frame takes, on the
    first that opens."""
    infos, seconds = [], None
    step = max(1, len(videos) // PROBED)
    with DecodingPool(config.decoding, config.sampling) as pool:
        for path, span in videos[::step][:PROBED]:
            try:
                infos.append(pool.inspect(path, span).result()[0])
            except VideoError:
                continue  # it will be an error of its questions
        if infos:
            frames = sorted(set(infos[0].candidates))[:: max(1, len(infos[0].candidates) // 16)][:16]
            started = time.perf_counter()
            try:
                pool.decode(infos[0].path, frames, []).result()
                seconds = (time.perf_counter() - started) / len(frames)
            except VideoError:
                pass
    return infos, seconds


def _typical(config: RunConfig, infos: Sequence[VideoInfo]) -> tuple[VideoInfo, str]:
    """A video of middle length among those that were opened; without any, one that fills ``max_frames``."""
    if infos:
        ordered = sorted(infos, key=lambda info: len(info.candidates))
        return ordered[len(ordered) // 2], f"the middle one of {len(infos)} videos that were opened"
    sampling = config.sampling
    seconds = (sampling.max_frames + sampling.multiple) / sampling.rate
    return nominal_video(config, seconds), "a video as long as max_frames needs, as none is here"


def _print_memory(config: RunConfig, costs: Mapping[str, QuestionCost], info: VideoInfo, console: Console) -> None:
    caches = [cost.kv_bytes for cost in costs.values() if cost.kv_bytes is not None]
    weights = [cost.weight_bytes for cost in costs.values() if cost.weight_bytes is not None]
    if not caches:
        return
    device = (max(weights) + (1 + config.batch_size) * max(caches)) / GIGABYTE + config.memory.tokens
    console.print(
        f"memory: up to {device:.1f} GB where the model is (weights of {max(weights) / GIGABYTE:.2f}, caches of the "
        f"stored video and of {config.batch_size} questions behind it, {config.memory.tokens:g} of tokens; activations "
        f"on top), and {config.memory.pixels:g} GB of pixels on the host",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _print_time(
    config: RunConfig,
    arms: Sequence[ResolvedArm],
    questions: Sequence[Question],
    found: Sequence[str],
    costs: Mapping[str, QuestionCost],
    decode_seconds: float | None,
    console: Console,
) -> None:
    here, records = set(found), read_run_records(config.folder) if config.folder.is_dir() else []
    done = {(r["arm"], r["question_id"]) for r in records if not r.get("error")}
    left = {a.name: [q for q in questions if q.video in here and (a.name, q.id) not in done] for a in arms}
    count = sum(map(len, left.values()))
    answered = sum((a.name, q.id) in done for a in arms for q in questions)
    console.print(f"{count} questions are open, {answered} answered", markup=False)
    if not count:
        return
    own = {arm.name for arm in arms}
    spent = [r for r in records if not r.get("error") and r["arm"] in own]
    if spent:
        by_arm = {a.name: [sum(r["seconds_amortised"].values()) for r in spent if r["arm"] == a.name] for a in arms}
        known = [s for values in by_arm.values() for s in values]
        mean = sum(known) / len(known)
        seconds = sum(len(left[a]) * (sum(v) / len(v) if v else mean) for a, v in by_arm.items())
        console.print(f"expected: {_duration(seconds)}, from what the answered ones took", markup=False)
        return
    totals = [costs[a].total_macs for a in left if left[a]]
    if None in totals or decode_seconds is None:
        console.print("expected time: not known, as some arms cannot be counted here", markup=False)
        return
    name, options = split_component("backbone", arms[0].backbone)
    own = configure("backbone", name, options, config.plugins)[1]
    device, dtype = getattr(own, "device", "cpu"), getattr(own, "dtype", "float32")
    try:
        rate = macs_a_second(device, getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        console.print(f"expected time: '{device}' cannot be calibrated here: {reason}", markup=False, soft_wrap=True)
        return
    shared = {"vision", "prefill"}
    compute = 0.0
    for arm, open_questions in left.items():
        videos = len({(question.video, question.span) for question in open_questions})
        for stage, macs in costs[arm].macs.items():
            compute += macs * (videos if stage in shared else len(open_questions)) / rate
        compute += costs[arm].writing_macs * len(open_questions) / rate
    frames = max(cost.num_frames or 0 for cost in costs.values())
    decode = (
        decode_seconds * frames * len({(q.video, q.span) for open_questions in left.values() for q in open_questions})
    )
    console.print(
        f"expected: about {_duration(max(compute, decode))} ({_duration(compute)} of the model at {rate / 1e9:,.0f} "
        f"GMACs a second, measured on matrix products on {device}; {_duration(decode)} of decoding beside it)",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def macs_a_second(device: str, dtype: torch.dtype, *, width: int = 2048, seconds: float = 1.0) -> float:
    """MACs a second of a matrix product of the size that language models have, measured for about ``seconds``."""
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if a.device.type == "cuda" else lambda: None
    a @ b  # the first one loads its kernel
    wait()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a @ b
        wait()
        count += 1
    return count * width**3 / (time.perf_counter() - started)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

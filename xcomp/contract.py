"""The clauses of the contracts that hold in every run; :mod:`xcomp.testing` checks these and more.

Whatever a plugin does wrong is reported in its own name.
"""

from __future__ import annotations

import inspect
import json
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from xcomp.benchmark import LETTERS, Benchmark, Question
from xcomp.layout import TokenLayout
from xcomp.pixels import PixelFormat
from xcomp.registry import KINDS
from xcomp.visual import VisualTokens


class ContractError(ValueError):
    """A plugin breaks a clause of its contract."""


def name_of(kind: str, plugin: Any) -> str:
    """``selector 'qc_comp'``: by the name it was asked for, else by its class."""
    return f"{kind} '{getattr(plugin, 'plugin_name', type(plugin).__name__)}'"


def require(holds: Any, who: str, clause: str) -> None:
    if not holds:
        raise ContractError(f"{who}: {clause}")


def check_methods(kind: str, plugin: Any, *methods: str) -> None:
    """The plugin must define these itself: the contract's class only names them."""
    contract = getattr(import_module(KINDS[kind][1]), KINDS[kind][2])
    for method in methods:
        missing = getattr(type(plugin), method, None) is getattr(contract, method)
        require(not missing, name_of(kind, plugin), f"{method}() is missing")


def check_pixel_format(who: str, backbone: Any) -> None:
    """Frames are resized in other processes by ``pixel_format`` alone, so nothing else may have a say in it."""
    found = getattr(backbone, "pixel_format", None)
    require(isinstance(found, PixelFormat), who, f"pixel_format must be a PixelFormat, not {found!r:.60}")
    own = type(backbone).preprocess.__qualname__ != "Backbone.preprocess"
    require(not own, who, "preprocess() follows from pixel_format and must not be overridden; describe pixels there")


def check_encoded(who: str, tokens: Any, shape: tuple[int, int, int], method: str = "encode") -> None:
    right = isinstance(tokens, Tensor) and tokens.shape == shape
    require(right, who, f"{method}() must return (T, N, D) = {shape}, not {describe(tokens, False)}")


def check_frame_texts(who: str, texts: Any, num_groups: int) -> None:
    """Text between the frames of a prompt: none, or one piece before and one behind each frame."""
    clause = f"prompt().frame_texts must be None or hold a (before, behind) of ids for each of the {num_groups} frames"
    right = texts is None or (isinstance(texts, (list, tuple)) and len(texts) == num_groups)
    require(right and all(isinstance(text, tuple) and len(text) == 2 for text in texts or ()), who, clause)
    require(all(isinstance(ids, Tensor) for text in texts or () for ids in text), who, clause)


def check_tower(who: str, tower: Any, needs: Sequence[str], num_groups: int, tokens_per_frame: int) -> None:
    for name in needs:
        rows = num_groups if name == "frame" else num_groups * tokens_per_frame
        right = isinstance(tower.get(name), Tensor) and tower[name].shape[:1] == (rows,)
        clause = f"encode_with() must give '{name}' with {rows} rows, not {describe(tower.get(name), False)}"
        require(right, who, clause)


def check_before_llm(who: str, given: Tensor, returned: Any) -> None:
    shape, right = tuple(given.shape), isinstance(returned, Tensor) and returned.ndim == 3
    clause = f"before_llm() must turn (T, N, D) = {shape} into (T', N', D), not {describe(returned, False)}"
    require(right and returned.shape[2] == shape[2], who, clause)
    fewer = 0 < returned.shape[0] * returned.shape[1] <= shape[0] * shape[1]
    clause = f"before_llm() must keep at least 1 token and add none: {shape} became {tuple(returned.shape)}"
    require(fewer, who, clause)


def check_compressed(who: str, given: VisualTokens, returned: Any) -> None:
    """What ``compress`` returns, whether it is written by ``before_llm`` or by itself."""
    if not isinstance(returned, VisualTokens):
        if given.is_whole:
            check_before_llm(who, given.frames(), returned)
        require(False, who, f"compress() must return VisualTokens, not {describe(returned, False)}")
    if returned is given:
        return
    if returned.is_whole and given.is_whole and returned.size is None and returned.group is None:
        check_before_llm(who, given.frames(), returned.frames())
        return
    count, fields = len(returned), {"frame": returned.frame, "slot": returned.slot}
    require(returned.tokens.shape[1:] == given.tokens.shape[1:], who, "compress() must keep the tokens' width")
    fewer = f"compress() must keep at least 1 token and add none: {len(given)} became {count}"
    require(0 < count <= len(given), who, fewer)
    for name, values in fields.items():
        right = isinstance(values, Tensor) and values.dtype == torch.long and values.shape == (count,)
        require(right, who, f"compress(): {name} must be ({count},) long, not {describe(values)}")
    frame, slot = returned.frame.cpu(), returned.slot.cpu()
    require((frame.diff() >= 0).all(), who, "compress(): frames must not descend from token to token")
    inside = ((frame >= 0) & (frame < returned.num_frames) & (slot >= 0) & (slot < returned.frame_tokens)).all()
    limits = f"0..{returned.num_frames - 1} and slots within 0..{returned.frame_tokens - 1}"
    require(inside, who, f"compress() must name frames within {limits}")
    crowded = torch.bincount(frame).max() > returned.frame_tokens
    require(not crowded, who, f"compress() must leave a frame at most its {returned.frame_tokens} tokens")
    right = returned.size is None or returned.size.shape == (count,)
    require(right, who, f"compress(): size must be None or ({count},)")
    right = returned.group is None or (returned.group.dtype == torch.long and returned.group.shape == (count,))
    require(right, who, f"compress(): group must be None or ({count},) long")


def check_keep(who: str, keep: Any, layout: TokenLayout, method: str = "after_layer") -> None:
    shape = tuple(layout.real.shape)
    right = isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.shape == shape
    require(right, who, f"{method}() must return None, a Reduction or (B, S) = {shape} bool, not {describe(keep)}")
    left = (keep.cpu() & layout.visual).any(1)
    require(left.all(), who, f"{method}() must keep a visual token of every sample")


def check_reduction(who: str, found: Any, layout: TokenLayout, width: int, method: str) -> None:
    """``found`` is a Reduction of a pass over ``layout`` with hidden states of ``width``."""
    batch = len(layout.real)
    require(len(found.order) == batch, who, f"{method}(): order must name the positions of {batch} samples")
    for row, order in enumerate(found.order):
        right = isinstance(order, Tensor) and order.dtype == torch.long and order.ndim == 1
        require(right, who, f"{method}(): order must be 1-D long a sample, not {describe(order)}")
        order = order.cpu()
        once = len(order.unique()) == len(order) and ((order >= 0) & (order < layout.width)).all()
        require(once and layout.real[row, order].all(), who, f"{method}(): order must name real positions, each once")
        text = (layout.real[row] & ~layout.visual[row]).nonzero()[:, 0]
        kept = order[~layout.visual[row, order]]
        require(torch.equal(kept, text), who, f"{method}(): order must name all of the text, in its order")
        require(len(order) > len(kept), who, f"{method}() must keep a visual token of every sample")
        if found.hidden is not None:
            right = found.hidden[row].shape == (len(order), width)
            require(
                right, who, f"{method}(): hidden must be ({len(order)}, {width}), not {describe(found.hidden[row])}"
            )
        if found.size is not None:
            right = bool((found.size[row] > 0).all())
            require(right, who, f"{method}(): size must be positive: how many tokens of the video each stands for")
            require(found.size[row].shape == (len(order),), who, f"{method}(): size must be ({len(order)},)")


def check_plan(plan: list[tuple[int, ...]], num_layers: int, tokens_per_frame: int, who: str) -> None:
    """ValueError unless every layer keeps at least one slot, in range, once, out of those of the layer before."""
    layers = list(plan) if isinstance(plan, Sequence) else [None]
    if not all(isinstance(slots, Sequence) and all(isinstance(slot, int) for slot in slots) for slots in layers):
        raise ValueError(f"{who}.plan must return the slots of each layer, a list of tuples of int, not {plan!r:.60}")
    if len(plan) != num_layers:
        raise ValueError(f"{who}.plan names {len(plan)} layers, but the language model has {num_layers}")
    before = set(range(tokens_per_frame))
    for layer, slots in enumerate(plan, start=1):
        if not slots:
            raise ValueError(f"{who}.plan keeps no token of a frame at layer {layer}; at least 1 must stay")
        if list(slots) != sorted(set(slots)):
            raise ValueError(f"{who}.plan must name each slot once and ascending; layer {layer} has {list(slots)}")
        if slots[0] < 0 or slots[-1] >= tokens_per_frame:
            raise ValueError(
                f"{who}.plan names slot {slots[0] if slots[0] < 0 else slots[-1]} at layer {layer}; "
                f"a frame has slots 0..{tokens_per_frame - 1}"
            )
        if not before.issuperset(slots):
            raise ValueError(f"{who}.plan brings back slots dropped earlier, at layer {layer}")
        before = set(slots)


def check_scores(who: str, scores: Any, num_frames: int) -> None:
    right = isinstance(scores, Tensor) and scores.shape == (num_frames,) and scores.is_floating_point()
    clause = f"score_frames() must return one floating-point score a frame, ({num_frames},), not {describe(scores)}"
    require(right, who, clause)
    require(scores.isfinite().all(), who, "score_frames() must give every frame a finite score")


def check_chosen(who: str, chosen: Any, num_frames: int, budget: int, *, repeats: bool = False) -> None:
    """``repeats``: the selector says that a frame may be chosen several times."""
    right = isinstance(chosen, list) and all(type(i) is int for i in chosen)
    require(right, who, f"select() must return a list of int, not {chosen!r}")
    inside = all(0 <= i < num_frames for i in chosen)
    require(inside, who, f"select() must name frames within 0..{num_frames - 1}, not {chosen}")
    ascending = all(a < b or (repeats and a == b) for a, b in zip(chosen, chosen[1:]))
    require(ascending, who, f"select() must be ascending{'' if repeats else ' and name a frame once'}, not {chosen}")
    met = len(chosen) == min(budget, num_frames)
    clause = f"select() must meet the budget: {min(budget, num_frames)} of {num_frames}, not {chosen}"
    require(met, who, clause)


def check_questions(who: str, benchmark: Benchmark, questions: Any) -> None:
    right = isinstance(questions, list) and questions and all(isinstance(q, Question) for q in questions)
    require(right, who, "questions() must return a list of at least one Question")
    for question in questions:
        wrong = _wrong_with(question)
        require(wrong is None, who, f"question {question.id!r:.80}: {wrong}")
    double = [name for name, count in Counter(q.id for q in questions).items() if count > 1]
    require(not double, who, f"the id of every question must be its own; these occur more than once: {double[:3]}")
    if type(benchmark).score is Benchmark.score:
        bare = [q.id for q in questions if not q.options and not q.references]
        require(not bare, who, f"an open question must have references, or score() must do without; none in {bare[:3]}")


def _wrong_with(q: Question) -> str | None:
    """The first clause that a question breaks, if any."""
    for name in ("id", "video", "question", "category"):
        if not isinstance(getattr(q, name), str):
            return f"{name} must be text, not {getattr(q, name)!r:.60}"
    for name in ("options", "references"):
        if not _are_texts(getattr(q, name)):
            return f"{name} must be a tuple of text, not {getattr(q, name)!r:.60}"
    count = len(q.options)
    if count and not 2 <= count <= len(LETTERS):
        return f"there must be 2 to {len(LETTERS)} options, or none for an open question, not {count}"
    if q.answer is not None and not (type(q.answer) is int and 0 <= q.answer < count):
        index = f"an option's index, 0..{count - 1}, or None if none is right"
        return f"answer must be {index if count else 'None, as there are no options'}; not {q.answer!r:.60}"
    if not isinstance(q.labels, Mapping) or not all(isinstance(k, str) and _are_texts(v) for k, v in q.labels.items()):
        return f"labels must map an axis to a tuple of labels, not {q.labels!r:.60}"
    if not isinstance(q.events, tuple) or not all(map(_is_span, q.events)):
        return f"events must be (start, end) in seconds, not {q.events!r:.60}"
    if q.span is not None and not (_is_span(q.span) and q.span[0] < q.span[1]):
        return f"span must be (start, end) in seconds or None, not {q.span!r:.60}"
    if not isinstance(q.subtitles, str | None):
        return f"subtitles must be the path of a file or None, not {q.subtitles!r:.60}"
    try:
        json.dumps(q.meta, allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"meta must be what JSON can hold: {error}"
    return None if isinstance(q.meta, dict) else f"meta must be a dict, not {q.meta!r:.60}"


def _are_texts(values: Any) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, str) for value in values)


def _is_span(span: Any) -> bool:
    right = isinstance(span, tuple) and len(span) == 2
    right = right and all(isinstance(t, int | float) and not isinstance(t, bool) and isfinite(t) for t in span)
    return right and 0 <= span[0] <= span[1]


def check_continuations(who: str, found: Any, question: Question) -> None:
    right = _are_texts(found) and len(found) == len(question.options) and all(found)
    clause = f"continuations() must return a tuple of {len(question.options)} texts, one an option, not {found!r:.80}"
    require(right, who, clause)


def check_prediction(who: str, prediction: Any, question: Question) -> None:
    right = prediction is None or (type(prediction) is int and 0 <= prediction < len(question.options))
    require(right, who, f"parse() must return an option's number or None, not {prediction!r}")


def check_metrics(who: str, metrics: Any) -> None:
    right = isinstance(metrics, Mapping) and metrics and all(isinstance(name, str) for name in metrics)
    right = right and all(isinstance(v, int | float) and 0 <= v <= 1 for v in metrics.values())
    require(right, who, f"score() must return at least one metric, name → 0..1, not {metrics!r:.80}")


@contextmanager
def blamed(who: str, plugin: Any, method: str) -> Iterator[None]:
    """Whatever a plugin's method raises that is no ValueError becomes one line that names it and where it happened."""
    try:
        yield
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        own = inspect.getsourcefile(type(plugin))
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
        where = f" ({own}, line {lines[-1]})" if lines else ""
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise ContractError(f"{who}: {method}() must not fail; {message}{where}") from error


def describe(value: Any, dtype: bool = True) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)}" if dtype else str(tuple(value.shape))

"""What contract checks are made of: clauses that hold in every run, and a plugin under test.

Whatever a plugin does wrong is reported in its own name.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from xcomp.benchmark import Question
from xcomp.layout import TokenLayout
from xcomp.pixels import PixelFormat
from xcomp.registry import KINDS, make_config


class ContractError(ValueError):
    """A plugin breaks a clause of its contract."""


# --- Clauses, checked by ``xcomp.testing`` and wherever a run calls a plugin ------------------------------------------


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
    from xcomp.backbone import Backbone

    found = getattr(backbone, "pixel_format", None)
    require(isinstance(found, PixelFormat), who, f"pixel_format must be a PixelFormat, not {found!r:.60}")
    own = type(backbone).preprocess is not Backbone.preprocess
    require(not own, who, "preprocess() follows from pixel_format and must not be overridden; describe pixels there")


def check_encoded(who: str, tokens: Any, shape: tuple[int, int, int]) -> None:
    right = isinstance(tokens, Tensor) and tokens.shape == shape
    require(right, who, f"encode() must return (T, N, D) = {shape}, not {describe(tokens, False)}")


def check_before_llm(who: str, given: Tensor, returned: Any) -> None:
    shape, right = tuple(given.shape), isinstance(returned, Tensor) and returned.ndim == 3
    clause = f"before_llm() must turn (T, N, D) = {shape} into (T', N', D), not {describe(returned, False)}"
    require(right and returned.shape[2] == shape[2], who, clause)
    fewer = 0 < returned.shape[0] * returned.shape[1] <= shape[0] * shape[1]
    clause = f"before_llm() must keep at least 1 token and add none: {shape} became {tuple(returned.shape)}"
    require(fewer, who, clause)


def check_keep(who: str, keep: Any, layout: TokenLayout) -> None:
    shape = tuple(layout.real.shape)
    right = isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.shape == shape
    require(right, who, f"after_layer() must return None or (B, S) = {shape} bool, not {describe(keep)}")
    left = (keep.cpu() & layout.visual).any(1)
    require(left.all(), who, "after_layer() must keep a visual token of every sample")


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
            raise ValueError(f"{who}.plan names slot {slots[0] if slots[0] < 0 else slots[-1]} at layer {layer}; "
                             f"a frame has slots 0..{tokens_per_frame - 1}")
        if not before.issuperset(slots):
            raise ValueError(f"{who}.plan brings back slots dropped earlier, at layer {layer}")
        before = set(slots)


def check_scores(who: str, scores: Any, num_frames: int) -> None:
    right = isinstance(scores, Tensor) and scores.shape == (num_frames,) and scores.is_floating_point()
    clause = f"score_frames() must return one floating-point score a frame, ({num_frames},), not {describe(scores)}"
    require(right, who, clause)
    require(scores.isfinite().all(), who, "score_frames() must give every frame a finite score")


def check_chosen(who: str, chosen: Any, num_frames: int, budget: int) -> None:
    right = isinstance(chosen, list) and all(type(i) is int for i in chosen)
    require(right, who, f"select() must return a list of int, not {chosen!r}")
    inside = all(0 <= i < num_frames for i in chosen)
    require(inside, who, f"select() must name frames within 0..{num_frames - 1}, not {chosen}")
    ascending = all(a < b for a, b in zip(chosen, chosen[1:]))
    require(ascending, who, f"select() must be ascending and name a frame once, not {chosen}")
    met = len(chosen) == min(budget, num_frames)
    clause = f"select() must meet the budget: {min(budget, num_frames)} of {num_frames}, not {chosen}"
    require(met, who, clause)


def check_questions(who: str, questions: Any) -> None:
    right = isinstance(questions, list) and questions and all(isinstance(q, Question) for q in questions)
    require(right, who, "questions() must return a list of at least one Question")
    double = [name for name, count in Counter(q.id for q in questions).items() if count > 1]
    require(not double, who, f"the id of every question must be its own; these occur more than once: {double[:3]}")


def describe(value: Any, dtype: bool = True) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)}" if dtype else str(tuple(value.shape))


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

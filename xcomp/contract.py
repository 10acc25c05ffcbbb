"""What contract checks are made of: a plugin under test, whose every fault is reported in its own name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from xcomp.registry import KINDS, make_config


class ContractError(ValueError):
    """A plugin breaks a clause of its contract."""


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
        if not holds:
            raise ContractError(f"{self.who}: {clause}")

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

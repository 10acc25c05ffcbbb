"""A pretended CUDA device: the real code with real numbers under CUDA's rules of place, on a machine without one.

    with pretend_cuda() as waits:
        backbone.to("cuda")
        ...

Inside, a tensor made on ``cuda`` or moved there says ``device(type='cuda', index=0)``; it is an ordinary CPU tensor
whose storage is marked. Promised:

- An operation on tensors of both places is the RuntimeError "Expected all tensors to be on the same device", but for
  what CUDA allows: copies, 0-dim CPU tensors in pointwise operations, CPU tensors as indices (``x[index]``).
- Results, views and gradients are where their inputs are. Modules move as usual; tied weights stay tied.
- ``.numpy()`` of a tensor there is a TypeError.
- ``waits`` counts what makes the host wait until the device has done all that was asked of it: ``item`` (also by
  ``bool`` and ``int``), ``tolist``, ``equal``, ``nonzero`` and its kin, ``index by a mask``, ``copy to cpu``, and
  ``copy to cuda`` unless it is ``non_blocking``.
- ``torch.cuda`` and Lightning find one device; ``torch.autocast("cuda")`` is the CPU's.

Numbers are the CPU's, so code that takes the same steps on both devices gives the same to the last bit. Not promised:
kernels, rounding, speed and memory of a real device; operations that only CUDA's autocast lists; the device's own
random numbers; streams, pinned memory, several devices; work in other threads and processes, which is not seen. What
torch makes inside a function of its own has no place until it meets a tensor that has one.

Marks rather than a tensor class of its own: a wrapper that says ``cuda`` cannot take part in autograd where torch was
built without CUDA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # loaded by the first operation under a mode otherwise, and it cannot load what is replaced below
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU, NOWHERE = "cuda", "cpu", "nowhere"  # nowhere yet: made by torch itself

# --- where a tensor is ------------------------------------------------------------------------------------------------

# Storage → (weak reference, place); what is not listed is on the CPU. As long as a weak reference is held, no other
# storage gets the address. The table outlives a context, as tensors do.
_places: dict[int, tuple[StorageWeakRef, str]] = {}
_device = torch._C.TensorBase.device.__get__  # the true one


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def place_of(tensor: Tensor) -> str:
    return _places.get(_storage(tensor), (None, CPU))[1]


def put(tensor: Tensor, place: str) -> None:
    if place == CPU:
        _places.pop(_storage(tensor), None)
        return
    _places[_storage(tensor)] = (StorageWeakRef(tensor.untyped_storage()), place)
    if len(_places) % 10_000 == 0:
        for freed in [storage for storage, (reference, _) in _places.items() if reference.expired()]:
            del _places[freed]


def _tensors(*values: Any) -> list[Tensor]:
    """All tensors in nested arguments that have numbers: those on ``meta`` have none, and no place."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found += [value] if _device(value).type == CPU else []
        elif isinstance(value, (list, tuple)):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found


class _Move(torch.autograd.Function):
    """A copy at another place; its gradient goes back to where the tensor was."""

    @staticmethod
    def forward(ctx, tensor: Tensor, place: str) -> Tensor:
        ctx.place = place_of(tensor)
        return _copy(tensor, place)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _copy(gradient, ctx.place), None


def _copy(tensor: Tensor, place: str) -> Tensor:
    copy = tensor.clone()
    put(copy, place)
    return copy


# --- operations: below autograd, so those of a backward pass too ------------------------------------------------------

INDEXING = {"aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
TAKES_NUMBERS = ("aten::fill", "aten::masked_fill", "aten::_foreach")  # as 0-dim tensors, beside all that is pointwise
WAITS = {
    "aten::_local_scalar_dense": "item",
    "aten::equal": "equal",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "nonzero",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::bincount": "bincount",
    "aten::repeat_interleave": "repeat_interleave",  # by a tensor of counts
}


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Counter):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        with torch._C.DisableTorchFunction():  # the tensors' own attributes in here
            given = _tensors(args, kwargs)
            known, places = {_storage(tensor) for tensor in given}, {place_of(tensor) for tensor in given}
            place = CUDA if CUDA in places else CPU if CPU in places else NOWHERE
            if name == "aten::copy_":
                if {place_of(args[0]), place_of(args[1])} == {CUDA, CPU}:
                    _count_copy(self.waits, place_of(args[0]), *args[2:], **kwargs)
                if place_of(args[0]) == NOWHERE:
                    put(args[0], place_of(args[1]))
            elif place == CUDA:
                _check(func, args, given)
                self._count(name, args)
                for tensor in given:
                    if place_of(tensor) == NOWHERE:
                        put(tensor, CUDA)
            out = func(*args, **kwargs)
            for tensor in _tensors(out):
                if _storage(tensor) not in known and name != "aten::set_":  # views, and other names of a storage
                    put(tensor, place)
            return out

    def _count(self, name: str, args: Any) -> None:
        if name in WAITS:
            self.waits[WAITS[name]] += 1
        elif name in INDEXING and any(i.dtype == torch.bool and place_of(i) == CUDA for i in _tensors(args[1])):
            self.waits["index by a mask"] += 1


def _count_copy(waits: Counter, place: str, non_blocking: bool = False) -> None:
    if place == CPU or not non_blocking:
        waits[f"copy to {place}"] += 1


def _check(func: Any, args: Any, given: list[Tensor]) -> None:
    """RuntimeError if a tensor on the CPU meets one on CUDA where CUDA does not allow it."""
    name, wrong = func._schema.name, [tensor for tensor in given if place_of(tensor) == CPU]
    if name in INDEXING:
        indices = {id(tensor) for tensor in _tensors(args[1])}
        wrong = [tensor for tensor in wrong if id(tensor) not in indices]
    if torch.Tag.pointwise in func.tags or name in INDEXING or name.startswith(TAKES_NUMBERS):
        written = args[0] if func._schema.is_mutable else None
        wrong = [tensor for tensor in wrong if tensor.dim() or tensor is written]
    if wrong:
        where = ", ".join(f"{tuple(tensor.shape)} on {place_of(tensor)}" for tensor in given)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} was given {where}")


# --- calls from Python: factories that name a device, and a tensor's own attributes -----------------------------------


class _Factories(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        device = None if device is None else torch.device(device).type
        if device in (CUDA, CPU) and func is not torch._C._nn._parse_to:
            made = func(*args, **{**kwargs, "device": CPU})
            if _storage(made) in map(_storage, _tensors(args, kwargs)):  # as_tensor of a tensor
                return made.to(device)
            put(made, device)
            return made
        made = func(*args, **kwargs)
        if not _tensors(args, kwargs):
            for tensor in _tensors(made):
                put(tensor, CPU)
        return made


def _outside(function: Callable) -> Callable:
    """The function as it is: under a mode torch would look its replacement up by name, and call that."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call


def _attributes(waits: Counter) -> dict[str, Any]:
    """What a tensor says of its place, and the ways to another one."""
    names = ("to", "tolist", "numpy", "new_tensor", "__deepcopy__", "get_device")
    own = {name: _outside(getattr(Tensor, name)) for name in names}
    is_cpu = Tensor.is_cpu.__get__

    def move(x: Tensor, place: str, non_blocking: bool = False) -> Tensor:
        if place == place_of(x):
            return x
        _count_copy(waits, place, non_blocking)
        return _Move.apply(x, place)

    def to(x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        other = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("other")
        if other is not None:
            place, dtype, non_blocking, layout = place_of(other), other.dtype, False, None
        else:
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
            place = place_of(x) if device is None else device.type
        if place not in (CUDA, CPU):  # meta
            return own["to"](x, *args, copy=copy, **kwargs)
        moved = move(x, place, non_blocking)
        layout = torch.preserve_format if layout is None else layout
        return own["to"](moved, dtype=dtype or x.dtype, copy=copy and moved is x, memory_format=layout)

    def tolist(x: Tensor) -> Any:
        if place_of(x) == CUDA:
            waits["tolist"] += 1
        return own["tolist"](x)

    def numpy(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if place_of(x) == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return own["numpy"](x, *args, **kwargs)

    def new_tensor(x: Tensor, data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        made = own["new_tensor"](x, data, **kwargs)
        put(made, place_of(x) if device is None else torch.device(device).type)
        return made

    def deepcopy(x: Tensor, memo: dict) -> Tensor:
        copy = own["__deepcopy__"](x, memo)
        put(copy, place_of(x))
        return copy

    return {
        "device": property(lambda x: torch.device(CUDA, 0) if place_of(x) == CUDA else _device(x)),
        "is_cuda": property(lambda x: place_of(x) == CUDA),
        "is_cpu": property(lambda x: place_of(x) != CUDA and is_cpu(x)),
        "get_device": lambda x: 0 if place_of(x) == CUDA else own["get_device"](x),
        "to": to,
        "cuda": lambda x, device=None, non_blocking=False, memory_format=None: move(x, CUDA, non_blocking),
        "cpu": lambda x, memory_format=None: move(x, CPU),
        "type_as": lambda x, other: to(x, other),
        "new_tensor": new_tensor,
        "tolist": tolist,
        "numpy": numpy,
        "__deepcopy__": deepcopy,
    }


# --- what is asked of torch itself ------------------------------------------------------------------------------------


def _nothing(*_: Any, **__: Any) -> None:
    pass


ASKED_OF_CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: "a pretended device",
    "get_device_capability": lambda device=None: (7, 0),
    "is_bf16_supported": lambda *_: True,
    "set_device": _nothing,
    "synchronize": _nothing,
    "reset_peak_memory_stats": _nothing,
    "get_rng_state": lambda device=None: torch.empty(0, dtype=torch.uint8),
    "set_rng_state": _nothing,
}


@contextmanager
def pretend_cuda() -> Iterator[Counter]:
    """A CUDA device for the code inside; yields the counts of waits, which a test may clear at any time."""
    waits: Counter = Counter()
    factories = _Factories()
    autocast, enabled, dtype = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype
    backward = torch.autograd._engine_run_backward

    def cpu_autocast(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, CPU if device_type == CUDA else device_type, *args, **kwargs)

    def backward_with_factories(*args: Any, **kwargs: Any) -> Any:
        with factories:  # torch has left the mode here, but a checkpointed layer runs again
            return backward(*args, **kwargs)

    replaced = (
        (Tensor, _attributes(waits)),
        (torch, {"is_autocast_enabled": lambda _=CPU: enabled(CPU), "get_autocast_dtype": lambda _=CPU: dtype(CPU)}),
        (torch.autocast, {"__init__": cpu_autocast}),
        (torch.autograd, {"_engine_run_backward": backward_with_factories}),
        (torch.cuda, ASKED_OF_CUDA),
    )
    with ExitStack() as stack:
        for target, names in replaced:
            stack.enter_context(patch.multiple(target, **names))
        stack.enter_context(_Operations(waits))
        stack.enter_context(factories)
        yield waits

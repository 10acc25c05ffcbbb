"""A model that several processes hold in pieces while it is tuned (FSDP2, ``trainer.strategy: fsdp2``).

The unit that is gathered, used and put away again is a layer of the language model. The decoder runs a layer's halves
itself, so a layer gets a method ``within`` for that, which gathers its weights as ``forward`` would. All else (vision
tower, projector, embedding, head) is gathered for the whole of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from xcomp.backbone import Backbone
from xcomp.config import ConfigError
from xcomp.contract import name_of
from xcomp.decoder import Decoder


def is_sharded(trainer: L.Trainer) -> bool:
    return isinstance(trainer.strategy, ModelParallelStrategy)


def check_sharded(decoder: Decoder) -> None:
    """ConfigError for a rule that looks at the data between layers: it reads weights of layers that do not run."""
    if decoder.plan(decoder.backbone.tokens_per_frame) is None:
        raise ConfigError(
            f"trainer.strategy is fsdp2, but {name_of('compressor', decoder.compressor)} looks at the data inside the "
            "language model, where weights are not all there; use ddp, or a compressor that is planned"
        )


def shard(module: L.LightningModule, backbone: Backbone, mesh: DeviceMesh, *steps: str) -> None:
    """Let the processes of ``mesh`` share the parameters of ``module``, whose methods ``steps`` run a step. Once."""
    if isinstance(module, FSDPModule):
        return
    for layer in backbone.language_model.layers:
        layer.within = _call
        fully_shard(layer, mesh=mesh)
        register_fsdp_forward_method(layer, "within")
    fully_shard(module, mesh=mesh)
    for step in steps:
        register_fsdp_forward_method(module, step)


def _call(part: Callable[..., Any], *args: Any) -> Any:
    return part(*args)


@contextmanager
def gathered(module: L.LightningModule) -> Iterator[None]:
    """Whole parameters on every process, for saving; all processes enter and leave together."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    yield
    for part in parts:
        part.reshard()

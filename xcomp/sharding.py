"""A model that several processes hold in pieces while it is tuned (FSDP2, ``trainer.strategy: fsdp2``).

The unit that is gathered, used and put away again is a layer of the language model. The decoder runs a layer's halves
itself, so a layer gets a method ``within`` for that, which gathers its weights as ``forward`` would. All else (vision
tower, projector, embedding, head) is gathered for the whole of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
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


def gather(module: L.LightningModule) -> None:
    """Give the first process whole parameters in place of its pieces, on the CPU, for saving; a model that is not
    shared out stays as it is.

    All processes call it, once and when training is over: the pieces are gone then.
    """
    if not isinstance(module, FSDPModule):
        return
    whole = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    made: dict[int, nn.Parameter] = {}  # a parameter that stands in two places stays one
    for name, piece in list(module.named_parameters(remove_duplicate=False)) if whole else ():
        own = made.setdefault(id(piece), nn.Parameter(whole[name], requires_grad=piece.requires_grad))
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, own)

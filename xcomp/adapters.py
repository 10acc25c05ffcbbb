"""LoRA: low-rank adapters in the language model, through peft (``pip install xcomp[lora]``).

A run with ``tune.lora`` trains them in place of the language model's own weights. Its checkpoints and the model it
writes hold what was trained and nothing else: the adapters in peft's files, named as in the language model, other
parts in a file beside. Reading such a folder reads the checkpoint that it was tuned from and merges them into it.

Paper: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xcomp.backbone import Backbone
from xcomp.checkpoint import DTYPES, read_json, refuse_tensors
from xcomp.config import ConfigError, Lora
from xcomp.messages import nearest
from xcomp.recorded import RECORD

CONFIG, ADAPTERS, OTHERS = "adapter_config.json", "adapter_model.safetensors", "trained.safetensors"


def check_installed(what: str) -> None:
    """ConfigError that names ``what`` needs peft, where it is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(f"{what} needs the package peft: pip install xcomp[lora]")


def add_adapters(backbone: Backbone, lora: Lora, seed: int) -> None:
    """Put adapters, which change nothing yet, into a backbone's language model.

    Raises:
        ConfigError: if peft is not installed, a target does not exist, or there is no checkpoint to refer to.
    """
    check_installed("tune.lora")
    if not lora.merge and getattr(backbone.config, "checkpoint", None) is None:
        raise ConfigError("tune.lora writes adapters for the backbone's checkpoint, which is none; take merge: true")
    model = backbone.language_model
    linear = dict.fromkeys(n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear))
    for target in lora.targets:
        if target not in linear:
            known = ", ".join(linear)
            raise ConfigError(f"tune.lora.targets names '{target}';{nearest(target, linear)} the model has {known}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _inject(model, dict(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets))


def _inject(model: nn.Module, options: Mapping[str, Any]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(**options), model)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters in a module."""
    return [p for name, p in model.named_parameters() if ".lora_" in name]


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add adapters to the weights they adapt, and take them out."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())


def save_adapters(backbone: Backbone, folder: Path, dtype: str | None) -> None:
    """Write a backbone's adapters, and what else of it was trained, in ``dtype`` (default: as computed)."""
    from peft import get_peft_model_state_dict

    model = backbone.language_model
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_of(backbone)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    adapters = {id(p) for p in adapter_parameters(model)}
    others = {n: p for n, p in backbone.named_parameters() if p.requires_grad and id(p) not in adapters}
    for name, tensors in ((ADAPTERS, get_peft_model_state_dict(model, save_embedding_layers=False)), (OTHERS, others)):
        own = {
            key: t.detach().to("cpu", DTYPES[dtype] if dtype else t.dtype).contiguous() for key, t in tensors.items()
        }
        if own:
            save_file(own, folder / name, metadata={"format": "pt"})
            (folder / name).chmod(0o644)


def base_of(backbone: Backbone) -> str:
    """The checkpoint that a backbone was read from, wherever the run is started from."""
    checkpoint = backbone.config.checkpoint
    return os.path.abspath(checkpoint) if os.path.isdir(checkpoint) else checkpoint


def base_checkpoint(checkpoint: Any) -> str | None:
    """What a folder of adapters was tuned from; None for any other checkpoint."""
    if not isinstance(checkpoint, str) or not os.path.isfile(os.path.join(checkpoint, CONFIG)):
        return None
    path = Path(checkpoint) / RECORD
    base = read_json(path).get("base") if path.is_file() else None
    if not isinstance(base, str):
        raise ValueError(
            f"'{checkpoint}' holds adapters, but no {RECORD} that names the checkpoint they were tuned from"
        )
    return base


def load_adapters(backbone: Backbone, folder: Path) -> None:
    """Merge a folder's adapters and other trained parts into the backbone that they were tuned from.

    Raises:
        ValueError: if they do not fit it, or peft is not installed.
    """
    check_installed(f"'{folder}' holds adapters, and")
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    model = backbone.language_model
    settings = PeftConfig.from_pretrained(str(folder))
    wanted = ("r", "lora_alpha", "lora_dropout", "target_modules")
    _inject(model, {name: getattr(settings, name) for name in wanted})
    stored = {name: t.to(backbone.device) for name, t in load_file(folder / ADAPTERS).items()}
    _check(folder / ADAPTERS, stored, get_peft_model_state_dict(model, save_embedding_layers=False))
    set_peft_model_state_dict(model, stored)
    merge_adapters(model)
    if (folder / OTHERS).is_file():
        own, others = dict(backbone.named_parameters()), load_file(folder / OTHERS)
        _check(folder / OTHERS, others, {name: own[name] for name in others if name in own})
        with torch.no_grad():
            for name, tensor in others.items():
                own[name].copy_(tensor)


def _check(path: Path, stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """ValueError unless the tensors of a file are those of a model, in name and shape."""
    wrong = [f"missing {name}" for name in own if name not in stored]
    wrong += [f"unexpected {name}" for name in stored if name not in own]
    wrong += [f"{n} is {list(t.shape)}" for n, t in stored.items() if n in own and t.shape != own[n].shape]
    refuse_tensors(path, wrong)

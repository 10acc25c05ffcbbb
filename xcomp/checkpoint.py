"""What backbones that read checkpoints share: their options, folders and weight files, and the tokenizer.

Everything a user can get wrong is a one-line ``ValueError`` that names the file, what is wrong with it and the way out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer

from xcomp.backbone import check_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")
FROM_PICKLE = (
    'python -c "from torch import load; from safetensors.torch import save_file; '
    "w = load('pytorch_model.bin', weights_only=True); "
    "save_file({n: t.clone() for n, t in w.items()}, 'model.safetensors')\""
)


# --- options ----------------------------------------------------------------------------------------------------------


def check_options(config: Any, **counts: int | None) -> None:
    """ValueError unless a backbone's ``Config`` holds what can be: one source of weights, known names, a usable device.

    ``counts`` are options of its own that must be at least 1 or None.
    """
    if (config.checkpoint is None) == (config.architecture is None):
        raise ValueError("give exactly one of checkpoint (a folder or hub id) and architecture (a config.json)")
    for option, value, known in (
        ("dtype", config.dtype, DTYPES),
        ("attn_implementation", config.attn_implementation, ATTENTION),
    ):
        if value not in known:
            raise ValueError(f"{option} is '{value}'; it must be one of {', '.join(known)}")
    for option, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}; it must be at least 1")
    check_device(config.device)


def check_save_dtype(dtype: str | None) -> None:
    """ValueError unless weights can be saved in ``dtype`` (None: as they are)."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}")


def resolve_attention(name: str, device: str, dtype: torch.dtype) -> str:
    """The implementation to use; ``auto`` takes flash-attention where it can run."""
    able = {
        "a CUDA device": torch.device(device).type == "cuda",
        "dtype bfloat16 or float16": dtype != torch.float32,
        "the flash_attn package (pip install xcomp[flash])": importlib.util.find_spec("flash_attn") is not None,
    }
    lacking = [what for what, there in able.items() if not there]
    if name == "flash_attention_2" and lacking:
        raise ValueError(f"attn_implementation 'flash_attention_2' needs {', '.join(lacking)}; use 'auto' or 'sdpa'")
    if name == "auto":
        return "sdpa" if lacking else "flash_attention_2"
    return name


# --- folders ---------------------------------------------------------------------------------------------------------


def local_folder(option: str, place: str) -> Path:
    """The folder itself, or a hub id's downloaded copy; ``option`` is what the user called it."""
    if os.path.isdir(place):
        return Path(place)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(place)):
        raise ValueError(f"{option} '{place}' is neither a folder nor a hub id like 'owner/name'")
    try:
        return Path(snapshot_download(place, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py"]))
    except Exception as error:  # offline, unknown, gated: the client has many kinds of error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{option} '{place}' is no folder, nor could it be downloaded: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' must hold a JSON object, not a {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as a JSON file that people can read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into beside the target, put in its place when all is written. Files of other names stay."""
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"'{target}' is a file; name a folder to save into")
    mark = uuid.uuid4().hex[:8]
    fresh, old = target.with_name(f".{target.name}.{mark}.new"), target.with_name(f".{target.name}.{mark}.old")
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    if old.exists():
        for entry in old.iterdir():
            if not (target / entry.name).exists() and not re.fullmatch(r"model.*\.safetensors(\..*)?", entry.name):
                entry.rename(target / entry.name)
        shutil.rmtree(old)


# --- weight files -----------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors file or shards."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        shards = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        if absent := [shard.name for shard in shards if not shard.is_file()]:
            raise ValueError(f"'{index}' lists {len(shards)} shards, missing: {', '.join(absent)}; download them")
        return shards
    if pickles := sorted(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"'{pickles[0]}' is a pickle, which may run code and is not read; convert it, in that folder: {FROM_PICKLE}"
        )
    raise ValueError(f"'{folder}' holds no model.safetensors (nor model.safetensors.index.json with shards)")


def stored_tensors(files: list[Path]) -> dict[str, tuple[Path, list[int], str]]:
    """Tensor name → (file, shape, type), from the files' headers alone."""
    stored = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    stored[name] = (path, list(tensor.get_shape()), tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"'{path}' is cut off or no safetensors file ({error}); download it again") from error
    return stored


def refuse_tensors(folder: Path, wrong: list[str]) -> None:
    """ValueError that lists up to 20 of the tensors that do not fit a checkpoint's config.json; none: nothing."""
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"'{folder}': {len(wrong)} tensors do not fit its config.json: {'; '.join(wrong[:20])}{more}")


@contextmanager
def exact_buffers(module: nn.Module) -> Iterator[None]:
    """Moves inside reach the module's buffers, casts do not: rotary frequencies are wrong in half precision."""
    exact = dict(module.named_buffers())
    yield
    for name, buffer in exact.items():
        setattr(module, name, buffer.to(getattr(module, name).device))


# --- tokenizers -------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path | None, given: str | None, text_config: Any) -> Any:
    """The tokenizer of a checkpoint folder, or of the folder ``given`` as an option; None where there is none.

    Only a folder that was asked for and holds no tokenizer is an error.
    """
    place = folder if given is None else local_folder("tokenizer", given)
    if place is not None and any((place / name).is_file() for name in TOKENIZER_FILES):
        # Given a config, it does not read config.json, whose model type transformers would warn of.
        return AutoTokenizer.from_pretrained(place, config=text_config, trust_remote_code=False)
    if given is not None:
        raise ValueError(f"tokenizer '{place}' holds none of {', '.join(TOKENIZER_FILES)}")
    return None


def require_tokenizer(tokenizer: Any) -> None:
    """ValueError where prompts are built without a tokenizer."""
    if tokenizer is None:
        raise ValueError("no tokenizer files in the checkpoint folder; give tokenizer=<folder> to build prompts")

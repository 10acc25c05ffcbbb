"""What backbones that read checkpoints share: options, folders, weight files, models of transformers, tokenizers.

Everything a user can get wrong is a one-line ``ValueError`` that names the file, what is wrong with it and the way out.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

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
        _take_over(old, target)


def _take_over(old: Path, target: Path) -> None:
    """Move what a replaced folder held beside its weights into the new one, and delete the rest."""
    for entry in old.iterdir():
        if not (target / entry.name).exists() and not re.fullmatch(r"model.*\.safetensors(\..*)?", entry.name):
            entry.rename(target / entry.name)
    shutil.rmtree(old)


def mend_folder(folder: str | Path) -> None:
    """Finish or take back what ``whole_folder`` was doing when its process was killed. Nobody else may write there."""
    target = Path(folder).resolve()
    for fresh in target.parent.glob(f".{glob.escape(target.name)}.*.new"):
        shutil.rmtree(fresh)
    for old in target.parent.glob(f".{glob.escape(target.name)}.*.old"):
        if target.exists():
            _take_over(old, target)
        else:
            old.rename(target)


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


# --- models of transformers -------------------------------------------------------------------------------------------


def read_config(folder: Path, needed: str) -> dict[str, Any]:
    """config.json of a checkpoint folder; ``needed`` says in words of what model it should be."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"'{folder}' holds no config.json; a checkpoint of {needed} is needed")
    return read_json(path)


def transformers_config(content: dict[str, Any], where: str, kinds: Iterable[str], example: str) -> PreTrainedConfig:
    """config.json's content as ``transformers`` has it, of one of the model types ``kinds``."""
    kind = content.get("model_type")
    if kind not in kinds:
        raise ValueError(
            f"{where} describes model_type '{kind}'; needed: {' or '.join(map(repr, kinds))} "
            f"(folders in transformers' format, like {example})"
        )
    try:
        config = AutoConfig.for_model(**content)
    except Exception as error:  # transformers raises what its many checks raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where} is no configuration of '{kind}': {reason}") from error
    text = config.text_config
    window = getattr(text, "sliding_window", None)
    if window is not None and window < text.max_position_embeddings:
        raise ValueError(
            f"{where}: the language model looks back {window} tokens only (sliding_window), and tokens that are "
            "dropped between layers need full attention; set text_config.sliding_window to null"
        )
    return config


def build_model(model_class: Any, folder: Path | None, found: PreTrainedConfig, options: Any) -> nn.Module:
    """A model of ``transformers`` on its device, from a folder or (None) with random weights.

    ``options`` is the backbone's ``Config`` (dtype, device, attn_implementation). ValueError unless every tensor of the
    folder has its place in the model and every place its tensor.
    """
    dtype = DTYPES[options.dtype]
    attention = resolve_attention(options.attn_implementation, options.device, dtype)
    settings = {"dtype": dtype, "attn_implementation": attention}
    if folder is None:
        return AutoModelForImageTextToText.from_config(found, **settings).to(options.device)
    stored = stored_tensors(weight_files(folder))
    refuse_tensors(folder, [f"{name} is {dtype}, should be floating-point" for name, (_, _, dtype) in stored.items()
                            if dtype not in FLOATS])  # fmt: skip
    with _quiet():
        model, info = model_class.from_pretrained(
            folder,
            config=found,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are reported below, all at once
            output_loading_info=True,
            **settings,
        )
    wrong = [f"missing {name}" for name in sorted(info["missing_keys"])]
    wrong += [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
    for name, have, want in sorted(info["mismatched_keys"]):
        wrong.append(f"{name} is {list(have)}, should be {list(want)}")
    refuse_tensors(folder, wrong)
    return model.to(options.device)


def save_model(
    model: nn.Module,
    folder: str | Path,
    dtype: str | None,
    *,
    numbers: dict[str, Any],
    tokenizer: Any,
    source: Path | None,
    more: dict[str, Any] | None = None,
) -> None:
    """Write a model of ``transformers`` in its own format, in ``dtype`` (default: the model's own).

    Beside it go the processor's ``numbers``, the tokenizer, and from the folder ``source`` what it was read from; what
    ``more`` holds is added to config.json. An existing folder is replaced only once everything is written.
    """
    check_save_dtype(dtype)
    wanted = DTYPES[dtype] if dtype else model.dtype
    with whole_folder(folder) as fresh:
        weights = {name: tensor.detach().to("cpu", wanted) for name, tensor in model.state_dict().items()}
        model.save_pretrained(fresh, state_dict=weights, max_shard_size="5GB")
        for path in fresh.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors leaves it to the owner alone
        _finish_config(fresh / "config.json", str(wanted).removeprefix("torch."), more or {})
        write_json(fresh / "video_preprocessor_config.json", numbers)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        for name in ("preprocessor_config.json", "processor_config.json"):  # for transformers' own processor
            if source is not None and (source / name).is_file():
                shutil.copyfile(source / name, fresh / name)


def _finish_config(path: Path, dtype: str, more: dict[str, Any]) -> None:
    content = read_json(path) | more
    for part in (content, content["text_config"], content["vision_config"]):
        part["dtype"] = dtype
    write_json(path, content)


def end_ids(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's end token, then what the generation configuration adds."""
    more = model.generation_config.eos_token_id
    more = [] if more is None else more if isinstance(more, list) else [more]
    own = [] if tokenizer is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys(i for i in [*own, *more] if i is not None))


@contextmanager
def _quiet() -> Iterator[None]:
    """No table of tensors in the log: those that do not fit are an error."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# --- the numbers of a processor ---------------------------------------------------------------------------------------


def processor_numbers(folder: Path | None, default: dict[str, Any]) -> dict[str, Any]:
    """A processor's file of a checkpoint folder, looked for as ``transformers`` does, else ``default``."""
    for name in ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"):
        if folder is not None and (folder / name).is_file():
            numbers = read_json(folder / name)
            numbers = numbers.get("video_processor") if name == "processor_config.json" else numbers
            if numbers is not None:
                return numbers
    return default


def pixel_numbers(numbers: dict[str, Any]) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    """(resample, mean, std) for :class:`xcomp.pixels.PixelFormat`; CLIP's where the processor names none."""
    numbers = {name: value for name, value in numbers.items() if value is not None}
    resample = {2: "bilinear", 3: "bicubic"}.get(numbers.get("resample", 3))
    if resample is None:
        raise ValueError(f"the processor's resample is {numbers['resample']}; it must be 2 (bilinear) or 3 (bicubic)")
    mean = numbers.get("image_mean", (0.48145466, 0.4578275, 0.40821073))
    std = numbers.get("image_std", (0.26862954, 0.26130258, 0.27577711))
    if not numbers.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = numbers.get("rescale_factor", 1 / 255) if numbers.get("do_rescale", True) else 1.0
    mean, std = (tuple(value / (255 * factor) for value in values) for values in (mean, std))
    return resample, mean, std


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

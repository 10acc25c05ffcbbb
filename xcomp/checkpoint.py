"""What backbones that read checkpoints share: options, folders, weight files, models of transformers, tokenizers.

Everything a user can get wrong is a one-line ``ValueError`` that names the file, what is wrong with it and the way out.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import math
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from xcomp.backbone import Prompt, check_device
from xcomp.shipped import built_in

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
# What a config.json may say, wherever in it: the largest count or size that is believed. A model beyond them does not
# exist, and building one would take all memory before its tensors could be compared.
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "depth", "num_attention_heads", "num_key_value_heads", "num_heads"), 1_000),
    **dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size", "mm_hidden_size", "projection_dim",
                     "head_dim", "image_size", "patch_size", "spatial_merge_size", "temporal_patch_size",
                     "spatial_pool_stride", "window_size", "num_channels", "in_channels", "in_chans",
                     "tokens_per_second", "scale_factor", "mm_local_num_frames"), 1_000_000),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 100_000_000),
}  # fmt: skip
MAX_DEPTH = 32  # of a JSON file
SMALL = ("rms_norm_eps", "layer_norm_eps")  # added to what a root is taken of
WEIGHTS = r"(model.*|adapter_model|trained)\.safetensors(\..*)?|adapter_config\.json"  # names of what a save replaces
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


def find_folder(checkpoint: str | None, *, weights: bool = True) -> Path | None:
    """The folder of a ``checkpoint`` option: one by its path, a shipped one by name (``tiny``), a hub id's copy; None
    for none. Without ``weights`` only what describes the model is downloaded."""
    if checkpoint is None:
        return None
    shipped = built_in("checkpoints", "*")
    if not os.path.exists(checkpoint) and checkpoint in shipped:
        return shipped[checkpoint]
    return local_folder("checkpoint", checkpoint, weights=weights)


def local_folder(option: str, place: str, *, weights: bool = True) -> Path:
    """The folder itself, or a hub id's downloaded copy; ``option`` is what the user called it."""
    if os.path.isdir(place):
        return Path(place)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(place)):
        raise ValueError(f"{option} '{place}' is neither a folder nor a hub id like 'owner/name'")
    try:
        patterns = ["*.json", "*.txt", "*.jinja", "*.py"] + (["*.safetensors"] if weights else [])
        return Path(snapshot_download(place, allow_patterns=patterns))
    except Exception as error:  # offline, unknown, gated: the client has many kinds of error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{option} '{place}' is no folder, nor could it be downloaded: {reason}") from error


@contextmanager
def within(place: Any) -> Iterator[None]:
    """Whatever goes wrong inside is a ValueError of one line that names the place.

    For calls of ``transformers`` and ``tokenizers``, which raise what their many parts raise.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # tokenizers', from Rust
            raise
        text = one_line(error)
        raise ValueError(text if str(place) in text else f"{place}: {text}") from error


def one_line(error: BaseException) -> str:
    """What an error says, in one line; with its type where it says a word or two."""
    text = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
    text = text if len(text) <= 400 else f"{text[:400]} …"
    if isinstance(error, KeyError):
        return f"{text} is missing or not known"
    return text if text.count(" ") > 1 else f"{type(error).__name__} {text}".strip()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
        depth = _depth(value)
    except RecursionError:
        depth = math.inf
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}); copy or download it again") from error
    if depth > MAX_DEPTH:
        raise ValueError(f"'{path}' nests deeper than {MAX_DEPTH} levels; copy or download it again")
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' must hold a JSON object, not a {type(value).__name__}")
    return value


def _depth(value: Any) -> int:
    """How deep objects and lists lie in one another."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, (dict, list))]:
        level = [item for v in level for item in (v.values() if isinstance(v, dict) else v)]
        depth += 1
    return depth


def _finite(text: str) -> float:
    """A number of a JSON file; JSON itself knows neither NaN nor infinity."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
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
        if not (target / entry.name).exists() and not re.fullmatch(WEIGHTS, entry.name):
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
        shards = [folder / name for name in _shard_names(index)]
        if absent := [shard.name for shard in shards if not shard.is_file()]:
            raise ValueError(f"'{index}' lists {len(shards)} shards, missing: {', '.join(absent)}; download them")
        return shards
    if pickles := sorted(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"'{pickles[0]}' is a pickle, which may run code and is not read; convert it, in that folder: {FROM_PICKLE}"
        )
    raise ValueError(f"'{folder}' holds no model.safetensors (nor model.safetensors.index.json with shards)")


def _shard_names(index: Path) -> list[str]:
    """The files that an index lists, which must lie in its own folder."""
    places = read_json(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"'{index}' must hold a weight_map from tensors to files; download it again")
    if outside := next((name for name in names if re.search(r"[/\\\0]", name) or name in (".", "..")), None):
        raise ValueError(f"'{index}' lists {ascii(outside)}; shards must be plain names of files in its own folder")
    return sorted(set(names))


def stored_tensors(files: list[Path]) -> dict[str, tuple[Path, list[int], str]]:
    """Tensor name → (file, shape, type), from the files' headers alone."""
    stored = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    if name in stored:
                        raise ValueError(f"'{stored[name][0]}' and '{path}' both hold {name}; download them again")
                    stored[name] = (path, list(tensor.get_shape()), tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"'{path}' is cut off or no safetensors file ({error}); download it again") from error
    return stored


def refuse_tensors(folder: Path, wrong: list[str]) -> None:
    """ValueError that lists up to 20 of the tensors that do not fit a checkpoint's config.json; none: nothing."""
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"'{folder}': {len(wrong)} tensors do not fit its config.json: {'; '.join(wrong[:20])}{more}")


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite. In one pass, and unlike ``isfinite`` without a copy."""
    return tensor.numel() == 0 or all(bool(bound.isfinite()) for bound in tensor.detach().aminmax())


def refuse_values(folder: Path, names: list[str], dtype: torch.dtype) -> None:
    """ValueError that lists up to 20 of the tensors that hold NaN or infinity once read in ``dtype``; none: nothing."""
    if names:
        more = f", and {len(names) - 20} more" if len(names) > 20 else ""
        raise ValueError(
            f"'{folder}': {len(names)} tensors hold NaN or infinite numbers in {str(dtype).removeprefix('torch.')}: "
            f"{', '.join(names[:20])}{more}; copy the weights again, go back to an earlier checkpoint, or give a dtype "
            "of wider range"
        )


# --- models of transformers -------------------------------------------------------------------------------------------


def read_config(folder: Path, needed: str) -> dict[str, Any]:
    """config.json of a checkpoint folder; ``needed`` says in words of what model it should be."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"'{folder}' holds no config.json; a checkpoint of {needed} is needed")
    return read_json(path)


class Described(NamedTuple):
    """The model that a backbone's options name: its checkpoint's folder (None: random weights), config.json's
    ``content`` and, for errors, ``where`` that stands, and what the backbone's own reader makes of it."""

    folder: Path | None
    content: dict[str, Any]
    where: str
    config: PreTrainedConfig


def describe_model(options: Any, needed: str, read: Callable[[dict[str, Any], str], PreTrainedConfig]) -> Described:
    """What a backbone's ``Config`` says in ``checkpoint`` or ``architecture``, read by ``read(content, where)``.

    ``needed`` says in words of what model a checkpoint should be. Any error is a ValueError that names the place.
    """
    folder = find_folder(options.checkpoint, weights=options.device != "meta")
    content = options.architecture if folder is None else read_config(folder, needed)
    where = "architecture" if folder is None else f"'{folder / 'config.json'}'"
    with within(where):
        return Described(folder, content, where, read(dict(content), where))


def check_sizes(content: Any, where: str) -> None:
    """ValueError unless counts, sizes, small numbers and activations in a config.json are such; a size may be null."""
    for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if key in SIZES and value is not None and not (whole and 1 <= value <= SIZES[key]):
            raise ValueError(f"{where}: {key} is {_shortened(value)}; it must be a whole number, 1 to {SIZES[key]:,}")
        number = whole or isinstance(value, float)
        if key in SMALL and not (number and 0 < value < 1):
            raise ValueError(f"{where}: {key} is {_shortened(value)}; it must be a number above 0 and below 1")
        if key in ("hidden_act", "projector_hidden_act") and not (isinstance(value, str) and value in ACT2FN):
            raise ValueError(f"{where}: {key} is {_shortened(value)}; known: {', '.join(ACT2FN)}")
        if key == "rope_theta" and not (number and value > 0):
            raise ValueError(f"{where}: {key} is {_shortened(value)}; it must be a number above 0")
        if isinstance(value, (dict, list)):
            check_sizes(value, where)


def _shortened(value: Any) -> str:
    return text if len(text := ascii(value)) <= 40 else f"{text[:40]} …"


def transformers_config(content: dict[str, Any], where: str, kinds: Iterable[str], example: str) -> PreTrainedConfig:
    """config.json's content as ``transformers`` has it, of one of the model types ``kinds``."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"{where} describes model_type '{kind}'; needed: {' or '.join(map(repr, kinds))} "
            f"(folders in transformers' format, like {example})"
        )
    check_sizes(content, where)
    with within(f"{where} is no configuration of '{kind}'"):
        config = AutoConfig.for_model(**content)
        check_text_config(config.text_config)
    return config


def check_text_config(text: PreTrainedConfig) -> None:
    """ValueError unless a language model's heads fit its width and it looks back without a limit."""
    heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if getattr(text, "head_dim", None) is None and text.hidden_size % heads:
        raise ValueError(f"hidden_size {text.hidden_size} is no multiple of num_attention_heads {heads}")
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    window = getattr(text, "sliding_window", None)
    if window is not None and window < text.max_position_embeddings:
        raise ValueError(
            f"the language model looks back {window} tokens only (sliding_window), and tokens that are dropped between "
            "layers need full attention; set its sliding_window to null"
        )


def build_model(model_class: Any, folder: Path | None, found: PreTrainedConfig, options: Any) -> nn.Module:
    """A model of ``transformers`` on its device, from a folder or (None) with random weights.

    ``options`` is the backbone's ``Config`` (dtype, device, attn_implementation). ValueError unless every tensor of the
    folder has its place in the model and every place its tensor.
    """
    dtype = DTYPES[options.dtype]
    attention = resolve_attention(options.attn_implementation, options.device, dtype)
    settings = {"dtype": dtype, "attn_implementation": attention}
    if folder is None or options.device == "meta":
        with within("architecture" if folder is None else f"'{folder / 'config.json'}'"):
            with torch.device("meta" if options.device == "meta" else "cpu"):
                model = AutoModelForImageTextToText.from_config(found, **settings).to(options.device)
            check_rotary(model)
            return model
    model = read_model(model_class, folder, found, **settings).to(options.device)
    with within(f"'{folder / 'config.json'}'"):
        check_rotary(model)
    with within(f"'{folder}'"):
        _ends(model)
    return model


def check_rotary(model: nn.Module) -> None:
    """ValueError unless a model's rotary frequencies, which follow from its configuration alone, are finite."""
    for name, frequencies in model.named_buffers():
        if name.endswith("inv_freq") and not frequencies.is_meta and not is_finite(frequencies):
            raise ValueError(f"rope_theta and the other rope_parameters give frequencies ({name}) that are not finite")


def read_model(model_class: Any, folder: Path, found: PreTrainedConfig, **settings: Any) -> nn.Module:
    """A model of ``transformers`` with a folder's weights, on the CPU. ``settings`` go to ``from_pretrained``.

    ValueError unless every tensor of the folder has its place in the model, every place its tensor, and all are finite.
    """
    stored = stored_tensors(weight_files(folder))
    # Older checkpoints store the positions' numbers, which are computed since.
    integers = {name: dtype for name, (_, _, dtype) in stored.items()
                if dtype not in FLOATS and not name.endswith("position_ids")}  # fmt: skip
    refuse_tensors(folder, [f"{name} is {dtype}, should be floating-point" for name, dtype in integers.items()])
    _check_extent(model_class, folder, found, stored)
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    with _quiet(), within(f"'{folder}'"):
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
    refuse_values(folder, [n for n, t in model.state_dict().items() if not is_finite(t)], model.dtype)
    return model


def _check_extent(model_class: Any, folder: Path, found: PreTrainedConfig, stored: Mapping[str, Any]) -> None:
    """ValueError where config.json describes much more than the weights hold: what lacks would be made up in memory."""
    with _quiet(), torch.device("meta"), within(f"'{folder / 'config.json'}'"):
        described = sum(parameter.numel() for parameter in model_class(found).parameters())
    held = sum(math.prod(shape) for _, shape, _ in stored.values())
    if described > 2 * held + 1_000_000:  # twice: a tied head may be described as one of its own
        raise ValueError(
            f"'{folder / 'config.json'}' describes {described:,} weights, but its folder holds {held:,}; "
            "config.json or the weights are another model's, or shards are missing"
        )


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
    more = _ends(model)
    own = [] if tokenizer is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys(i for i in [*own, *more] if i is not None))


def _ends(model: nn.Module) -> list[int]:
    """The ids that end an answer by a model's generation configuration, which says one, several or none."""
    found = model.generation_config.eos_token_id
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"generation_config.json: eos_token_id is {_shortened(found)}; it must be one id or several")
    return ids


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither a table of tensors nor a bar on stderr: tensors that do not fit are an error, which is one line."""
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


# --- the numbers of a processor ---------------------------------------------------------------------------------------


def processor_numbers(folder: Path | None, default: dict[str, Any]) -> dict[str, Any]:
    """A processor's file of a checkpoint folder, looked for as ``transformers`` does, else ``default``."""
    for name in ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"):
        if folder is not None and (folder / name).is_file():
            numbers = read_json(folder / name)
            numbers = numbers.get("video_processor") if name == "processor_config.json" else numbers
            if numbers is not None and not isinstance(numbers, dict):
                raise ValueError(f"'{folder / name}': video_processor must be an object, not {_shortened(numbers)}")
            if numbers is not None:
                with within(f"'{folder / name}'"):
                    pixel_numbers(numbers)
                return numbers
    return default


def pixel_numbers(numbers: dict[str, Any]) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    """(resample, mean, std) for :class:`xcomp.pixels.PixelFormat`; CLIP's where the processor names none."""
    numbers = {name: value for name, value in numbers.items() if value is not None}
    given = numbers.get("resample", 3)
    filters = (1, "lanczos"), (2, "bilinear"), (3, "bicubic")
    resample = next((name for number, name in filters if given == number), None)
    if resample is None:
        raise ValueError(f"the processor's resample is {given}; it must be 1 (lanczos), 2 (bilinear) or 3 (bicubic)")
    mean = numbers.get("image_mean", (0.48145466, 0.4578275, 0.40821073))
    std = numbers.get("image_std", (0.26862954, 0.26130258, 0.27577711))
    _check_colours("image_mean", mean, 3, lowest=-1e6)
    _check_colours("image_std", std, 3, lowest=1e-6)  # it divides, as does the next
    _check_colours("rescale_factor", [numbers.get("rescale_factor", 1 / 255)], 1, lowest=1e-6)
    if not numbers.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = numbers.get("rescale_factor", 1 / 255) if numbers.get("do_rescale", True) else 1.0
    mean, std = (tuple(value / (255 * factor) for value in values) for values in (mean, std))
    return resample, mean, std


def _check_colours(name: str, values: Any, count: int, *, lowest: float) -> None:
    """ValueError unless a processor's numbers for red, green and blue, or the one for all, are usable."""
    listed = isinstance(values, (list, tuple)) and len(values) == count
    numbers = listed and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if not numbers or not all(lowest <= v <= 1e6 for v in values):
        what = "a number" if count == 1 else f"{count} numbers"
        shown = _shortened(values[0] if count == 1 else values)
        raise ValueError(f"the processor's {name} is {shown}; it must be {what} of {lowest:g} to 1e+06")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path | None, given: str | None, config: PreTrainedConfig) -> Any:
    """The tokenizer of a checkpoint folder, or of the folder ``given`` as an option; None where there is none.

    Only a folder that was asked for and holds no tokenizer is an error.
    """
    place = folder if given is None else local_folder("tokenizer", given)
    if place is not None and any((place / name).is_file() for name in TOKENIZER_FILES):
        if (place / "tokenizer_config.json").is_file():
            read_json(place / "tokenizer_config.json")  # which says better what is wrong with it
        with within(f"tokenizer '{place}' cannot be read"):
            # Given a config, it does not read config.json, whose model type transformers would warn of.
            tokenizer = AutoTokenizer.from_pretrained(place, config=config, trust_remote_code=False)
            tokenizer.decode(tokenizer("What is it?").input_ids)
            # Not those added on top: a padding token need have no embedding, and what prompts hold is checked of them.
            ids = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
        if not ids:  # transformers makes an empty one where tokenizer.json lacks
            raise ValueError(f"tokenizer '{place}' holds no vocabulary; copy its tokenizer.json there too")
        check_ids(ids, config.get_text_config().vocab_size, place)
        return tokenizer
    if given is not None:
        raise ValueError(f"tokenizer '{place}' holds none of {', '.join(TOKENIZER_FILES)}")
    return None


def check_ids(ids: Iterable[int], vocab_size: int, place: Any) -> None:
    """ValueError unless a language model of ``vocab_size`` tokens knows the ids of the tokenizer in ``place``."""
    if (last := max(ids, default=0)) >= vocab_size:
        raise ValueError(
            f"tokenizer '{place}' uses the id {last}, but the language model knows {vocab_size} tokens; "
            "give the tokenizer of this checkpoint"
        )


def check_prompt_ids(prompt: Prompt, vocab_size: int, place: Any) -> None:
    """:func:`check_ids` of all ids of a prompt: what a chat format, not the question, is made of."""
    check_ids([*chain(*prompt.before_question), *prompt.suffix_ids.tolist()], vocab_size, place)


def require_tokenizer(tokenizer: Any) -> None:
    """ValueError where prompts are built without a tokenizer."""
    if tokenizer is None:
        raise ValueError("no tokenizer files in the checkpoint folder; give tokenizer=<folder> to build prompts")


# --- a compressor's own parameters ------------------------------------------------------------------------------------

COMPRESSOR_FILE = "model.compressor.safetensors"


def save_compressor(compressor: nn.Module, folder: str | Path) -> None:
    """Write a compressor's parameters, if it has any, beside the model that it was tuned with."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in compressor.state_dict().items()}
    if own:
        name = getattr(compressor, "plugin_name", type(compressor).__name__)
        save_file(own, Path(folder) / COMPRESSOR_FILE, metadata={"format": "pt", "compressor": name})
        (Path(folder) / COMPRESSOR_FILE).chmod(0o644)


def load_compressor(compressor: nn.Module, backbone: nn.Module) -> None:
    """Fill a compressor's parameters with those that were tuned with the backbone's checkpoint, if it has any.

    Raises:
        ValueError: if the checkpoint holds another compressor's, or tensors that do not fit.
    """
    own = compressor.state_dict()
    checkpoint = getattr(getattr(backbone, "config", None), "checkpoint", None)
    if not own or checkpoint is None:
        return
    name = getattr(compressor, "plugin_name", type(compressor).__name__)
    if not (path := find_folder(checkpoint) / COMPRESSOR_FILE).is_file():
        warnings.warn(
            f"compressor '{name}' begins with random parameters, as '{checkpoint}' holds no {COMPRESSOR_FILE}; tune it "
            "with `train: [compressor]`",
            stacklevel=2,
        )
        return
    try:
        with safe_open(path, framework="pt") as file:
            whose = (file.metadata() or {}).get("compressor")
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"'{path}' cannot be read: {one_line(error)}") from error
    if whose != name:
        raise ValueError(f"'{path}' holds parameters of compressor '{whose}', not of '{name}'; tune one of its own")
    wrong = [f"missing {key} {list(own[key].shape)}" for key in own if key not in stored]
    wrong += [f"unexpected {key} {list(stored[key].shape)}" for key in stored if key not in own]
    wrong += [
        f"{key} is {list(stored[key].shape)}, should be {list(own[key].shape)}"
        for key in own
        if key in stored and stored[key].shape != own[key].shape
    ]
    refuse_tensors(path, wrong)
    if broken := [key for key, tensor in stored.items() if tensor.is_floating_point() and not is_finite(tensor)]:
        refuse_values(path, broken, next(iter(own.values())).dtype)
    compressor.load_state_dict(stored)

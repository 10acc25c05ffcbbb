"""LLaVA-NeXT-Video and LLaVA-OneVision: every frame on its own through an image tower, as ``transformers`` builds them.

Sources: "LLaVA-NeXT: A Strong Zero-shot Video Understanding Model" (blog, April 2024; CLIP-L of 336 pixels, 24×24
patches pooled to 12×12, 144 tokens a frame) and "LLaVA-OneVision" (arXiv 2408.03326; SigLIP of 384 pixels, 27×27
patches pooled to 14×14, 196 tokens a frame); ``LlavaNextVideoForConditionalGeneration`` and
``LlavaOnevisionForConditionalGeneration`` of ``transformers``, whose modules compute everything but the language
model's pass. Any language model of the Llama family may stand inside: Llama (Vicuna, Yi), Mistral, Qwen2, Qwen3.

Checkpoints in ``transformers``' format load: ``llava-hf/LLaVA-NeXT-Video-{7B,7B-DPO,7B-32K,34B,34B-DPO}-hf`` and
``llava-hf/llava-onevision-qwen2-{0.5b,7b,72b}-ov-hf`` with their kin. None of them could be run here; what is tested
are random models of their form. Not loaded: the original repository's format (``lmms-lab/…``), and LLaVA-Video
(``lmms-lab/LLaVA-Video-7B-Qwen2``): it puts a newline token after every row of a frame, which no class of
``transformers`` does.

LLaVA-OneVision ends the whole video with one newline token, a vector of its own. It belongs to no frame, so it opens
the question: the placeholder's id, which has no other use, embeds as that vector. Compressors therefore never drop it,
and selectors that skip the question's first tokens should count it.

Deviations: pixels are resized by :mod:`xcomp.pixels`; pictures beside the video are left out; the newline vector is not
trained.

Shape letters: T frames · N tokens a frame · D language-model width.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.utils import logging

from xcomp.backbone import Backbone, Prompt, ShownVideo
from xcomp.checkpoint import (
    DTYPES,
    FLOATS,
    check_options,
    check_save_dtype,
    exact_buffers,
    load_tokenizer,
    local_folder,
    read_json,
    refuse_tensors,
    require_tokenizer,
    resolve_attention,
    stored_tensors,
    weight_files,
    whole_folder,
    write_json,
)
from xcomp.config import find_checkpoint
from xcomp.pixels import preprocess_frames

MODELS = {
    "llava_next_video": LlavaNextVideoForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")
# Towers with a class token must lose it before pooling, those without must not lose a patch.
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
VIDEO = "<video>"


# --- around the video: the text of a prompt ---------------------------------------------------------------------------


class Format(NamedTuple):
    """Text ``before`` the video, ``between`` it and the question, ``after`` the question, and ``again``: what stands
    between an answer's stop token and a further question."""

    before: str
    between: str
    after: str
    again: str


CHATML = Format(
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "\n<|im_start|>user\n",
)
# What each language model was tuned with, for checkpoints that hold no chat template.
FORMATS = {
    "llama": Format(  # Vicuna
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: ",
        "\n",
        " ASSISTANT:",
        "USER: ",
    ),
    "mistral": Format("[INST] ", "\n", " [/INST]", "[INST] "),
    "qwen2": CHATML,
    "qwen3": CHATML,
}


def read_format(tokenizer: Any) -> Format:
    """The text that a tokenizer's chat template puts around a video and its questions.

    A template may take a message as typed parts, with or without videos, or as one string: the first form that it
    renders with the video's placeholder in it is used.
    """
    first, answer, second = "(first-question)", "(its-answer)", "(second-question)"

    def parts(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text}]

    forms = (
        ([{"type": "video"}, *parts(first)], parts(answer), parts(second), ".*?"),
        (parts(f"{VIDEO}\n{first}"), parts(answer), parts(second), "\n"),
        (f"{VIDEO}\n{first}", answer, second, "\n"),
    )
    for *contents, between in forms:
        turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), contents)]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError):  # not the form that this template takes
            continue
        literal = [re.escape(part) for part in (VIDEO, first, answer, second)]
        pattern = "(.*?){}({between}){}.*?{}(.*?){}(.*)".format(*literal, between=between)
        if text.count(VIDEO) == 1 and (found := re.fullmatch(pattern, text, re.DOTALL)):
            before, between, again, after = found.groups()
            return Format(before, between, after, again.removeprefix(tokenizer.eos_token or ""))
    raise ValueError(
        f"the tokenizer's chat template renders no question with one {VIDEO} before it; put one that does into its "
        "chat_template.jinja, or remove the template for the language model's usual format"
    )


def read_chat_template(folder: Path, tokenizer: Any) -> None:
    """Give the tokenizer the processor's template, which older folders keep in a file of its own."""
    path = folder / "chat_template.json"
    if path.is_file() and not (folder / "chat_template.jinja").is_file():
        tokenizer.chat_template = read_json(path).get("chat_template") or tokenizer.chat_template


# --- pixels: the numbers of a processor -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelRules:
    """What :func:`xcomp.pixels.preprocess_frames` is told; ``mean`` and ``std`` are for values in 0..1."""

    size: int | tuple[int, int]
    shortest_edge: bool
    crop: tuple[int, int] | None
    resample: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def processor_numbers(folder: Path | None, image_size: int) -> dict[str, Any]:
    """A processor's file of a checkpoint folder, looked for as ``transformers`` does; without one, CLIP's numbers."""
    for name in ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"):
        if folder is not None and (folder / name).is_file():
            numbers = read_json(folder / name)
            numbers = numbers.get("video_processor") if name == "processor_config.json" else numbers
            if numbers is not None:
                return numbers
    return {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}


def pixel_rules(numbers: dict[str, Any], image_size: int) -> PixelRules:
    """A processor's numbers checked: they must give pictures of the tower's ``image_size``."""
    numbers = {name: value for name, value in numbers.items() if value is not None}
    size, shortest_edge = numbers.get("size"), False
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        size, shortest_edge = size["shortest_edge"], True
    elif isinstance(size, int):
        shortest_edge = not numbers.get("default_to_square", False)
    else:
        size = _height_width("size", size)
    crop = numbers.get("crop_size") if numbers.get("do_center_crop", shortest_edge) else None
    crop = None if crop is None else _height_width("crop_size", crop)
    if not numbers.get("do_resize", True) or (crop is None and shortest_edge):
        raise ValueError("the processor's numbers keep a picture's own shape; they must resize or crop to one size")
    given = crop or (size if isinstance(size, tuple) else (size, size))
    if given != (image_size, image_size):
        raise ValueError(f"the processor makes pictures of {given}, but the vision tower takes {image_size} squared")
    resample = {2: "bilinear", 3: "bicubic"}.get(numbers.get("resample", 3))
    if resample is None:
        raise ValueError(f"the processor's resample is {numbers['resample']}; it must be 2 (bilinear) or 3 (bicubic)")
    mean = numbers.get("image_mean", (0.48145466, 0.4578275, 0.40821073))
    std = numbers.get("image_std", (0.26862954, 0.26130258, 0.27577711))
    if not numbers.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = numbers.get("rescale_factor", 1 / 255) if numbers.get("do_rescale", True) else 1.0
    mean, std = (tuple(value / (255 * factor) for value in values) for values in (mean, std))
    return PixelRules(size, shortest_edge, crop, resample, mean, std)


def _height_width(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        return value["height"], value["width"]
    raise ValueError(f"the processor's {name} is {value}; it must be a number or hold height and width")


# --- config.json ------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, checked to be of one of these models."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"'{folder}' holds no config.json; a checkpoint of {' or '.join(MODELS)} is needed")
    return read_json(path)


def model_config(content: dict[str, Any], where: str) -> PreTrainedConfig:
    """config.json's content as ``transformers`` has it; what this backbone cannot run is a ValueError."""
    kind = content.get("model_type")
    if kind not in MODELS:
        raise ValueError(
            f"{where} describes model_type '{kind}'; needed: {' or '.join(map(repr, MODELS))} "
            "(folders in transformers' format, like llava-hf/LLaVA-NeXT-Video-7B-hf)"
        )
    try:
        config = AutoConfig.for_model(**content)
    except Exception as error:  # transformers raises what its many checks raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where} is no configuration of '{kind}': {reason}") from error
    text, vision = config.text_config, config.vision_config
    if text.model_type not in TEXT_MODELS:
        raise ValueError(f"{where}: the language model is '{text.model_type}'; known: {', '.join(TEXT_MODELS)}")
    window = getattr(text, "sliding_window", None)
    if window is not None and window < text.max_position_embeddings:
        raise ValueError(
            f"{where}: the language model looks back {window} tokens only (sliding_window), and tokens that are "
            "dropped between layers need full attention; set text_config.sliding_window to null"
        )
    if TOWERS.get(vision.model_type) != config.vision_feature_select_strategy:
        known = " or ".join(f"'{tower}' with '{strategy}'" for tower, strategy in TOWERS.items())
        raise ValueError(
            f"{where}: vision tower '{vision.model_type}' with vision_feature_select_strategy "
            f"'{config.vision_feature_select_strategy}' gives no square of patches; known: {known}"
        )
    if tokens_per_frame(config) < 1:
        raise ValueError(
            f"{where}: {vision.image_size} pixels in patches of {vision.patch_size} leave a frame no token"
        )
    return config


def tokens_per_frame(config: PreTrainedConfig) -> int:
    """N: the square of patches after pooling; LLaVA-OneVision halves it, rounding up."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    if config.model_type == "llava_onevision":
        return math.ceil(side / 2) ** 2
    return (side // config.spatial_pool_stride) ** 2


# --- the backbone -----------------------------------------------------------------------------------------------------


class LlavaNextVideo(Backbone):
    """LLaVA-NeXT-Video or LLaVA-OneVision, whichever config.json describes."""

    clip_frames = 1

    @dataclass
    class Config:
        """``checkpoint`` is a folder or hub id; ``architecture``, a config.json's content, means random weights.

        ``tokenizer`` is a folder (default: the checkpoint's); ``frame_batch`` the frames in one pass of the vision
        tower, which bounds its memory.
        """

        checkpoint: str | None = None
        architecture: dict[str, Any] | None = None
        tokenizer: str | None = None
        dtype: str = "float32"
        device: str = "cpu"
        attn_implementation: str = "auto"
        frame_batch: int = 16

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        check_options(config, frame_batch=config.frame_batch)
        folder = None if config.checkpoint is None else local_folder("checkpoint", find_checkpoint(config.checkpoint))
        content = config.architecture if folder is None else read_config(folder)
        where = "architecture" if folder is None else f"'{folder / 'config.json'}'"
        found = model_config(dict(content), where)
        self._folder = folder
        self._numbers = processor_numbers(folder, found.vision_config.image_size)
        self.rules = pixel_rules(self._numbers, found.vision_config.image_size)
        self.pixel_mean, self.pixel_std = self.rules.mean, self.rules.std
        self.tokens_per_frame = tokens_per_frame(found)
        self.model = (self._random(found) if folder is None else self._load(folder, found)).to(config.device)
        self.tokenizer = load_tokenizer(folder, config.tokenizer, self.text_config)
        if self.tokenizer is not None:
            self._set_up_words()

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def lm_head(self) -> nn.Module:
        return self.model.lm_head

    @property
    def newline(self) -> Tensor | None:
        """The vector (D,) after a whole video, where the model has one."""
        return self.model.model.image_newline if self.model.config.model_type == "llava_onevision" else None

    def _apply(self, fn, recurse=True):
        """Moves and casts as any module does, but leaves the rotary frequencies in float32."""
        with exact_buffers(self.language_model.rotary_emb):
            return super()._apply(fn, recurse)

    # --- weights ------------------------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        config, dtype = self.config, DTYPES[self.config.dtype]
        attention = resolve_attention(config.attn_implementation, config.device, dtype)
        return {"dtype": dtype, "attn_implementation": attention}

    def _random(self, found: PreTrainedConfig) -> nn.Module:
        return AutoModelForImageTextToText.from_config(found, **self._options())

    def _load(self, folder: Path, found: PreTrainedConfig) -> nn.Module:
        stored = stored_tensors(weight_files(folder))
        wrong = [f"{name} is {dtype}, should be floating-point" for name, (_, _, dtype) in stored.items()
                 if dtype not in FLOATS]  # fmt: skip
        refuse_tensors(folder, wrong)
        with _quiet():
            model, info = MODELS[found.model_type].from_pretrained(
                folder,
                config=found,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are reported below, all at once
                output_loading_info=True,
                **self._options(),
            )
        wrong = [f"missing {name}" for name in sorted(info["missing_keys"])]
        wrong += [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
        for name, have, want in sorted(info["mismatched_keys"]):
            wrong.append(f"{name} is {list(have)}, should be {list(want)}")
        refuse_tensors(folder, wrong)
        return model

    def save_pretrained(self, folder: str, dtype: str | None = None) -> None:
        """Write a checkpoint in ``transformers``' format, in ``dtype`` (default: the model's own).

        An existing folder is replaced only once everything is written.
        """
        check_save_dtype(dtype)
        wanted = DTYPES[dtype] if dtype else self.dtype
        with whole_folder(folder) as fresh:
            weights = {name: tensor.detach().to("cpu", wanted) for name, tensor in self.model.state_dict().items()}
            self.model.save_pretrained(fresh, state_dict=weights, max_shard_size="5GB")
            for path in fresh.glob("*.safetensors"):
                path.chmod(0o644)  # safetensors leaves it to the owner alone
            self._write_config(fresh / "config.json", str(wanted).removeprefix("torch."))
            write_json(fresh / "video_preprocessor_config.json", self._numbers)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(fresh)
            for name in ("preprocessor_config.json", "processor_config.json"):  # for transformers' own processor
                if self._folder is not None and (self._folder / name).is_file():
                    shutil.copyfile(self._folder / name, fresh / name)

    @staticmethod
    def _write_config(path: Path, dtype: str) -> None:
        content = read_json(path)
        for part in (content, content["text_config"], content["vision_config"]):
            part["dtype"] = dtype
        write_json(path, content)

    # --- frames to visual tokens --------------------------------------------------------------------------------------

    def preprocess(self, frames: Tensor) -> Tensor:
        """(T, H, W, 3) uint8 → (T, 3, h, w) normalised pixels of the model's type, by the checkpoint's own numbers."""
        rules = self.rules
        return preprocess_frames(
            frames,
            rules.size,
            rules.mean,
            rules.std,
            shortest_edge=rules.shortest_edge,
            crop=rules.crop,
            resample=rules.resample,
            dtype=self.dtype,
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """(T, 3, h, w) → visual tokens (T, N, D), each frame on its own."""
        size = self.model.config.vision_config.image_size
        if pixels.ndim != 4 or not len(pixels) or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be (T, 3, {size}, {size}), T at least 1, not {tuple(pixels.shape)}")
        tokens = []
        for frames in pixels.split(self.config.frame_batch):
            # Every frame is a video of its own: a newline at the end of a video is cut off with its frame.
            videos = frames.to(self.device, self.dtype).unsqueeze(1)
            features = self.model.model.get_video_features(videos).pooler_output
            tokens.append(features[:, : self.tokens_per_frame])
        return torch.cat(tokens)

    def parts(self) -> dict[str, list[nn.Module]]:
        """The newline vector is in none of them: it stays as it is."""
        model = self.model.model
        projector = [model.multi_modal_projector]
        if isinstance(getattr(model, "vision_resampler", None), nn.Module):
            projector.append(model.vision_resampler)  # has weights where it pools by convolution
        return {"vision": [model.vision_tower], "projector": projector, "llm": [self.language_model, self.lm_head]}

    # --- words --------------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (…) → embeddings (…, D); the video's placeholder is the newline where the model has one."""
        embedded = super().embed(ids)
        if self.newline is None:
            return embedded
        return torch.where((ids == self.model.config.video_token_id).unsqueeze(-1), self.newline, embedded)

    def _set_up_words(self) -> None:
        """Find out once how prompts are written: the chat template's format, and the ids that never change."""
        place, placeholder = self.config.tokenizer or self._folder, self.model.config.video_token_id
        if (found := self.tokenizer.convert_tokens_to_ids(VIDEO)) != placeholder:
            raise ValueError(
                f"tokenizer '{place}' has the id {found} for {VIDEO}, config.json's video_token_index is "
                f"{placeholder}; give the tokenizer of this checkpoint"
            )
        read_chat_template(Path(self.tokenizer.name_or_path), self.tokenizer)
        with_template = bool(self.tokenizer.chat_template)
        self.format = read_format(self.tokenizer) if with_template else FORMATS[self.text_config.model_type]
        prefix = self.tokenizer(self.format.before + VIDEO).input_ids  # with what the tokenizer puts before a text
        prefix = prefix[: prefix.index(placeholder)]
        if len(prefix) > 1 and prefix[0] == prefix[1] == self.tokenizer.bos_token_id:
            prefix = prefix[1:]  # the template wrote one too
        self._prefix = torch.tensor(prefix, dtype=torch.long)
        self._header = self._ids(self.format.after, f"{VIDEO}{self.format.between}?")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokenizer's end token, then what the generation configuration adds."""
        more = self.model.generation_config.eos_token_id
        more = [] if more is None else more if isinstance(more, list) else [more]
        own = [] if self.tokenizer is None else [self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(i for i in [*own, *more] if i is not None))

    def prompt(self, question: str, video: ShownVideo) -> Prompt:
        """System line and user's name | video | question | assistant's name; nothing is said about the video."""
        require_tokenizer(self.tokenizer)
        asked = self._ids(self.format.between + question, VIDEO)
        if self.newline is not None:
            asked = torch.cat([torch.tensor([self.model.config.video_token_id]), asked])
        return Prompt(self._prefix.clone(), asked, self._header.clone())

    def follow_up(self, question: str) -> Tensor:
        require_tokenizer(self.tokenizer)
        return self._ids(self.format.again + question + self.format.after, self.tokenizer.eos_token or "")

    def _ids(self, text: str, behind: str) -> Tensor:
        """Ids of a text as it reads behind another: a tokenizer may write a text's first word differently."""
        whole, start, alone = (
            self.tokenizer(t, add_special_tokens=False).input_ids for t in (behind + text, behind, text)
        )
        ids = whole[len(start) :] if whole[: len(start)] == start else alone  # where a token reaches over both
        return torch.tensor(ids, dtype=torch.long)


@contextmanager
def _quiet() -> Iterator[None]:
    """No table of tensors in the log: those that do not fit are an error."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

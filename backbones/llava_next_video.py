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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate
from transformers import (
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
)

from xcomp.backbone import Backbone, Prompt, ShownVideo, attention_probabilities, encode_watched
from xcomp.checkpoint import (
    build_model,
    check_options,
    check_prompt_ids,
    describe_model,
    end_ids,
    load_tokenizer,
    pixel_numbers,
    processor_numbers,
    require_tokenizer,
    save_model,
    transformers_config,
    within,
)
from xcomp.pixels import PixelFormat
from xcomp.prompts import Chat, Format, chat_format, chatml, check_token

MODELS = {
    "llava_next_video": LlavaNextVideoForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")
# Towers with a class token must lose it before pooling, those without must not lose a patch.
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
# What is known of either's tokens; the former's class token tells cls_attention too.
FEATURES = ("keys", "frame", "pooling_attention")
VIDEO = "<video>"

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
    "qwen2": chatml(),
    "qwen3": chatml(),
}


# --- pixels: the numbers of a processor -------------------------------------------------------------------------------


def default_numbers(image_size: int) -> dict[str, Any]:
    """CLIP's way: the shortest edge to the tower's size, then the middle."""
    return {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}


def pixel_format(numbers: dict[str, Any], image_size: int) -> PixelFormat:
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
    if given != (image_size, image_size) or any(type(side) is not int for side in given):
        raise ValueError(f"the processor makes pictures of {given}, but the vision tower takes {image_size} squared")
    sides = size if isinstance(size, tuple) else (size,)
    if not all(type(side) is int and image_size <= side <= 100_000 for side in sides):
        raise ValueError(f"the processor's size is {size!r}; its sides must be whole numbers from {image_size}")
    resample, mean, std = pixel_numbers(numbers)
    return PixelFormat(size, mean, std, shortest_edge, crop, resample)


def _height_width(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        return value["height"], value["width"]
    raise ValueError(f"the processor's {name} is {value}; it must be a number or hold height and width")


# --- config.json ------------------------------------------------------------------------------------------------------


def model_config(content: dict[str, Any], where: str) -> PreTrainedConfig:
    """config.json's content as ``transformers`` has it; what this backbone cannot run is a ValueError."""
    config = transformers_config(content, where, MODELS, "llava-hf/LLaVA-NeXT-Video-7B-hf")
    text, vision = config.text_config, config.vision_config
    if text.model_type not in TEXT_MODELS:
        raise ValueError(f"{where}: the language model is '{text.model_type}'; known: {', '.join(TEXT_MODELS)}")
    if TOWERS.get(vision.model_type) != config.vision_feature_select_strategy:
        known = " or ".join(f"'{tower}' with '{strategy}'" for tower, strategy in TOWERS.items())
        raise ValueError(
            f"{where}: vision tower '{vision.model_type}' with vision_feature_select_strategy "
            f"'{config.vision_feature_select_strategy}' gives no square of patches; known: {known}"
        )
    depth, layers = vision.num_hidden_layers, config.vision_feature_layer
    for layer in layers if isinstance(layers, (list, tuple)) else [layers]:
        if layer == 0 or not -depth <= layer <= depth:
            raise ValueError(f"{where}: vision_feature_layer {layer} is none of the tower's 1..{depth}, -{depth}..-1")
    if vision.image_size is None or vision.patch_size is None:
        raise ValueError(f"{where}: the vision tower needs an image_size and a patch_size")
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
        checkpoint: str | None = None  # a folder, hub id, or a shipped one by name
        architecture: dict[str, Any] | None = None  # a config.json's content, with random weights; no checkpoint then
        tokenizer: str | None = None  # a folder; null: the checkpoint's
        dtype: str = "float32"  # float32, bfloat16 or float16
        device: str = "cpu"  # cpu, cuda, cuda:1, …
        attn_implementation: str = "auto"  # auto (flash-attention where it can run), sdpa, eager or flash_attention_2
        frame_batch: int = 16  # frames in one pass of the vision tower, which bounds its memory

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        check_options(config, frame_batch=config.frame_batch)
        folder, _, where, found = describe_model(config, " or ".join(MODELS), model_config)
        self._folder = folder
        self._numbers = processor_numbers(folder, default_numbers(found.vision_config.image_size))
        with within(where if folder is None else f"'{folder}'"):
            self.pixel_format = pixel_format(self._numbers, found.vision_config.image_size)
        self.tokens_per_frame = tokens_per_frame(found)
        side = math.isqrt(self.tokens_per_frame)
        self.grid = side, side
        has_class = TOWERS[found.vision_config.model_type] == "default"
        self.tower_features = ("attention", *(["cls_attention"] if has_class else []), *FEATURES)
        self.model = build_model(MODELS[found.model_type], folder, found, config)
        self.tokenizer = load_tokenizer(folder, config.tokenizer, self.text_config)
        if self.tokenizer is not None:
            with within(f"tokenizer '{config.tokenizer or folder}'"):
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

    def save_pretrained(self, folder: str, dtype: str | None = None) -> None:
        """Write a checkpoint in ``transformers``' format, in ``dtype`` (default: the model's own)."""
        save_model(self.model, folder, dtype, numbers=self._numbers, tokenizer=self.tokenizer, source=self._folder)

    # --- frames to visual tokens --------------------------------------------------------------------------------------

    def encode(self, pixels: Tensor) -> Tensor:
        """(T, 3, h, w) → visual tokens (T, N, D), each frame on its own."""
        size = self.model.config.vision_config.image_size
        if pixels.ndim != 4 or not len(pixels) or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be (T, 3, {size}, {size}), T at least 1, not {tuple(pixels.shape)}")
        return torch.cat([self._tokens(frames) for frames in pixels.split(self.config.frame_batch)])

    def _tokens(self, frames: Tensor) -> Tensor:
        # Every frame is a video of its own: a newline at the end of a video is cut off with its frame.
        videos = frames.to(self.device, self.dtype).unsqueeze(1)
        features = self.model.model.get_video_features(videos).pooler_output
        return features[:, : self.tokens_per_frame]

    def encode_with(self, pixels: Tensor, features: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens, and what the layer that they are taken from knows of them, pooled to their grid by averaging.

        ``frame`` is the class token there, and ``pooling_attention`` what it looks at; without a class token the mean
        of a frame's patches, and the attention that they receive.
        """
        index = self.model.config.vision_feature_layer
        index = index if isinstance(index, int) else index[-1]
        layers = [module for module in self.model.model.vision_tower.modules() if hasattr(module, "self_attn")]
        layer = layers[index - 1 if index > 0 else index]
        return encode_watched(layer, pixels.split(self.config.frame_batch), self._tokens, self._tower, features)

    def _tower(self, queries: Tensor, keys: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Of queries, keys (T, H, S, K) and output (T, S, W) of a layer, S with a class token if there is one."""
        attention = torch.cat([attention_probabilities(*pair) for pair in zip(queries.split(1), keys.split(1))])
        received, keys = attention.mean((1, 2)), keys.float().mean(1)
        if "cls_attention" not in self.tower_features:
            patches = {"attention": received, "pooling_attention": received, "keys": keys}
            frame = hidden.float().mean(1)
        else:
            of_class = attention[:, :, 0, 1:]
            patches = {"attention": received[:, 1:], "cls_attention": of_class.sum(1), "keys": keys[:, 1:]}
            patches["pooling_attention"] = of_class.mean(1)
            frame = hidden[:, 0].float()
        return {"frame": frame, **{name: self._pool(values).flatten(0, 1) for name, values in patches.items()}}

    def _pool(self, values: Tensor) -> Tensor:
        """(T, P) or (T, P, K) of patches → (T, N) or (T, N, K) of the grid."""
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        image = values.unflatten(1, (side, side)).reshape(len(values), side, side, -1).permute(0, 3, 1, 2)
        if self.model.config.model_type == "llava_onevision":
            image = interpolate(image, size=self.grid, mode="bilinear")
        else:
            image = avg_pool2d(image, self.model.config.spatial_pool_stride)
        pooled = image.flatten(2).transpose(1, 2)
        return pooled if values.ndim == 3 else pooled[..., 0]

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
        """Find out once how prompts are written."""
        place, placeholder = self.config.tokenizer or self._folder, self.model.config.video_token_id
        check_token(self.tokenizer, place, VIDEO, placeholder, "video_token_index")
        self.format = chat_format(self.tokenizer, VIDEO, FORMATS[self.text_config.model_type])
        self._chat = Chat(self.tokenizer, self.format, VIDEO)
        check_prompt_ids(self._chat.prompt("?"), self.text_config.vocab_size, place)
        self.message_tokens = self._chat.message_tokens + (self.newline is not None)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return end_ids(self.model, self.tokenizer)

    def prompt(self, question: str, video: ShownVideo) -> Prompt:
        """System line and user's name | video | question | assistant's name; nothing is said about the video."""
        require_tokenizer(self.tokenizer)
        prompt = self._chat.prompt(question)
        if self.newline is None:
            return prompt
        newline = torch.tensor([self.model.config.video_token_id])
        return Prompt(prompt.prefix_ids, torch.cat([newline, prompt.question_ids]), prompt.header_ids)

    def follow_up(self, question: str) -> Tensor:
        require_tokenizer(self.tokenizer)
        return self._chat.follow_up(question)

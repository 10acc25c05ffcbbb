"""SmolVLM2: every frame on its own, and before each the time it was shown at, as ``transformers`` builds it.

Source: "SmolVLM: Redefining small and efficient multimodal models" (arXiv 2504.05299);
``SmolVLMForConditionalGeneration`` of ``transformers``, whose modules compute everything but the language model's pass.
A SigLIP of patches, s×s of which are put side by side and projected to one token (s: ``scale_factor``), and a Llama.

Checkpoints in ``transformers``' format load: ``HuggingFaceTB/SmolVLM2-{256M-Video,500M-Video,2.2B}-Instruct`` (64, 64
and 81 tokens a frame) and what is tuned from them. None of them could be run here; what is tested are random models of
their form.

The prompt is that of ``transformers``' processor for videos, word for word. It always takes its own chat format for
them, whatever template the folder holds, and so does this file::

    <|im_start|>User: You are provided the following series of two frames from a 0:00:04 [H:MM:SS] video.

    Frame from 00:01:<fake_token_around_image><global-img> … <fake_token_around_image>
    Frame from 00:03:<fake_token_around_image><global-img> … <fake_token_around_image>

    What is shown?<end_of_utterance>
    Assistant:

What opens and closes a frame belongs to the frame (``Prompt.frame_texts``). Time stamps are the shown frames' own;
where they are not known, frames are taken to be spread evenly.

Deviations: pixels are resized by :mod:`xcomp.pixels` (with Lanczos' filter where torch has it, from 2.13 on, else
bicubic, as ``transformers`` does); pictures beside the video are left out. ``transformers`` takes a frame that is zero
everywhere for padding and leaves it out; here it is a frame.

Shape letters: T frames · N tokens a frame · D language-model width · P patches · W the tower's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from transformers import PreTrainedConfig, SmolVLMForConditionalGeneration

from xcomp.backbone import Backbone, FrameText, Prompt, ShownVideo, attention_probabilities, encode_watched
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
from xcomp.prompts import check_known, check_token

TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")
FEATURES = ("attention", "keys", "frame", "pooling_attention")
IMAGE, AROUND, WHOLE, STOP = "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
BEFORE, AFTER, AGAIN = "<|im_start|>User: ", f"{STOP}\nAssistant:", "\nUser: "
INTRODUCTION = "You are provided the following series of {frames} frames from a {duration} [H:MM:SS] video.\n"
STAMP = "\nFrame from {minutes:02d}:{seconds:02d}:"
BEHIND = "\n\n"  # between the last frame and the question
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()


# --- the words of a video ---------------------------------------------------------------------------------------------


def in_words(number: int) -> str:
    """A whole number below a million in English words, as the processor has the number of frames."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        return TENS[number // 10] + (f"-{UNITS[number % 10]}" if number % 10 else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = number % size
    joint = ", " if rest >= 100 else " and "
    return f"{in_words(number // size)} {name}" + (f"{joint}{in_words(rest)}" if rest else "")


def introduction(video: ShownVideo) -> str:
    """What is said of the video before its first frame."""
    duration = timedelta(seconds=int(video.duration))
    return INTRODUCTION.format(frames=in_words(video.num_frames), duration=duration)


def stamps(video: ShownVideo) -> list[str]:
    """What is said before each frame."""
    times = video.times
    if times is None:
        times = [(i + 0.5) * video.duration / video.num_frames for i in range(video.num_frames)]
    return [STAMP.format(minutes=int(time // 60), seconds=int(time % 60)) for time in times]


# --- config.json and the processor's numbers --------------------------------------------------------------------------


def model_config(content: dict[str, Any], where: str) -> PreTrainedConfig:
    """config.json's content as ``transformers`` has it; what this backbone cannot run is a ValueError."""
    config = transformers_config(content, where, ("smolvlm",), "HuggingFaceTB/SmolVLM2-2.2B-Instruct")
    text, vision, factor = config.text_config, config.vision_config, config.scale_factor
    if text.model_type not in TEXT_MODELS:
        raise ValueError(f"{where}: the language model is '{text.model_type}'; known: {', '.join(TEXT_MODELS)}")
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size, "scale_factor": factor}
    if wrong := [f"{name} {size}" for name, size in sizes.items() if type(size) is not int or size < 1]:
        raise ValueError(f"{where}: {', '.join(wrong)} must be whole numbers from 1")
    side = vision.image_size // vision.patch_size
    if side < 1 or side % factor:
        raise ValueError(f"{where}: a side of {side} patches does not divide by scale_factor {factor}")
    if vision.hidden_size % vision.num_attention_heads:
        raise ValueError(
            f"{where}: the vision tower's hidden_size {vision.hidden_size} is no multiple of its "
            f"num_attention_heads {vision.num_attention_heads}"
        )
    return config


def default_numbers(image_size: int) -> dict[str, Any]:
    """What the released processors say, for a tower of other size."""
    edge, half = {"longest_edge": image_size}, [0.5] * 3
    return {"size": edge, "max_image_size": edge, "resample": 1, "image_mean": half, "image_std": half}


def pixel_format(numbers: dict[str, Any], image_size: int) -> PixelFormat:
    """A processor's numbers checked: a frame's longer side to one size, then all of it to the tower's square."""
    numbers = default_numbers(image_size) | {name: value for name, value in numbers.items() if value is not None}
    sampling = numbers.get("video_sampling")
    size = sampling.get("video_size", numbers["size"]) if isinstance(sampling, dict) else numbers["size"]
    edges = {"size": size, "max_image_size": numbers["max_image_size"]}
    for name, edge in edges.items():
        if not isinstance(edge, dict) or set(edge) != {"longest_edge"} or type(edge["longest_edge"]) is not int:
            raise ValueError(f"the processor's {name} is {edge!r}; it must hold longest_edge, a whole number")
        if not 1 <= edge["longest_edge"] <= 4096:
            raise ValueError(f"the processor's {name} is {edge['longest_edge']}; it must be 1 to 4096")
    if not numbers.get("do_resize", True):
        raise ValueError("the processor's numbers keep a picture's own shape; they must resize to one size")
    if edges["max_image_size"]["longest_edge"] != image_size:
        given = edges["max_image_size"]["longest_edge"]
        raise ValueError(f"the processor makes pictures of {given} squared, but the vision tower takes {image_size}")
    resample, mean, std = pixel_numbers(numbers)
    return PixelFormat((image_size, image_size), mean, std, resample=resample, longest_edge=size["longest_edge"])


# --- the backbone -----------------------------------------------------------------------------------------------------


class SmolVLM(Backbone):
    """SmolVLM2, with a time stamp before every frame."""

    clip_frames = 1
    tower_features = FEATURES

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
        folder, _, where, found = describe_model(config, "SmolVLM2", model_config)
        size = found.vision_config.image_size
        self._folder = folder
        self._numbers = processor_numbers(folder, default_numbers(size))
        with within(where if folder is None else f"'{folder}'"):
            self.pixel_format = pixel_format(self._numbers, size)
        self.patches = size // found.vision_config.patch_size  # on a side
        side = self.patches // found.scale_factor
        self.grid, self.tokens_per_frame = (side, side), side**2
        self.model = build_model(SmolVLMForConditionalGeneration, folder, found, config)
        self.tokenizer = load_tokenizer(folder, config.tokenizer, self.text_config)
        if self.tokenizer is not None:
            with within(f"tokenizer '{config.tokenizer or folder}'"):
                self._set_up_words()

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.text_model

    @property
    def lm_head(self) -> nn.Module:
        return self.model.lm_head

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
        # Step by step and not by the tower's forward, which looks whether any patch is padding: none is, and that look
        # would wait for the device and could not be had of shapes alone.
        tower, frames = self.model.model.vision_model, frames.to(self.device, self.dtype)
        real = torch.ones(len(frames), self.patches, self.patches, dtype=torch.bool, device=frames.device)
        embedded = tower.embeddings(pixel_values=frames, patch_attention_mask=real)
        seen = tower.encoder(inputs_embeds=embedded, attention_mask=None).last_hidden_state
        return self.model.model.connector(tower.post_layernorm(seen))

    def encode_with(self, pixels: Tensor, features: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens, and what the tower's last layer knows of them, averaged over the patches of a token.

        There is no class token: ``frame`` is the mean of a frame's patches, and ``pooling_attention`` the attention
        that they receive.
        """
        layer = self.model.model.vision_model.encoder.layers[-1]
        return encode_watched(layer, pixels.split(self.config.frame_batch), self._tokens, self._tower, features)

    def _tower(self, queries: Tensor, keys: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Of queries and keys (T, H, P, K) and the output (T, P, W) of a layer."""
        pairs = zip(queries.split(1), keys.split(1))
        received = torch.cat([attention_probabilities(*pair).mean((1, 2)) for pair in pairs])
        pooled = self._pool(received.unsqueeze(-1)).squeeze(-1)
        return {
            "attention": pooled,
            "pooling_attention": pooled,
            "keys": self._pool(keys.float().mean(1)),
            "frame": hidden.float().mean(1),
        }

    def _pool(self, values: Tensor) -> Tensor:
        """(T, P, K) of patches → (T · N, K) of tokens."""
        image = values.transpose(1, 2).unflatten(2, (self.patches, self.patches))
        return avg_pool2d(image, self.model.config.scale_factor).flatten(2).transpose(1, 2).flatten(0, 1)

    def parts(self) -> dict[str, list[nn.Module]]:
        model = self.model.model
        llm = [self.language_model, self.lm_head]
        return {"vision": [model.vision_model], "projector": [model.connector], "llm": llm}

    # --- words --------------------------------------------------------------------------------------------------------

    def _set_up_words(self) -> None:
        """Find out once whether the tokenizer is the model's, and how much stands before a question."""
        place, image = self.config.tokenizer or self._folder, self.model.config.image_token_id
        check_token(self.tokenizer, place, IMAGE, image, "image_token_id")
        check_known(self.tokenizer, place, (AROUND, WHOLE, STOP))
        self.message_tokens = len(self._ids(f"{BEHIND}What")) - len(self._ids("What"))
        check_prompt_ids(self.prompt("?", ShownVideo(1.0, 1)), self.text_config.vocab_size, place)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The id of ``<end_of_utterance>``, then what the generation configuration adds."""
        own = [] if self.tokenizer is None else [self.tokenizer.convert_tokens_to_ids(STOP)]
        return tuple(dict.fromkeys([*own, *end_ids(self.model, self.tokenizer)]))

    def prompt(self, question: str, video: ShownVideo) -> Prompt:
        """User's name, what the video is | for each frame: its time, what opens it, frame, what closes it | question |
        assistant's name. The text is split into tokens as a whole, and cut afterwards."""
        require_tokenizer(self.tokenizer)
        before = BEFORE + introduction(video)
        frames = [f"{stamp}{AROUND}{WHOLE}{IMAGE}{AROUND}" for stamp in stamps(video)]
        ids = self._ids(f"{before}{''.join(frames)}{BEHIND}{question}{AFTER}", whole=True)
        places = (ids == self.model.config.image_token_id).nonzero()[: len(frames), 0].tolist()
        alone, header = self._ids(before, whole=True), self._ids(AFTER)
        # A token may reach from the introduction into the first stamp: it is then the frame's.
        prefix = int((ids[: len(alone)] == alone).cumprod(0).sum())
        # Between two placeholders stand one token that closes a frame, and what opens the next.
        starts = [prefix, *(place + 2 for place in places)]
        texts = tuple(FrameText(ids[start:place], ids[place + 1 : place + 2]) for start, place in zip(starts, places))
        return Prompt(ids[:prefix], ids[starts[-1] : len(ids) - len(header)], header, texts)

    def follow_up(self, question: str) -> Tensor:
        require_tokenizer(self.tokenizer)
        return self._ids(f"{STOP}{AGAIN}{question}{AFTER}")[1:]

    def _ids(self, text: str, whole: bool = False) -> Tensor:
        """Ids of a text; of a ``whole`` one, with what the tokenizer puts before a text that does not begin with it."""
        begins = whole and not text.startswith(self.tokenizer.bos_token or BEFORE)
        return torch.tensor(self.tokenizer(text, add_special_tokens=begins).input_ids, dtype=torch.long)

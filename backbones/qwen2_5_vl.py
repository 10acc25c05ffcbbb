"""Qwen2.5-VL: frames merged in pairs, visual tokens placed in time, height and width, as ``transformers`` builds it.

Source: "Qwen2.5-VL Technical Report" (arXiv 2502.13923); ``Qwen2_5_VLForConditionalGeneration`` of ``transformers``,
whose modules compute everything but the language model's pass. Checkpoints in ``transformers``' format load:
``Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct`` and what is tuned from them. None of them could be run here; what is tested
are random models of their form.

Two frames become one group of N = (h/28)·(w/28) tokens, which is what the language model counts as a frame. Its rotary
positions have three axes (:func:`rope_positions`), and a token keeps its place when others leave. How far apart in time
two groups are placed is ``second_per_grid`` (seconds from one to the next) times the checkpoint's ``tokens_per_second``
(2 in released models). ``transformers`` assumes one second when it is not told, and so does this file; the checkpoints
were trained on real time, so set 2 / (frames shown a second): 1.0 for two frames a second, 2.0 for one, and
2 · duration / frames where a budget of frames is spread over a video. Frames that a selector picks are placed as if
they were evenly spread.

Deviations:
- Every frame is resized to one size, ``height`` × ``width``, by :mod:`xcomp.pixels`; the aspect is not kept. The
  original's ``smart_resize`` keeps it and gives every video a size, and tokens a frame, of its own.
- Where tokens were averaged before the language model, each takes the place in the middle of those it stands for; a
  rule that merges groups in time leaves fewer of them, and they are placed ``second_per_grid`` apart all the same.
- Text behind the video is placed as ``transformers`` 5.23 does it, from the longer side of a frame's grid on. Qwen's
  own code and ``transformers`` 4 went on behind the largest place on any axis, for a long video its end in time.
- Pictures beside the video are left out.

Shape letters: B batch · T frames · P pairs of frames · N tokens a pair · S positions · D language-model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen2_5_VLForConditionalGeneration

from xcomp.backbone import Backbone, Prompt, ShownVideo
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
from xcomp.layout import TokenLayout
from xcomp.pixels import PixelFormat
from xcomp.prompts import Chat, Format, chat_format, chatml, check_token

OPENING, VIDEO, CLOSING = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"
TOKENS = {OPENING: "vision_start_token_id", VIDEO: "video_token_id", CLOSING: "vision_end_token_id"}
STOP = ("<|im_end|>", "<|endoftext|>")
DEFAULTS = {"height": 252, "width": 448, "second_per_grid": 1.0}
OWN = "xcomp"  # config.json's key for what a saved model was shown


# --- positions and patches: pure functions ----------------------------------------------------------------------------


def rope_positions(layout: TokenLayout, grid: tuple[int, int], interval: float) -> Tensor:
    """Places in time, height and width of whatever tokens ``layout`` holds: (3, B, S) long; padding's are anything.

    Those of ``get_rope_index`` in ``transformers``: text is counted on all axes alike; a video that starts at place s
    puts its frame f at s + floor(f · interval) and its rows and columns at s, s + 1, …; text behind it goes on at
    s + the longer side of ``grid`` (rows and columns of a frame's tokens), however long the video is. Text that the
    model writes is counted on from the text before it, as ``generate`` does.
    """
    visual, text = layout.visual, layout.real & ~layout.visual
    behind = visual.cumsum(1) > 0
    place = text.cumsum(1) - 1 + max(grid) * behind
    start = (text & ~behind).sum(1, keepdim=True)
    # Of fewer tokens than the grid has, each stands in the middle of a run.
    slot = (2 * layout.places + 1) * (grid[0] * grid[1]) // (2 * max(layout.frame_tokens, 1))
    where = torch.stack([(layout.frame * interval).long(), slot // grid[1], slot % grid[1]])
    return torch.where(visual, start + where, place)


def flatten_patches(pairs: Tensor, patch: int, merge: int) -> Tensor:
    """(P, 2, 3, h, w) → (P · patches, 3 · 2 · patch²), the patches that merge into one token next to each other."""
    blocks = pairs.unflatten(-1, (-1, merge, patch)).unflatten(-4, (-1, merge, patch))
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4)


# --- config.json ------------------------------------------------------------------------------------------------------


def model_config(content: dict[str, Any], where: str) -> PreTrainedConfig:
    """config.json's content as ``transformers`` has it; what this backbone cannot run is a ValueError."""
    config = transformers_config(content, where, ("qwen2_5_vl",), "Qwen/Qwen2.5-VL-7B-Instruct")
    text, vision = config.text_config, config.vision_config
    sizes = {name: getattr(vision, name) for name in ("patch_size", "spatial_merge_size", "temporal_patch_size")}
    if wrong := [f"{name} {size}" for name, size in sizes.items() if not isinstance(size, int) or size < 1]:
        raise ValueError(f"{where}: the vision tower's {', '.join(wrong)} must be whole numbers from 1")
    if vision.out_hidden_size != text.hidden_size:
        raise ValueError(
            f"{where}: the vision tower's out_hidden_size {vision.out_hidden_size} is not the language model's "
            f"hidden_size {text.hidden_size}"
        )
    if vision.hidden_size % (4 * vision.num_heads):
        raise ValueError(
            f"{where}: the vision tower's hidden_size {vision.hidden_size} is no multiple of 4 times its "
            f"num_heads {vision.num_heads}"
        )
    token = vision.patch_size * vision.spatial_merge_size
    if vision.window_size < token:
        raise ValueError(f"{where}: a window of window_size {vision.window_size} holds no token of {token} pixels")
    if outside := [i for i in vision.fullatt_block_indexes if not 0 <= i < vision.depth]:
        raise ValueError(f"{where}: fullatt_block_indexes {outside} are none of the tower's {vision.depth} blocks")
    sections, head = (
        text.rope_parameters.get("mrope_section", [16, 24, 24]),
        text.hidden_size // text.num_attention_heads,
    )
    if not isinstance(sections, list) or len(sections) != 3 or 2 * sum(sections) != head:
        raise ValueError(f"{where}: mrope_section {sections} must add up to half of the head size {head}")
    return config


def frame_options(options: Any, saved: Any, factor: int, where: str = "") -> dict[str, Any]:
    """Frame size and seconds between groups: as asked for, else as the checkpoint was saved, else the defaults.

    ``where`` is the place of what was ``saved``, for errors.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"{where}: {OWN} is {saved!r}; it must be an object")
    values = {name: getattr(options, name) for name in DEFAULTS}
    own = {name for name, given in values.items() if given is None and name in saved}
    values = {name: saved.get(name, DEFAULTS[name]) if given is None else given for name, given in values.items()}
    for name, value in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "second_per_grid":
            holds, wanted = number and 0 < value <= 1e6, "above 0 (and at most 1e6)"
        else:
            holds = number and isinstance(value, int) and 1 <= value <= 100_000 and value % factor == 0
            wanted = f"a multiple of {factor} (patch size times merging)"
        if not holds:
            raise ValueError(f"{f'{where}: ' if name in own else ''}{name} is {value!r}; it must be {wanted}")
    return values


# --- the backbone -----------------------------------------------------------------------------------------------------


class Qwen25VL(Backbone):
    """Qwen2.5-VL with frames of one fixed size."""

    message_tokens = 1  # what closes the video

    @dataclass
    class Config:
        checkpoint: str | None = None  # a folder, hub id, or a shipped one by name
        architecture: dict[str, Any] | None = None  # a config.json's content, with random weights; no checkpoint then
        tokenizer: str | None = None  # a folder; null: the checkpoint's
        height: int | None = None  # of a frame, a multiple of patch · merging; null: as saved by a run here, else 252
        width: int | None = None  # likewise; else 448 (with 252 pixels 144 tokens a pair)
        second_per_grid: float | None = None  # seconds from one pair to the next; null: likewise, else 1.0
        dtype: str = "float32"  # float32, bfloat16 or float16
        device: str = "cpu"  # cpu, cuda, cuda:1, …
        attn_implementation: str = "auto"  # auto (flash-attention where it can run), sdpa, eager or flash_attention_2
        clip_batch: int = 8  # pairs of frames in one pass of the vision tower, which bounds its memory

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        check_options(config, clip_batch=config.clip_batch)
        folder, content, where, found = describe_model(config, "Qwen2.5-VL", model_config)
        vision = found.vision_config
        self.merged_frames = self.clip_frames = vision.temporal_patch_size
        factor = vision.patch_size * vision.spatial_merge_size
        self.frame_options = frame_options(config, content.get(OWN) or {}, factor, where)
        self.size = self.frame_options["height"], self.frame_options["width"]
        self.grid = self.size[0] // factor, self.size[1] // factor
        self.tokens_per_frame = self.grid[0] * self.grid[1]
        self.interval = vision.tokens_per_second * self.frame_options["second_per_grid"]
        self._folder = folder
        self._numbers = processor_numbers(folder, {"patch_size": vision.patch_size})
        resample, mean, std = pixel_numbers(self._numbers)
        self.pixel_format = PixelFormat(self.size, mean, std, resample=resample)
        self.model = build_model(Qwen2_5_VLForConditionalGeneration, folder, found, config)
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

    def save_pretrained(self, folder: str, dtype: str | None = None) -> None:
        """Write a checkpoint in ``transformers``' format, in ``dtype`` (default: the model's own)."""
        words = {"tokenizer": self.tokenizer, "source": self._folder}
        save_model(self.model, folder, dtype, numbers=self._numbers, more={OWN: self.frame_options}, **words)

    # --- frames to visual tokens --------------------------------------------------------------------------------------

    def encode(self, pixels: Tensor) -> Tensor:
        """(T, 3, h, w) → visual tokens (T / 2, N, D), each pair of frames on its own."""
        if pixels.ndim != 4 or pixels.shape[1:] != (3, *self.size):
            raise ValueError(f"pixels must be (T, 3, {self.size[0]}, {self.size[1]}), not {tuple(pixels.shape)}")
        merged = self.merged_frames
        if not len(pixels) or len(pixels) % merged:
            raise ValueError(
                f"{len(pixels)} frames cannot be merged {merged} by {merged}; encode a positive multiple of {merged}"
            )
        vision, tokens = self.model.config.vision_config, []
        for pairs in pixels.unflatten(0, (-1, merged)).split(self.config.clip_batch):
            patches = flatten_patches(pairs.to(self.device, self.dtype), vision.patch_size, vision.spatial_merge_size)
            grid = torch.tensor([[len(pairs), *(side // vision.patch_size for side in self.size)]], device=self.device)
            tokens += self.model.model.get_video_features(patches, grid).pooler_output
        return torch.cat(tokens).unflatten(0, (-1, self.tokens_per_frame))

    def parts(self) -> dict[str, list[nn.Module]]:
        visual = self.model.model.visual
        llm = [self.language_model, self.lm_head]
        return {"vision": [visual.patch_embed, visual.blocks], "projector": [visual.merger], "llm": llm}

    def positions(self, layout: TokenLayout) -> Tensor:
        """(3, B, S) long on the CPU: places in time, height and width."""
        if layout.beside is not None:
            raise ValueError(
                "Qwen2.5-VL was made for videos without text between their frames, and has no place for it"
            )
        return rope_positions(layout, self.grid, self.interval)

    # --- words --------------------------------------------------------------------------------------------------------

    def _set_up_words(self) -> None:
        """Find out once how prompts are written."""
        place = self.config.tokenizer or self._folder
        for token, key in TOKENS.items():
            check_token(self.tokenizer, place, token, getattr(self.model.config, key), key)
        around = OPENING, CLOSING
        self.format = check_format(chat_format(self.tokenizer, VIDEO, chatml(*around), around=around))
        self._chat = Chat(self.tokenizer, self.format, VIDEO)
        check_prompt_ids(self._chat.prompt("?"), self.text_config.vocab_size, place)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of ``<|im_end|>`` and ``<|endoftext|>``, then what the generation configuration adds."""
        own = [] if self.tokenizer is None else self.tokenizer.convert_tokens_to_ids(list(STOP))
        return tuple(dict.fromkeys(i for i in [*own, *end_ids(self.model, self.tokenizer)] if i is not None))

    def prompt(self, question: str, video: ShownVideo) -> Prompt:
        """System line, user's name, vision start | video | vision end, question | assistant's name."""
        require_tokenizer(self.tokenizer)
        return self._chat.prompt(question)

    def follow_up(self, question: str) -> Tensor:
        require_tokenizer(self.tokenizer)
        return self._chat.follow_up(question)


def check_format(found: Format) -> Format:
    """A chat template's format if the video stands between the tokens that open and close it, else a ValueError."""
    if not (found.before.endswith(OPENING) and found.between.startswith(CLOSING)):
        raise ValueError(
            f"the tokenizer's chat template does not put {VIDEO} between {OPENING} and {CLOSING}; mend its "
            "chat_template.jinja, or remove it for the language model's usual format"
        )
    return found._replace(again=found.again.removeprefix(STOP[0]))  # also where another token is called the last one

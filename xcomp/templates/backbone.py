"""skeleton: a small Qwen2 with random weights that sees patches of the frames through one linear layer.

A backbone turns frames into visual tokens, writes the prompt around them, and holds a language model of the Llama
family (Llama, Mistral, Qwen2, Qwen3) of ``transformers``: with ``language_model`` and ``lm_head`` set, the framework
opens it up layer by layer. For a real one, load the vision tower, the projector and the language model here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from xcomp import Backbone
from xcomp.backbone import Prompt, ShownVideo
from xcomp.pixels import PixelFormat
from xcomp.tiny import CharacterTokenizer


class Skeleton(Backbone):
    """Frames of 32 × 32 pixels in 16 patches: 16 tokens a frame."""

    tokens_per_frame = 16  # N
    clip_frames = 1  # frames that are encoded together: ``encode`` is given multiples of it
    pixel_format = PixelFormat(32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # how a frame becomes pixels

    @dataclass
    class Config:
        """The options that YAML can set, their types and defaults, and what `xcomp plugins skeleton` says of them."""

        checkpoint: str | None = None  # folder that ``save_pretrained`` wrote; None: random weights of the sizes below
        width: int = 64  # of the language model
        layers: int = 4  # of the language model
        dtype: str = "float32"  # float32, bfloat16 or float16
        device: str = "cpu"  # cpu, cuda, cuda:1, …

    def __init__(self, config: Config):
        super().__init__()
        sizes = dict(vocab_size=97, hidden_size=config.width, intermediate_size=2 * config.width,
                     num_hidden_layers=config.layers, num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
        text = Qwen2Config.from_pretrained(config.checkpoint) if config.checkpoint else Qwen2Config(**sizes)
        self.tokenizer = CharacterTokenizer()  # for a real one: transformers.AutoTokenizer.from_pretrained(...)
        self.projector = nn.Conv2d(3, text.hidden_size, kernel_size=8, stride=8)
        self.language_model = Qwen2Model(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if config.checkpoint:
            load_model(self, Path(config.checkpoint) / "model.safetensors")
        self.to(config.device, getattr(torch, config.dtype))

    def encode(self, pixels: Tensor) -> Tensor:
        """(T, 3, h, w) → visual tokens (T, N, D), in the language model's type."""
        return self.projector(pixels.to(self.device, self.dtype)).flatten(2).transpose(1, 2)

    def prompt(self, question: str, video: ShownVideo) -> Prompt:
        """1-D token ids around the video: prefix | video | question | header. Only the second knows the question.

        A model that writes something between frames gives it as a fourth, ``frame_texts`` (see Prompt).
        """
        return Prompt(self._ids("Video: "), self._ids(f" {question} "), self._ids("Answer: "))

    def follow_up(self, question: str) -> Tensor:
        """Token ids of a further question after an answer, for tuning on conversations; the header included."""
        return self._ids(f" {question} Answer: ")

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text)["input_ids"])

    def save_pretrained(self, folder: str, dtype: str | None = None) -> None:
        """Write what ``checkpoint: folder`` reads; ``xcomp tune`` ends with it."""
        self.language_model.config.save_pretrained(folder)
        if dtype:
            self.to(getattr(torch, dtype))
        save_model(self, str(Path(folder) / "model.safetensors"))

    def parts(self) -> dict[str, list[nn.Module]]:
        """What ``tune.train`` can name. A vision tower of its own would be the ``vision``."""
        return {"vision": [], "projector": [self.projector], "llm": [self.language_model, self.lm_head]}

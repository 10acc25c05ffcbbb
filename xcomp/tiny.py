"""A small random backbone, for trying plugins and for tests: it needs no weights and answers nonsense.

``xcomp.testing`` makes one for every check; ``tiny_backbone(family="llama", layers=2)`` makes one by hand. The file is
also the shortest example of what a backbone has to define.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from xcomp.backbone import Backbone, FrameText, Prompt, ShownVideo
from xcomp.pixels import PixelFormat
from xcomp.visual import TOWER_FEATURES

FAMILIES = {name.lower(): (f"{name}Config", f"{name}Model") for name in ("Qwen2", "Qwen3", "Llama", "Mistral")}


class CharacterTokenizer:
    """One id a character: 1..96 for the printable ones, 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + (ord(c) - 32) % 96 for c in text]}

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(31 + int(i)) for i in ids if i)


class TinyBackbone(Backbone):
    """A random language model of the Llama family; a frame's N tokens are linear in its 2×2 pixels."""

    clip_frames = 2
    tower_features = tuple(TOWER_FEATURES)
    pixel_format = PixelFormat(2, resample="bilinear")

    @dataclass
    class Config:
        family: str = "qwen2"  # qwen2, qwen3, llama, mistral
        layers: int = 4
        tokens_per_frame: int = 8
        attn: str = "sdpa"

    def __init__(self, config: Config):
        super().__init__()
        config_name, model_name = FAMILIES[config.family]
        sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=config.layers, head_dim=8,
                     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096)  # fmt: skip
        sizes |= {"sliding_window": None} if config.family == "mistral" else {}
        text = getattr(transformers, config_name)(**sizes)
        text._attn_implementation = config.attn
        self.tokens_per_frame = config.tokens_per_frame
        rows = 2 if config.tokens_per_frame % 2 == 0 else 1
        self.grid = rows, config.tokens_per_frame // rows
        self.tokenizer = CharacterTokenizer()
        self.language_model = getattr(transformers, model_name)(text)
        self.lm_head = nn.Linear(32, 97, bias=False)
        self.projector = nn.Linear(12, 32 * config.tokens_per_frame)
        # transformers starts biases at 0 and norms at 1; random ones make a wrong layer visible.
        for parameter in self.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))

    def encode(self, pixels: Tensor) -> Tensor:
        return self.projector(pixels.flatten(1)).unflatten(-1, (self.tokens_per_frame, 32))

    def encode_with(self, pixels: Tensor, features: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """A tower of one layer that is the tokens themselves."""
        tokens = self.encode(pixels)
        attention = (tokens @ tokens.transpose(1, 2)).softmax(-1)
        known = {"attention": attention.mean(1).flatten(), "cls_attention": attention[:, 0].flatten(),
                 "pooling_attention": attention[:, -1].flatten(), "keys": tokens.flatten(0, 1),
                 "frame": tokens.mean(1)}  # fmt: skip
        return tokens, {name: known[name] for name in features}

    def prompt(self, question: str, video: ShownVideo) -> Prompt:
        return Prompt(torch.tensor([1, 2, 3]), self._ids(question), torch.tensor([4, 5]))

    def follow_up(self, question: str) -> Tensor:
        return self._ids(f" {question} ")

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.encode(pixels)

    def image_prompt(self, texts: Sequence[str]) -> Prompt:
        first, *between, last = ["", *texts] if len(texts) == 1 else texts
        prefix, behind = torch.tensor([1, 2, 3, *self._ids(first).tolist()]), [self._ids(t) for t in (*between, "")]
        return Prompt(
            prefix,
            self._ids(last),
            torch.tensor([4, 5]),
            tuple(FrameText(self._ids(""), ids) for ids in behind) if between else None,
        )

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text)["input_ids"], dtype=torch.long)

    def parts(self) -> dict[str, list[nn.Module]]:
        return {"vision": [], "projector": [self.projector], "llm": [self.language_model, self.lm_head]}


def tiny_backbone(seed: int = 0, **options: Any) -> TinyBackbone:
    """A random backbone (width 32, 4 layers, 8 tokens a frame, clips of 2) in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyBackbone(TinyBackbone.Config(**options)).eval()

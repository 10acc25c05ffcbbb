"""Small backbones for tests: random language models of the Llama family with a vision path that is one linear layer."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from xcomp.backbone import Backbone, Prompt

FAMILIES = {
    "qwen2": ("Qwen2Config", "Qwen2Model"),
    "qwen3": ("Qwen3Config", "Qwen3Model"),
    "llama": ("LlamaConfig", "LlamaModel"),
    "mistral": ("MistralConfig", "MistralModel"),
}


class PlainBackbone(Backbone):
    """Any transformers language model; a frame's N tokens are linear in its pixels."""

    clip_frames = 2

    def __init__(self, family: str = "qwen2", layers: int = 4, tokens_per_frame: int = 8, attn: str = "sdpa"):
        super().__init__()
        config_name, model_name = FAMILIES[family]
        config = getattr(transformers, config_name)(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, sliding_window=None,
        ) if family == "mistral" else getattr(transformers, config_name)(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=4096,
        )
        config._attn_implementation = attn
        self.tokens_per_frame = tokens_per_frame
        self.language_model = getattr(transformers, model_name)(config)
        self.lm_head = nn.Linear(32, 97, bias=False)
        self.projector = nn.Linear(12, 32 * tokens_per_frame)
        # transformers starts biases at 0 and norms at 1; random ones make a wrong layer visible.
        for parameter in self.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))

    def preprocess(self, frames):
        return frames.permute(0, 3, 1, 2).float() / 255

    def encode(self, pixels):
        return self.projector(pixels.flatten(1)).unflatten(-1, (self.tokens_per_frame, 32))

    def prompt(self, question, video):
        ids = torch.tensor([ord(c) % 97 for c in question])
        return Prompt(torch.tensor([1, 2, 3]), ids, torch.tensor([4, 5]))


@pytest.fixture
def make_backbone():
    def make(seed: int = 0, **kwargs) -> PlainBackbone:
        torch.manual_seed(seed)
        return PlainBackbone(**kwargs).eval()

    return make


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over largest value, on whole tensors."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()

"""What tests of Qwen2.5-VL need: a small configuration with windows, and a tokenizer with the video's tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>",
           "<|image_pad|>"]  # fmt: skip
VIDEO_ID = SPECIAL.index("<|video_pad|>")
IDS = {"vision_start_token_id": 3, "vision_end_token_id": 4, "video_token_id": VIDEO_ID, "image_token_id": 6}
TEXT = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=4096,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
)
# Patches of 4 and merging of 2: a token is 8 pixels squared, a window 2×2 tokens; the last of three blocks sees all.
VISION = dict(depth=3, hidden_size=32, intermediate_size=40, num_heads=2, patch_size=4, spatial_merge_size=2,
              temporal_patch_size=2, tokens_per_second=2, window_size=16, out_hidden_size=32,
              fullatt_block_indexes=[2], initializer_range=0.2)  # fmt: skip
SIZE = {"height": 24, "width": 32}  # 3×4 tokens a pair


def architecture(text: dict | None = None, vision: dict | None = None, **changes) -> dict:
    """A config.json's content."""
    parts = {"text_config": TEXT | (text or {}), "vision_config": VISION | (vision or {})}
    return {"model_type": "qwen2_5_vl", **parts, **IDS, **changes}


def save_tokenizer(folder: Path, template: str | None = None, eos: str = "<|im_end|>") -> str:
    """A byte-level tokenizer of Qwen2's form. Returns the folder."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=299, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["What colour is the cross? (A) red user assistant system\n"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=template, eos_token=eos, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)

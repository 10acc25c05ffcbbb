"""What tests of LLaVA-like backbones need: small configurations, and tokenizers of Vicuna's and of Qwen2's kind."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["A chat between USER: What colour is the cross? ASSISTANT: red [INST] (A) [/INST] user assistant system\n"] * 4
VIDEO_ID = 3
TEXT = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2)  # fmt: skip
VISION = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, patch_size=8)


def architecture(text: str = "llama", kind: str = "llava_next_video", image_size: int = 48, **changes) -> dict:
    """A config.json's content: 9 tokens a frame of 6×6 patches by default."""
    tower = "clip_vision_model" if kind == "llava_next_video" else "siglip_vision_model"
    more = {"projection_dim": 16} if kind == "llava_next_video" else {"vision_use_head": False}
    text_config = TEXT | {"model_type": text} | ({"sliding_window": None} if text == "mistral" else {})
    vision_config = VISION | {"model_type": tower, "image_size": image_size} | more
    ids = {"video_token_index": VIDEO_ID, "image_token_index": 4}
    return {"model_type": kind, "text_config": text_config, "vision_config": vision_config, **ids, **changes}


def save_tokenizer(folder: Path, kind: str = "vicuna", template: str | None = None) -> str:
    """``vicuna``: words that open with their space, one begin token; ``chatml``: bytes, none. Returns the folder."""
    first = ["<unk>", "<s>", "</s>"] if kind == "vicuna" else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special = [*first, "<video>", "<image>"]
    if kind == "vicuna":
        inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no merges from word to word …
        alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    else:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=299, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(WORDS, trainer)
    names = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    if kind == "vicuna":
        inner.pre_tokenizer = None  # … and none to split them afterwards, as in Llama's own files
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **names)
    tokenizer.save_pretrained(folder)
    return str(folder)

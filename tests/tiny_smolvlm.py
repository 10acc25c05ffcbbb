"""What tests of SmolVLM2 need: small configurations, and a tokenizer of SmolLM2's kind."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>",
           "<global-img>", "<image>"]  # fmt: skip
IMAGE_ID = SPECIAL.index("<image>")
WORDS = ["User: You are provided the following series of twenty frames from a 0:01:23 [H:MM:SS] video.\n\n"
         "Frame from 00:45:\n\nWhat colour is the cross?\nAssistant: red (A)"] * 4  # fmt: skip
TEXT = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2, eos_token_id=3,
            pad_token_id=2, rms_norm_eps=1e-5)  # fmt: skip
VISION = dict(model_type="smolvlm_vision", hidden_size=24, intermediate_size=32, num_hidden_layers=3,
              num_attention_heads=2, patch_size=8)  # fmt: skip


def architecture(text: str = "llama", image_size: int = 48, scale_factor: int = 2, **changes) -> dict:
    """A config.json's content: 9 tokens a frame of 6×6 patches by default."""
    text_config = TEXT | {"model_type": text} | ({"sliding_window": None} if text == "mistral" else {})
    ids = {"image_token_id": IMAGE_ID, "pad_token_id": 2, "scale_factor": scale_factor}
    vision_config = VISION | {"image_size": image_size}
    return {"model_type": "smolvlm", "text_config": text_config, "vision_config": vision_config, **ids, **changes}


def save_tokenizer(folder: Path, *, merges_lines: bool = False) -> str:
    """Bytes, digits one by one. ``merges_lines``: two line ends may be one token. Returns the folder."""
    inner = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges_lines)
    cut = [pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\S+"), "isolated")] if merges_lines else []
    inner.pre_tokenizer = pre_tokenizers.Sequence([*cut, pre_tokenizers.Digits(individual_digits=True), byte_level])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=299,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(WORDS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    return str(folder)

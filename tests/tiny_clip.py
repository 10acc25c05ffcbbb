"""A CLIP of ``transformers`` with random weights and a word-level tokenizer, saved as a checkpoint folder."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

WORDS = ["<end>", "<unknown>", "which", "symbol", "appears", "first", "what", "colour", "is", "the", "ring", "red"]
MEAN, STD = [0.3, 0.5, 0.7], [0.2, 0.25, 0.3]


def save_tiny_clip(folder, *, closes=True, dtype=torch.float32, kind="clip") -> str:
    """``closes``: whether the tokenizer puts an end token behind a text, as CLIP's does. Returns the folder.

    ``kind``: clip, siglip or blip.
    """
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if closes:
        inner.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=8)
    text = dict(tower, vocab_size=len(WORDS), max_position_embeddings=8, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(kind, tower, text)
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 24, "width": 24}
    CLIPImageProcessorPil(size=size, crop_size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return str(folder)


def _model(kind, tower, text):
    seen = dict(tower, image_size=24, patch_size=8)
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=text, vision_config=seen, projection_dim=8))
    if kind == "siglip":
        return SiglipModel(SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=seen))
    more = {"encoder_hidden_size": 16}
    config = BlipConfig(text_config=text | more, vision_config=seen, image_text_hidden_size=8, projection_dim=8)
    return BlipForImageTextRetrieval(config)

"""CLIP similarity: a frame's score is the cosine between its CLIP image embedding and the question's text embedding.

The usual question-aware selector of long-video papers. ``checkpoint`` is any CLIP of ``transformers`` whose weights are
safetensors (folder, hub id, or a shipped one by name). Frames come as the backbone preprocessed them and are taken back
to colours first, so the picture that CLIP sees has been resized once more than needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel

from xcomp.checkpoint import (
    check_ids,
    load_tokenizer,
    local_folder,
    pixel_numbers,
    processor_numbers,
    read_config,
    read_model,
    transformers_config,
)
from xcomp.config import find_checkpoint
from xcomp.pixels import preprocess_frames
from xcomp.selector import FrameSelector


class CLIPSimilarity(FrameSelector):
    """Cosine of CLIP embeddings."""

    @dataclass
    class Config:
        checkpoint: str = "openai/clip-vit-large-patch14"
        batch_size: int = 64  # frames embedded at once

        def __post_init__(self) -> None:
            if self.batch_size < 1:
                raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")

    def __init__(self, config: Config):
        super().__init__(config)
        try:
            self._load(local_folder("checkpoint", find_checkpoint(config.checkpoint)))
        except ValueError as error:
            raise ValueError(f"clip_similarity: {error}") from error

    def _load(self, folder: Path) -> None:
        """Model, tokenizer and the numbers of pixels of a folder; ValueError names what is wrong with it."""
        content, where = read_config(folder, "CLIP"), f"'{folder / 'config.json'}'"
        found = transformers_config(content, where, ("clip",), "openai/clip-vit-large-patch14")
        numbers = processor_numbers(folder, None)
        self.tokenizer = load_tokenizer(folder, None, found)
        if numbers is None or self.tokenizer is None:
            what = "preprocessor_config.json" if numbers is None else "tokenizer files"
            raise ValueError(f"'{folder}' holds no {what}; copy them from where the CLIP is from")
        self.clip = read_model(CLIPModel, folder, found, dtype=torch.float32).requires_grad_(False)
        self.resample, self.mean, self.std = pixel_numbers(numbers)
        self.size = found.vision_config.image_size
        self.max_length = found.text_config.max_position_embeddings
        closing, expected = self.tokenizer.eos_token_id, found.text_config.eos_token_id
        ids = self.tokenizer("a").input_ids
        check_ids(ids, found.text_config.vocab_size, folder)
        if closing not in ids:
            raise ValueError(f"the tokenizer in '{folder}' must close a text with its end token")
        if expected not in (2, closing):  # 2, as in OpenAI's: the text is read off where its largest id stands
            raise ValueError(f"{where}: eos_token_id is {expected}, but the tokenizer closes a text with {closing}")

    @torch.no_grad()
    def score_frames(
        self, backbone, pixels, prefix_ids, question_ids, header_ids, compressor=None, *, question=None
    ) -> Tensor:
        question = backbone.tokenizer.decode(question_ids).strip() if question is None else question
        device = self.clip.device
        text = self.tokenizer([question], truncation=True, max_length=self.max_length, return_tensors="pt").to(device)
        wanted = normalize(self.clip.get_text_features(**text).pooler_output, dim=-1)
        scores = []
        for part in pixels.split(self.config.batch_size):
            seen = self.clip.get_image_features(pixel_values=self._pixels(backbone, part).to(device)).pooler_output
            scores.append((normalize(seen, dim=-1) @ wanted.T).squeeze(1).float().cpu())
        return torch.cat(scores)

    def _pixels(self, backbone, pixels: Tensor) -> Tensor:
        """The backbone's normalised pixels (T, 3, h, w) as CLIP's."""
        values = (backbone.pixel_mean, backbone.pixel_std)
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in values)
        colours = ((pixels.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return preprocess_frames(colours.permute(0, 2, 3, 1), self.size, self.mean, self.std, resample=self.resample)

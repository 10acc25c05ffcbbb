"""CLIP similarity: a frame's score is the cosine between its CLIP image embedding and the question's text embedding.

The usual question-aware selector of long-video papers. ``checkpoint`` is any CLIP of ``transformers`` (folder, hub id,
or a shipped one by name). Frames come as the backbone preprocessed them and are taken back to colours first, so the
picture that CLIP sees has been resized once more than needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from xcomp.config import find_checkpoint
from xcomp.pixels import preprocess_frames
from xcomp.selector import FrameSelector


class CLIPSimilarity(FrameSelector):
    """Cosine of CLIP embeddings."""

    @dataclass
    class Config:
        checkpoint: str = "openai/clip-vit-large-patch14-336"
        batch_size: int = 64  # frames embedded at once

        def __post_init__(self) -> None:
            if self.batch_size < 1:
                raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")

    def __init__(self, config: Config):
        super().__init__(config)
        folder = find_checkpoint(config.checkpoint)
        try:
            self.clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            processor = CLIPImageProcessorPil.from_pretrained(folder)
        except OSError as error:
            raise ValueError(f"clip_similarity: no CLIP in '{folder}': {str(error).splitlines()[0]}") from error
        self.mean, self.std = processor.image_mean, processor.image_std
        self.size = self.clip.config.vision_config.image_size
        self.max_length = self.clip.config.text_config.max_position_embeddings
        if self.tokenizer.eos_token_id not in self.tokenizer("a").input_ids:
            raise ValueError(f"clip_similarity: the tokenizer in '{folder}' must close a text with its end token")

    @torch.no_grad()
    def score_frames(
        self, backbone, pixels, prefix_ids, question_ids, header_ids, compressor=None, *, question=None
    ) -> Tensor:
        question = backbone.tokenizer.decode(question_ids).strip() if question is None else question
        device = backbone.device
        self.clip.to(device)
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
        return preprocess_frames(colours.permute(0, 2, 3, 1), self.size, self.mean, self.std)

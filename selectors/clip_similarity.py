"""CLIP similarity: a frame's score is the cosine between its CLIP image embedding and the question's text embedding.

The usual question-aware selector of long-video papers. ``checkpoint`` is any CLIP of ``transformers`` whose weights are
safetensors (folder, hub id, or a shipped one by name). Frames are resized for CLIP from the video's own size; the
aspect is not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel

from xcomp.backbone import Backbone
from xcomp.checkpoint import (
    check_ids,
    find_folder,
    load_tokenizer,
    pixel_numbers,
    processor_numbers,
    read_config,
    read_model,
    transformers_config,
)
from xcomp.compressor import Compressor
from xcomp.cost import count_macs
from xcomp.inflight import VideoInFlight
from xcomp.pixels import PixelFormat
from xcomp.selector import FrameQuery, FrameSelector, SelectionCost


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
            self._load(find_folder(config.checkpoint))
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
        resample, mean, std = pixel_numbers(numbers)
        self.pixel_format = PixelFormat(found.vision_config.image_size, mean, std, resample=resample)
        self._macs: int | None = None
        self.max_length = found.text_config.max_position_embeddings
        closing, expected = self.tokenizer.eos_token_id, found.text_config.eos_token_id
        ids = self.tokenizer("a").input_ids
        check_ids(ids, found.text_config.vocab_size, folder)
        if closing not in ids:
            raise ValueError(f"the tokenizer in '{folder}' must close a text with its end token")
        if expected not in (2, closing):  # 2, as in OpenAI's: the text is read off where its largest id stands
            raise ValueError(f"{where}: eos_token_id is {expected}, but the tokenizer closes a text with {closing}")

    def pixel_formats(self, backbone: Backbone) -> tuple[PixelFormat, ...]:
        return (self.pixel_format,)

    @torch.no_grad()
    def score(
        self, video: VideoInFlight, queries: Sequence[FrameQuery], compressor: Compressor | None = None
    ) -> list[Tensor]:
        """Frames are embedded once, for all questions."""
        self.to(video.backbone.device)
        options = self.pixel_format, self.config.batch_size, self._frame_macs()
        seen = video.features(id(self), video.candidates, self._embed_frames, *options)
        scores = []
        for query in queries:
            with video.ledger.charge(query.work):
                wanted, macs = count_macs(lambda query=query: self._embed_question(query.question))
                query.work.macs += macs
                scores.append((seen @ wanted.T).squeeze(1).float().cpu())
        return scores

    def _embed_frames(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (t, 3, h, w) → unit vectors (t, E)."""
        return normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def _embed_question(self, question: str) -> Tensor:
        """(1, E), a unit vector; a question that is too long is cut."""
        options = {"truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        text = self.tokenizer([question], **options).to(self.clip.device)
        return normalize(self.clip.get_text_features(**text).pooler_output, dim=-1)

    def _frame_macs(self) -> int:
        """MACs of embedding one frame."""
        if self._macs is None:
            pixels = torch.zeros(1, 3, *self.pixel_format.largest, device=self.clip.device, dtype=self.clip.dtype)
            self._macs = count_macs(lambda: self._embed_frames(pixels))[1]
        return self._macs

    @torch.no_grad()
    def cost(
        self, backbone: Backbone, num_frames: int, query: FrameQuery, compressor: Compressor
    ) -> SelectionCost | None:
        question = count_macs(lambda: self._embed_question(query.question))[1]
        return SelectionCost(0, num_frames * self._frame_macs(), question)

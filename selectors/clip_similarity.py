"""Image-text models as scorers: a frame's score is how well its picture matches the question.

The usual question-aware scorer of long-video papers. ``checkpoint`` is any CLIP, SigLIP or BLIP-ITM of ``transformers``
whose weights are safetensors (folder, hub id, or a shipped one by name); its config.json says which. Frames are resized
for it from the video's own size; the aspect is not kept.

CLIP and SigLIP embed picture and text apart: the score is the cosine (``similarity: cosine``), the product of the
embeddings as they are (``dot``) or the model's logit (``logits``: the cosine scaled and, in SigLIP, shifted). BLIP-ITM
looks at both together: the score is the probability that they match (``match``, its default), or the cosine of its two
towers.

``store`` names a folder in which the frames' features stay for other runs (:mod:`xcomp.feature_store`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import BlipForImageTextRetrieval, CLIPModel, SiglipModel

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
    weight_files,
)
from xcomp.compressor import Compressor
from xcomp.cost import count_macs
from xcomp.decoding import VideoInfo
from xcomp.feature_store import FeatureStore, files_digest
from xcomp.inflight import VideoInFlight
from xcomp.pixels import PixelFormat
from xcomp.selector import Embeddings, FrameQuery, FrameSelector, SelectionCost

MODELS = {"clip": CLIPModel, "siglip": SiglipModel, "blip": BlipForImageTextRetrieval}
SIMILARITIES = ("cosine", "dot", "logits", "match")


class CLIPSimilarity(FrameSelector):
    """How well a frame's picture matches the question, by CLIP, SigLIP or BLIP-ITM."""

    @dataclass
    class Config:
        checkpoint: str = "openai/clip-vit-large-patch14"  # a folder, hub id, or a shipped one by name
        batch_size: int = 64  # frames embedded at once
        similarity: str | None = None  # cosine, dot, logits or match; None: match for BLIP, else cosine
        long_text: str = "cut"  # what becomes of a question that is too long: cut, or the mean over its pieces
        store: str | None = None  # folder in which frames' features are kept for other runs

        def __post_init__(self) -> None:
            if self.batch_size < 1:
                raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
            if self.similarity not in (None, *SIMILARITIES):
                raise ValueError(f"similarity is '{self.similarity}'; it must be one of {', '.join(SIMILARITIES)}")
            if self.long_text not in ("cut", "mean"):
                raise ValueError(f"long_text is '{self.long_text}'; it must be cut or mean")

    def __init__(self, config: Config):
        super().__init__(config)
        try:
            self._load(find_folder(config.checkpoint))
        except ValueError as error:
            raise ValueError(f"clip_similarity: {error}") from error

    def _load(self, folder: Path) -> None:
        """Model, tokenizer and the numbers of pixels of a folder; ValueError names what is wrong with it."""
        content, where = read_config(folder, "CLIP"), f"'{folder / 'config.json'}'"
        if str(content.get("model_type")).endswith("_vision_model"):
            raise ValueError(f"{where} describes a vision tower without a text tower; questions cannot be scored by it")
        found = transformers_config(content, where, tuple(MODELS), "openai/clip-vit-large-patch14")
        self.kind = found.model_type
        numbers = processor_numbers(folder, None)
        self.tokenizer = load_tokenizer(folder, None, found)
        if numbers is None or self.tokenizer is None:
            what = "preprocessor_config.json" if numbers is None else "tokenizer files"
            raise ValueError(f"'{folder}' holds no {what}; copy them from where the CLIP is from")
        self.similarity = self.config.similarity or ("match" if self.kind == "blip" else "cosine")
        if self.similarity == ("logits" if self.kind == "blip" else "match"):
            raise ValueError(f"similarity '{self.similarity}' is not what a {self.kind} model gives")
        self.clip = read_model(MODELS[self.kind], folder, found, dtype=torch.float32).requires_grad_(False)
        resample, mean, std = pixel_numbers(numbers)
        self.pixel_format = PixelFormat(found.vision_config.image_size, mean, std, resample=resample)
        self.max_length = found.text_config.max_position_embeddings
        check_ids(self.tokenizer("a").input_ids, found.text_config.vocab_size, folder)
        if self.kind == "clip":
            self._check_end(found, where, folder)
        self._macs: dict[object, int] = {}
        self._features = str(folder), "patches" if self.similarity == "match" else "pooled"
        self.store = None
        if self.config.store is not None:
            model = f"{self.kind}, {self._features[1]}, {files_digest([folder / 'config.json', *weight_files(folder)])}"
            self.store = FeatureStore(self.config.store, model, self.pixel_format)

    def _check_end(self, found, where: str, folder: Path) -> None:
        closing, expected = self.tokenizer.eos_token_id, found.text_config.eos_token_id
        if closing not in self.tokenizer("a").input_ids:
            raise ValueError(f"the tokenizer in '{folder}' must close a text with its end token")
        if expected not in (2, closing):  # 2, as in OpenAI's: the text is read off where its largest id stands
            raise ValueError(f"{where}: eos_token_id is {expected}, but the tokenizer closes a text with {closing}")

    # --- scores -----------------------------------------------------------------------------------------------------

    def pixel_formats(self, backbone: Backbone) -> tuple[PixelFormat, ...]:
        return (self.pixel_format,)

    def looks_at(self, info: VideoInfo) -> Sequence[int]:
        return () if self.store is not None and self.store.path(info).is_file() else info.candidates

    @torch.no_grad()
    def score(
        self, video: VideoInFlight, queries: Sequence[FrameQuery], compressor: Compressor | None = None
    ) -> list[Tensor]:
        """Frames are embedded once, for all questions."""
        seen, scores = self._seen(video, video.candidates), []
        for query in queries:
            with video.ledger.charge(query.work):
                scores.append(self._scores(seen, query))
        return scores

    @torch.no_grad()
    def score_some(self, video: VideoInFlight, query: FrameQuery, places: Sequence[int]) -> Tensor:
        with video.ledger.charge(query.work):
            return self._scores(self._seen(video, [video.candidates[i] for i in places]), query)

    @torch.no_grad()
    def embed(self, video: VideoInFlight, query: FrameQuery) -> Embeddings:
        """Unit vectors; of BLIP those of its two towers."""
        seen = self._seen(video, video.candidates)
        with video.ledger.charge(query.work):
            text = normalize(self._text(query), dim=-1)
        return Embeddings(normalize(self._pooled(seen), dim=-1).float().cpu(), text.float().cpu())

    def _seen(self, video: VideoInFlight, frames: Sequence[int]) -> Tensor:
        """(T, …): features of frames, from the store where it has them."""
        self.to(video.backbone.device)
        stored = None if self.store is None else self.store.read(video.info)
        if stored is not None:
            return torch.stack([stored[frame] for frame in frames]).to(self.clip.device)
        options = self.pixel_format, self.config.batch_size, self._frame_macs()
        seen = video.features(self._features, frames, self._embed_frames, *options)
        if self.store is not None and tuple(frames) == tuple(video.candidates):
            self.store.write(video.info, seen)
        return seen

    def _scores(self, seen: Tensor, query: FrameQuery) -> Tensor:
        """(T,) on the CPU."""
        if self.similarity == "match":
            parts = seen.split(self.config.batch_size)
            return torch.cat([self._matches(part, query) for part in parts]).float().cpu()
        frames, text = self._pooled(seen), self._text(query)
        if self.similarity == "dot":
            return (frames @ text.T)[:, 0].float().cpu()
        cosines = (normalize(frames, dim=-1) @ normalize(text, dim=-1).T)[:, 0]
        if self.similarity == "logits":
            cosines = cosines * self.clip.logit_scale.exp() + getattr(self.clip, "logit_bias", 0.0)
        return cosines.float().cpu()

    # --- the models -------------------------------------------------------------------------------------------------

    def _embed_frames(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (t, 3, h, w) → features as the tower leaves them: (t, E), or of patches (t, P, E)."""
        if self.kind != "blip":
            return self.clip.get_image_features(pixel_values=pixels).pooler_output
        patches = self.clip.vision_model(pixel_values=pixels).last_hidden_state
        return patches if self.similarity == "match" else self.clip.vision_proj(patches[:, 0])

    def _pooled(self, seen: Tensor) -> Tensor:
        """(T, E)."""
        return self.clip.vision_proj(seen[:, 0]) if seen.ndim == 3 else seen

    def _text(self, query: FrameQuery) -> Tensor:
        """(1, E): the question's embedding; of one that is too long, of its beginning or the mean over pieces."""
        ids, mask = self._ids(query.question, self.config.long_text == "mean")
        rows = self._counted(("text", tuple(ids.shape)), lambda: self._embed_text(ids, mask), query)
        return rows if len(rows) == 1 else normalize(rows, dim=-1).mean(0, keepdim=True)

    def _embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.kind == "blip":
            hidden = self.clip.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            return self.clip.text_proj(hidden[:, 0])
        # SigLIP was trained without a mask: padding is seen.
        mask = {} if self.kind == "siglip" else {"attention_mask": mask}
        return self.clip.get_text_features(input_ids=ids, **mask).pooler_output

    def _matches(self, patches: Tensor, query: FrameQuery) -> Tensor:
        """(t,): the probability that picture and question belong together."""
        ids, mask = self._ids(query.question, False)

        def run(patches: Tensor) -> Tensor:
            count = len(patches)
            seen = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
            text = {"input_ids": ids.expand(count, -1), "attention_mask": mask.expand(count, -1)}
            hidden = self.clip.text_encoder(
                **text, encoder_hidden_states=patches, encoder_attention_mask=seen
            ).last_hidden_state
            return self.clip.itm_head(hidden[:, 0]).softmax(-1)[:, 1]

        key = "match", ids.shape[1]
        if key not in self._macs:
            self._macs[key] = count_macs(lambda: run(patches[:1]))[1]
        query.work.macs += self._macs[key] * len(patches)
        return run(patches)

    def _ids(self, question: str, pieces: bool) -> tuple[Tensor, Tensor]:
        """Token ids and mask (pieces, S) of a question."""
        options = {"truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        if self.kind == "siglip":
            options["padding"] = "max_length"
        texts = self._pieces(question) if pieces else [question]
        if len(texts) > 1:
            options["padding"] = "max_length"
        found = self.tokenizer(texts, **options).to(self.clip.device)
        mask = found.get("attention_mask")
        return found.input_ids, torch.ones_like(found.input_ids) if mask is None else mask

    def _pieces(self, question: str) -> list[str]:
        """The question cut into texts that the tower can read whole."""
        ids = self.tokenizer(question, add_special_tokens=False).input_ids
        room = max(1, self.max_length - self.tokenizer.num_special_tokens_to_add())
        if len(ids) <= room:
            return [question]
        return [self.tokenizer.decode(ids[i : i + room]) for i in range(0, len(ids), room)]

    # --- cost -------------------------------------------------------------------------------------------------------

    def _counted(self, key: object, run: Callable[[], Tensor], query: FrameQuery) -> Tensor:
        """What ``run()`` gives; its MACs go to the query. Counting is slow: it is done once for texts of a shape."""
        if key not in self._macs:
            self._macs[key] = count_macs(run)[1]
        query.work.macs += self._macs[key]
        return run()

    def _frame_macs(self) -> int:
        """MACs of embedding one frame."""
        if "frame" not in self._macs:
            pixels = torch.zeros(1, 3, *self.pixel_format.largest, device=self.clip.device, dtype=self.clip.dtype)
            self._macs["frame"] = count_macs(lambda: self._embed_frames(pixels))[1]
        return self._macs["frame"]

    @torch.no_grad()
    def cost(
        self, backbone: Backbone, num_frames: int, query: FrameQuery, compressor: Compressor
    ) -> SelectionCost | None:
        asked = FrameQuery(query.question, query.prompt)
        if self.similarity == "match":
            size = torch.zeros(1, 3, *self.pixel_format.largest, device=self.clip.device)
            self._matches(self._embed_frames(size), asked)
            asked.work.macs *= num_frames
        else:
            self._text(asked)
        return SelectionCost(0, num_frames * self._frame_macs(), asked.work.macs)

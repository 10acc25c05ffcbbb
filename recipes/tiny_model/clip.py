"""Train the tiny CLIP of the clip_similarity selector: needle frames against questions and captions about them.

    python recipes/tiny_model/clip.py runs/tiny-tokenizer runs/tiny-clip

Symmetric contrastive loss of CLIP (arXiv 2103.00020): every batch holds frames with a symbol and one text about each;
frames without a symbol are further wrong answers for every text. Texts that several frames of a batch answer to count
as right for all of them. Frames come from the training split's renderer and lose detail as the backbone's do.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import log_softmax, normalize
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from xcomp.benchmarks.needle import Needle, make_spec, render
from xcomp.pixels import PixelFormat

SIZE, PATCH, STEPS, BATCH, RATE, SEED = 40, 8, 1500, 128, 1e-3, 11
NUM_VIDEOS, POOL = 600, 24  # videos, frames of each


def frames_and_symbols() -> tuple[torch.Tensor, list[list[tuple[str, str, str]]]]:
    """(n, H, W, 3) uint8 frames, and the (symbol, colour, place) visible in each."""
    config = Needle.Config(split="train", seed=SEED, num_videos=NUM_VIDEOS, seconds=32.0)
    rng, frames, symbols = np.random.default_rng(SEED), [], []
    for index in range(NUM_VIDEOS):
        spec = make_spec(config, index)
        inside = [i for e in spec.events for i in range(e.start, e.stop)]
        outside = [i for i in range(spec.num_frames) if i not in inside]
        chosen = [*rng.choice(inside, POOL * 2 // 3), *rng.choice(outside, POOL // 3)]
        frames.append(torch.from_numpy(render(spec)[chosen]))
        for i in chosen:
            symbols.append([(e.symbol, e.colour, e.place) for e in spec.events if e.start <= i < e.stop])
    return torch.cat(frames), symbols


def ask(rng: np.random.Generator, symbol: str, colour: str, place: str) -> tuple[str, tuple[str | None, str | None]]:
    """A text about an event, and which (symbol, colour) a frame must show to answer to it (None: any)."""
    kind = rng.integers(5)
    if kind == 0:
        return f"What colour is the {symbol}?", (symbol, None)
    if kind == 1:
        return f"Where on the screen is the {symbol}?", (symbol, None)
    if kind == 2:
        return f"Which symbol is {colour}?", (None, colour)
    if kind == 3:
        return "Which symbol appears first?", (None, None)
    return f"{colour} {symbol} {place}", (symbol, colour)


def matches(wanted: tuple[str | None, str | None], visible: list[tuple[str, str, str]]) -> bool:
    return any(wanted[0] in (None, symbol) and wanted[1] in (None, colour) for symbol, colour, _ in visible)


def clip_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    """The tiny model's vocabulary, with the end token that CLIP reads a text at."""
    backend = Tokenizer.from_file(f"{folder}/tokenizer.json")
    end = "<|endoftext|>"
    backend.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, backend.token_to_id(end))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end, model_max_length=64)


def make_model(tokenizer) -> CLIPModel:
    tower = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4, projection_dim=64)
    text = dict(tower, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=64,
                bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id)  # fmt: skip
    vision = dict(tower, num_hidden_layers=4, image_size=SIZE, patch_size=PATCH)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def loss_of(model: CLIPModel, pixels: torch.Tensor, text: dict, right: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in both directions against the pairs (texts, images) that are right, equally weighted."""
    images = normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    words = normalize(model.get_text_features(**text).pooler_output, dim=-1)
    logits = model.logit_scale.exp().clamp(max=100) * words @ images.T
    to_images = -(log_softmax(logits, 1) * right).sum(1) / right.sum(1)
    answered = right.any(0)  # frames without a symbol have no text of their own
    to_texts = -(log_softmax(logits, 0) * right).sum(0)[answered] / right.sum(0)[answered]
    return (to_images.mean() + to_texts.mean()) / 2


def main(tokenizer_folder: str, folder: Path) -> None:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    tokenizer = clip_tokenizer(tokenizer_folder)
    frames, symbols = frames_and_symbols()
    mean, std = CLIPImageProcessorPil().image_mean, CLIPImageProcessorPil().image_std
    pixels = PixelFormat(SIZE, mean, std)(frames)
    shown = [i for i, s in enumerate(symbols) if s]
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    for step in range(STEPS):
        texts_of = rng.choice(shown, BATCH // 2)
        images = [*texts_of, *rng.integers(len(symbols), size=BATCH // 2)]
        asked = [ask(rng, *symbols[i][rng.integers(len(symbols[i]))]) for i in texts_of]
        right = torch.tensor([[matches(wanted, symbols[i]) for i in images] for _, wanted in asked])
        text = tokenizer([t for t, _ in asked], padding=True, return_tensors="pt")
        loss = loss_of(model, pixels[images], text, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1} loss {loss.item():.3f}", flush=True)
    save(model, tokenizer, folder)


def save(model: CLIPModel, tokenizer, folder: Path) -> None:
    """A folder that transformers' CLIPModel, AutoTokenizer and image processor load; float16 weights."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

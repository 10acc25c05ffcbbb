"""Pretrain the tiny model's vision path: what symbols a clip shows, read from its merged tokens.

    python recipes/tiny_model/vision.py runs/tiny-tokenizer runs/tiny-vision

A language model that starts together with its eyes learns little in minutes on a processor. So the vision tower and
the projector come first: for each symbol, a learnt query attends over a clip's 64 merged tokens, and what it
gathers tells whether the symbol is there, in which colour and where. The heads are thrown away; the checkpoint written
is a whole VideoChat-Flash with a random language model, which `xcomp tune tiny_model/1_clips` goes on from.
"""

import sys
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import xcomp
from xcomp.benchmarks.needle import COLOURS, PLACES, SYMBOLS, Needle, make_spec, render

STEPS, BATCH, RATE, SEED = 900, 48, 2e-3, 10
NUM_CLIPS = 8000
# VideoChat-Flash with everything small: 40-pixel frames of 5×5 patches, clips of 4 frames whose 100 tokens merge to 64.
ARCHITECTURE = {
    "architectures": ["VideoChatFlashQwenForCausalLM"],
    "model_type": "videochat_flash_qwen",
    "vocab_size": 480,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.04,
    "tie_word_embeddings": True,
    "mm_vision_tower": "umt-large",
    "mm_vision_select_layer": -2,
    "mm_projector_type": "tome16_mlp_hd64",
    "mm_hidden_size": 96,
    "mm_local_num_frames": 4,
    "vision_config": {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 40,
        "patch_size": 8,
    },
}
ABSENT = len(COLOURS)


class Readout(nn.Module):
    """One query a symbol over a clip's tokens (B, S, D) → logits of colour (or absent) and place, (B, symbols, …)."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(len(SYMBOLS), width) * width**-0.5)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        self.place = nn.Linear(width, len(PLACES))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.norm(tokens)
        gathered, _ = self.attention(self.queries.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)
        return self.colour(gathered), self.place(gathered)


def clips() -> tuple[Tensor, Tensor, Tensor]:
    """Frames (n, 4, H, W, 3) uint8 of half-second clips; colour (or absent) and place (−100: none) of each symbol."""
    world = {"seconds": 0.5, "event_seconds": 0.5, "distractors": 2}
    config = Needle.Config(split="train", seed=SEED, num_videos=NUM_CLIPS, **world)
    frames, colours, places = [], [], []
    for index in range(NUM_CLIPS):
        spec = make_spec(config, index)
        shown = {e.symbol: e for e in spec.events}
        frames.append(torch.from_numpy(render(spec)))
        colours.append([list(COLOURS).index(shown[s].colour) if s in shown else ABSENT for s in SYMBOLS])
        places.append([PLACES.index(shown[s].place) if s in shown else -100 for s in SYMBOLS])
    return torch.stack(frames), torch.tensor(colours), torch.tensor(places)


def scores(readout: Readout, tokens: Tensor, colours: Tensor, places: Tensor) -> str:
    """Share of symbols whose colour (present ones, absent ones) and place are read right."""
    said_colour, said_place = (logits.argmax(-1) for logits in readout(tokens))
    shown = colours != ABSENT
    parts = {
        "colour": (said_colour == colours)[shown],
        "absent": (said_colour == colours)[~shown],
        "place": (said_place == places)[shown],
    }
    return ", ".join(f"{name} {right.float().mean():.3f}" for name, right in parts.items())


@torch.no_grad()
def match_words(backbone, pixels: Tensor) -> None:
    """Centre the visual tokens and give them the length of word embeddings, by the projector's last layer.

    Left as they are, their common part (of ten times a word's length) drowns the words in the first layer's attention.
    """
    tokens, last = backbone.encode(pixels).flatten(0, 1), backbone.projector.mlp[2]
    centre = tokens.mean(0)
    words = backbone.language_model.embed_tokens.weight.norm(dim=-1).mean()
    scale = words / (tokens - centre).norm(dim=-1).mean()
    last.weight.mul_(scale)
    last.bias.sub_(centre).mul_(scale)


def main(tokenizer: str, folder: str) -> None:
    torch.manual_seed(SEED)
    backbone = xcomp.load_backbone("videochat_flash", architecture=ARCHITECTURE, tokenizer=tokenizer)
    frames, colours, places = clips()
    pixels = backbone.preprocess(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    held_out = slice(NUM_CLIPS - 400, None)
    readout = Readout(ARCHITECTURE["hidden_size"])
    parameters = [*backbone.vision_tower.parameters(), *backbone.projector.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    started = time.time()
    for step in range(1, STEPS + 1):
        chosen = torch.randint(NUM_CLIPS - 400, (BATCH,))
        tokens = backbone.encode(pixels[chosen].flatten(0, 1)).unflatten(0, (BATCH, -1)).flatten(1, 2)
        colour, place = readout(tokens)
        loss = cross_entropy(colour.flatten(0, 1), colours[chosen].flatten())
        loss = loss + cross_entropy(place.flatten(0, 1), places[chosen].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            with torch.no_grad():
                tokens = backbone.encode(pixels[held_out].flatten(0, 1)).unflatten(0, (400, -1)).flatten(1, 2)
                held = scores(readout, tokens, colours[held_out], places[held_out])
            print(f"step {step}: loss {loss.item():.3f}; held out: {held} ({time.time() - started:.0f} s)", flush=True)
    match_words(backbone, pixels[held_out].flatten(0, 1))
    backbone.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:3])

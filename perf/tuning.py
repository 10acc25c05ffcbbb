"""What batches of like length save: the share of padding, and processor seconds of a training step, with and without.

    python perf/tuning.py                 # padding of 71,927 records; seconds of a small model, in turns
    python perf/tuning.py --records 5000 --steps 10

Lengths are made up after the released mixture: how many of its records are pictures, short clips, GIFs, folders of
frames and videos of each length follows from the names and amounts of its entries (records without a number in their
entry's name are taken for pictures), frames from the released sampling rule (8 a second, 128 to 1,024), tokens are 16 a
frame. Lengths within an entry and of texts are assumptions (uniform, and log-normal around 60 tokens). ``told``: which
records say how long their videos are: all; those of LLaVA-Video, as in the released files; these, and of the others
their source its mean (``seconds``); none. What nobody tells counts as 1,024 frames.

Seconds: the training step (forward, backward) of a random language model (4 layers, width 32, 8 tokens a frame) on a
sixteenth of the frames, with and without LP-Comp; of the process's processors, as other work may share the machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace

import torch
from measure import about, write

from xcomp import load_compressor
from xcomp.backbone import ShownVideo
from xcomp.config import Sampling
from xcomp.data.module import Sample
from xcomp.data.order import EpochOrder, estimated_tokens
from xcomp.data.records import Conversation, tokenise
from xcomp.model import VideoQA
from xcomp.tiny import tiny_backbone

# Kind, share of the records, shortest and longest in seconds, frames a second of the file.
MIXTURE = [
    ("image", 0.250, 0, 0, 0),
    ("clip", 0.142, 3, 15, 25),
    ("gif", 0.030, 15, 80, 1),
    ("folder", 0.092, 30, 200, 1),
    ("0_30_s", 0.216, 5, 30, 25),
    ("30_60_s", 0.097, 30, 60, 25),
    ("1_2_m", 0.089, 60, 120, 25),
    ("2_3_m", 0.084, 120, 180, 25),
]
RELEASED = Sampling(rate=8, min_frames=128, max_frames=1024, multiple=8, style="xcomp_training")
TOKENS, SCALE = 16, 16


def records(count: int, noise: random.Random) -> tuple[list[Conversation], list[int]]:
    """Made-up records, and the frames that each shows."""
    found, frames = [], []
    kinds = noise.choices(MIXTURE, [share for _, share, *_ in MIXTURE], k=count)
    for kind, _, least, most, fps in kinds:
        text = "x" * 4 * max(8, round(noise.lognormvariate(4.1, 0.8)))
        turns = (("", text),)
        if kind == "image":
            found.append(Conversation(None, turns, images=("i.png",)))
            frames.append(1)
            continue
        seconds = noise.uniform(least, most)
        read_type = {"gif": "gif", "folder": "img"}.get(kind, "decord")
        found.append(Conversation(kind, turns, duration=seconds, read_type=read_type))
        frames.append(len(RELEASED.candidates(int(seconds * fps), fps)))
    return found, frames


def estimates(found: list[Conversation], told: str) -> list[int]:
    means = {kind: (least + most) / 2 for kind, _, least, most, _ in MIXTURE if kind in ("clip", "gif", "folder")}
    untold = {
        "all": {},
        "LLaVA-Video": dict.fromkeys(means),
        "LLaVA-Video, and means": means,
        "none": {kind: None for kind, *_ in MIXTURE},
    }[told]
    known = [replace(c, duration=untold[c.video]) if c.video in untold else c for c in found]
    return [estimated_tokens(c, None, RELEASED, TOKENS) for c in known]


def orders(lengths: list[int], size: int, seed: int) -> dict[str, list[list[int]]]:
    """Batches of an epoch in either order, a step of 32 records."""
    made = {}
    for name, given in (("random", None), ("by length", lengths)):
        order = list(EpochOrder(lengths, size, accumulated=max(1, 32 // size), seed=seed, lengths=given))
        made[name] = [order[i : i + size] for i in range(0, len(order), size)]
    return made


def padding(options: argparse.Namespace) -> list[dict[str, object]]:
    found, frames = records(options.records, random.Random(options.seed))
    tokens = [n * TOKENS + len(c.turns[0][1]) // 4 for c, n in zip(found, frames)]
    lengths = {told: estimates(found, told) for told in ("all", "LLaVA-Video, and means", "LLaVA-Video", "none")}
    rows = []
    for size in (2, 4, 8, 16, 32):
        for told in lengths:
            row = {"measured": "padding", "records": len(found), "batch_size": size, "told": told}
            for name, batches in orders(lengths[told], size, options.seed).items():
                padded = sum(max(tokens[i] for i in batch) * len(batch) for batch in batches)
                real = sum(tokens[i] for batch in batches for i in batch)
                row[f"padding_{name.replace(' ', '_')}"] = round(1 - real / padded, 4)
            rows.append(row)
            print(row)
    return rows


def samples(found: list[Conversation], frames: list[int], backbone) -> list[Sample]:
    made = []
    for conversation, count in zip(found, frames):
        images = bool(conversation.images)
        count = 1 if images else max(2, count // SCALE // 2 * 2)
        short = Conversation(
            conversation.video, (("Q", conversation.turns[0][1][: 240 // SCALE]),), images=conversation.images
        )
        text = tokenise(backbone, short, None if images else ShownVideo(1.0, count))
        made.append(Sample(torch.zeros(count, 3, 2, 2, dtype=torch.uint8), text, images))
    return made


def seconds(options: argparse.Namespace) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    rows = []
    for size in (4, 8):
        found, frames = records(32 * options.steps, random.Random(options.seed))
        for compressor in ("none", "lp_comp"):
            backbone = tiny_backbone()
            model = VideoQA(backbone, load_compressor(compressor), sampling=Sampling(multiple=2, min_frames=2))
            model.freeze_untrained()
            made = samples(found, frames, backbone)
            made_orders = orders(estimates(found, "LLaVA-Video"), size, options.seed)
            means = orders(estimates(found, "LLaVA-Video, and means"), size, options.seed)
            made_orders["by length and means"] = means["by length"]
            taken: dict[str, list[float]] = {name: [] for name in made_orders}
            for step in range(options.steps):  # in turns: each order's batches of 32 records
                for name, batches in made_orders.items():
                    turns = 32 // size
                    started = time.process_time()
                    for batch in batches[step * turns : (step + 1) * turns]:
                        loss, _ = model._loss([made[i] for i in batch])
                        loss.backward()
                    taken[name].append(time.process_time() - started)
            row = {"measured": "seconds a step of 32 records", "records": len(found), "batch_size": size}
            row |= {"compressor": compressor, "steps": options.steps}
            for name, values in taken.items():
                row[f"seconds_{name.replace(' ', '_')}"] = round(statistics.mean(values), 4)
            rows.append(row)
            print(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=71_927)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = padding(options) + seconds(options)
    write("tuning-data-cpu", [row | about("cpu") for row in rows])


if __name__ == "__main__":
    main()

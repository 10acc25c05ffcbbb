"""Throughput and memory of the vision path: clips in batches against a plain loop over clips.

    python perf/vision.py                      # CPU: a narrow tower, float32
    python perf/vision.py --device cuda        # UMT-L at 448 pixels, bfloat16, random weights

Memory must stay flat in the number of frames: what grows is the result, which is subtracted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import MEGABYTE, about, peak_megabytes, side_by_side, spread, write

import xcomp
from xcomp.backbone import Backbone

TEXT = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 1, "vocab_size": 1000, "tie_word_embeddings": True}  # fmt: skip
TOWERS = {
    "narrow": {"hidden_size": 192, "num_hidden_layers": 5, "num_attention_heads": 4, "image_size": 224,
               "patch_size": 16},
    "umt-hd-large": {},
}  # fmt: skip


def build(tower: str, device: str, dtype: str, clip_batch: int) -> Backbone:
    architecture = TEXT | {
        "mm_vision_tower": "umt-hd-large",
        "mm_vision_select_layer": -2,
        "mm_projector_type": "tome16_mlp_hd64",
        "mm_local_num_frames": 4,
        "max_position_embeddings": 1024,
    }
    if TOWERS[tower]:
        architecture["vision_config"] = TOWERS[tower]
        architecture["mm_hidden_size"] = TOWERS[tower]["hidden_size"]
    torch.manual_seed(0)
    options = {"architecture": architecture, "device": device, "dtype": dtype, "clip_batch": clip_batch}
    return xcomp.load_backbone("videochat_flash", **options).eval()


def frames_of(backbone: Backbone, count: int) -> torch.Tensor:
    """(T, 3, h, w) random pixels: one frame seen ``count`` times, so that the video itself takes no memory."""
    size = backbone.vision_sizes.image_size
    torch.manual_seed(1)
    return torch.randn(3, size, size).to(backbone.device, backbone.dtype).expand(count, -1, -1, -1)


def batched(backbone: Backbone, count: int) -> torch.Tensor:
    """The vision path as every command uses it."""
    with torch.no_grad():
        return backbone.encode(frames_of(backbone, count))


def loop(backbone: Backbone, count: int) -> torch.Tensor:
    """One clip after the other."""
    with torch.no_grad():
        return torch.cat([backbone.encode(clip) for clip in frames_of(backbone, count).split(backbone.clip_frames)])


def prepare(options: dict[str, Any], count: int) -> Callable[[], Any]:
    return partial(batched, build(**options), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tower", choices=TOWERS, help="default: narrow on a CPU, umt-hd-large elsewhere")
    parser.add_argument("--frames", type=int, default=64, help="for the throughput")
    parser.add_argument("--clip-batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    on_cpu = "cpu" in given.device
    tower, dtype = given.tower or ("narrow" if on_cpu else "umt-hd-large"), "float32" if on_cpu else "bfloat16"
    where = about(given.device) | {"tower": tower, "dtype": dtype}
    models = {n: build(tower, given.device, dtype, n) for n in given.clip_batches}
    runs = {f"clip_batch {n}": partial(batched, model, given.frames) for n, model in models.items()}
    first = next(iter(models.values()))
    runs = {"plain loop over clips": partial(loop, first, given.frames)} | runs
    rows = []
    for name, values in side_by_side(runs, given.repeats, given.device).items():
        row = where | {"what": "throughput", "variant": name, "frames": given.frames} | spread(values)
        row["frames_per_second"] = round(given.frames / row["seconds_median"], 2)
        rows.append(row)
        print(f"{name:<24} {row['frames_per_second']:>8} frames/s", flush=True)
    options = {"tower": tower, "device": given.device, "dtype": dtype, "clip_batch": 8}
    for count in (128, 1024):
        peak = peak_megabytes(prepare, options, count, device=given.device)
        result = count * 16 * TEXT["hidden_size"] * (4 if on_cpu else 2) / MEGABYTE
        row = {"what": "memory", "variant": "clip_batch 8", "frames": count, "peak_megabytes": round(peak, 1)}
        rows.append(where | row | {"result_megabytes": round(result, 1)})
        print(f"{count:>5} frames  {peak:8.1f} MB, of which the result {result:.1f} MB", flush=True)
    write(f"vision-{'cpu' if on_cpu else 'cuda'}", rows)


if __name__ == "__main__":
    main()

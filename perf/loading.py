"""Peak memory of loading a checkpoint, against the size of the model that is loaded.

    python perf/loading.py                     # a random checkpoint of 0.8 GB in the released layout, in shards

Tensors are streamed to the wanted type one by one, so little more than the model itself should ever be held.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measure import MEGABYTE, about, peak_megabytes, write

import xcomp

ARCHITECTURE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 50000, "tie_word_embeddings": True, "max_position_embeddings": 32768,
    "mm_vision_tower": "umt-hd-large", "mm_vision_select_layer": -2, "mm_projector_type": "tome16_mlp_hd64",
    "mm_local_num_frames": 4, "mm_hidden_size": 512,
    "vision_config": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "image_size": 224,
                      "patch_size": 16},
}  # fmt: skip


def prepare(folder: str, dtype: str) -> Callable[[], object]:
    xcomp.load_backbone("videochat_flash", checkpoint="tiny")  # what is imported for any model is not the model's
    kept = []  # the model must live until the peak is read
    return lambda: kept.append(xcomp.load_backbone("videochat_flash", checkpoint=folder, dtype=dtype))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows, where = [], about("cpu")
    with tempfile.TemporaryDirectory() as folder:
        backbone = xcomp.load_backbone("videochat_flash", architecture=ARCHITECTURE, dtype="bfloat16")
        numbers = sum(p.numel() for p in backbone.parameters())
        backbone.save_pretrained(str(Path(folder) / "model"))
        del backbone
        for dtype in ("bfloat16", "float32"):
            size = numbers * torch.finfo(getattr(torch, dtype)).bits / 8 / MEGABYTE
            peak = peak_megabytes(prepare, str(Path(folder) / "model"), dtype)
            row = {"what": "loading", "stored": "bfloat16", "loaded": dtype, "model_megabytes": round(size, 1)}
            rows.append(where | row | {"peak_megabytes": round(peak, 1), "of_model": round(peak / size, 4)})
            print(f"bfloat16 → {dtype:<9} model {size:8.1f} MB, peak {peak:8.1f} MB, {peak / size:.3f}", flush=True)
    write("loading-cpu", rows)


if __name__ == "__main__":
    main()

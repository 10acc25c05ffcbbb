"""What every compressor costs itself, beside the prefill that it saves.

    nice python perf/compressors.py                       # CPU: four layers of width 896, float32
    python perf/compressors.py --device cuda              # 28 layers, bfloat16

One video of random tokens (a random walk from frame to frame, every patch at its own pace) through a random Qwen2; the
tower's features are random too. *own*: the seconds spent in ``compress`` and in the rules between layers, attention
that a rule asks for included, and the memory that these take beyond what is there when they are called. *prefill*: the
whole pass, own work included. Runs are taken in turns after a warm-up; memory is measured in a pass of its own.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import MEGABYTE, about, seconds, spread, wait, write
from transformers import Qwen2Config, Qwen2Model

import xcomp
from xcomp.backbone import Backbone
from xcomp.compressor import RULES, Compressor, defines
from xcomp.cost import count_macs
from xcomp.decoder import Decoder
from xcomp.registry import plugins
from xcomp.visual import TOWER_FEATURES, VisualTokens

PREFIX, SUFFIX = 14, 40  # text tokens before and after the video
KEEP = 0.25


class LanguageModel(Backbone):
    """A random Qwen2; visual tokens and what a tower tells of them are made up."""

    @dataclass
    class Config:
        width: int = 896
        intermediate: int = 1792
        layers: int = 4
        tokens: int = 64
        device: str = "cpu"
        dtype: str = "float32"

    clip_frames, tower_features = 1, tuple(TOWER_FEATURES)

    def __init__(self, config: Config):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": config.width, "intermediate_size": config.intermediate, "vocab_size": 1000}
        heads = {"num_attention_heads": config.width // 64, "num_key_value_heads": 2}
        text = Qwen2Config(**sizes, **heads, num_hidden_layers=config.layers, max_position_embeddings=2**20)
        text._attn_implementation = "sdpa"
        side = round(config.tokens**0.5)
        self.tokens_per_frame, self.grid = config.tokens, (side, config.tokens // side)
        with torch.device(config.device):
            self.language_model = Qwen2Model(text)
            self.lm_head = torch.nn.Linear(config.width, 1000, bias=False)
        self.to(getattr(torch, config.dtype))


def video(backbone: LanguageModel, frames: int) -> VisualTokens:
    """A random walk, and random numbers in place of a tower's."""
    g, count, width = torch.Generator().manual_seed(1), backbone.tokens_per_frame, backbone.text_config.hidden_size
    steps = torch.randn(frames, count, width, generator=g)
    steps[1:] *= 0.5 * torch.rand(1, count, 1, generator=g)
    n, place = frames * count, {"device": backbone.device}
    tower = {name: torch.rand(n, generator=g).to(**place) for name in TOWER_FEATURES}
    tower |= {"keys": torch.randn(n, 64, generator=g).to(**place)}
    tower |= {"frame": torch.randn(frames, 64, generator=g).cumsum(0).to(**place)}
    return VisualTokens.from_frames(steps.cumsum(0).to(backbone.device, backbone.dtype), backbone.grid, tower)


class Watched:
    """A decoder whose compressor's own work is timed, or its memory taken."""

    def __init__(self, backbone: LanguageModel, rule: Compressor, given: VisualTokens, device: str):
        self.rule, self.given, self.device = rule, given, device
        self.ids = torch.arange(PREFIX), torch.arange(SUFFIX)
        self.decoder = Decoder(backbone, rule)
        self.seconds, self.peak, self.memory = 0.0, 0.0, False
        for method in ("compress", *(method for method in RULES if defines(rule, method))):
            setattr(rule, method, self._watching(getattr(rule, method)))

    def _watching(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            found = []
            if self.memory:
                with growth(self.device) as grown:
                    found.append(method(*args))
                self.peak = max(self.peak, *grown)
            else:
                self.seconds += seconds(lambda: found.append(method(*args)), self.device)
            return found[0]

        return watched

    @torch.no_grad()
    def prefill(self) -> Any:
        self.seconds = self.peak = 0.0
        return self.decoder.prefill(self.given, *self.ids)

    def counted(self) -> tuple[int, int, float]:
        """Own MACs, those of the language model, and the share of tokens held, mean over layers; ``peak`` is set."""
        self.memory = True
        state = self.prefill()
        own = count_macs(lambda: self.decoder.compress(self.given, self.ids[1]))[1] + state.rule_macs[0]
        held = sum(state.tokens_per_layer) / len(state.tokens_per_layer) / len(self.given)
        return own, self.decoder.prefill_macs(state, PREFIX, SUFFIX), held


@contextmanager
def growth(device: str) -> Iterator[list[float]]:
    """Megabytes by which memory grew at most meanwhile."""
    found: list[float] = []
    if device.startswith("cuda"):
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append((torch.cuda.max_memory_allocated(device) - before) / MEGABYTE)
        return
    _return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is held now
    before = _kilobytes("VmRSS")
    yield found
    found.append(max(0, _kilobytes("VmHWM") - before) / 1024)


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _return_freed_memory() -> None:
    """Have glibc give back what is free: else it is used again, and nothing grows."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--layers", type=int, help="default: 4 on a CPU, 28 elsewhere")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of compressors; default: all")
    parser.add_argument("--note", default="", help="what else ran, for the rows")
    given = parser.parse_args()
    on_cpu = "cpu" in given.device
    layers, dtype = given.layers or (4 if on_cpu else 28), "float32" if on_cpu else "bfloat16"
    backbone = LanguageModel(LanguageModel.Config(layers=layers, device=given.device, dtype=dtype)).eval()
    tokens, runs, rows = video(backbone, given.frames), {}, {}
    size = {"dtype": dtype, "frames": given.frames, "tokens": len(tokens), "layers": layers, "note": given.note}
    for name in ["none", *(name for name in given.only or plugins("compressor") if name != "none")]:
        for setting, options in (("default", {}), (f"keep {KEEP}", {"budget": {"keep": KEEP, "of": "layers"}})):
            key = name, setting
            rows[key] = about(given.device) | size | {"compressor": name, "setting": setting}
            try:
                runs[key] = Watched(backbone, xcomp.load_compressor(name, **options), tokens, given.device)
            except ValueError as error:
                rows[key]["refused"] = str(error)
    runs["none", "default"].prefill()
    taken: dict[Any, list[tuple[float, float]]] = {key: [] for key in runs}
    for _ in range(given.repeats):
        for key, run in runs.items():
            whole = seconds(run.prefill, given.device)
            taken[key].append((run.seconds, whole))
    uncompressed = median(whole for _, whole in taken["none", "default"])
    for key, run in runs.items():
        own, macs, held = run.counted()
        prefill = median(whole for _, whole in taken[key])
        rows[key] |= {"held": round(held, 4)} | spread([mine for mine, _ in taken[key]])
        rows[key] |= {"own_peak_megabytes": round(run.peak, 1), "prefill_seconds": round(prefill, 4)}
        rows[key] |= {"saved_seconds": round(uncompressed - prefill, 4)}
        rows[key] |= {"own_gigamacs": round(own / 1e9, 4), "model_gigamacs": round(macs / 1e9, 2)}
    print(f"{'':<30} held   own s  own MB  prefill s  saved s  own GMAC  model GMAC")
    for (name, setting), row in rows.items():
        if "refused" in row:
            print(f"{name + ', ' + setting:<30} refused: {row['refused']}")
            continue
        print(
            f"{name + ', ' + setting:<30} {row['held']:.3f} {row['seconds_median']:>7.3f} "
            f"{row['own_peak_megabytes']:>7.1f} {row['prefill_seconds']:>10.3f} {row['saved_seconds']:>8.3f} "
            f"{row['own_gigamacs']:>9.3f} {row['model_gigamacs']:>11.1f}"
        )
    write(f"compressors-{'cpu' if on_cpu else 'cuda'}", list(rows.values()))


if __name__ == "__main__":
    main()

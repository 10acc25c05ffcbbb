"""Prefill of the language model: seconds and memory, without compression and with LP-Comp.

    python perf/decoder.py                                # CPU, narrow model, float32
    python perf/decoder.py --device cuda                  # Qwen2-1.5B shapes, bfloat16, random weights

Measured: a prefill at several frame counts (16 tokens a frame); a question on a stored video against the prefill of the
whole; seconds and peak memory of a tuning step. MACs beside it are computed from shapes. The paper's Table E (one H200,
the language-model part of an LVBench query: 0.12, 0.25 and 0.66 s at 1,024, 2,048 and 4,096 frames) is printed beside
figures of a GPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measure import about, peak_megabytes, side_by_side, spread, write
from transformers import Qwen2Config, Qwen2Model

import xcomp
from xcomp.backbone import Backbone
from xcomp.cost import LLMShape, pass_cost, planned_layers
from xcomp.decoder import Decoder

TOKENS = 16  # a frame
PREFIX, SUFFIX = 14, 120  # text tokens before and after the video
TABLE_E = {1024: 0.12, 2048: 0.25, 4096: 0.66}
SIZES = {
    "narrow": dict(hidden_size=128, intermediate_size=512, num_hidden_layers=28, num_attention_heads=2,
                   num_key_value_heads=1, vocab_size=1000),
    "medium": dict(hidden_size=512, intermediate_size=2816, num_hidden_layers=28, num_attention_heads=8,
                   num_key_value_heads=2, vocab_size=1000),
    "qwen2-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                       num_key_value_heads=2, vocab_size=151936),
}  # fmt: skip
VARIANTS = {
    "none": ("none", "off"),
    "lp_comp": ("lp_comp", "off"),
    "lp_comp, drop_early=output": ("lp_comp", "output"),
    "lp_comp, drop_early=query": ("lp_comp", "query"),
}


class LanguageModel(Backbone):
    """A random Qwen2 that takes visual tokens as they are: there is no vision path in what is measured."""

    @dataclass
    class Config:
        size: str = "narrow"
        device: str = "cpu"
        dtype: str = "float32"
        attention: str = "sdpa"

    tokens_per_frame, clip_frames = TOKENS, 1

    def __init__(self, config: Config):
        super().__init__()
        torch.manual_seed(0)
        text = Qwen2Config(**SIZES[config.size], max_position_embeddings=2**20, tie_word_embeddings=True)
        text._attn_implementation = config.attention
        with torch.device(config.device):
            self.language_model = Qwen2Model(text)
            self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.lm_head.weight = self.language_model.embed_tokens.weight
        self.language_model.to(getattr(torch, config.dtype))


def video(backbone: Backbone, frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens of ``frames``, prefix and suffix ids."""
    torch.manual_seed(frames)
    tokens = torch.randn(frames, TOKENS, backbone.text_config.hidden_size).to(backbone.device, backbone.dtype)
    return tokens, torch.arange(PREFIX), torch.arange(SUFFIX)


def prefill(decoder: Decoder, inputs: tuple) -> None:
    with torch.no_grad():
        decoder.prefill(*inputs)


def prepare_prefill(options: dict[str, str], variant: str, frames: int) -> Callable[[], None]:
    backbone = LanguageModel(LanguageModel.Config(**options)).eval()
    return partial(prefill, _decoder(backbone, variant), video(backbone, frames))


def prepare_tuning(options: dict[str, str], variant: str, frames: int) -> Callable[[], None]:
    """A forward and backward pass through the language model, every parameter of it trained."""
    backbone = LanguageModel(LanguageModel.Config(**options)).train()
    for parameter in backbone.parameters():
        parameter.grad = torch.zeros_like(parameter)
    decoder, inputs = _decoder(backbone, variant), video(backbone, frames)

    def step() -> None:
        decoder.logits(*inputs, [16]).float().logsumexp(-1).sum().backward()

    return step


def _decoder(backbone: Backbone, variant: str) -> Decoder:
    name, drop_early = VARIANTS[variant]
    return Decoder(backbone, xcomp.load_compressor(name), drop_early=drop_early)


def macs(backbone: Backbone, variant: str, frames: int) -> int:
    """Multiply-accumulates as they are run: attention causally."""
    name, drop_early = VARIANTS[variant]
    plan = xcomp.load_compressor(name).plan(backbone.num_layers, TOKENS)
    layers = planned_layers(plan, frames, PREFIX, SUFFIX, drop_early=drop_early)
    return pass_cost(LLMShape.from_config(backbone.text_config), layers, head_positions=1).macs


def measure_prefill(
    options: dict[str, str], frames: int, repeats: int, where: dict[str, Any], variants: list[str], memory: bool
) -> list[dict[str, Any]]:
    device, backbone = options["device"], LanguageModel(LanguageModel.Config(**options)).eval()
    inputs = video(backbone, frames)
    taken = side_by_side(
        {variant: partial(prefill, _decoder(backbone, variant), inputs) for variant in variants}, repeats, device
    )
    del inputs
    rows, base = [], None
    for variant, values in taken.items():
        row = where | {"what": "prefill", "variant": variant, "frames": frames} | spread(values)
        base = base or row["seconds_median"]
        row["of_uncompressed"] = round(row["seconds_median"] / base, 4)
        row["gigamacs"] = round(macs(backbone, variant, frames) / 1e9, 2)
        if memory:
            row["peak_megabytes"] = round(peak_megabytes(prepare_prefill, options, variant, frames, device=device), 1)
        rows.append(row)
        paper = f"   Table E: {TABLE_E[frames]} s" if "cuda" in device and frames in TABLE_E else ""
        print(f"{frames:>5} frames  {variant:<28} {row['seconds_median']:9.3f} s  {row['of_uncompressed']:.3f}  "
              f"{row['gigamacs']:>10} GMAC  {row.get('peak_megabytes', '–'):>8} MB{paper}", flush=True)  # fmt: skip
    return rows


def measure_extend(options: dict[str, str], frames: int, repeats: int, where: dict[str, Any]) -> list[dict[str, Any]]:
    """A question on a stored video, beside the pass over video and question together."""
    backbone = LanguageModel(LanguageModel.Config(**options)).eval()
    decoder, (tokens, prefix, suffix) = _decoder(backbone, "lp_comp, drop_early=output"), video(backbone, frames)
    with torch.no_grad():
        stored = decoder.prefill_video(tokens, prefix)
        runs = {
            "prefill of video and question": lambda: decoder.prefill(tokens, prefix, suffix),
            "question on a stored video": lambda: decoder.extend(stored.fork(), suffix),
        }
        taken = side_by_side(runs, repeats, options["device"])
        whole, extended = (run().logits for run in runs.values())
    error = ((whole - extended).abs().max() / whole.abs().max()).item()
    rows, base = [], None
    for name, values in taken.items():
        row = where | {"what": "extend", "variant": f"lp_comp: {name}", "frames": frames} | spread(values)
        base = base or row["seconds_median"]
        row |= {"of_whole": round(row["seconds_median"] / base, 4), "logits_error": f"{error:.1e}"}
        rows.append(row)
        print(f"{frames:>5} frames  {name:<30} {row['seconds_median']:9.3f} s  {row['of_whole']:.3f}  {error:.1e}")
    return rows


def measure_tuning(options: dict[str, str], frames: int, repeats: int, where: dict[str, Any]) -> list[dict[str, Any]]:
    device, variants = options["device"], ("none", "lp_comp", "lp_comp, drop_early=output")
    peaks = {variant: peak_megabytes(prepare_tuning, options, variant, frames, device=device) for variant in variants}
    taken = side_by_side({variant: prepare_tuning(options, variant, frames) for variant in variants}, repeats, device)
    rows, base = [], None
    for variant, values in taken.items():
        row = where | {"what": "tuning step", "variant": variant, "frames": frames} | spread(values)
        base = base or row["seconds_median"]
        row["of_uncompressed"] = round(row["seconds_median"] / base, 4)
        row["peak_megabytes"] = round(peaks[variant], 1)
        row["peak_of_uncompressed"] = round(peaks[variant] / peaks["none"], 4)
        rows.append(row)
        print(f"{frames:>5} frames  tuning, {variant:<28} {row['seconds_median']:9.3f} s  {row['of_uncompressed']:.3f} "
              f"{row['peak_megabytes']:9.1f} MB  {row['peak_of_uncompressed']:.3f}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=SIZES, help="default: narrow on a CPU, qwen2-1.5b elsewhere")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager", "flash_attention_2"])
    parser.add_argument("--frames", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-prefill", action="store_true", help="seconds of prefills alone, no memory")
    only.add_argument("--only-tuning", action="store_true", help="tuning steps alone")
    parser.add_argument("--tuning-frames", type=int, default=512)
    given, on_cpu = parser.parse_args(), "cpu" in parser.parse_args().device
    options = {
        "size": given.size or ("narrow" if on_cpu else "qwen2-1.5b"),
        "device": given.device,
        "dtype": given.dtype or ("float32" if on_cpu else "bfloat16"),
        "attention": given.attention,
    }
    where = about(given.device) | options
    rows = []
    for frames in () if given.only_tuning else given.frames:
        rows += measure_prefill(options, frames, given.repeats, where, given.variants, not given.only_prefill)
    if not (given.only_prefill or given.only_tuning):
        rows += measure_extend(options, 576, max(given.repeats, 5), where)
    if not given.only_prefill:
        rows += measure_tuning(options, given.tuning_frames, given.repeats, where)
    write(f"decoder-{'cpu' if on_cpu else 'cuda'}", rows)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

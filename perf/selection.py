"""QC-Comp's scoring of one chunk: against its plain prefill, and against the released procedure done plainly.

    python perf/selection.py                              # width 512, 28 layers, 576 frames of 16 tokens, float32, CPU
    python perf/selection.py --size narrow --frames 128   # smaller

Compared, taken in turns: the pass of ``[prefix | chunk | question | header]`` without scores to the same depth; that
with scores (a first question about the chunk); a further question on the stored chunk; and the released procedure done
plainly ("reference"): through all layers, and at every layer and window a whole decoder layer once more on ``[prefix |
window | question]`` with its attention matrix written out; every question needs a pass of its own. The released code
writes an answer besides, which is left out. "reference, counted layers" is given what the procedure leaves lying: it
runs windows only at the layers whose scores count, and stops behind the last of them. Scores of ours and the reference
are compared.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from measure import about, peak_megabytes, seconds, spread, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2Config, Qwen2Model

import xcomp
from xcomp.backbone import Backbone, Prompt, apply_rope, repeat_heads

TOKENS = 16  # a frame
PREFIX, QUESTION, HEADER, SKIPPED = 14, 117, 3, 27  # text tokens; of the question's the first are not scored
SIZES = {
    "narrow": dict(hidden_size=128, intermediate_size=512, num_attention_heads=2, num_key_value_heads=1),
    "medium": dict(hidden_size=512, intermediate_size=2816, num_attention_heads=8, num_key_value_heads=2),
}


class LanguageModel(Backbone):
    """A random Qwen2 of 28 layers that takes visual tokens as they are: vision is no part of what is measured."""

    tokens_per_frame, clip_frames = TOKENS, 1

    def __init__(self, size: str):
        super().__init__()
        torch.manual_seed(0)
        text = Qwen2Config(**SIZES[size], num_hidden_layers=28, vocab_size=1000, max_position_embeddings=2**20)
        text._attn_implementation = "sdpa"
        self.language_model = Qwen2Model(text)
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)


def heads(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, H, S, K), keys and values repeated for the queries' heads."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in parts)
    count = query.shape[1]
    return apply_rope(query, *rotary), repeat_heads(apply_rope(key, *rotary), count), repeat_heads(value, count)


def finish(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    """What a decoder layer does after its attention."""
    hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


@torch.no_grad()
def slow_scores(
    backbone: LanguageModel, selector: Any, rule: Any, tokens: Tensor, prompt: Prompt, *, every_layer: bool
) -> Tensor:
    """(layers, clips) of the layers that count, NaN where a clip has too few windows."""
    config, model = selector.config, backbone.language_model
    counted, plan = selector.layers(backbone.num_layers), rule.plan(backbone.num_layers, TOKENS)
    layers = range(backbone.num_layers) if every_layer else counted
    num_clips = len(tokens) // config.clip_frames
    text = [backbone.embed(ids) for ids in (prompt.prefix_ids, prompt.question_ids, prompt.header_ids)]
    hidden = torch.cat([text[0], tokens.flatten(0, 1), *text[1:]])[None]
    behind = len(prompt.question_ids) + len(prompt.header_ids)
    rows, held = len(prompt.question_ids) - SKIPPED, TOKENS
    scores = []
    for number in range(layers[-1] + 1):
        layer, wanted = model.layers[number], len(plan[number])
        if wanted < held:  # each frame keeps its last tokens
            frames = hidden[:, PREFIX:-behind].unflatten(1, (-1, held))[:, :, held - wanted :].flatten(1, 2)
            hidden, held = torch.cat([hidden[:, :PREFIX], frames, hidden[:, -behind:]], 1), wanted
        if number in layers:
            total, covered = torch.zeros(num_clips), torch.zeros(num_clips)
            size = held * config.clip_frames
            question = hidden[:, -behind : -len(prompt.header_ids)]
            for first in range(0, num_clips - config.window_clips + 1, config.window_stride):
                last = first + config.window_clips
                window = hidden[:, PREFIX + first * size : PREFIX + last * size]
                inside = torch.cat([hidden[:, :PREFIX], window, question], 1)
                rotary = backbone.rotary(torch.arange(inside.shape[1])[None])
                query, key, value = heads(layer, inside, rotary)
                weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
                finish(layer, inside, weights @ value)  # the layer's output, which nobody needs
                seen = weights[0, :, -rows:, PREFIX : PREFIX + window.shape[1]].mean((0, 1))
                total[first:last] += seen.unflatten(0, (config.window_clips, -1)).mean(1)
                covered[first:last] += 1
            needed = config.window_clips // config.window_stride
            scores.append((total / covered).masked_fill(covered < needed, torch.nan))
        rotary = backbone.rotary(torch.arange(hidden.shape[1])[None])
        query, key, value = heads(layer, hidden, rotary)
        hidden = finish(layer, hidden, scaled_dot_product_attention(query, key, value, is_causal=True))
    return torch.stack(scores)[[number - layers[0] for number in counted]]


def prepare(size: str, frames: int, which: str) -> Any:
    """A run of one of the five, ready to be called."""
    backbone = LanguageModel(size).eval()
    selector = xcomp.load_selector("qc_comp", query_bias=SKIPPED)
    rule, layers = xcomp.load_compressor("lp_comp"), selector.layers(backbone.num_layers)
    tokens, prefix = torch.randn(frames, TOKENS, backbone.text_config.hidden_size), torch.arange(PREFIX)
    prompt = Prompt(prefix, torch.arange(QUESTION) + 20, torch.arange(HEADER))
    ids = prompt.prefix_ids, prompt.question_ids, prompt.header_ids
    if which.startswith("reference"):
        every_layer = which == "reference"
        return partial(slow_scores, backbone, selector, rule, tokens, prompt, every_layer=every_layer)
    if which == "first question":
        return lambda: selector.clip_scores(backbone, tokens, *ids, rule, layers=layers)[list(layers)]
    decoder = xcomp.Decoder(backbone, rule, stop_layer=layers[-1] + 1).observed_by(lambda seen: None)
    if which == "prefill":
        return torch.no_grad()(lambda: decoder.extend(decoder.prefill_video(tokens, prefix), prompt.suffix_ids))
    from xcomp.selectors.qc_comp import Chunk

    with torch.no_grad():
        chunk = Chunk([], frames, tokens, decoder.prefill_video(tokens, prefix))
    return torch.no_grad()(lambda: selector._clip_scores(decoder, chunk, prompt, layers)[0][list(layers)])


def _keep(found: dict[str, Any], name: str, run: Any) -> None:
    found[name] = run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="medium", choices=["narrow", "medium"])
    parser.add_argument("--frames", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action="store_true", help="peak memory too, in processes of their own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ("prefill", "first question", "further question", "reference", "reference, counted layers")
    runs = {name: prepare(options.size, options.frames, name) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, Tensor] = {}
    for _ in range(options.repeats):
        for name, run in runs.items():
            taken[name].append(seconds(partial(_keep, found, name, run), "cpu"))
            print(f"{name:<26} {taken[name][-1]:8.2f} s", flush=True)
    known = ~found["reference"].isnan()
    differ = {
        name: ((found[name] - found["reference"])[known].abs().max() / found["reference"][known].max()).item()
        for name in names[1:3]
    }
    memory = {name: peak_megabytes(prepare, options.size, options.frames, name) for name in names if options.memory}
    rows = []
    for name in names:
        row = {"what": "scoring", "variant": name, "size": options.size, "frames": options.frames}
        row |= {"question_tokens": QUESTION + HEADER, "prefix_tokens": PREFIX, **spread(taken[name])}
        # Of each turn, as other work on the machine meets both alike.
        for other in ("prefill", "reference", "reference, counted layers"):
            ratios = sorted(a / b for a, b in zip(taken[other], taken[name]))
            column = f"{other.replace(', ', '_').replace(' ', '_')}_over_this"
            row |= {
                column: round(ratios[len(ratios) // 2], 3),
                f"{column}_lowest": round(ratios[0], 3),
                f"{column}_highest": round(ratios[-1], 3),
            }
        row |= {
            "peak_megabytes": round(memory[name]) if memory else None,
            "differs_from_reference": differ.get(name),
            **about("cpu"),
        }
        rows.append(row)
        print({k: row[k] for k in row if k not in ("hardware", "python", "torch", "transformers", "date")}, flush=True)
    write("selection-cpu", rows)


if __name__ == "__main__":
    main()

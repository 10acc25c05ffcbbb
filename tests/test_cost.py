"""Costs against the figures published for Qwen2-1.5B, and against counting every product one by one."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from xcomp.cost import LLMShape, prefill_cost

QWEN2_1_5B = LLMShape(hidden=1536, intermediate=8960, heads=12, kv_heads=2, head_dim=128, layers=28, vocab=151936)
TINY = LLMShape(hidden=6, intermediate=10, heads=4, kv_heads=2, head_dim=3, layers=2, vocab=11)
COSINE = [16, 16, 16, 15, 15, 14, 14, 13, 12, 12, 11, 10, 9, 9, 8, 7, 6, 5, 5, 4, 3, 3, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("frames", "plain", "cosine"), [(1024, 44.6, 19.7), (2048, 135.3, 56.9), (4096, 455.3, 183.2)])
def test_published_figures(frames, plain, cosine):
    uncompressed = prefill_cost(QWEN2_1_5B, [16 * frames] * 28, 0)
    compressed = prefill_cost(QWEN2_1_5B, [n * frames for n in COSINE], 0)
    assert round(uncompressed.macs / 1e12, 1) == plain
    assert round(compressed.macs / 1e12, 1) == cosine
    assert compressed.flops == 2 * compressed.macs
    assert compressed.kv_bytes / uncompressed.kv_bytes == sum(COSINE) / (16 * 28)


def test_skipping_doomed_rows_saves_what_the_method_states():
    frames = 1024
    tokens = [n * frames for n in COSINE]
    doomed_skipped = [n * frames for n in [*COSINE[1:], 1]]
    full = prefill_cost(QWEN2_1_5B, tokens, 0)
    skipped = prefill_cost(QWEN2_1_5B, tokens, 0, computed_per_layer=doomed_skipped)
    assert 0.05 < 1 - skipped.macs / full.macs < 0.07
    assert skipped.kv_bytes == full.kv_bytes


def count_by_loops(shape, frame_sizes, kept, *, frames, prefix, suffix, causal):
    """MACs (without the head), one row and one key at a time."""
    macs = 0
    for size, keep in zip(frame_sizes, kept, strict=True):
        computed = [True] * prefix + ([False] * (size - keep) + [True] * keep) * frames + [True] * suffix
        for position, is_computed in enumerate(computed):
            macs += 2 * shape.hidden * shape.kv_heads * shape.head_dim
            if is_computed:
                seen = position + 1 if causal else len(computed)
                macs += 2 * shape.hidden * shape.heads * shape.head_dim + 2 * seen * shape.heads * shape.head_dim
                macs += 3 * shape.hidden * shape.intermediate
    return macs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kept", [(4, 3), (3, 1), (3, 0)])
def test_equals_counting_by_loops(kept, causal):
    frames, prefix, suffix, sizes = 5, 2, 7, (4, 3)
    cost = prefill_cost(
        TINY,
        [n * frames for n in sizes],
        prefix + suffix,
        computed_per_layer=[n * frames for n in kept],
        causal=causal,
        num_frames=frames,
        prefix_tokens=prefix,
        head_positions=2,
    )
    expected = count_by_loops(TINY, sizes, kept, frames=frames, prefix=prefix, suffix=suffix, causal=causal)
    assert cost.macs - cost.head == expected
    assert cost.head == 2 * 6 * 11
    assert cost.causal is causal
    assert cost.kv_bytes == (4 + 3) * frames * 24 + 2 * (prefix + suffix) * 24  # 2 (k, v) · 2 heads · 3 · 2 bytes


def test_shape_of_configs():
    plain = SimpleNamespace(
        hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2, num_hidden_layers=28,
        vocab_size=151936,
    )  # fmt: skip
    assert LLMShape.from_config(plain) == QWEN2_1_5B
    assert LLMShape.from_config(SimpleNamespace(text_config=plain)) == QWEN2_1_5B
    del plain.num_key_value_heads
    plain.head_dim = 64
    assert (LLMShape.from_config(plain).kv_heads, LLMShape.from_config(plain).head_dim) == (12, 64)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([4], {}, "2 layers"),
        ([4, 4], {"computed_per_layer": [4]}, "2 layers"),
        ([4, 4], {"computed_per_layer": [4, 5]}, "layer 1: 5 computed of 4"),
        ([4, 4], {"prefix_tokens": 2}, "prefix_tokens"),
        ([4, 4], {"computed_per_layer": [4, 2], "causal": True}, "num_frames"),
        ([4, 4], {"computed_per_layer": [4, 2], "causal": True, "num_frames": 4}, "num_frames"),
    ],
)
def test_refuses_what_does_not_fit(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        prefill_cost(TINY, tokens, 1, **options)


def test_module_needs_no_heavy_import():
    # The file alone: what the package around it imports is the package's affair.
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('cost', sys.argv[1])\n"
        "module = sys.modules['cost'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    import xcomp.cost

    subprocess.run([sys.executable, "-c", code, xcomp.cost.__file__], check=True, timeout=60)

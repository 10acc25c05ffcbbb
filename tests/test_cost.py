"""Costs against the figures published for Qwen2-1.5B, against counting one by one, and against what is really run."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from contracts.plugin_options import backbone_options, names_of

import xcomp
from xcomp.backbone import FrameText, ShownVideo
from xcomp.compare.forecast import depends_on_data, on_noise
from xcomp.cost import (
    LayerWork,
    LLMShape,
    appended_layers,
    counted_layers,
    paper_layers,
    pass_cost,
    planned_layers,
)
from xcomp.decoder import Decoder, QuestionNeeded
from xcomp.layout import merged_lengths
from xcomp.selector import FrameQuery
from xcomp.testing import tiny_backbone, video_of

QWEN2_1_5B = LLMShape(hidden=1536, intermediate=8960, heads=12, kv_heads=2, head_dim=128, layers=28, vocab=151936)
TINY = LLMShape(hidden=6, intermediate=10, heads=4, kv_heads=2, head_dim=3, layers=2, vocab=11)
COSINE = [16, 16, 16, 15, 15, 14, 14, 13, 12, 12, 11, 10, 9, 9, 8, 7, 6, 5, 5, 4, 3, 3, 2, 2, 1, 1, 1, 1]


# --- published figures ------------------------------------------------------------------------------------------------


# frames, without compression and with LP-Comp: the paper's Table E, whose "TFLOPs" are multiply-accumulates
@pytest.mark.parametrize(("frames", "plain", "cosine"), [(1024, 43, 20), (2048, 132, 58), (4096, 448, 187)])
def test_table_e_within_5_percent(frames, plain, cosine):
    uncompressed = pass_cost(QWEN2_1_5B, paper_layers([16 * frames] * 28))
    compressed = pass_cost(QWEN2_1_5B, paper_layers([n * frames for n in COSINE]))
    assert uncompressed.macs / 1e12 == pytest.approx(plain, rel=0.05)
    assert compressed.macs / 1e12 == pytest.approx(cosine, rel=0.05)
    assert compressed.flops == 2 * compressed.macs
    assert compressed.kv_bytes / uncompressed.kv_bytes == sum(COSINE) / (16 * 28)


def test_dropping_early_saves_what_the_method_states():
    plan = [tuple(range(16 - n, 16)) for n in COSINE]
    off, query = (pass_cost(QWEN2_1_5B, planned_layers(plan, 1024, 0, 8, drop_early=d)) for d in ("off", "query"))
    assert 0.04 < 1 - query.macs / off.macs < 0.08 and query.kv_bytes == off.kv_bytes


# --- one by one -------------------------------------------------------------------------------------------------------


def count_by_loops(plan, frames, prefix, suffix, drop_early, texts=()):
    """[LayerWork], one row and one key at a time."""
    layers = []
    for layer, slots in enumerate(plan):
        cells = [None] * prefix
        for before, behind in texts or [(0, 0)] * frames:
            cells += [None] * before + list(slots) + [None] * behind
        cells += [None] * suffix
        last = layer == len(plan) - 1
        queries = outputs = pairs = 0
        for position, slot in enumerate(cells):
            stays = (suffix > 0 and position == len(cells) - 1) if last else slot is None or slot in plan[layer + 1]
            asks = stays if last or drop_early == "query" else True
            leaves = stays if last or drop_early != "off" else True
            queries, outputs = queries + asks, outputs + leaves
            pairs += (position + 1) * asks
        layers.append(LayerWork(len(cells), queries, pairs, outputs))
    return layers


@pytest.mark.parametrize("drop_early", ["off", "output", "query"])
@pytest.mark.parametrize("suffix", [0, 4])
@pytest.mark.parametrize("plan", [[(0, 1, 2), (0, 2), (2,)], [(0, 1, 2)] * 3, [(1, 2), (1,)]])
@pytest.mark.parametrize("texts", [[], [(1, 0), (0, 3), (0, 0), (2, 2), (4, 1)]])
def test_planned_passes_are_counted_as_they_are_run(texts, plan, suffix, drop_early):
    ours = planned_layers(plan, 5, 2, suffix, drop_early=drop_early, texts=texts)
    assert ours == count_by_loops(plan, 5, 2, suffix, drop_early, texts)


def test_a_pass_is_the_sum_of_its_layers():
    layers = [LayerWork(7, 5, 20, 4), LayerWork(6, 1, 6, 1)]
    cost = pass_cost(TINY, layers, head_positions=2, kv_value_bytes=4)
    assert cost.projections == 13 * 2 * 6 * 6 + 6 * 6 * 12 + 5 * 12 * 6
    assert cost.attention == 2 * 26 * 12 and cost.mlp == 3 * 5 * 6 * 10 and cost.head == 2 * 6 * 11
    assert cost.kv_bytes == 2 * 13 * 6 * 4
    assert cost.macs == cost.projections + cost.attention + cost.mlp + cost.head
    with pytest.raises(ValueError, match="the model has 2 layers, but the pass 3"):
        pass_cost(TINY, [*layers, layers[0]])


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


# --- what is really run -----------------------------------------------------------------------------------------------


class Spy:
    """Counts the products of a language model's matrices and attention as they happen: hooks, and a look at ``attend``.

    Attention under a causal mask counts the keys that each row may see.
    """

    def __init__(self, backbone, monkeypatch):
        self.macs = 0
        for module in [*backbone.language_model.layers.modules(), backbone.lm_head]:
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(self._linear)
        attend = backbone.attend

        def watched(layer, queries, keys, values, layout, rows=None):
            assert keys.shape[2] == layout.width and not layout.padded
            asking = torch.arange(layout.width).unsqueeze(0) if rows is None else rows
            assert asking.shape == (1, queries.shape[2])
            self.macs += 2 * int((asking + 1).sum()) * queries.shape[1] * queries.shape[3]
            return attend(layer, queries, keys, values, layout, rows)

        monkeypatch.setattr(backbone, "attend", watched)
        probabilities = xcomp.compressor.attention_probabilities

        def looked(queries, keys, mask=None, **options):
            self.macs += queries.numel() * keys.shape[2]
            return probabilities(queries, keys, mask, **options)

        monkeypatch.setattr("xcomp.compressor.attention_probabilities", looked)

    def _linear(self, module, inputs, output):
        self.macs += inputs[0].numel() // inputs[0].shape[-1] * module.weight.numel()

    def take(self):
        found, self.macs = self.macs, 0
        return found


@pytest.mark.parametrize("drop_early", ["off", "output", "query"])
@pytest.mark.parametrize("compressor", names_of("compressor"))
@torch.no_grad()
def test_the_language_model_is_counted_as_it_is_run(compressor, drop_early, monkeypatch):
    backbone, rule = tiny_backbone(), xcomp.load_compressor(compressor)
    tokens = backbone.visual(torch.rand(6, 3, 2, 2), rule.needs)
    prefix, suffix = torch.arange(1, 5), torch.arange(1, 12)
    decoder = Decoder(backbone, rule, drop_early=drop_early)
    spy = Spy(backbone, monkeypatch)
    state = decoder.prefill(tokens, prefix, suffix)
    try:
        stored = decoder.prefill_video(tokens, prefix)
    except QuestionNeeded:  # with the rule's own look at the data
        assert spy.take() == decoder.prefill_macs(state, len(prefix), len(suffix)) + state.rule_macs[0]
        return
    spy.take()
    assert decoder.prefill(tokens, prefix, suffix) and spy.take() == decoder.prefill_macs(state, 4, 11)
    decoder.prefill_video(tokens, prefix)
    assert spy.take() == decoder.prefill_macs(stored, len(prefix))
    texts = [(prefix[:number], suffix[: number % 3]) for number in range(6)]
    decoder.prefill_video(tokens, prefix, texts)
    with_text = spy.take()
    assert with_text == decoder.prefill_macs(decoder.prefill_video(tokens, prefix, texts), len(prefix))
    spy.take()
    sizes = [layer.keys.shape[2] for layer in stored.cache.layers]
    visual = decoder.compress(tokens)
    if not visual.is_whole:  # what enters is not known from shapes
        return
    plan = decoder.plan(visual.frame_tokens)
    layers = planned_layers(plan, visual.num_frames, len(prefix), drop_early=drop_early)
    shape = LLMShape.from_config(backbone.text_config)
    assert pass_cost(shape, layers).macs == decoder.prefill_macs(stored, len(prefix))  # from shapes alone
    lengths = merged_lengths([(len(before), len(behind)) for before, behind in texts], visual.num_frames)
    layers_of_text = planned_layers(plan, visual.num_frames, len(prefix), drop_early=drop_early, texts=lengths)
    assert pass_cost(shape, layers_of_text).macs == with_text > pass_cost(shape, layers).macs
    kv_bytes = sum(t.nbytes for layer in stored.cache.layers for t in (layer.keys, layer.values))
    assert pass_cost(shape, layers, kv_value_bytes=4).kv_bytes == kv_bytes
    state = decoder.extend(stored.fork(), suffix)
    assert spy.take() == decoder.append_macs(stored, len(suffix))
    for token in (3, 4):
        decoder.decode(state, token)
    more = decoder.append_macs(stored, len(suffix), 1, 1) - decoder.append_macs(stored, len(suffix))
    assert spy.take() == more
    assert sizes == [layer.keys.shape[2] for layer in stored.cache.layers]


def test_a_pass_that_looks_at_the_data_counts_what_each_layer_had():
    layers = counted_layers([13, 13, 8], [13, 8])
    assert layers == [LayerWork(13, 13, 91, 13), LayerWork(13, 13, 91, 8), LayerWork(8, 1, 8, 1)]
    assert appended_layers([4, 2], 3)[-1] == LayerWork(3, 1, 5, 1)


@pytest.mark.parametrize("name", names_of("backbone"))
@torch.no_grad()
def test_the_vision_tower_is_counted_as_it_is_run(name, tiny_tokenizer):
    """Against hooks on every matrix of the vision path, and attention by its sizes."""
    torch.manual_seed(0)
    backbone = xcomp.load_backbone(name, **backbone_options(name, tiny_tokenizer)).eval()
    frames = torch.randint(0, 256, (backbone.clip_frames, 40, 56, 3), dtype=torch.uint8)
    pixels, found = backbone.preprocess(frames), 0
    own = torch.nn.functional.scaled_dot_product_attention

    def linear(module, inputs, output):
        nonlocal found
        found += output.numel() // output.shape[-1] * module.weight.numel()

    def convolution(module, inputs, output):
        nonlocal found
        found += output.numel() * module.weight[0].numel()

    def attention(query, key, value, *args, **kwargs):
        nonlocal found
        found += 2 * query.numel() * key.shape[-2]
        return own(query, key, value, *args, **kwargs)

    counted = backbone.clip_macs(tuple(pixels.shape[-2:]))
    parts = backbone.parts()
    for module in (m for part in ("vision", "projector") for top in parts[part] for m in top.modules()):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear)
        elif isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            module.register_forward_hook(convolution)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        backbone.encode(pixels)
    if name == "videochat_flash":  # its patches and merging are plain products, not modules
        grid, tower = backbone.vision_sizes.image_size // backbone.vision_sizes.patch_size, backbone.vision_tower
        found += len(pixels) * grid**2 * tower.patch_embed.proj.weight.numel()
        found += merging_macs(backbone, len(pixels) * grid**2)
    assert found > 0 and counted == found


def merging_macs(backbone, tokens):
    """Rounds of comparing even tokens with odd ones over the mean head, and of summing those that merge."""
    from xcomp.backbones.videochat_flash import merge_schedule

    width, total = backbone.vision_sizes.hidden_size, 0
    for merged in merge_schedule(tokens, backbone.clip_frames * backbone.tokens_per_frame):
        even, odd = (tokens + 1) // 2, tokens // 2
        total += even * odd * (width // backbone.projector.num_heads) + odd * merged * (width + 1)
        tokens -= merged
    return total


@pytest.mark.parametrize("stamps", [False, True])
@pytest.mark.parametrize("variant", ["segmented", "global"])
@pytest.mark.parametrize("compressor", ["none", "lp_comp", "avg_pool", "uniform_drop"])
@torch.no_grad()
def test_qc_comp_is_counted_as_it_is_run(compressor, variant, stamps, monkeypatch):
    """Its passes by hooks, its scores by the sizes of the products that it makes; and all of it from shapes alone."""
    from xcomp.selectors import qc_comp

    backbone, rule = tiny_backbone(), xcomp.load_compressor(compressor)
    options = {"clip_frames": 2, "window_clips": 4, "window_stride": 2, "chunk_frames": 8, "query_bias": 1}
    selector = xcomp.load_selector("qc_comp", variant=variant, **options)
    frames = torch.randint(0, 256, (14, 8, 8, 3), dtype=torch.uint8)
    prompts = [backbone.prompt(text, ShownVideo(7.0, 14)) for text in ("Why is that so?", "Where?")]
    if stamps:  # text of unequal length between the frames, so that no chunk costs what another does
        texts = tuple(FrameText(torch.arange(1, 2 + n % 5), torch.arange(n % 2)) for n in range(14))
        prompts = [replace(prompt, frame_texts=texts) for prompt in prompts]
    queries = [FrameQuery("", prompt) for prompt in prompts]
    spy, scored = Spy(backbone, monkeypatch), 0
    mean_probability = qc_comp._mean_probability

    def watched(logits, head_size, part):
        nonlocal scored
        scored += logits.numel() * head_size
        return mean_probability(logits, head_size, part)

    monkeypatch.setattr(qc_comp, "_mean_probability", watched)
    with video_of(frames, backbone) as video:
        with video.ledger.work("select") as work:
            selector.score(video, queries, rule)
        shared = sum(w.macs for w in work.all() if w.stage == "select")
    assert spy.take() + scored == shared + sum(query.work.macs for query in queries)
    expected = [selector.cost(backbone, 14, query, rule) for query in queries]
    assert expected[0].video_macs == expected[1].video_macs == shared
    assert [cost.question_macs for cost in expected] == [query.work.macs for query in queries]
    starts = qc_comp.chunk_starts(14, selector.config)[1]
    assert expected[0].frames_encoded == 14 * len({start % backbone.clip_frames for start in starts})


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


@pytest.mark.parametrize("name", ["evs", "visionzip", "cdpruner", "fastv", "dart", "framefusion", "prunevid"])
@torch.no_grad()
def test_where_the_data_decide_the_forecast_is_near(name):
    """Told on noise, so a method whose budget depends on the video is far from it only where the video is."""
    torch.manual_seed(1)
    backbone, rule = tiny_backbone(), xcomp.load_compressor(name, budget={"keep": 0.75, "of": "layers"})
    assert depends_on_data(rule, backbone)
    held, outputs, asked = on_noise(rule, backbone, 12, 11)
    decoder, visual = Decoder(backbone, rule), backbone.visual(torch.rand(12, 3, 2, 2), rule.needs)
    state = decoder.prefill(visual, torch.arange(1, 4), torch.arange(1, 12))
    assert asked == rule.uses_question and len(outputs) == len(held) - 1 == 3
    assert all(abs(a - b) <= 12 for a, b in zip(held, state.tokens_per_layer))  # a token a frame

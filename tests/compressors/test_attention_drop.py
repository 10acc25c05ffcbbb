"""Dropping by attention: against full attention maps, against PyramidDrop's own code, and its options."""

import pytest
import torch
import transformers

import xcomp
from xcomp.decoder import Decoder, QuestionNeeded

PREFIX, SUFFIX = torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10, 11, 12])


def rule(**options):
    return xcomp.load_compressor("attention_drop", **options)


def slots(state, layer, row=0):
    """(frame, slot) of the visual tokens in a layer's cache."""
    layout = state.layouts[layer]
    where = layout.visual[row]
    return list(zip(layout.frame[row, where].tolist(), layout.slot[row, where].tolist()))


def theirs(backbone, hidden):
    """transformers' own layers over embeddings (1, S, D), whole attention maps and all: maps of each layer."""
    backbone.text_config._attn_implementation = "eager"
    out = backbone.language_model(inputs_embeds=hidden, use_cache=False, output_attentions=True)
    backbone.text_config._attn_implementation = "sdpa"
    return out.attentions


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_first_drop_keeps_what_the_whole_attention_map_says(make_backbone, family):
    backbone = make_backbone(family=family)
    visual = backbone.encode(torch.rand(6, 3, 2, 2))
    hidden = torch.cat([backbone.embed(PREFIX), visual.flatten(0, 1), backbone.embed(SUFFIX)])[None]
    scores = theirs(backbone, hidden)[2][0, :, -1].mean(0)[3:51]  # the layer after layer 2, at 6 · 8 visual tokens
    best = sorted(scores.argsort(descending=True)[:14].tolist())
    state = Decoder(backbone, rule(layers=[2], ratios=[0.3])).prefill(visual, PREFIX, SUFFIX)
    assert state.tokens_per_layer == [48, 48, 14, 14]
    assert slots(state, 2) == [(i // 8, i % 8) for i in best]


@torch.no_grad()
def test_later_drops_see_the_renumbered_rest(make_backbone):
    """The second drop is the first drop of what the first one left, run from the layer between them."""
    backbone = make_backbone()
    visual = backbone.encode(torch.rand(6, 3, 2, 2))
    state = Decoder(backbone, rule(layers=[1, 3], ratios=[0.5, 0.25])).prefill(visual, PREFIX, SUFFIX)
    assert state.tokens_per_layer == [48, 24, 24, 12]
    hidden = torch.cat([backbone.embed(PREFIX), visual.flatten(0, 1), backbone.embed(SUFFIX)])[None]
    states = backbone.language_model(inputs_embeds=hidden, use_cache=False, output_hidden_states=True).hidden_states
    kept = [3 + 8 * frame + slot for frame, slot in slots(state, 1)]
    left = states[1][:, [0, 1, 2, *kept, *range(51, 56)]]
    for layer in (1, 2):
        cos_sin = backbone.rotary(torch.arange(left.shape[1])[None])
        block = backbone.language_model.layers[layer]
        mask = torch.ones(32, 32, dtype=torch.bool).tril()[None, None]
        left = block(left, attention_mask=mask, position_embeddings=cos_sin)
    rest = transformers.Qwen2Model(backbone.text_config)
    rest.layers, rest.norm = backbone.language_model.layers[3:], backbone.language_model.norm
    rest.config._attn_implementation = "eager"
    rest.config.num_hidden_layers = 1
    try:
        scores = rest(inputs_embeds=left, use_cache=False, output_attentions=True).attentions[0][0, :, -1].mean(0)
    finally:
        rest.config._attn_implementation, rest.config.num_hidden_layers = "sdpa", 4
    best = sorted(scores[3:27].argsort(descending=True)[:12].tolist())
    assert slots(state, 3) == [slots(state, 1)[i] for i in best]


@torch.no_grad()
def test_uniform_stages_spread_evenly(make_backbone):
    backbone = make_backbone()
    visual = backbone.encode(torch.rand(2, 3, 2, 2))
    decoder = Decoder(backbone, rule(layers=[1, 2], ratios=[0.5, 0.25], uniform_stages=2))
    state = decoder.prefill(visual, PREFIX, SUFFIX)
    kept = [8 * f + s for f, s in slots(state, 1)]
    assert kept == [0, 2, 4, 6, 8, 10, 12, 15]  # multiples of 15 / 7, rounded down
    assert [8 * f + s for f, s in slots(state, 2)] == [kept[i] for i in (0, 2, 4, 7)]
    mixed = Decoder(backbone, rule(layers=[1, 2], ratios=[0.5, 0.25], uniform_stages=1)).prefill(visual, PREFIX, SUFFIX)
    assert slots(mixed, 1) == slots(state, 1) and mixed.tokens_per_layer == [16, 8, 4, 4]


def test_released_setting_is_the_default():
    assert rule().stages(28) == [4, 18]
    assert rule(layers=[8, 16, 24], ratios=[0.5, 0.25, 0.125]).stages(32) == [8, 16, 24]
    assert rule().stages(4) == [1, 3] and rule().stages(3) == [1, 2]


@torch.no_grad()
def test_a_video_cannot_be_stored_without_its_question(make_backbone):
    backbone = make_backbone()
    with pytest.raises(QuestionNeeded, match="AttentionDrop decides from the question"):
        Decoder(backbone, rule()).prefill_video(backbone.encode(torch.rand(2, 3, 2, 2)), PREFIX)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": [4], "ratios": [0.5, 0.2]}, "must be as many"),
        ({"layers": [], "ratios": []}, "at least one"),
        ({"layers": [0], "ratios": [0.5]}, "layer numbers from 1"),
        ({"layers": [1.5], "ratios": [0.5]}, "layer numbers from 1"),
        ({"layers": [1, 2], "ratios": [0.25, 0.5]}, "never grow"),
        ({"layers": [1], "ratios": [0.0]}, "above 0"),
        ({"uniform_stages": 3}, r"it must be 0\.\.2"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rule(**options)


@pytest.mark.parametrize("layers", [[4], [2, 2], [3, 1], [1, 7]])
def test_layers_that_the_model_has_not_are_refused(make_backbone, layers):
    backbone = make_backbone()
    with pytest.raises(ValueError, match=r"must ascend within 1\.\.3"):
        Decoder(backbone, rule(layers=layers, ratios=[0.5] * len(layers))).prefill(
            backbone.encode(torch.rand(2, 3, 2, 2)), PREFIX, SUFFIX
        )

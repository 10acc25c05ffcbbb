"""PyramidDrop: the released code's scores, choices and last state through the decoder; budgets and options."""

import pytest
import torch
from conftest import relative_error
from golden import each_case
from tiny_llama import layer_output, layout_of, llama_of, rotary_at
from xcomp.compressors.pyramid_drop import PyramidDrop

import xcomp
from xcomp.compressor import Budget
from xcomp.decoder import Decoder
from xcomp.layout import TokenLayout

PREFIX, SUFFIX = torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10, 11, 12])


def rule(**options):
    return xcomp.load_compressor("pyramid_drop", **options)


def of_case(case):
    return rule(layers=case.params["layer_list"], ratios=case.params["image_token_ratio_list"])


@torch.no_grad()
@each_case("pyramiddrop")
def test_equals_the_released_code_through_the_decoder(case):
    backbone, embeds = llama_of(case), case.inputs["inputs_embeds"][0]
    start, length = case.params["image_start"], case.params["image_length"]
    # Embeddings of the text are those of the case: id i stands for position i.
    backbone.language_model.embed_tokens.weight[: len(embeds)] = embeds
    ids = torch.arange(len(embeds))
    visual = embeds[start : start + length].unsqueeze(0)
    state = Decoder(backbone, of_case(case)).prefill(visual, ids[:start], ids[start + length :])
    text = len(embeds) - length
    assert [count + text for count in state.tokens_per_layer] == case.params["cache_length_per_layer"]
    for stage, layer in enumerate(case.params["layer_list"]):
        layout = state.prefilled[layer]
        kept = (layout.slot[0] + start)[layout.visual[0]].tolist()
        expected = case.outputs[f"stage{stage}.keep"].tolist()
        assert kept == [i for i in expected if start <= i < start + length]
        positions = backbone.positions(layout)
        assert positions[0].tolist() == case.outputs[f"stage{stage}.position_ids"].tolist()
    assert relative_error(state.logits[0], case.outputs["last_hidden"]) < 2e-5


@torch.no_grad()
@each_case("pyramiddrop")
def test_equals_the_released_scores_of_each_stage(case):
    backbone, layout, drop = llama_of(case), layout_of(case), of_case(case)
    for stage, layer in enumerate(case.params["layer_list"]):
        hidden = case.outputs[f"stage{stage}.hidden"].unsqueeze(0)
        rotary = rotary_at(backbone, torch.arange(layout.width))
        output = layer_output(backbone, layer - 1, hidden, hidden, layout, rotary)
        output.num_visual[0] = case.params["image_length"]
        scores = output.attention_of_query()[0, layout.visual[0]]
        assert relative_error(scores, case.outputs[f"stage{stage}.scores"]) < 1e-5
        keep = drop.after_layer(output)
        kept = (keep & layout.visual)[0].nonzero()[:, 0]
        assert kept.tolist() == sorted(case.outputs[f"stage{stage}.kept_relative"].tolist())
        layout = layout.select(keep | ~layout.visual)[1]


@torch.no_grad()
@pytest.mark.parametrize("tokens, frames", [(1, 2), (8, 2), (1, 10)])
def test_few_tokens_and_identical_ones(make_backbone, tokens, frames):
    backbone = make_backbone(family="qwen2", tokens_per_frame=tokens)
    visual = torch.zeros(frames, tokens, 32)
    state = Decoder(backbone, rule()).prefill(visual, PREFIX, SUFFIX)
    n = tokens * frames
    assert state.tokens_per_layer == [n, *(max(1, int(n * r)) for r in (0.5, 0.25, 0.125))]


@torch.no_grad()
def test_bfloat16_chooses_the_same_up_to_near_ties(make_backbone):
    backbone, hidden = make_backbone(), torch.randn(1, 72, 32)
    layout = TokenLayout.sequence([(3, 8, 8, 5)])
    chosen, scored = [], []
    for dtype in (torch.float32, torch.bfloat16):
        rotary = rotary_at(backbone.to(dtype), torch.arange(72))
        output = layer_output(backbone, 0, hidden.to(dtype), hidden.to(dtype), layout, rotary)
        scored.append(output.attention_of_query()[0])
        chosen.append(rule().after_layer(output)[0].nonzero()[:, 0])
    least = scored[0][chosen[0]].min()
    assert len(chosen[1]) == 32 and (scored[0][chosen[1]] > 0.9 * least).all()


def simulated(config, n, num_layers):
    """Tokens at each layer."""
    counts, left = [], n
    stages = PyramidDrop(config).stages(num_layers)
    for layer in range(1, num_layers + 1):
        counts.append(left)
        if layer in stages:
            left = max(1, int(n * config.ratios[stages.index(layer)]))
    return counts


@pytest.mark.parametrize("num_layers", [4, 28, 32, 36])
@pytest.mark.parametrize("keep", [0.26, 0.3, 15 / 32, 0.7, 1.0])
def test_budgets_over_layers_and_at_the_end_are_met(num_layers, keep):
    config = PyramidDrop.for_budget(PyramidDrop.Config(), Budget(keep), num_layers, 196)
    assert abs(sum(simulated(config, 19600, num_layers)) / num_layers / 19600 - keep) < 1 / 19600 + 1e-9
    config = PyramidDrop.for_budget(PyramidDrop.Config(), Budget(keep, "final"), num_layers, 196)
    assert simulated(config, 19600, num_layers)[-1] == int(19600 * keep)


def test_published_setting_is_a_budget_of_15_32():
    config = PyramidDrop.for_budget(PyramidDrop.Config(), Budget(15 / 32), 32, 576)
    assert config.ratios == pytest.approx([0.5, 0.25, 0.125]) and PyramidDrop(config).stages(32) == [8, 16, 24]
    assert PyramidDrop.Config().ratios == [0.5, 0.25, 0.125]


def test_budgets_out_of_reach_name_the_nearest():
    config = PyramidDrop.Config()
    message = "pyramid_drop: a budget of 0.2 of layers .* 8 of 32 .*move `layers` forward.* nearest possible is 0.251"
    with pytest.raises(ValueError, match=message) as error:
        PyramidDrop.for_budget(config, Budget(0.2), 32, 196)
    assert "\n" not in str(error.value)
    PyramidDrop.for_budget(config, Budget(0.251), 32, 196)
    early = PyramidDrop.Config(layers=[2, 8, 16])
    assert sum(simulated(PyramidDrop.for_budget(early, Budget(0.2), 32, 196), 19600, 32)) / 32 == pytest.approx(
        3920, abs=1
    )
    with pytest.raises(ValueError, match="budget of 0.5 of input .* nearest possible is 1"):
        PyramidDrop.for_budget(config, Budget(0.5, "input"), 32, 196)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": [4]}, "must be as many"),
        ({"layers": [0, 1, 2]}, "layer numbers from 1"),
        ({"ratios": [0.25, 0.5, 0.1]}, "never grow"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        rule(**options)
    assert "\n" not in str(error.value)


def test_layers_that_the_model_has_not_are_refused():
    with pytest.raises(ValueError, match=r"pyramid_drop: layers .* must ascend within 1\.\.3"):
        rule(layers=[1, 2, 4]).plan(4, 8)

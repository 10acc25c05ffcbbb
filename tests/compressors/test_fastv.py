"""FastV: the released code's scores, choice and logits; counts, budgets and edges."""

import dataclasses

import pytest
import torch
from conftest import relative_error
from golden import each_case
from tiny_llama import layer_output, layout_of, llama_of, rotary_at
from xcomp.compressors.fastv import FastV, most_attended, num_kept

import xcomp
from xcomp.compressor import Budget
from xcomp.layout import TokenLayout, gather


def rule(**options):
    return xcomp.load_compressor("fastv", **options)


@torch.no_grad()
def run(backbone, compressor, hidden, layout, positions, stored=None):
    """All layers, one after the other, with the rule between them; keys and values of each layer are put in ``stored``.

    A slow reference of what the decoder does for a rule that keeps positions; one sample.
    """
    stored = [] if stored is None else stored
    choice = None
    for layer in range(backbone.num_layers):
        rotary, entered = rotary_at(backbone, positions), hidden
        normed = backbone.input_norm(layer, hidden)
        keys, values = backbone.project_keys_values(layer, normed)
        keys = rotary.apply(keys)
        if layer < len(stored):
            keys, values = (torch.cat(pair, 2) for pair in zip(stored[layer], (keys, values)))
            stored[layer] = keys, values
        else:
            stored.append((keys, values))
        queries = rotary.apply(backbone.project_queries(layer, normed))
        repeat = queries.shape[1] // keys.shape[1]
        scores = queries @ keys.repeat_interleave(repeat, 1).transpose(2, 3) / queries.shape[-1] ** 0.5
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        attention = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        attended = (attention @ values.repeat_interleave(repeat, 1)).transpose(1, 2).flatten(2)
        hidden = backbone.add_mlp(layer, backbone.add_attention(layer, entered, attended))
        if compressor is not None:
            keep = compressor.after_layer(layer_output(backbone, layer, entered, hidden, layout, rotary))
            if keep is not None:
                index, layout = layout.select(keep | ~layout.visual)
                hidden, positions, choice = gather(hidden, index), positions[index[0]], index[0]
    return backbone.head(hidden[:, -1])[0], stored, choice


@each_case("fastv")
def test_equals_the_released_code_from_scores_to_logits(case):
    backbone, layout, embeds = llama_of(case), layout_of(case), case.inputs["inputs_embeds"]
    compressor = rule(layer=case.params["fastv_k"], ratio=case.params["fastv_r"])
    seen = {}

    class Watched(FastV):
        def after_layer(self, output):
            if output.layer + 1 == self.stage(output.num_layers):
                seen["maps"] = output.attention(output.query_index[:, None], "this", "all")[0, :, 0]
                seen["mean"] = output.attention(output.query_index[:, None], "this")[0, 0]
                seen["max"] = output.attention(output.query_index[:, None], "this", "max")[0, 0]
            return super().after_layer(output)

    positions = torch.arange(embeds.shape[1])
    logits, stored, kept = run(backbone, Watched(compressor.config), embeds, layout, positions)
    assert relative_error(seen["maps"], case.outputs["attention_last_row"]) < 1e-5
    assert relative_error(seen["mean"][layout.visual[0]], case.outputs["scores"]) < 1e-5
    torch.testing.assert_close(seen["max"], seen["maps"].amax(0))
    assert kept.tolist() == case.outputs["keep"].tolist()
    assert num_kept(case.params["image_length"], case.params["fastv_r"]) == case.params["keep_image"]
    assert [keys.shape[2] for keys, _ in stored] == case.params["cache_length_per_layer"]
    assert relative_error(logits, case.outputs["logits_last"]) < 1e-4
    without = run(backbone, None, embeds, layout, positions)[0]
    assert relative_error(without, case.outputs["logits_last_without_fastv"]) < 1e-4
    # what is generated goes on behind the whole sequence
    table = torch.as_tensor(case.params["decode_position_ids"])
    for step, (token, position) in enumerate(zip(case.inputs["decode_ids"], table)):
        embedded = case.inputs["w.model.embed_tokens.weight"][token][None, None]
        logits = run(backbone, None, embedded, TokenLayout.text([1]), position[None], stored)[0]
        assert relative_error(logits, case.outputs["decode_logits"][step]) < 1e-4


@each_case("fastv")
def test_the_scores_alone_say_what_stays(case):
    kept = most_attended(case.outputs["scores"], case.params["fastv_r"]) + case.params["image_start"]
    assert kept.tolist() == sorted(case.outputs["top_score_order"].tolist())


@torch.no_grad()
@each_case("fastv")
@torch.no_grad()
def test_the_decoder_equals_the_released_code(case):
    backbone, embeds = llama_of(case), case.inputs["inputs_embeds"][0]
    start, length = case.params["image_start"], case.params["image_length"]
    table = torch.cat([embeds, case.inputs["w.model.embed_tokens.weight"]])  # id i below S stands for position i
    backbone.language_model.embed_tokens = torch.nn.Embedding.from_pretrained(table)
    ids = torch.arange(len(embeds))
    decoder = xcomp.Decoder(backbone, rule(layer=case.params["fastv_k"], ratio=case.params["fastv_r"]))
    state = decoder.prefill(embeds[start : start + length].unsqueeze(0), ids[:start], ids[start + length :])
    assert [int(layout.counts[0]) for layout in state.prefilled] == case.params["cache_length_per_layer"]
    assert relative_error(state.logits[0], case.outputs["logits_last"]) < 1e-4
    for step, token in enumerate(case.inputs["decode_ids"]):
        logits = decoder.decode(state, [int(token) + len(embeds)])[0]
        assert relative_error(logits, case.outputs["decode_logits"][step]) < 1e-4


def slow(scores, ratio):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[: max(1, round(len(scores) * (1 - ratio)))])


@pytest.mark.parametrize("n", [1, 2, 9, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.75, 0.99])
def test_chooses_as_written_out(n, ratio):
    torch.manual_seed(n)
    for scores in (torch.rand(n), torch.ones(n), torch.randint(3, (n,)).float()):
        assert most_attended(scores, ratio).tolist() == slow(scores.tolist(), ratio)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_in_blocks_and_in_a_padded_batch(make_backbone, family, monkeypatch):
    backbone = make_backbone(family=family)
    layout = TokenLayout.sequence([(3, 2, 8, 5), (2, 1, 8, 2)])
    entered, hidden = torch.randn(2, 2, layout.width, 32)
    output = layer_output(backbone, 1, entered, hidden, layout, rotary_at(backbone, torch.arange(layout.width)))
    rows = torch.tensor([[23, 20, 4], [11, 3, 10]])
    for layer in ("this", "next"):
        whole = output.attention(rows, layer, "all")
        assert whole.shape == (2, 4, 3, 24) and whole[1, :, :, 12:].abs().max() == 0 and whole[0, :, 2, 5:].max() == 0
        torch.testing.assert_close(whole.sum(-1), torch.ones(2, 4, 3))
        with monkeypatch.context() as m:
            m.setattr("xcomp.compressor.ATTENTION_BLOCK", 1)
            torch.testing.assert_close(output.attention(rows, layer, "all"), whole)
            torch.testing.assert_close(output.attention(rows, layer), whole.mean(1))
    keep = rule(ratio=0.75).after_layer(output)
    places = layout.visual.float().nonzero()
    scores = output.attention(output.query_index[:, None], "this")[:, 0]
    for row, count in ((0, 4), (1, 2)):
        own = places[places[:, 0] == row][:, 1]
        assert keep[row].nonzero()[:, 0].tolist() == own[scores[row, own].topk(count).indices].sort().values.tolist()
    assert rule(layer=1).after_layer(output) is None


@torch.no_grad()
def test_bfloat16_chooses_the_same_up_to_near_ties(make_backbone):
    backbone = make_backbone()
    layout = TokenLayout.sequence([(3, 8, 8, 5)])
    entered = torch.randn(1, layout.width, 32)
    chosen, scored = [], []
    for dtype in (torch.float32, torch.bfloat16):
        rotary = rotary_at(backbone.to(dtype), torch.arange(layout.width))
        output = layer_output(backbone, 1, entered.to(dtype), entered.to(dtype), layout, rotary)
        scores = output.attention(output.query_index[:, None], "this")[0, 0]
        assert scores.dtype == torch.float32
        chosen.append(set(rule().after_layer(output)[0].nonzero()[:, 0].tolist()))
        scored.append(scores)
    least = min(scored[0][list(chosen[0])])
    assert len(chosen[1]) == 32 and all(scored[0][i] > 0.9 * least for i in chosen[1])


@pytest.mark.parametrize("num_layers", [4, 28, 32])
@pytest.mark.parametrize("budget", [Budget(0.6), Budget(1.0), Budget(0.1, "final"), Budget(0.25, "final")])
def test_budgets_are_met(num_layers, budget):
    config = FastV.for_budget(FastV.Config(), budget, num_layers, 196)
    kept = num_kept(1960, config.ratio)
    counts = [1960] * 2 + [kept] * (num_layers - 2)
    got = counts[-1] if budget.of == "final" else sum(counts) / num_layers
    assert abs(got / 1960 - budget.keep) <= 0.5 / 1960 + 1e-9


def test_budgets_out_of_reach_name_the_nearest():
    config = FastV.Config()
    with pytest.raises(ValueError, match="fastv: a budget of 0.05 of layers .* nearest possible is 0.072") as error:
        FastV.for_budget(config, Budget(0.05), 28, 196)
    assert "\n" not in str(error.value)
    FastV.for_budget(config, Budget(0.072), 28, 196)
    with pytest.raises(ValueError, match="fastv: a budget of 0.5 of input .* nearest possible is 1"):
        FastV.for_budget(config, Budget(0.5, "input"), 28, 196)
    assert FastV.for_budget(config, Budget(1.0, "input"), 28, 196) == config


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"layer": 0}, "layer numbers from 1"),
        ({"layer": 2.5}, "layer numbers from 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        rule(**options)
    assert "\n" not in str(error.value)


def test_layers_that_the_model_has_not_are_refused():
    with pytest.raises(ValueError, match=r"fastv: layers \[4(.0)?\] are \[4\] of 4 layers"):
        rule(layer=4).plan(4, 8)
    assert rule(layer=0.25).plan(4, 8) is None and dataclasses.asdict(FastV.Config()) == {"layer": 2, "ratio": 0.5}

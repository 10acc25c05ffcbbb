"""What HoliTom, PruneVid and DyCoke do inside the language model, through the decoder, against loops."""

import dataclasses
import math

import pytest
import torch
from conftest import relative_error
from golden import each_case
from made_visual import cosines
from slow_rules import slow_layer, slow_pass
from xcomp.compressors.holitom import HoliTom
from xcomp.compressors.prunevid import PruneVid

import xcomp.visual
from xcomp.compressor import LayerOutput
from xcomp.decoder import QuestionNeeded
from xcomp.layout import TokenLayout

OPTIONS = {
    "holitom": {"inner_layer": 2, "tau": 0.3, "ratio": 0.7},
    "prunevid": {"layer": 2, "tau": 0.3, "alpha": 0.5},
}
PREFIX, SUFFIX = torch.tensor([1, 2, 3]), torch.tensor([30, 31, 32, 33, 34])


@pytest.fixture
def backbone(make_backbone):
    return make_backbone(tokens_per_frame=18, layers=4)


def video_of(backbone, num_frames, seed=0):
    """Frames that resemble one another, as the backbone gives them."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randn(num_frames, 3, 2, 2, generator=g).cumsum(0)
    return backbone.visual(pixels, ("attention",))


def merged_by_hand(scores, hidden, token, ratio):
    """HoliTom: (places that stay, values of all)."""
    places = [i for i in range(len(token)) if token[i] >= 0]
    falling = sorted(places, key=lambda i: (-float(scores[i]), i))
    chosen = sorted(falling[: max(1, round(len(places) * (1 - ratio)))])
    values, likeness = hidden.double(), cosines(hidden, hidden)
    for i in sorted(set(places) - set(chosen)):
        target = max(chosen, key=lambda j: likeness[i, j])
        values[target] = (values[target] + hidden[i].double()) / 2
    return torch.tensor([i for i in range(len(token)) if token[i] < 0 or i in chosen]), values.to(hidden.dtype)


def attended_by_hand(attention, token, group, alpha, num_prefix):
    """PruneVid: places that stay."""
    behind = [i for i in range(len(token)) if token[i] < 0 and i >= num_prefix]
    chosen = []
    for g in sorted(set(group.tolist())):
        members = [i for i in range(len(token)) if token[i] >= 0 and group[token[i]] == g]
        score = {i: max(float(a[q, i]) for a in attention for q in behind) for i in members}
        chosen += sorted(members, key=lambda i: (-score[i], i))[: int(alpha * len(members))]
    return torch.tensor([i for i in range(len(token)) if token[i] < 0 or i in chosen])


def by_hand(name, rule, video):
    def change(layer, hidden, token, attention):
        if layer != 2:
            return torch.arange(len(token)), hidden
        if name == "holitom":
            return merged_by_hand(attention.mean(0)[-1], hidden, token, rule.config.inner_ratio)
        return attended_by_hand(attention, token, entered.group, rule.config.alpha, len(PREFIX)), hidden

    entered = rule.compress(video, None)
    return change


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@torch.no_grad()
def test_the_pass_equals_the_rule_by_hand(name, family, make_backbone):
    backbone = make_backbone(family=family, tokens_per_frame=18, layers=4)
    video, rule = video_of(backbone, 8), xcomp.load_compressor(name, **OPTIONS[name])
    entered = rule.compress(video, None)
    assert len(entered) < len(video)
    state = xcomp.Decoder(backbone, rule).prefill(video, PREFIX, SUFFIX)
    logits, stored = slow_pass(backbone, entered, PREFIX, SUFFIX, by_hand(name, rule, video))
    counts = [int((token >= 0).sum()) for *_, token in stored]
    assert state.tokens_per_layer == counts and counts[0] == counts[1] == len(entered) and counts[2] < counts[1]
    assert relative_error(state.logits[0], logits) < 1e-4
    for layer, (keys, values, _) in enumerate(stored):
        assert relative_error(state.cache.layers[layer].keys, keys) < 1e-4
        assert relative_error(state.cache.layers[layer].values, values) < 1e-4


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_batch_equals_its_samples_alone(name, backbone):
    decoder = xcomp.Decoder(backbone, xcomp.load_compressor(name, **OPTIONS[name]))
    videos = [video_of(backbone, count, seed=count) for count in (8, 1, 4)]
    suffixes = [SUFFIX, SUFFIX[:1], torch.arange(40, 48)]
    batch = decoder.prefill(videos, [PREFIX, PREFIX[:1], PREFIX], suffixes)
    for row, (video, prefix, suffix) in enumerate(zip(videos, [PREFIX, PREFIX[:1], PREFIX], suffixes)):
        alone = decoder.prefill(video, prefix, suffix)
        assert alone.tokens_per_layer == [counts[row] for counts in batch.tokens_per_layer]
        assert relative_error(batch.logits[row], alone.logits[0]) < 1e-4
        assert alone.tokens_per_layer[0] > alone.tokens_per_layer[-1] or video.num_frames == 1
    for step in ([5, 6, 7], [8, 9, 10]):
        logits = decoder.decode(batch, step)
    alone = decoder.prefill(videos[1], PREFIX[:1], suffixes[1])
    for token in (6, 9):
        expected = decoder.decode(alone, [token])
    assert relative_error(logits[1], expected[0]) < 1e-4


@pytest.mark.parametrize("name, off", [("holitom", {}), ("prunevid", {"layer": None})])
def test_a_video_is_stored_without_a_question_only_where_nothing_happens_inside(name, off, backbone):
    video = video_of(backbone, 4)
    with pytest.raises(QuestionNeeded):
        xcomp.Decoder(backbone, xcomp.load_compressor(name, **OPTIONS[name])).prefill_video(video, PREFIX)
    decoder = xcomp.Decoder(backbone, xcomp.load_compressor(name, **off))
    stored = decoder.extend(decoder.prefill_video(video, PREFIX), SUFFIX)
    assert relative_error(stored.logits, decoder.prefill(video, PREFIX, SUFFIX).logits) < 1e-4
    xcomp.Decoder(backbone, xcomp.load_compressor(name)).prefill(video, PREFIX, SUFFIX)  # depths fit any model


def output_of(hidden, attention, layout, layer=0):
    """What a rule sees after a layer whose attention is given, (H, Q, S)."""
    last = layout.last_index()

    class Given(LayerOutput):
        def attention(self, rows, layer="next", heads="mean"):
            assert layer == "this"
            return attention.amax(0)[None] if heads == "max" else attention.mean(0)[None]

    return Given(layer, 2, hidden, layout, None, None, last, layout.visual_counts, hidden, layout)


@each_case("holitom", "inner")
def test_holitom_merges_as_released(case):
    p, hidden = case.params, case.inputs["hidden"]
    after = hidden.shape[1] - p["image_start"] - p["image_length"]
    layout = TokenLayout.sequence([(p["image_start"], 1, p["image_length"], after)])
    rule = HoliTom(HoliTom.Config(inner_layer=1, inner_ratio=p["r"]))
    found = rule.after_layer(output_of(hidden, case.inputs["attention_last_row"].unsqueeze(1), layout))
    assert found.order[0].tolist() == case.outputs["keep"].tolist()
    torch.testing.assert_close(found.hidden[0], case.outputs["merged"][0], rtol=1e-5, atol=1e-6)


@each_case("prunevid")
def test_prunevid_chooses_as_released(case):
    p, frames = case.params, case.inputs["features"]
    options = {"segments": p["temporal_segment_ratio"], "tau": p["tau"], "cluster_ratio": p["cluster_ratio"]}
    rule = PruneVid(PruneVid.Config(k=p["k"], alpha=p["alpha"], layer=1, released_order=True, **options))
    visual = rule.compress(xcomp.visual.VisualTokens.from_frames(frames), None)
    attention = case.inputs["text_to_image_attention"][0]
    # In the released order a frame's static tokens stand first; as a sequence it is held to no order of frames.
    layout = TokenLayout.of([(0, visual, attention.shape[1])])
    hidden = torch.zeros(1, layout.width, 4)
    padded = torch.cat([attention, attention.new_ones(*attention.shape[:2], attention.shape[1])], -1)
    keep = rule.after_layer(output_of(hidden, padded, layout))
    assert keep[0, : len(visual)].nonzero()[:, 0].tolist() == case.outputs["attention_keep"].tolist()


# --- Budgets ----------------------------------------------------------------------------------------------------------

ON = {"holitom": {"inner_layer": 2}, "prunevid": {"layer": 2}}


@pytest.mark.parametrize("of", ["input", "final", "layers"])
@pytest.mark.parametrize("keep", [0.2, 0.4, 0.75, 0.95, 1.0])
@pytest.mark.parametrize("name", ON)
@torch.no_grad()
def test_budgets_count_what_leaves_inside(name, keep, of, backbone):
    rule = xcomp.load_compressor(name, **ON[name], budget={"keep": keep, "of": of})
    video = video_of(backbone, 8)
    counts = xcomp.Decoder(backbone, rule).prefill(video, PREFIX, SUFFIX).tokens_per_layer
    got = {"input": counts[0], "final": counts[-1], "layers": sum(counts) / len(counts)}[of]
    assert abs(got - keep * len(video)) <= 8, counts  # a token a frame


# --- DyCoke while decoding --------------------------------------------------------------------------------------------


def kept_by_hand(attention, before, kept, drop, alike, released):
    if before is not None:
        cosine = float(attention @ before / (attention.norm() * before.norm()))
        if cosine >= alike:
            return set(range(len(attention))) if released else kept
    falling = sorted(range(len(attention)), key=lambda i: (-float(attention[i]), i))
    return set(falling[: max(1, round(len(attention) * (1 - drop)))])


@torch.no_grad()
def decoded_by_hand(backbone, visual, tokens, stage, drop, alike, released):
    """Logits of each step, and whether each step kept the earlier choice."""
    _, stored = slow_pass(backbone, visual, PREFIX, SUFFIX)
    text, before, kept, logits, fresh = [[] for _ in stored], None, None, [], []
    for step, token in enumerate(tokens):
        hidden = backbone.embed(torch.tensor([token]))
        position = torch.tensor([stored[0][0].shape[2] + step])
        seen = None
        for layer, (keys, values, which) in enumerate(stored):
            real = which < 0 if seen is None else torch.tensor([t < 0 or t in seen for t in which.tolist()])
            real = torch.ones_like(real) if seen is None else real
            cache = [(keys[:, :, real], values[:, :, real]), *text[layer]]
            hidden, all_keys, all_values, attention = slow_layer(backbone, layer, hidden, position, cache)
            text[layer].append((all_keys[:, :, -1:], all_values[:, :, -1:]))
            if layer + 1 == stage:
                now = attention.mean(0)[0, : len(which)][which >= 0]
                found = kept_by_hand(now, before, kept, drop, alike, released)
                fresh.append(found is not kept and len(found) < len(now))
                before, kept, seen = now, found, found
        logits.append(backbone.head(hidden)[0])
    return logits, fresh


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("stage, alike", [(1, 0.9), (2, 0.97), (3, -1.0), (3, 1.1)])
@torch.no_grad()
def test_dycoke_hides_keys_while_decoding(released, stage, alike, backbone):
    options = {"decoding_layer": stage, "decoding_drop": 0.8, "decoding_alike": alike, "released": released}
    rule = xcomp.load_compressor("dycoke", **options)
    decoder, video = xcomp.Decoder(backbone, rule), video_of(backbone, 8)
    tokens = [5, 77, 77, 12, 60]
    state = decoder.prefill(video, PREFIX, SUFFIX)
    visual = rule.compress(video, None)
    expected, fresh = decoded_by_hand(backbone, visual, tokens, stage, 0.8, alike, released)
    whole = xcomp.Decoder(backbone, xcomp.load_compressor("dycoke", released=released))
    unpruned = whole.prefill(video, PREFIX, SUFFIX)
    assert torch.equal(state.logits, unpruned.logits)
    differs = []
    for token, logits in zip(tokens, expected):
        found = decoder.decode(state, [token])
        assert relative_error(found[0], logits) < 1e-4
        differs.append(relative_error(found, whole.decode(unpruned, [token])) > 1e-4)
    assert differs[0] and state.tokens_per_layer == [len(visual)] * 4  # nothing leaves the cache
    assert fresh == [True] * 5 if alike == 1.1 else fresh[0]
    assert not any(fresh[1:]) if alike == -1.0 else True


@torch.no_grad()
def test_dycoke_in_a_batch_and_from_a_stored_video(backbone):
    decoder = xcomp.Decoder(backbone, xcomp.load_compressor("dycoke", decoding_layer=2))
    videos, suffixes = [video_of(backbone, 8), video_of(backbone, 3, seed=1)], [SUFFIX, SUFFIX[:2]]
    batch = decoder.prefill(videos, [PREFIX] * 2, suffixes)
    alone = [decoder.extend(decoder.prefill_video(v, PREFIX), s) for v, s in zip(videos, suffixes)]
    for token in (5, 77, 12):
        together = decoder.decode(batch, [token, token + 1])
        single = torch.cat([decoder.decode(s, [token + row]) for row, s in enumerate(alone)])
        assert relative_error(together, single) < 1e-4
    for options in ({}, {"num_beams": 3}):
        assert len(decoder.generate(decoder.prefill(videos[0], PREFIX, SUFFIX), max_new_tokens=4, **options)[0]) <= 4


@pytest.mark.device
@pytest.mark.parametrize("name", [*OPTIONS, "dycoke"])
@torch.no_grad()
def test_another_device_keeps_the_same(name, device, make_backbone):
    found = []
    for place in ("cpu", device):
        backbone = make_backbone(tokens_per_frame=18, layers=4)
        video = video_of(backbone, 8)
        moved = dataclasses.replace(
            video,
            **{field: getattr(video, field).to(place) for field in ("tokens", "frame", "slot")},
            tower={key: values.to(place) for key, values in video.tower.items()},
        )
        options = OPTIONS.get(name, {"decoding_layer": 2})
        decoder = xcomp.Decoder(backbone.to(place), xcomp.load_compressor(name, **options))
        state = decoder.prefill(moved, PREFIX, SUFFIX)
        found.append((state.tokens_per_layer, state.logits.cpu(), decoder.decode(state, [7]).cpu()))
    (counts, *logits), (others, *more) = found
    assert counts == others and all(relative_error(a, b) < 1e-4 for a, b in zip(logits, more))


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, option", [("holitom", "inner_layer"), ("prunevid", "layer"), ("dycoke", "decoding_layer")]
)
def test_layers_that_the_model_has_not_are_refused_before_anything_runs(name, option, backbone):
    for layer in (4, 7):
        with pytest.raises(
            ValueError, match=rf"^compressor '{name}': layers \[{layer}(.0)?\] are .* of 4 layers"
        ) as error:
            xcomp.Decoder(backbone, xcomp.load_compressor(name, **{option: layer}))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="layer numbers from 1, or depths"):
        xcomp.load_compressor(name, **{option: 2.5})


@pytest.mark.parametrize(
    "name, options",
    [
        ("holitom", {"inner_ratio": 1.0}),
        ("prunevid", {"alpha": 0.0}),
        ("dycoke", {"decoding_drop": 1.0}),
    ],
)
def test_shares_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        xcomp.load_compressor(name, **options)


def test_what_is_off_acts_before_the_language_model_alone():
    for name, options in (("holitom", {}), ("prunevid", {"layer": None}), ("dycoke", {})):
        assert not xcomp.compressor.acts_inside(xcomp.load_compressor(name, **options))
    assert math.isclose(PruneVid.Config().layer * 32, 11) and dataclasses.is_dataclass(PruneVid.Config)

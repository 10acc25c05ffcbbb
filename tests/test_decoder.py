"""The decoder against transformers' own forward and against a slow reference that masks instead of dropping."""

import itertools

import pytest
import torch
from conftest import FAMILIES, relative_error
from slow_pass import random_texts, reference_logits
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import xcomp
from xcomp.backbone import FrameText, attention_probabilities, repeat_heads
from xcomp.compressor import Compressor, Reduction
from xcomp.decoder import Decoder, QuestionNeeded
from xcomp.registry import plugins

PREFIX, SUFFIX = torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10, 11, 12])
COMPRESSORS = {
    "none": {},
    "lp_comp": {},
    "lp_comp ceil": {"rounding": "ceil"},
    "lp_comp steps": {"schedule": "steps", "steps": {1: 4, 3: 1}, "rule": "last_of_group"},
    "uniform_drop": {},
    "avg_pool": {"tokens": 3},
}
BATCHED = COMPRESSORS | {"attention_drop": {}, "attention_drop uniform": {"uniform_stages": 1}}
BATCHED |= {name: {} for name in plugins("compressor") if name not in BATCHED}


def compressor(name):
    return xcomp.load_compressor(name.split()[0], **BATCHED[name])


def tokens(backbone, frames=6, seed=1):
    torch.manual_seed(seed)
    return backbone.encode(torch.rand(frames, 3, 2, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_compression_equals_transformers(make_backbone, family):
    backbone = make_backbone(family=family)
    visual = tokens(backbone)
    embeds = torch.cat([backbone.embed(PREFIX), visual.flatten(0, 1), backbone.embed(SUFFIX)])[None]
    with torch.no_grad():
        theirs = backbone.lm_head(backbone.language_model(inputs_embeds=embeds).last_hidden_state)[:, -1]
        ours = Decoder(backbone).prefill(visual, PREFIX, SUFFIX).logits
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("drop_early", ["off", "output", "query"])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_prefill_equals_masking_reference(make_backbone, name, drop_early):
    backbone = make_backbone()
    with torch.no_grad():
        rule, visual = compressor(name), tokens(backbone)
        ours = Decoder(backbone, rule, drop_early=drop_early).prefill(visual, PREFIX, SUFFIX)
        theirs = reference_logits(backbone, rule, visual, PREFIX, SUFFIX)
    assert relative_error(ours.logits, theirs[-1:]) < 1e-5
    width = rule.before_llm(visual).shape[1]
    assert ours.tokens_per_layer == [6 * len(slots) for slots in rule.plan(4, width)]
    assert [layer.keys.shape[2] - 8 for layer in ours.cache.layers] == ours.tokens_per_layer


@pytest.mark.parametrize("name", COMPRESSORS)
def test_decode_and_extend_equal_a_longer_prefill(make_backbone, name):
    backbone, extra = make_backbone(), torch.tensor([20, 21, 22])
    with torch.no_grad():
        decoder, visual = Decoder(backbone, compressor(name)), tokens(backbone)
        whole = decoder.prefill(visual, PREFIX, torch.cat([SUFFIX, extra]))
        state = decoder.prefill(visual, PREFIX, SUFFIX)
        for token in extra:
            logits = decoder.decode(state, token)
        assert relative_error(logits, whole.logits) < 1e-5
        assert torch.equal(logits, state.logits)
        video = decoder.prefill_video(visual, PREFIX)
        before = [layer.keys.clone() for layer in video.cache.layers]
        first = decoder.extend(video.fork(), torch.cat([SUFFIX, extra]))
        second = decoder.extend(video.fork(), SUFFIX)
    assert relative_error(first.logits, whole.logits) < 1e-5
    assert relative_error(second.logits, decoder.prefill(visual, PREFIX, SUFFIX).logits) < 1e-5
    assert all(torch.equal(a, b.keys) for a, b in zip(before, video.cache.layers))
    assert first.tokens_per_layer == whole.tokens_per_layer


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_gives_the_logits_of_each_alone(make_backbone, name):
    backbone = make_backbone()
    torch.manual_seed(3)
    videos = [torch.rand(frames, 3, 2, 2) for frames in (2, 8, 4, 6)]
    with torch.no_grad():
        videos = [backbone.visual(pixels, compressor(name).needs) for pixels in videos]
    prefixes = [torch.randint(0, 97, (n,)) for n in (3, 2, 5, 3)]
    suffixes = [torch.randint(0, 97, (n,)) for n in (4, 7, 1, 9)]
    following = torch.randint(0, 97, (3, 4))
    decoder = Decoder(backbone, compressor(name))
    with torch.no_grad():
        alone = []
        for i in range(4):
            state = decoder.prefill(videos[i], prefixes[i], suffixes[i])
            alone.append([state.logits[0], *(decoder.decode(state, step[i])[0] for step in following)])
        for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 7):
            state = decoder.prefill(*([x[i] for i in order] for x in (videos, prefixes, suffixes)))
            together = [state.logits, *(decoder.decode(state, step[list(order)]) for step in following)]
            for row, i in enumerate(order):
                for step in range(4):
                    assert relative_error(together[step][row], alone[i][step]) < 2e-5
            try:
                stored = decoder.prefill_video([videos[i] for i in order], [prefixes[i] for i in order])
            except QuestionNeeded:
                assert name not in COMPRESSORS
                continue
            extended = decoder.extend(stored, [suffixes[i] for i in order]).logits
            for row, i in enumerate(order):
                assert relative_error(extended[row], alone[i][0]) < 2e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("drop_early", ["off", "output", "query"])
def test_gradients_equal_masking_reference(make_backbone, drop_early, checkpointing):
    backbone, rule = make_backbone(), compressor("lp_comp")
    backbone.train()
    pixels, targets = torch.rand(6, 3, 2, 2), torch.tensor([1, 2, 3])

    def gradients(loss):
        backbone.zero_grad()
        loss.backward()
        return {k: p.grad.clone() for k, p in backbone.named_parameters() if p.grad is not None}

    decoder = Decoder(backbone, rule, drop_early=drop_early, checkpointing=checkpointing)
    logits = decoder.logits(backbone.encode(pixels), PREFIX, SUFFIX, [3])
    ours = gradients(torch.nn.functional.cross_entropy(logits, targets))
    theirs_logits = reference_logits(backbone, rule, backbone.encode(pixels), PREFIX, SUFFIX)[-3:]
    theirs = gradients(torch.nn.functional.cross_entropy(theirs_logits, targets))
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert max(relative_error(ours[k], theirs[k]) for k in ours if theirs[k].abs().max() > 1e-8) < 1e-4


@pytest.mark.parametrize("name", ["lp_comp", "lp_comp steps", "uniform_drop"])
def test_dropping_early_changes_neither_logits_nor_gradients(make_backbone, name):
    backbone = make_backbone().train()
    pixels, found = torch.rand(6, 3, 2, 2), {}
    for drop_early in ("off", "output", "query"):
        backbone.zero_grad()
        decoder = Decoder(backbone, compressor(name), drop_early=drop_early)
        logits = decoder.logits(backbone.encode(pixels), PREFIX, SUFFIX, [3])
        torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2, 3])).backward()
        found[drop_early] = {k: p.grad.clone() for k, p in backbone.named_parameters()} | {"logits": logits.detach()}
    for drop_early in ("output", "query"):
        for key, value in found["off"].items():
            if value.abs().max() > 1e-8:  # the keys' biases have no effect, and rounding for a gradient
                assert relative_error(found[drop_early][key], value) < 1e-5, key


def test_logits_of_a_batch_are_packed(make_backbone):
    backbone = make_backbone()
    decoder = Decoder(backbone, compressor("lp_comp"))
    videos = [tokens(backbone, 2), tokens(backbone, 4)]
    with torch.no_grad():
        packed = decoder.logits(videos, [PREFIX, PREFIX], [SUFFIX, SUFFIX[:3]], [4, 2])
        alone = [decoder.logits(v, PREFIX, s, [n]) for v, s, n in zip(videos, (SUFFIX, SUFFIX[:3]), (4, 2))]
    assert relative_error(packed, torch.cat(alone)) < 2e-5


def first_slots(num_layers, width):
    """A plan by which a frame's last tokens leave: the one before the question, too."""
    return [tuple(range(width))] * 2 + [tuple(range(max(1, width // 2)))] * (num_layers - 2)


class FirstSlots(Compressor):
    """By that plan, or by what a rule after the second layer says: which positions stay, or a reduction to them."""

    def __init__(self, form):
        super().__init__(None)
        if form == "plan":
            self.plan = first_slots
        else:
            self.after_layer, self.form = self._rule, form

    def _rule(self, output):
        if output.layer != 1:
            return None
        keep = (output.layout.slot < 4) & output.layout.real
        if self.form == "mask":
            return keep
        return Reduction([row.nonzero()[:, 0] for row in keep])


@pytest.mark.parametrize("name", [*COMPRESSORS, "plan", "mask", "order"])
def test_any_text_may_be_predicted(make_backbone, name):
    """By what stands before each at the last layer: of the first behind the video, the last token left of that."""
    backbone = make_backbone()
    with torch.no_grad():
        own = name in ("plan", "mask", "order")
        rule, visual = FirstSlots(name) if own else compressor(name), tokens(backbone)
        slow = FirstSlots("plan") if own else rule
        theirs = reference_logits(backbone, slow, visual, PREFIX, SUFFIX)
        width = slow.before_llm(visual).shape[1]
        left = max(slow.plan(backbone.num_layers, width)[-1])
        behind = len(PREFIX) + 6 * width
        before_question = behind - width + left  # the last frame's last token
        rows = [behind + 3, behind + 4, 0, 1, before_question, behind, behind + 1]
        ours = Decoder(backbone, rule).logits(visual, PREFIX, SUFFIX, [2], predicted=torch.tensor([1, 2, 3, 4, 5]))
    assert relative_error(ours, theirs[rows]) < 1e-5


@pytest.mark.parametrize("name", ["none", "lp_comp", "avg_pool", "attention_drop", "fastv", "tome", "framefusion"])
def test_text_alone_and_beside_videos_equals_transformers(make_backbone, name):
    backbone = make_backbone()
    decoder, video = Decoder(backbone, compressor(name)), tokens(backbone)
    with torch.no_grad():
        embeds = backbone.embed(torch.cat([PREFIX, SUFFIX]))[None]
        theirs = backbone.lm_head(backbone.language_model(inputs_embeds=embeds).last_hidden_state)[0]
        alone = decoder.logits([None], [PREFIX], [SUFFIX], [3], predicted=[[1, 3]])
        shown = decoder.logits([video], [PREFIX], [SUFFIX[:4]], [1], predicted=[[2]])
        both = decoder.logits(
            [None, video, None], [PREFIX] * 3, [SUFFIX, SUFFIX[:4], SUFFIX], [3, 1, 1], predicted=[[1, 3], [2], []]
        )
    assert relative_error(alone, theirs[[5, 6, 7, 0, 2]]) < 1e-5
    assert relative_error(both, torch.cat([alone, shown, theirs[-1:]])) < 2e-5


def test_eager_equals_sdpa(make_backbone):
    with torch.no_grad():
        logits = []
        for attn in ("sdpa", "eager"):
            backbone = make_backbone(attn=attn)
            logits.append(Decoder(backbone, compressor("lp_comp")).prefill(tokens(backbone), PREFIX, SUFFIX).logits)
    assert relative_error(*logits) < 1e-5


def test_flash_attention_runs_padded_batches_at_their_own_lengths(make_backbone, monkeypatch):
    """A stand-in for flash-attention 2, which needs a GPU: it must get a padding mask wherever there is padding."""
    calls = []

    def flash(module, queries, keys, values, mask, dropout=0.0, scaling=None, is_causal=None):
        calls.append(mask)
        assert mask is None or (is_causal and mask.shape == (queries.shape[0], queries.shape[2]))
        out = torch.full_like(queries.transpose(1, 2), 1e3)  # what stands at padding must not matter
        for row in range(len(queries)):
            n = int(mask[row].sum()) if mask is not None else queries.shape[2]
            parts = [t[row : row + 1, :, : n if is_causal else None] for t in (queries, keys, values)]
            weights = attention_probabilities(*parts[:2], causal=is_causal)
            out[row, :n] = (weights @ repeat_heads(parts[2], weights.shape[1])).transpose(1, 2)[0]
        return out, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    plain, fast = make_backbone(), make_backbone()
    fast.text_config._attn_implementation = "flash_attention_2"
    rule = compressor("lp_comp")
    with torch.no_grad():
        for frames, padded in ((4, False), (2, True)):
            calls.clear()
            videos = [tokens(plain, 4), tokens(plain, frames)]
            theirs, ours = (
                Decoder(b, rule, drop_early="off").prefill(videos, [PREFIX] * 2, [SUFFIX] * 2) for b in (plain, fast)
            )
            assert relative_error(ours.logits, theirs.logits) < 1e-5
            assert len(calls) == 4 - padded  # the last layer's few rows: under a mask where there is padding
            assert all((mask is not None) == padded for mask in calls)


def test_too_many_frames_name_the_largest_number_that_fits(make_backbone):
    backbone = make_backbone()
    backbone.text_config.max_position_embeddings = 40
    with pytest.raises(ValueError, match=r"6 frames make a sequence of 56 tokens.*takes 40; at most 4 frames fit"):
        Decoder(backbone).prefill(tokens(backbone), PREFIX, SUFFIX)


# --- text between frames ----------------------------------------------------------------------------------------------


class PairsOfFrames(xcomp.Compressor):
    """Averages two frames into one before the language model, then drops as LP-Comp does."""

    def before_llm(self, tokens):
        return tokens.unflatten(0, (-1, 2)).mean(1)

    def plan(self, num_layers, tokens_per_frame):
        return xcomp.load_compressor("lp_comp").plan(num_layers, tokens_per_frame)


@pytest.mark.parametrize("drop_early", ["off", "output", "query"])
@pytest.mark.parametrize("name", [*COMPRESSORS, "pairs of frames"])
@torch.no_grad()
def test_text_between_frames_equals_masking_reference(make_backbone, name, drop_early):
    backbone = make_backbone()
    rule = PairsOfFrames(None) if name == "pairs of frames" else compressor(name)
    visual, texts = tokens(backbone), random_texts(6)
    decoder = Decoder(backbone, rule, drop_early=drop_early)
    ours = decoder.prefill(visual, PREFIX, SUFFIX, texts)
    theirs = reference_logits(backbone, rule, visual, PREFIX, SUFFIX, texts)
    assert relative_error(ours.logits, theirs[-1:]) < 1e-5
    assert relative_error(decoder.logits(visual, PREFIX, SUFFIX, [3], texts), theirs[-3:]) < 1e-5
    stored = decoder.prefill_video(visual, PREFIX, texts)
    assert relative_error(decoder.extend(stored.fork(), SUFFIX).logits, theirs[-1:]) < 1e-5
    several = decoder.extend(stored.repeat(2), [SUFFIX, SUFFIX[:3]]).logits
    assert relative_error(several[0], theirs[-1]) < 1e-5
    length = sum(len(ids) for text in texts for ids in text)
    assert length > 10 and [layer.keys.shape[2] - 3 - length for layer in stored.cache.layers] == ours.tokens_per_layer
    plain = decoder.prefill(visual, PREFIX, SUFFIX)
    assert ours.tokens_per_layer == plain.tokens_per_layer and relative_error(ours.logits, plain.logits) > 1e-2
    empty = [FrameText(PREFIX[:0], PREFIX[:0])] * 6
    assert torch.equal(decoder.prefill(visual, PREFIX, SUFFIX, empty).logits, plain.logits)


@pytest.mark.parametrize("name", BATCHED)
@torch.no_grad()
def test_a_batch_with_text_between_frames_gives_the_logits_of_each_alone(make_backbone, name):
    """Under every compressor; one of the samples has no such text."""
    backbone = make_backbone()
    decoder = Decoder(backbone, compressor(name))
    torch.manual_seed(5)
    videos = [backbone.visual(torch.rand(n, 3, 2, 2), decoder.compressor.needs) for n in (2, 8, 6)]
    samples = list(zip(videos, [PREFIX] * 3, [SUFFIX, SUFFIX[:2], SUFFIX], [random_texts(2), random_texts(8), None]))
    alone = [decoder.prefill(*sample) for sample in samples]
    batch = decoder.prefill(*map(list, zip(*samples)))
    for row, state in enumerate(alone):
        assert [counts[row] for counts in batch.tokens_per_layer] == state.tokens_per_layer
        assert relative_error(batch.logits[row], state.logits[0]) < 2e-5
        assert all(torch.equal(a.between[0].sum(), b.between[row].sum()) for a, b in zip(state.layouts, batch.layouts))
    try:
        stored = decoder.prefill_video(videos, [PREFIX] * 3, [sample[3] for sample in samples])
    except QuestionNeeded:
        return
    extended = decoder.extend(stored, [sample[2] for sample in samples]).logits
    assert relative_error(extended, torch.cat([state.logits for state in alone])) < 2e-5


class FirstAndThird(xcomp.Compressor):
    """Frames of unequal length, one of them without any token."""

    def compress(self, visual, question):
        keep = torch.isin(visual.frame, torch.tensor([0, 2])) & (visual.slot != 1)
        return visual.select(keep)


@torch.no_grad()
def test_the_text_of_a_frame_without_tokens_stays(make_backbone):
    backbone, texts = make_backbone(), random_texts(4, seed=1)
    visual, decoder = tokens(backbone, 4), Decoder(backbone, FirstAndThird(None))
    parts = [backbone.embed(PREFIX)]
    for number, (before, behind) in enumerate(texts):
        left = visual[number, [0, *range(2, 8)]] if number in (0, 2) else visual[number, :0]
        parts += [backbone.embed(before), left, backbone.embed(behind)]
    embeds = torch.cat([*parts, backbone.embed(SUFFIX)])[None]
    theirs = backbone.lm_head(backbone.language_model(inputs_embeds=embeds).last_hidden_state)[:, -1]
    assert all(len(ids) for ids in texts[1]) or all(len(ids) for ids in texts[3])
    assert relative_error(decoder.prefill(visual, PREFIX, SUFFIX, texts).logits, theirs) < 1e-5
    assert relative_error(decoder.extend(decoder.prefill_video(visual, PREFIX, texts), SUFFIX).logits, theirs) < 1e-5


def test_text_between_frames_is_checked_and_counted(make_backbone):
    backbone, texts = make_backbone(), [FrameText(PREFIX, PREFIX[:1])] * 6
    with pytest.raises(ValueError, match="5 texts between frames were given for a video of 6 frames"):
        Decoder(backbone).prefill(tokens(backbone), PREFIX, SUFFIX, texts[1:])
    with pytest.raises(ValueError, match=r"suffixes \(1\) and texts between frames \(2\)"):
        Decoder(backbone).prefill([tokens(backbone)], [PREFIX], [SUFFIX], [texts, None])
    backbone.text_config.max_position_embeddings = 60
    with pytest.raises(ValueError, match=r"6 frames make a sequence of 80 tokens.*takes 60; at most 4 frames fit"):
        Decoder(backbone).prefill(tokens(backbone), PREFIX, SUFFIX, texts)
    Decoder(backbone).prefill(tokens(backbone, 4), PREFIX, SUFFIX, texts[:4])


def test_the_text_behind_a_video_is_none_of_that_between_its_frames(make_backbone):
    backbone, seen = make_backbone(), []

    class Looks(xcomp.Compressor):
        def plan(self, num_layers, tokens_per_frame):
            return None

        def after_layer(self, output):
            seen.append(output.text_behind(0).tolist())
            return output.layout.frame == 0

    with torch.no_grad():
        state = Decoder(backbone, Looks(None)).prefill(tokens(backbone), PREFIX, SUFFIX, random_texts(6))
    widths = [layout.width for layout in state.prefilled]
    assert seen == [list(range(width - 5, width)) for width in widths[:3]] and widths[1] < widths[0]


class Keeps(xcomp.Compressor):
    def __init__(self, plan):
        super().__init__(None)
        self.kept = plan

    def plan(self, num_layers, tokens_per_frame):
        return self.kept


@pytest.mark.parametrize(
    "plan, message",
    [
        ([(0, 1)] * 3, "names 3 layers, but the language model has 4"),
        ([(0, 1), (0, 1), (), ()], "keeps no token of a frame at layer 3"),
        ([(0, 0)] * 4, "each slot once"),
        ([(7, 8)] * 4, "names slot 8 at layer 1; a frame has slots 0..7"),
        ([(0,), (0, 1), (0,), (0,)], "brings back slots"),
    ],
)
def test_a_plan_that_breaks_its_contract_is_refused(make_backbone, plan, message):
    backbone = make_backbone()
    with pytest.raises(ValueError, match=message):
        Decoder(backbone, Keeps(plan)).prefill(tokens(backbone), PREFIX, SUFFIX)

"""Answers written by transformers' generation loop: against a plain loop, and against transformers' own models."""

import pytest
import torch
import transformers

import xcomp
from xcomp.decoder import Decoder

PREFIX, SUFFIX = torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10, 11, 12])


@pytest.fixture
def backbone(make_backbone):
    return make_backbone()


def tokens(backbone, frames, seed=1):
    torch.manual_seed(seed)
    return backbone.encode(torch.rand(frames, 3, 2, 2))


def batch(backbone, rule="lp_comp"):
    """A batch of two unequal prompts, run."""
    decoder = Decoder(backbone, xcomp.load_compressor(rule))
    videos = [tokens(backbone, 6), tokens(backbone, 4, seed=2)]
    return decoder, decoder.prefill(videos, [PREFIX, PREFIX[:1]], [SUFFIX, SUFFIX[:3]])


def plain_greedy(decoder, state, steps, penalty=1.0):
    """One sample, the obvious way; the penalty divides positive logits of written tokens and multiplies negative."""
    written = []
    for _ in range(steps):
        logits = state.logits[0].clone()
        for token in set(written):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        written.append(int(logits.argmax()))
        if written[-1] in decoder.backbone.stop_ids:
            return written[:-1]
        decoder.decode(state, written[-1:])
    return written


@torch.no_grad()
@pytest.mark.parametrize("rule", ["none", "lp_comp", "avg_pool"])
@pytest.mark.parametrize("penalty", [1.0, 1.1, 5.0])
def test_greedy_equals_a_plain_loop_for_each_sample_of_a_batch(backbone, rule, penalty):
    decoder, state = batch(backbone, rule)
    together = decoder.generate(state, max_new_tokens=7, repetition_penalty=penalty)
    alone = [
        decoder.prefill(tokens(backbone, 6), PREFIX, SUFFIX),
        decoder.prefill(tokens(backbone, 4, seed=2), PREFIX[:1], SUFFIX[:3]),
    ]
    assert together == [plain_greedy(decoder, s, 7, penalty) for s in alone]
    if penalty == 5.0:
        assert all(len(set(ids)) > 2 for ids in together)  # the penalty does something


@torch.no_grad()
def test_a_sample_that_stops_leaves_the_others_running(backbone, monkeypatch):
    decoder, state = batch(backbone)
    free = decoder.generate(state.fork(), max_new_tokens=8, repetition_penalty=5.0)
    monkeypatch.setattr(backbone.tokenizer, "eos_token_id", free[0][2])
    first = free[0].index(free[0][2])
    cut = free[1].index(free[0][2]) if free[0][2] in free[1] else 8
    assert decoder.generate(state, max_new_tokens=8, repetition_penalty=5.0) == [free[0][:first], free[1][:cut]]


def theirs(backbone, **options):
    """transformers' own model with the same weights, generating after the same embeddings."""
    model = transformers.Qwen2ForCausalLM(backbone.text_config).eval()
    model.model, model.lm_head = backbone.language_model, backbone.lm_head
    visual = tokens(backbone, 6).flatten(0, 1)
    embeds = torch.cat([backbone.embed(PREFIX), visual, backbone.embed(SUFFIX)])[None]
    torch.manual_seed(7)
    written = model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), eos_token_id=0, pad_token_id=0, **options
    )
    return [ids[: ids.index(0)] if 0 in ids else ids for ids in written.tolist()]


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.3},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 4},
        {"do_sample": True, "num_beams": 3},
    ],
)
def test_beams_and_samples_are_those_of_transformers(backbone, options):
    decoder = Decoder(backbone)
    options = {"max_new_tokens": 6, "do_sample": False} | options
    state = decoder.prefill(tokens(backbone, 6), PREFIX, SUFFIX)
    torch.manual_seed(7)
    ours = decoder.generate(state, **options)
    assert ours == theirs(backbone, **options)


@torch.no_grad()
def test_beams_leave_the_state_as_it_is_and_work_with_dropping(backbone):
    decoder, state = batch(backbone)
    lengths = [layer.keys.shape for layer in state.cache.layers]
    beams = decoder.generate(state, max_new_tokens=5, num_beams=3)
    assert [layer.keys.shape for layer in state.cache.layers] == lengths
    alone = decoder.prefill(tokens(backbone, 4, seed=2), PREFIX[:1], SUFFIX[:3])
    assert beams[1] == decoder.generate(alone, max_new_tokens=5, num_beams=3)[0]
    assert len({len(layer.keys[0, 0]) for layer in state.cache.layers}) > 1  # caches of different lengths


@torch.no_grad()
def test_stopping_criteria_processors_and_streamers_are_passed_on(backbone):
    seen = []

    class Listener(transformers.generation.BaseStreamer):
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    class AfterThree(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 3)

    class Only(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.tensor([30]), 1e4)

    decoder = Decoder(backbone)
    state = decoder.prefill(tokens(backbone, 6), PREFIX, SUFFIX)
    written = decoder.generate(
        state, max_new_tokens=9, streamer=Listener(), stopping_criteria=[AfterThree()], logits_processor=[Only()]
    )
    assert written == [[30, 30, 30]]
    assert seen == [30, 30, 30, "end"]


@torch.no_grad()
def test_an_option_that_does_not_exist_is_refused(backbone):
    decoder = Decoder(backbone)
    state = decoder.prefill(tokens(backbone, 6), PREFIX, SUFFIX)
    with pytest.raises((TypeError, ValueError), match="num_beam"):
        decoder.generate(state, num_beam=3)

"""The whole path against what the released code computes on a small random checkpoint (float32, CPU)."""

import json

import pytest
import torch
from conftest import relative_error
from golden import FOLDER, needs_golden

import xcomp

pytestmark = needs_golden
TOLERANCE = 2e-5
VARIANTS = {
    "none": ("none", {}),
    "lp_comp": ("lp_comp", {}),
    "uniform_cosine": ("uniform_drop", {}),
    "stepwise_10_20_stride4": ("lp_comp", {"schedule": "steps", "steps": {10: 4, 20: 1}, "rule": "last_of_group"}),
}


@pytest.fixture(scope="module")
def released():
    from safetensors.torch import load_file

    backbone = xcomp.load_backbone("videochat_flash", checkpoint=str(FOLDER)).eval()
    golden = load_file(FOLDER / "golden.safetensors")
    meta = json.loads((FOLDER / "meta.json").read_text())
    pixels = (golden["frames_uint8"].float() - 127) / 63.5
    pixels = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return backbone, golden, meta, pixels


@pytest.fixture(scope="module")
def tokens(released):
    backbone, _, meta, pixels = released
    with torch.no_grad():
        return backbone.encode(pixels[: meta["T"]])


@pytest.mark.parametrize("drop_early", ["off", "output", "query"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder(released, tokens, variant, drop_early):
    backbone, golden, _, _ = released
    name, options = VARIANTS[variant]
    decoder = xcomp.Decoder(backbone, xcomp.load_compressor(name, **options), drop_early=drop_early)
    suffix = torch.cat([golden["ids_question"], golden["ids_assistant_header"]])
    with torch.no_grad():
        state = decoder.prefill(tokens, golden["ids_prefix"], suffix)
        fork = state.fork()
        assert state.tokens_per_layer == golden[f"{variant}.visual_tokens_per_layer"].tolist()
        assert relative_error(state.logits[0], golden[f"{variant}.last_logits"]) < TOLERANCE
        keys = state.cache.layers[27].keys[0, 0]
        assert relative_error(keys, golden[f"{variant}.key_cache_layer27_head0"]) < TOLERANCE
        forced = torch.cat([decoder.decode(state, token) for token in golden["ids_forced_decode"]])
        assert relative_error(forced, golden[f"{variant}.forced_decode_logits"]) < TOLERANCE
        generated = decoder.generate(fork, max_new_tokens=8)[0]
    assert generated == golden[f"{variant}.generated"].tolist()


@pytest.mark.parametrize("variant", ["segmented", "global"])
def test_clip_scores(released, tokens, variant):
    backbone, golden, meta, _ = released
    selector = xcomp.load_selector("qc_comp", variant=variant, query_bias=meta["query_bias"])
    ids = [golden[f"ids_{part}"] for part in ("prefix", "question", "assistant_header")]
    scores = selector.clip_scores(backbone, tokens, *ids, compressor=xcomp.load_compressor("lp_comp"))
    theirs = golden[f"qc.{variant}.clip_scores"]
    discarded = theirs > 1e8
    assert torch.equal(scores.isnan(), discarded)
    assert relative_error(scores[~discarded], theirs[~discarded]) < TOLERANCE


def test_frame_selection_and_answer(released):
    backbone, golden, meta, pixels = released
    selector = xcomp.load_selector("qc_comp", query_bias=meta["query_bias"], n_repeat=meta["n_repeat"])
    compressor = xcomp.load_compressor("lp_comp")
    ids = [golden[f"ids_{part}"] for part in ("prefix", "question", "assistant_header")]
    with torch.no_grad():
        scores = selector.score_frames(backbone, pixels, *ids, compressor=compressor)
        assert relative_error(scores, golden["qc.frame_scores"]) < TOLERANCE
        selected = selector.select(scores, meta["n_select"])
        assert selected == golden["qc.selected"].tolist()
        tokens = backbone.encode(pixels[selected])
        state = xcomp.Decoder(backbone, compressor).prefill(tokens, ids[0], torch.cat(ids[1:]))
    assert relative_error(state.logits[0], golden["qc.answer_logits"]) < TOLERANCE

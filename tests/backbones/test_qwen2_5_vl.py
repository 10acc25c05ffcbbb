"""Qwen2.5-VL against transformers' own forward, generation, positions and image processor."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import relative_error
from damage import check_refused, contents, cut, drop_tensors, edit, edit_tensors
from safetensors.torch import load_file
from tiny_qwen import SIZE, SPECIAL, VIDEO_ID, architecture, save_tokenizer
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil
from xcomp.backbones.qwen2_5_vl import Qwen25VL, flatten_patches, model_config, rope_positions

import xcomp
from xcomp.backbone import ShownVideo
from xcomp.config import Generation, Sampling
from xcomp.data.module import Sample
from xcomp.data.records import Conversation, tokenise
from xcomp.decoder import Decoder
from xcomp.layout import TokenLayout
from xcomp.model import Query
from xcomp.testing import check_backbone, check_compressor, check_selector

SHOWN = ShownVideo(4.0, 6)
GRID = (3, 4)  # of a frame's tokens


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("words") / "plain")


def build(content: dict | None = None, *, seed: int = 0, **options) -> Qwen25VL:
    """A tiny model whose biases and norms are random too, so that leaving one out shows."""
    torch.manual_seed(seed)
    model = Qwen25VL(Qwen25VL.Config(architecture=content or architecture(), **SIZE | options)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def load(folder, **options) -> Qwen25VL:
    return Qwen25VL(Qwen25VL.Config(checkpoint=str(folder), **options)).eval()


def video(num_frames: int = 6, height: int = 24, width: int = 32) -> torch.Tensor:
    return torch.randn(num_frames, 3, height, width, generator=torch.Generator().manual_seed(num_frames))


def slow_patches(pixels: torch.Tensor, patch: int = 4, merge: int = 2) -> torch.Tensor:
    """Patch by patch: (T, 3, h, w) → (patches, 3 · 2 · patch²)."""
    rows, columns = (side // patch for side in pixels.shape[-2:])
    found = []
    for pair in range(len(pixels) // 2):
        for row in range(0, rows, merge):
            for column in range(0, columns, merge):
                for r in range(row, row + merge):
                    for c in range(column, column + merge):
                        part = pixels[2 * pair : 2 * pair + 2, :, r * patch : (r + 1) * patch]
                        found.append(part[..., c * patch : (c + 1) * patch].transpose(0, 1).flatten())
    return torch.stack(found)


def as_transformers_takes_it(model: Qwen25VL, prompt, pixels: torch.Tensor) -> dict:
    """The model's own inputs: a placeholder for every token of the video, patches, grid and kinds of tokens."""
    places = torch.full((len(pixels) // 2 * model.tokens_per_frame,), VIDEO_ID)
    ids = torch.cat([prompt.prefix_ids, places, prompt.suffix_ids]).unsqueeze(0)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": slow_patches(pixels),
        "video_grid_thw": torch.tensor([[len(pixels) // 2, pixels.shape[2] // 4, pixels.shape[3] // 4]]),
        "second_per_grid_ts": torch.tensor([model.frame_options["second_per_grid"]]),
        "mm_token_type_ids": 2 * (ids == VIDEO_ID).int(),
    }


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_frames, seconds, size",
    [
        (6, 1.0, (24, 32)),
        (16, 4.0, (24, 32)),  # the video's end lies far behind the text
        (6, 0.3, (40, 16)),  # several frames at one time, and an upright picture
        (2, 1.0, (8, 8)),  # one token
    ],
)
def test_forward_and_generation_are_transformers_own(num_frames, seconds, size, words, tmp_path):
    height, width = size
    model = build(seed=2, tokenizer=words, height=height, width=width, second_per_grid=seconds, clip_batch=2)
    model.save_pretrained(tmp_path / "m")
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "m").eval()
    pixels, prompt = video(num_frames, *size), model.prompt("What colour is the cross?", SHOWN)
    inputs, count = as_transformers_takes_it(model, prompt, pixels), len(prompt.suffix_ids)
    decoder = Decoder(model, xcomp.load_compressor("none"))
    with torch.no_grad():
        expected = theirs(**inputs).logits[0, -count:]
        tokens = model.encode(pixels)
        state = decoder.prefill(tokens, prompt.prefix_ids, prompt.suffix_ids)
        ours = decoder.logits(tokens, prompt.prefix_ids, prompt.suffix_ids, [count])
        assert relative_error(state.logits[0], expected[-1]) < 1e-5
        assert relative_error(ours, expected) < 1e-5
        stored = decoder.extend(decoder.prefill_video(tokens, prompt.prefix_ids), prompt.suffix_ids)
        assert relative_error(stored.logits[0], expected[-1]) < 1e-5
        length = dict(max_new_tokens=8, min_new_tokens=8, eos_token_id=list(model.stop_ids))
        written = theirs.generate(**inputs, **length, do_sample=False)
    answer = decoder.generate(state, max_new_tokens=8, min_new_tokens=8)[0]
    assert answer == written[0, inputs["input_ids"].shape[1] :].tolist() and len(set(answer)) > 1


def test_every_step_of_generation_is_transformers_own(words):
    """Logits, not the chosen tokens alone, where the video ends far behind the question."""
    model = build(seed=3, tokenizer=words, second_per_grid=30.0)
    pixels, prompt = video(8), model.prompt("Why?", SHOWN)
    decoder = Decoder(model)
    with torch.no_grad():
        inputs = as_transformers_takes_it(model, prompt, pixels)
        options = dict(max_new_tokens=6, min_new_tokens=6, output_logits=True, return_dict_in_generate=True)
        theirs = model.model.generate(**inputs, do_sample=False, **options)
        state = decoder.prefill(model.encode(pixels), prompt.prefix_ids, prompt.suffix_ids)
        steps = [state.logits]
        for token in theirs.sequences[0, -6:-1]:
            steps.append(decoder.decode(state, token[None]))
    assert relative_error(torch.cat(steps), torch.cat(theirs.logits)) < 1e-5


def test_tokens_are_the_models_video_features():
    model = build(clip_batch=2)
    with torch.no_grad():
        theirs = model.model.get_video_features(slow_patches(video(10)), torch.tensor([[5, 6, 8]])).pooler_output[0]
        assert relative_error(model.encode(video(10)), theirs.view(5, 12, 32)) < 1e-5
        alone = model.encode(video(10)[4:6])
    assert relative_error(alone, theirs.view(5, 12, 32)[2:3]) < 1e-5
    assert model.tokens_per_frame == 12 and model.clip_frames == model.merged_frames == 2


def test_patches_are_those_of_transformers_processor():
    assert torch.equal(flatten_patches(video(6).unflatten(0, (-1, 2)), 4, 2), slow_patches(video(6)))
    frame = pictures(1, 24, 32)
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=10**6)
    theirs = processor(images=[frame[0].numpy()], return_tensors="np")
    assert theirs["image_grid_thw"].tolist() == [[1, 6, 8]]
    pixels = build().preprocess(frame)  # nothing is resized
    ours = flatten_patches(pixels.repeat(2, 1, 1, 1)[None], 4, 2)
    torch.testing.assert_close(ours, torch.tensor(np.asarray(theirs["pixel_values"])), atol=2e-6, rtol=0)


# --- positions --------------------------------------------------------------------------------------------------------


def theirs_of(model, prefix: int, frames: int, suffix: int, grid, seconds) -> torch.Tensor:
    """(3, 1, S) by transformers."""
    kinds = torch.tensor([[0] * prefix + [2] * (frames * grid[0] * grid[1]) + [0] * suffix])
    grid = torch.tensor([[frames, 2 * grid[0], 2 * grid[1]]])
    return model.model.model.get_rope_index(kinds, kinds, video_grid_thw=grid, second_per_grid_ts=seconds)[0]


@pytest.mark.parametrize("seconds", [None, 1.0, 2.0, 0.5, 0.3, 1.7, 0.04, 12.5])
@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (1, 1), (1, 7), (5, 1)])
def test_positions_are_transformers_own(grid, seconds):
    model = build()
    for prefix, frames, suffix in [(5, 4, 6), (1, 30, 2), (3, 1, 0), (0, 2, 3)]:
        given = None if seconds is None else [seconds]
        expected = theirs_of(model, prefix, frames, suffix, grid, given)
        layout = TokenLayout.sequence([(prefix, frames, grid[0] * grid[1], suffix)])
        interval = 2 * (1.0 if seconds is None else seconds)
        ours = rope_positions(layout, grid, interval)
        assert ours.dtype == torch.long and torch.equal(ours, expected)
        # An answer and a further question behind it are counted on.
        grown = layout.append(TokenLayout.text([2])).append(TokenLayout.text([3]))
        longer = theirs_of(model, prefix, frames, suffix + 5, grid, given)
        assert torch.equal(rope_positions(grown, grid, interval), longer)


@pytest.mark.parametrize("seed", range(20))
def test_a_token_keeps_its_place_whatever_leaves(seed):
    """Batches of unequal samples, with text appended, and any of the visual tokens gone."""
    rng = torch.Generator().manual_seed(seed)
    parts = [(*torch.randint(1, 6, (2,), generator=rng).tolist(), 12, 3 + b) for b in range(3)]
    layout = TokenLayout.sequence(parts)
    layout = layout.append(TokenLayout.text([2, 4, 1]))
    for _ in range(3):
        layout = layout.append(TokenLayout.text([1] * 3))
    whole = rope_positions(layout, GRID, 2.6)
    for row, (prefix, frames, tokens, suffix) in enumerate(parts):  # each alone, without padding
        alone = TokenLayout.sequence([(prefix, frames, tokens, suffix + [2, 4, 1][row])])
        for _ in range(3):
            alone = alone.append(TokenLayout.text([1]))
        assert torch.equal(whole[:, row, layout.real[row]], rope_positions(alone, GRID, 2.6)[:, 0])
    keep = torch.rand(layout.real.shape, generator=rng) < 0.2
    first = layout.visual.int().argmax(1, keepdim=True)
    keep = (keep | ~layout.visual).scatter(1, first, True)  # a visual token always stays
    index, kept = layout.select(keep)
    expected = whole.gather(2, index.expand(3, -1, -1))
    assert torch.equal(rope_positions(kept, GRID, 2.6)[:, kept.real], expected[:, kept.real])


def test_pooled_tokens_stand_in_the_middle_of_what_they_stand_for():
    """Runs of two, three and all of a frame's twelve tokens."""
    for tokens, places in [(6, [1, 3, 5, 7, 9, 11]), (4, [1, 4, 7, 10]), (1, [6]), (12, list(range(12)))]:
        found = rope_positions(TokenLayout.sequence([(2, 2, tokens, 1)]), GRID, 2)
        assert found[1, 0, 2 : 2 + tokens].tolist() == [2 + p // 4 for p in places]
        assert found[2, 0, 2 + tokens : -1].tolist() == [2 + p % 4 for p in places]
        assert found[:, 0, -1].tolist() == [6, 6, 6]


def test_text_alone_is_counted():
    layout = TokenLayout.text([3, 5])
    assert rope_positions(layout, GRID, 2)[:, 1].tolist() == [[0, 1, 2, 3, 4]] * 3
    assert rope_positions(layout.append(TokenLayout.text([1, 1])), GRID, 2)[0, :, -1].tolist() == [3, 5]


# --- contracts and compression ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"second_per_grid": 9.0}, {"second_per_grid": 0.2, "height": 40, "width": 8}, {"height": 8, "width": 8}],
)
def test_contract(options, words):
    torch.manual_seed(1)
    check_backbone(Qwen25VL, architecture=architecture(), tokenizer=words, **SIZE | options)


def test_contract_with_tied_embeddings_and_three_frames_merged(words):
    content = architecture(vision={"temporal_patch_size": 3}, tie_word_embeddings=True)
    check_backbone(Qwen25VL, architecture=content, tokenizer=words, **SIZE)


@pytest.mark.parametrize("name", ["lp_comp", "avg_pool", "uniform_drop", "attention_drop"])
def test_compressors(name, words):
    model = build(tokenizer=words, second_per_grid=7.0)
    check_compressor(xcomp.load_compressor(name), backbone=model)
    state = Decoder(model, xcomp.load_compressor(name)).prefill(
        model.encode(video()), *((p := model.prompt("Why?", SHOWN)).prefix_ids, p.suffix_ids)
    )
    assert state.tokens_per_layer[-1] < 3 * 12


def test_selectors(words):
    check_selector(xcomp.load_selector("qc_comp", clip_frames=2), backbone=build(tokenizer=words))


class EveryFifth(xcomp.Compressor):
    """Decides from the data: the fifth of the visual tokens with the smallest length leaves after every layer."""

    def plan(self, num_layers, tokens_per_frame):
        return None

    def after_layer(self, output):
        length = output.hidden.norm(dim=-1).masked_fill(~output.layout.visual, math.inf)
        counts = output.layout.visual.sum(1, keepdim=True) // 5
        return length.argsort(1).argsort(1) >= counts


def slow_prefill(model, tokens, prefix, suffix, keep_at) -> torch.Tensor:
    """Logits after the last token. Nothing is dropped: every layer of transformers' runs with the places of the whole
    sequence under a mask that hides what has left. ``keep_at(layer, hidden, kept)`` says what a layer sees."""
    layers = model.language_model
    hidden = torch.cat([model.embed(prefix), tokens.flatten(0, 1), model.embed(suffix)])[None]
    width, visual = hidden.shape[1], torch.zeros(hidden.shape[1], dtype=torch.bool)
    visual[len(prefix) : len(prefix) + tokens.shape[0] * tokens.shape[1]] = True
    expected = theirs_of(
        model, len(prefix), len(tokens), len(suffix), model.grid, [model.frame_options["second_per_grid"]]
    )
    tables = layers.rotary_emb(hidden, expected)
    kept = torch.ones(width, dtype=torch.bool)
    for number, layer in enumerate(layers.layers):
        kept = keep_at(number, hidden[0], kept, visual)
        mask = torch.zeros(width, width).masked_fill(~(torch.ones(width, width).tril().bool() & kept), -1e30)
        mask.fill_diagonal_(0.0)  # rows of what has left must not divide by zero
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=tables)
    return model.lm_head(layers.norm(hidden[:, -1]))


def test_lp_comp_against_masking(words):
    model = build(tokenizer=words, seed=4, second_per_grid=3.0)
    rule, prompt = xcomp.load_compressor("lp_comp"), model.prompt("What colour is the cross?", SHOWN)
    plan = rule.plan(3, 12)
    assert len(plan[0]) > len(plan[1]) > len(plan[2])

    def keep_at(layer, hidden, kept, visual):
        slots = torch.arange(visual.sum()) % 12
        return kept.masked_scatter(visual, torch.isin(slots, torch.tensor(plan[layer])))

    with torch.no_grad():
        tokens = model.encode(video(10))
        slow = slow_prefill(model, tokens, prompt.prefix_ids, prompt.suffix_ids, keep_at)
        for early in ("off", "output", "query"):
            decoder = Decoder(model, rule, drop_early=early)
            state = decoder.prefill(tokens, prompt.prefix_ids, prompt.suffix_ids)
            assert relative_error(state.logits, slow) < 1e-5
        free = Decoder(model).prefill(tokens, prompt.prefix_ids, prompt.suffix_ids)
    assert state.tokens_per_layer == [5 * len(slots) for slots in plan]
    assert relative_error(free.logits, slow) > 1e-3


def test_a_rule_of_the_data_against_masking(words):
    model = build(tokenizer=words, seed=5)
    prompt = model.prompt("What colour is the cross?", SHOWN)

    def keep_at(layer, hidden, kept, visual):
        if layer == 0:
            return kept
        there = (kept & visual).nonzero()[:, 0]
        shortest = there[hidden[there].norm(dim=-1).argsort()[: len(there) // 5]]
        return kept.clone().index_fill(0, shortest, False)

    with torch.no_grad():
        tokens = model.encode(video(10))
        slow = slow_prefill(model, tokens, prompt.prefix_ids, prompt.suffix_ids, keep_at)
        state = Decoder(model, EveryFifth(None)).prefill(tokens, prompt.prefix_ids, prompt.suffix_ids)
    assert state.tokens_per_layer == [60, 48, 39] and relative_error(state.logits, slow) < 1e-5


def test_a_batch_gives_what_each_gives_alone(words):
    """Prefill, a stored video, and steps of decoding, with padding between the parts."""
    model = build(tokenizer=words, seed=6, second_per_grid=6.0)
    for name in ("none", "lp_comp", "attention_drop"):
        decoder = Decoder(model, xcomp.load_compressor(name))
        prompts = [model.prompt(text, SHOWN) for text in ("Why?", "What colour is the cross, after all?", "Who is it?")]
        before, after = [p.prefix_ids for p in prompts], [p.suffix_ids for p in prompts]
        with torch.no_grad():
            videos = [model.encode(video(n)) for n in (4, 10, 2)]
            batch = decoder.prefill(videos, before, after)
            alone = [decoder.prefill(*sample) for sample in zip(videos, before, after)]
            for _ in range(4):
                for row, state in enumerate(alone):
                    assert relative_error(batch.logits[row], state.logits[0]) < 1e-5
                words_now = batch.logits.argmax(-1)
                decoder.decode(batch, words_now)
                for row, state in enumerate(alone):
                    decoder.decode(state, words_now[row : row + 1])
            if name != "attention_drop":
                stored = decoder.extend(decoder.prefill_video(videos, before), after)
                fresh = decoder.prefill(videos, before, after)
                assert relative_error(stored.logits, fresh.logits) < 1e-5


def test_questions_about_video_files(words, needle_videos):
    """A batch through selector, compressor and generation, and a training step: groups are half as many as frames."""
    questions = xcomp.load_benchmark("needle", **needle_videos).questions()[:2]
    rule, selector = xcomp.load_compressor("lp_comp"), xcomp.load_selector("qc_comp", clip_frames=4, window_clips=4)
    sampling, generation = Sampling(rate=4, min_frames=8, max_frames=16), Generation(max_new_tokens=3)
    model = build(tokenizer=words)
    qa = xcomp.VideoQA(model, rule, selector, frames=6, sampling=sampling, generation=generation)
    queries = [Query(q.video, q.question, q.question) for q in questions]
    together = qa.answer(queries)
    for query, answer in zip(queries, together):
        assert answer.tokens_in == answer.tokens_per_layer[0] <= 3 * 12 and len(answer.frames) == 6 == len(
            set(answer.frames)
        )
        assert answer.tokens_per_layer == [3 * len(slots) for slots in rule.plan(3, 12)]
        alone = qa.answer([query])[0]
        assert (alone.text, alone.frames) == (answer.text, answer.frames)
    conversation = Conversation(questions[0].video, (("Why?", "red"),))
    samples = [Sample(video(n), tokenise(model, conversation, SHOWN)) for n in (4, 10)]
    qa._loss(samples)[0].backward()
    assert all(any(p.grad is not None for m in part for p in m.parameters()) for part in model.parts().values())
    with pytest.raises(ValueError, match="5"):
        xcomp.VideoQA(model, frames=5)


# --- QC-Comp ----------------------------------------------------------------------------------------------------------


def slow_window_scores(model, hidden, layer, cells, clips, seconds) -> dict[int, float]:
    """Attention of question rows to clips in a window that stands alone: queries and keys with places of its own.

    ``cells``: (where in ``hidden``, frame or None, slot or None, clip or None, is it a question row).
    """
    block, visual = model.language_model.layers[layer], [c for c in cells if c[1] is not None]
    first = min(c[1] for c in visual)
    prefix = next(i for i, c in enumerate(cells) if c[1] is not None)
    frames = max(c[1] for c in visual) - first + 1
    table = theirs_of(model, prefix, frames, len(cells), model.grid, [seconds])
    text_after = prefix + frames * 12
    places, seen = [], 0
    for i, (_, frame, slot, *_) in enumerate(cells):
        if frame is not None:
            places.append(prefix + (frame - first) * 12 + slot)
        else:
            places.append(i if i < prefix else text_after + seen)
            seen += i >= prefix
    attention, normed = block.self_attn, block.input_layernorm(hidden[[c[0] for c in cells]])
    cos, sin = (t[0] for t in model.language_model.rotary_emb(hidden, table[..., places]))

    def turned(projection):
        x = projection(normed).unflatten(-1, (-1, 16)).transpose(0, 1)
        return x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin

    queries, keys = turned(attention.q_proj), turned(attention.k_proj)
    rows = [i for i, c in enumerate(cells) if c[4]]
    weights = (queries[:, rows] @ keys.transpose(1, 2) / 4).softmax(-1).mean((0, 1))
    return {clip: weights[[i for i, c in enumerate(cells) if c[3] == clip]].mean().item() for clip in clips}


@pytest.mark.parametrize("seconds", [1.0, 0.3, 2.9])  # the latter two are rounded: steps of a window's own
@pytest.mark.parametrize("rule", ["none", "lp_comp"])
def test_qc_comp_windows_have_places_of_their_own(rule, seconds, words):
    model = build(tokenizer=words, seed=7, second_per_grid=seconds)
    for block in model.language_model.layers:  # sharper attention: far from uniform, so that errors show
        block.self_attn.q_proj.weight.data.mul_(3)
    rule, prompt = xcomp.load_compressor(rule), model.prompt("What colour is the cross?", SHOWN)
    # Clips of 4 frames are 2 groups; windows of 2 clips, one clip apart: 6 clips in 5 windows.
    selector = xcomp.load_selector("qc_comp", clip_frames=4, window_clips=2, window_stride=1)
    prefix, question, header = prompt.prefix_ids, prompt.question_ids, prompt.header_ids
    with torch.no_grad():
        tokens = model.encode(video(24))
        ours = selector.clip_scores(model, tokens, prefix, question, header, compressor=rule)
        plan, slow = rule.plan(3, 12), torch.full((3, 6), math.nan)
        tables = model.language_model.rotary_emb(
            tokens, theirs_of(model, len(prefix), 12, len(question) + len(header), model.grid, [seconds])
        )
        hidden = torch.cat([model.embed(prefix), tokens.flatten(0, 1), model.embed(prompt.suffix_ids)])
        kinds = [(None, None)] * len(prefix) + [(f, s) for f in range(12) for s in range(12)]
        kinds += [(None, None)] * len(prompt.suffix_ids)
        places = torch.arange(len(hidden))
        for layer, block in enumerate(model.language_model.layers):
            kept = [i for i, (frame, slot) in enumerate(kinds) if frame is None or slot in plan[layer]]
            hidden, places, kinds = hidden[kept], places[kept], [kinds[i] for i in kept]
            asks = range(
                len(hidden) - len(prompt.suffix_ids) + 1, len(hidden) - len(header)
            )  # not what closes the video
            cells = [
                (i, frame, slot, None if frame is None else frame // 2, i in asks)
                for i, (frame, slot) in enumerate(kinds)
                if i < len(hidden) - len(header)
            ]
            sums = [[] for _ in range(6)]
            for start in range(5):
                clips = (start, start + 1)
                inside = [c for c in cells if c[3] is None or c[3] in clips]
                for clip, score in slow_window_scores(model, hidden, layer, inside, clips, seconds).items():
                    sums[clip].append(score)
            for clip in range(1, 5):  # the outer ones are in one window only
                slow[layer, clip] = sum(sums[clip]) / 2
            mask = torch.full((len(hidden), len(hidden)), -1e30).triu(1)
            turned = tuple(t[:, places] for t in tables)
            hidden = block(hidden[None], attention_mask=mask[None, None], position_embeddings=turned)[0]
    assert torch.equal(ours.isnan(), slow.isnan())
    assert relative_error(ours.nan_to_num(), slow.nan_to_num()) < 1e-5
    assert ours[:, 1:5].std() > 0.02 * ours[:, 1:5].mean()


def test_qc_comp_scores_every_frame(words):
    model = build(tokenizer=words, second_per_grid=0.3)
    prompt = model.prompt("What colour is the cross?", SHOWN)
    for options in ({}, {"variant": "global"}, {"causal": True}, {"n_repeat": 4}):
        selector = xcomp.load_selector(
            "qc_comp", chunk_frames=8, clip_frames=4, window_clips=2, window_stride=1, **options
        )
        parts = (prompt.prefix_ids, prompt.question_ids, prompt.header_ids)
        scores = selector.score_frames(model, video(22), *parts, compressor=xcomp.load_compressor("lp_comp"))
        assert scores.shape == (22,) and scores.isfinite().all()


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tied, words, tmp_path):
    model = build(architecture(tie_word_embeddings=tied), tokenizer=words, second_per_grid=2.5)
    model.save_pretrained(tmp_path / "m")
    again = load(tmp_path / "m")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert (again.lm_head.weight is again.language_model.embed_tokens.weight) == tied
    assert torch.equal(again.prompt("Why?", SHOWN).suffix_ids, model.prompt("Why?", SHOWN).suffix_ids)
    assert (
        again.frame_options == model.frame_options == {**SIZE, "second_per_grid": 2.5}
        and again.stop_ids == model.stop_ids
    )
    assert again.pixel_format.mean == model.pixel_format.mean and again.interval == 5.0
    other = load(tmp_path / "m", height=8, second_per_grid=1.0)
    assert other.grid == (1, 4) and other.interval == 2.0
    info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "m", output_loading_info=True)[1]
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_saving_in_another_type_and_over_an_old_folder(tmp_path):
    model, target = build(), tmp_path / "m"
    model.save_pretrained(target)
    (target / "notes.txt").write_text("mine")
    load(target).save_pretrained(target, dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["m"] and (target / "notes.txt").read_text() == "mine"
    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.bfloat16}
    wide = load(target, dtype="float32")
    assert wide.dtype == torch.float32 and torch.equal(wide.lm_head.weight, model.lm_head.weight.bfloat16().float())
    with pytest.raises(ValueError, match="dtype is 'half'"):
        model.save_pretrained(target, dtype="half")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model, target = build(), tmp_path / "m"
    model.save_pretrained(target)
    before = (target / "model.safetensors").read_bytes()
    monkeypatch.setattr("xcomp.checkpoint._finish_config", lambda *_: 1 / 0)
    model.lm_head.weight.data.zero_()
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(target)
    assert (target / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_half_precision_keeps_rotary_frequencies(tmp_path):
    def frequencies(model):
        return [b for n, b in model.named_buffers() if n.endswith("inv_freq")]

    exact = frequencies(build())
    build().save_pretrained(tmp_path / "m")
    for model in (
        build(dtype="bfloat16"),
        build().bfloat16(),
        nn.ModuleList([build()]).half()[0],
        load(tmp_path / "m", dtype="bfloat16"),
    ):
        assert model.dtype != torch.float32 and len(exact) == 4  # of words and of pictures, each kept twice
        assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(exact, frequencies(model)))
        tokens = model.encode(video())
        assert tokens.dtype == model.dtype and tokens.isfinite().all()


def test_the_released_form_is_understood(tmp_path):
    """config.json flat; names as transformers 4 wrote them, which is what 5 writes too."""
    released = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 128000, "max_window_layers": 28, "hidden_act": "silu",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_sliding_window": False, "vocab_size": 152064, "bos_token_id": 151643, "eos_token_id": 151645,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
        "image_token_id": 151655, "video_token_id": 151656, "rope_scaling": {"type": "mrope",
        "mrope_section": [16, 24, 24]}, "vision_config": {"depth": 32, "hidden_act": "silu", "hidden_size": 1280,
        "intermediate_size": 3420, "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14,
        "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2, "temporal_patch_size": 2},
    }  # fmt: skip
    config = model_config(released, "released")
    assert config.text_config.hidden_size == 3584 and config.text_config.rope_parameters["rope_theta"] == 1e6
    model = build()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    text = content.pop("text_config")
    (tmp_path / "config.json").write_text(json.dumps(text | content))
    names = load_file(tmp_path / "model.safetensors")
    assert {"model.norm.weight", "visual.merger.ln_q.weight", "lm_head.weight"} <= set(names)
    ours, theirs = model.state_dict(), load(tmp_path).state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


NORM = "model.norm.weight"
BROKEN = {
    "cut off": (cut, "model.safetensors' is cut off"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json; a checkpoint of Qwen2.5-VL"),
    "bad json": (lambda f: (f / "config.json").write_text("{"), "config.json' is not valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is a pickle.*convert it"),
    "other model": (
        edit("config.json", lambda c: c.update(model_type="qwen2_vl")),
        "model_type 'qwen2_vl'; needed: 'qwen2_5_vl'",
    ),
    "bad value": (
        edit("config.json", lambda c: c["text_config"].update(hidden_size="wide")),
        "config.json': hidden_size is 'wide'; it must be a whole number, 1 to 1,000,000",
    ),
    "sections": (
        edit("config.json", lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[2, 2, 2])),
        r"mrope_section \[2, 2, 2\] must add up to half of the head size 16",
    ),
    "widths": (edit("config.json", lambda c: c["vision_config"].update(out_hidden_size=64)), "out_hidden_size 64 is"),
    "patches": (
        edit("config.json", lambda c: c["vision_config"].update(patch_size=[4, 4])),
        r"config.json': patch_size is \[4, 4\]; it must be a whole number",
    ),
    "its own size": (edit("config.json", lambda c: c["xcomp"].update(height=25)), "height is 25; it must be a"),
    "missing": (edit_tensors(lambda t: t.pop(NORM)), "1 tensors .*missing model.language_model.norm.weight"),
    "many missing": (drop_tensors("visual"), r"\d+ tensors .*missing .*and \d+ more"),
    "unexpected": (edit_tensors(lambda t: t.update(extra=torch.zeros(2))), "1 tensors .*unexpected extra"),
    "shape": (edit_tensors(lambda t: t.update({NORM: torch.zeros(31)})), r"norm.weight is \[31\], should be \[32\]"),
    "quantised": (edit_tensors(lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)})), f"{NORM} is I8"),
    "other resampling": (
        edit("video_preprocessor_config.json", lambda c: c.update(resample=4)),
        r"resample is 4; it must be 1 \(lanczos\)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "m"
    build().save_pretrained(folder)
    return contents(folder)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_say_what_is_wrong(case, sound, tmp_path):
    check_refused(sound, tmp_path, *BROKEN[case], load)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "exactly one of checkpoint"),
        ({"architecture": {}, "checkpoint": "x"}, "exactly one of checkpoint"),
        ({"architecture": {}}, "architecture describes model_type 'None'; needed"),
        ({"checkpoint": "/nowhere/at/all"}, "neither a folder nor a hub id"),
        ({"architecture": architecture(), "dtype": "bf16"}, "dtype is 'bf16'"),
        ({"architecture": architecture(), "clip_batch": 0}, "clip_batch is 0; it must be at least 1"),
        ({"architecture": architecture(), "height": 20}, "height is 20; it must be a multiple of 8"),
        ({"architecture": architecture(), "height": 8, "width": 0}, "width is 0; it must be a multiple of 8"),
        ({"architecture": architecture(), **SIZE, "second_per_grid": 0.0}, "second_per_grid is 0.0; it must be above"),
        ({"architecture": architecture(), **SIZE, "attn_implementation": "fast"}, "attn_implementation is 'fast'"),
        (
            {"architecture": architecture(), **SIZE, "attn_implementation": "flash_attention_2"},
            "needs a CUDA device",
        ),
        ({"architecture": architecture(), **SIZE, "tokenizer": "nowhere"}, "tokenizer 'nowhere' is neither"),
        (
            {"architecture": architecture(text={"use_sliding_window": True, "sliding_window": 64})},
            "looks back 64 tokens only",
        ),
    ],
)  # fmt: skip
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Qwen25VL(Qwen25VL.Config(**options))


def test_options_reach_the_model():
    model = build(attn_implementation="eager")
    assert model.text_config._attn_implementation == "eager"
    assert model.model.config.vision_config._attn_implementation == "eager"
    owned = {p for modules in model.parts().values() for module in modules for p in module.parameters()}
    assert set(model.parameters()) == owned
    default = Qwen25VL(Qwen25VL.Config(architecture=architecture(vision={"patch_size": 14, "window_size": 112})))
    assert default.size == (252, 448) and default.tokens_per_frame == 144 and default.interval == 2.0


@pytest.mark.parametrize("shape", [(2, 1, 24, 32), (2, 3, 32, 24), (3, 24, 32)])
def test_encode_refuses_what_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"pixels must be \(T, 3, 24, 32\)"):
        build().encode(torch.zeros(shape))


@pytest.mark.parametrize("count", [0, 3])
def test_encode_refuses_an_odd_frame(count):
    with pytest.raises(ValueError, match=f"{count} frames cannot be merged 2 by 2; encode a positive multiple of 2"):
        build().encode(torch.zeros(count, 3, 24, 32))


def test_a_video_that_is_too_long_is_told_in_frames(words):
    model = build(architecture(text={"max_position_embeddings": 200}), tokenizer=words)
    prompt = model.prompt("Why?", SHOWN)
    room = (200 - len(prompt.prefix_ids) - len(prompt.suffix_ids)) // 12 * 2
    with pytest.raises(ValueError, match=f"60 frames make a sequence of .*at most {room} frames fit"):
        Decoder(model).prefill(model.encode(video(60)), prompt.prefix_ids, prompt.suffix_ids)


def test_text_between_frames_has_no_place_and_is_refused(words):
    model = build(tokenizer=words)
    prompt = model.prompt("Why?", SHOWN)
    texts = [(prompt.prefix_ids[:1], prompt.prefix_ids[:0])] * 2
    with pytest.raises(ValueError, match="without text between their frames"):
        Decoder(model).prefill(model.encode(video(4)), prompt.prefix_ids, prompt.suffix_ids, texts)


# --- words ------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are here.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # as released, but for the system line
OF_STRINGS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SEEN = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>(?)<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {
    "no template": (None, f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{SEEN}"),
    "the released template": (TEMPLATE, f"<|im_start|>system\nYou are here.<|im_end|>\n{SEEN}"),
    "a template of strings": (OF_STRINGS, SEEN),
}


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(case, eos, tmp_path):
    """The parts together are the ids of the whole text; the video's last mark opens the question part."""
    template, whole = PROMPTS[case]
    model = build(tokenizer=save_tokenizer(tmp_path / "words", template, eos))
    for question in ("What colour is the cross?", "Is it red\n(A) yes\n(B) no", " spaced"):
        prompt = model.prompt(question, SHOWN)
        ours = torch.cat([prompt.prefix_ids, torch.tensor([VIDEO_ID]), prompt.suffix_ids]).tolist()
        assert ours == model.tokenizer(whole.replace("(?)", question)).input_ids
        assert prompt.prefix_ids[-1] == 3 and prompt.question_ids[0] == 4 and model.message_tokens == 1
        further = f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        again = model.follow_up(question).tolist()
        assert [model.stop_ids[0], *again] == model.tokenizer(further).input_ids
    assert model.stop_ids == (SPECIAL.index("<|im_end|>"), SPECIAL.index("<|endoftext|>"))
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(load(tmp_path / "m").prompt(" spaced", SHOWN).suffix_ids, prompt.suffix_ids)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages[0]['role'] }}", "renders no question with one <|video_pad|> before it"),
        (TEMPLATE.replace("<|vision_end|>", ""), "does not put <|video_pad|> between <|vision_start|> and"),
    ],
)
def test_a_template_without_the_video_is_refused(template, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        build(tokenizer=save_tokenizer(tmp_path, template))


def test_another_models_tokenizer_is_refused(tiny_tokenizer, words):
    with pytest.raises(
        ValueError, match=r"has the id .* for <\|vision_start\|>, config.json's vision_start_token_id is 3"
    ):
        build(tokenizer=str(tiny_tokenizer))
    with pytest.raises(ValueError, match=r"has the id 5 for <\|video_pad\|>, config.json's video_token_id is 7"):
        build(architecture(video_token_id=7), tokenizer=words)


def test_without_a_tokenizer_only_prompts_fail():
    model = build()
    assert model.tokenizer is None and model.stop_ids == (2,)  # the language model's own
    for ask in (lambda: model.prompt("why?", SHOWN), lambda: model.follow_up("why?")):
        with pytest.raises(ValueError, match="give tokenizer=<folder>"):
            ask()


# --- pixels -----------------------------------------------------------------------------------------------------------


def pictures(num_frames: int, height: int, width: int) -> torch.Tensor:
    """Smooth colours with hard edges and noise, (T, H, W, 3) uint8."""
    ramp = torch.linspace(0, 200, height)[None, :, None, None] + torch.zeros(num_frames, height, width, 3)
    ramp[:, :, width // 3 : width // 2] = 255
    noise = torch.rand(ramp.shape, generator=torch.Generator().manual_seed(height))
    return (ramp + 50 * noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    "numbers", [{}, {"resample": 2}, {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "rescale_factor": 1 / 127.5}]
)
def test_pixels_are_those_of_transformers_processor(numbers, sound, tmp_path):
    """Where the original would choose the same size."""
    for name, content in sound.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "video_preprocessor_config.json").unlink()
    released = {"min_pixels": 24 * 32, "max_pixels": 24 * 32, "patch_size": 4, "merge_size": 2, **numbers}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(released))
    model, frame = load(tmp_path), pictures(1, 96, 128)
    theirs = Qwen2VLImageProcessorPil(**released)(images=[frame[0].numpy()], return_tensors="np")
    assert theirs["image_grid_thw"].tolist() == [[1, 6, 8]]
    ours = flatten_patches(model.preprocess(frame).repeat(2, 1, 1, 1)[None], 4, 2)
    deviation = torch.tensor(model.pixel_format.std).repeat_interleave(2 * 4 * 4) * 255
    levels = (ours - torch.tensor(np.asarray(theirs["pixel_values"]))).abs() * deviation
    assert levels.mean() < 0.05 and levels.max() < 2.01
    model.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").pixel_format.mean == model.pixel_format.mean

"""SmolVLM2 against transformers' own forward, generation, processor text and image processor; text between frames."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import relative_error
from damage import check_refused, contents, cut, drop_tensors, edit, edit_tensors
from safetensors.torch import load_file
from slow_pass import reference_logits
from slow_scores import slow_clip_scores, slow_frame_scores
from tiny_smolvlm import IMAGE_ID, TEXT, VISION, architecture, save_tokenizer
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import SmolVLMForConditionalGeneration
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.video_utils import VideoMetadata
from xcomp.backbones.smolvlm import SmolVLM, in_words, model_config, pixel_format, stamps

import xcomp
from xcomp.answering import Answerer, Query
from xcomp.backbone import ShownVideo
from xcomp.compare.forecast import question_cost
from xcomp.config import Generation
from xcomp.data.module import Sample
from xcomp.data.records import IGNORED, Conversation, tokenise
from xcomp.decoder import Decoder
from xcomp.model import VideoQA
from xcomp.selector import FrameQuery
from xcomp.testing import check_backbone, video_of

SHOWN = ShownVideo(83.4, 3, (0.5, 21.04, 61.2))
QUESTION = "What colour is the cross?"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Folders of tokenizers: line ends one by one, and two of them in one token."""
    root = tmp_path_factory.mktemp("words")
    return {merges: save_tokenizer(root / str(merges), merges_lines=merges) for merges in (False, True)}


def build(content: dict | None = None, *, seed: int = 0, **options) -> SmolVLM:
    """A tiny model whose biases and norms are random too, so that leaving one out shows."""
    torch.manual_seed(seed)
    model = SmolVLM(SmolVLM.Config(architecture=content or architecture(), **options)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def load(folder, **options) -> SmolVLM:
    return SmolVLM(SmolVLM.Config(checkpoint=str(folder), **options)).eval()


def video(num_frames: int = 3, size: int = 48) -> torch.Tensor:
    return torch.randn(num_frames, 3, size, size, generator=torch.Generator().manual_seed(num_frames))


def whole_ids(model: SmolVLM, prompt) -> torch.Tensor:
    """The prompt as transformers takes it: a placeholder for every token of the video."""
    places = torch.full((model.tokens_per_frame,), IMAGE_ID)
    frames = [ids for text in prompt.frame_texts for ids in (text.before, places, text.behind)]
    return torch.cat([prompt.prefix_ids, *frames, prompt.suffix_ids]).unsqueeze(0)


def parts_of(prompt):
    return prompt.prefix_ids, prompt.suffix_ids, prompt.frame_texts


def as_saved(model: SmolVLM, folder) -> SmolVLMForConditionalGeneration:
    model.save_pretrained(folder)
    return SmolVLMForConditionalGeneration.from_pretrained(folder).eval()


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("size, factor", [(48, 2), (72, 3)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_forward_and_generation_are_transformers_own(family, size, factor, merges, words, tmp_path):
    """Logits of the whole prompt with several frames and time stamps, in one pass and behind a stored video."""
    model = build(architecture(family, size, factor), seed=2, tokenizer=words[merges])
    theirs = as_saved(model, tmp_path / "m")
    pixels, prompt = video(size=size), model.prompt(QUESTION, SHOWN)
    ids, count = whole_ids(model, prompt), len(prompt.suffix_ids)
    given = {"input_ids": ids, "pixel_values": pixels.unsqueeze(0)}
    expected = theirs(**given).logits[0, -count:]
    decoder, tokens = Decoder(model, xcomp.load_compressor("none")), model.encode(pixels)
    state = decoder.prefill(tokens, *parts_of(prompt))
    assert relative_error(state.logits[0], expected[-1]) < 1e-5
    ours = decoder.logits(tokens, prompt.prefix_ids, prompt.suffix_ids, [count], prompt.frame_texts)
    assert relative_error(ours, expected) < 1e-5
    stored = decoder.prefill_video(tokens, prompt.prefix_ids, prompt.frame_texts)
    assert relative_error(decoder.extend(stored, prompt.suffix_ids).logits[0], expected[-1]) < 1e-5
    limits = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    written = theirs.generate(**given, attention_mask=torch.ones_like(ids), **limits)
    answer = decoder.generate(state, max_new_tokens=8, min_new_tokens=8)[0]
    assert answer == written[0, ids.shape[1] :].tolist() and len(set(answer)) > 1


@pytest.mark.parametrize("factor", [1, 2, 3])
@torch.no_grad()
def test_tokens_are_the_models_image_features(factor):
    model = build(architecture(scale_factor=factor), frame_batch=2)
    tokens, tower = model.encode_with(video(5), model.tower_features)
    assert model.grid == (6 // factor, 6 // factor) and tokens.shape == (5, (6 // factor) ** 2, 32)
    theirs = model.model.model.get_image_features(video(5).unsqueeze(0)).pooler_output[0]
    assert relative_error(tokens, theirs.view(tokens.shape)) < 1e-5
    assert torch.equal(tokens, model.encode(video(5)))
    # The tower's own account of its last layer, token by token.
    vision = build(architecture(scale_factor=factor), attn_implementation="eager").model.model.vision_model
    vision.load_state_dict(model.model.model.vision_model.state_dict())
    seen = vision(pixel_values=video(5), output_attentions=True, output_hidden_states=True)
    received = seen.attentions[-1].mean((1, 2)).view(5, 6 // factor, factor, 6 // factor, factor).mean((2, 4))
    assert relative_error(tower["attention"], received.flatten()) < 1e-5
    assert torch.equal(tower["attention"], tower["pooling_attention"])
    assert relative_error(vision.post_layernorm(seen.hidden_states[-1]), seen.last_hidden_state) < 1e-5
    assert relative_error(tower["frame"], seen.hidden_states[-1].mean(1)) < 1e-5
    assert tower["keys"].shape == (len(tower["attention"]), 12)


@torch.no_grad()
def test_a_black_frame_is_a_frame():
    model, frames = build(), torch.cat([video(2), torch.zeros(1, 3, 48, 48)])
    assert model.encode(frames).shape == (3, 9, 32)
    assert relative_error(model.encode(frames)[:2], model.encode(video(2))) < 1e-5


def test_the_tower_is_counted_from_shapes_alone(words):
    meta = SmolVLM(SmolVLM.Config(architecture=architecture(), device="meta"))
    assert meta.clip_macs((48, 48)) == build().clip_macs((48, 48)) > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_contract(family, words):
    check_backbone(SmolVLM, architecture=architecture(family), tokenizer=words[family == "llama"])


def test_sizes_of_released_checkpoints():
    """SmolVLM2-256M and -500M: 512 pixels in patches of 16, 4×4 a token; SmolVLM2-2.2B: 384, 14, 3×3."""
    for size, patch, factor, tokens in ((512, 16, 4, 64), (384, 14, 3, 81)):
        content = architecture(image_size=size, scale_factor=factor)
        content["vision_config"]["patch_size"] = patch
        assert SmolVLM(SmolVLM.Config(architecture=content, device="meta")).tokens_per_frame == tokens


# --- tokens leave, text stays -----------------------------------------------------------------------------------------


def deep(words, layers: int = 4, seed: int = 0) -> SmolVLM:
    content = architecture(image_size=64)  # 16 tokens a frame
    content["text_config"]["num_hidden_layers"] = layers
    return build(content, seed=seed, tokenizer=words[False])


@pytest.mark.parametrize("drop_early", ["off", "output", "query"])
@pytest.mark.parametrize("name", ["lp_comp", "uniform_drop", "avg_pool"])
@torch.no_grad()
def test_compression_equals_a_masking_reference(name, drop_early, words):
    model, rule = deep(words), xcomp.load_compressor(name)
    tokens, prompt = model.encode(video(3, 64)), model.prompt(QUESTION, SHOWN)
    decoder = Decoder(model, rule, drop_early=drop_early)
    state = decoder.prefill(tokens, *parts_of(prompt))
    theirs = reference_logits(model, rule, tokens, *parts_of(prompt))
    assert relative_error(state.logits, theirs[-1:]) < 1e-5 and state.tokens_per_layer[-1] < 3 * 16
    stored = decoder.prefill_video(tokens, prompt.prefix_ids, prompt.frame_texts)
    assert relative_error(decoder.extend(stored, prompt.suffix_ids).logits, theirs[-1:]) < 1e-5


@pytest.mark.parametrize("name", ["none", "lp_comp", "attention_drop"])
@torch.no_grad()
def test_a_batch_of_unequal_videos_gives_what_each_gives_alone(name, words):
    model = deep(words)
    shown = [SHOWN, ShownVideo(9.0, 5, (0.0, 1.5, 4.0, 6.2, 8.9)), ShownVideo(4000.0, 1, (3999.0,))]
    prompts = [model.prompt(text, v) for text, v in zip((QUESTION, "Why?", "Who is it, then?"), shown)]
    samples = [(model.encode(video(v.num_frames, 64)), *parts_of(p)) for v, p in zip(shown, prompts)]
    decoder = Decoder(model, xcomp.load_compressor(name))
    batch = decoder.prefill(*map(list, zip(*samples)))
    answers = decoder.generate(batch, max_new_tokens=5)
    for row, sample in enumerate(samples):
        alone = decoder.prefill(*sample)
        assert [counts[row] for counts in batch.tokens_per_layer] == alone.tokens_per_layer
        assert decoder.generate(alone, max_new_tokens=5)[0] == answers[row]
    again = decoder.prefill(*map(list, zip(*samples)))
    first = torch.cat([decoder.prefill(*sample).logits for sample in samples])
    assert relative_error(again.logits, first) < 2e-5


SCORING = dict(clip_frames=2, window_clips=2, window_stride=1, query_bias=2)


@pytest.mark.parametrize("variant", ["segmented", "global"])
@pytest.mark.parametrize("name", ["none", "lp_comp"])
@torch.no_grad()
def test_qc_comp_scores_with_time_stamps_equal_the_slow_reference(name, variant, words):
    model, rule = deep(words, layers=3, seed=1), xcomp.load_compressor(name)
    for block in model.language_model.layers:  # sharper attention: far from uniform, so that errors show
        block.self_attn.q_proj.weight.data.mul_(4)
    selector = xcomp.load_selector("qc_comp", variant=variant, chunk_frames=4, **SCORING)
    frames = torch.randint(0, 256, (10, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = model.preprocess(frames)
    prompt = model.prompt(QUESTION, ShownVideo(5.0, 10, tuple(i / 2 for i in range(10))))
    ids = prompt.prefix_ids, prompt.question_ids, prompt.header_ids
    tokens = model.encode(pixels)
    ours = selector.clip_scores(model, tokens, *ids, compressor=rule, frame_texts=prompt.frame_texts)
    theirs = slow_clip_scores(selector, model, tokens, *ids, rule, list(prompt.frame_texts))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert relative_error(ours.nan_to_num(), theirs.nan_to_num()) < 1e-5
    with video_of(frames, model) as opened:
        (scores,) = selector.score(opened, [FrameQuery(QUESTION, prompt)], rule)
    expected = slow_frame_scores(selector, model, pixels, *ids, rule=rule, texts=prompt.frame_texts)
    assert relative_error(scores, expected) < 1e-5 and scores.std() > 0.01 * scores.mean()


@torch.no_grad()
def test_an_answer_is_transformers_own_for_the_frames_and_their_times(words, tmp_path):
    """From frames to words, two questions behind one stored video."""
    model = build(seed=2, tokenizer=words[False])
    theirs = as_saved(model, tmp_path / "m")
    qa = VideoQA(model, xcomp.load_compressor("none"), xcomp.load_selector("uniform"), frames=4,
                 generation=Generation(max_new_tokens=6))  # fmt: skip
    frames = torch.randint(0, 256, (12, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with video_of(frames, model, keep_states=True) as opened:
        for question in (QUESTION, "Why?"):
            answer = qa.ask(opened, question)
            prompt = model.prompt(question, ShownVideo(6.0, 4, tuple(answer.times)))
            ids, pixels = whole_ids(model, prompt), model.preprocess(frames[answer.frames])
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.unsqueeze(0)}
            written = theirs.generate(**given, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            assert answer.text == model.tokenizer.decode(written, skip_special_tokens=True).strip()
            assert answer.tokens_in == 4 * 9
    stamp = model.tokenizer.decode(prompt.frame_texts[-1].before)
    assert f"00:{int(answer.times[-1]):02d}:" in stamp and answer.times[-1] >= 4


@pytest.mark.parametrize("rule", ["none", "lp_comp", "avg_pool"])
@torch.no_grad()
def test_a_forecast_counts_the_text_between_frames(rule, words):
    """MACs from shapes alone are those that an answer took, QC-Comp's choice of frames included."""
    model, query = deep(words), Query("given frames", QUESTION, QUESTION)
    selector = xcomp.load_selector("qc_comp", chunk_frames=8, **SCORING)
    answerer = Answerer(model, xcomp.load_compressor(rule), selector, budget=4)
    frames = torch.randint(0, 256, (20, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with video_of(frames, model) as opened:
        (answer,) = answerer.answer(opened, [query])
        cost = question_cost(answerer, "arm", opened.info, query)
    spent = {stage: sum(w.macs for w in answer.work.all() if w.stage == stage) for stage in ("select", "prefill")}
    assert {stage: cost.macs[stage] for stage in spent} == spent and all(spent.values())
    assert cost.tokens_per_layer == answer.tokens_per_layer


def test_tuning_is_on_the_prompt_with_time_stamps(words, tmp_path):
    model = build(seed=3, tokenizer=words[False])
    theirs = as_saved(model, tmp_path / "m")
    texts = [(QUESTION, "red"), ("And then?", "gone")]
    shown = [SHOWN, ShownVideo(4.0, 2, (1.0, 3.0))]
    samples, losses, count = [], 0.0, 0
    for turns, v in zip((texts, texts[:1]), shown):
        text = tokenise(model, Conversation("v", tuple(turns)), v)
        pixels = torch.randint(0, 256, (v.num_frames, 3, 48, 48), dtype=torch.uint8)
        samples.append(Sample(pixels, text))
        prompt = model.prompt(QUESTION, v)
        head = whole_ids(model, prompt)[0, : -len(prompt.suffix_ids)]
        ids = torch.cat([head, text.suffix_ids])
        labels = torch.cat([torch.full_like(head, IGNORED), text.labels])
        given = model.pixel_format.normalise(pixels).unsqueeze(0)
        with torch.no_grad():
            logits = theirs(input_ids=ids.unsqueeze(0), pixel_values=given).logits[0]
        losses += cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum").item()
        count += int((labels != IGNORED).sum())
    loss = VideoQA(model)._loss(samples)[0]
    assert loss.item() == pytest.approx(losses / count, rel=1e-5)
    loss.backward()
    assert model.model.model.connector.modality_projection.proj.weight.grad.abs().sum() > 0


def test_a_video_that_is_too_long_is_told_with_its_time_stamps(words):
    content = architecture()
    content["text_config"]["max_position_embeddings"] = 600
    model = build(content, tokenizer=words[False])
    long = model.prompt("Why?", ShownVideo(99.0, 60, tuple(map(float, range(60)))))
    (each,) = {sum(lengths) + model.tokens_per_frame for lengths in long.text_lengths}
    room = (600 - len(long.prefix_ids) - len(long.suffix_ids)) // each
    with pytest.raises(ValueError, match=f"60 frames make a sequence of .*at most {room} frames fit"):
        Decoder(model).prefill(model.encode(video(60)), *parts_of(long))
    fewer = room - 1  # another number of frames may be a longer word
    fits = model.prompt("Why?", ShownVideo(99.0, fewer, tuple(map(float, range(fewer)))))
    Decoder(model).prefill(model.encode(video(fewer)), *parts_of(fits))


# --- words ------------------------------------------------------------------------------------------------------------

NUMBERS_IN_WORDS = {
    1: "one", 8: "eight", 13: "thirteen", 20: "twenty", 32: "thirty-two", 64: "sixty-four", 100: "one hundred",
    101: "one hundred and one", 128: "one hundred and twenty-eight", 512: "five hundred and twelve",
    1000: "one thousand", 1024: "one thousand and twenty-four", 1100: "one thousand, one hundred",
    2348: "two thousand, three hundred and forty-eight", 10_240: "ten thousand, two hundred and forty",
}  # fmt: skip


def processors_text(model: SmolVLM, question: str, video: ShownVideo) -> str:
    """What transformers' processor makes of a conversation about a video, up to the placeholders' number."""
    metadata = VideoMetadata(total_num_frames=100_000, fps=1000.0, duration=video.duration)
    metadata.frames_indices = [1000 * time for time in video.times]
    words = type("Processor", (), {"image_seq_len": model.tokens_per_frame, "image_token": "<image>"})
    words.fake_image_token, words.global_image_token = "<fake_token_around_image>", "<global-img>"
    inputs = {"pixel_values": torch.empty(1, video.num_frames), "video_metadata": [metadata]}
    shown = processing_smolvlm.SmolVLMProcessor.replace_video_token(words, inputs, 0)
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    options = {"chat_template": processing_smolvlm.DEFAULT_CHAT_TEMPLATE, "add_generation_prompt": True}
    return model.tokenizer.apply_chat_template([turn], tokenize=False, **options).replace("<video>", shown)


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("question", [QUESTION, "Is it red?\n(A) yes\n(B) no", " spaced", "\nwhy", ""])
@pytest.mark.parametrize("shown", [SHOWN, ShownVideo(3723.9, 2, (59.999, 3720.0)), ShownVideo(0.4, 1, (0.0,))])
def test_prompts_are_the_processors(shown, question, merges, words, monkeypatch):
    """Token by token, wherever they are cut."""
    monkeypatch.setattr(processing_smolvlm, "num2words", NUMBERS_IN_WORDS.get)
    monkeypatch.setitem(NUMBERS_IN_WORDS, 3, "three")
    monkeypatch.setitem(NUMBERS_IN_WORDS, 2, "two")
    model = build(tokenizer=words[merges])
    prompt = model.prompt(question, shown)
    expected = model.tokenizer(processors_text(model, question, shown), add_special_tokens=False).input_ids
    assert whole_ids(model, prompt)[0].tolist() == expected
    decode = model.tokenizer.decode
    assert decode(prompt.header_ids) == "<end_of_utterance>\nAssistant:"
    for text, stamp in zip(prompt.frame_texts, stamps(shown)):
        assert decode(text.before).strip("\n") == f"{stamp.strip()}<fake_token_around_image><global-img>"
        assert decode(text.behind) == "<fake_token_around_image>"
    if question == QUESTION:
        assert decode(prompt.question_ids[model.message_tokens :]) == question


def test_the_words_of_a_video():
    assert {number: in_words(number) for number in NUMBERS_IN_WORDS} == NUMBERS_IN_WORDS
    known = stamps(ShownVideo(4000.0, 3, (0.99, 61.0, 3999.5)))
    assert known == ["\nFrame from 00:00:", "\nFrame from 01:01:", "\nFrame from 66:39:"]
    assert stamps(ShownVideo(8.0, 4)) == [f"\nFrame from 00:0{second}:" for second in (1, 3, 5, 7)]


def test_a_follow_up_goes_on_as_the_chat_format_does(words):
    model = build(tokenizer=words[False])
    turns = [("user", "Q"), ("assistant", "A"), ("user", "Why?")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    options = {"chat_template": processing_smolvlm.DEFAULT_CHAT_TEMPLATE, "add_generation_prompt": True}
    whole = model.tokenizer.apply_chat_template(messages, tokenize=False, **options)
    behind = model.tokenizer(whole.partition(": A")[2], add_special_tokens=False).input_ids
    assert [model.stop_ids[0], *model.follow_up("Why?").tolist()] == behind and model.stop_ids == (3,)


def test_a_question_that_writes_placeholders_moves_no_frame(words):
    model = build(tokenizer=words[False])
    prompt = model.prompt("<image> or <global-img>?", SHOWN)
    assert len(prompt.frame_texts) == 3 and IMAGE_ID in prompt.question_ids
    assert torch.equal(prompt.prefix_ids, model.prompt(QUESTION, SHOWN).prefix_ids)


def test_another_models_tokenizer_is_refused(words, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="for <image>, config.json's image_token_id is 6"):
        build(tokenizer=str(tiny_tokenizer))
    with pytest.raises(ValueError, match="has the id 6 for <image>, config.json's image_token_id is 7"):
        build(architecture(image_token_id=7), tokenizer=words[False])
    save_tokenizer(tmp_path / "words")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / "words" / name).read_text()
        (tmp_path / "words" / name).write_text(text.replace("<global-img>", "<other-img>"))
    with pytest.raises(ValueError, match="does not know <global-img> as one token"):
        build(tokenizer=str(tmp_path / "words"))


def test_without_a_tokenizer_only_prompts_fail(tmp_path):
    model = build()
    assert model.tokenizer is None and model.stop_ids == (3,)  # the language model's own
    for ask in (lambda: model.prompt("why?", SHOWN), lambda: model.follow_up("why?")):
        with pytest.raises(ValueError, match="give tokenizer=<folder>"):
            ask()
    with pytest.raises(ValueError, match="holds none of tokenizer.json"):
        build(tokenizer=str(tmp_path))


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tied, words, tmp_path):
    model = build(architecture(tie_word_embeddings=tied), tokenizer=words[False])
    model.save_pretrained(tmp_path / "m")
    again = load(tmp_path / "m")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert (again.lm_head.weight is again.language_model.embed_tokens.weight) == tied
    assert torch.equal(again.prompt("Why?", SHOWN).suffix_ids, model.prompt("Why?", SHOWN).suffix_ids)
    assert again.pixel_format == model.pixel_format and again.stop_ids == model.stop_ids
    info = SmolVLMForConditionalGeneration.from_pretrained(tmp_path / "m", output_loading_info=True)[1]
    assert info["missing_keys"] == set()
    # The names of the tensors in the hub's folders.
    parts = {".".join(name.split(".")[:2]) for name in load_file(tmp_path / "m" / "model.safetensors")}
    assert parts - {"lm_head.weight"} == {"model.text_model", "model.vision_model", "model.connector"}


def test_saving_in_another_type(tmp_path):
    model, target = build(), tmp_path / "m"
    model.save_pretrained(target, dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.bfloat16}
    wide = load(target, dtype="float32")
    assert wide.dtype == torch.float32 and torch.equal(wide.lm_head.weight, model.lm_head.weight.bfloat16().float())


def test_half_precision_keeps_rotary_frequencies():
    exact = build().language_model.rotary_emb.inv_freq
    for model in (build(dtype="bfloat16"), build().bfloat16(), nn.ModuleList([build()]).half()[0]):
        assert model.dtype != torch.float32 and torch.equal(model.language_model.rotary_emb.inv_freq, exact)
        tokens = model.encode(video())
        assert tokens.dtype == model.dtype and tokens.isfinite().all()


NUMBERS = "video_preprocessor_config.json"
NORM = "model.text_model.norm.weight"


def vision_value(**changes):
    return edit("config.json", lambda c: c["vision_config"].update(changes))


BROKEN = {
    "cut off": (cut, "model.safetensors' is cut off"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "other model": (edit("config.json", lambda c: c.update(model_type="idefics3")), "'idefics3'; needed: 'smolvlm'"),
    "other LLM": (
        edit("config.json", lambda c: c.update(text_config={"model_type": "gpt2"})),
        "language model is 'gpt2'; known: llama, mistral",
    ),
    "no factor": (edit("config.json", lambda c: c.update(scale_factor=0)), "scale_factor is 0; it must be a whole"),
    "odd factor": (
        edit("config.json", lambda c: c.update(scale_factor=4)),
        "a side of 6 patches does not divide by scale_factor 4",
    ),
    "a large patch": (vision_value(patch_size=64), "a side of 0 patches does not divide"),
    "two sides": (vision_value(image_size=[48, 64]), r"image_size is \[48, 64\]; it must be a whole number"),
    "heads": (vision_value(num_attention_heads=5), "no multiple of its num_attention_heads 5"),
    "missing": (edit_tensors(lambda t: t.pop(NORM)), "1 tensors .*missing model.text_model.norm.weight"),
    "many missing": (drop_tensors("vision_model"), r"5\d tensors .*missing .*and 3\d more"),
    "unexpected": (edit_tensors(lambda t: t.update(extra=torch.zeros(2))), "1 tensors .*unexpected extra"),
    "shape": (
        edit_tensors(lambda t: t.update({NORM: torch.zeros(31)})),
        r"model.text_model.norm.weight is \[31\], should be \[32\]",
    ),
    "other pictures": (
        edit(NUMBERS, lambda c: c.update(max_image_size={"longest_edge": 40})),
        "makes pictures of 40 squared, but the vision tower takes 48",
    ),
    "odd size": (edit(NUMBERS, lambda c: c.update(size={"height": 3})), "size is {'height': 3}; it must hold longest"),
    "huge size": (edit(NUMBERS, lambda c: c.update(size={"longest_edge": 5000})), "size is 5000; it must be 1 to 4096"),
    "no resizing": (edit(NUMBERS, lambda c: c.update(do_resize=False)), "keep a picture's own shape"),
    "resampling": (edit(NUMBERS, lambda c: c.update(resample=4)), r"resample is 4; it must be 1 \(lanczos\)"),
}


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
        ({"architecture": {}}, "architecture describes model_type 'None'; needed"),
        ({"checkpoint": "/nowhere/at/all"}, "neither a folder nor a hub id"),
        ({"architecture": architecture(), "dtype": "bf16"}, "dtype is 'bf16'"),
        ({"architecture": architecture(), "frame_batch": 0}, "frame_batch is 0; it must be at least 1"),
        ({"architecture": architecture(), "tokenizer": "no_such_folder"}, "tokenizer 'no_such_folder' is neither"),
        (
            {"architecture": architecture(text_config=TEXT | {"model_type": "mistral", "sliding_window": 64})},
            "looks back 64 tokens only",
        ),
        (
            {"architecture": architecture(vision_config=VISION | {"image_size": 50, "patch_size": 10})},
            "a side of 5 patches does not divide by scale_factor 2",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SmolVLM(SmolVLM.Config(**options))


def test_every_parameter_is_a_part():
    model = build()
    owned = {p for modules in model.parts().values() for module in modules for p in module.parameters()}
    assert owned == set(model.parameters())


@pytest.mark.parametrize("shape", [(0, 3, 48, 48), (2, 1, 48, 48), (2, 3, 40, 48), (3, 48, 48)])
def test_encode_refuses_what_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"pixels must be \(T, 3, 48, 48\)"):
        build().encode(torch.zeros(shape))


# --- pixels -----------------------------------------------------------------------------------------------------------


def pictures(num_frames: int, height: int, width: int) -> torch.Tensor:
    """Smooth colours with hard edges and noise, (T, H, W, 3) uint8."""
    ramp = torch.linspace(0, 200, height)[None, :, None, None] + torch.zeros(num_frames, height, width, 3)
    ramp[:, :, width // 3 : width // 2] = 255
    noise = torch.rand(ramp.shape, generator=torch.Generator().manual_seed(height))
    return (ramp + 50 * noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("shape", [(72, 128), (128, 72), (100, 61), (48, 48), (30, 40)])
@pytest.mark.parametrize("edge, resample", [(48, 1), (80, 1), (64, 3), (40, 2)])
def test_pixels_are_those_of_transformers_processor(edge, resample, shape, sound, tmp_path):
    """The image processor without splitting, which is what the video processor does to each frame."""
    for name, content in sound.items():
        (tmp_path / name).write_bytes(content)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    numbers = {"size": {"longest_edge": edge}, "max_image_size": {"longest_edge": 48}, "resample": resample, **half}
    (tmp_path / NUMBERS).write_text(json.dumps(numbers))
    model, frames = load(tmp_path), pictures(3, *shape)
    processor = SmolVLMImageProcessorPil(**numbers, do_image_splitting=False)
    theirs = processor(images=[list(frames.numpy())], return_tensors="np")["pixel_values"]
    theirs, ours = torch.tensor(np.stack(theirs))[0], model.preprocess(frames)
    assert ours.shape == theirs.shape == (3, 3, 48, 48) and ours.dtype == torch.float32
    levels = (ours - theirs).abs() * 0.5 * 255
    # Two resizings, each to within a level (of upright pictures in one value of six, see xcomp.pixels).
    assert levels.mean() < 0.3 and levels.max() < 4.01


def released_numbers(size: int) -> dict:
    return {"size": {"longest_edge": 4 * size}, "max_image_size": {"longest_edge": size}, "resample": 1,
            "do_image_splitting": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip


def test_the_numbers_of_released_processors():
    """``video_sampling`` says to what size frames of a video are resized first, not ``size``."""
    edge = {"longest_edge": 512}
    numbers = released_numbers(512) | {"video_sampling": {"fps": 1, "max_frames": 64, "video_size": edge}}
    found = pixel_format(numbers, 512)
    assert (found.longest_edge, found.size, found.resample, found.mean) == (512, (512, 512), "lanczos", (0.5,) * 3)
    assert pixel_format(released_numbers(512), 512).longest_edge == 2048
    assert pixel_format({}, 384) == pixel_format({"size": {"longest_edge": 384}}, 384)
    assert model_config(architecture(), "here").scale_factor == 2

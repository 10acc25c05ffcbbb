"""LLaVA-NeXT-Video and LLaVA-OneVision against transformers' own forward, generation and image processor."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import relative_error
from damage import check_refused, contents, cut, drop_tensors, edit, edit_tensors
from safetensors.torch import load_file, save_file
from tiny_llava import TEXT, VIDEO_ID, VISION, architecture, save_tokenizer
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)
from xcomp.backbones.llava_next_video import FORMATS, LlavaNextVideo, model_config, pixel_format, tokens_per_frame

import xcomp
from xcomp.backbone import ShownVideo
from xcomp.decoder import Decoder
from xcomp.testing import check_backbone

SHOWN = ShownVideo(4.0, 3)
OTHERS = {"qwen2": "chatml", "llama": "vicuna", "mistral": "vicuna"}
KINDS = {
    "llava_next_video": LlavaNextVideoForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Folders of the two kinds of tokenizer."""
    root = tmp_path_factory.mktemp("words")
    return {kind: save_tokenizer(root / kind, kind) for kind in ("vicuna", "chatml")}


def build(content: dict | None = None, *, seed: int = 0, **options) -> LlavaNextVideo:
    """A tiny model whose biases, norms and newline are random too, so that leaving one out shows."""
    torch.manual_seed(seed)
    model = LlavaNextVideo(LlavaNextVideo.Config(architecture=content or architecture(), **options)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def load(folder, **options) -> LlavaNextVideo:
    return LlavaNextVideo(LlavaNextVideo.Config(checkpoint=str(folder), **options)).eval()


def video(num_frames: int = 3, size: int = 48) -> torch.Tensor:
    return torch.randn(num_frames, 3, size, size, generator=torch.Generator().manual_seed(num_frames))


def whole_ids(model: LlavaNextVideo, prompt, num_frames: int) -> torch.Tensor:
    """The prompt as transformers takes it: a placeholder for every token of the video."""
    places = torch.full((num_frames * model.tokens_per_frame,), VIDEO_ID)
    return torch.cat([prompt.prefix_ids, places, prompt.suffix_ids]).unsqueeze(0)


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, size", [("llava_next_video", 48), ("llava_onevision", 40)])
@pytest.mark.parametrize("family", OTHERS)
def test_forward_and_generation_are_transformers_own(family, kind, size, words, tmp_path):
    model = build(architecture(family, kind, size), seed=2, tokenizer=words[OTHERS[family]])
    model.save_pretrained(tmp_path / "m")
    theirs = KINDS[kind].from_pretrained(tmp_path / "m").eval()
    pixels, prompt = video(size=size), model.prompt("What colour is the cross?", SHOWN)
    ids, count = whole_ids(model, prompt, 3), len(prompt.suffix_ids)
    decoder = Decoder(model, xcomp.load_compressor("none"))
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values_videos=pixels.unsqueeze(0)).logits[0, -count:]
        tokens = model.encode(pixels)
        state = decoder.prefill(tokens, prompt.prefix_ids, prompt.suffix_ids)
        ours = decoder.logits(tokens, prompt.prefix_ids, prompt.suffix_ids, [count])
        assert relative_error(state.logits[0], expected[-1]) < 1e-5
        assert relative_error(ours, expected) < 1e-5
        written = theirs.generate(
            input_ids=ids,
            pixel_values_videos=pixels.unsqueeze(0),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
        )
    answer = decoder.generate(state, max_new_tokens=8, min_new_tokens=8)[0]
    assert answer == written[0, ids.shape[1] :].tolist() and len(set(answer)) > 1


@pytest.mark.parametrize(
    "kind, size, patch, tokens",
    [
        ("llava_next_video", 48, 8, 9),
        ("llava_next_video", 56, 8, 9),  # 7×7 patches: the last row and column are left out
        ("llava_next_video", 64, 8, 16),
        ("llava_onevision", 56, 8, 16),
        ("llava_onevision", 48, 8, 9),
    ],
)
def test_tokens_are_the_models_video_features(kind, size, patch, tokens):
    model = build(architecture(kind=kind, image_size=size), frame_batch=2)
    assert model.tokens_per_frame == tokens
    with torch.no_grad():
        theirs = model.model.get_video_features(video(3, size).unsqueeze(0)).pooler_output[0]
        if kind == "llava_onevision":
            theirs, newline = theirs[:-1], theirs[-1]
            torch.testing.assert_close(model.embed(torch.tensor([5, VIDEO_ID]))[1], newline)
        assert relative_error(model.encode(video(3, size)), theirs.view(3, tokens, 32)) < 1e-5


@pytest.mark.parametrize("mode, stride", [("max", 2), ("conv", 2), ("average", 3)])
def test_other_ways_of_pooling(mode, stride, words):
    options = {"architecture": architecture(spatial_pool_mode=mode, spatial_pool_stride=stride)}
    check_backbone(LlavaNextVideo, tokenizer=words["vicuna"], **options)
    owned = [n for n, _ in build(options["architecture"]).parts()["projector"][1].named_parameters()]
    assert bool(owned) == (mode == "conv")


def test_several_vision_layers_and_the_released_sizes():
    model = build(architecture(vision_feature_layer=[-2, -1]))
    with torch.no_grad():
        theirs = model.model.get_video_features(video().unsqueeze(0)).pooler_output[0].view(3, 9, 32)
        assert relative_error(model.encode(video()), theirs) < 1e-5
    assert tokens_per_frame(model_config({"model_type": "llava_next_video"}, "defaults")) == 144
    assert tokens_per_frame(model_config({"model_type": "llava_onevision"}, "defaults")) == 196


@pytest.mark.parametrize("family", [*OTHERS, "qwen3"])
@pytest.mark.parametrize("kind, size", [("llava_next_video", 48), ("llava_onevision", 40)])
def test_contract(family, kind, size, words):
    tokenizer = words[OTHERS.get(family, "chatml")]
    check_backbone(LlavaNextVideo, architecture=architecture(family, kind, size), tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["lp_comp", "avg_pool", "uniform_drop", "attention_drop"])
def test_compression(name, words):
    content = architecture("qwen2", image_size=64)  # 16 tokens a frame
    content["text_config"]["num_hidden_layers"] = 4
    model = build(content, tokenizer=words["chatml"])
    prompt = model.prompt("Why?", SHOWN)
    decoder = Decoder(model, xcomp.load_compressor(name))
    state = decoder.prefill(model.encode(video(3, 64)), prompt.prefix_ids, prompt.suffix_ids)
    assert state.logits.isfinite().all() and state.tokens_per_layer[-1] < 3 * 16
    assert len(decoder.generate(state, max_new_tokens=2)) == 1


def test_half_precision_keeps_rotary_frequencies():
    content = architecture()
    exact = build(content).language_model.rotary_emb.inv_freq
    for model in (
        build(content, dtype="bfloat16"),
        build(content).bfloat16(),
        nn.ModuleList([build(content)]).half()[0],
    ):
        assert model.dtype != torch.float32 and torch.equal(model.language_model.rotary_emb.inv_freq, exact)
        tokens = model.encode(video())
        assert tokens.dtype == model.dtype and tokens.isfinite().all()


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind, size", [("llava_next_video", 48), ("llava_onevision", 40)])
def test_round_trip(kind, size, tied, words, tmp_path):
    content = architecture("qwen2", kind, size)
    content["text_config"]["tie_word_embeddings"] = tied
    model = build(content, tokenizer=words["chatml"])
    model.save_pretrained(tmp_path / "m")
    again = load(tmp_path / "m")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert (again.lm_head.weight is again.language_model.embed_tokens.weight) == tied
    assert torch.equal(again.prompt("Why?", SHOWN).suffix_ids, model.prompt("Why?", SHOWN).suffix_ids)
    assert again.pixel_format == model.pixel_format and again.stop_ids == model.stop_ids
    assert KINDS[kind].from_pretrained(tmp_path / "m", output_loading_info=True)[1]["missing_keys"] == set()


def test_saving_in_another_type_and_over_an_old_folder(tmp_path):
    model, target = build(), tmp_path / "m"
    model.save_pretrained(target)
    (target / "notes.txt").write_text("mine")
    load(target).save_pretrained(target, dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["m"] and (target / "notes.txt").read_text() == "mine"
    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == "bfloat16"
    stored = load_file(target / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
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


def test_names_of_released_checkpoints_are_understood(tmp_path):
    """The tower inside ``vision_model``, as in the folders of the hub, which were written by transformers 4."""
    model = build()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {n.split(".")[0] for n in tensors} == {
        "language_model", "vision_tower", "multi_modal_projector", "image_newline",
    }  # fmt: skip
    old = {n.replace("vision_tower.", "vision_tower.vision_model."): t for n, t in tensors.items()}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = model.state_dict(), load(tmp_path).state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


NUMBERS = "video_preprocessor_config.json"
NORM = "language_model.model.norm.weight"
BROKEN = {
    "cut off": (cut, "model.safetensors' is cut off"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "bad json": (lambda f: (f / "config.json").write_text("{"), "config.json' is not valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin' is a pickle.*convert it",
    ),
    "other model": (
        edit("config.json", lambda c: c.update(model_type="llava")),
        "model_type 'llava'; needed: 'llava_next_video' or 'llava_onevision'",
    ),
    "other LLM": (
        edit("config.json", lambda c: c.update(text_config={"model_type": "gpt2"})),
        "language model is 'gpt2'; known: llama, mistral",
    ),
    "bad value": (
        edit("config.json", lambda c: c.update(vision_feature_select_strategy="some")),
        "config.json' is no configuration of 'llava_next_video'",
    ),
    "class token": (
        edit("config.json", lambda c: c.update(vision_feature_select_strategy="full")),
        "'clip_vision_model' with vision_feature_select_strategy 'full' gives no square",
    ),
    "no token": (
        edit("config.json", lambda c: c["vision_config"].update(patch_size=48)),
        "48 pixels in patches of 48 leave",
    ),
    "missing": (edit_tensors(lambda t: t.pop(NORM)), "1 tensors .*missing model.language_model.norm.weight"),
    "many missing": (drop_tensors("vision_tower"), r"5\d tensors .*missing .*and 3\d more"),
    "unexpected": (edit_tensors(lambda t: t.update(extra=torch.zeros(2))), "1 tensors .*unexpected extra"),
    "shape": (
        edit_tensors(lambda t: t.update({NORM: torch.zeros(31)})),
        r"model.language_model.norm.weight is \[31\], should be \[32\]",
    ),
    "quantised": (edit_tensors(lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)})), f"{NORM} is I8"),
    "other pictures": (
        edit(NUMBERS, lambda c: c.update(crop_size=40)),
        r"makes pictures of \(40, 40\), but the vision tower takes 48",
    ),
    "own shapes": (edit(NUMBERS, lambda c: c.update(do_center_crop=False)), "keep a picture's own shape"),
    "no resizing": (edit(NUMBERS, lambda c: c.update(do_resize=False)), "keep a picture's own shape"),
    "odd size": (edit(NUMBERS, lambda c: c.update(size={"longest_edge": 3})), "size is {'longest_edge': 3}; it must"),
    "other resampling": (edit(NUMBERS, lambda c: c.update(resample=4)), r"resample is 4; it must be 1 \(lanczos\)"),
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
        ({"architecture": {}, "checkpoint": "x"}, "exactly one of checkpoint"),
        ({"architecture": {}}, "architecture describes model_type 'None'; needed"),
        ({"checkpoint": "/nowhere/at/all"}, "neither a folder nor a hub id"),
        ({"architecture": architecture(), "dtype": "bf16"}, "dtype is 'bf16'"),
        ({"architecture": architecture(), "frame_batch": 0}, "frame_batch is 0; it must be at least 1"),
        ({"architecture": architecture(), "attn_implementation": "fast"}, "attn_implementation is 'fast'"),
        ({"architecture": architecture(), "attn_implementation": "flash_attention_2"}, "needs a CUDA device"),
        ({"architecture": architecture(), "tokenizer": "no_such_folder"}, "tokenizer 'no_such_folder' is neither"),
        (
            {"architecture": architecture(text_config=TEXT | {"model_type": "mistral", "sliding_window": 64})},
            "looks back 64 tokens only",
        ),
        (
            {"architecture": architecture(vision_config=VISION | {"model_type": "vit"})},
            "vision tower 'vit' with vision_feature_select_strategy 'default' gives no square",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        LlavaNextVideo(LlavaNextVideo.Config(**options))


def test_options_reach_the_model():
    model = build(attn_implementation="eager")
    assert model.text_config._attn_implementation == "eager"
    assert model.model.config.vision_config._attn_implementation == "eager"
    assert build().text_config._attn_implementation == "sdpa"
    owned = {p for modules in model.parts().values() for module in modules for p in module.parameters()}
    assert set(model.parameters()) - owned == {model.model.model.image_newline}


@pytest.mark.parametrize("shape", [(0, 3, 48, 48), (2, 1, 48, 48), (2, 3, 40, 48), (3, 48, 48)])
def test_encode_refuses_what_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"pixels must be \(T, 3, 48, 48\)"):
        build().encode(torch.zeros(shape))


# --- words ------------------------------------------------------------------------------------------------------------

VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}{% else %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{% for content in message['content'] | selectattr('type', "
    "'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}{% for content in message['content'] | selectattr('type', "
    "'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
NO_VIDEOS = VICUNA.replace("'equalto', 'video'", "'equalto', 'image'").replace("<video>", "<image>")
STRINGS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BEGIN = FORMATS["llama"].before
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PROMPTS = {
    # name: language model, tokenizer, template, then the whole text of a prompt and of a further question
    "Vicuna": ("llama", "vicuna", None, f"{BEGIN}<video>\n(?) ASSISTANT:", "</s>USER: (?) ASSISTANT:"),
    "Mistral": ("mistral", "vicuna", None, "[INST] <video>\n(?) [/INST]", "</s>[INST] (?) [/INST]"),
    "Qwen2": (
        "qwen2", "chatml", None,
        f"{SYSTEM}<|im_start|>user\n<video>\n(?)<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n(?)<|im_end|>\n<|im_start|>assistant\n",
    ),
    "Vicuna's template": ("llama", "vicuna", VICUNA, "USER: <video>\n(?) ASSISTANT:", "</s> USER: (?) ASSISTANT:"),
    "a template of pictures": ("llama", "vicuna", NO_VIDEOS, "USER: <video>\n(?) ASSISTANT:",
                               "</s> USER: (?) ASSISTANT:"),
    "a template of strings": ("mistral", "vicuna", STRINGS, "[INST] <video>\n(?) [/INST]", "</s>[INST] (?) [/INST]"),
    "ChatML's template": (
        "llama", "chatml", CHATML,
        "<|im_start|>user\n<video>\n(?)<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n(?)<|im_end|>\n<|im_start|>assistant\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(case, tmp_path):
    """The parts together are the ids of the whole text, begin token included."""
    family, kind, template, whole, further = PROMPTS[case]
    model = build(architecture(family), tokenizer=save_tokenizer(tmp_path / "words", kind, template))
    for question in ("What colour is the cross?", "Is it red\n(A) yes\n(B) no", " spaced"):
        prompt = model.prompt(question, SHOWN)
        ours = torch.cat([prompt.prefix_ids, torch.tensor([VIDEO_ID]), prompt.suffix_ids]).tolist()
        assert ours == model.tokenizer(whole.replace("(?)", question)).input_ids
        if kind == "vicuna":
            assert ours[0] == 1 and ours.count(1) == 1  # <s>
        again = model.follow_up(question).tolist()
        begins = model.tokenizer(further.replace("(?)", question), add_special_tokens=False).input_ids
        assert [model.stop_ids[0], *again] == begins and model.stop_ids[0] == 2
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(load(tmp_path / "m").prompt(" spaced", SHOWN).suffix_ids, prompt.suffix_ids)


def test_onevision_ends_the_video_with_its_newline(words):
    model = build(architecture("qwen2", "llava_onevision", 40), tokenizer=words["chatml"])
    prompt = model.prompt("Why?", SHOWN)
    assert prompt.question_ids[0] == VIDEO_ID and VIDEO_ID not in prompt.question_ids[1:]
    assert VIDEO_ID not in model.follow_up("Why?") and model.newline.shape == (32,)
    assert build().newline is None


def test_a_template_in_a_file_of_its_own(tmp_path):
    folder = tmp_path / "words"
    save_tokenizer(folder, "vicuna", STRINGS)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": STRINGS}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": VICUNA}))
    assert build(tokenizer=str(folder)).format.before == "<s>[INST] "  # chat_template.jinja, the newer one, comes first
    (folder / "chat_template.jinja").unlink()
    assert build(tokenizer=str(folder)).format.before == "USER: "


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['role'] }}", "{{ nothing.at_all }}", "<video><video>{{ messages }}"]
)
def test_a_template_without_the_video_is_refused(template, tmp_path):
    with pytest.raises(ValueError, match="chat template renders no question with one <video> before it"):
        build(tokenizer=save_tokenizer(tmp_path, "vicuna", template))


@pytest.mark.parametrize("kind, more", [("llava_next_video", 0), ("llava_onevision", 1)])
@pytest.mark.parametrize("family", OTHERS)
def test_what_stands_before_the_question_is_counted(family, kind, more, words):
    """The line end, and the newline vector where the model has one: QC-Comp does not take them for the question."""
    model = build(architecture(family, kind, 40 if more else 48), tokenizer=words[OTHERS[family]])
    asked = model.prompt("What colour is the cross?", SHOWN).question_ids
    assert model.message_tokens >= 1 + more
    question = model.tokenizer.decode(asked[model.message_tokens :].tolist()).strip()
    assert question.replace(" ", "") == "Whatcolouristhecross?"
    assert model.message_tokens == len(model.prompt("", SHOWN).question_ids)


def test_another_models_tokenizer_is_refused(words, tiny_tokenizer):
    with pytest.raises(ValueError, match="has the id 0 for <video>, config.json's video_token_index is 3"):
        build(tokenizer=str(tiny_tokenizer))
    with pytest.raises(ValueError, match="has the id 3 for <video>, config.json's video_token_index is 7"):
        build(architecture(video_token_index=7), tokenizer=words["vicuna"])


def test_without_a_tokenizer_only_prompts_fail(tmp_path):
    model = build()
    assert model.tokenizer is None and model.stop_ids == (2,)  # the language model's own
    for ask in (lambda: model.prompt("why?", SHOWN), lambda: model.follow_up("why?")):
        with pytest.raises(ValueError, match="give tokenizer=<folder>"):
            ask()
    with pytest.raises(ValueError, match="holds none of tokenizer.json"):
        build(tokenizer=str(tmp_path))


# --- pixels -----------------------------------------------------------------------------------------------------------


def pictures(num_frames: int, height: int, width: int) -> torch.Tensor:
    """Smooth colours with hard edges and noise, (T, H, W, 3) uint8."""
    ramp = torch.linspace(0, 200, height)[None, :, None, None] + torch.zeros(num_frames, height, width, 3)
    ramp[:, :, width // 3 : width // 2] = 255
    noise = torch.rand(ramp.shape, generator=torch.Generator().manual_seed(height))
    return (ramp + 50 * noise).clamp(0, 255).to(torch.uint8)


CROPPED = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    "numbers, shape",
    [
        (CROPPED, (72, 128)),  # as released
        (CROPPED, (100, 60)),
        (CROPPED | {"size": {"shortest_edge": 60}, "resample": 2}, (100, 70)),
        ({"size": {"height": 48, "width": 48}, "do_center_crop": False, **HALVES}, (72, 128)),
        (
            {"size": {"height": 50, "width": 70}, "crop_size": 48, "do_normalize": False, "do_center_crop": True},
            (72, 128),
        ),
        (CROPPED | {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3}, (60, 100)),
    ],
)
def test_pixels_are_those_of_transformers_processor(numbers, shape, sound, tmp_path):
    for name, content in sound.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / NUMBERS).write_text(json.dumps(numbers))
    model, frames = load(tmp_path), pictures(3, *shape)
    theirs = CLIPImageProcessorPil(**numbers)(images=list(frames.numpy()), return_tensors="np")["pixel_values"]
    theirs, ours = torch.tensor(np.stack(theirs)), model.preprocess(frames)
    assert ours.shape == theirs.shape == (3, 3, 48, 48) and ours.dtype == torch.float32
    levels = (ours - theirs).abs() * torch.tensor(model.pixel_format.std).view(3, 1, 1) * 255
    assert levels.mean() < 0.05 and levels.max() < 2.01


def test_numbers_are_looked_for_as_transformers_does(sound, tmp_path):
    for name, content in sound.items():
        (tmp_path / name).write_bytes(content)
    plain = {"size": {"height": 48, "width": 48}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(plain | {"image_mean": [0.1] * 3}))
    (tmp_path / NUMBERS).write_text(json.dumps(plain | {"image_mean": [0.2] * 3}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 8}))
    assert load(tmp_path).pixel_format.mean == pytest.approx((0.2,) * 3)
    nested = {"video_processor": plain | {"image_mean": [0.3] * 3}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert load(tmp_path).pixel_format.mean == pytest.approx((0.3,) * 3)
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / NUMBERS).unlink()
    assert load(tmp_path).pixel_format.mean == pytest.approx((0.1,) * 3)
    (tmp_path / "preprocessor_config.json").unlink()
    rules = load(tmp_path).pixel_format
    assert rules == pixel_format({"size": {"shortest_edge": 48}, "crop_size": 48, "resample": None}, 48)
    assert rules.mean[0] == pytest.approx(0.48145466)

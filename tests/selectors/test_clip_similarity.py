"""CLIP similarity against transformers' own CLIP on the same pictures."""

import pytest
import torch
from conftest import relative_error
from PIL import Image
from tiny_clip import save_tiny_clip
from torch.nn.functional import interpolate
from transformers import AutoTokenizer, BlipForImageTextRetrieval, CLIPImageProcessorPil, CLIPModel, SiglipModel

import xcomp
from xcomp.backbone import ShownVideo
from xcomp.selector import FrameQuery
from xcomp.testing import video_of
from xcomp.tiny import tiny_backbone

QUESTION = "which symbol appears first"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def frames():
    """(7, 24, 24, 3) uint8: smooth pictures, each of its own colours."""
    coarse = torch.rand(7, 3, 3, 3, generator=torch.Generator().manual_seed(1)) * 255
    return interpolate(coarse, 24, mode="bicubic").clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def scores_of(selector, frames, *questions):
    """The selector's scores of frames for one question, or for several at once."""
    backbone = tiny_backbone()
    queries = [FrameQuery(q, backbone.prompt(q, ShownVideo(1.0, len(frames)))) for q in questions or (QUESTION,)]
    with video_of(frames, backbone) as video:
        found = selector.score(video, queries)
    return found if len(questions) > 1 else found[0]


@torch.no_grad()
def transformers_scores(folder, frames, question=QUESTION):
    """Cosine similarities as CLIP's own forward returns them, without its temperature."""
    model, processor = CLIPModel.from_pretrained(folder).float(), CLIPImageProcessorPil.from_pretrained(folder)
    text = AutoTokenizer.from_pretrained(folder)([question], return_tensors="pt")
    pictures = processor([Image.fromarray(f) for f in frames.numpy()], return_tensors="pt")
    out = model(input_ids=text.input_ids, attention_mask=text.attention_mask, pixel_values=pictures.pixel_values)
    return out.logits_per_image[:, 0] / model.logit_scale.exp()


def test_scores_equal_transformers(folder, frames):
    ours = scores_of(xcomp.load_selector("clip_similarity", checkpoint=folder), frames)
    theirs = transformers_scores(folder, frames)
    assert relative_error(ours, theirs) < 1e-5
    assert theirs.std() > 0.01 and ours.dtype == torch.float32  # the frames differ, so an error would show


def test_frames_of_another_size_are_resized(folder, frames):
    large = frames.repeat_interleave(2, 1).repeat_interleave(2, 2)
    ours = scores_of(xcomp.load_selector("clip_similarity", checkpoint=folder), large)
    # transformers resizes in Pillow, which differs by a level here and there
    assert relative_error(ours, transformers_scores(folder, large)) < 1e-2


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_the_batch_size_does_not_matter(folder, frames, batch_size):
    ours = scores_of(xcomp.load_selector("clip_similarity", checkpoint=folder, batch_size=batch_size), frames)
    assert relative_error(ours, transformers_scores(folder, frames)) < 1e-5


def test_frames_are_embedded_once_for_all_questions(folder, frames, monkeypatch):
    selector = xcomp.load_selector("clip_similarity", checkpoint=folder, batch_size=3)
    seen, embed = [], selector._embed_frames
    monkeypatch.setattr(selector, "_embed_frames", lambda pixels: seen.append(len(pixels)) or embed(pixels))
    first, second = scores_of(selector, frames, QUESTION, "what colour is the ring")
    assert sum(seen) == len(frames) + 1  # the one is to count its products
    assert relative_error(second, first) > 1e-2
    assert torch.equal(first, scores_of(selector, frames))
    assert torch.equal(second, scores_of(selector, frames, "what colour is the ring"))


def test_a_long_question_is_cut_to_what_clip_can_read(folder, frames):
    selector = xcomp.load_selector("clip_similarity", checkpoint=folder)
    words = "which symbol is the first red ring".split()  # 7 words and the end fill the 8 positions
    cut = scores_of(selector, frames, " ".join(words + ["what", "colour"] * 20))
    assert torch.equal(cut, scores_of(selector, frames, " ".join(words)))


def test_weights_stored_in_half_precision_are_used_in_full(tmp_path, frames):
    half = save_tiny_clip(tmp_path, dtype=torch.float16)
    ours = scores_of(xcomp.load_selector("clip_similarity", checkpoint=half), frames)
    assert relative_error(ours, transformers_scores(half, frames)) < 1e-5


def test_nothing_of_it_is_trained(folder):
    selector = xcomp.load_selector("clip_similarity", checkpoint=folder)
    assert list(selector.parameters()) and not any(p.requires_grad for p in selector.parameters())


def test_a_tokenizer_that_does_not_close_a_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must close a text with its end token"):
        xcomp.load_selector("clip_similarity", checkpoint=save_tiny_clip(tmp_path, closes=False))


@pytest.mark.parametrize(
    "options, message",
    [({"batch_size": 0}, "batch_size is 0"), ({}, "clip_similarity: '.*' holds no config.json; a checkpoint of CLIP")],
)
def test_options_are_checked(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        xcomp.load_selector("clip_similarity", checkpoint=str(tmp_path), **options)


# --- SigLIP, BLIP-ITM, and other readings of the same embeddings ------------------------------------------------------


def pictures(folder, frames):
    images = [Image.fromarray(f) for f in frames.numpy()]
    return CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt").pixel_values


@torch.no_grad()
def test_siglip_equals_transformers(tmp_path, frames):
    folder = save_tiny_clip(tmp_path, kind="siglip")
    model = SiglipModel.from_pretrained(folder)
    text = AutoTokenizer.from_pretrained(folder)([QUESTION], padding="max_length", max_length=8, return_tensors="pt")
    theirs = model(input_ids=text.input_ids, pixel_values=pictures(folder, frames)).logits_per_image[:, 0]
    ours = scores_of(xcomp.load_selector("clip_similarity", checkpoint=folder, similarity="logits"), frames)
    assert relative_error(ours, theirs) < 1e-5 and theirs.std() > 0.01
    cosines = scores_of(xcomp.load_selector("clip_similarity", checkpoint=folder), frames)
    assert relative_error(cosines, (theirs - model.logit_bias) / model.logit_scale.exp()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("similarity", [None, "cosine"])
def test_blip_equals_transformers(tmp_path, frames, similarity):
    folder = save_tiny_clip(tmp_path, kind="blip")
    model, text = BlipForImageTextRetrieval.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = text([QUESTION] * len(frames), return_tensors="pt")
    inputs = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
    found = model(**inputs, pixel_values=pictures(folder, frames), use_itm_head=similarity is None).itm_score
    theirs = found.softmax(-1)[:, 1] if similarity is None else found[:, 0]
    selector = xcomp.load_selector("clip_similarity", checkpoint=folder, similarity=similarity, batch_size=3)
    assert relative_error(scores_of(selector, frames), theirs) < 1e-5 and theirs.std() > 1e-3
    counted = selector.cost(None, 7, FrameQuery(QUESTION, None), None)
    assert counted.video_macs > 0 and counted.question_macs > 0


@torch.no_grad()
def test_a_plain_product_is_not_normalised(folder, frames):
    model = CLIPModel.from_pretrained(folder)
    text = AutoTokenizer.from_pretrained(folder)([QUESTION], return_tensors="pt")
    seen = model.get_image_features(pixel_values=pictures(folder, frames)).pooler_output
    said = model.get_text_features(input_ids=text.input_ids, attention_mask=text.attention_mask).pooler_output
    ours = scores_of(xcomp.load_selector("clip_similarity", checkpoint=folder, similarity="dot"), frames)
    assert relative_error(ours, (seen @ said.T)[:, 0]) < 1e-5


@torch.no_grad()
def test_a_long_question_can_be_the_mean_of_its_pieces(folder, frames):
    words = "which symbol is the first red ring".split()
    selector = xcomp.load_selector("clip_similarity", checkpoint=folder, long_text="mean")
    mean = scores_of(selector, frames, " ".join(words + words))
    assert relative_error(mean, scores_of(selector, frames, " ".join(words))) < 1e-5  # two pieces, both the same
    cut = xcomp.load_selector("clip_similarity", checkpoint=folder)
    longer = " ".join(words + ["what", "colour"])
    assert relative_error(scores_of(selector, frames, longer), scores_of(cut, frames, longer)) > 1e-3


def test_a_questions_macs_are_counted_once_a_length(folder, frames, monkeypatch):
    from xcomp.selectors import clip_similarity

    selector, counted, count = xcomp.load_selector("clip_similarity", checkpoint=folder), [], clip_similarity.count_macs
    monkeypatch.setattr(clip_similarity, "count_macs", lambda run: counted.append(1) or count(run))
    scores_of(selector, frames, "which symbol", "what ring", "which symbol appears", "what colour is")
    assert len(counted) == 1 + 2  # a frame, and texts of two lengths


@pytest.mark.parametrize("kind, similarity", [("clip", "match"), ("blip", "logits")])
def test_a_similarity_that_the_model_does_not_give_is_refused(tmp_path, kind, similarity):
    with pytest.raises(ValueError, match=f"similarity '{similarity}' is not what a {kind} model gives"):
        folder = save_tiny_clip(tmp_path, kind=kind)
        xcomp.load_selector("clip_similarity", checkpoint=folder, similarity=similarity)


def test_a_model_without_a_text_tower_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="describes a vision tower without a text tower"):
        xcomp.load_selector("clip_similarity", checkpoint=str(tmp_path))

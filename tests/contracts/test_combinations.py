"""Every registered backbone with every compressor and every selector, on a short and a longer video."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
import torch
from conftest import relative_error
from contracts.plugin_options import PICKERS, backbone_options, names_of, selector_names, selector_options

import xcomp
from xcomp.answering import Answerer, Query
from xcomp.backbone import ShownVideo
from xcomp.compare.runner import compare
from xcomp.config import parse_config
from xcomp.decoder import QuestionNeeded
from xcomp.testing import video_of

pytestmark = pytest.mark.device
QUESTION = "Which symbol appears first, after the red one? (A) cross (B) ring"
CLIPS = (2, 5)  # a video's length in clips of the backbone
# A bfloat16 keeps eight bits; each of four layers loses some anew, and not the same ones in a batch or in two passes.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def suits(rule, model):
    """Whether a backbone gives what a compressor needs; if not, it is said before anything runs."""
    missing = set(rule.needs) - {*model.tower_features, *(() if model.grid is None else ("grid",))}
    if missing:
        with pytest.raises(ValueError, match=f"needs '.*{sorted(missing)[0]}.*' of the vision path, but backbone"):
            xcomp.Decoder(model, rule)
    return not missing


@pytest.fixture(scope="module")
def backbones(tiny_tokenizer, device, dtype):
    torch.manual_seed(0)
    options = {name: backbone_options(name, tiny_tokenizer, layers=4) for name in names_of("backbone")}
    return {name: xcomp.load_backbone(name, **options[name], device=device, dtype=dtype).eval() for name in options}


@pytest.fixture(scope="module")
def videos(backbones):
    """Frames (T, H, W, 3) of a short and a longer video, for each backbone."""
    noise = torch.Generator().manual_seed(0)

    def pixels(backbone, clips):
        frames = torch.randint(0, 256, (clips * backbone.clip_frames, 40, 56, 3), dtype=torch.uint8, generator=noise)
        return frames

    return {name: [pixels(backbone, clips) for clips in CLIPS] for name, backbone in backbones.items()}


@pytest.fixture(scope="module")
def selectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selectors")
    return {name: xcomp.load_selector(name, **selector_options(name, folder)) for name in selector_names()}


@pytest.mark.parametrize("compressor", names_of("compressor"))
@pytest.mark.parametrize("backbone", names_of("backbone"))
@torch.no_grad()
def test_every_backbone_answers_under_every_compressor(backbone, compressor, backbones, videos, dtype):
    """Alone, as a batch, and from a stored video where the rule does not need the question."""
    model, rule = backbones[backbone], xcomp.load_compressor(compressor)
    if not suits(rule, model):
        return
    decoder = xcomp.Decoder(model, rule)
    tokens = [model.visual(model.preprocess(frames).to(model.device), rule.needs) for frames in videos[backbone]]
    shown = [ShownVideo(4.0, v.num_frames * model.merged_frames) for v in tokens]
    prompts = [model.prompt(text, video) for text, video in zip(("Why?", QUESTION), shown)]
    parts = [[getattr(p, part) for p in prompts] for part in ("prefix_ids", "suffix_ids", "frame_texts")]
    batch = decoder.prefill(tokens, *parts)
    for row, sample in enumerate(zip(tokens, *parts)):
        alone = decoder.prefill(*sample)
        counts = alone.tokens_per_layer
        assert len(counts) == model.num_layers and all(a >= b >= 1 for a, b in zip(counts, counts[1:]))
        assert counts == [of_layer[row] for of_layer in batch.tokens_per_layer]
        assert relative_error(batch.logits[row], alone.logits[0]) < TOLERANCE[dtype]
        with suppress(QuestionNeeded):
            video, prefix, suffix, texts = sample
            stored = decoder.extend(decoder.prefill_video(video, prefix, texts), suffix)
            assert relative_error(stored.logits, alone.logits) < TOLERANCE[dtype]
        assert len(decoder.generate(alone, max_new_tokens=2)) == 1


@pytest.mark.parametrize("selector", selector_names())
@pytest.mark.parametrize("compressor", names_of("compressor"))
@pytest.mark.parametrize("backbone", names_of("backbone"))
@torch.no_grad()
def test_every_selector_picks_frames_for_every_pair(backbone, compressor, selector, backbones, videos, selectors):
    model, rule, chooser = backbones[backbone], xcomp.load_compressor(compressor), selectors[selector]
    if not suits(rule, model):
        return
    for frames in videos[backbone]:
        with video_of(frames, model, needs=rule.needs) as video:
            (choice,) = Answerer(model, rule, chooser, budget=model.clip_frames).choose(video, [asked(QUESTION)])
        assert len(choice.frames) == model.clip_frames and list(choice.frames) == sorted(set(choice.frames))
        assert len(model.encode(model.preprocess(frames[list(choice.frames)]))) == (
            model.clip_frames // model.merged_frames
        )


def asked(text):
    return Query("given frames", text, text, text, ((0.2, 0.9),))


@pytest.fixture(scope="module")
def scorers(tmp_path_factory, backbones):
    """Nodes of every scorer; the file holds scores for each question and backbone's longer video."""
    folder = tmp_path_factory.mktemp("scorers")
    clip = selector_options("clip_similarity", folder)
    found = {"clip_similarity": {"name": "clip_similarity", **clip}, "random": "random", "oracle": "oracle"}
    found["qc_comp"] = {"name": "qc_comp", "chunk_frames": 8, "clip_frames": 8, "query_bias": 1}
    for name, model in backbones.items():
        count = CLIPS[1] * model.clip_frames
        rows = [{"video": "given frames", "question": text, "scores": [(7 * i) % count for i in range(count)]}
                for text in (QUESTION, "Why?")]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: {**found, "frames_file": {"name": "frames_file", "file": str(folder / f"{name}.jsonl")}}
            for name in backbones}  # fmt: skip


@pytest.mark.parametrize("scorer", ["clip_similarity", "qc_comp", "random", "oracle", "frames_file"])
@pytest.mark.parametrize("picker", PICKERS)
@pytest.mark.parametrize("backbone", names_of("backbone"))
@torch.no_grad()
def test_every_picker_takes_every_scorer(backbone, picker, scorer, backbones, videos, scorers):
    """Budgets below, at and above the number of frames; the same alone, in a batch and once more."""
    model = backbones[backbone]
    options = {"one_resolution": True} if picker == "q_frame" else {}
    chooser = xcomp.load_selector(picker, scorer=scorers[backbone][scorer], **options)
    assert chooser.repeats == (picker == "bolt")
    for frames in videos[backbone] if scorer != "frames_file" else videos[backbone][1:]:  # the shorter is below a clip
        for budget in (model.clip_frames, len(frames), len(frames) + model.clip_frames):
            answerer, found = Answerer(model, xcomp.load_compressor("lp_comp"), chooser, budget=budget), []
            for questions in ([asked(QUESTION), asked("Why?")], [asked(QUESTION)], [asked("Why?"), asked(QUESTION)]):
                with video_of(frames, model) as video:
                    found.append({q.text: c.frames for q, c in zip(questions, answerer.choose(video, questions))})
            assert found[0][QUESTION] == found[1][QUESTION] == found[2][QUESTION] and found[0] == found[2]
            for chosen in found[0].values():
                assert len(chosen) == min(budget, len(frames)) and list(chosen) == sorted(chosen)
                assert chooser.repeats or len(set(chosen)) == len(chosen)


@pytest.mark.parametrize("backbone", names_of("backbone"))
def test_one_yaml_compares_on_every_backbone(backbone, backbones, needle_videos, tmp_path, device, dtype):
    """A checkpoint folder of each, and a configuration in which nothing but the backbone's line differs."""
    backbones[backbone].save_pretrained(str(tmp_path / "model"))
    node = {"name": backbone, "checkpoint": str(tmp_path / "model"), "device": device, "dtype": dtype}
    run = {
        "name": "run",
        "output": str(tmp_path),
        "backbone": node,
        "benchmark": {"name": "needle", **needle_videos},
        "sampling": {"rate": 2, "min_frames": 8, "max_frames": 16},
        "generation": {"max_new_tokens": 2},
        "limit": 2,
        "trainer": {"accelerator": device, "enable_progress_bar": False},
        "arms": [
            {"compressor": name, "frames": 4}
            for name in names_of("compressor")
            if suits(xcomp.load_compressor(name), backbones[backbone])
        ],
    }
    run["arms"].append({"compressor": "lp_comp", "selector": {"name": "qc_comp", "query_bias": 1}, "frames": 4})
    folder = compare(parse_config(run, "run"))
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert len(records) == 2 * len(run["arms"]) and not any(record["error"] for record in records)
    assert all(len(record["frames"]) == 4 for record in records)
    whole = [record["kept"] for record in records if record["arm"].startswith("none")]
    assert whole == [{"input": 1, "final": 1, "layers": 1}] * 2
    assert all(0 < share <= 1 for record in records for share in record["kept"].values())

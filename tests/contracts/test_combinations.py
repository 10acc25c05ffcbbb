"""Every registered backbone with every compressor and every selector, on a short and a longer video."""

from __future__ import annotations

import json

import pytest
import torch
from contracts.plugin_options import backbone_options, names_of, selector_options

import xcomp
from xcomp.backbone import ShownVideo
from xcomp.compare.runner import compare
from xcomp.config import parse_config
from xcomp.contract import check_chosen, check_scores
from xcomp.selector import FrameQuery
from xcomp.testing import video_of

QUESTION = "Which symbol appears first, after the red one? (A) cross (B) ring"
CLIPS = (2, 5)  # a video's length in clips of the backbone


@pytest.fixture(scope="module")
def backbones(tiny_tokenizer):
    torch.manual_seed(0)
    options = {name: backbone_options(name, tiny_tokenizer, layers=4) for name in names_of("backbone")}
    return {name: xcomp.load_backbone(name, **options[name]).eval() for name in options}


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
    return {name: xcomp.load_selector(name, **selector_options(name, folder)) for name in names_of("selector")}


@pytest.mark.parametrize("compressor", names_of("compressor"))
@pytest.mark.parametrize("backbone", names_of("backbone"))
@torch.no_grad()
def test_every_backbone_answers_under_every_compressor(backbone, compressor, backbones, videos):
    """Alone, as a batch, and from a stored video where the rule does not need the question."""
    model, rule = backbones[backbone], xcomp.load_compressor(compressor)
    decoder, tokens = (
        xcomp.Decoder(model, rule),
        [model.encode(model.preprocess(frames)) for frames in videos[backbone]],
    )
    prompts = [model.prompt(text, ShownVideo(4.0, len(pixels))) for text, pixels in zip(("Why?", QUESTION), tokens)]
    before, after = [p.prefix_ids for p in prompts], [p.suffix_ids for p in prompts]
    batch = decoder.prefill(tokens, before, after)
    for row, sample in enumerate(zip(tokens, before, after)):
        alone = decoder.prefill(*sample)
        counts = alone.tokens_per_layer
        assert len(counts) == model.num_layers and all(a >= b >= 1 for a, b in zip(counts, counts[1:]))
        assert counts == [of_layer[row] for of_layer in batch.tokens_per_layer]
        torch.testing.assert_close(batch.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)
        if rule.plan(model.num_layers, rule.before_llm(tokens[row]).shape[1]) is not None:
            stored = decoder.extend(decoder.prefill_video(*sample[:2]), sample[2])
            torch.testing.assert_close(stored.logits, alone.logits, atol=1e-4, rtol=1e-4)
        assert len(decoder.generate(alone, max_new_tokens=2)) == 1


@pytest.mark.parametrize("selector", names_of("selector"))
@pytest.mark.parametrize("compressor", names_of("compressor"))
@pytest.mark.parametrize("backbone", names_of("backbone"))
@torch.no_grad()
def test_every_selector_picks_frames_for_every_pair(backbone, compressor, selector, backbones, videos, selectors):
    model, rule, chooser = backbones[backbone], xcomp.load_compressor(compressor), selectors[selector]
    for frames in videos[backbone]:
        scores = torch.zeros(len(frames))
        if chooser.uses_video:
            queries = [
                FrameQuery(text, model.prompt(text, ShownVideo(4.0, len(frames)))) for text in (QUESTION, "Why?")
            ]
            with video_of(frames, model) as video:
                found = chooser.score(video, queries, rule)
            for scores in found:
                check_scores(selector, scores, len(frames))
        chosen = chooser.select(scores, model.clip_frames)
        check_chosen(selector, chosen, len(frames), model.clip_frames)
        assert len(model.encode(model.preprocess(frames[chosen]))) == model.clip_frames // model.merged_frames


@pytest.mark.parametrize("backbone", names_of("backbone"))
def test_one_yaml_compares_on_every_backbone(backbone, backbones, tiny_tokenizer, needle_videos, tmp_path):
    """A checkpoint folder of each, and a configuration in which nothing but the backbone's line differs."""
    backbones[backbone].save_pretrained(str(tmp_path / "model"))
    node = {"name": backbone, "checkpoint": str(tmp_path / "model")}
    run = {
        "name": "run",
        "output": str(tmp_path),
        "backbone": node,
        "benchmark": {"name": "needle", **needle_videos},
        "sampling": {"rate": 2, "min_frames": 8, "max_frames": 16},
        "generation": {"max_new_tokens": 2},
        "limit": 2,
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "arms": [{"compressor": name, "frames": 4} for name in names_of("compressor")],
    }
    run["arms"].append({"compressor": "lp_comp", "selector": {"name": "qc_comp", "query_bias": 1}, "frames": 4})
    folder = compare(parse_config(run, "run"))
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert len(records) == 2 * len(run["arms"]) and not any(record["error"] for record in records)
    assert all(len(record["frames"]) == 4 for record in records)

"""The whole path on CUDA gives what the CPU gives: on a pretended device where there is none (:mod:`pretend_cuda`).

Beside the numbers: what must not make the host wait, precision under autocast, the size of what attention makes, and
that every arm of a comparison runs where its backbone was put.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from conftest import relative_error
from contracts.plugin_options import PICKERS, backbone_options, names_of, selector_names, selector_options
from pretend_cuda import pretend_cuda
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPModel

import xcomp
from xcomp.backbone import ShownVideo, attention_probabilities
from xcomp.compare.runner import compare
from xcomp.config import Generation, Sampling, Tune, parse_config
from xcomp.data.module import ConversationDataset
from xcomp.data.records import Conversation
from xcomp.decoder import Decoder
from xcomp.registry import load_class
from xcomp.selector import FrameQuery
from xcomp.testing import video_of
from xcomp.tiny import tiny_backbone

pytestmark = pytest.mark.device
PREFIX, SUFFIX = torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10, 11, 12])
QUESTION = "Which symbol appears first, after the red one? (A) cross (B) ring"
PLANNED = ["none", "lp_comp", "uniform_drop", "avg_pool"]
PLANNED_AND_NOT = ["lp_comp", "attention_drop"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLING, GENERATION = Sampling(rate=4, min_frames=8, max_frames=16), Generation(max_new_tokens=3)


@pytest.fixture(autouse=True)
def waits(device):
    """A CUDA device for each test; None where it is not pretended by the test, and waits cannot be counted."""
    if device == "cuda":
        yield None
        return
    with pretend_cuda() as waits:
        yield waits


@pytest.fixture(params=DTYPES)
def dtype(request, pytestconfig, waits):
    """Both types, but on a real device the one that was asked for."""
    if waits is None and request.param != pytestconfig.getoption("dtype"):
        pytest.skip("in the run with --dtype of this type")
    return DTYPES[request.param]


@pytest.fixture
def close(pytestconfig):
    """Asserts that a tensor on CUDA equals one on the CPU; ``steps``: by other steps, so not to the last bit."""
    real = pytestconfig.getoption("device") == "cuda"

    def close(ours, theirs, steps=False):
        assert ours.device.type == "cuda" and theirs.device.type == "cpu" and ours.dtype == theirs.dtype
        ours, theirs = ours.detach().cpu(), theirs.detach()
        if not real and not steps:
            assert torch.equal(ours, theirs)
        else:  # sums in another order; eight bits of a bfloat16 are lost anew in each of a few layers
            assert relative_error(ours.float(), theirs.float()) < (1e-4 if ours.dtype == torch.float32 else 5e-2)

    return close


def random_frames(backbone, clips=3, seed=0):
    """(T, 40, 56, 3) uint8."""
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (clips * backbone.clip_frames, 40, 56, 3), dtype=torch.uint8, generator=noise)


def random_pixels(backbone, clips=3, seed=0):
    """(T, 3, h, w) as a run hands them to the backbone."""
    return backbone.preprocess(random_frames(backbone, clips, seed)).to(backbone.device)


def pair(dtype=torch.float32, **options):
    """The same tiny backbone on the CPU and on CUDA."""
    return tiny_backbone(**options).to(dtype), tiny_backbone(**options).to("cuda", dtype)


def decided(rule, backbone):
    """Whether a rule's tokens do not depend on the question."""
    return rule.plan(backbone.num_layers, backbone.tokens_per_frame) is not None and not rule.uses_question


# --- the decoder ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def passes(backbone, rule, **options):
    """All ways through the decoder: their logits, and which tokens each layer of the first one keeps."""
    decoder = Decoder(backbone, rule, **options)
    videos = [backbone.visual(random_pixels(backbone, clips, seed=clips), rule.needs) for clips in (3, 1)]
    state = decoder.prefill(videos[0], PREFIX, SUFFIX)
    logits = {"prefill": state.logits, "decode": decoder.decode(state, 20)}
    batch = decoder.prefill(videos, [PREFIX, PREFIX[:1]], [SUFFIX, SUFFIX[:2]])
    logits |= {"batch": batch.logits, "batch, decode": decoder.decode(batch, torch.tensor([20, 21]))}
    if decided(rule, backbone):
        video = decoder.prefill_video(videos[0], PREFIX)
        stored = decoder.prefill_video(videos, [PREFIX, PREFIX])
        logits["extend"] = decoder.extend(video.fork(), SUFFIX).logits
        logits["batch, extend"] = decoder.extend(stored, [SUFFIX, SUFFIX[:2]]).logits
    return logits, [(layout.frame.tolist(), layout.slot.tolist()) for layout in state.layouts]


@pytest.mark.parametrize("attn, drop_early", [("sdpa", "output"), ("sdpa", "query"), ("eager", "off")])
@pytest.mark.parametrize("compressor", names_of("compressor"))
def test_every_way_through_the_decoder(compressor, attn, drop_early, dtype, close, waits):
    rule = xcomp.load_compressor(compressor)
    (theirs, kept), (ours, also) = (passes(b, rule, drop_early=drop_early) for b in pair(dtype, attn=attn))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        close(ours[name], theirs[name])
    if waits is not None or dtype == torch.float32:  # close scores of a real device may change places
        assert also == kept


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=["greedy", "beams", "draws"])
@pytest.mark.parametrize("compressor", PLANNED_AND_NOT)
@torch.no_grad()
def test_words(compressor, options, dtype, waits):
    found = []
    for backbone in pair(dtype):
        videos = [backbone.encode(random_pixels(backbone, clips, seed=clips)) for clips in (3, 1)]
        decoder = Decoder(backbone, xcomp.load_compressor(compressor))
        state = decoder.prefill(videos, [PREFIX, PREFIX[:1]], [SUFFIX, SUFFIX[:2]])
        torch.manual_seed(0)
        found.append(decoder.generate(state, max_new_tokens=4, repetition_penalty=1.2, **options))
    assert [len(ids) > 0 for ids in found[1]] == [True, True]
    if waits is not None:  # a real device draws its own random numbers, and rounds
        assert found[0] == found[1]


@pytest.mark.parametrize("compressor", [*PLANNED_AND_NOT, "dycoke while decoding"])
@torch.no_grad()
def test_options_are_scored_as_on_the_cpu(compressor, dtype, close):
    """In one pass, unequal lengths and all; and token by token where the rule looks on."""
    options = {"decoding_layer": 1, "decoding_drop": 0.5} if "while" in compressor else {}
    found = []
    for backbone in pair(dtype):
        decoder = Decoder(backbone, xcomp.load_compressor(compressor.split()[0], **options))
        state = decoder.prefill(backbone.encode(random_pixels(backbone, 3, seed=3)), PREFIX, SUFFIX)
        found.append(torch.cat([s for s, _ in decoder.score(state.repeat(3), [[5], [6, 7, 8], [9, 10]])]))
    close(found[1].to("cuda"), found[0])  # scores come back to the CPU


@pytest.mark.parametrize("compressor", [*PLANNED, "attention_drop", "fastv", "pyramid_drop"])
@torch.no_grad()
def test_planned_dropping_never_waits_for_the_device(compressor, waits):
    """Neither a pass nor a decoded token; a rule on the data waits once a drop, for its scores."""
    if waits is None:
        pytest.skip("waits are counted on a pretended device")
    backbone, rule = tiny_backbone().to("cuda"), xcomp.load_compressor(compressor)
    tokens = backbone.encode(random_pixels(backbone))
    waits.clear()
    decoder = Decoder(backbone, rule)
    state = decoder.prefill(tokens, PREFIX, SUFFIX)
    decoder.decode(state, 20)
    if decided(rule, backbone):
        decoder.extend(decoder.prefill_video(tokens, PREFIX), SUFFIX)
    uploads = waits.pop("copy to cuda")
    drops = len({tuple(layout.counts.tolist()) for layout in state.layouts}) - 1
    assert uploads and waits == ({} if decided(rule, backbone) else {"copy to cpu": drops})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compressor", names_of("compressor"))
def test_gradients(compressor, checkpointing, dtype, close):
    """Of the logits that a tuning step asks for, with and without layers that run again."""
    found = []
    for backbone in pair(dtype):
        rule = xcomp.load_compressor(compressor)
        decoder = Decoder(backbone.train(), rule, checkpointing=checkpointing)
        videos = [backbone.visual(random_pixels(backbone, clips, seed=clips), rule.needs) for clips in (3, 1)]
        logits = decoder.logits(videos, [PREFIX, PREFIX], [SUFFIX, SUFFIX[:3]], [4, 2])
        labels = torch.tensor([1, 2, 3, 4, 5, 6], device=backbone.device)
        cross_entropy(logits.float(), labels).backward()
        found.append({"logits": logits} | {name: p.grad for name, p in backbone.named_parameters()})
    theirs, ours = found
    for name in theirs:
        if theirs[name].abs().max() > 1e-6:  # the keys' biases have no effect, and rounding for a gradient
            close(ours[name], theirs[name])


# --- every backbone ---------------------------------------------------------------------------------------------------


@pytest.fixture
def both(tiny_tokenizer, dtype):
    """The same random backbone on the CPU and on CUDA, built there as a configuration does."""

    def both(name):
        options = {**backbone_options(name, tiny_tokenizer, layers=4), "dtype": str(dtype).removeprefix("torch.")}
        backbones = [xcomp.load_backbone(name, **options, device=device).eval() for device in ("cpu", "cuda")]
        backbones[1].load_state_dict(backbones[0].state_dict())
        return backbones

    return both


@pytest.mark.parametrize("name", names_of("backbone"))
@torch.no_grad()
def test_vision_of_every_backbone(name, both, close):
    here, there = both(name)
    assert there.device.type == "cuda" and {p.device.type for p in there.parameters()} == {"cuda"}
    frames = random_frames(here, 10)
    pixels = here.preprocess(frames)
    assert torch.equal(there.preprocess(frames), pixels)  # frames come on the CPU, whatever the backbone's device
    on_device = there.preprocess(frames.to("cuda"))
    level = 1 / 255 / min(here.pixel_format.std)
    assert on_device.device.type == "cuda" and (on_device.cpu().float() - pixels.float()).abs().max() < 1.6 * level
    close(there.encode(pixels.to("cuda")), here.encode(pixels), steps=True)  # more clips a pass than on the CPU


@pytest.mark.parametrize("compressor", PLANNED_AND_NOT)
@pytest.mark.parametrize("name", names_of("backbone"))
@torch.no_grad()
def test_every_backbone_answers(name, compressor, both, close):
    backbones, found = both(name), []
    tokens = backbones[0].encode(random_pixels(backbones[0]))
    for backbone in backbones:
        decoder = Decoder(backbone, xcomp.load_compressor(compressor))
        prompt = backbone.prompt(QUESTION, ShownVideo(4.0, len(tokens)))
        state = decoder.prefill(tokens.to(backbone.device), prompt.prefix_ids, prompt.suffix_ids)
        written = decoder.generate(state.fork(), max_new_tokens=2)
        found.append((state.logits, decoder.decode(state, 20), state.tokens_per_layer, len(written)))
    close(found[1][0], found[0][0])
    close(found[1][1], found[0][1])
    assert found[1][2:] == found[0][2:]


# --- selectors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_selector(tmp_path):
    def make(name, **options):
        return xcomp.load_selector(name, **selector_options(name, tmp_path), **options)

    return make


@pytest.fixture
def clip_devices(monkeypatch):
    """Where CLIP embedded pictures and texts."""
    seen = []

    def spied(embed):
        def spy(self, *args, **kwargs):
            seen.append(self.device.type)
            return embed(self, *args, **kwargs)

        return spy

    for name in ("get_image_features", "get_text_features"):
        monkeypatch.setattr(CLIPModel, name, spied(getattr(CLIPModel, name)))
    return seen


SCORED = {
    "segmented": ("qc_comp", {"variant": "segmented"}),
    "global": ("qc_comp", {"variant": "global"}),
    "causal": ("qc_comp", {"causal": True}),
    "clip": ("clip_similarity", {}),
}
SMALL = {"chunk_frames": 16, "clip_frames": 4, "window_clips": 4, "window_stride": 2}


def queries(backbone, num_frames=24):
    shown = ShownVideo(8.0, num_frames)
    return [FrameQuery(text, backbone.prompt(text, shown)) for text in (QUESTION, "what colour is the ring")]


@pytest.mark.parametrize("scored", SCORED)
@pytest.mark.parametrize("compressor", PLANNED_AND_NOT)
def test_scores_of_a_video_in_flight(compressor, scored, dtype, close, make_selector, clip_devices):
    """The selector is built on the CPU, as always; one with a model of its own takes it to the backbone."""
    name, options = SCORED[scored]
    rule, found = xcomp.load_compressor(compressor), []
    for backbone in pair(dtype):
        selector = make_selector(name, **options, **(SMALL if name == "qc_comp" else {}))
        clip_devices.clear()
        with video_of(random_frames(backbone, 12), backbone) as video:
            found.append(selector.score(video, queries(backbone), rule))
        assert set(clip_devices) == ({backbone.device.type} if name == "clip_similarity" else set())
    for theirs, ours in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32 and len(ours) == 24
        close(ours.to("cuda"), theirs, steps=name == "clip_similarity")  # its pixels lie otherwise in memory


@pytest.mark.parametrize("compressor", PLANNED_AND_NOT)
def test_scores_of_frames(compressor, dtype, close, make_selector):
    found = []
    for backbone in pair(dtype):
        prompt, rule = queries(backbone)[0].prompt, xcomp.load_compressor(compressor)
        parts = (prompt.prefix_ids, prompt.question_ids, prompt.header_ids)
        selector = make_selector("qc_comp", **SMALL)
        found.append(selector.score_frames(backbone, random_pixels(backbone, 12), *parts, compressor=rule))
    close(found[1].to("cuda"), found[0])


# --- questions about a video ------------------------------------------------------------------------------------------


@pytest.fixture
def question(needle_videos):
    return xcomp.load_benchmark("needle", **needle_videos).questions()[0]


def same_answers(question, here, there, exact):
    theirs, ours = (qa.ask(question.video, question.question, question.options) for qa in (here, there))
    assert len(ours.frames) == len(theirs.frames) and ours.tokens_per_layer == theirs.tokens_per_layer
    if exact:
        assert (ours.text, ours.frames, ours.choice) == (theirs.text, theirs.frames, theirs.choice)


@pytest.mark.parametrize("selector", selector_names())
@pytest.mark.parametrize("compressor", PLANNED_AND_NOT)
def test_a_question_is_answered_as_on_the_cpu(
    compressor, selector, dtype, question, make_selector, clip_devices, waits
):
    """Only the backbone is put on CUDA, as the Python API lets one do; what else has weights must run there too."""
    here, there = (
        xcomp.VideoQA(
            backbone,
            xcomp.load_compressor(compressor),
            make_selector(selector),
            frames=6,
            sampling=SAMPLING,
            generation=GENERATION,
        )
        for backbone in pair(dtype)
    )
    same_answers(question, here, there, waits is not None)
    clip_devices.clear()
    there.ask(question.video, question.question)
    assert set(clip_devices) == ({"cuda"} if selector in ("clip_similarity", *PICKERS) else set())


def test_a_question_is_answered_from_a_configuration(tiny_run, question, make_selector, clip_devices, waits):
    selector = {"name": "clip_similarity", "checkpoint": make_selector("clip_similarity").config.checkpoint}
    here, there = (
        xcomp.VideoQA.from_config(
            parse_config({**tiny_run, "selector": selector, "backbone": {**tiny_run["backbone"], "device": at}}, "x")
        ).eval()
        for at in ("cpu", "cuda")
    )
    same_answers(question, here, there, waits is not None)
    clip_devices.clear()
    there.ask(question.video, question.question)
    assert set(clip_devices) == {"cuda"}


class Scales(xcomp.Compressor):
    """A rule with a weight of its own."""

    @dataclass
    class Config:
        pass

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.full((32,), 0.5))

    def before_llm(self, tokens):
        return tokens * self.scale.to(tokens.dtype)


class Looks(xcomp.FrameSelector):
    """A selector with a layer of its own."""

    @dataclass
    class Config:
        pass

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(12, 1)
        nn.init.constant_(self.layer.weight, 0.1)

    @torch.no_grad()
    def score_frames(self, backbone, pixels, prefix_ids, question_ids, header_ids, compressor=None, *, question=None):
        return self.layer(pixels.flatten(1).float())[:, 0]


@pytest.mark.parametrize("parts", [(Scales, None), (None, Looks)], ids=["compressor", "selector"])
def test_weights_of_any_plugin_are_where_the_backbone_is(parts, question, waits):
    """Of one that knows nothing of devices."""
    here, there = (
        xcomp.VideoQA(backbone, *(part and part(None) for part in parts), frames=6, sampling=SAMPLING)
        for backbone in pair()
    )
    same_answers(question, here, there, waits is not None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step(checkpointing, needle_videos, question, close):
    """Loss and gradients of a model of which only the backbone was put on CUDA."""
    found = []
    for backbone in pair():
        conversations = [Conversation(question.video, (("What?", "red"),), (4,))]
        sample = ConversationDataset(conversations, backbone)[0]
        tune = Tune(gradient_checkpointing=checkpointing)
        model = xcomp.VideoQA(backbone, xcomp.load_compressor("lp_comp"), tune=tune).train()
        model.log = lambda *_, **__: None  # Lightning's needs a Trainer
        loss = model.training_step([sample], 0)
        loss.backward()
        found.append((loss, backbone.projector.weight.grad))
    for ours, theirs in zip(found[1], found[0], strict=True):
        close(ours, theirs)


# --- arms of a comparison ---------------------------------------------------------------------------------------------


def test_every_arm_runs_where_its_backbone_was_put(tiny_run, make_selector, clip_devices, monkeypatch):
    """Through Lightning's Trainer, which moves a model to the CPU when it is done with it."""
    encoder, seen = load_class("backbone", "videochat_flash"), []

    def encode(self, pixels, _own=encoder.encode):
        seen.append({pixels.device.type, self.device.type, next(self.vision_tower.parameters()).device.type})
        return _own(self, pixels)

    monkeypatch.setattr(encoder, "encode", encode)
    clip = {"name": "clip_similarity", "checkpoint": make_selector("clip_similarity").config.checkpoint}
    run = {
        **tiny_run,
        "backbone": {**tiny_run["backbone"], "device": "cuda"},
        "limit": 2,
        "trainer": {"enable_progress_bar": False},
        "arms": [
            {"name": "first", "compressor": "none"},
            {"name": "second", "compressor": "lp_comp", "selector": clip},
            {"name": "third", "compressor": "avg_pool", "selector": "qc_comp"},
        ],
    }
    folder = compare(parse_config(run, "x"))
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [record["arm"] for record in records] == ["first"] * 2 + ["second"] * 2 + ["third"] * 2
    assert seen and seen == [{"cuda"}] * len(seen)
    assert set(clip_devices) == {"cuda"}


# --- precision under autocast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["cpu", "cuda"])
@pytest.mark.parametrize("given", DTYPES.values(), ids=DTYPES)
def test_attention_probabilities_are_float32_under_autocast(given, at):
    noise = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, h, 50, 16, generator=noise).to(at, given) for h in (4, 2))
    expected = attention_probabilities(queries, keys, causal=True)
    with torch.autocast(at, dtype=torch.bfloat16):
        found = attention_probabilities(queries, keys, causal=True)
    assert expected.dtype == found.dtype == torch.float32 and torch.equal(found, expected)
    exact = (queries.double() @ keys.double().repeat_interleave(2, 1).mT / 4).masked_fill(
        torch.ones(50, 50, device=at).triu(1).bool(), -torch.inf
    )
    assert relative_error(found.double(), exact.softmax(-1)) < 1e-5


@pytest.mark.parametrize("compressor", names_of("compressor"))
@torch.no_grad()
def test_planned_rules_keep_the_same_tokens_in_any_precision(compressor):
    kept = []
    for dtype, lowered in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        backbone, rule = tiny_backbone().to("cuda", dtype), xcomp.load_compressor(compressor)
        with torch.autocast("cuda", dtype=torch.bfloat16) if lowered else nullcontext():
            tokens = backbone.visual(random_pixels(backbone), rule.needs)
            state = Decoder(backbone, rule).prefill(tokens, PREFIX, SUFFIX)
        assert state.logits.isfinite().all()
        kept.append([(layout.frame.tolist(), layout.slot.tolist()) for layout in state.layouts])
        assert len(kept[-1]) == 4 and min(state.tokens_per_layer) > 0
    if compressor in PLANNED:
        assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("variant", ["segmented", "global"])
@torch.no_grad()
def test_attention_is_scored_in_float32_under_autocast(variant, make_selector, monkeypatch):
    """The same keys and queries give the same scores; only the pass that they come from may be lowered."""

    backbone, selector = tiny_backbone().to("cuda"), make_selector("qc_comp", variant=variant, clip_frames=2)
    prompt, tokens = queries(backbone)[0].prompt, backbone.encode(random_pixels(backbone, 6))
    parts = (prompt.prefix_ids, prompt.question_ids, prompt.header_ids)
    expected, observed_by = selector.clip_scores(backbone, tokens, *parts), Decoder.observed_by
    lowered = torch.autocast("cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(Decoder, "observed_by", lambda self, observer: observed_by(self, lowered(observer)))
    found = selector.clip_scores(backbone, tokens, *parts)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.fixture
def default_bfloat16():
    """Sets torch's default type, as Lightning's ``precision: bf16-true`` does around every step."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(torch.bfloat16)
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", names_of("backbone"))
@torch.no_grad()
def test_the_default_type_does_not_change_a_backbone(name, tiny_tokenizer, default_bfloat16):
    backbone, found = xcomp.load_backbone(name, **backbone_options(name, tiny_tokenizer, layers=4)).eval(), []
    for change in (lambda: None, default_bfloat16):
        change()
        pixels = backbone.preprocess(random_frames(backbone))
        tokens, prompt = backbone.encode(pixels), backbone.prompt(QUESTION, ShownVideo(4.0, 6))
        state = Decoder(backbone, xcomp.load_compressor("attention_drop")).prefill(
            tokens, prompt.prefix_ids, prompt.suffix_ids
        )
        found.append((pixels, tokens, state.logits))
    assert [t.dtype for t in found[1]] == [torch.float32] * 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found))


@pytest.mark.parametrize("scored", SCORED)
def test_the_default_type_does_not_change_scores(scored, make_selector, default_bfloat16):
    name, options = SCORED[scored]
    backbone, selector, found = tiny_backbone(), make_selector(name, **options), []
    for change in (lambda: None, default_bfloat16):
        change()
        with video_of(random_frames(backbone, 12), backbone) as video:
            found.append(selector.score(video, queries(backbone)))
    assert found[1][0].dtype == torch.float32
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found))


# --- the size of what attention makes ---------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


WAYS = {"query": ("sdpa", "query"), "eager": ("eager", "off"), "both": ("eager", "query")}


def prefilled(attn, drop_early, block, monkeypatch, batch):
    """Logits and gradients of a video of 592 tokens, 600 with the text, and the most elements made."""
    monkeypatch.setattr("xcomp.backbone.ATTENTION_BLOCK", block, raising=False)
    backbone = tiny_backbone(attn=attn)
    videos = [torch.randn(74 - 10 * i, 8, 32, generator=torch.Generator().manual_seed(i)) for i in range(batch)]
    given = videos, [PREFIX] * batch, [SUFFIX] * batch
    decoder = Decoder(backbone, xcomp.load_compressor("lp_comp"), drop_early=drop_early)
    with Largest() as largest:
        with torch.no_grad():
            state = decoder.prefill(*given)
        decoder.logits(*given, [3] * batch).square().mean().backward()
    return state.logits, backbone.language_model.embed_tokens.weight.grad, largest.elements


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_no_mask_and_no_attention_matrix_is_of_full_size(way, batch, monkeypatch):
    """600 positions and 4 heads: a mask of 360,000, an attention matrix of 1,440,000. All else is 28,800 at most."""
    block = 60_000
    logits, gradient, largest = prefilled(*WAYS[way], block, monkeypatch, batch)
    assert largest <= block
    expected, its_gradient, whole = prefilled(*WAYS[way], 10**9, monkeypatch, batch)
    assert whole > 100_000
    assert relative_error(logits, expected) < 1e-5 and relative_error(gradient, its_gradient) < 1e-5

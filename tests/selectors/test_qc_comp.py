"""QC-Comp against a slow version of its definition: float32, every layer and window with a sequence of its own."""

import math

import pytest
import torch
from conftest import relative_error
from slow_scores import slow_clip_scores, slow_frame_scores
from xcomp.selectors.qc_comp import QCComp, chunk_starts, window_clips

import xcomp
from xcomp.backbone import FrameText, Prompt
from xcomp.selector import FrameQuery
from xcomp.testing import video_of
from xcomp.tiny import TinyBackbone

PREFIX, HEADER = torch.tensor([5, 6, 7]), torch.tensor([4, 5])
QUESTION = torch.tensor([20, 31, 42, 53, 64, 75, 86, 11, 12, 13])
SMALL = dict(clip_frames=2, window_clips=4, window_stride=2, query_bias=3)


class ClipBackbone(TinyBackbone):
    """A frame's tokens depend on the frames before it in its clip, so it matters how clips are cut."""

    def encode(self, pixels):
        assert len(pixels) % self.clip_frames == 0
        tokens = super().encode(pixels).unflatten(0, (-1, self.clip_frames))
        return (tokens + 0.5 * tokens.cumsum(1)).flatten(0, 1)


def backbone_of(layers=3, tokens=4, seed=0, kind=TinyBackbone, **options):
    torch.manual_seed(seed)
    backbone = kind(kind.Config(layers=layers, tokens_per_frame=tokens, **options)).eval()
    for block in backbone.language_model.layers:  # sharper attention: far from uniform, so that errors show
        block.self_attn.q_proj.weight.data.mul_(8)
    return backbone


def pixels_of(frames, seed=3):
    return torch.rand(frames, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def assert_equal_scores(ours, theirs):
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert relative_error(ours[~ours.isnan()], theirs[~theirs.isnan()]) < 1e-5
    assert ours[~ours.isnan()].std() > 0.02 * ours[~ours.isnan()].mean()  # there is something to tell apart


# --- clips ------------------------------------------------------------------------------------------------------------

SHAPES = {  # frames, options, which clips are discarded
    "one clip": (2, {}, []),
    "exactly one window": (8, {}, []),
    "partial last window": (10, {}, [0, 4]),
    "two windows": (12, {}, [0, 1, 4, 5]),
    "three windows and a rest": (18, {}, [0, 1, 8]),
    "a partial last clip": (11, {}, [0, 1, 4, 5]),
    "clips of three frames": (18, dict(clip_frames=3, chunk_frames=510), [0, 1, 4, 5]),
    "windows side by side": (12, dict(window_clips=2, window_stride=2), []),
    "windows that overlap much": (14, dict(window_stride=1), [0, 1, 2, 4, 5, 6]),
    "fewer windows than a clip could be in": (10, dict(window_stride=1), [0, 4]),
    "windows of one clip": (6, dict(window_clips=1, window_stride=1), []),
    "all of the question asks": (12, dict(query_bias=0), [0, 1, 4, 5]),
    "one row asks": (12, dict(query_bias=9), [0, 1, 4, 5]),
}


@pytest.mark.parametrize("rule", ["none", "lp_comp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_segmented(shape, rule):
    frames, options, discarded = SHAPES[shape]
    backbone, rule = backbone_of(), xcomp.load_compressor(rule)
    selector = xcomp.load_selector("qc_comp", **{**SMALL, **options})
    tokens = backbone.encode(pixels_of(frames)).detach()
    ours = selector.clip_scores(backbone, tokens, PREFIX, QUESTION, HEADER, compressor=rule)
    assert ours[0].isnan().nonzero().flatten().tolist() == discarded
    assert not ours.requires_grad
    if len(ours[0]) == 1:
        assert relative_error(ours, slow_clip_scores(selector, backbone, tokens, PREFIX, QUESTION, HEADER, rule)) < 1e-5
    else:
        assert_equal_scores(ours, slow_clip_scores(selector, backbone, tokens, PREFIX, QUESTION, HEADER, rule))


@pytest.mark.parametrize("clips, discarded", [(1, []), (8, []), (10, [0, 1, 8, 9]), (16, [0, 1, 2, 3, 12, 13, 14, 15])])
@pytest.mark.parametrize("rule", ["none", "lp_comp"])
def test_segmented_with_the_default_windows(clips, discarded, rule):
    backbone, rule = backbone_of(layers=2, tokens=2), xcomp.load_compressor(rule)
    selector = xcomp.load_selector("qc_comp", query_bias=3)
    tokens = backbone.encode(pixels_of(8 * clips)).detach()
    ours = selector.clip_scores(backbone, tokens, PREFIX, QUESTION, HEADER, compressor=rule)
    assert ours[1].isnan().nonzero().flatten().tolist() == discarded
    theirs = slow_clip_scores(selector, backbone, tokens, PREFIX, QUESTION, HEADER, rule)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert relative_error(ours.nan_to_num(), theirs.nan_to_num()) < 1e-5


@pytest.mark.parametrize("rule", ["none", "lp_comp"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("frames", [2, 11, 12])
def test_global(frames, causal, rule):
    backbone, rule = backbone_of(), xcomp.load_compressor(rule)
    selector = xcomp.load_selector("qc_comp", variant="global", causal=causal, **SMALL)
    tokens = backbone.encode(pixels_of(frames)).detach()
    ours = selector.clip_scores(backbone, tokens, PREFIX, QUESTION, HEADER, compressor=rule)
    theirs = slow_clip_scores(selector, backbone, tokens, PREFIX, QUESTION, HEADER, rule)
    assert not ours.isnan().any() and relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_other_language_models_and_causal_scoring(family):
    backbone, rule = backbone_of(family=family), xcomp.load_compressor("lp_comp")
    selector = xcomp.load_selector("qc_comp", causal=True, **SMALL)
    tokens = backbone.encode(pixels_of(12)).detach()
    ours = selector.clip_scores(backbone, tokens, PREFIX, QUESTION, HEADER, compressor=rule)
    assert_equal_scores(ours, slow_clip_scores(selector, backbone, tokens, PREFIX, QUESTION, HEADER, rule))
    free = xcomp.load_selector("qc_comp", **SMALL)
    other = free.clip_scores(backbone, tokens, PREFIX, QUESTION, HEADER, compressor=rule)
    assert relative_error(other.nan_to_num(), ours.nan_to_num()) > 1e-3  # causal or not is a difference


class PairsOfFrames(xcomp.Compressor):
    """Averages two frames into one before the language model."""

    def before_llm(self, tokens):
        return tokens.unflatten(0, (-1, 2)).mean(1)


class EveryThirdPosition(xcomp.Compressor):
    """Decides from the data: after the first layer, the third of the visual tokens with the smallest length goes."""

    def plan(self, num_layers, tokens_per_frame):
        return None

    def after_layer(self, output):
        if output.layer:
            return None
        length = output.hidden.norm(dim=-1).masked_fill(~output.layout.visual, math.inf)
        smallest = length.argsort(dim=1)[:, : int(output.layout.visual.sum()) // 3]
        return torch.ones_like(output.layout.visual).scatter(1, smallest, False)

    def gone(self, layer, hidden, kinds):
        if layer:
            return set()
        visual = [i for i, (kind, _, _) in enumerate(kinds) if kind == "video"]
        return set(sorted(visual, key=lambda i: hidden[i].norm().item())[: len(visual) // 3])


@pytest.mark.parametrize("variant", ["segmented", "global"])
@pytest.mark.parametrize("rule", [PairsOfFrames(None), EveryThirdPosition(None)], ids=lambda r: type(r).__name__)
def test_rules_that_merge_frames_or_look_at_the_data(rule, variant):
    backbone = backbone_of()
    selector = xcomp.load_selector("qc_comp", variant=variant, **SMALL)
    tokens = backbone.encode(pixels_of(12)).detach()
    ours = selector.clip_scores(backbone, tokens, PREFIX, QUESTION, HEADER, compressor=rule)
    assert_equal_scores(ours, slow_clip_scores(selector, backbone, tokens, PREFIX, QUESTION, HEADER, rule))


def texts_of(frames, seed=4):
    """Text of unequal length before and behind each frame."""
    noise = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (frames, 2), generator=noise).tolist()
    return [FrameText(*(torch.randint(0, 97, (n,), generator=noise) for n in pair)) for pair in lengths]


@pytest.mark.parametrize("frames", [11, 18])
@pytest.mark.parametrize("variant", ["segmented", "global"])
@pytest.mark.parametrize("rule", ["none", "lp_comp", PairsOfFrames(None), EveryThirdPosition(None)], ids=str)
def test_text_between_frames_stands_in_its_frames_windows(rule, variant, frames):
    backbone, rule = backbone_of(), xcomp.load_compressor(rule) if isinstance(rule, str) else rule
    frames -= frames % 2 if isinstance(rule, PairsOfFrames) else 0
    selector = xcomp.load_selector("qc_comp", variant=variant, **SMALL)
    tokens, texts, ids = backbone.encode(pixels_of(frames)).detach(), texts_of(frames), (PREFIX, QUESTION, HEADER)
    ours = selector.clip_scores(backbone, tokens, *ids, compressor=rule, frame_texts=texts)
    assert_equal_scores(ours, slow_clip_scores(selector, backbone, tokens, *ids, rule, texts))
    without = selector.clip_scores(backbone, tokens, *ids, compressor=rule)
    assert relative_error(ours.nan_to_num(), without.nan_to_num()) > 1e-2


@pytest.mark.parametrize("frames", [4, 22])
def test_frame_scores_with_text_between_frames(frames):
    """Chunks have the text of their own frames, from ``score_frames`` and from the prompt of all candidates."""
    backbone = backbone_of(layers=2, tokens=2, kind=ClipBackbone)
    selector = xcomp.load_selector("qc_comp", chunk_frames=8, **SMALL)
    pictures = torch.randint(0, 256, (frames, 2, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    pixels, rule = backbone.preprocess(pictures), xcomp.load_compressor("lp_comp")
    ids, texts = (PREFIX, QUESTION, HEADER), texts_of(frames)
    theirs = slow_frame_scores(selector, backbone, pixels, *ids, rule=rule, texts=texts)
    ours = selector.score_frames(backbone, pixels, *ids, compressor=rule, frame_texts=texts)
    assert_equal_scores(ours, theirs)
    queries = [FrameQuery("", Prompt(PREFIX, question, HEADER, tuple(texts))) for question in (QUESTION, QUESTION[:7])]
    with video_of(pictures, backbone, keep_states=True) as video:
        scored = selector.score(video, queries, rule)
        assert_equal_scores(scored[0], theirs)
        other = [FrameQuery("", Prompt(PREFIX, QUESTION, HEADER))]  # the stored chunks have another text
        assert relative_error(selector.score(video, other, rule)[0], theirs) > 1e-2


def test_a_clip_without_tokens_scores_zero():
    class DropsTheFirstClip(xcomp.Compressor):
        def plan(self, num_layers, tokens_per_frame):
            return None

        def after_layer(self, output):
            return output.layout.frame >= 2

    backbone = backbone_of()
    selector = xcomp.load_selector("qc_comp", variant="global", **SMALL)
    ids = (PREFIX, QUESTION, HEADER)
    scores = selector.clip_scores(backbone, backbone.encode(pixels_of(8)), *ids, compressor=DropsTheFirstClip(None))
    assert scores[0, 0] > 0 and scores[1, 0] == 0 and (scores[1, 1:] > 0).all()


def test_only_the_layers_asked_for_are_scored():
    backbone, selector = backbone_of(), xcomp.load_selector("qc_comp", **SMALL)
    tokens = backbone.encode(pixels_of(8))
    every = selector.clip_scores(backbone, tokens, PREFIX, QUESTION, HEADER)
    some = selector.clip_scores(backbone, tokens, PREFIX, QUESTION, HEADER, layers=range(1, 2))
    assert some[[0, 2]].isnan().all() and torch.equal(some[1], every[1])


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_repeat", [1, 2])
@pytest.mark.parametrize("frames", [4, 8, 16, 22])  # less than a chunk, one, two, and no multiple of it
def test_frame_scores(frames, n_repeat):
    backbone = backbone_of(layers=2, tokens=2, kind=ClipBackbone)
    selector = xcomp.load_selector("qc_comp", chunk_frames=8, n_repeat=n_repeat, **SMALL)
    pixels, rule = pixels_of(frames), xcomp.load_compressor("lp_comp")
    if n_repeat == 2 and frames > 4:
        assert {s % 2 for s in chunk_starts(frames, selector.config)[1]} == {0, 1}  # clips are cut in both ways
    ours = selector.score_frames(backbone, pixels, PREFIX, QUESTION, HEADER, compressor=rule)
    theirs = slow_frame_scores(selector, backbone, pixels, PREFIX, QUESTION, HEADER, rule=rule)
    assert_equal_scores(ours, theirs)
    assert not ours.requires_grad


@pytest.mark.parametrize("options", [dict(variant="global"), dict(window_stride=1), dict(window_clips=2, n_repeat=4)])
def test_frame_scores_with_other_windows(options):
    """No frame is left without a score, however much windows overlap."""
    backbone = backbone_of(layers=2, tokens=2, kind=ClipBackbone)
    selector = xcomp.load_selector("qc_comp", chunk_frames=4, **{**SMALL, **options})
    pixels = pixels_of(10)
    ours = selector.score_frames(backbone, pixels, PREFIX, QUESTION, HEADER)
    assert ours.isfinite().all()
    assert_equal_scores(ours, slow_frame_scores(selector, backbone, pixels, PREFIX, QUESTION, HEADER))


@pytest.mark.parametrize(
    "frames, options, length, starts",
    [
        (1024, {}, 576, [0, 512, 260, 772]),
        (1024, dict(n_repeat=1), 576, [0, 512]),
        (1024, dict(variant="global"), 512, [0, 512, 260, 772]),
        (1200, {}, 576, [0, 512, 1024, 260, 772, 84]),
        (1024, dict(n_repeat=8), 576, [s for r in range(8) for s in (65 * r, (65 * r + 512) % 1024)]),
        (64, {}, 128, [0, 36]),
        (30, {}, 96, [0, 20]),
    ],
)
def test_chunks(frames, options, length, starts):
    assert chunk_starts(frames, QCComp.Config(**options)) == (length, starts)


def test_windows():
    assert window_clips(72, 8, 4) == [(s, s + 8) for s in range(0, 68, 4)]
    assert window_clips(10, 8, 4) == [(0, 8), (2, 10)]
    assert window_clips(8, 8, 4) == [(0, 8)] and window_clips(3, 8, 4) == [(0, 3)]


@pytest.mark.parametrize(
    "layers, options, scored",
    [
        (28, {}, range(6, 24)),
        (4, {}, range(1, 3)),
        (1, {}, range(0, 1)),
        (4, dict(first_layer=0.0, last_layer=1.0), range(0, 4)),
        (4, dict(first_layer=0.95, last_layer=1.0), range(3, 4)),
    ],
)
def test_layers(layers, options, scored):
    assert xcomp.load_selector("qc_comp", **options).layers(layers) == scored


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variant="local"), "variant is 'local'"),
        (dict(chunk_frames=100), "chunk_frames 100 is no multiple of clip_frames 8"),
        (dict(window_stride=3), "window_clips 8 is no multiple of window_stride 3"),
        (dict(window_stride=16), "window_clips 8 is no multiple of window_stride 16"),
        (dict(n_repeat=0), "n_repeat is 0"),
        (dict(query_bias=-1), "query_bias is -1"),
        (dict(first_layer=0.5, last_layer=0.5), "depths"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        xcomp.load_selector("qc_comp", **options)


def test_a_question_shorter_than_the_bias_is_refused():
    backbone = backbone_of()
    selector = xcomp.load_selector("qc_comp", query_bias=10)
    with pytest.raises(ValueError, match="query_bias 10 leaves no token of a question of 10"):
        selector.score_frames(backbone, pixels_of(4), PREFIX, QUESTION, HEADER)

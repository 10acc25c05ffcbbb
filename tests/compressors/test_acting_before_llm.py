"""What all compressors that act before the language model hold to: budgets, order, types, gradients, odd videos."""

import dataclasses

import made_visual
import pytest
import torch
from made_visual import class_of, question, visual

from xcomp.compressor import About, Budget
from xcomp.registry import make_config
from xcomp.visual import TOWER_FEATURES, VisualTokens

PRUNE = ["random_drop", "divprune", "dycoke", "evs", "vidcom2", "cdpruner"]
MERGE = ["tome", "visionzip", "fastvid", "holitom", "prunevid", "downsample"]
METHODS = [*PRUNE, *MERGE]
SIZES = [(8, 16), (10, 36), (5, 64), (16, 9)]
KEEPS = [1.0, 0.75, 0.5, 0.3, 0.25, 0.1]


OUTER = {"prunevid": {"layer": None}}  # without what a method does inside the language model


def make(name, **options):
    return made_visual.make(name, **OUTER.get(name, {}), **options)


def run(name, video, **options):
    return make(name, **options).compress(video, question(video.tokens.shape[1]))


def budgeted(name, keep, width, of="layers"):
    rule = class_of(name)
    return rule(rule.for_budget(rule.Config(**OUTER.get(name, {})), Budget(keep, of), 28, width))


def square(num_frames, width, **options):
    side = round(width**0.5)
    return visual(num_frames, width, grid=(side, side) if side * side == width else (1, width), **options)


def same(a, b):
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.index, b.index)


@pytest.mark.parametrize("name", METHODS)
def test_says_what_it_is(name):
    rule = class_of(name)
    assert isinstance(rule.about, About) and rule.about.acts.startswith("before the language model")
    assert set(rule.needs) <= {*TOWER_FEATURES, "grid"} and set(make(name).needs) <= {*TOWER_FEATURES, "grid"}
    assert "arXiv" in rule.about.source or name == "random_drop"
    assert make_config(rule.Config, {}, name) == rule.Config()  # options are of types that a file can have
    asks = make(name).uses_question
    assert asks == (name == "cdpruner")
    if not asks:
        video = square(4, 16)
        assert same(make(name).compress(video, None), run(name, video))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", METHODS)
def test_a_budget_is_met_or_refused(name, keep):
    met = 0
    for num_frames, width in SIZES:
        try:
            rule = budgeted(name, keep, width)
        except ValueError as error:
            assert str(error).startswith(f"{name} cannot keep {keep:g}") and "nearest: " in str(error)
            continue
        video = square(num_frames, width)
        out = rule.compress(video, question())
        # EVS keeps the first frame whole and DyCoke every fourth, so no share below theirs can be had.
        whole = {"evs": 1, "dycoke": -(-num_frames // 4)}.get(name, 0)
        wanted = max(keep, whole / num_frames)
        assert abs(len(out) / num_frames - wanted * width) <= 1, (num_frames, width, len(out))
        met += 1
    assert met or (name == "dycoke" and keep < 0.25)


@pytest.mark.parametrize("name", METHODS)
def test_measures_of_a_budget_are_one(name):
    configs = [budgeted(name, 0.25, 36, of).config for of in ("input", "final", "layers")]
    assert configs[0] == configs[1] == configs[2]
    rule = class_of(name)
    given = dataclasses.asdict(rule.Config())
    rule.for_budget(rule.Config(**given), Budget(0.25), 28, 36)
    assert dataclasses.asdict(rule.Config(**given)) == given  # a budget makes a new configuration


@pytest.mark.parametrize("name", METHODS)
def test_the_whole_budget_changes_nothing(name):
    for num_frames, width in SIZES:
        video = square(num_frames, width)
        assert same(budgeted(name, 1.0, width).compress(video, question()), video)


@pytest.mark.parametrize("name", METHODS)
def test_tokens_keep_order_type_and_account(name):
    video = square(7, 16)
    before = video.tokens.clone()
    out = run(name, video)
    assert torch.equal(video.tokens, before)
    assert out.tokens.dtype == video.tokens.dtype and out.tower is video.tower and out.grid == video.grid
    assert (out.index.diff() > 0).all() and 0 < len(out) < len(video)
    assert (out.num_frames, out.frame_tokens) == (7, 16) and len(out.frame) == len(out.slot) == len(out)
    if name in PRUNE:
        assert out.size is None and torch.equal(out.tokens, video.tokens[out.index])
    else:
        assert out.size.shape == (len(out),) and out.size.min() > 0 and out.size.sum() <= len(video) + 1e-3
    # The same once more, and of tokens that already stand for two each.
    assert same(run(name, video), out)
    twice = run(name, dataclasses.replace(video, size=torch.full((len(video),), 2.0)))
    torch.testing.assert_close(twice.size, 2 * (torch.ones(len(out)) if out.size is None else out.size))


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_chooses_as_float32_of_the_same_numbers(name):
    video = square(7, 16)
    half = video.with_tokens(video.tokens.bfloat16())
    full = video.with_tokens(half.tokens.float())
    out, expected = run(name, half), run(name, full)
    assert out.tokens.dtype == torch.bfloat16 and torch.equal(out.index, expected.index)
    assert torch.equal(out.tokens, expected.tokens.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(run(name, full), expected) and same(run(name, half), out)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_the_tokens(name):
    video = square(6, 16)
    tokens = video.tokens.clone().requires_grad_()
    out = run(name, video.with_tokens(tokens))
    out.tokens.square().sum().backward()
    assert tokens.grad.isfinite().all() and tokens.grad.abs().sum() > 0
    with torch.inference_mode():
        assert same(run(name, video), out.with_tokens(out.tokens.detach()))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_frames, width", [(1, 1), (1, 16), (3, 1), (2, 4), (5, 3)])
def test_small_videos(name, num_frames, width):
    video = square(num_frames, width)
    for out in (run(name, video), budgeted(name, 1.0, width).compress(video, question())):
        assert 1 <= len(out) <= len(video) and (out.index.diff() > 0).all() and out.tokens.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_identical_tokens_have_an_answer(name):
    """Nothing to tell them apart by: the lower positions come first, and means are the token itself."""
    video = square(6, 16)
    video = video.with_tokens(video.tokens[:1].expand(96, -1).clone())
    video = dataclasses.replace(video, tower={k: torch.ones_like(v) for k, v in video.tower.items()})
    for rule in (make(name), budgeted(name, 0.5 if name != "downsample" else 0.25, 16)):
        out = rule.compress(video, question())
        assert 1 <= len(out) <= 96 and out.tokens.isfinite().all()
        if name != "visionzip":  # whose contextual tokens are sums of two
            torch.testing.assert_close(out.tokens, video.tokens[: len(out)], rtol=1e-5, atol=1e-5)
    zeros = video.with_tokens(torch.zeros_like(video.tokens))
    assert run(name, zeros).tokens.eq(0).all()


@pytest.mark.parametrize("name", METHODS)
def test_frames_of_unequal_length_are_taken_or_refused(name):
    ragged = square(4, 16).select(torch.tensor([0, 1, 4, 5, 17, 18, 33, 40, 41, 50, 63]))
    if name in ("random_drop", "divprune"):
        assert 1 <= len(run(name, ragged)) < len(ragged)
    else:
        with pytest.raises(ValueError, match="what needs whole frames must come first"):
            run(name, ragged)


@pytest.mark.device
@pytest.mark.parametrize("name", METHODS)
def test_other_devices_choose_the_same(name, device):
    video, asked = square(7, 16), question()
    moved = VisualTokens(
        *(t.to(device) for t in (video.tokens, video.frame, video.slot)),
        *(video.num_frames, video.frame_tokens, None, video.grid),
        tower={k: v.to(device) for k, v in video.tower.items()},
    )
    asked = dataclasses.replace(asked, ids=asked.ids.to(device), embeddings=asked.embeddings.to(device))
    out, expected = make(name).compress(moved, asked), run(name, video)
    assert out.tokens.device.type == device and out.index.device.type == device
    assert torch.equal(out.index.cpu(), expected.index)
    torch.testing.assert_close(out.tokens.cpu(), expected.tokens, rtol=1e-5, atol=1e-5)

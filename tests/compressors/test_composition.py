"""Compressors in a list, and budgets through a whole run: met by what the records count, or refused in one line."""

import json
import re

import pytest
import torch
import yaml
from conftest import relative_error
from contracts.plugin_options import backbone_options, names_of
from slow_rules import slow_pass

import xcomp.compressor
import xcomp.registry
import xcomp.visual
from xcomp.backbone import ShownVideo
from xcomp.compare.runner import compare
from xcomp.config import build_component, parse_config
from xcomp.decoder import QuestionNeeded
from xcomp.model import VideoQA

PREFIX, SUFFIX = torch.tensor([1, 2, 3]), torch.tensor([30, 31, 32, 33, 34])
BOTH = ["evs", "lp_comp"]


def chain(*nodes):
    return build_component("compressor", list(nodes))


def moving(backbone, num_frames, seed=0):
    """Frames that change here and there, so that EVS leaves them of unequal length."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.randn(num_frames, backbone.tokens_per_frame, 32, generator=g)
    steps[1:] *= torch.rand(num_frames - 1, backbone.tokens_per_frame, 1, generator=g) ** 3
    steps[1:] *= torch.rand(num_frames - 1, 1, 1, generator=g)
    return xcomp.visual.VisualTokens.from_frames(steps.cumsum(0), backbone.grid)


# --- EVS, then LP-Comp ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "ceil"])
@torch.no_grad()
def test_evs_then_lp_comp_equals_both_written_out(rounding, make_backbone):
    backbone = make_backbone(tokens_per_frame=8, layers=4)
    video = moving(backbone, 7)
    entered = xcomp.load_compressor("evs", q=0.5).compress(video, None)
    counts = entered.counts().tolist()
    assert len(set(counts)) > 3 and min(counts) < 3, counts  # ragged
    planned = xcomp.load_compressor("lp_comp", rounding=rounding).plan(4, 8)
    # Frames with fewer tokens fill the last slots, and of those the last stay.
    slot = [8 - counts[t] + i for t in range(7) for i in range(counts[t])]

    def change(layer, hidden, token, attention):
        stay = [i for i, k in enumerate(token.tolist()) if k < 0 or slot_of[k] in planned[layer]]
        return torch.tensor(stay), hidden

    first = [i for i, s in enumerate(slot) if s in planned[0]]
    slot_of = [slot[i] for i in first]
    logits, stored = slow_pass(backbone, entered.select(torch.tensor(first)), PREFIX, SUFFIX, change, renumber=True)
    decoder = xcomp.Decoder(backbone, chain({"name": "evs", "q": 0.5}, {"name": "lp_comp", "rounding": rounding}))
    state = decoder.prefill(video, PREFIX, SUFFIX)
    assert state.tokens_per_layer == [int((token >= 0).sum()) for *_, token in stored]
    assert state.tokens_per_layer == [sum(min(c, len(p)) for c in counts) for p in planned]
    assert relative_error(state.logits[0], logits) < 1e-4
    for layer, (keys, values, _) in enumerate(stored):
        assert relative_error(state.cache.layers[layer].keys, keys) < 1e-4
        assert relative_error(state.cache.layers[layer].values, values) < 1e-4


@pytest.fixture(scope="module")
def backbones(tiny_tokenizer):
    torch.manual_seed(0)
    options = {name: backbone_options(name, tiny_tokenizer, layers=4) for name in names_of("backbone")}
    return {name: xcomp.load_backbone(name, **options[name], device="cpu").eval() for name in options}


CHAINS = [
    BOTH,
    ["evs", "fastv"],
    ["tome", "divprune", "uniform_drop"],
    ["cdpruner", "lp_comp"],
    ["avg_pool", "lp_comp"],
]


@pytest.mark.parametrize("parts", CHAINS, ids="+".join)
@pytest.mark.parametrize("backbone", names_of("backbone"))
@torch.no_grad()
def test_a_list_in_a_batch_and_from_a_stored_video(backbone, parts, backbones):
    model = backbones[backbone]
    decoder, videos, prompts = xcomp.Decoder(model, chain(*parts)), [], []
    noise = torch.Generator().manual_seed(0)
    for clips in (3, 2):
        frames = torch.randint(0, 256, (clips * model.clip_frames, 40, 56, 3), dtype=torch.uint8, generator=noise)
        videos.append(model.visual(model.preprocess(frames), decoder.compressor.needs))
        prompts.append(model.prompt(f"Why {clips}?" * clips, ShownVideo(4.0, videos[-1].num_frames)))
    prefixes, suffixes = [p.prefix_ids for p in prompts], [p.suffix_ids for p in prompts]
    batch = decoder.prefill(videos, prefixes, suffixes)
    stored_at_all = 0
    for row, sample in enumerate(zip(videos, prefixes, suffixes)):
        alone = decoder.prefill(*sample)
        assert alone.tokens_per_layer == [counts[row] for counts in batch.tokens_per_layer]
        assert alone.tokens_per_layer[-1] <= alone.tokens_per_layer[0] < len(videos[row])
        assert relative_error(batch.logits[row], alone.logits[0]) < 1e-4
        try:
            stored = decoder.prefill_video(*sample[:2])
        except QuestionNeeded:
            continue
        stored_at_all += 1
        assert stored.tokens_per_layer == alone.tokens_per_layer
        assert relative_error(decoder.extend(stored, sample[2]).logits, alone.logits) < 1e-4
    assert stored_at_all == (0 if {"fastv", "cdpruner"} & set(parts) else 2)


@pytest.mark.parametrize(
    "parts",
    [["lp_comp", "fastv"], ["evs", "lp_comp", "uniform_drop"], ["prunevid", "lp_comp"], ["framefusion", "dart"]],
)
def test_two_rules_inside_at_once_are_refused(parts, tiny_run):
    inside = [name for name in parts if name != "evs"]
    with pytest.raises(ValueError, match=f"^compressor: '{inside[0]}' and '{inside[1]}' all act inside") as error:
        chain(*parts)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="act inside the language model; at most one of a list may"):
        VideoQA.from_config(parse_config({**tiny_run, "compressor": parts}, "run"))
    chain("prunevid" if "prunevid" not in parts else "evs", "avg_pool")  # one may


# --- Budgets ----------------------------------------------------------------------------------------------------------

FRAMES = 4
BUDGET = {"keep": 0.25, "of": "layers"}


@pytest.fixture(scope="module")
def compared(backbones, needle_videos, tmp_path_factory):
    """Records of one comparison in which every compressor is asked for a quarter, and what refused says."""
    folder = tmp_path_factory.mktemp("budgets")
    backbones["videochat_flash"].save_pretrained(str(folder / "model"))
    run = {
        "name": "run",
        "output": str(folder),
        "backbone": {"name": "videochat_flash", "checkpoint": str(folder / "model"), "device": "cpu"},
        "benchmark": {"name": "needle", **needle_videos},
        "sampling": {"rate": 2, "min_frames": 8, "max_frames": 8},
        "generation": {"max_new_tokens": 2},
        "decoding": {"workers": 0},
        "frames": FRAMES,
        "limit": 2,
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    arms, refused = [], {}
    for name in names_of("compressor"):
        node = {"name": name, "budget": BUDGET}
        try:
            VideoQA.from_config(parse_config({**run, "compressor": node}, "run"))
            arms.append({"name": name, "compressor": node})
        except ValueError as error:
            refused[name] = str(error)
    both = [{"name": "evs", "budget": {"keep": 0.5, "of": "input"}}, {"name": "lp_comp", "budget": BUDGET}]
    arms.append({"name": "both", "compressor": both})
    text = yaml.safe_dump({**run, "arms": arms})
    path = compare(parse_config(yaml.safe_load(text), "run"))
    found = {}
    for line in (path / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert not record["error"]
        found.setdefault(record["arm"], []).append(record)
    described = json.loads((path / "run.json").read_text())
    return found, refused, described


@pytest.mark.parametrize("name", names_of("compressor"))
def test_a_quarter_over_layers_is_met_or_refused(name, compared, backbones):
    found, refused, _ = compared
    if name in refused:
        assert "\n" not in refused[name]
        about_needs = rf"compressor '{name}' needs '.+' of the vision path, but backbone 'videochat_flash' gives "
        about_layers = rf"compressor '{name}': .*(nearest(?: possible is|:)) [\d.]+"
        assert re.match(about_needs, refused[name]) or re.match(about_layers, refused[name]), refused[name]
        return
    given = FRAMES // backbones["videochat_flash"].merged_frames * backbones["videochat_flash"].tokens_per_frame
    assert len(found[name]) == 2
    for record in found[name]:
        counts = record["tokens_per_layer"]
        mean = sum(counts) / len(counts)
        assert abs(mean - 0.25 * given) <= FRAMES, counts  # a token a frame
        expected = {"input": counts[0] / given, "final": counts[-1] / given, "layers": mean / given}
        assert record["kept"] == {of: pytest.approx(share, abs=1e-4) for of, share in expected.items()}


def test_most_compressors_meet_a_quarter(compared):
    found, refused, described = compared
    assert {"lp_comp", "uniform_drop", "avg_pool", "evs", "prunevid", "holitom", "tome", "both"} <= set(found) | set(
        refused
    )
    assert {"lp_comp", "uniform_drop", "avg_pool", "evs", "prunevid", "divprune", "tome"} <= set(found)
    assert "none" in refused and refused["none"].endswith("the nearest possible is 1")
    requested = {arm["name"]: arm["compressor"] for arm in described["arms"]}
    assert requested["lp_comp"] == {"name": "lp_comp", "budget": BUDGET}
    # Half of the tokens enter, in frames of unequal length, and of full frames LP-Comp's counts are a quarter.
    both = found["both"][0]["kept"]
    assert (
        both["input"] <= 0.5
        and both["layers"] <= 0.26
        and found["both"][0]["tokens_in"] == found["both"][0]["tokens_per_layer"][0] == 22
    )


@pytest.mark.parametrize("num_layers, width", [(28, 16), (28, 196), (32, 64), (4, 8)])
@pytest.mark.parametrize("of", ["input", "final", "layers"])
@pytest.mark.parametrize("name", ["lp_comp", "uniform_drop"])
def test_a_schedule_is_bent_to_a_budget(name, of, num_layers, width):
    plugin, met = xcomp.registry.load_class("compressor", name), 0
    for schedule in ("cosine", "linear", "constant"):
        for rounding in ("nearest", "ceil"):
            for percent in range(2, 101, 7):
                config = plugin.Config(schedule=schedule, rounding=rounding)
                budget = xcomp.compressor.Budget(percent / 100, of)
                try:
                    config = plugin.for_budget(config, budget, num_layers, width)
                except ValueError as error:
                    nearest = float(str(error).rsplit(" ", 1)[1])
                    assert abs(nearest - budget.keep) * width > 0.5
                    plugin.for_budget(config, xcomp.compressor.Budget(nearest, of), num_layers, width)
                    continue
                counts = [len(slots) for slots in plugin(config).plan(num_layers, width)]
                got = {"input": counts[0], "final": counts[-1], "layers": sum(counts) / num_layers}[of]
                assert abs(got - budget.keep * width) <= 0.5 + 1e-9
                met += 1
    assert met > 60


@pytest.mark.parametrize("num_layers, width", [(28, 16), (32, 64)])
@pytest.mark.parametrize("of", ["input", "final", "layers"])
@pytest.mark.parametrize("name", ["avg_pool", "attention_drop"])
def test_heuristics_meet_a_budget(name, of, num_layers, width, make_backbone):
    backbone = make_backbone(tokens_per_frame=width, layers=num_layers)
    video, met = moving(backbone, 4), 0
    for keep in (0.2, 0.25, 0.5, 0.9, 1.0):
        try:
            decoder = xcomp.Decoder(backbone, xcomp.load_compressor(name, budget={"keep": keep, "of": of}))
        except ValueError as error:
            assert name == "attention_drop" and of == "input" and str(error).endswith("the nearest possible is 1")
            continue
        counts = decoder.prefill(video, PREFIX, SUFFIX).tokens_per_layer
        got = {"input": counts[0], "final": counts[-1], "layers": sum(counts) / num_layers}[of]
        assert abs(got - keep * len(video)) <= (2 if name == "avg_pool" else 1)  # half a token of each frame, or one
        met += 1
    assert met == (1 if (name, of) == ("attention_drop", "input") else 5)


def test_as_published_nothing_changes_where_the_budget_is_the_natural_one():
    lp_comp = xcomp.registry.load_class("compressor", "lp_comp")
    counts = [len(slots) for slots in lp_comp(lp_comp.Config()).plan(28, 16)]
    natural = xcomp.compressor.Budget(sum(counts) / 28 / 16)
    assert lp_comp.for_budget(lp_comp.Config(), natural, 28, 16) == lp_comp.Config(start=16, end=1)
    with pytest.raises(ValueError, match="steps say what stays; the nearest possible is 0.46"):
        lp_comp.for_budget(lp_comp.Config(schedule="steps", steps={10: 4, 20: 1}), natural, 28, 16)


# --- One line, before the first question ------------------------------------------------------------------------------

WRONG = [
    ({"name": "evs", "budget": {"keep": 0}}, "budget.keep is 0"),
    ({"name": "evs", "budget": {"keep": 1.5}}, "budget.keep is 1.5; it must be a share above 0 and at most 1"),
    ({"name": "evs", "budget": {"keep": 0.5, "of": "frames"}}, "budget.of is 'frames'; it must be input, final or lay"),
    ({"name": "evs", "budget": 0.5}, "budget is 0.5; it must be a mapping"),
    ({"name": "evs", "budget": {"kept": 0.5}}, "has no option 'kept'; did you mean 'keep'"),
    ({"name": "evs", "budget": {"keep": "much"}}, "keep"),
    ({"name": "none", "budget": {"keep": 0.5}}, "nothing leaves; the nearest possible is 1"),
    ({"name": "fastv", "budget": {"keep": 0.3}}, "the first 2 of 4 layers hold all tokens; the nearest possible is"),
    ({"name": "fastv", "layer": 9}, r"compressor 'fastv': layers \[9(.0)?\] are \[9\] of 4 layers"),
    ({"name": "attention_drop", "layers": [2, 4], "ratios": [0.5, 0.2]}, "compressor 'attention_drop': layers"),
    ({"name": "lp_comp", "start": 40}, "compressor 'lp_comp': the schedule keeps 3. tokens a frame at layer 1"),
    ([{"name": "evs"}, {"name": "fastv", "layer": 9}], r"fastv: layers \[9(.0)?\] are \[9\] of 4 layers"),
    ([{"name": "evs"}, {"name": "lp_comp", "budget": {"keep": 0.01}}], "compressor 'lp_comp': a budget of 0.01"),
    ({"name": "downsample"}, "compressor 'downsample' needs 'grid' of the vision path, but backbone 'tiny"),
]  # fmt: skip


@pytest.mark.parametrize("node, message", WRONG)
def test_what_cannot_be_is_said_when_the_config_is_read(node, message, make_backbone, tiny_run):
    backbone = make_backbone(tokens_per_frame=16, layers=4)
    backbone.plugin_name = "tiny"
    backbone.grid = None
    config = parse_config({**tiny_run, "compressor": node, "sampling": {"multiple": 2, "min_frames": 2}}, "run")
    with pytest.raises(ValueError, match=message) as error:
        VideoQA.from_config(config, backbone=backbone)
    named = node[-1]["name"] if isinstance(node, list) else node["name"]
    assert "\n" not in str(error.value) and named in str(error.value)


def test_a_comparison_with_one_wrong_arm_asks_nothing(tiny_run, tmp_path):
    arms = [{"name": "right", "compressor": "lp_comp"}, {"compressor": {"name": "none", "budget": {"keep": 0.5}}}]
    with pytest.raises(ValueError, match="^compressor 'none': a budget of 0.5 of layers cannot be met"):
        compare(parse_config({**tiny_run, "arms": arms}, "run"))
    assert not list(tmp_path.rglob("records*.jsonl"))

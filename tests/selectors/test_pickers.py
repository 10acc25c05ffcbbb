"""Pickers against what their authors' code chose, against slow versions of their definitions, and at the edges."""

import math

import numpy as np
import pytest
import torch
from contracts.plugin_options import PICKERS
from golden import each_case
from tiny_clip import save_tiny_clip
from xcomp.selectors.aks import aks_frames, aks_segments
from xcomp.selectors.bolt import inverse_transform
from xcomp.selectors.focus import FOCUS, focus_frames
from xcomp.selectors.mdp3 import mdp3_frames, multi_gaussian
from xcomp.selectors.q_frame import gumbel_order, resolution_levels

import xcomp
from xcomp.answering import Answerer, Query
from xcomp.backbone import QuestionError
from xcomp.selector import Candidates, Embeddings, FrameQuery
from xcomp.testing import video_of
from xcomp.tiny import tiny_backbone

# --- what the released code chose -------------------------------------------------------------------------------------


@each_case("aks")
def test_aks_is_the_released_code(case):
    given, stride = case.params, case.params["ratio"]
    scores = case.inputs["scores"][::stride].numpy()
    options = given["max_num_frames"], given["t1"], given["t2"], given["all_depth"]
    assert [i * stride for i in aks_frames(scores, *options)] == case.outputs["selected"].tolist()
    if len(scores) >= given["max_num_frames"]:
        scaled = (scores - scores.min()) / (scores.max() - scores.min())
        found = [[a * stride, b * stride, depth] for a, b, depth in aks_segments(scaled, *options)]
        assert sorted(found) == sorted(case.outputs["segments"].tolist())


@each_case("bolt")
def test_bolt_is_the_released_code(case):
    found = inverse_transform(case.inputs["scores"].numpy(), case.params["num_frames"], case.params["power"])
    assert found.tolist() == case.outputs["selected"].tolist()


@each_case("focus")
def test_focus_is_the_released_code(case):
    given, curve = case.params, case.inputs["scores"].numpy()
    config = FOCUS.Config(
        coarse_seconds=given["coarse_every_sec"],
        fine_seconds=given["fine_every_sec"],
        zoom_ratio=given["zoom_ratio"],
        extra_samples=given["extra_samples_per_region"],
        fine_uniform=given["fine_uniform_ratio"],
        top_ratio=given["top_ratio"],
        temperature=given["temperature"],
        min_gap=given["min_gap_sec"],
        interpolation=given["interpolation_method"],
        min_arms=given["min_coarse_segments"],
        min_zoom=given["min_zoom_segments"],
        max_final=given["final_max_arms"],
    )
    assert given["final_min_arms"] == given["min_zoom_segments"]  # one option here
    rng = np.random.default_rng(given["rng_seed"])
    found = focus_frames(lambda i: curve[list(i)], given["total_frames"], given["fps"], given["k"], config, rng)
    want = {name: tensor.tolist() for name, tensor in case.outputs.items()}
    assert [list(bounds) for bounds in found.arms.bounds] == want["arms"]
    assert found.coarse == want["coarse"] and found.zoomed == want["zoomed_arms"]
    assert np.allclose(found.bounds, want["focus_scores"], rtol=1e-9)
    assert sorted(found.fine) == want["fine"]
    assert found.chosen == want["selected"]


@each_case("qframe")
def test_q_frame_is_the_released_code(case):
    given = case.params
    logits = (case.inputs["image_features"] @ case.inputs["text_features"].T)[:, 0]
    perturbed, order = gumbel_order(logits, case.inputs["uniform"], given["tau"])
    assert torch.allclose(perturbed, case.outputs["perturbed"], rtol=1e-4, atol=1e-4)
    assert torch.equal(order, case.outputs["order"])
    levels = resolution_levels(order, given["high"], given["mid"], given["low"])
    assert torch.equal(levels, case.outputs["level"])


@each_case("mdp3")
def test_mdp3_is_the_released_code(case):
    given, frames = case.params, case.inputs["image_embeds"]
    nearness = multi_gaussian(case.inputs["text_embed"], frames, given["alphas"])[0]
    kernel = multi_gaussian(frames, frames, given["alphas"])
    assert torch.allclose(nearness, case.outputs["relevance"], rtol=1e-5)
    assert torch.allclose(kernel, case.outputs["kernel"], rtol=1e-5)
    options = given["n_selection"], given["lamda"], given["segment_size"], given["condition_size"]
    chosen, values = mdp3_frames(nearness, kernel, *options)
    assert chosen == case.outputs["selected"].tolist()
    assert torch.allclose(values.float(), case.outputs["objective"], rtol=1e-4)


# --- slow versions of the definitions ---------------------------------------------------------------------------------


def noise(count, seed=0):
    return np.random.default_rng(seed).random(count)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("count, budget, depth", [(64, 16, 4), (100, 16, 3), (37, 8, 3), (33, 32, 5)])
def test_aks_by_recursion(count, budget, depth, threshold):
    scores = noise(count) ** 4
    scaled = (scores - scores.min()) / (scores.max() - scores.min())

    def part(first, stop, level):
        values = sorted(scaled[first:stop], reverse=True)
        gap = sum(values[:budget]) / len(values[:budget]) - sum(values) / len(values)
        if level == depth or gap > threshold:
            ranked = sorted(range(first, stop), key=lambda i: (-scaled[i], i))
            return ranked[: budget // 2**level]
        middle = first + (stop - first) // 2
        return part(first, middle, level + 1) + part(middle, stop, level + 1)

    assert aks_frames(scores, budget, threshold, -100, depth) == sorted(part(0, count, 0))


def test_bolt_share_by_share():
    scores = noise(50).astype(np.float32)
    weights = ((scores.astype(float) - scores.min()) / (scores.max() - scores.min())) ** 3
    found = []
    for j in range(12):
        wanted, total, i = (1 / 12 + j * (1 - 2 / 12) / 11), 0.0, -1
        while total < wanted:
            i += 1
            total += weights[i] / weights.sum()
        found.append(i)
    assert inverse_transform(scores, 12, 3.0).tolist() == found


@pytest.mark.parametrize("count, rate, budget", [(256, 2.0, 16), (100, 1.0, 9), (61, 4.0, 12)])
def test_focus_step_by_step(count, rate, budget):
    """Without random frames but in the last draw, which is so cold that it takes the highest guess."""
    options = dict(extra_samples=0, fine_uniform=1.0, min_gap=0.0, temperature=1e-9, min_arms=6, min_zoom=2)
    config = FOCUS.Config(**options, coarse_seconds=8.0, fine_seconds=1.0, zoom_ratio=0.25, top_ratio=0.25)
    scores = noise(count)
    wanted = max(6, math.ceil(count / rate / 8.0))
    num_arms = count // (count // wanted)
    size = count // num_arms
    arms = [list(range(a * size, (a + 1) * size)) for a in range(num_arms)]
    centres = [(arm[0] + arm[-1]) // 2 for arm in arms]
    values = []
    for centre in centres:  # one score an arm: its variance is the floor
        log = math.log(num_arms)
        values.append(scores[centre] + math.sqrt(2 * log * 1e-6) + 3 * log)
    order = sorted(range(num_arms), key=lambda a: -values[a])
    looked_into = order[: max(2, math.ceil(num_arms * 0.25))]
    known = list(centres)
    half = round(max(1 / rate, count / rate / wanted / 2) * rate)
    for arm in looked_into:
        first, last = max(0, centres[arm] - half), min(count - 1, centres[arm] + half)
        number = max(1, (last - first + 1) // max(1, round(rate)))
        for j in range(number):
            frame = first + int((j + 0.5) * (last - first + 1) / number)
            if frame not in known:
                known.append(frame)
    expected = sorted(known, key=lambda i: -scores[i])[: round(0.25 * min(budget, len(known)))]
    # All frames of an arm are nearest to its only sample, so its share is drawn evenly: any of them will do.
    share, more = divmod(budget - len(expected), len(looked_into))
    rng = np.random.default_rng(0)
    found = focus_frames(lambda i: scores[list(i)], count, rate, budget, config, rng)
    assert found.coarse == centres and found.zoomed == looked_into
    assert np.allclose(found.bounds, values, rtol=1e-12)
    assert sorted(found.coarse + found.fine) == sorted(known)
    assert set(expected) <= set(found.chosen) and len(set(found.chosen)) == budget
    rest = set(found.chosen) - set(expected)
    for place, arm in enumerate(looked_into):
        free = len(set(arms[arm]) - set(expected))
        assert len(rest & set(arms[arm])) == min(share + (place < more), free)


def test_q_frame_draws_one_after_the_other_by_softmax():
    """Gumbel's trick: the order is that of drawing without replacement, each draw by the softmax of what is left."""
    logits, tau, draws = torch.tensor([0.3, -0.2, 0.9, 0.0]), 0.8, 20_000
    uniform = torch.from_numpy(np.random.default_rng(0).random((draws, 4), dtype=np.float32))
    orders = [tuple(gumbel_order(logits, row, tau)[1][:2].tolist()) for row in uniform[:draws]]
    weights = [math.exp(x / tau) for x in logits.tolist()]
    for first in range(4):
        for second in set(range(4)) - {first}:
            chance = weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
            spread = math.sqrt(chance * (1 - chance) / draws)
            assert abs(orders.count((first, second)) / draws - chance) < 4 * spread


@pytest.mark.parametrize("segment", [-1, 8, 7])
def test_mdp3_with_determinants_written_out(segment):
    generator = torch.Generator().manual_seed(0)
    frames = torch.nn.functional.normalize(torch.randn(24, 6, generator=generator), dim=1)
    alphas, budget = [0.5, 1.0], 6
    kernel, nearness = multi_gaussian(frames, frames, alphas).double(), multi_gaussian(frames[:1], frames, alphas)[0]

    def worth(chosen):
        if not chosen:
            return 0.0
        return 10 * nearness[chosen].double().log().sum().item() + kernel[chosen][:, chosen].logdet().item()

    size = 24 if segment == -1 else segment
    best = {0: (0.0, [])}
    for first in range(0, 24, size):
        members, new = range(first, min(first + size, 24)), dict(best)
        for count, (value, before) in best.items():
            picked = []
            for _ in range(min(budget - count, len(members))):
                left = [i for i in members if i not in picked]
                picked = [*picked, max(left, key=lambda i: worth(before[-1:] + picked + [i]))]
                total = value + worth(before[-1:] + picked)
                if total > new.get(count + len(picked), (-math.inf,))[0]:
                    new[count + len(picked)] = total, before + sorted(picked)
        best = new
    chosen, values = mdp3_frames(nearness, kernel, budget, 0.2, segment)
    assert chosen == best[budget][1] and math.isclose(values[budget], best[budget][0], rel_tol=1e-6)


# --- edges ------------------------------------------------------------------------------------------------------------


def picker(name, tmp_path, **options):
    """With a scorer that needs no video."""
    more = {"one_resolution": True} if name == "q_frame" else {}
    return xcomp.load_selector(name, scorer="random", **more, **options)


def pick(selector, scores, budget, seconds=1.0):
    frames = Candidates.evenly(len(scores), seconds)
    vectors = torch.nn.functional.normalize(torch.randn(len(scores) + 1, 8, generator=torch.Generator().manual_seed(1)))
    frames.score, frames.embed = lambda i: scores[list(i)], lambda: Embeddings(vectors[1:], vectors[:1])
    frames.query = FrameQuery("why", None)
    return selector.pick(scores, budget, frames)


CURVES = {"noise": torch.tensor(noise(40)).float(), "constant": torch.full((40,), 0.3), "zero": torch.zeros(40),
          "one peak": (torch.arange(40) == 17).float(), "rising": torch.arange(40).float() - 20}  # fmt: skip


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("name", PICKERS)
def test_budgets_are_met(name, curve, tmp_path):
    """From one frame of one to more than there are; ascending, and a frame twice only where the method says so."""
    selector = picker(name, tmp_path)
    for count in (1, 2, 3, 7, 40):
        for budget in (1, 2, 5, 6, 33, 40, 50):
            found = pick(selector, CURVES[curve][:count], budget)
            assert len(found) == min(budget, count) and found == sorted(found) and 0 <= found[0] <= found[-1] < count
            assert selector.repeats or len(set(found)) == len(found)
            assert found == pick(selector, CURVES[curve][:count], budget)


@pytest.mark.parametrize("name", PICKERS)
def test_a_budget_of_nothing_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="a frame budget of 0 was asked for; it must be at least 1"):
        pick(picker(name, tmp_path), CURVES["noise"], 0)


def test_only_bolt_shows_a_frame_twice_and_only_as_released(tmp_path):
    peak = torch.cat([torch.rand(30), torch.tensor([50.0]), torch.rand(9)])
    twice = pick(picker("bolt", tmp_path), peak, 8)
    assert len(set(twice)) < 8
    once = pick(picker("bolt", tmp_path, unique=True), peak, 8)
    assert len(set(once)) == 8 and set(twice) <= set(once) and max(once) - min(once) < 12
    assert [name for name in PICKERS if picker(name, tmp_path).repeats] == ["bolt"]


def test_top_k_keeps_its_distance_while_it_can(tmp_path):
    scores = torch.tensor([0.0, 9, 8, 7, 0, 0, 6, 5, 0, 0])
    assert pick(picker("top_k", tmp_path), scores, 3) == [1, 2, 3]
    assert pick(picker("top_k", tmp_path, min_seconds=2.0), scores, 3) == [1, 3, 6]
    assert pick(picker("top_k", tmp_path, min_seconds=4.0), scores, 3) == [1, 2, 6]  # two fit; the best other fills
    assert len(pick(picker("top_k", tmp_path, min_seconds=100.0), scores, 4)) == 4


def test_the_released_aks_is_refused_where_it_gives_too_few(tmp_path):
    with pytest.raises(QuestionError, match="aks: the released rule gives 0 of 8 frames at depth 5; lower depth"):
        pick(picker("aks", tmp_path, released=True), CURVES["noise"], 8)


def test_q_frame_in_three_resolutions_is_refused_by_name():
    selector = xcomp.load_selector("q_frame", scorer="random")
    with pytest.raises(
        ValueError, match="q_frame: backbone 'TinyBackbone' shows all frames of a video at one size, so"
    ):
        Answerer(tiny_backbone(), None, selector, budget=8)


@pytest.mark.parametrize(
    "scorer, message",
    [
        ("uniform", "selector 'uniform' chooses without scores; a scorer is needed"),
        ({"name": "bolt", "scorer": "random"}, "selector 'bolt' is a picker itself; a scorer is needed"),
        ("qc_cmp", "unknown selector 'qc_cmp'; did you mean 'qc_comp'"),
        ({"name": "qc_comp", "chunk": 4}, "selector 'qc_comp' has no option 'chunk'"),
    ],
)
def test_what_cannot_score_is_refused(scorer, message):
    with pytest.raises(ValueError, match=message):
        xcomp.load_selector("aks", scorer=scorer)


def test_published_combinations_are_the_defaults():
    checkpoints = {name: xcomp.registry.load_class("selector", name).Config().scorer for name in PICKERS}
    assert checkpoints["aks"]["checkpoint"] == checkpoints["focus"]["checkpoint"] == "Salesforce/blip-itm-large-coco"
    assert checkpoints["bolt"]["checkpoint"] == "openai/clip-vit-large-patch14"
    assert checkpoints["mdp3"]["checkpoint"] == "google/siglip-so400m-patch14-384"
    assert checkpoints["q_frame"]["similarity"] == "dot"


# --- in a run ---------------------------------------------------------------------------------------------------------


def ask(*texts):
    return [Query("given frames", text, text) for text in texts]


def test_focus_decodes_only_what_it_asks_for(tmp_path, monkeypatch):
    clip = {"name": "clip_similarity", "checkpoint": save_tiny_clip(tmp_path)}
    selector = xcomp.load_selector("focus", scorer=clip)
    frames = torch.randint(0, 256, (400, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    backbone, decoded = tiny_backbone(), set()
    answerer = Answerer(backbone, None, selector, budget=8)
    with video_of(frames, backbone) as video:
        pool = video._frames._pool
        given = pool.decode
        monkeypatch.setattr(pool, "decode", lambda path, i, formats: decoded.update(i) or given(path, i, formats))
        video.expect(answerer.expected)
        (choice,) = answerer.choose(video, ask("which symbol"))
    asked = {i for i, score in enumerate(choice.scores) if score is not None}
    assert decoded == asked and 20 < len(asked) < 150 and len(choice.frames) == 8
    counted = selector.cost(backbone, 400, FrameQuery("which symbol", None, shown=video_shown(400)), None)
    frames_counted = counted.video_macs // selector.scorer._frame_macs()
    assert len(asked) <= frames_counted < 1.1 * len(asked)  # a second look may meet frames of the first


def video_shown(count):
    from xcomp.backbone import ShownVideo

    return ShownVideo(count / 2, count)


def test_scores_are_computed_once_for_all_pickers(monkeypatch):
    node = {"name": "qc_comp", "chunk_frames": 8, "clip_frames": 8, "query_bias": 1}
    selectors = [xcomp.load_selector("qc_comp", **{k: v for k, v in node.items() if k != "name"})]
    selectors += [xcomp.load_selector(name, scorer=node) for name in ("aks", "bolt", "top_k", "focus", "mdp3")]
    assert len({id(s.scorer) for s in selectors[1:]}) == 1
    backbone, calls = tiny_backbone(), []
    score = type(selectors[0]).score
    monkeypatch.setattr(type(selectors[0]), "score", lambda self, *args: calls.append(1) or score(self, *args))
    frames = torch.randint(0, 256, (32, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rule = xcomp.load_compressor("none")
    with video_of(frames, backbone) as video:
        found = [Answerer(backbone, rule, s, budget=8).choose(video, ask("Where is the ring?"))[0] for s in selectors]
    assert len(calls) == 1 and len({choice.frames for choice in found}) > 2
    assert all(choice.scores == found[0].scores for choice in found)

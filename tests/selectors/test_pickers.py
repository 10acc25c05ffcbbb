"""Pickers against what their authors' code chose, against slow versions of their definitions, and at the edges."""

import numpy as np
import torch
from golden import each_case
from xcomp.selectors.aks import aks_frames, aks_segments
from xcomp.selectors.bolt import inverse_transform
from xcomp.selectors.focus import FOCUS, focus_frames
from xcomp.selectors.mdp3 import mdp3_frames, multi_gaussian
from xcomp.selectors.q_frame import gumbel_order, resolution_levels

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

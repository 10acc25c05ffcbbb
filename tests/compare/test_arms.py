"""What an arm takes from its run: options of the same plugin, and where and how its backbone computes."""

import json

import pytest

from xcomp.compare.arms import resolve_arms
from xcomp.compare.runner import compare
from xcomp.config import load_config, parse_config

RUN = {"name": "videochat_flash", "checkpoint": "a", "clip_frames": 8}


def backbones(run, *arms):
    content = {"backbone": run, "arms": [{"name": str(i), "backbone": arm} for i, arm in enumerate(arms)]}
    return [arm.backbone for arm in resolve_arms(parse_config(content, "x"))]


def test_an_override_of_the_device_reaches_every_arm_of_the_demo():
    shipped = resolve_arms(load_config("demo"))
    arms = resolve_arms(load_config("demo", ["backbone.device=cuda", "backbone.dtype=bfloat16"]))
    assert len(arms) == len(shipped) and len({arm.backbone["checkpoint"] for arm in arms}) == 2
    for arm, before in zip(arms, shipped):
        assert arm.backbone == {**before.backbone, "device": "cuda", "dtype": "bfloat16"}


SHIPPED = ["videochat_flash_2b", "llava_next_video_7b", "qwen2_5_vl_7b", "smolvlm2_2b"]


@pytest.mark.parametrize("name", [f"{folder}/compare" for folder in SHIPPED])
def test_every_arm_of_a_shipped_comparison_can_be_put_elsewhere(name):
    assert {arm.backbone["device"] for arm in resolve_arms(load_config(name))} == {"cuda"}
    assert {arm.backbone["device"] for arm in resolve_arms(load_config(name, ["backbone.device=cpu"]))} == {"cpu"}


def test_an_arm_takes_what_it_leaves_out_from_a_run_of_the_same_plugin():
    own = {"name": "videochat_flash", "checkpoint": "b"}
    assert backbones(RUN, own, {**own, "clip_frames": 4}) == [{**RUN, "checkpoint": "b"}, {**own, "clip_frames": 4}]
    content = {"backbone": RUN, "compressor": {"name": "avg_pool", "tokens": 4}, "selector": {"name": "qc_comp"}}
    arms = [{"compressor": {"name": "avg_pool"}}, {"compressor": "avg_pool"}, {"compressor": {"name": "lp_comp"}}]
    content["arms"] = [{"name": str(i), **arm} for i, arm in enumerate(arms)]
    found = [arm.compressor for arm in resolve_arms(parse_config(content, "x"))]
    assert found == [content["compressor"], "avg_pool", {"name": "lp_comp"}]  # a plain name stands for itself


@pytest.mark.parametrize("option, value, other", [("device", "cuda", "cpu"), ("dtype", "bfloat16", "float16")])
def test_how_a_backbone_computes_is_the_runs(option, value, other):
    """Whatever plugin an arm names, unless the arm says something else."""
    llava = {"name": "llava_next_video", "checkpoint": "b"}
    own = {**llava, option: other}
    assert backbones({**RUN, option: value}, llava, own) == [{**llava, option: value}, own]
    assert backbones({option: value}, llava) == [{**llava, option: value}]  # only arms name a backbone


def test_a_backbone_without_the_option_is_left_as_it_is(tmp_path):
    (tmp_path / "plain.py").write_text(
        "from dataclasses import dataclass\nfrom xcomp import Backbone\n"
        "class Plain(Backbone):\n    @dataclass\n    class Config:\n        dtype: str = 'float32'\n"
    )
    content = {"backbone": {**RUN, "device": "cpu", "dtype": "float16"}, "plugins": [str(tmp_path)]}
    arms = resolve_arms(parse_config({**content, "arms": [{"backbone": "plain"}]}, "x"))
    assert arms[0].backbone == {"name": "plain", "dtype": "float16"}


def test_what_the_environment_holds_is_not_recorded(tiny_run, tmp_path, monkeypatch):
    """The run goes by the values; its description, records and report hold the text of the configuration."""
    checkpoint, root = tiny_run["backbone"]["checkpoint"], tiny_run["benchmark"]["root"]
    monkeypatch.setenv("SECRET_CHECKPOINT", checkpoint)
    monkeypatch.setenv("SECRET_ROOT", root)
    own = {"name": "videochat_flash", "checkpoint": "${oc.env:SECRET_CHECKPOINT}", "clip_frames": 4}
    run = {
        **tiny_run,
        "limit": 1,
        "backbone": {"name": "videochat_flash", "checkpoint": "${oc.env:SECRET_CHECKPOINT}"},
        "benchmark": {**tiny_run["benchmark"], "root": "${oc.env:SECRET_ROOT}"},
        "arms": [{"name": "a"}, {"name": "b", "backbone": own}],
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    folder = compare(load_config(tmp_path / "run.yaml"))
    described = json.loads((folder / "run.json").read_text())
    assert described["config"]["backbone"] == run["backbone"] and described["config"]["arms"][1]["backbone"] == own
    assert described["benchmark"]["name"] == described["config"]["benchmark"] == run["benchmark"]
    assert [arm["backbone"] for arm in described["arms"]] == [run["backbone"], own]
    assert [arm["checkpoint"] for arm in described["arms"]] == ["${oc.env:SECRET_CHECKPOINT}"] * 2
    for name in ("run.json", "summary.json", "report.html", "records.jsonl"):
        assert checkpoint not in (folder / name).read_text()
        assert root not in (folder / name).read_text() or name == "records.jsonl"  # which names the videos
    assert compare(load_config(tmp_path / "run.yaml")) == folder  # and it resumes

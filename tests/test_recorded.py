"""What a tuned checkpoint says of its tuning, and what a run makes of it."""

import json
from functools import partial

import pytest
import yaml
from tuning_runs import tuning_config

import xcomp
from xcomp.cli import main
from xcomp.compare.arms import resolve_arms
from xcomp.config import ConfigError, parse_config
from xcomp.recorded import recorded_compressor, tell_others, write_record
from xcomp.tuning import tune

STEPS = {"name": "lp_comp", "schedule": "steps", "steps": {1: 4}, "rule": "last_of_group"}


@pytest.fixture
def make(tiny_run, needle_videos):
    return partial(tuning_config, tiny_run, needle_videos)


@pytest.fixture
def tuned(make):
    """Folder of a model tuned with LP-Comp in steps."""
    return tune(parse_config(make("run", {"compressor": STEPS}, steps=1), "x"))


def arms(checkpoint, *compressors):
    backbone = {"name": "videochat_flash", "checkpoint": str(checkpoint)}
    content = {"backbone": backbone, "arms": [{"name": f"arm {i}", "compressor": c} for i, c in enumerate(compressors)]}
    return resolve_arms(parse_config(content, "x"))


def told(checkpoint, *compressors):
    tell_others([(arm.name, arm.backbone, arm.compressor) for arm in arms(checkpoint, *compressors)], [])


def test_a_run_takes_the_compressor_that_a_checkpoint_was_tuned_with(tuned, tiny_run, tmp_path, capfd):
    record = json.loads((tuned / "xcomp.json").read_text())
    assert record["tuned"] == {"run": "run", "steps": 1, "train": ["llm", "projector"], "seed": 0}
    (arm,) = arms(tuned, "recorded")
    assert arm.compressor == arm.description["compressor"]
    assert {key: arm.compressor[key] for key in STEPS} == STEPS  # keys of steps are numbers again
    run = {**tiny_run, "backbone": {"name": "videochat_flash", "checkpoint": str(tuned)}, "compressor": "recorded"}
    assert xcomp.VideoQA.from_config(parse_config(run, "x")).compressor.config.steps == {1: 4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run, "limit": 1}))
    assert main(["evaluate", str(tmp_path / "run.yaml")]) == 0
    described = json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())
    assert described["config"]["compressor"] == "recorded" and described["arms"][0]["compressor"]["name"] == "lp_comp"
    assert "was tuned with" not in capfd.readouterr().err


def test_an_arm_that_uses_a_tuned_checkpoint_otherwise_is_told(tuned, capsys):
    told(tuned, STEPS, "none", "lp_comp", {**STEPS, "budget": {"keep": 1.0}})
    line = f"xcomp: checkpoint '{tuned}' was tuned with lp_comp, not so: arm 1 (none), arm 2 (schedule: cosine, then "
    assert capsys.readouterr().err == f"{line}steps), arm 3 (a budget of its own)\n"
    told(tuned, STEPS, "recorded")
    assert capsys.readouterr().err == ""


def test_what_ships_records_it(capsys):
    told("tiny_lp_comp", "lp_comp", "recorded")
    assert capsys.readouterr().err == ""
    told("tiny_lp_comp", {"name": "lp_comp", "rounding": "ceil"})
    assert "lp_comp, not so: arm 0 (rounding: ceil, then nearest)\n" in capsys.readouterr().err


def test_several_compressors_are_recorded_in_turn(tmp_path):
    content = [{"name": "avg_pool", "tokens": 8}, {"name": "lp_comp", "end": 2}]
    run = {"backbone": {"name": "videochat_flash", "checkpoint": "tiny"}, "compressor": content}
    model = xcomp.VideoQA.from_config(parse_config(run, "x"))
    write_record(tmp_path, model.compressor)
    node = recorded_compressor({"name": "videochat_flash", "checkpoint": str(tmp_path)})
    assert [part["name"] for part in node] == ["avg_pool", "lp_comp"] and node[1]["end"] == 2


@pytest.mark.parametrize("checkpoint", ["tiny", "owner/name", "/nowhere"])
def test_a_checkpoint_that_records_none_is_one_line(checkpoint):
    with pytest.raises(
        ConfigError, match=rf"arms\[0\]: compressor is 'recorded', but checkpoint '{checkpoint}' records"
    ):
        arms(checkpoint, "recorded")

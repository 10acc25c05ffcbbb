"""The run folder: one configuration each, and a folder that cannot be used is refused before anything is written."""

import json
import os

import pytest

from xcomp.config import ConfigError, load_config, parse_config
from xcomp.run import check_run, make_trainer, open_run


@pytest.fixture
def make(tmp_path):
    return lambda **content: parse_config({"output": str(tmp_path / "runs"), "name": "run", **content}, "x")


def test_a_folder_is_made_once_and_reopened(make):
    folder = open_run(make(frames=4), "evaluate", benchmark={"name": "needle"})
    first = (folder / "run.json").read_text()
    assert json.loads(first)["benchmark"] == {"name": "needle"} and json.loads(first)["config"]["frames"] == 4
    assert open_run(make(frames=4), "evaluate") == folder and (folder / "run.json").read_text() == first
    assert [p.name for p in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "other, message",
    [
        ({"frames": 8}, "frames was 4, now 8"),
        ({"frames": 4, "compressor": {"name": "lp_comp", "end": 2}}, "compressor was 'none', now None"),
        ({"frames": 4, "sampling": {"rate": 2}}, "sampling.rate was 1.0, now 2.0"),
        ({"frames": 4, "backbone": {"name": "x", "dtype": "bfloat16"}}, "backbone.dtype was None, now 'bfloat16'"),
    ],
)
def test_the_first_difference_is_named(make, other, message):
    folder = open_run(make(frames=4), "evaluate")
    with pytest.raises(ConfigError, match=f"belongs to a different config: {message}"):
        check_run(make(**other), "evaluate")
    with pytest.raises(ConfigError, match="belongs to 'xcomp evaluate'; choose another 'name', or delete the folder"):
        check_run(make(frames=4), "tune")
    assert [p.name for p in folder.iterdir()] == ["run.json"]


def test_a_run_is_compared_as_its_file_is_written(tmp_path, monkeypatch):
    """Not by what the environment happens to hold: on another machine the data lie elsewhere."""
    file = tmp_path / "run.yaml"
    file.write_text(f"output: {tmp_path / 'runs'}\nbackbone: {{name: x, checkpoint: '${{oc.env:WEIGHTS}}'}}\n")
    monkeypatch.setenv("WEIGHTS", "/here")
    folder = open_run(load_config(file), "evaluate", benchmark={"name": "needle"})
    monkeypatch.setenv("WEIGHTS", "/there")
    assert open_run(load_config(file), "evaluate") == folder
    assert "/here" not in (folder / "run.json").read_text()
    with pytest.raises(ConfigError, match=r"backbone.checkpoint was '\$\{oc.env:WEIGHTS\}', now '/there'"):
        check_run(load_config(file, ["backbone.checkpoint=/there"]), "evaluate")


@pytest.mark.parametrize(
    "text, message", [("{", "is not JSON"), ("[]", "describes no run"), ("{}", "describes no run")]
)
def test_a_damaged_description_is_refused(make, text, message):
    folder = open_run(make(), "evaluate")
    (folder / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=f"run.json' {message}.*; choose another 'name', or delete the folder"):
        open_run(make(), "evaluate")


def test_a_place_that_cannot_be_written_is_refused(make, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"cannot be made: '{tmp_path}/file' is a file; choose another 'output'"):
        open_run(make(output=str(tmp_path / "file" / "deeper")), "evaluate")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for a user who may not
    with pytest.raises(ConfigError, match=f"cannot be made: '{tmp_path}' is not writable"):
        open_run(make(), "evaluate")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_trainer_options_override_defaults():
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    assert make_trainer({"max_steps": 3, "accelerator": "cpu"}, max_steps=5, **quiet).max_steps == 3
    with pytest.raises(ConfigError, match="trainer has no option 'max_stps'; did you mean 'max_steps'"):
        make_trainer({"max_stps": 3})
    with pytest.raises(ConfigError, match="trainer: .*limit_val_batches"):
        make_trainer({"limit_val_batches": 1.5}, accelerator="cpu", **quiet)

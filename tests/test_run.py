"""The run folder: one configuration each, and a folder that cannot be used is refused before anything is written."""

import json
import os
import shutil
import signal
import time

import pytest

from xcomp.config import ConfigError, load_config, parse_config
from xcomp.run import FREE_KEYS, check_run, hold_run, make_trainer, open_run, whole_file


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


def test_what_may_change_depends_on_the_command(make, monkeypatch):
    monkeypatch.setitem(FREE_KEYS, "evaluate", ("frames", "tune.frames"))
    open_run(make(frames=4), "evaluate")
    folder = open_run(make(frames=[8, 16], tune={"frames": [4]}), "evaluate")
    assert json.loads((folder / "run.json").read_text())["config"]["frames"] == [8, 16]  # what it is now
    with pytest.raises(ConfigError, match="different config: tune.steps was 1000, now 2"):
        check_run(make(frames=4, tune={"steps": 2}), "evaluate")
    monkeypatch.setitem(FREE_KEYS, "evaluate", ("tune.frames", "tune.step"))  # names, not how they begin
    with pytest.raises(ConfigError, match="different config: tune.steps was 1000, now 2"):
        check_run(make(frames=[8, 16], tune={"steps": 2}), "evaluate")


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"two")
        raise ZeroDivisionError
    assert path.read_bytes() == b"one" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_held_by_one(tmp_path):
    folder = tmp_path / "runs" / "run"
    with hold_run(folder):
        (folder / "run.json").touch()
        with pytest.raises(ConfigError, match=f"run' is in use by process {os.getpid()} on .* since 20"):
            with hold_run(folder):
                pytest.fail("held twice")
        (folder / ".holder.json").write_text("{")  # just being written
        with pytest.raises(ConfigError, match="run' is in use by another process"):
            with hold_run(folder):
                pytest.fail("held twice")
    with hold_run(folder):
        pass
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "run.json"]


def test_a_hold_leaves_no_folders_that_nothing_was_put_into(tmp_path):
    with pytest.raises(ZeroDivisionError), hold_run(tmp_path / "runs" / "run"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with hold_run(tmp_path / "runs" / "run"):
        shutil.rmtree(tmp_path / "runs")  # by someone else
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_hold_ends_with_its_process_not_with_that_ones_workers(tmp_path):
    if (child := os.fork()) == 0:
        with hold_run(tmp_path / "run"):
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            (tmp_path / "forked").touch()
            time.sleep(60)
    while not (tmp_path / "forked").exists():
        time.sleep(0.01)
    with pytest.raises(ConfigError, match=f"in use by process {child} on"):
        with hold_run(tmp_path / "run"):
            pytest.fail("held twice")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with hold_run(tmp_path / "run"):
        pass


def test_trainer_options_override_defaults():
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    assert make_trainer({"max_steps": 3, "accelerator": "cpu"}, max_steps=5, **quiet).max_steps == 3
    with pytest.raises(ConfigError, match="trainer has no option 'max_stps'; did you mean 'max_steps'"):
        make_trainer({"max_stps": 3})
    with pytest.raises(ConfigError, match="trainer: .*limit_val_batches"):
        make_trainer({"limit_val_batches": 1.5}, accelerator="cpu", **quiet)

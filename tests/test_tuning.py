"""Tuning end to end: what it writes, that it trains what it should, and that a stopped run goes on to the same bits."""

import csv
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

import xcomp
from xcomp.cli import main
from xcomp.config import ConfigError, parse_config
from xcomp.model import VideoQA
from xcomp.tuning import tune

KILLED = """
import os, signal, sys
from xcomp.cli import main
from xcomp.model import VideoQA
train, steps = VideoQA.training_step, []
def training_step(self, batch, batch_idx):
    steps.append(batch_idx)
    if len(steps) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(self, batch, batch_idx)
VideoQA.training_step = training_step
main(["tune", sys.argv[1]])
"""


@pytest.fixture
def make(tmp_path, tiny_run, needle_videos):
    """A tuning configuration: 8 records, 4 batches an epoch. Options of ``tune`` by name, others as ``top``."""

    def make(name, top=None, **options):
        needle = {"name": "needle", "split": "train", **needle_videos}
        settings = {"data": [{"benchmark": needle, "tasks": ["open"]}], "frames": [4, 8], "steps": 6, "batch_size": 2}
        settings |= {"learning_rate": 1e-3, "save_every": 2, "num_workers": 0, "train": ["llm", "projector"], **options}
        trainer = {**tiny_run["trainer"], "log_every_n_steps": 1, **(top or {}).pop("trainer", {})}
        return {**tiny_run, "name": name, "tune": settings, "trainer": trainer, **(top or {})}

    return make


def run(content):
    return tune(parse_config(content, "x"))


def weights(folder):
    return load_file(folder / "model.safetensors")


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(folder, column="train/loss"):
    """Step → value over all starts of a run, later ones over earlier ones."""
    found = {}
    for path in sorted(folder.glob("logs/version_*/metrics.csv")):
        with path.open() as file:
            found |= {int(row["step"]): row[column] for row in csv.DictReader(file) if row.get(column)}
    return found


@pytest.fixture
def stop_before(monkeypatch):
    """Makes training fail before its ``n``-th batch (from 0)."""

    def stop_before(n):
        train, batches = VideoQA.training_step, []

        def training_step(self, batch, batch_idx):
            batches.append(batch_idx)
            if len(batches) > n:
                raise RuntimeError("power cut")
            return train(self, batch, batch_idx)

        monkeypatch.setattr(VideoQA, "training_step", training_step)
        return lambda: monkeypatch.setattr(VideoQA, "training_step", train)

    return stop_before


def test_a_run_leaves_checkpoints_logs_and_a_model_that_loads(make, tiny_checkpoint):
    torch.manual_seed(5)
    content = make("run", train=["projector"], steps=4)
    model = run(content)
    folder = model.parent
    description = json.loads((folder / "run.json").read_text())
    assert description["kind"] == "tune" and description["config"] == parse_config(content, "x").to_dict()
    assert checkpoints(folder) == ["step=2.ckpt", "step=4.ckpt"]
    assert list(folder.glob("logs/version_0/events.*")) and sorted(losses(folder)) == [0, 1, 2, 3]
    state = torch.load(folder / "checkpoints" / "step=4.ckpt", weights_only=True)["state_dict"]
    loaded = xcomp.load_backbone("videochat_flash", checkpoint=str(model))
    assert loaded.tokenizer("What?")["input_ids"]
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, state[f"backbone.{name}"]), name
    before, after = weights(tiny_checkpoint), weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "mm_projector" in name}


def test_a_finished_run_is_not_run_again(make, stop_before):
    model = run(make("run", steps=1))
    before = {p: p.stat().st_mtime_ns for p in model.parent.rglob("*")}
    stop_before(0)
    assert run(make("run", steps=1)) == model
    assert {p: p.stat().st_mtime_ns for p in model.parent.rglob("*")} == before


@pytest.mark.parametrize(
    "stop, options, top",
    [
        (3, {}, {}),  # in the middle of the first epoch, after the checkpoint of step 2
        (5, {}, {}),  # early in the second, after the checkpoint at the first one's end
        (4, {"save_every": 3}, {}),
        (5, {"save_every": 1}, {}),  # the second epoch's first checkpoint
        (1, {}, {}),  # before there was a checkpoint: all over again
        (3, {"num_workers": 1}, {}),  # the worker has read ahead
        (3, {"validation": True}, {}),
        (5, {"validation": True}, {}),
        (5, {"steps": 3, "save_every": 1}, {"trainer": {"accumulate_grad_batches": 2}}),
    ],
)
def test_a_stopped_run_goes_on_to_the_weights_of_an_uninterrupted_one(make, stop_before, stop, options, top):
    if options.get("validation"):
        options = {**options, "validation": make("x")["tune"]["data"]}
    whole = run(make("whole", dict(top), **options))
    restore = stop_before(stop)
    with pytest.raises(RuntimeError, match="power cut"):
        run(make("stopped", dict(top), **options))
    restore()
    torch.manual_seed(1234)  # whatever else the new process does
    resumed = run(make("stopped", dict(top), **options))
    assert same(weights(resumed), weights(whole))
    assert losses(resumed.parent) == losses(whole.parent) and len(losses(whole.parent)) >= options.get("steps", 6)
    if options.get("validation"):
        assert losses(whole.parent, "validation/loss") == losses(resumed.parent, "validation/loss") != {}


def test_the_order_of_the_data_matters_here(make):
    """Or the test above would pass whatever the order."""
    assert not same(weights(run(make("one"))), weights(run(make("two", {"seed": 1}))))


def test_a_killed_process_goes_on(make, tmp_path):
    whole = run(make("whole", steps=4))
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(make("killed", steps=4)))
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "tune.yaml"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "runs" / "killed"
    assert (folder / "checkpoints" / "step=2.ckpt").is_file() and not (folder / "model").exists()
    assert main(["tune", str(tmp_path / "tune.yaml")]) == 0
    assert same(weights(folder / "model"), weights(whole))


def test_another_configuration_is_refused_in_the_same_folder(make):
    folder = run(make("run", steps=1)).parent
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(ConfigError, match=r"different config: tune.learning_rate was 0.001, now 0.002; choose another"):
        run(make("run", steps=1, learning_rate=2e-3))
    with pytest.raises(ConfigError, match=r"different config: compressor was 'lp_comp', now 'none'"):
        run(make("run", {"compressor": "none"}, steps=1))
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_stopped_run_may_be_moved(make, tmp_path, stop_before):
    whole = run(make("whole"))
    there = str(tmp_path / "there")
    for batches, top in ((3, {}), (3, {"output": there})):  # stopped after 3 steps; moved, and stopped after 3 more
        restore = stop_before(batches)
        with pytest.raises(RuntimeError, match="power cut"):
            run(make("run", top))
        restore()
        if not top:
            (tmp_path / "there").mkdir()
            (tmp_path / "runs" / "run").rename(tmp_path / "there" / "run")
    assert checkpoints(tmp_path / "there" / "run") == ["step=2.ckpt", "step=4.ckpt"]
    assert same(weights(run(make("run", {"output": there}))), weights(whole))


def test_a_run_stopped_before_its_model_was_written_writes_it(make):
    model = run(make("run", steps=4))
    before = weights(model)
    shutil.rmtree(model)
    assert run(make("run", steps=4)) == model and same(weights(model), before)


def test_a_trainer_option_that_fits_no_such_data_is_refused(make):
    with pytest.raises(ConfigError, match="trainer: You requested to check 0.001 of the `train_dataloader`"):
        run(make("run", {"trainer": {"limit_train_batches": 0.001}}))


def test_the_model_is_saved_in_the_type_asked_for(make):
    model = run(make("run", steps=1, save_dtype="float16"))
    assert {tensor.dtype for tensor in weights(model).values()} == {torch.float16}


@pytest.mark.parametrize("option", [{"logger": False}, {"enable_checkpointing": False}])
def test_loggers_and_checkpoints_can_be_left_out(make, option):
    folder = run(make("run", {"trainer": option}, steps=1)).parent
    assert (folder / "model").is_dir() and (folder / "logs").exists() == option.get("logger", True)
    assert not (folder / "checkpoints").exists() or option.get("enable_checkpointing", True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_video_is_one_line_that_names_it(make, tmp_path, capsys, workers):
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "records.json").write_text(json.dumps([{"video": "gone.mp4", "conversations": turns}]))
    content = make("run", data=[{"records": str(tmp_path / "records.json"), "root": "/videos"}], num_workers=workers)
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(content))
    assert main(["tune", str(tmp_path / "tune.yaml")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.endswith("/videos/gone.mp4: no such file or folder\n")

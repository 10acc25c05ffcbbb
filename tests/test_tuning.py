"""Tuning end to end: what it writes, that it trains what it should, and that a stopped run goes on to the same bits."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from tuning_runs import checkpoints, logged, same, tuning_config, weights

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
def make(tiny_run, needle_videos):
    return partial(tuning_config, tiny_run, needle_videos)


def run(content):
    return tune(parse_config(content, "x"))


def test_a_run_leaves_checkpoints_logs_and_a_model_that_loads(make, tiny_checkpoint):
    torch.manual_seed(5)
    content = make("run", train=["projector"], steps=4)
    model = run(content)
    folder = model.parent
    description = json.loads((folder / "run.json").read_text())
    assert description["kind"] == "tune" and description["config"] == parse_config(content, "x").to_dict()
    assert checkpoints(folder) == ["step=2.ckpt", "step=4.ckpt"]
    assert list(folder.glob("logs/version_0/events.*")) and sorted(logged(folder)) == [0, 1, 2, 3]
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
    whole = run(make("whole", top, **options))
    restore = stop_before(stop)
    with pytest.raises(RuntimeError, match="power cut"):
        run(make("stopped", top, **options))
    restore()
    torch.manual_seed(1234)  # whatever else the new process does
    resumed = run(make("stopped", top, **options))
    assert same(weights(resumed), weights(whole))
    assert logged(resumed.parent) == logged(whole.parent) and len(logged(whole.parent)) >= options.get("steps", 6)
    if options.get("validation"):
        assert logged(whole.parent, "validation/loss") == logged(resumed.parent, "validation/loss") != {}


@pytest.mark.parametrize(
    "stops, options, top",
    [
        ((4, 4), {}, {}),  # at the ends of two epochs in turn, after which Lightning by itself loses count of them
        ((5, 5), {"validation": True}, {}),
        ((1, 2, 2, 2), {"save_every": 1}, {"trainer": {"accumulate_grad_batches": 2}}),
        ((4, 6, 0), {"save_every": 3, "batch_size": 3}, {}),
    ],
)
def test_a_run_stopped_several_times_goes_on_to_the_same_weights(make, stop_before, stops, options, top):
    whole = run(make("whole", top, steps=10, **options))
    for stop in stops:
        restore = stop_before(stop)
        with pytest.raises(RuntimeError, match="power cut"):
            run(make("stopped", top, steps=10, **options))
        restore()
    resumed = run(make("stopped", top, steps=10, **options))
    assert same(weights(resumed), weights(whole)) and logged(resumed.parent) == logged(whole.parent)


@pytest.mark.parametrize("stop, options", [(3, {}), (5, {}), (5, {"num_workers": 1, "validation": True})])
def test_random_numbers_in_a_step_are_those_of_an_uninterrupted_run(make, stop_before, monkeypatch, stop, options):
    """Of dropout, for one, which the models that are built in do without."""
    loss = VideoQA._loss_of
    noisy = lambda *args: tuple(value * (0.5 + torch.rand(())) for value in loss(*args))  # noqa: E731
    monkeypatch.setattr(VideoQA, "_loss_of", noisy)
    whole = run(make("whole"))
    restore = stop_before(stop)
    with pytest.raises(RuntimeError, match="power cut"):
        run(make("stopped"))
    restore()
    resumed = run(make("stopped", **options))
    assert same(weights(resumed), weights(whole)) and logged(resumed.parent) == logged(whole.parent)
    monkeypatch.setattr(VideoQA, "_loss_of", loss)
    assert not same(weights(run(make("quiet"))), weights(whole))


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
    with pytest.raises(ConfigError, match="trainer: You requested to check 0.001 of the `val_dataloader`"):
        run(make("run", {"trainer": {"limit_val_batches": 0.001}}, validation=True))


@pytest.mark.parametrize(
    "trainer, tune, line",
    [
        ({"max_steps": 3}, {}, "trainer.max_steps is not for tuning: set tune.steps"),
        ({"max_epochs": 1}, {}, "trainer.max_epochs is not for tuning: set tune.steps"),
        ({"fast_dev_run": True}, {}, "trainer.fast_dev_run is not for tuning: set tune.steps"),
        ({"max_time": "00:01:00:00"}, {}, "trainer.max_time is not for tuning: SIGTERM ends a run"),
        ({"limit_train_batches": 2}, {}, "trainer.limit_train_batches is not for tuning: a source's sampling_strategy"),
        ({"val_check_interval": 2}, {}, "trainer.val_check_interval is not for tuning: set tune.validate_every"),
        ({"limit_val_batches": 0}, {"validation": True}, "limit_val_batches is 0, so nothing would be validated"),
        ({}, {"validate_every": 2}, "tune.validate_every is 2, but tune.validation is empty"),
        ({}, {"validate_every": 7, "validation": True}, r"validate_every is 7; it .*, and at most tune.steps \(6\)"),
        ({}, {"validate_every": 0, "validation": True}, "tune.validate_every is 0; it must be at least 1"),
    ],
)
def test_what_is_the_runs_own_business_is_refused_of_the_trainer(make, trainer, tune, line):
    with pytest.raises(ConfigError, match=line):
        run(make("run", {"trainer": trainer}, **tune))


def test_validations_come_every_so_many_steps(make):
    """However many batches a step has, and an epoch (4), and however short the run is."""
    accumulated = {"trainer": {"accumulate_grad_batches": 2}}
    folder = run(make("every", accumulated, validation=True, validate_every=3, batch_size=1)).parent
    assert list(logged(folder, "validation/loss")) == [2, 5]  # Lightning's steps, from 0
    assert list(logged(run(make("saved", validation=True, steps=5)).parent, "validation/loss")) == [1, 3]
    assert list(logged(run(make("short", validation=True, steps=1)).parent, "validation/loss")) == [0]


def test_a_validation_that_a_run_ended_in_is_run_when_it_goes_on(make, monkeypatch):
    options = {"validation": True, "steps": 6, "validate_every": 2}
    top = {"trainer": {"num_sanity_val_steps": 0}}
    whole = run(make("whole", top, **options)).parent
    validate, batches = VideoQA.validation_step, []

    def validation_step(self, batch, batch_idx):
        batches.append(batch_idx)
        if len(batches) == 6:  # in the second one
            raise RuntimeError("power cut")
        return validate(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(VideoQA, "validation_step", validation_step)
        with pytest.raises(RuntimeError, match="power cut"):
            run(make("run", top, **options))
    resumed = run(make("run", top, **options)).parent
    assert list(logged(whole, "validation/loss")) == [1, 3, 5]
    assert logged(resumed, "validation/loss") == logged(whole, "validation/loss")
    assert same(weights(resumed / "model"), weights(whole / "model"))


def test_the_validation_loss_is_the_mean_over_tokens_whatever_the_batches(make):
    data = [*make("x")["tune"]["data"], {**make("x")["tune"]["data"][0], "tasks": ["describe"]}]  # long answers too
    losses = []
    for size in (1, 3):
        top = {"trainer": {"num_sanity_val_steps": 0}}
        folder = run(make(f"run-{size}", top, validation=data, batch_size=size, steps=1, learning_rate=1e-12)).parent
        losses.append(float(logged(folder, "validation/loss")[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loss_that_is_not_finite_ends_a_run_with_its_checkpoints(make, tmp_path, capsys):
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(make("run", steps=6, warmup_ratio=0, save_every=1)))
    overrides = ["tune.learning_rate=1e30", "trainer.gradient_clip_val=0"]
    assert main(["tune", str(tmp_path / "tune.yaml"), *overrides]) == 2
    assert "is not finite; checkpoints before it are kept" in capsys.readouterr().err
    folder = tmp_path / "runs" / "run"
    assert not (folder / "model").exists() and checkpoints(folder)


def test_a_gradient_that_is_not_finite_ends_a_run_before_it_reaches_the_weights(make, monkeypatch):
    train = VideoQA.training_step

    def training_step(self, batch, batch_idx):
        loss = train(self, batch, batch_idx)
        weight = next(p for p in self.parameters() if p.requires_grad)
        return loss + (0 * weight).sqrt().sum() if self.trainer.global_step == 1 else loss  # finite, but not its slope

    monkeypatch.setattr(VideoQA, "training_step", training_step)
    with pytest.raises(ValueError, match="the loss or the gradient of step 2 is not finite; checkpoints before it"):
        run(make("run", steps=4, save_every=1))
    folder = Path(make("x")["output"]) / "run"
    state = torch.load(folder / "checkpoints" / "step=1.ckpt", weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values()) and checkpoints(folder) == ["step=1.ckpt"]


def test_the_gradients_norm_is_logged(make, monkeypatch):
    norms, clip = [], VideoQA.configure_gradient_clipping

    def clipping(self, optimizer, *args, **kwargs):
        gradients = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
        norms.append(gradients.square().sum().sqrt().item())
        return clip(self, optimizer, *args, **kwargs)

    monkeypatch.setattr(VideoQA, "configure_gradient_clipping", clipping)
    found = logged(run(make("run", steps=3)).parent, "train/gradient_norm")
    assert [float(found[step]) for step in range(3)] == pytest.approx(norms, rel=1e-4)


def test_a_model_that_nothing_tells_of_is_not_the_result(make):
    content = make("run")
    (Path(content["output"]) / "run" / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds a model and no run.json; choose another 'name'"):
        run(content)


def test_weights_held_in_half_precision_are_told(make, capsys):
    backbone = {**make("x")["backbone"], "dtype": "bfloat16"}
    run(make("half", {"backbone": backbone}, steps=1))
    assert "weights that are trained are held in bfloat16, where small steps round to none" in capsys.readouterr().err
    run(make("whole", steps=1))
    assert "round to none" not in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_records_only(make, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [{"conversations": [{"from": "human", "value": f"Q{i}"}, {"from": "gpt", "value": "A"}]} for i in range(4)]
    data = [{"records": str(folder / "mine.json")}]
    (folder / "mine.json").write_text(json.dumps(rows))
    run(make("run", data=data, frames=[], steps=2))
    (folder / "mine.json").write_text(json.dumps([*rows[1:], rows[0]]))
    with pytest.raises(ConfigError, match=r"not those that it began with \(4 then, 4 now, of other content"):
        run(make("run", data=data, frames=[], steps=4))
    (folder / "mine.json").write_text(json.dumps(rows))
    run(make("run", data=data, frames=[], steps=4))


def test_a_run_whose_description_is_gone_goes_on(make, stop_before):
    restore = stop_before(5)
    with pytest.raises(RuntimeError, match="power cut"):
        run(make("run"))
    restore()
    folder = Path(make("x")["output"]) / "run"
    (folder / "run.json").unlink()
    assert same(weights(run(make("run"))), weights(run(make("whole"))))


def test_records_may_be_mended_before_the_first_checkpoint(make, tmp_path, capsys):
    good = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    bad = {
        "video": "broken.mp4",
        "conversations": [{"from": "human", "value": "<video>Q"}, {"from": "gpt", "value": "A"}],
    }
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "empty.json").write_text("[]")
    data = [{"records": str(tmp_path / name), "root": str(tmp_path)} for name in ("mine.json", "empty.json")]
    (tmp_path / "mine.json").write_text(json.dumps([good, good, bad]))
    with pytest.raises(ConfigError, match="1 of the 3 records of tune.data are left out"):
        run(make("run", data=data, frames=[], steps=3, max_skipped=0, batch_size=3))
    assert "tune.data[1]: " in capsys.readouterr().err  # no records there
    (tmp_path / "mine.json").write_text(json.dumps([good, good, good]))
    (tmp_path / "runs" / "run" / "skipped.jsonl").unlink()
    run(make("run", data=data, frames=[], steps=3, max_skipped=0, batch_size=3))


def test_the_model_is_saved_in_the_type_asked_for(make):
    model = run(make("run", steps=1, save_dtype="float16"))
    assert {tensor.dtype for tensor in weights(model).values()} == {torch.float16}


@pytest.mark.parametrize("option", [{"logger": False}, {"enable_checkpointing": False}])
def test_loggers_and_checkpoints_can_be_left_out(make, option):
    folder = run(make("run", {"trainer": option}, steps=1)).parent
    assert (folder / "model").is_dir() and (folder / "logs").exists() == option.get("logger", True)
    assert not (folder / "checkpoints").exists() or option.get("enable_checkpointing", True)


@pytest.mark.parametrize(
    "name, line",
    [
        ("fsdp", "trainer.strategy is 'fsdp', which cannot clip gradients by their norm; use fsdp2"),
        ("deepspeed_stage_2", "needs the package deepspeed: pip install deepspeed; or use fsdp2"),
        ("dpd", "trainer: .*strategy='dpd'"),
        ({"name": "ddp"}, "it must be a name, like ddp or fsdp2"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused_by_name(make, name, line):
    with pytest.raises(ConfigError, match=line):
        run(make("run", {"trainer": {"strategy": name}}))


@pytest.mark.parametrize(
    "name, line",
    [
        ("deepspeed_stage_3", "gathers for whole layers alone; did you mean 'deepspeed_stage_2'"),
        ("deepspeed_stage_2", "set trainer.enable_checkpointing=false"),
    ],
)
def test_what_deepspeed_cannot_do_here_is_refused(make, monkeypatch, name, line):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if it were installed
    with pytest.raises(ConfigError, match=line):
        run(make("run", {"trainer": {"strategy": name}}))


@pytest.mark.parametrize(
    "names, left",
    [
        ("csv", {"metrics.csv", "hparams.yaml"}),
        ("tensorboard", {"events", "hparams.yaml"}),
        (["csv", "tensorboard"], {"metrics.csv", "events", "hparams.yaml"}),
        ("none", set()),
        (None, set()),
        (False, set()),
    ],
)
def test_loggers_by_name(make, names, left):
    folder = run(make("run", {"trainer": {"logger": names}}, steps=1)).parent
    found = {path.name.split(".out")[0] for path in folder.glob("logs/version_0/*")}
    assert {name.partition(".")[0] if name.startswith("events") else name for name in found} == left


class StandIn(CSVLogger):
    """In place of W&B's, whose package is not needed for the test."""

    asked: dict = {}

    def __init__(self, **options):
        StandIn.asked = options
        super().__init__(options["save_dir"], name="wandb", version=options["id"])


@pytest.fixture
def wandb(monkeypatch):
    package = ModuleType("wandb")
    package.init = lambda project=None, entity=None, dir=None, id=None, name=None, resume=None: None
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr("xcomp.trainer.WandbLogger", StandIn)


def test_wandb_is_handed_to_lightning(make, wandb):
    """With one id for a run folder, however often it is resumed."""
    folder = run(make("run", {"trainer": {"logger": ["wandb", "none"]}}, steps=1)).parent
    run_id = StandIn.asked["id"]
    assert StandIn.asked == {
        "name": "run", "save_dir": folder, "project": "xcomp", "id": run_id, "resume": "allow",
    }  # fmt: skip
    assert list(folder.glob("wandb/*/metrics.csv")) and json.loads((folder / "run.json").read_text())["wandb"] == run_id
    run(make("run", {"trainer": {"logger": [{"name": "wandb", "project": "mine", "entity": "us"}]}}, steps=2))
    assert [StandIn.asked[key] for key in ("project", "entity", "id", "name")] == ["mine", "us", run_id, "run"]
    run(make("other", {"trainer": {"logger": "wandb"}}, steps=1))
    assert StandIn.asked["id"] != run_id


@pytest.mark.parametrize(
    "logger, line",
    [
        ([{"name": "wandb", "project": "a"}, {"name": "wandb", "project": "b"}], "trainer.logger is {.*'b'}; loggers"),
        ({"name": "wandb", "dir": "/x"}, "wandb.init has no 'dir' to set"),
        ({"name": "wandb", "entitty": "us"}, "wandb.init has no 'entitty' to set; did you mean 'entity'"),
        ({"name": "csv", "flush": 3}, "wandb alone has options"),
    ],
)
def test_options_of_loggers_that_cannot_be_are_refused(make, wandb, logger, line):
    with pytest.raises(ConfigError, match=line):
        run(make("run", {"trainer": {"logger": logger}}, steps=1))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="it is there")
def test_a_logger_whose_package_is_not_there_is_one_line(make, tmp_path, capsys):
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(make("run")))
    assert main(["tune", str(tmp_path / "tune.yaml"), "trainer.logger=wandb"]) == 2
    line = "trainer.logger 'wandb' needs the package wandb (No module named 'wandb'): pip install wandb\n"
    assert capsys.readouterr().err == f"xcomp: error: {line}"
    assert not (tmp_path / "runs").exists()


def test_the_bar_counts_the_steps_of_the_run(make, capsys, stop_before):
    shown = {"trainer": {"enable_progress_bar": True}, "limit": 1}
    restore = stop_before(5)
    with pytest.raises(RuntimeError, match="power cut"):
        run(make("run", shown, validation=True))
    out = capsys.readouterr().out
    assert "step " in out and "5/6" in out and "Epoch" not in out and "loss " in out
    restore()
    run(make("run", shown, validation=True))  # from step 4
    assert "6/6" in capsys.readouterr().out


def test_missing_data_are_told_before_a_model_is_loaded(make, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(VideoQA, "from_config", lambda *_: pytest.fail("a model is loaded"))
    turns = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "records.json").write_text(json.dumps([{"video": "gone.mp4", "conversations": turns}]))
    source = {"records": str(tmp_path / "records.json"), "root": "/videos"}
    one = "none of its first 1 media is there: '/videos/gone.mp4' does not exist"
    for data, first, last in (
        ([source], None, f"tune.data[0]: {one}; 'root' and 'roots' say where data lie, "),
        (
            [source, {"records": "gone.json"}],
            f"tune.data[0]: {one}",
            "2 data sets of tune.data are missing, as listed; ",
        ),
    ):
        (tmp_path / "tune.yaml").write_text(yaml.safe_dump(make("run", data=data)))
        assert main(["tune", str(tmp_path / "tune.yaml")]) == 2
        *lines, error = capsys.readouterr().err.splitlines()
        assert error.startswith(f"xcomp: error: {last}") and not (tmp_path / "runs").exists()
        assert lines == ([f"xcomp: {first}", "xcomp: tune.data[1]: 'gone.json' does not exist"] if first else [])


@pytest.fixture
def damaged(tmp_path, needle_videos):
    """A file of 16 records, of whose videos one is gone and one is no video, and of which one is no record."""
    records = xcomp.load_benchmark("needle", split="train", **needle_videos).training_records(("open",)) * 2
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    records[3], records[9] = (
        {**records[i], "video": str(tmp_path / v)} for i, v in ((3, "broken.mp4"), (9, "gone.mp4"))
    )
    (tmp_path / "records.jsonl").write_text("\n".join([json.dumps(r) for r in records[:15]] + ["{"]))
    return {"records": str(tmp_path / "records.jsonl")}


@pytest.mark.parametrize("stop, workers", [(3, 0), (9, 0), (9, 1)])
def test_records_that_are_no_good_are_left_out_of_a_run_that_resumes_too(
    make, stop_before, damaged, capsys, tmp_path, stop, workers
):
    options = {"data": [damaged], "max_skipped": 0.2, "steps": 12, "frames": [4], "num_workers": workers}
    whole = run(make("whole", **options))
    err = capsys.readouterr().err
    assert "tune.data: 1 records are refused and left out (see skipped.jsonl), the first: records file" in err
    lines = [json.loads(line) for line in (whole.parent / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["record"].rpartition(", ")[2]: line["reason"] for line in lines}
    assert sorted(reasons) == ["line 10", "line 16", "line 4"] and len(lines) == 3
    assert "line 16 is not JSON" in reasons["line 16"] and "gone.mp4: no such file" in reasons["line 10"]
    assert err.endswith(f"xcomp: 3 train records left out; which and why: {whole.parent}/skipped.jsonl\n")
    restore = stop_before(stop)
    with pytest.raises(RuntimeError, match="power cut"):
        run(make("stopped", **options))
    restore()
    resumed = run(make("stopped", **options))
    assert same(weights(resumed), weights(whole)) and logged(resumed.parent) == logged(whole.parent)
    assert len((resumed.parent / "skipped.jsonl").read_text().splitlines()) == 3


def test_too_many_records_that_are_no_good_end_a_run_which_may_go_on(make, damaged, tmp_path, capsys):
    options = {"data": [damaged], "steps": 12, "frames": [4]}
    whole = run(make("whole", max_skipped=0.5, **options))
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(make("run", max_skipped=0.1, **options)))
    assert main(["tune", str(tmp_path / "tune.yaml"), "tune.max_skipped=0.01"]) == 2
    assert "line 16 is not JSON" in capsys.readouterr().err and not (tmp_path / "runs" / "run").exists()
    assert main(["tune", str(tmp_path / "tune.yaml")]) == 2
    line = "2 of the 16 records of tune.data are left out, more than tune.max_skipped=0.1 allows; the last: "
    assert line in capsys.readouterr().err
    assert main(["tune", str(tmp_path / "tune.yaml")]) == 2 and line in capsys.readouterr().err  # once more
    assert main(["tune", str(tmp_path / "tune.yaml"), "tune.max_skipped=0.5"]) == 0
    assert same(weights(tmp_path / "runs" / "run" / "model"), weights(whole))

"""What a run is resumed from: whole files, none of which runs code, and what may change in between."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
import torch
import yaml
from tuning_runs import checkpoints, logged, same, tuning_config, weights

import xcomp
from xcomp.checkpoint import mend_folder, whole_folder
from xcomp.cli import main
from xcomp.config import ConfigError, parse_config
from xcomp.model import VideoQA
from xcomp.resuming import newest_checkpoint
from xcomp.stopping import Stopped
from xcomp.tuning import tune


@pytest.fixture
def make(tiny_run, needle_videos):
    return partial(tuning_config, tiny_run, needle_videos)


@pytest.fixture
def whole(make):
    """Weights and losses of a run of 6 steps that nothing happened to."""
    model = run(make("whole"))
    return weights(model), logged(model.parent)


@pytest.fixture
def stopped(make, stop_at):
    """The folder of a run stopped after 4 of its 6 steps, with checkpoints of steps 2 and 4."""
    stop_at(4)
    with pytest.raises(Stopped):
        run(make("run"))
    return Path(make("run")["output"]) / "run"


@pytest.fixture
def stop_at(monkeypatch):
    """Has SIGTERM come in the ``n``-th batch (from 1) of the next run."""

    def stop_at(n, then=lambda: os.kill(os.getpid(), signal.SIGTERM)):
        train, batches = VideoQA.training_step, []

        def training_step(self, batch, batch_idx):
            batches.append(batch_idx)
            if len(batches) == n:
                then()
            return train(self, batch, batch_idx)

        monkeypatch.setattr(VideoQA, "training_step", training_step)

    return stop_at


def run(content):
    return tune(parse_config(content, "x"))


def resume(content, tmp_path):
    """Exit status of ``xcomp tune``."""
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(content))
    return main(["tune", str(path)])


# --- files that are no good -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 1000, -1000, -1, "zeros"])
def test_a_checkpoint_that_is_cut_off_is_passed_over(make, stopped, whole, tmp_path, capfd, size):
    newest = stopped / "checkpoints" / "step=4.ckpt"
    content = newest.read_bytes()
    newest.write_bytes(bytes(len(content)) if size == "zeros" else content[:size])
    capfd.readouterr()
    assert resume(make("run"), tmp_path) == 0
    line = "xcomp: checkpoint step=4.ckpt is damaged; resuming after step 2, from step=2.ckpt\n"
    assert capfd.readouterr().err == line
    assert same(weights(stopped / "model"), whole[0]) and logged(stopped) == whole[1]
    assert checkpoints(stopped) == ["step=4.ckpt", "step=6.ckpt"]


def test_with_no_whole_checkpoint_it_says_so_and_touches_nothing(make, stopped, tmp_path, capfd):
    for path in (stopped / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    before = {p: p.stat().st_mtime_ns for p in stopped.rglob("*") if p.name not in (".lock", stopped.name)}
    capfd.readouterr()
    assert resume(make("run"), tmp_path) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and "is whole (step=4.ckpt, step=2.ckpt); delete that folder to start over" in line
    assert {p: p.stat().st_mtime_ns for p in stopped.rglob("*") if p.name not in (".lock", stopped.name)} == before


class Prepared:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "pickle", "within a real one"])
def test_a_prepared_checkpoint_runs_nothing(make, stopped, tmp_path, capfd, form):
    for path in (stopped / "checkpoints").iterdir():
        if form == "pickle":
            path.write_bytes(pickle.dumps(Prepared(tmp_path / "done")))
        else:
            content = torch.load(path, weights_only=True) if form == "within a real one" else {}
            torch.save({**content, "callbacks": Prepared(tmp_path / "done")}, path)
    capfd.readouterr()
    assert resume(make("run"), tmp_path) == 2
    line = capfd.readouterr().err
    assert line.startswith("xcomp: error: ") and line.count("\n") == 1 and not (tmp_path / "done").exists(), line
    said = "is whole (step=4.ckpt, step=2.ckpt)" if form == "pickle" else "holds more than tensors, numbers and text"
    assert said in line
    assert pickle.loads(pickle.dumps(Prepared(tmp_path / "done"))) is None and (tmp_path / "done").exists()  # it would


def test_a_folder_is_not_resumed_from(stopped):
    (stopped / "checkpoints" / "step=8.ckpt").mkdir()
    with pytest.raises(ConfigError, match="step=8.ckpt' is a folder, whose reading may run code"):
        newest_checkpoint(stopped)


# --- what a kill or a full disk leaves --------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_resumed(make, stop_at, whole, tmp_path, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    stop_at(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1])))  # no file may be larger
    capfd.readouterr()
    try:
        assert resume(make("run"), tmp_path) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder, line = tmp_path / "runs" / "run", capfd.readouterr().err
    assert line.count("\n") == 1 and f"step=4.ckpt' cannot be written: {os.strerror(errno.EFBIG)}; the one" in line
    assert checkpoints(folder) == ["step=2.ckpt"]
    assert resume(make("run"), tmp_path) == 0 and same(weights(folder / "model"), whole[0])


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_fails_leaves_no_part_of_a_file(make, stop_at, tmp_path, capfd, monkeypatch, call):
    save = torch.save

    def fail(*arguments):
        if isinstance(arguments[-1], BytesIO):  # that is no disk
            return save(*arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stop_at(4, lambda: monkeypatch.setattr(*{"fsync": (os, "fsync", fail), "write": (torch, "save", fail)}[call]))
    assert resume(make("run"), tmp_path) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and "cannot be written: No space left on device; the one before it is untouch" in line
    assert checkpoints(tmp_path / "runs" / "run") == ["step=2.ckpt"]


def test_a_full_disk_for_the_model_is_one_line_and_the_model_is_written_later(make, whole, stop_at, tmp_path, capfd):
    stop_at(6)
    assert resume(make("run"), tmp_path) == 143
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    capfd.readouterr()
    try:
        assert resume(make("run"), tmp_path) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder, line = tmp_path / "runs" / "run", capfd.readouterr().err
    assert line.count("\n") == 1 and "cannot be written" in line, line
    assert not list(folder.glob("*model*")) and not list(folder.glob(".model*"))
    assert resume(make("run"), tmp_path) == 0 and same(weights(folder / "model"), whole[0])


def test_what_kills_left_is_cleared(make, stopped, whole, tmp_path):
    (stopped / "checkpoints" / "step=6.ckpt.tmp").write_bytes(b"half")
    (stopped / "checkpoints" / "mine.txt").write_text("stays")
    shutil.copy(stopped / "checkpoints" / "step=4.ckpt", stopped / "checkpoints" / "step=1.ckpt")
    shutil.copy(stopped / "checkpoints" / "step=4.ckpt", stopped / "checkpoints" / "last.ckpt")
    (stopped / "run.json.tmp").write_text("{")
    (stopped / ".model.0123abcd.new").mkdir()
    (stopped / ".model.0123abcd.new" / "model.safetensors").write_bytes(b"half")
    assert resume(make("run"), tmp_path) == 0 and same(weights(stopped / "model"), whole[0])
    assert checkpoints(stopped) == ["mine.txt", "step=4.ckpt", "step=6.ckpt"]
    assert sorted(p.name for p in stopped.iterdir()) == [".lock", "checkpoints", "logs", "model", "run.json"]


def test_a_folder_killed_while_it_was_replaced_is_mended(tmp_path):
    def write(text):
        with whole_folder(tmp_path / "model") as fresh:
            (fresh / "model.safetensors").write_text(text)

    write("one")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    (tmp_path / "model").rename(tmp_path / ".model.0123abcd.old")  # killed between the two renames
    (tmp_path / ".model.0123abcd.new").mkdir()
    mend_folder(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_text() == "one"
    (tmp_path / "model").rename(tmp_path / ".model.0123abcd.old")  # killed before the other files were taken over
    write("two")
    mend_folder(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_text() == "two"
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_checkpoints_pass_through_no_other_folder(make, tmp_path, monkeypatch):
    """Lightning writes to the system's temporary folder first, which is small or in memory on many machines."""
    monkeypatch.setattr(tempfile, "mkstemp", lambda *_, **__: pytest.fail("a temporary file"))
    run(make("run", steps=2))
    assert checkpoints(tmp_path / "runs" / "run") == ["step=2.ckpt"]


# --- what may change --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, top",
    [
        ({"num_workers": 1}, {}),
        ({"save_every": 1}, {}),
        ({"validation": True}, {"limit": 2, "selector": "qc_comp", "generation": {"max_new_tokens": 5}}),
        ({"gradient_checkpointing": True}, {"benchmark": None, "batch_size": 3}),
        ({}, {"trainer": {"logger": "csv", "enable_progress_bar": True, "enable_model_summary": True}}),
    ],
)
def test_what_changes_no_step_may_change(make, stopped, whole, options, top):
    model = run(make("run", top, **options))
    assert same(weights(model), whole[0])
    noted = json.loads((stopped / "run.json").read_text())["config"]
    assert noted == parse_config(make("run", top, **options), "x").to_dict()


@pytest.mark.parametrize(
    "options, top, key",
    [
        ({"learning_rate": 2e-3}, {}, "tune.learning_rate was 0.001, now 0.002"),
        ({"batch_size": 1}, {}, "tune.batch_size was 2, now 1"),
        ({"frames": [4]}, {}, r"tune.frames\[1\] was 8, now None"),
        ({}, {"seed": 1}, "seed was 0, now 1"),
        ({}, {"compressor": "none"}, "compressor was 'lp_comp', now 'none'"),
        ({}, {"trainer": {"precision": "bf16-true"}}, "trainer.precision was None, now 'bf16-true'"),
        ({}, {"trainer": {"accumulate_grad_batches": 2}}, "a step took 1 batches .*, now it would take 2 .1 dev"),
    ],
)
def test_what_changes_a_step_is_refused_by_name(make, stopped, options, top, key):
    with pytest.raises(ConfigError, match=key):
        run(make("run", top, **options))


def test_more_steps_follow_the_longer_schedule(make, stopped, tmp_path, capfd):
    longer = run(make("longer", steps=10)).parent
    capfd.readouterr()
    assert resume(make("run", steps=10), tmp_path) == 0
    line = "xcomp: tune.steps was 6, now 10: after step 4 the learning rate follows the schedule over 10 steps\n"
    assert capfd.readouterr().err == line
    rates, of_longer = (logged(folder, "lr-AdamW") for folder in (stopped, longer))
    assert [rates[step] for step in range(4, 10)] == [of_longer[step] for step in range(4, 10)]
    assert rates[3] != of_longer[3] and sorted(logged(stopped)) == list(range(10))


def test_a_finished_run_may_be_given_more_steps(make, stopped, whole, tmp_path, capfd):
    assert resume(make("run"), tmp_path) == 0 and same(weights(stopped / "model"), whole[0])
    (stopped / "model" / "notes.txt").write_text("mine")
    assert resume(make("run", steps=8), tmp_path) == 0
    assert checkpoints(stopped) == ["step=6.ckpt", "step=8.ckpt"] and sorted(logged(stopped)) == list(range(8))
    assert not same(weights(stopped / "model"), whole[0]) and (stopped / "model" / "notes.txt").exists()
    before = (stopped / "model" / "model.safetensors").stat().st_mtime_ns
    assert resume(make("run", steps=8), tmp_path) == 0
    assert (stopped / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_more_steps_that_were_stopped_do_not_pass_for_tuned(make, stop_at, tmp_path):
    """The model of the first 6 steps is there; it is not the one of 10 that is asked for."""
    first = weights(run(make("run")))
    stop_at(2)
    assert resume(make("run", steps=10), tmp_path) == 143
    assert same(weights(tmp_path / "runs" / "run" / "model"), first)
    assert resume(make("run", steps=10), tmp_path) == 0
    assert not same(weights(tmp_path / "runs" / "run" / "model"), first)
    assert sorted(logged(tmp_path / "runs" / "run")) == list(range(10))


def test_fewer_steps_end_the_run_sooner_but_not_before_now(make, stopped, tmp_path, capfd):
    assert resume(make("run", steps=3), tmp_path) == 2
    assert "tune.steps is 3, and run folder" in (line := capfd.readouterr().err) and line.count("\n") == 1
    assert "with tune.steps=4 the model is written as it is" in line
    state = torch.load(stopped / "checkpoints" / "step=4.ckpt", weights_only=True)["state_dict"]
    assert resume(make("run", steps=4), tmp_path) == 0
    loaded = dict(xcomp.load_backbone("videochat_flash", checkpoint=str(stopped / "model")).named_parameters())
    assert same(loaded, {name: state[f"backbone.{name}"] for name in loaded})
    assert sorted(logged(stopped)) == [0, 1, 2, 3]


def test_a_model_in_another_type_is_written_from_the_last_checkpoint(make, stop_at):
    first = run(make("run"))
    stop_at(1, lambda: pytest.fail("a step was tuned"))
    assert {t.dtype for t in weights(run(make("run", save_dtype="float16"))).values()} == {torch.float16}
    assert run(make("run", save_dtype="float16")) == first


def test_without_checkpoints_a_tuned_run_takes_no_more_steps(make):
    off = {"trainer": {"enable_checkpointing": False}}
    run(make("run", off))
    with pytest.raises(ConfigError, match="holds a model tuned for 6 steps and no checkpoint to go on from; choose"):
        run(make("run", off, steps=8))


# --- several processes ------------------------------------------------------------------------------------------------


def close(first, second):
    """Losses of the same steps, but for the order of sums."""
    assert first.keys() == second.keys()
    return all(abs(float(first[step]) - float(second[step])) < 1e-5 for step in first)


@pytest.fixture
def alone(make):
    """Options of a run whose steps take two batches of one record, and what one process makes of it."""
    options = {"batch_size": 1, "validation": True}
    model = run(make("alone", {"trainer": {"accumulate_grad_batches": 2}}, **options))
    losses = [logged(model.parent, f"{part}/loss") for part in ("train", "validation")]
    assert len(losses[0]) == 6 and len(losses[1]) == 3
    return options, weights(model), losses


def test_two_ranks_that_start_at_once_make_the_steps_of_one_process(make, alone, tmp_path):
    options, tuned, losses = alone
    two = make("two", {"trainer": {"devices": 2, "strategy": "ddp"}}, **options)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    launched |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}  # as torchrun does
    command = [sys.executable, "-m", "xcomp.cli", "tune", str(tmp_path / "two.yaml")]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    folder = tmp_path / "runs" / "two"
    assert [out.count("tuned model") for out, _ in said] == [1, 0] and len(list(folder.glob("logs/*"))) == 1
    assert all(close(logged(folder, f"{part}/loss"), alone) for part, alone in zip(("train", "validation"), losses))
    found = weights(folder / "model")
    assert max((found[name] - tuned[name]).abs().max() for name in tuned) < 1e-5


def test_a_stopped_run_goes_on_in_two_processes_that_share_the_model(make, alone, stop_at, tmp_path):
    """FSDP2, from the checkpoint of one process; the steps stay those of one process."""
    options, tuned, losses = alone
    stop_at(7)  # the first batch of the fourth step
    with pytest.raises(Stopped):
        run(make("two", {"trainer": {"accumulate_grad_batches": 2}}, **options))
    two = make("two", {"trainer": {"devices": 2, "strategy": "fsdp2"}}, **options, gradient_checkpointing=True)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two))
    command = [sys.executable, "-m", "xcomp.cli", "tune", str(tmp_path / "two.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "two"
    assert checkpoints(folder) == ["step=4.ckpt", "step=6.ckpt"] and list(folder.glob("checkpoints/best-step=6-loss=*"))
    assert all(close(logged(folder, f"{part}/loss"), alone) for part, alone in zip(("train", "validation"), losses))
    found = weights(folder / "model")
    assert max((found[name] - tuned[name]).abs().max() for name in tuned) < 1e-5
    state = torch.load(folder / "checkpoints" / "step=6.ckpt", weights_only=True)["state_dict"]
    loaded = xcomp.load_backbone("videochat_flash", checkpoint=str(folder / "model"))
    assert same(dict(loaded.named_parameters()), {n: state[f"backbone.{n}"] for n, _ in loaded.named_parameters()})


def test_a_model_in_pieces_takes_no_rule_that_looks_at_the_data(make):
    rule = {"name": "fastv", "layer": 1}
    with pytest.raises(ConfigError, match="fsdp2, but compressor 'fastv' looks at the data inside"):
        run(make("run", {"compressor": rule, "trainer": {"strategy": "fsdp2"}}))


# --- one process at a time --------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from xcomp.run import hold_run
with hold_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_told_who_holds_the_folder(make, stopped, whole, tmp_path, capfd):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(stopped)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = {p: p.stat().st_mtime_ns for p in stopped.rglob("*")}
        capfd.readouterr()
        assert resume(make("run"), tmp_path) == 2
        line = capfd.readouterr().err
        who = f"is in use by process {other.pid} on {socket.gethostname()} since 20"
        assert line.count("\n") == 1 and who in line, line
        assert {p: p.stat().st_mtime_ns for p in stopped.rglob("*")} == before
        other.kill()
        other.wait()
    assert (stopped / ".holder.json").exists()  # of the killed process, which holds nothing any more
    assert resume(make("run"), tmp_path) == 0 and same(weights(stopped / "model"), whole[0])
    assert not (stopped / ".holder.json").exists()

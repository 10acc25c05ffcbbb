"""Ending by a signal: status, one line, a checkpoint where the run stands, and the same bits once it goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from tuning_runs import checkpoints, logged, same, tuning_config, weights

from xcomp.cli import main
from xcomp.config import parse_config
from xcomp.model import VideoQA
from xcomp.stopping import Stopped, signals
from xcomp.tuning import tune

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture
def make(tmp_path, tiny_run, needle_videos):
    """A tuning configuration, 4 batches an epoch, written to a YAML file: (its path, the run's folder)."""

    def make(name, trainer=None, **options):
        options = {"save_every": 100, **options}
        content = tuning_config(tiny_run, needle_videos, name, {"trainer": trainer or {}}, **options)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path, tmp_path / "runs" / name

    return make


@pytest.fixture
def signal_in(monkeypatch):
    """Sends this process a signal while the ``n``-th batch (from 1) is computed, once."""

    def signal_in(n, number, times=1):
        train, batches = VideoQA.training_step, []

        def training_step(self, batch, batch_idx):
            batches.append(batch_idx)
            if len(batches) == n:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return train(self, batch, batch_idx)

        monkeypatch.setattr(VideoQA, "training_step", training_step)

    return signal_in


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize(
    "batch, step, options, trainer",
    [
        (1, 1, {}, {}),
        (3, 3, {}, {}),
        (4, 4, {}, {}),  # the last of an epoch
        (4, 4, {"validation": True}, {}),
        (3, 2, {"steps": 3}, {"accumulate_grad_batches": 2}),  # in the middle of the second step
        (6, 6, {}, {}),  # the last: it is tuned, the model is not yet written
        (3, 3, {"num_workers": 1}, {}),
    ],
)
def test_a_signal_stops_tuning_with_a_checkpoint_after_the_step(
    make, signal_in, capfd, number, batch, step, options, trainer
):
    whole, stopped = make("whole", trainer, **options), make("stopped", trainer, **options)
    assert main(["tune", str(whole[0])]) == 0
    signal_in(batch, number)
    capfd.readouterr()
    assert main(["tune", str(stopped[0])]) == STATUS[number]
    by = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    assert capfd.readouterr().err.splitlines() == [
        f"xcomp: stopped by {by}; the same command resumes after step {step}"
    ]
    assert checkpoints(stopped[1]) == [f"step={step}.ckpt"] and not (stopped[1] / "model").exists()
    assert main(["tune", str(stopped[0])]) == 0
    assert same(weights(stopped[1] / "model"), weights(whole[1] / "model"))
    for column in ("train/loss", "validation/loss"):
        assert logged(stopped[1], column) == logged(whole[1], column)
    assert len(logged(stopped[1], "train/loss")) >= 3
    assert bool(logged(stopped[1], "validation/loss")) == bool(options.get("validation"))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_signal_in_a_validation_has_a_checkpoint_written_at_once(make, monkeypatch, batch):
    """The time that a batch system gives may be over before the validation is."""
    whole, stopped = (make(name, validation=True, validate_every=4) for name in ("whole", "stopped"))
    assert main(["tune", str(whole[0])]) == 0
    validate, there = VideoQA.validation_step, []

    def validation_step(self, *args):
        if not self.trainer.sanity_checking:
            there.append(checkpoints(stopped[1]))
            if len(there) == batch:
                os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, *args)

    monkeypatch.setattr(VideoQA, "validation_step", validation_step)
    assert main(["tune", str(stopped[0])]) == 143
    assert there == [[]] * batch + [["step=4.ckpt"]] * (4 - batch) and checkpoints(stopped[1]) == ["step=4.ckpt"]
    assert main(["tune", str(stopped[0])]) == 0
    assert same(weights(stopped[1] / "model"), weights(whole[1] / "model"))
    for column in ("train/loss", "validation/loss"):
        assert logged(stopped[1], column) == logged(whole[1], column) != {}


def test_sigterm_twice_is_sigterm_once(make, signal_in):
    """To a process and to its group: ``timeout`` and some batch systems do that."""
    path, folder = make("twice")
    signal_in(2, signal.SIGTERM, times=2)
    assert main(["tune", str(path)]) == 143 and checkpoints(folder) == ["step=2.ckpt"]


def test_a_second_ctrl_c_stops_at_once(make, monkeypatch):
    path, folder = make("impatient", save_every=1)
    train, batches = VideoQA.training_step, []

    def training_step(self, batch, batch_idx):
        batches.append(batch_idx)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGINT)
        return train(self, batch, batch_idx)

    monkeypatch.setattr(VideoQA, "training_step", training_step)
    assert main(["tune", str(path)]) == 130 and checkpoints(folder) == ["step=1.ckpt"]


def test_without_checkpoints_a_signal_says_that_it_starts_over(make, signal_in, capfd):
    path, folder = make("none", {"enable_checkpointing": False})
    signal_in(2, signal.SIGTERM)
    assert main(["tune", str(path)]) == 143
    line = "xcomp: stopped by SIGTERM; after step 2, without checkpoints: the same command starts over\n"
    assert capfd.readouterr().err == line and not (folder / "checkpoints").exists()


def test_a_signal_while_the_model_loads_is_told_too(make, monkeypatch, capfd):
    monkeypatch.setattr(VideoQA, "from_config", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    path, folder = make("early")
    assert main(["tune", str(path)]) == 143 and not folder.exists()
    assert capfd.readouterr().err == "xcomp: stopped by SIGTERM; the same command resumes\n"


def test_handlers_are_put_back(make, signal_in):
    before = [signal.getsignal(number) for number in STATUS]
    signal_in(1, signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        tune(parse_config(yaml.safe_load(make("library")[0].read_text()), "x"))  # not through the command line
    assert stopped.value.code == 143 and [signal.getsignal(number) for number in STATUS] == before
    with pytest.raises(Stopped), signals(signal.SIGTERM, handler=lambda number, frame: exec("raise Stopped(number)")):
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in STATUS] == before


@pytest.mark.parametrize(
    "number, send, trainer, options",
    [
        (signal.SIGTERM, os.killpg, {"accumulate_grad_batches": 2}, {"num_workers": 2}),
        (signal.SIGINT, os.killpg, {"accumulate_grad_batches": 2}, {"num_workers": 2}),
        (signal.SIGTERM, os.kill, {"strategy": "ddp", "devices": 2}, {}),
    ],
    ids=["SIGTERM to workers too", "Ctrl-C to workers too", "SIGTERM to the first rank alone"],
)
def test_all_processes_of_a_run_stop_together(make, number, send, trainer, options):
    """A terminal and a batch system signal every process, others the first; a step needs its workers and all ranks."""
    path, folder = make("together", trainer, steps=2000, **options)
    command = [sys.executable, "-m", "xcomp.cli", "tune", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(lambda: len(logged(folder, "train/loss")) > 2, process)
        send(process.pid, number)
        error = process.communicate(timeout=120)[1]
    assert process.returncode == STATUS[number], error
    lines = [line for line in error.splitlines() if not line.startswith("Initializing distributed")]
    assert len(lines) == 1 and "the same command resumes after step" in lines[0], error
    assert len(checkpoints(folder)) in (1, 2)  # the last, and one of the 100th steps before it


def wait_for(there, process, seconds=120):
    until = time.monotonic() + seconds
    while not there():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(process.communicate()[1])
        time.sleep(0.02)


STOPPING = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
from xcomp.selector import FrameSelector
class Stopping(FrameSelector):
    @dataclass
    class Config: pass
    uses_video, asked = False, 0
    def select(self, scores, budget):
        self.asked += 1
        if self.asked == 4 and not Path(__file__).with_name("asked").exists():
            Path(__file__).with_name("asked").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return list(range(budget))
"""


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_sigterm_stops_a_comparison_between_two_lines(tmp_path, tiny_run, capfd, command):
    (tmp_path / "stopping.py").write_text(STOPPING)
    run = {**tiny_run, "plugins": [str(tmp_path)], "selector": "stopping", "limit": 6, "arms": [{"name": "one"}]}
    path, records = tmp_path / "run.yaml", tmp_path / "runs" / "tiny" / "records.jsonl"
    path.write_text(yaml.safe_dump(run))
    assert main([command, str(path)]) == 143
    assert capfd.readouterr().err == "xcomp: stopped by SIGTERM; the same command resumes\n"
    assert len(records.read_text().splitlines()) == 4  # those of the first video, and then the signal
    assert main([command, str(path)]) == 0 and len(records.read_text().splitlines()) == 6

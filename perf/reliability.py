"""Runs that are killed (kill -9) at random moments, and whether they go on to the same bits.

    python perf/reliability.py tune                    # 40 kills, seeded; minutes on one core
    python perf/reliability.py tune --kills 200 --seed 1

A command is started, killed, started again, killed again, and then left to finish; its result is compared with that of
an uninterrupted run. Kills come after some time, at some operation on a file, or in the middle of a checkpoint. Every
start is a process of its own, forked from one that has the libraries loaded. Needs the `test` extra: the model is the
tests' tiny one. Exit status 1 if a run did not resume, or not to the same bits.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import about, write

sys.path.append(str(Path(__file__).parent.parent / "tests"))

# --- killing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """When a process is killed: ``part`` (0..1) of an uninterrupted run's seconds or file operations, or of a file."""

    kind: str  # one of KINDS
    part: float

    def arm(self, folder: Path, extent: Extent) -> None:
        """In the process that is to be killed, before it begins."""
        KINDS[self.kind](folder, self.part, extent)


@dataclass(frozen=True)
class Extent:
    """What an uninterrupted run takes."""

    seconds: float
    operations: int  # on files of the run's folder
    saves: int  # checkpoints


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_time(folder: Path, part: float, extent: Extent) -> None:
    timer = threading.Timer(part * extent.seconds, _die)
    timer.daemon = True
    timer.start()


def _at_operation(folder: Path, part: float, extent: Extent) -> None:
    """Just before a file is opened, renamed or deleted, or a folder made or deleted."""
    count = 0

    def operation() -> None:
        nonlocal count
        count += 1
        if count > part * extent.operations:
            _die()

    _on_operation(folder, operation)


def _in_checkpoint(folder: Path, part: float, extent: Extent) -> None:
    """With so much of one of the checkpoints written."""
    save, at, count = torch.save, part * extent.saves, 0

    def cut_off(content: Any, file: Any) -> None:
        nonlocal count
        count += 1
        if count <= at:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: int((at % 1) * whole.tell())])
        file.flush()
        _die()

    torch.save = cut_off


KINDS: dict[str, Callable[[Path, float, Extent], None]] = {
    "time": _at_time,
    "file operation": _at_operation,
    "part of a checkpoint": _in_checkpoint,
}


def _on_operation(folder: Path, call: Callable[[], Any]) -> None:
    """Call before every operation of this process on files below a folder."""
    events, below = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"), str(folder)
    sys.addaudithook(lambda event, args: event in events and below in str(args[0]) and call())


def start(arguments: list[str], prepare: Callable[[], None], log: Path) -> int:
    """Run ``xcomp`` in a process of its own; its exit status, negative: the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        status = 70
        try:
            prepare()
            from xcomp.cli import main

            status = main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def measure(arguments: list[str], folder: Path, log: Path) -> Extent:
    """Let a run come to its end, and count."""
    counts = log.with_suffix(".counts")
    counts.touch()

    def prepare() -> None:
        def count(letter: str) -> None:
            with counts.open("a") as file:  # not below the run's folder
                file.write(letter)

        save = torch.save
        torch.save = lambda content, file: (count("s"), save(content, file))[1]
        _on_operation(folder, lambda: count("o"))

    began = time.perf_counter()
    if (status := start(arguments, prepare, log)) != 0:
        raise SystemExit(f"the uninterrupted run ended with status {status}:\n{log.read_text()}")
    letters = counts.read_text()
    return Extent(time.perf_counter() - began, letters.count("o"), letters.count("s"))


def half_written(folder: Path) -> int:
    """Files and folders that were being written."""
    return sum(path.suffix in (".tmp", ".new", ".old") for path in folder.rglob("*"))


# --- tune -------------------------------------------------------------------------------------------------------------


def tune(kills: int, seed: int, place: Path) -> list[dict[str, Any]]:
    """Rows of at least so many kills: where each hit, and what became of its run."""
    from tuning_runs import checkpoints, logged, same, weights

    from xcomp.resuming import newest_checkpoint

    rng, kinds, runs, log = random.Random(seed), itertools.cycle(KINDS), place / "runs", place / "log.txt"
    config, rows, attempt = _tuning(place), [], 0
    extent = measure(["tune", str(config), "name=whole"], runs / "whole", log)
    print(f"uninterrupted: {extent.seconds:.1f} s, {extent.operations} file operations, {extent.saves} checkpoints")
    whole = weights(runs / "whole" / "model")
    while len(rows) < kills:
        attempt += 1
        name = f"killed-{attempt}"
        folder, of_run = runs / name, []
        for _ in range(rng.randint(1, 3)):
            kill = Kill(next(kinds), rng.random())
            command = ["tune", str(config), f"name={name}", f"tune.num_workers={rng.randint(0, 1)}"]
            if start(command, lambda: kill.arm(folder, extent), log) != -signal.SIGKILL:  # noqa: B023
                break  # it came to its end before that
            there = newest_checkpoint(folder)
            row = {"command": "tune", "seed": seed, "run": attempt, "kill": len(of_run) + 1, "kind": kill.kind}
            row |= {"part": round(kill.part, 3), "resumes_after_step": there.step if there else 0}
            of_run.append(row | {"half_written": half_written(folder)})
        status = start(["tune", str(config), f"name={name}"], lambda: None, log)
        resumed = status == 0 and half_written(folder) == 0 and len(checkpoints(folder)) <= 2
        equal = resumed and same(weights(folder / "model"), whole)
        outcome = {"resumed": yes(resumed), "weights_bit_equal": yes(equal)}
        outcome["log_equal"] = yes(resumed and logged(folder) == logged(runs / "whole"))
        rows += [row | outcome for row in of_run]
    return rows


def _tuning(place: Path) -> Path:
    """A tuning run of a model of two layers: 12 steps over 3 epochs, a checkpoint after every second one."""
    from conftest import write_checkpoint, write_tokenizer
    from tuning_runs import tuning_config

    import xcomp

    videos = {"num_videos": 2, "seconds": 4, "root": str(place / "videos")}
    xcomp.load_benchmark("needle", split="train", **videos).generate()
    torch.manual_seed(0)
    checkpoint = write_checkpoint(place / "model", write_tokenizer(place / "tokenizer"))
    run = {
        "output": str(place / "runs"),
        "backbone": {"name": "videochat_flash", "checkpoint": str(checkpoint)},
        "compressor": "lp_comp",
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    path = place / "tune.yaml"
    path.write_text(yaml.safe_dump(tuning_config(run, videos, "run", steps=12)))
    return path


# --- the table --------------------------------------------------------------------------------------------------------

COMMANDS = {"tune": tune}


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def show(rows: list[dict[str, Any]]) -> bool:
    """Print kills by kind; whether all of their runs resumed to the same bits."""
    print(f"{'kind':<22}{'kills':>6}{'resumed':>9}{'weights bit-equal':>19}{'log equal':>11}{'half-written files':>20}")
    for kind in [*dict.fromkeys(row["kind"] for row in rows), "all"]:
        of_kind = [row for row in rows if kind in (row["kind"], "all")]
        counts = [sum(row[name] == "yes" for row in of_kind) for name in ("resumed", "weights_bit_equal", "log_equal")]
        left = sum(row["half_written"] for row in of_kind)
        print(f"{kind:<22}{len(of_kind):>6}{counts[0]:>9}{counts[1]:>19}{counts[2]:>11}{left:>20}")
    return all(row["resumed"] == row["weights_bit_equal"] == "yes" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        rows = COMMANDS[options.command](options.kills, options.seed, Path(place))
    good = show(rows)
    print(f"{len(rows)} kills of {len({row['run'] for row in rows})} runs in {time.perf_counter() - began:.0f} s")
    if not options.dry:
        write(f"reliability-{options.command}", [about("cpu") | row for row in rows])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

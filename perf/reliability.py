"""Runs that are killed (kill -9) at random moments or whose disk fills up, and files with random damage.

    python perf/reliability.py tune                    # 40 kills, seeded; minutes on one core
    python perf/reliability.py tune --times 200 --seed 1
    python perf/reliability.py compare                 # kills of a comparison, and of its decoding processes
    python perf/reliability.py ranks                   # of one of two processes, or both
    python perf/reliability.py disk                    # no file may grow beyond some size, anywhere on the way
    python perf/reliability.py fuzz --times 2000       # damaged files, each by three readers

A command is started, killed, started again, killed again, and then left to finish; its result is compared with that of
an uninterrupted run. Kills come after some time, at some operation on a file, or in the middle of a checkpoint or a
record. Every start is a process of its own, forked from one that has the libraries loaded. Needs the `test` extra: the
model is the tests' tiny one. Exit status 1 if a run did not resume, or not to the same result.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
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
    saves: int  # checkpoints, or times that records were written


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


def _in_record(folder: Path, part: float, extent: Extent) -> None:
    """With so much of a video's records written."""
    from xcomp.compare import runner

    append, at, count = runner.append_records, part * extent.saves, 0

    def cut_off(path: Path, records: Sequence[dict[str, Any]]) -> None:
        nonlocal count
        count += 1
        if count <= at:
            return append(path, records)
        whole = "".join(json.dumps(line) + "\n" for line in records).encode()
        with path.open("ab") as file:
            file.write(whole[: int((at % 1) * len(whole))])
        _die()

    runner.append_records = cut_off


def _a_decoding_process(folder: Path, part: float, extent: Extent) -> None:
    """Not the run, which is to go on: one of the processes that decode for it."""
    from xcomp.workers import Workers

    begin = Workers.__init__

    def watched(self: Workers, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        threading.Thread(target=kill_one, args=(self,), daemon=True).start()

    def kill_one(workers: Workers) -> None:
        while not workers.process_ids:
            time.sleep(0.001)
        time.sleep(part * extent.seconds)
        for process in workers.process_ids:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                _hit(folder).touch()

    Workers.__init__ = watched


def _hit(folder: Path) -> Path:
    """The file that says that a decoding process was killed."""
    return folder.with_name(f"{folder.name}.hit")


KINDS: dict[str, Callable[[Path, float, Extent], None]] = {
    "time": _at_time,
    "file operation": _at_operation,
    "part of a checkpoint": _in_checkpoint,
    "part of a record": _in_record,
    "decoding process": _a_decoding_process,
}


def _on_operation(folder: Path, call: Callable[[], Any]) -> None:
    """Call before every operation of this process on files below a folder."""
    events, below = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"), str(folder)
    sys.addaudithook(lambda event, args: event in events and below in str(args[0]) and call())


def start(arguments: list[str], prepare: Callable[[], None], log: Path) -> int:
    """Run ``xcomp`` in a process of its own; its exit status, negative: the signal that ended it."""
    return _status(begin(arguments, prepare, log))


def _status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begin(arguments: list[str], prepare: Callable[[], None], log: Path) -> int:
    """The same without waiting: the process's number."""
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
    return child


def measure(arguments: list[str], folder: Path, log: Path) -> Extent:
    """Let a run come to its end, and count."""
    counts = log.with_suffix(".counts")
    counts.touch()

    def prepare() -> None:
        def count(letter: str) -> None:
            with counts.open("a") as file:  # not below the run's folder
                file.write(letter)

        from xcomp.compare import runner

        save, append = torch.save, runner.append_records
        torch.save = lambda content, file: (count("s"), save(content, file))[1]
        runner.append_records = lambda path, records: (count("s"), append(path, records))[1]
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

    config, runs, log = _tuning(place), place / "runs", place / "log.txt"
    extent = measure(["tune", str(config), "name=whole"], runs / "whole", log)
    print(f"uninterrupted: {extent.seconds:.1f} s, {extent.operations} file operations, {extent.saves} checkpoints")
    whole = weights(runs / "whole" / "model")

    def command(rng: random.Random, kind: str) -> list[str]:
        return ["tune", str(config), f"tune.num_workers={rng.randint(0, 1)}"]

    def left(folder: Path) -> dict[str, Any]:
        there = newest_checkpoint(folder)
        return {"resumes_after_step": there.step if there else 0}

    def outcome(folder: Path, ended_well: bool) -> dict[str, str]:
        resumed = ended_well and len(checkpoints(folder)) <= 2
        equal = resumed and same(weights(folder / "model"), whole)
        found = {"resumed": yes(resumed), "weights_bit_equal": yes(equal)}
        return found | {"log_equal": yes(resumed and logged(folder) == logged(runs / "whole"))}

    kinds = ("time", "file operation", "part of a checkpoint")
    return killed(kills, seed, kinds, runs, log, extent, command, left, outcome)


def killed(
    kills: int,
    seed: int,
    kinds: Sequence[str],
    runs: Path,
    log: Path,
    extent: Extent,
    command: Callable[[random.Random, str], list[str]],
    left: Callable[[Path], dict[str, Any]],
    outcome: Callable[[Path, bool], dict[str, str]],
) -> list[dict[str, Any]]:
    """Rows of at least so many kills. ``left`` tells what a killed run left, ``outcome`` what became of it in the end.

    ``command``: what to start, for a kind of kill; without one (an empty text) to let the run finish.
    """
    rng, kinds_in_turn, rows, attempt = random.Random(seed), itertools.cycle(kinds), [], 0
    while len(rows) < kills:
        attempt += 1
        folder, of_run, ended_well = runs / f"killed-{attempt}", [], True
        for _ in range(rng.randint(1, 3)):
            kill = Kill(next(kinds_in_turn), rng.random())
            arguments = [*command(rng, kill.kind), f"name={folder.name}"]
            status = start(arguments, lambda: kill.arm(folder, extent), log)  # noqa: B023
            was_hit = status == -signal.SIGKILL or _hit(folder).exists()
            if was_hit:
                row = {"command": arguments[0], "seed": seed, "run": attempt, "kill": len(of_run) + 1}
                row |= {"kind": kill.kind, "part": round(kill.part, 3)}
                of_run.append(row | left(folder) | {"half_written": half_written(folder)})
            if status != -signal.SIGKILL:
                ended_well = status == 0
                break  # it came to its end before that, or in spite of it
        ended_well &= start([*command(rng, ""), f"name={folder.name}"], lambda: None, log) == 0
        found = outcome(folder, ended_well and half_written(folder) == 0)
        rows += [row | found for row in of_run]
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


# --- compare ----------------------------------------------------------------------------------------------------------


def compare(kills: int, seed: int, place: Path) -> list[dict[str, Any]]:
    """Rows of at least so many kills of a comparison or of its decoding process."""
    config, runs, log = _comparison(place), place / "runs", place / "log.txt"
    extent = measure(["compare", str(config), "name=whole"], runs / "whole", log)
    print(f"uninterrupted: {extent.seconds:.1f} s, {extent.operations} file operations, {extent.saves} videos")

    def command(rng: random.Random, kind: str) -> list[str]:
        workers = 1 if kind == "decoding process" else rng.choice((0, 0, 0, 1))
        return ["compare", str(config), f"decoding.workers={workers if kind else 0}"]

    def left(folder: Path) -> dict[str, Any]:
        return {"answered": num_answered(folder)}

    def outcome(folder: Path, ended_well: bool) -> dict[str, str]:
        return {"resumed": yes(ended_well)} | same_comparison(folder, runs / "whole")

    kinds = ("time", "file operation", "part of a record", "decoding process")
    return killed(kills, seed, kinds, runs, log, extent, command, left, outcome)


def num_answered(folder: Path) -> int:
    from xcomp.compare.records import read_run_records

    return sum(not line.get("error") for line in read_run_records(folder))


def same_comparison(folder: Path, whole: Path) -> dict[str, str]:
    """Whether the records are, byte by byte but for what they took, and no file is there that should not be."""
    from comparison_runs import read, untimed

    def content(place: Path) -> list[str]:
        return [json.dumps(untimed(line)) for line in read(place)] if (place / "records.jsonl").exists() else []

    equal = content(folder) == content(whole)
    clean = {path.name for path in folder.glob("*")} == {path.name for path in whole.glob("*")}
    return {"records_equal": yes(equal), "no_file_left_over": yes(clean)}


def _comparison(place: Path) -> Path:
    """Two arms of a model of two layers, sixteen questions about eight videos."""
    from comparison_runs import draw_video, list_questions
    from conftest import write_checkpoint, write_tokenizer

    import xcomp.compare.runner  # noqa: F401 so that no start need load it

    torch.manual_seed(0)
    checkpoint = write_checkpoint(place / "model", write_tokenizer(place / "tokenizer"))
    questions = []
    for number in range(8):
        draw_video(place / f"{number}.mp4", 4 * number)
        questions += [(f"q{number}{letter}", place / f"{number}.mp4", f"What {letter}?") for letter in "ab"]
    run = {
        "output": str(place / "runs"),
        "backbone": {"name": "videochat_flash", "checkpoint": str(checkpoint)},
        "compressor": "lp_comp",
        "sampling": {"rate": 4, "min_frames": 8, "max_frames": 8},
        "generation": {"max_new_tokens": 3},
        "decoding": {"workers": 0, "threads": 1, "chunk": 4},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    path = place / "compare.yaml"
    path.write_text(yaml.safe_dump({**run, **list_questions(place, questions)}))
    return path


# --- ranks ------------------------------------------------------------------------------------------------------------

SECONDS_ALONE = 20.0  # after the end of one process, before the others are ended, as launchers do
VICTIMS = {"first process": (0,), "second process": (1,), "both": (0, 1)}


def ranks(kills: int, seed: int, place: Path) -> list[dict[str, Any]]:
    """Rows of at least so many kills of one of two processes, or both; finished by two or by one."""
    config, runs, log = _comparison(place), place / "runs", place / "log.txt"
    measure(["compare", str(config), "name=whole"], runs / "whole", log)
    began = time.perf_counter()
    if any(start_two([str(config), "name=two"], {}, log)[0]):
        raise SystemExit(f"the uninterrupted run of two processes failed:\n{log.read_text()}")
    extent = Extent(time.perf_counter() - began, 0, 0)
    print(f"uninterrupted: {extent.seconds:.1f} s, {same_comparison(runs / 'two', runs / 'whole')}")
    rng, victims, rows, attempt = random.Random(seed), itertools.cycle(VICTIMS), [], 0
    while len(rows) < kills:
        attempt += 1
        folder, of_run = runs / f"killed-{attempt}", []
        arguments = [str(config), f"name={folder.name}"]
        for _ in range(rng.randint(1, 2)):
            kind, part = next(victims), rng.random()
            arm = {rank: lambda: _at_time(folder, part, extent) for rank in VICTIMS[kind]}  # noqa: B023
            statuses, alone = start_two(arguments, arm, log)
            if -signal.SIGKILL not in statuses:
                break
            row = {"command": "ranks", "seed": seed, "run": attempt, "kill": len(of_run) + 1, "kind": kind}
            row |= {"part": round(part, 3), "answered": num_answered(folder), "half_written": half_written(folder)}
            of_run.append(row | {"others_ended_by_themselves": yes(alone)})
        last = rng.choice((1, 2))
        if last == 2:
            good = not any(start_two(arguments, {}, log)[0])
        else:
            good = start(["compare", *arguments], lambda: None, log) == 0
        found = {"resumed": yes(good and half_written(folder) == 0), "finished_by": last}
        rows += [row | found | same_comparison(folder, runs / "whole") for row in of_run]
    return rows


def start_two(arguments: list[str], prepare: dict[int, Callable[[], None]], log: Path) -> tuple[list[int], bool]:
    """A comparison on two processes: their exit statuses, and whether none had to be ended when another was gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: dict[int, int] = {}
    for rank in range(2):

        def ready(rank: int = rank) -> None:
            # As torchrun tells a process where it stands.
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "two"}
            os.environ.update({name: str(value) for name, value in own.items()})
            prepare.get(rank, lambda: None)()

        two = ["trainer.devices=2", "trainer.strategy=ddp"]
        children[begin(["compare", *arguments, *two], ready, log)] = rank
    statuses, alone, until = [0, 0], True, math.inf
    while children:
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[children.pop(child)] = os.waitstatus_to_exitcode(status)
                if status:
                    until = min(until, time.monotonic() + SECONDS_ALONE)
        if time.monotonic() > until:
            for child in children:
                os.kill(child, signal.SIGKILL)
            alone, until = False, math.inf
        time.sleep(0.01)
    return statuses, alone


# --- disk -------------------------------------------------------------------------------------------------------------


def disk(times: int, seed: int, place: Path) -> list[dict[str, Any]]:
    """Rows of so many comparisons in which no file can grow beyond some size: there the system writes what fits, and
    refuses the rest, as it does where a disk is full."""
    import resource

    config, runs, log = _comparison(place), place / "runs", place / "log.txt"
    measure(["compare", str(config), "name=whole"], runs / "whole", log)
    largest = max(path.stat().st_size for path in (runs / "whole").iterdir())
    rng, rows = random.Random(seed), []
    for attempt in range(1, times + 1):
        folder, said = runs / f"full-{attempt}", place / f"said-{attempt}.txt"
        limit = int(16 * (largest / 16) ** rng.random())
        arguments = ["compare", str(config), f"name={folder.name}"]
        prepare = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: B023, E731
        status = start(arguments, prepare, said)
        lines = [line for line in said.read_text(errors="replace").splitlines() if line.startswith("xcomp: error")]
        told = status == 2 and "Traceback" not in said.read_text(errors="replace")
        told &= len(lines) == 1 or limit < 400  # there the line itself had no room
        row = {"command": "disk", "seed": seed, "run": attempt, "kind": _full_at(limit, runs / "whole")}
        row |= {"limit": limit, "status": status, "answered": num_answered(folder)}
        row |= {"half_written": half_written(folder), "ended_in_one_line": yes(told)}
        good = start(arguments, lambda: None, log) == 0 and half_written(folder) == 0
        rows.append(row | {"resumed": yes(good)} | same_comparison(folder, runs / "whole"))
    return rows


def _full_at(limit: int, whole: Path) -> str:
    """The first file of those that a run writes one after the other for which there is no room."""
    names = (".holder.json", "run.json", "records.jsonl")
    sizes = {name: (whole / name).stat().st_size for name in names if (whole / name).exists()}
    return next((name for name, size in sizes.items() if size > limit), "report")


# --- the table --------------------------------------------------------------------------------------------------------

COMMANDS = {"tune": tune, "compare": compare, "ranks": ranks, "disk": disk}
EQUAL = ("weights_bit_equal", "records_equal", "no_file_left_over", "ended_in_one_line")  # what must hold, where told


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def show(rows: list[dict[str, Any]]) -> bool:
    """Print by kind of what was done to runs; whether all resumed to the same result."""
    told = [name for name, value in rows[0].items() if value in ("yes", "no")]
    titles = [name.replace("_", " ") for name in told]
    print(f"{'kind':<22}{'runs':>6}" + "".join(f"{t:>{len(t) + 2}}" for t in [*titles, "half-written files"]))
    for kind in [*dict.fromkeys(row["kind"] for row in rows), "all"]:
        of_kind = [row for row in rows if kind in (row["kind"], "all")]
        counts = [sum(row[name] == "yes" for row in of_kind) for name in told]
        counts.append(sum(row["half_written"] for row in of_kind))
        widths = [len(title) + 2 for title in [*titles, "half-written files"]]
        print(f"{kind:<22}{len(of_kind):>6}" + "".join(f"{count:>{width}}" for count, width in zip(counts, widths)))
    return all(row[name] == "yes" for row in rows for name in ("resumed", *EQUAL) if name in row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=[*COMMANDS, "fuzz"])
    parser.add_argument("--times", type=int, default=40, help="kills at least; full disks; files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        if options.command == "fuzz":
            from fuzzing import fuzz
            from fuzzing import show as show_outcomes

            rows = fuzz(options.times, options.seed, Path(place))
            good = show_outcomes(rows)
        else:
            rows = COMMANDS[options.command](options.times, options.seed, Path(place))
            good = show(rows)
            print(f"{len(rows)} in {len({row['run'] for row in rows})} runs, {time.perf_counter() - began:.0f} s")
    if not options.dry:
        write(f"reliability-{options.command}", [about("cpu") | row for row in rows])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

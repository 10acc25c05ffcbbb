"""What the measurements share: clocks that wait for the device, peak memory, hardware and versions, dated CSV files."""

from __future__ import annotations

import csv
import datetime
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
MEGABYTE = 1024**2


def about(device: str) -> dict[str, Any]:
    """Columns that say where and with what a row was measured."""
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def seconds(run: Callable[[], Any], device: str) -> float:
    """Wall-clock of one call, the device's queue included."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def side_by_side(runs: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each of several runs, taken in turns so that a machine's drift meets all alike.

    One warm-up each, but for a single repeat: that is for runs of minutes, which need none.
    """
    for run in runs.values() if repeats > 1 else ():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(seconds(run, device))
    return taken


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Columns of repeated seconds."""
    rounded = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {f"seconds_{name}": round(value, 4) for name, value in rounded.items()} | {"repeats": len(values)}


def peak_megabytes(prepare: Callable[..., Callable[[], Any]], *arguments: Any, device: str = "cpu") -> float:
    """Memory that ``prepare(*arguments)()`` needs beyond what is there once it is prepared.

    On a CPU it is the growth of the process's high-water mark, in a process of its own.
    """
    if device.startswith("cuda"):
        run = prepare(*arguments)
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (prepare, arguments))


def _growth(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> float:
    run = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is held now
    before = _kilobytes("VmRSS")
    run()
    return (_kilobytes("VmHWM") - before) / 1024


def _kilobytes(name: str) -> int:
    """A line of Linux's account of this process. ru_maxrss will not do: a child starts with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def write(name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows to ``perf/results/<name>-<date>.csv``, behind the day's earlier ones; what a row lacks stays empty."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.date.today().isoformat()}.csv"
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [*csv.DictReader(file), *rows]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {path}")
    return path

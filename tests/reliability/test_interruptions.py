"""A few kills, full disks and damaged files; ``perf/reliability.py`` does many, and its results are in
``perf/results``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "perf" / "reliability.py"


def run(command: str, times: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, SCRIPT, command, "--times", str(times), "--seed", "3", "--dry"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.parametrize("command", ["tune", "compare", "disk"])
def test_interrupted_runs_go_on_to_the_same_result(command):
    total = next(line.split() for line in run(command, 3) if line.startswith("all "))
    assert int(total[1]) >= 3 and total[1] == total[2] == total[3]  # runs, resumed or told, bit-equal or resumed


def test_damaged_files_are_read_right_or_are_an_error():
    lines = run("fuzz", 60)
    counts = [list(map(int, line.split()[-3:])) for line in lines if line.split()[-1:] and line.split()[-1].isdigit()]
    assert [sum(column) for column in zip(*counts)] == [60] * 3

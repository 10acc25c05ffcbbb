"""A few kills of a tuning run; ``perf/reliability.py`` does many, and its results are in ``perf/results``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "perf" / "reliability.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_killed_runs_go_on_to_the_same_bits():
    command = [sys.executable, SCRIPT, "tune", "--times", "3", "--seed", "3", "--dry"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    total = next(line.split() for line in done.stdout.splitlines() if line.startswith("all "))
    assert int(total[1]) >= 3 and total[1] == total[2] == total[3]  # kills, resumed, bit-equal

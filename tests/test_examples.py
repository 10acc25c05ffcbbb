"""The example package, installed into an environment of its own: listed, checked by its test, used from YAML."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "third_party_plugin"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs Python where the package is installed. It is built from a copy: building leaves files in the source."""
    folder = tmp_path_factory.mktemp("example")
    source, target = folder / "source", folder / "site"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def run(*arguments, cwd=source):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-m", "pip", "install", "--quiet", *offline, "--target", target, source, cwd=folder)
    shutil.rmtree(source / "src")  # what follows uses what was installed
    return run


def test_its_own_test_passes(python):
    assert "1 passed" in python("-m", "pytest", "-q")


def test_it_is_listed_with_its_origin(python):
    rows = [re.split(" {2,}", line)[:3] for line in python("-m", "xcomp.cli", "plugins").splitlines()]
    assert ["compressor", "merge_frames", "xcomp-example 0.1.0"] in rows
    assert ["selector", "sharpest", "xcomp-example 0.1.0"] in rows


def test_it_is_used_from_yaml(python, tmp_path, tiny_run):
    tiny_run |= {"compressor": {"name": "merge_frames", "frames": 2}, "selector": "sharpest", "limit": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_run))
    table = python("-m", "xcomp.cli", "evaluate", "run.yaml", cwd=tmp_path)
    assert "merge_frames +" in table and "sharpest" in table
    (record,) = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "records.jsonl").open()]
    assert record["error"] is None and record["num_frames"] == 4 and len(record["scores"]) == 8
    assert record["tokens_in"] == 2 * 16 and record["tokens_per_layer"] == [2 * 16, 2 * 16]

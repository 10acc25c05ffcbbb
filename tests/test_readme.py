"""The README's code, run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from xcomp.testing import check_compressor

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def xcomp(*arguments, cwd):
    command = [sys.executable, "-m", "xcomp.cli", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def plugin(tmp_path):
    source = next(b for b in blocks("python") if "class EveryOther" in b)
    (tmp_path / "my_plugins").mkdir()
    (tmp_path / "my_plugins" / "every_other.py").write_text(source)
    return source


def test_the_swapped_parts_run(tmp_path):
    (tmp_path / "my.yaml").write_text(next(b for b in blocks("yaml") if "# my.yaml" in b))
    commands = [line.split("#")[0].split() for b in blocks("bash") for line in b.splitlines() if "my.yaml" in line]
    assert len(commands) == 2
    for command in commands:
        small = ["benchmark.num_videos=1", "limit=2", "trainer.enable_progress_bar=false"]
        table = xcomp(*command[1:], *small, cwd=tmp_path)
        assert all(arm in table for arm in ("everything", "pooled", "picked"))
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert (tmp_path / "runs" / "mine8" / "report.html").is_file()


def test_the_example_plugin_runs_from_yaml(tmp_path, plugin):
    head = next(b for b in blocks("yaml") if "# my.yaml" in b).split("arms:")[0]
    example = next(b for b in blocks("yaml") if "every_other" in b)
    (tmp_path / "own.yaml").write_text(head + example)
    small = ["benchmark.num_videos=1", "limit=2", "trainer.enable_progress_bar=false"]
    assert "every_other" in xcomp("evaluate", "own.yaml", *small, cwd=tmp_path)
    assert "every_other" in xcomp("plugins", "my_plugins", cwd=tmp_path)


def test_the_example_plugin_keeps_its_contract(plugin):
    names: dict = {"__name__": "every_other"}
    exec(compile(plugin, "every_other.py", "exec"), names)
    check_compressor(names["EveryOther"])


def test_its_make_targets_exist():
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", README, flags=re.M)
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)


def test_every_named_file_exists():
    root = Path(__file__).resolve().parents[1]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert all((root / link).exists() for link in links)

"""docs/adding_a_plugin.md as a new user follows it: every block, in order, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "adding_a_plugin.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.S | re.M)


def shell(command, cwd):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    script = ["bash", "-euc", command]
    done = subprocess.run(script, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_guide_to_plugins(tmp_path):
    out = {}
    for language, text in BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        if language == "bash":
            out[text.strip()] = shell(text, tmp_path)
        elif language == "toml":
            assert text in (ROOT / "examples" / "third_party_plugin" / "pyproject.toml").read_text(encoding="utf-8")
        else:
            file = re.match(r"# (\S+)\n", text)
            assert language in ("python", "yaml") and file, f"where does this block belong?\n{text}"
            (tmp_path / file[1]).write_text(text)
    table = out["xcomp compare halving.yaml"]
    assert all(arm in table for arm in ("everything", "halved", "halved sooner"))
    table = (tmp_path / "runs" / "halving" / "table.md").read_text(encoding="utf-8")
    tokens = re.findall(r"^\| (everything|halved|halved sooner) \| .*?\| 128 \| 128 \| (\d+) \|", table, flags=re.M)
    assert tokens == [("everything", "128"), ("halved", "16"), ("halved sooner", "8")], table  # given, in, left
    assert (tmp_path / "runs" / "halving" / "report.html").is_file()
    last = next(printed for command, printed in out.items() if "compare mine.yaml" in command)
    assert "4 passed" in last and all(arm in last for arm in ("uniform", "motion", "toy"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_every_named_file_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", GUIDE.read_text(encoding="utf-8")) if "://" not in link]
    assert links and all((GUIDE.parent / link).exists() for link in links)

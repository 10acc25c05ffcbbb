"""Comparisons over files that are missing, broken, that hang or end the process that decodes them, and of outages:
every good question is answered, every other one is told, and the same command makes good what was mended.

``perf/reliability.py`` does the same with thousands of files and many kills; its results are in ``perf/results``.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from comparison_runs import ARMS, asked, draw_video, list_questions, read, untimed
from PIL import Image

from xcomp.cli import main
from xcomp.compare import runner
from xcomp.compare.records import read_run_records
from xcomp.config import ConfigError

ROOT = Path(__file__).parents[2]
# Imported by every process on its start: what decoders do to some files, done to all readers of two.
MISBEHAVING = """
import os
import time

access = os.access


def misbehave(path, mode, **options):
    if str(path).endswith("aborts.mp4"):
        os.abort()
    if str(path).endswith("hangs.mp4"):
        time.sleep(600)
    return access(path, mode, **options)


os.access = misbehave
"""


class Files:
    """Twelve videos or what should be, and the questions about them: three good ones, and one about each other."""

    def __init__(self, folder: Path):
        self.folder, self.videos = folder, folder / "videos"
        self.videos.mkdir()
        for number in range(2):
            draw_video(self.videos / f"good-{number}.mp4", 8 * number)
        self.bad = {name: self.videos / f"{name}.mp4" for name in ("truncated", "garbage", "pipe", "hangs", "aborts")}
        self.bad |= {"folder": self.videos / "folder", "long name": self.videos / ("x" * 300 + ".mp4")}
        self.bad |= {"missing": self.videos / "missing.mp4", "null": self.videos / "nu\0ll.mp4"}
        self.bad |= {"picture": self.videos / "picture"}
        for name in ("hangs", "aborts"):
            shutil.copy(self.videos / "good-0.mp4", self.bad[name])
        whole = (self.videos / "good-0.mp4").read_bytes()
        self.bad["truncated"].write_bytes(whole[: len(whole) // 2])
        self.bad["garbage"].write_bytes(bytes(range(256)) * 20)
        os.mkfifo(self.bad["pipe"])
        self.bad["folder"].mkdir()
        self.bad["picture"].mkdir()
        Image.new("L", (12_000, 12_000)).save(self.bad["picture"] / "a_1.png", compress_level=1)
        if os.geteuid() != 0:  # who may read everything
            self.bad["closed"] = self.videos / "closed.mp4"
            shutil.copy(self.videos / "good-0.mp4", self.bad["closed"])
            self.bad["closed"].chmod(0)

    def questions(self, *, mended: bool) -> dict:
        good = [
            (f"good-{n}{letter}", self.videos / f"good-{n}.mp4", f"What {letter}?") for n, letter in ("0a", "0b", "1a")
        ]
        bad = [(name.replace(" ", "-"), path, "What?") for name, path in self.bad.items()]
        texts = ["What?", "What?"] if mended else ["red " * 3000, "What is \ud800?"]
        bad += [(name, self.videos / "good-1.mp4", text) for name, text in zip(("too-long", "no-text"), texts)]
        return list_questions(self.folder, [*good[:1], *bad, *good[1:]])

    def mend(self) -> dict:
        for number, (name, path) in enumerate(self.bad.items()):
            if name in ("long name", "null"):
                path = self.bad[name] = self.videos / f"{name}.mp4"
            elif path.is_dir():
                shutil.rmtree(path)
            draw_video(self.folder / "new.mp4", number)
            (self.folder / "new.mp4").replace(path)
        return self.questions(mended=True)


NOT_THERE = {"missing", "null", "long-name"}
REASONS = {
    "truncated": "not a readable video",
    "garbage": "not a readable video",
    "pipe": "neither a file nor a folder",
    "hangs": "decoding took longer than 4 s; raise decoding.seconds",
    "aborts": "decoding it ended the process (SIGABRT)",
    "folder": "folder has no frames",
    "picture": "decoding takes more memory than decoding.memory allows",
    "closed": "no permission to read it",
    "too-long": "but the language model takes 4096",
    "no-text": "the question is no text",
}


def test_all_that_can_be_asked_is_asked_and_the_rest_after_mending(tiny_run, tmp_path, capsys):
    files = Files(tmp_path)
    decoding = {"workers": 1, "threads": 1, "seconds": 4.0, "memory": 0.25}
    run = {**tiny_run, "decoding": decoding, "allow_missing": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run, **files.questions(mended=False)}))
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "sitecustomize.py").write_text(MISBEHAVING)
    done = subprocess.run(
        [sys.executable, "-m", "xcomp.cli", "compare", str(tmp_path / "run.yaml")],
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'startup'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    num_bad = len(files.bad) + 2 - len(NOT_THERE)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    said = " ".join(done.stdout.split())
    assert f"{2 * num_bad} questions could not be asked" in said and "asked %" in said
    assert f"3 of {len(files.bad) + 2} videos are missing: 3 questions are left out" in said
    folder = tmp_path / "runs" / "tiny"
    about = json.loads((folder / "run.json").read_text())["benchmark"]
    assert len(about["missing"]) == about["missing_questions"] == 3 and about["num_questions"] == 3 + num_bad
    records = read(folder)
    assert len(records) == 2 * (3 + num_bad)
    for record in records:
        name, error = record["question_id"], record["error"]
        if name.startswith("good"):
            assert error is None and record["text"] is not None
        else:
            assert REASONS[name] in error and "\n" not in error and len(error) < 700, (name, error)
    first = asked(tmp_path)
    assert set(Counter(first).values()) == {len(ARMS)} and len(first) == len(records)

    mended = {**run, **files.mend()}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(mended))
    assert main(["compare", str(tmp_path / "run.yaml")]) == 0
    assert Counter(asked(tmp_path)) == {n: 2 for n in {*first, *NOT_THERE} if not n.startswith("good")}
    assert json.loads((folder / "run.json").read_text())["benchmark"]["missing"] == []
    assert "could not be asked" not in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "run.yaml"), "name=undisturbed"]) == 0
    assert [untimed(r) for r in read(folder)] == [untimed(r) for r in read(tmp_path / "runs" / "undisturbed")]
    assert {p.name for p in folder.iterdir() if p.suffix in (".tmp", ".jsonl")} == {"records.jsonl"}


@pytest.fixture
def sound(tiny_run, tmp_path):
    """A run on four good videos, with its configuration's file and its folder of videos."""
    (tmp_path / "videos").mkdir()
    for number in range(4):
        draw_video(tmp_path / "videos" / f"{number}.mp4", 4 * number)
    questions = [(f"q{n}", tmp_path / "videos" / f"{n}.mp4", "What?") for n in range(4)]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**tiny_run, **list_questions(tmp_path, questions)}))
    return path, tmp_path / "runs" / "tiny"


def test_a_passing_outage_leaves_nothing_wrong(sound, tmp_path, monkeypatch):
    path, folder = sound
    append, videos, away, count = runner.append_records, tmp_path / "videos", tmp_path / "away", 0

    def watched(*args):
        nonlocal count
        append(*args)
        count += 1
        if count == 1:
            videos.rename(away)
        if count == 3:
            away.rename(videos)

    monkeypatch.setattr(runner, "append_records", watched)
    assert main(["compare", str(path)]) == 1
    errors = [r["error"] for r in read(folder) if r["error"]]
    assert len(errors) == 4 and all("no such file or folder" in error for error in errors)
    asked(tmp_path)
    assert main(["compare", str(path)]) == 0 and len(asked(tmp_path)) == 4
    assert main(["compare", str(path), "name=undisturbed"]) == 0
    assert [untimed(r) for r in read(folder)] == [untimed(r) for r in read(tmp_path / "runs" / "undisturbed")]


def test_an_outage_of_the_whole_folder_is_told_and_nothing_is_lost(sound, tmp_path, capsys):
    path, folder = sound
    assert main(["compare", str(path), "limit=2"]) == 0
    before = (folder / "records.jsonl").read_bytes()
    (tmp_path / "videos").rename(tmp_path / "away")
    assert main(["compare", str(path), "limit=2"]) == 2
    assert "none of the benchmark's 2 videos is there" in capsys.readouterr().err
    assert (folder / "records.jsonl").read_bytes() == before


def test_what_a_killed_report_left_is_taken_away(sound, capsys):
    """Nothing is left to ask, and the last merge and the report were under way."""
    path, folder = sound
    assert main(["compare", str(path)]) == 0
    records, files = folder / "records.jsonl", {p.name for p in folder.iterdir()}
    whole = records.read_text()
    records.write_text("".join(reversed(whole.splitlines(keepends=True))))
    for name in ("records.jsonl.tmp", "run.json.tmp", ".report.html.123.tmp", ".holder.json"):
        (folder / name).write_text("half")
    assert main(["compare", str(path)]) == 0
    assert {p.name for p in folder.iterdir()} == files and records.read_text() == whole


def test_doubled_records_that_agree_are_one(sound, tmp_path, capsys):
    path, folder = sound
    assert main(["compare", str(path)]) == 0
    records = folder / "records.jsonl"
    lines, once = records.read_text().splitlines(keepends=True), read_run_records(folder)
    table = capsys.readouterr().out
    records.write_text("".join(lines + lines[2:5]))
    again = json.loads(lines[0])
    again["seconds"] = {stage: 9.0 for stage in again["seconds"]}
    (folder / "records.rank1.jsonl").write_text(json.dumps(again) + "\n" + lines[1])
    assert sorted(map(str, map(untimed, read_run_records(folder)))) == sorted(map(str, map(untimed, once)))
    asked(tmp_path)
    assert main(["compare", str(path)]) == 0 and not asked(tmp_path)
    assert "4 questions on 4 videos" in table and "4 questions on 4 videos" in capsys.readouterr().out


def test_doubled_records_that_differ_are_told(sound):
    path, folder = sound
    assert main(["compare", str(path)]) == 0
    records = folder / "records.jsonl"
    other = json.loads(records.read_text().splitlines()[3]) | {"text": "something else"}
    records.write_text(records.read_text() + json.dumps(other) + "\n")
    with pytest.raises(ConfigError, match=r"records.jsonl', line 9: question 'q3' of arm 'whole' has another answer"):
        read_run_records(folder)

"""Benchmarks with published files, from the file to the report's numbers."""

import json
import shutil

import pytest
from made_annotations import make

import xcomp
from xcomp.compare.runner import evaluate
from xcomp.config import parse_config
from xcomp.registry import load_class


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    needle = xcomp.load_benchmark("needle", num_videos=1, seconds=4.0, root=str(tmp_path_factory.mktemp("needle")))
    return needle.questions()[0].video


@pytest.mark.parametrize("name", ["lvbench", "longvideobench", "mlvu", "videomme", "niah"])
def test_a_run_tells_what_the_benchmark_does(name, tmp_path, video):
    options = make(name, tmp_path)
    for file in tmp_path.rglob("*.mp4"):
        shutil.copy(video, file)
    node = {"name": name, **options}
    run = {
        "name": name,
        "output": str(tmp_path / "runs"),
        "backbone": {"name": "videochat_flash", "checkpoint": "tiny"},
        "benchmark": node,
        "sampling": {"rate": 1, "min_frames": 4, "max_frames": 20, "multiple": 4},
        "decoding": {"workers": 0},
        "trainer": {"enable_progress_bar": False},
        "published": {"Another [model]": {"accuracy": 12.5}},
    }
    folder = evaluate(parse_config(run, "x"))
    questions = xcomp.load_benchmark(name, **options).questions()
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [r["question_id"] for r in records] == [q.id for q in questions] and not any(r["error"] for r in records)
    for record, question in zip(records, questions):
        assert record["options"] == list(question.options) and record["answer"] == question.answer
        assert record["labels"] == {axis: list(labels) for axis, labels in question.labels.items()}
        assert record["events"] == [list(span) for span in question.events]
    summary = json.loads((folder / "summary.json").read_text())
    plugin = load_class("benchmark", name)
    assert summary["axes"] == list(plugin.axes)
    assert summary["arms"][0]["official"] == pytest.approx(plugin.metrics(records))
    (quoted,) = [line for line in (folder / "table.md").read_text().splitlines() if "Another" in line]
    assert "model" in quoted and "12.5" in quoted

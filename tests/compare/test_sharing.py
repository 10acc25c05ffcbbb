"""A video is opened, decoded and encoded once for all questions and arms, and no record depends on it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from comparison_runs import read, untimed
from xcomp.backbones.videochat_flash import VideoChatFlash

import xcomp
from xcomp.answering import Answerer
from xcomp.compare.runner import compare
from xcomp.compare.tasks import VideoTask, share_out
from xcomp.config import parse_config
from xcomp.video import Video

QC_COMP = {"name": "qc_comp", "chunk_frames": 8, "clip_frames": 4, "window_clips": 2, "window_stride": 1}
ARMS = [
    {"name": "whole", "compressor": "none", "frames": 8},
    {"name": "fewer", "compressor": "lp_comp", "frames": [4, 8]},
    {"name": "attention", "compressor": {"name": "attention_drop", "layers": [1], "ratios": [0.5]}, "frames": 8},
    {"name": "chosen", "compressor": "lp_comp", "selector": QC_COMP, "frames": [4, 8]},
]
ONE_QUESTION = """
from dataclasses import dataclass
import xcomp
from xcomp.benchmark import Benchmark


class Only(Benchmark):
    @dataclass(kw_only=True)
    class Config:
        number: int
        root: str

    def questions(self):
        found = xcomp.load_benchmark("needle", num_videos=2, seconds=4, root=self.config.root).questions()
        return [found[self.config.number]]
"""


@pytest.fixture
def run(tiny_run):
    sampling = {"rate": 8, "min_frames": 8, "max_frames": 32}
    return {**tiny_run, "sampling": sampling, "arms": ARMS, "generation": {"max_new_tokens": 4}}


def test_records_are_those_of_one_question_at_a_time(run, tmp_path, needle_videos):
    shared = {(r["arm"], r["question_id"]): r for r in read(compare(parse_config({**run, "batch_size": 3}, "x")))}
    assert len(shared) == 6 * 8
    (tmp_path / "only.py").write_text(ONE_QUESTION)
    plugin = {"plugins": [str(tmp_path)], "batch_size": 1}
    for arm in ARMS:
        for number in (0, 3, 6):
            benchmark = {"name": "only", "number": number, "root": needle_videos["root"]}
            name = f"{arm['name']}-{number}"
            folder = compare(parse_config({**run, **plugin, "arms": [arm], "name": name, "benchmark": benchmark}, "x"))
            for record in read(folder):
                assert untimed(record) == untimed(shared[record["arm"], record["question_id"]])


def test_frames_and_clips_are_computed_once_a_video(run, monkeypatch):
    opened, decoded, encoded = [], [], []
    read_frames, encode, start = Video.read, VideoChatFlash.encode, Video.__init__

    def watched_start(self, path, *args, **kwargs):
        opened.append(str(path))
        start(self, path, *args, **kwargs)

    def watched_read(self, indices):
        for number, frame in read_frames(self, indices):
            decoded.append((self.path, number))
            yield number, frame

    monkeypatch.setattr(Video, "__init__", watched_start)
    monkeypatch.setattr(Video, "read", watched_read)
    monkeypatch.setattr(VideoChatFlash, "encode", lambda self, p: encoded.append(len(p)) or encode(self, p))
    monkeypatch.setattr(Answerer, "warm_up", lambda self: None)
    monkeypatch.setattr(VideoChatFlash, "clip_macs", lambda self, size: 1)
    monkeypatch.setattr("xcomp.compare.page.thumbnails", lambda *args: {})  # they are decoded once more
    arms = [ARMS[0], {"name": "all", "frames": 32}, {"name": "all pooled", "compressor": "avg_pool", "frames": 32}]
    records = read(compare(parse_config({**run, "arms": arms}, "x")))
    assert len(records) == 3 * 8 and not any(r["error"] for r in records)
    assert len(opened) == len(set(opened)) == 2 and len(decoded) == len(set(decoded)) == 2 * 32
    # 32 candidates of each video, and the clips that only the first arm shows
    assert sum(encoded) == 2 * (32 + 8)


def test_qc_comp_runs_each_chunk_once_for_all_questions(run, monkeypatch):
    passes, prefill_video = [], xcomp.Decoder.prefill_video
    monkeypatch.setattr(
        xcomp.Decoder,
        "prefill_video",
        lambda self, tokens, *ids: passes.append(len(tokens)) or prefill_video(self, tokens, *ids),
    )
    folder = compare(parse_config({**run, "arms": [ARMS[3]]}, "x"))
    shown = {(r["video"], tuple(r["frames"])) for r in read(folder)}
    chunks = 2 * (32 // 8)  # rounds and chunks, for both budgets and all four questions of a video
    assert len(passes) == 2 * chunks + len(shown)


def test_amortised_seconds_add_up_and_alone_is_never_less(run):
    records = read(compare(parse_config(run, "x")))
    for record in records:
        for stage, seconds in record["seconds"].items():
            assert seconds >= record["seconds_amortised"][stage] >= 0
    whole = [r for r in records if r["arm"] == "whole"]
    # all arms and questions of a video decoded it together
    for video in {r["video"] for r in records}:
        shared = sum(r["seconds_amortised"]["decode"] for r in records if r["video"] == video)
        assert shared <= max(r["seconds"]["decode"] for r in records if r["video"] == video) + 1e-3
    assert {len(r["macs"]) for r in whole} == {6} and len({json.dumps(r["macs"]["vision"]) for r in whole}) == 1


# --- processes --------------------------------------------------------------------------------------------------------


def test_videos_are_shared_out_by_what_they_cost(tmp_path):
    tasks = []
    for i, size in enumerate((100, 900, 300, 500, 200, 400)):
        (tmp_path / f"{i}.mp4").write_bytes(bytes(size))
        tasks.append(VideoTask(str(tmp_path / f"{i}.mp4"), {"a": ["q1", "q2"], "b": ["q1"]}))
    tasks.append(VideoTask(str(tmp_path / "missing.mp4"), {"a": ["q"]}))
    for processes in (1, 2, 3, 10):
        shares = share_out(tasks, processes)
        assert len(shares) == processes
        assert sorted(t.video for s in shares for t in s) == sorted(t.video for t in tasks)
        costs = [[os.path.getsize(t.video) / 2400 + 3 / 19 if t.num_open == 3 else 1 / 19 for t in s] for s in shares]
        assert all(s == sorted(s, reverse=True) for s in costs)
        if processes == 2:
            assert abs(sum(costs[0]) - sum(costs[1])) < 0.2
    assert share_out(tasks, 3) == share_out(tasks, 3)


def command(folder, run, **more):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**run, **more}))
    return [sys.executable, "-m", "xcomp.cli", "compare", str(path)]


@pytest.fixture
def two(run):
    """The same run on two processes."""
    return {**run, "trainer": {**run["trainer"], "devices": 2, "strategy": "ddp"}, "name": "two"}


def test_two_processes_give_the_records_of_one(run, two, tmp_path):
    one = read(compare(parse_config({**run, "name": "one"}, "x")))
    done = subprocess.run(command(tmp_path, two), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "two"
    assert [untimed(r) for r in read(folder)] == [untimed(r) for r in one]
    assert not list(folder.glob("records.rank*")) and done.stdout.count("report:") == 1


def test_a_killed_run_of_two_is_finished_by_one(run, two, tmp_path):
    folder = tmp_path / "runs" / "two"
    process = subprocess.Popen(command(tmp_path, two), start_new_session=True, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while not list(folder.glob("records.rank*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(folder.glob("records.rank*"))
    compare(parse_config({**run, "name": "two"}, "x"))  # other devices: the folder stays the same run's
    one = read(compare(parse_config({**run, "name": "one"}, "x")))
    assert [untimed(r) for r in read(folder)] == [untimed(r) for r in one]
    assert not list(folder.glob("records.rank*"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not do it")
def test_no_process_outlives_the_first(run, two, tmp_path):
    """It would write into a folder that nobody holds, beside those of the next start."""
    process = subprocess.Popen(command(tmp_path, two), stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while not list((tmp_path / "runs" / "two").glob("records.rank*")) and time.monotonic() < until:
        time.sleep(0.01)
    children = [int(child) for child in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()]
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{child}/exe") for child in children) and time.monotonic() < until:
        time.sleep(0.1)
    assert children and not [child for child in children if os.path.exists(f"/proc/{child}/exe")]


FAILING = """
import os
from dataclasses import dataclass
from xcomp.selector import FrameSelector
class Failing(FrameSelector):
    @dataclass
    class Config:
        rank: str = "0"
    uses_video = False
    def select(self, scores, budget):
        if os.environ.get("LOCAL_RANK", "0") == self.config.rank:
            raise RuntimeError("one process fails")
        return list(range(budget))
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_failure_of_one_process_is_one_of_all(two, tmp_path, rank):
    (tmp_path / "failing.py").write_text(FAILING)
    arm = {"name": "a", "selector": {"name": "failing", "rank": rank}, "frames": 4}
    done = subprocess.run(
        command(tmp_path, two, plugins=[str(tmp_path)], arms=[arm]), capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0 and "one process fails" in done.stderr and "report:" not in done.stdout


def test_shares_of_equal_videos_are_even():
    tasks = [VideoTask(f"{i}", {"a": ["q"]}) for i in range(9)]
    assert [len(share) for share in share_out(tasks, 4)] == [3, 2, 2, 2]
    assert torch.tensor([t.num_open for share in share_out(tasks, 4) for t in share]).sum() == 9

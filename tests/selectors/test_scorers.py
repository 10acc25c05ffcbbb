"""Scorers that need no video: random, the true event, a file; and features that stay on disk."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_clip import save_tiny_clip
from xcomp.selectors.oracle import event_scores

import xcomp
from xcomp.answering import Answerer, Query
from xcomp.backbone import QuestionError
from xcomp.compare.runner import compare
from xcomp.config import parse_config
from xcomp.selector import FrameQuery
from xcomp.testing import video_of
from xcomp.tiny import tiny_backbone

FRAMES = torch.randint(0, 256, (24, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def chosen(selector, budget, *queries, seed=0, frames=FRAMES):
    """Frame numbers for each question about a video of 12 s, two candidates a second."""
    answerer = Answerer(tiny_backbone(), None, selector, budget=budget, seed=seed)
    with video_of(frames, answerer.backbone) as video:
        return [list(choice.frames) for choice in answerer.choose(video, queries)]


def query(name="q", events=()):
    return Query("given frames", "which symbol", "which symbol", name, events)


# --- random -----------------------------------------------------------------------------------------------------------


def test_random_follows_from_seed_and_question():
    pick = lambda *ids, seed=0: chosen(xcomp.load_selector("random"), 6, *map(query, ids), seed=seed)  # noqa: E731
    first, second = pick("a", "b")
    assert first != second and pick("b", "a") == [second, first] and pick("a") == [first]
    assert pick("a", seed=1) != [first]
    counts = torch.zeros(24)
    for i in range(200):
        counts[pick(f"q{i}")[0]] += 1
    assert counts.min() > 20 and counts.max() < 90  # 50 each


# --- oracle -----------------------------------------------------------------------------------------------------------


def test_oracle_shows_every_event_before_one_twice():
    oracle = xcomp.load_selector("oracle")
    asked = query(events=((2.0, 4.0), (8.0, 9.0)))  # frames 4..8 and 16..18
    assert chosen(oracle, 2, asked) == [[6, 17]] or chosen(oracle, 2, asked) == [[6, 16]]
    assert chosen(oracle, 8, asked) == [[4, 5, 6, 7, 8, 16, 17, 18]]
    assert chosen(oracle, 10, asked)[0] == [3, 4, 5, 6, 7, 8, 9, 16, 17, 18]  # the nearest beside them


def test_an_event_between_two_candidates_has_the_nearest():
    times = [0.0, 1.0, 2.0, 3.0]
    assert event_scores(times, FrameQuery("?", None, events=((1.6, 1.8),))).argmax() == 2


def test_oracle_needs_an_event():
    with pytest.raises(QuestionError, match="oracle: nobody knows when what question 'q' asks for happens"):
        chosen(xcomp.load_selector("oracle"), 4, query())


# --- frames_file ------------------------------------------------------------------------------------------------------


def frames_file(tmp_path, *rows, **options):
    path = tmp_path / "frames.jsonl"
    path.write_text("".join(json.dumps({"video": "given frames", "question_id": "q", **row}) + "\n" for row in rows))
    return xcomp.load_selector("frames_file", file=str(path), **options)


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"frames": [3, 9, 20, 21]}, [3, 9, 20, 21]),
        ({"frames": [20, 3, 21, 9]}, [3, 9, 20, 21]),
        ({"seconds": [1.5, 4.6, 10.0, 10.4]}, [3, 9, 20, 21]),
        ({"scores": [float(i in (3, 9, 20, 21)) for i in range(24)]}, [3, 9, 20, 21]),
        ({"frames": [3, 3, 9, 20]}, [3, 3, 9, 20]),
    ],
)
def test_what_a_file_names_is_shown(tmp_path, row, expected):
    assert chosen(frames_file(tmp_path, row), 4, query()) == [expected]


def test_a_file_of_scores_serves_a_picker(tmp_path):
    row = {"scores": [float(i) for i in range(24)], "frames": [1, 2]}
    selector = frames_file(tmp_path, row)
    scorer = {"name": "frames_file", "file": selector.config.file, "use": "scores"}
    spaced = xcomp.load_selector("top_k", scorer=scorer, min_seconds=2.0)
    assert chosen(spaced, 4, query()) == [[11, 15, 19, 23]]
    assert chosen(selector, 2, query()) == [[1, 2]]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"frames": [3, 99, 20, 21]}, "line 1: frame 99 is not there: the video ends at 23"),
        ({"seconds": [3, 99]}, "line 1: second 99 is not there: the video ends at 12"),
        ({"frames": [3, 9]}, "names 2 frames for question 'q', but 4 are to be shown; set frames: 2"),
        ({"scores": [1.0, 2.0]}, "line 1: 2 scores, but the run has 24 candidate frames"),
        ({"video": "another.mp4", "frames": [1, 2, 3, 4]}, "line 1: video 'another.mp4' is not 'given frames'"),
        ({"question_id": "p", "frames": [1, 2, 3, 4]}, "has no line about question 'q'"),
        ({"seconds": [1.0, 1.01, 2.0, 3.0]}, "line 1: several frames are one candidate"),
        ({"scores": [None] * 24}, r"line 1: some candidates have no score \(null\)"),
    ],
)
def test_what_does_not_fit_is_that_questions_error(tmp_path, row, message):
    with pytest.raises(QuestionError, match=message):
        chosen(frames_file(tmp_path, row), 4, query())


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no line"),
        ("{", "line 1: no JSON"),
        ('{"question_id": "q"}', "line 1: no object with a 'video'"),
        ('{"video": "v"}', "line 1: neither 'question_id' nor 'question'"),
        ('{"video": "v", "question_id": "q"}', "line 1: none of frames, seconds, scores"),
        ('{"video": "v", "question_id": "q", "frames": [1.5]}', "line 1: frames must be a list of whole numbers"),
        ('{"video": "v", "question_id": "q", "scores": [1e999]}', "line 1: scores must be a list of numbers"),
        ('{"video": "v", "question_id": "q", "scores": [NaN]}', r"line 1: no JSON \(NaN is no JSON\)"),
        ('\n{"video": "v", "video": "w"}', r"line 2: no JSON \('video' stands twice\)"),
        pytest.param("[" * 100_000, r"line 1: no JSON \(nested too deep\)", id="deep"),
        ('{"video": "nowhere/v.mp4", "question_id": "q", "frames": [1]}', "line 1: video 'nowhere/v.mp4' is not there"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "frames.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        xcomp.load_selector("frames_file", file=str(path))


def test_frames_that_a_run_exports_are_shown_by_another(tiny_run, tmp_path):
    """A run of several arms, its file, and a run that shows the frames of one of them."""
    file = tmp_path / "frames.jsonl"
    arms = [{"name": "drawn", "selector": "random"}, {"name": "even", "selector": "uniform"}]
    tiny_run |= {"arms": arms, "export_frames": str(file)}
    first = compare(parse_config(tiny_run, "run"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    records = [json.loads(line) for line in (first / "records.jsonl").read_text().splitlines()]
    assert len(rows) == len(records) and {row["arm"] for row in rows} == {"drawn", "even"}
    arms = [{"name": "again", "selector": {"name": "frames_file", "file": str(file), "arm": "drawn"}}]
    arms += [{"name": "scores", "selector": {**arms[0]["selector"], "use": "scores"}}]
    again = compare(parse_config({**tiny_run, "name": "again", "arms": arms, "export_frames": None}, "run"))
    shown = {r["question_id"]: r["frames"] for r in records if r["arm"] == "drawn"}
    found = [json.loads(line) for line in (again / "records.jsonl").read_text().splitlines()]
    assert len(found) == 2 * len(shown) and all(r["frames"] == shown[r["question_id"]] for r in found)
    nobody = {"name": "frames_file", "file": str(file)}
    unclear = compare_error({**tiny_run, "name": "unclear", "arms": [{"name": "x", "selector": nobody}]})
    assert "has several lines about question" in unclear and "choose by 'arm'" in unclear


def compare_error(run):
    try:
        compare(parse_config(run, "run"))
    except ValueError as error:
        return str(error)
    raise AssertionError("it went through")


# --- features on disk -------------------------------------------------------------------------------------------------


def stored_run(tiny_run, tmp_path, name, clip):
    node = {"name": "clip_similarity", "checkpoint": clip, "store": str(tmp_path / "store")}
    arms = [{"name": "clip", "selector": node}, {"name": "focus", "selector": {"name": "focus", "scorer": node}}]
    folder = compare(parse_config({**tiny_run, "name": name, "arms": arms}, "run"))
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_features_stay_for_other_runs(tiny_run, tmp_path, monkeypatch):
    clip = save_tiny_clip(tmp_path / "clip")
    first = stored_run(tiny_run, tmp_path, "first", clip)
    files = list((tmp_path / "store").iterdir())
    assert len(files) == 2 and all(f.suffix == ".safetensors" for f in files)  # one a video, nothing half
    assert load_file(files[0])["features"].shape == (8, 8)
    from xcomp.selectors.clip_similarity import CLIPSimilarity

    monkeypatch.setattr(CLIPSimilarity, "_frame_macs", lambda self: 0)  # which counts on a frame of zeros
    monkeypatch.setattr(CLIPSimilarity, "_embed_frames", None)  # nobody embeds a frame
    second = stored_run(tiny_run, tmp_path, "second", clip)
    for a, b in zip(first, second, strict=True):
        assert (a["frames"], a["scores"], a["text"]) == (b["frames"], b["scores"], b["text"])
        # What was not computed is not counted; the second arm of the first run found what the first had stored.
        assert b["macs"]["select"] < a["macs"]["select"] if a["arm"] == "clip" else b["macs"] == a["macs"]


def test_another_video_sampling_or_model_is_another_file(tiny_run, tmp_path):
    clip = save_tiny_clip(tmp_path / "clip")
    stored_run(tiny_run, tmp_path, "first", clip)
    stored_run({**tiny_run, "sampling": {"rate": 4, "min_frames": 16, "max_frames": 16}}, tmp_path, "denser", clip)
    assert len(list((tmp_path / "store").iterdir())) == 4
    stored_run(tiny_run, tmp_path, "other", save_tiny_clip(tmp_path / "half", dtype=torch.float16))
    assert len(list((tmp_path / "store").iterdir())) == 6


def test_a_damaged_file_is_named(tiny_run, tmp_path):
    clip = save_tiny_clip(tmp_path / "clip")
    stored_run(tiny_run, tmp_path, "first", clip)
    for file in (tmp_path / "store").iterdir():
        os.truncate(file, 20)
    with pytest.raises(ValueError, match="stored features '.*' cannot be read .*; delete the file"):
        stored_run(tiny_run, tmp_path, "second", clip)


WRITER = """
import sys, torch
from xcomp.decoding import VideoInfo
from xcomp.feature_store import FeatureStore
from xcomp.pixels import PixelFormat

folder, video, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
candidates = tuple(range(0, 4096, 2))
info = VideoInfo(video, 4096, 25.0, 164.0, "av", "1", candidates, tuple(i / 25 for i in candidates))
features = torch.arange(len(candidates) * 64, dtype=torch.float32).view(-1, 64)
for _ in range(times):
    FeatureStore(folder, "model", PixelFormat(8)).write(info, features)
    found = FeatureStore(folder, "model", PixelFormat(8)).read(info)
    assert torch.equal(torch.stack([found[i] for i in candidates]), features)
"""


def test_processes_that_write_one_file_at_the_same_time_never_show_half_of_it(tmp_path):
    video = tmp_path / "video.mp4"
    video.write_bytes(b"any content")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "store"), str(video), "40"]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for writer in writers:
        _, told = writer.communicate(timeout=120)
        assert writer.returncode == 0, told
    assert len(list((tmp_path / "store").iterdir())) == 1  # no partial file either


def test_an_arm_and_a_picker_hold_one_model(tiny_run, tmp_path, monkeypatch):
    from xcomp.selectors.clip_similarity import CLIPSimilarity

    loaded, load = [], CLIPSimilarity._load
    monkeypatch.setattr(CLIPSimilarity, "_load", lambda self, folder: loaded.append(folder) or load(self, folder))
    node = {"name": "clip_similarity", "checkpoint": save_tiny_clip(tmp_path / "clip")}
    arms = [{"name": "clip", "selector": node}, {"name": "aks", "selector": {"name": "aks", "scorer": node}}]
    compare(parse_config({**tiny_run, "arms": arms}, "run"))
    assert len(loaded) == 1

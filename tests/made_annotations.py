"""Small annotation files in each published form, made up; and where the real ones lie.

Real ones: ``$XCOMP_ANNOTATIONS``, else ``data/annotations`` beside the reference vectors. They are not part of the
repository.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from golden import ROOT
from PIL import Image

_given = os.environ.get("XCOMP_ANNOTATIONS")
ANNOTATIONS = Path(_given).resolve() if _given else ROOT.parent / "data" / "annotations"
needs_annotations = pytest.mark.skipif(
    not ANNOTATIONS.is_dir(), reason=f"no annotations in {ANNOTATIONS}; set XCOMP_ANNOTATIONS to their folder"
)

LVBENCH = {
    "video": "00000000",
    "type": "cartoon",
    "question": "What year appears?",
    "candidates": ["(A) 1636", "(B) 1366", "(C) 1363", "(D) 1633"],
    "answer": "(D) 1633",
    "question_type": ["key information retrieval"],
    "time_reference": "00:15-00:19",
}
LVBENCH_OFFICIAL = {
    "key": "abcDEF-_123",
    "type": "tv",
    "video_info": {"fps": 25},
    "qa": [
        {
            "uid": "7",
            "question": "What year appears?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633",
            "answer": "D",
            "question_type": ["key information retrieval", "reasoning"],
            "time_reference": "100:15-101:19",
        },
        {
            "uid": "8",
            "question": "Who speaks\nfirst?\n(A) Ann\n(B) Bob",
            "answer": "A",
            "question_type": ["entity recognition"],
            "time_reference": "None-None",
        },
    ],
}
MLVU = {
    "video": "made_1.mp4",
    "duration": 246,
    "question": "What colour is the door?",
    "candidates": ["Yellow", "Red", "Green", "Blue"],
    "answer": "Red",
    "question_type": "plotQA",
}
VIDEOMME = {
    "video_id": "601",
    "duration": "long",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "url": "https://example.org/watch?v=made-long-1",
    "videoID": "made-long-1",
    "question_id": "601-1",
    "task_type": "Counting Problem",
    "question": "How many\nlamps are there?",
    "options": ["A. One.", "B. Two.", "C. Three.", "D. None of these."],
    "answer": "C",
}
LONGVIDEOBENCH = {
    "id": "made_0",
    "video_id": "@user-made",
    "video_path": "made.mp4",
    "subtitle_path": "made_en.json",
    "question": "What is on the table while the man says hello?",
    "question_wo_referring_query": "What is on the table?",
    "candidates": ["A cup", "A hat", "A cat"],
    "correct_choice": 2,
    "position": [1, 2],
    "topic_category": "NP-News-Programs",
    "question_category": "T2O",
    "level": "L1-Perception",
    "duration_group": 15,
    "starting_timestamp_for_subtitles": 0,
    "duration": 12.5,
    "view_count": 3,
}
CUES = [
    {"timestamp": [0.2, 1.4], "text": "hello"},
    {"timestamp": [2.4, 2.6], "text": "never seen"},
    {"start": "00:00:03.500", "end": "00:00:05.000", "line": "a cup of tea"},
]


def longvideobench_row(record: dict[str, Any]) -> dict[str, Any]:
    """A JSON record as a parquet row."""
    left_out = ("candidates", "position", "level", "view_count", "question_wo_referring_query")
    options = [*record["candidates"], *["N/A"] * 5][:5]
    row = {key: value for key, value in record.items() if key not in left_out}
    row["starting_timestamp_for_subtitles"] = float(row["starting_timestamp_for_subtitles"])
    return row | {f"option{i}": option for i, option in enumerate(options)}


def write_json(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, records: list[dict[str, Any]]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def make(name: str, folder: Path) -> dict[str, Any]:
    """Options for a benchmark of two questions, whose annotations and (empty) videos lie in ``folder``."""
    videos = folder / "media"
    if name == "lvbench":
        touch(videos / "00000000.mp4", videos / "1.mp4")
        content = [LVBENCH, LVBENCH | {"video": "1", "answer": "(B) 1366"}]
        return {"annotations": write_json(folder / "lvbench_clean.json", content), "videos": str(videos)}
    if name == "mlvu":
        touch(videos / "1_plotQA" / "made_1.mp4")
        content = [MLVU, MLVU | {"question": "And the wall?", "answer": "Blue"}]
        return {"annotations": write_json(folder / "1_plotQA.json", content), "videos": str(videos)}
    if name == "videomme":
        touch(videos / "made-long-1.mp4")
        content = [VIDEOMME, VIDEOMME | {"question_id": "601-2", "answer": "A"}]
        return {"annotations": write_parquet(folder / "test.parquet", content), "videos": str(videos)}
    if name == "longvideobench":
        touch(videos / "made.mp4")
        write_json(videos / "subtitles" / "made_en.json", CUES)
        content = [LONGVIDEOBENCH, LONGVIDEOBENCH | {"id": "made_1", "correct_choice": 0}]
        return {"annotations": write_json(folder / "lvb_val.json", content), "videos": str(videos)}
    if name == "niah":
        return _make_niah(folder)
    raise AssertionError(f"no files are made for {name!r}")


def _make_niah(folder: Path) -> dict[str, Any]:
    """Two pictures of one colour (and a third), and a grey video of 24 seconds."""
    ask = "Which colour?\nOptions: (A) {}\n(B) {}\nOnly give the best option. Best option: ("
    (folder / "images" / "single").mkdir(parents=True)
    for name, colour in (("red.jpg", (255, 0, 0)), ("green.png", (0, 255, 0)), ("blue.jpg", (0, 0, 255))):
        Image.new("RGB", (40, 30), colour).save(folder / "images" / "single" / name)
    records = [
        {"id": 0, "image": "single/red.jpg", "question": ask.format("red", "blue"), "answer": "B"},
        {"id": 1, "image": "single/green.png", "question": ask.format("red", "green"), "answer": "B"},
    ]
    with av.open(str(folder / "hay.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=2, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for grey in np.linspace(90, 160, 48).astype(np.uint8):
            picture = np.full((48, 64, 3), grey, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return {
        "annotations": write_json(folder / "niah-coco-singlehop_20.json", records),
        "images": str(folder / "images"),
        "haystack": str(folder / "hay.mkv"),
        "frames": [16],
        "depths": [0.0, 0.5],
        "root": str(folder / "niah"),
    }

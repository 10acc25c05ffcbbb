"""Runs as a comparison leaves them, made up: run.json's content and records."""

import json
import math
from pathlib import Path

from xcomp.compare.analysis import Run, analyse

ARMS = [("uniform", "none"), ("uniform", "lp_comp"), ("qc_comp", "lp_comp")]


def make_record(arm, video, question, *, selector, compressor, frames, correct):
    tokens = [4 * frames, 4 * frames, (1 if compressor == "lp_comp" else 4) * frames]
    candidates = [i / 2 for i in range(40)]
    times = candidates[:: 40 // frames] if selector == "uniform" else candidates[10 : 10 + frames]
    return {
        "arm": arm,
        "question_id": f"v{video}-q{question}",
        "video": f"/videos/{video}.mp4",
        "category": ["order", "needle"][question],
        "question": f"What of {question}?",
        "options": ["red", "blue"],
        "answer": 1,
        "references": [],
        "labels": {},
        "prompt_sha": f"{video:08x}{question:08x}",
        "prediction": 1 if correct else 0,
        "correct": correct,
        "score": float(correct),
        "metrics": {},
        "text": "(B)",
        "frames": [int(2 * t) for t in times],
        "times": times,
        "events": [[5.0, 7.0]],
        "duration": 20.0,
        "num_frames": frames,
        "tokens_given": 16 * frames,
        "tokens_in": tokens[0],
        "tokens_out": tokens[-1],
        "tokens_per_layer": tokens,
        "macs": {"vision": 500_000_000 * frames, "prefill": 1_000_000_000 * frames},
        "seconds": {"vision": 0.5, "prefill": 0.5 + video},
        "seconds_amortised": {"vision": 0.125, "prefill": 0.25},
        "seconds_waiting": 0.0,
        "seconds_harness": 0.02,
        "peak_memory": {"host": 2_000_000_000 + video},
        "scores": [math.exp(-((t - 6) ** 2)) for t in candidates] if selector == "qc_comp" else None,
        "candidate_times": candidates if selector == "qc_comp" else None,
        "error": None,
    }


def make_run(budgets=(4, 8), methods=ARMS, videos=5):
    """run.json's content, and records in which method m gets the first 2 + m of 5 videos right."""
    arms, records = [], []
    for m, (selector, compressor) in enumerate(methods):
        for frames in budgets:
            name = f"{selector}+{compressor}@{frames}"
            parts = {"selector": selector, "compressor": compressor, "frames": frames}
            group = f"{selector} and {compressor}"
            arms.append({"name": name, "group": group, "backbone": "tiny", "checkpoint": None, **parts})
            records += [
                make_record(name, video, question, correct=video < 2 + m, **parts)
                for video in range(videos)
                for question in range(2)
            ]
    run = {
        "schema": 2,
        "name": "toy",
        "config": {"seed": 3, "arms": arms},
        "versions": {"torch": "2.9.9"},
        "hardware": {"name": "A Very Fast Machine", "dtype": "float32"},
        "git_commit": "abc1234",
        "arms": arms,
        "benchmark": {"name": "needle", "seed": 0},
    }
    return run, records


def write_run(folder, run, records):
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def analysed(run, records, options=None):
    """The analysis of one run."""
    return analyse([Run(Path("toy"), run, records)], options)

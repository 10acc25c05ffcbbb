"""What sharing a video brings: many questions and arms against one question of one arm, start of the program included.

    python perf/sharing.py                       # ten minutes of 720p, 128 frames, 12 questions, 3 arms; QC-Comp
    python perf/sharing.py --memory              # peak memory on an hour of 1080p at 1,024 and 8,192 candidate frames
    python perf/sharing.py --video FILE          # another file

The videos are made by repeating a short clip without encoding again (``--clip``, by default four seconds of moving
noise in H.264 with a keyframe every two seconds). Commands run one after the other, in turns. Records of the shared run
are compared with those of one question at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from measure import about, spread, write

QUESTIONS = [
    "What moves across the picture?", "Which colour is the background?", "Where does the bright square begin?",
    "How many squares are there?", "What happens at the end?", "Is the picture sharp?", "Which symbol appears first?",
    "What stands in the middle?", "Does anything stay still?", "Where is it dark?", "What is the largest thing?",
    "Which corner is empty?",
]  # fmt: skip
TIMED = ("seconds", "seconds_amortised", "seconds_waiting", "seconds_harness", "peak_memory")
BENCHMARK = '''
import json
from dataclasses import dataclass
from xcomp.benchmark import Benchmark, Question


class Listed(Benchmark):
    """Questions of a JSON list; ``only``: the number of a single one."""

    @dataclass(kw_only=True)
    class Config:
        file: str
        only: int | None = None

    def questions(self):
        found = [Question(f"q{i:02d}", *q, ("yes", "no", "left", "right"), 0)
                 for i, q in enumerate(json.load(open(self.config.file)))]
        return found if self.config.only is None else [found[self.config.only]]
'''
ARMS = [
    {"name": "no compression", "frames": 128},
    {"name": "LP-Comp", "compressor": "lp_comp", "frames": 128},
    {"name": "average pooling", "compressor": {"name": "avg_pool", "tokens": 8}, "frames": 128},
]
QC_COMP = {"name": "qc_comp", "chunk_frames": 64, "clip_frames": 4, "window_clips": 4, "window_stride": 2,
           "first_layer": 0, "last_layer": 0.5}  # fmt: skip


def make_clip(path: Path, height: int) -> Path:
    """Four seconds of H.264 at 25 frames a second: a picture of coarse noise that moves, and finer noise upon it."""
    width, rate, rng = height * 16 // 9 // 2 * 2, 25, np.random.default_rng(0)
    ground = rng.integers(40, 200, (height // 20 + 1, width // 20 + 10, 3), dtype=np.uint8)
    ground = np.repeat(np.repeat(ground, 20, 0), 20, 1)
    options = {"preset": "veryfast", "g": str(2 * rate), "bf": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(4 * rate):
            frame = ground[:height, i : i + width] + rng.integers(0, 20, (height, width, 1), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def repeat_clip(clip: Path, path: Path, seconds: int) -> Path:
    """The clip's packets over and over, until ``seconds`` are full."""
    with av.open(str(clip)) as source:
        stream = source.streams.video[0]
        packets = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in source.demux(stream) if p.dts is not None]
        length, base = round(stream.frames / stream.average_rate / stream.time_base), stream.time_base
        with av.open(str(path), "w") as output:
            target = output.add_stream_from_template(stream)
            for number in range(max(1, round(seconds / (length * base)))):
                for data, pts, dts, key in packets:
                    packet = av.Packet(data)
                    packet.pts, packet.dts = pts + number * length, dts + number * length
                    packet.time_base, packet.stream, packet.is_keyframe = base, target, key
                    output.mux(packet)
    return path


def run(folder: Path, name: str, **config: Any) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of ``xcomp compare`` from its start to its end, and its records."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "output": str(folder / "runs"), "plugins": [str(folder)], **config}))
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "xcomp.cli", "compare", str(path)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    lines = (folder / "runs" / name / "records.jsonl").read_text().splitlines()
    return seconds, [json.loads(line) for line in lines]


def sharing(folder: Path, video: Path, repeats: int) -> list[dict[str, Any]]:
    (folder / "listed.py").write_text(BENCHMARK)
    (folder / "questions.json").write_text(json.dumps([[str(video), q] for q in QUESTIONS]))
    common = {
        "sampling": {"rate": 1, "min_frames": 8, "max_frames": 128, "multiple": 8},
        "backbone": {"name": "videochat_flash", "checkpoint": "tiny_lp_comp"},
        "generation": {"max_new_tokens": 6},
        "batch_size": 4,
        "trainer": {"enable_progress_bar": False},
    }
    many = {"name": "listed", "file": str(folder / "questions.json")}
    chosen = [{"name": "QC-Comp", "compressor": "lp_comp", "selector": QC_COMP, "frames": 16}]
    cases = {
        "one question, one arm": {"benchmark": {**many, "only": 0}, "arms": ARMS[1:2]},
        "12 questions, 3 arms": {"benchmark": many, "arms": ARMS},
        "QC-Comp, one question": {"benchmark": {**many, "only": 0}, "arms": chosen},
        "QC-Comp, 12 questions": {"benchmark": many, "arms": chosen},
    }
    taken: dict[str, list[float]] = {name: [] for name in cases}
    records: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(repeats):
        for number, (name, case) in enumerate(cases.items()):
            seconds, records[name] = run(folder, f"case_{number}_{repeat}", **common, **case)
            taken[name].append(seconds)
            print(f"{name:<24} {seconds:8.1f} s", flush=True)
    equal = all(same_alone(folder, record, common, many, ARMS + chosen)
                for name in ("12 questions, 3 arms", "QC-Comp, 12 questions") for record in records[name])  # fmt: skip
    rows = []
    for one, all_of_them in (tuple(cases)[:2], tuple(cases)[2:]):
        base = spread(taken[one])["seconds_median"]
        for name in (one, all_of_them):
            row = {"what": "sharing", "variant": name, **spread(taken[name])}
            row |= {"times_the_first": round(row["seconds_median"] / base, 3), "records_equal": equal}
            rows.append(row)
            print(f"{name:<24} {row['times_the_first']:.2f} × the first", flush=True)
    return rows


def same_alone(folder: Path, record: dict[str, Any], common: dict, benchmark: dict, arms: list[dict]) -> bool:
    """Whether a question asked alone has the same record, but for what it took."""
    number = int(record["question_id"][1:])
    if number not in (0, 5, 11):  # three of twelve stand for the rest
        return True
    (arm,) = (arm for arm in arms if arm["name"] == record["arm"])
    name = f"alone_{number}_{arms.index(arm)}"
    _, (alone,) = run(folder, name, **common, benchmark={**benchmark, "only": number}, arms=[arm])
    different = [key for key in record if key not in TIMED and record[key] != alone[key]]
    if different:
        print(f"{record['arm']}, {record['question_id']}: {different} differ", flush=True)
    return not different


def memory(folder: Path, video: Path, counts: list[int]) -> list[dict[str, Any]]:
    """Peak of all processes of ``xcomp evaluate`` together (proportional set size), a sample every 0.1 s."""
    (folder / "listed.py").write_text(BENCHMARK)
    (folder / "questions.json").write_text(json.dumps([[str(video), QUESTIONS[0]]]))
    rows = []
    for count in counts:
        config = {
            "name": f"memory_{count}", "output": str(folder / "runs"), "plugins": [str(folder)],
            "benchmark": {"name": "listed", "file": str(folder / "questions.json")},
            "sampling": {"rate": 8, "min_frames": 8, "max_frames": count, "multiple": 8},
            "backbone": {"name": "videochat_flash", "architecture": narrow(), "tokenizer": tokenizer()},
            "compressor": "lp_comp", "frames": 64,
            "selector": {"name": "qc_comp", "chunk_frames": 256, "first_layer": 0, "last_layer": 0.5},
            "generation": {"max_new_tokens": 2}, "trainer": {"enable_progress_bar": False},
        }  # fmt: skip
        path = folder / "memory.yaml"
        path.write_text(yaml.safe_dump(config))
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "xcomp.cli", "evaluate", str(path)], start_new_session=True)
        peak = parts = 0
        while process.poll() is None:
            sizes = tree_megabytes(process.pid)
            if sum(sizes) > peak:
                peak, parts = sum(sizes), sizes
            time.sleep(0.1)
        record = json.loads((folder / "runs" / f"memory_{count}" / "records.jsonl").read_text())
        row = {"what": "memory", "variant": f"{count} candidate frames", "peak_megabytes": round(peak)}
        row |= {"seconds_median": round(time.perf_counter() - started, 1), "processes": len(parts)}
        rows.append(row | {"error": record["error"]})
        print(row, [round(p) for p in parts], record.get("seconds"), record["error"], flush=True)
    return rows


def narrow() -> dict[str, Any]:
    """VideoChat-Flash with pictures of 224 pixels and little else."""
    return {
        "vocab_size": 480, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True,
        "max_position_embeddings": 200_000, "mm_vision_tower": "umt-large", "mm_vision_select_layer": -2,
        "mm_projector_type": "tome16_mlp_hd64", "mm_hidden_size": 64, "mm_local_num_frames": 4,
        "vision_config": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224,
                          "patch_size": 32},
    }  # fmt: skip


def tokenizer() -> str:
    from xcomp.checkpoint import find_folder

    return str(find_folder("tiny"))


def tree_megabytes(root: int) -> list[float]:
    """Proportional set sizes of a process and all that it started (its session)."""
    sizes = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            if os.getsid(int(entry)) == root:
                lines = Path(f"/proc/{entry}/smaps_rollup").read_text().splitlines()
                sizes.append(next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024)
        except (OSError, StopIteration):
            continue
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", type=Path, help="a short video to repeat")
    parser.add_argument("--video", type=Path, help="a whole video, as it is")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1024, 8192])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds, height = (3600, 1080) if given.memory else (600, 720)
        video = given.video
        if video is None:
            clip = given.clip or make_clip(folder / "clip.mp4", height)
            video = repeat_clip(clip, folder / "video.mp4", seconds)
        rows = memory(folder, video, given.candidates) if given.memory else sharing(folder, video, given.repeats)
    source = given.video or given.clip
    video_name = f"{source.name if source else f'made, {height}p'}, {seconds} s"
    write("sharing-cpu", [about("cpu") | {"video": video_name} | row for row in rows])


if __name__ == "__main__":
    main()

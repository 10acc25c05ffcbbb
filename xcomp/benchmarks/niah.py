"""Needle in a haystack as VideoChat-Flash asks it: pictures among thousands of frames (arXiv 2501.00574).

Read are ``niah-coco-singlehop_20.json`` (20 questions, a picture each) and ``niah-coco-multihop-100.json`` (100 chains
of 5 to 7 pictures, of which each names the next; two questions a chain: which caption the last one has, and one on what
it shows). Pictures and haystack are those of OpenGVLab/NIAH-Video.

A question's video is a folder of links to the haystack's frames, one a second, in which each picture stands for four
frames. Single-hop: behind ``int(depth · frames)`` of them. Multi-hop: the first picture opens the video, the last ends
it, and equal stretches of haystack lie between. Beyond 7,500 frames half as many are shown twice over, as published.

``events`` are when the picture is seen that the questions are about: in a chain the one whose name does not begin with
``niah_``.

Deviations: stretches are whole clips of four frames; pictures are resized to the haystack's size first; the prompt is
the backbone's, with its sentence on time; the answer is generated, not read off one pass over the right one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from xcomp.annotations import Record, by_label, check_record, mean_score, read_annotations
from xcomp.answer_parsers import check_parser, parse_with
from xcomp.benchmark import LETTERS, Benchmark, Question
from xcomp.video import Video, VideoError

WHO = "niah"
CLIP = 4  # frames that a picture stands for
MOST_FRAMES = 7500  # beyond it the haystack is shown twice
SINGLE = {"id": int, "image": str, "question": str, "answer": str}
MULTI = {"images": list, "question1": str, "answer1": str, "question2": str, "answer2": str}
TAIL = "\nOnly give the best option. Best option: ("


class NIAH(Benchmark):
    """Pictures hidden in a long video, one by one or as a chain."""

    axes = ("frames", "part")  # part: a single picture's depth, or which of the two questions on a chain

    @dataclass(kw_only=True)
    class Config:
        annotations: str  # niah-coco-singlehop_20.json or niah-coco-multihop-100.json
        images: str  # folder of the pictures, with single/ and multi/
        haystack: str  # the long video
        frames: list[int] = field(default_factory=lambda: [1000])  # of the haystack, one a second; multiples of 4
        depths: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])  # of single pictures
        parser: str = "videochat_flash"  # how answers are read (xcomp.answer_parsers)
        root: str = "runs/niah"  # the haystack's frames, and the folders of links, are written here

        def __post_init__(self) -> None:
            check_parser(self.parser)
            if wrong := [n for n in self.frames if n < 2 * CLIP or n % CLIP]:
                raise ValueError(f"frames holds {wrong[0]}; it must be a multiple of {CLIP} from {2 * CLIP}")
            if wrong := [depth for depth in self.depths if not 0 <= depth <= 1]:
                raise ValueError(f"depths holds {wrong[0]}; it must be 0..1")
            for name, values in (("frames", self.frames), ("depths", self.depths)):
                if not values or len(set(values)) < len(values):
                    raise ValueError(f"{name} is {values}; it must name at least one, each once")

    def questions(self) -> list[Question]:
        """All questions. Writes the videos that are missing."""
        path = Path(self.config.annotations)
        records = read_annotations(WHO, path, (".json",))
        chains = isinstance(records[0], dict) and "images" in records[0]
        for number, record in enumerate(records):
            check_record(WHO, f"'{path}', record {number + 1}", record, MULTI if chains else SINGLE)
        found = []
        for count in self.config.frames:
            for number, record in enumerate(records):
                where = f"'{path}', record {number + 1}"
                found += self._chain(where, number, record, count) if chains else self._single(where, record, count)
        return found

    def _single(self, where: str, record: Record, count: int) -> Iterator[Question]:
        for depth in self.config.depths:
            before = _whole(depth * count)
            name = f"single-{record['id']:02d}-{count}-{depth:g}"
            video, times = self._video(name, [record["image"]], [before, count - before])
            labels = {"frames": (f"{count}",), "part": (f"depth {depth:g}",)}
            yield _question(where, name, video, record["question"], record["answer"], times, labels)

    def _chain(self, where: str, number: int, record: Record, count: int) -> Iterator[Question]:
        images = record["images"]
        if len(images) < 2:
            raise ValueError(f"{WHO}: {where}: a chain has at least 2 images, not {len(images)}")
        stretch = _whole(count / (len(images) - 1))
        name = f"multi-{number:03d}-{count}"
        video, times = self._video(name, images, [0, *[stretch] * (len(images) - 1), 0])
        asked = [time for image, time in zip(images, times) if not Path(image).name.startswith("niah_")]
        if len(asked) == 1:  # otherwise it cannot be told which picture the questions are about
            times = tuple(asked)
        for part, key in (("caption", "1"), ("question", "2")):
            labels = {"frames": (f"{count}",), "part": (part,)}
            text, answer = record[f"question{key}"], record[f"answer{key}"]
            yield _question(where, f"{name}-{part}", video, text, answer, times, labels)

    def prompt(self, question: Question) -> str:
        return f"{question.question}\nOptions: " + "\n".join(question.options) + TAIL

    def parse(self, text: str, question: Question) -> int | None:
        return parse_with(self.config.parser, text, question.options)

    @classmethod
    def metrics(cls, records: Any) -> dict[str, float]:
        """Single-hop: the mean over cells of frames and depth. Multi-hop: of either question, and chains with both."""
        records = list(records)
        parts = by_label(records, "part")
        cells = [c for part, of_part in parts.items() if "depth" in part for c in by_label(of_part, "frames").values()]
        found = {"accuracy": mean_score(records)}
        if cells:
            return found | {"mean of cells": sum(map(mean_score, cells)) / len(cells)}
        chains: dict[str, float] = {}
        for record in records:
            chains[record["video"]] = min(chains.get(record["video"], 1.0), float(record["score"]))
        found |= {part: mean_score(of_part) for part, of_part in parts.items()}
        return found | {"both right": 100 * sum(chains.values()) / max(1, len(chains))}

    # --- videos -------------------------------------------------------------------------------------------------------

    def _video(
        self, name: str, images: Sequence[str], stretches: Sequence[int]
    ) -> tuple[str, tuple[tuple[float, float], ...]]:
        """The folder of a video: haystack before each image and behind the last; and when these are seen."""
        hay = iter(self._haystack(sum(stretches)))
        pictures = [self._picture(image) for image in images]
        frames: list[Path] = []
        times = []
        for picture, stretch in zip(pictures, stretches):
            frames += islice(hay, stretch)
            times.append((float(len(frames)), float(len(frames) + CLIP)))
            frames += [picture] * CLIP
        shown = hashlib.sha256(" ".join(picture.name for picture in pictures).encode()).hexdigest()[:8]
        folder = self._folder / f"{name}-{shown}"
        if not folder.is_dir():
            _link(folder, [*frames, *hay])
        return str(folder), tuple(times)

    @property
    def _folder(self) -> Path:
        """Named after the haystack, so that two are not mixed."""
        path = Path(self.config.haystack)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ValueError(f"{WHO}: haystack '{path}' cannot be read: {error.strerror}") from error
        said = f"{path.resolve()} {size} {Path(self.config.images).resolve()}"
        return Path(self.config.root) / hashlib.sha256(said.encode()).hexdigest()[:10]

    def _haystack(self, count: int) -> list[Path]:
        """``count`` frames of the haystack, one a second from its start; more than ``MOST_FRAMES`` come twice."""
        wanted = count // 2 if count > MOST_FRAMES else count
        paths = [self._folder / "haystack" / f"frame_{second:05d}.jpg" for second in range(wanted)]
        missing = [second for second, path in enumerate(paths) if not path.is_file()]
        if missing:
            self._decode(missing, paths)
        return [paths[i % wanted] for i in range(count)]

    def _decode(self, seconds: Sequence[int], paths: Sequence[Path]) -> None:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        try:
            with Video(self.config.haystack) as video:
                numbers = [round(second * video.fps) for second in seconds]
                if numbers[-1] >= video.num_frames:
                    reason = f"lasts {video.duration:.0f} s, but {len(paths)} frames, one a second, are asked for"
                    raise ValueError(f"{WHO}: haystack '{self.config.haystack}' {reason}")
                for second, (_, picture) in zip(seconds, video.read(numbers), strict=True):
                    _save(Image.fromarray(picture), paths[second])
        except VideoError as error:
            raise ValueError(f"{WHO}: haystack: {error}") from error

    def _picture(self, name: str) -> Path:
        """A picture at the size of the haystack's frames, in a file named after its name, size and time."""
        source = Path(self.config.images) / name
        try:
            about = source.stat()
            said = f"{name} {about.st_size} {about.st_mtime_ns}"
            path = self._folder / "pictures" / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.jpg"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                with Image.open(self._folder / "haystack" / "frame_00000.jpg") as frame:
                    size = frame.size
                with Image.open(source) as image:
                    _save(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), path)
        except OSError as error:
            raise ValueError(f"{WHO}: picture '{source}' cannot be read: {error}") from error
        return path


def _whole(frames: float) -> int:
    """``frames`` rounded down to whole clips."""
    return int(frames + 1e-6) // CLIP * CLIP


def _question(
    where: str,
    name: str,
    video: str,
    text: str,
    answer: str,
    times: tuple[tuple[float, float], ...],
    labels: dict[str, tuple[str, ...]],
) -> Question:
    """A question whose text ends in its options and the request for a letter."""
    head, marked, options = text.removesuffix(TAIL).partition("\nOptions: ")
    choices = tuple(re.split(r"\n(?=\([A-Z]\) )", options))
    lettered = all(choice.startswith(f"({letter}) ") for letter, choice in zip(LETTERS, choices))
    if not (text.endswith(TAIL) and marked and lettered and len(choices) >= 2):
        raise ValueError(
            f"{WHO}: {where}: a question must end with 'Options: (A) …' and 'Best option: (', not {text!r:.80}"
        )
    if answer not in list(LETTERS[: len(choices)]):
        raise ValueError(f"{WHO}: {where}: the answer {answer!r} is no letter of an option")
    right = LETTERS.index(answer)
    return Question(
        f"{WHO}-{name}", video, head, choices, right, category=labels["frames"][0], labels=labels, events=times
    )


def _save(image: Image.Image, path: Path) -> None:
    """As JPEG; the file appears only when it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    image.save(partial, format="JPEG", quality=95)
    os.replace(partial, path)


def _link(folder: Path, frames: Sequence[Path]) -> None:
    """A folder of links to these frames in their order, which appears only when it is whole."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, frame in enumerate(frames):
        os.symlink(frame.resolve(), partial / f"frame_{number:05d}.jpg")
    try:
        os.replace(partial, folder)
    except OSError:  # another process was first
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.is_dir():
            raise

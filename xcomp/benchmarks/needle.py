"""Needle: questions about short events in long, procedurally drawn videos.

A video is a chain of scenes, each a quiet background with a few slowly moving distractor shapes. Somewhere in it a few
*events* happen: one symbol of one colour stands in one quadrant of the screen for a couple of seconds. Questions ask
for an event's colour, place or symbol, or which symbol came first; the other event's value is always one of the wrong
options, so a model that saw the wrong event, or none, gains nothing. The videos are drawn with numpy and written as
real H.264 files, so that they take the same way through reader, sampler and selector as any other video.

With ``hops`` events form chains: a dot in a symbol has the colour of the symbol to look for next, at any other time.
One question a video names the first symbol of a chain of so many events and asks for the last one, so that each has to
be found before one knows which comes next. The other events are a chain of their own.

Everything follows from (options, seed, split, video number): the same options give the same frames and questions, and
a larger ``num_videos`` extends a smaller set. Shape letters: T frames, H = W = ``size`` pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np

from xcomp.benchmark import LETTERS, Benchmark, Question, parse_option, words_prompt
from xcomp.parsing import parse_words

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 30),
    "green": (30, 160, 45),
    "blue": (40, 65, 235),
    "yellow": (245, 230, 40),
    "purple": (185, 45, 205),
    "cyan": (50, 220, 230),
    "white": (248, 248, 248),
    "orange": (250, 135, 15),
}
SYMBOLS = ("cross", "ring", "hourglass", "arch")
DISTRACTORS = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
CATEGORIES = ("colour", "where", "what", "first")
CHAIN = "chain"  # a category beside them, with ``hops``
ONCE = ("first", CHAIN)  # of which a video has one question
SPLITS = ("train", "validation", "test")
TASKS = ("describe", "open", "choice", "dialogue", "list")

WORLD_VERSION = 2  # part of a set's folder name: raise it with any change of what is drawn or how it is encoded
NATIVE_SIZE = 64  # the side that shape sizes, speeds and jitters below are given for
NUM_OPTIONS = 4


# --- The world: what happens in a video -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A symbol standing at ``centre`` (x, y pixels) in the frames ``start`` (inclusive) to ``stop`` (exclusive).

    ``dot``: the colour of the dot in it, which is that of the next event of its chain.
    """

    symbol: str
    colour: str
    place: str
    start: int
    stop: int
    centre: tuple[int, int]
    side: int
    dot: str | None = None

    @property
    def parts(self) -> list[tuple[str, str, int]]:
        """(shape, colour, side) of what is drawn, in this order, all around the centre."""
        return [(self.symbol, self.colour, self.side), *([("circle", self.dot, self.side // 3)] if self.dot else [])]

    @property
    def caption(self) -> str:
        return f"{self.colour} {self.symbol} {self.place}" + (f" and {self.dot} dot" if self.dot else "")


@dataclass(frozen=True)
class Distractor:
    """A shape moving from ``centre`` (x, y pixels) by ``velocity`` (pixels a frame), bouncing off the borders."""

    shape: str
    colour: str
    side: int
    centre: tuple[float, float]
    velocity: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """The frames ``start`` to ``stop`` (exclusive): a gradient between four corner colours, and its distractors."""

    start: int
    stop: int
    corners: tuple[tuple[int, int, int], ...]
    noise_seed: int
    distractors: tuple[Distractor, ...]


@dataclass(frozen=True)
class VideoSpec:
    """All that decides a video's frames. ``events`` are in the order of time, then of place."""

    index: int
    num_frames: int
    fps: int
    size: int
    scenes: tuple[Scene, ...]
    events: tuple[Event, ...]

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    def span(self, event: Event) -> tuple[float, float]:
        """When ``event`` is visible, in seconds."""
        return event.start / self.fps, event.stop / self.fps


def frame_times(spec: VideoSpec) -> np.ndarray:
    """(T,) seconds at which each frame appears."""
    return np.arange(spec.num_frames) / spec.fps


def make_spec(config: Needle.Config, index: int) -> VideoSpec:
    """Draws video ``index`` of the set that ``config`` describes."""
    rng = _generator(config, 0, index)
    seconds = float(rng.choice(config.lengths)) if config.lengths else config.seconds
    num_frames = _num_frames(seconds, config.fps)
    count = int(rng.choice(config.event_counts)) if config.event_counts else config.num_events
    events = _draw_events(rng, config, num_frames, count)
    if config.hops:
        events = _chained(_generator(config, 3, index), events, config.hops)
    scenes = _draw_scenes(rng, config, num_frames)
    return VideoSpec(index, num_frames, config.fps, config.size, scenes, events)


def _generator(config: Needle.Config, stream: int, *numbers: int) -> np.random.Generator:
    """Independent random numbers for each seed, split, stream (world, questions, answer slots, chains) and video."""
    return np.random.default_rng(np.random.SeedSequence([config.seed, SPLITS.index(config.split), stream, *numbers]))


def _num_frames(seconds: float, fps: int) -> int:
    return round(seconds * fps)


def _draw_events(rng: np.random.Generator, config: Needle.Config, num_frames: int, count: int) -> tuple[Event, ...]:
    starts, length = _draw_starts(rng, config, num_frames, count)
    scale = config.size / NATIVE_SIZE
    values = (rng.permutation(pool)[:count] for pool in (SYMBOLS, list(COLOURS), PLACES))
    events = []
    for symbol, colour, place, start in zip(*values, starts, strict=True):
        jitter = rng.integers(-3, 4, size=2)
        quadrant = PLACES.index(place)
        x, y = ((quadrant % 2) * 32 + 16 + jitter[0]) * scale, ((quadrant // 2) * 32 + 16 + jitter[1]) * scale
        side = round(int(rng.integers(26, 29)) * scale)
        event = Event(str(symbol), str(colour), str(place), start, start + length, (round(x), round(y)), side)
        events.append(event)
    return tuple(sorted(events, key=lambda event: (event.start, PLACES.index(event.place))))


def _chained(rng: np.random.Generator, events: tuple[Event, ...], hops: int) -> tuple[Event, ...]:
    """The events with dots: ``hops`` of them, in random order, are a chain, and the rest another."""
    order = rng.permutation(len(events)).tolist()
    following = {a: b for chain in (order[:hops], order[hops:]) for a, b in zip(chain, chain[1:])}
    dots = [events[following[i]].colour if i in following else None for i in range(len(events))]
    return tuple(replace(event, dot=dot) for event, dot in zip(events, dots, strict=True))


def chain_from(events: Sequence[Event], first: Event) -> list[Event]:
    """``first`` and what one gets to by the colours of the dots."""
    chain = [first]
    while chain[-1].dot is not None:
        chain.append(next(event for event in events if event.colour == chain[-1].dot))
    return chain


def _draw_starts(rng: np.random.Generator, config: Needle.Config, num_frames: int, count: int) -> tuple[list[int], int]:
    """First frames of the events, and their length: uniform over all ways to place them without overlap."""
    length = _num_frames(config.event_seconds, config.fps)
    if length >= num_frames:
        return [0] * count, num_frames
    # Ways to place `count` blocks in a row of frames are ways to choose `count` of the free frames and the blocks.
    free = num_frames - count * length
    chosen = np.sort(rng.choice(free + count, size=count, replace=False))
    return [int(slot) + i * (length - 1) for i, slot in enumerate(chosen)], length


def _draw_scenes(rng: np.random.Generator, config: Needle.Config, num_frames: int) -> tuple[Scene, ...]:
    bounds = [0]
    while bounds[-1] < num_frames:
        length = max(1, _num_frames(rng.uniform(2.0, 6.0), config.fps))
        bounds.append(min(bounds[-1] + length, num_frames))
    return tuple(_draw_scene(rng, config, a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True))


def _draw_scene(rng: np.random.Generator, config: Needle.Config, start: int, stop: int) -> Scene:
    base = rng.integers(35, 140) + rng.integers(-12, 13, size=3)
    corners = np.clip(base + rng.integers(-22, 23, size=(4, 1)) + rng.integers(-8, 9, size=(4, 3)), 0, 255)
    count = int(rng.integers(1, config.distractors + 1)) if config.distractors else 0
    distractors = tuple(_draw_distractor(rng, config) for _ in range(count))
    rows = tuple((int(r), int(g), int(b)) for r, g, b in corners)
    return Scene(start, stop, rows, int(rng.integers(2**31)), distractors)


def _draw_distractor(rng: np.random.Generator, config: Needle.Config) -> Distractor:
    scale = config.size / NATIVE_SIZE
    side = round(int(rng.integers(10, 17)) * scale)
    low, high = _track(side, config.size)
    x, y = rng.uniform(low, high, size=2)
    speed, angle = rng.uniform(2.0, 12.0) * scale / config.fps, rng.uniform(0, 2 * np.pi)
    velocity = (float(speed * np.cos(angle)), float(speed * np.sin(angle)))
    shape, colour = (pool[rng.integers(len(pool))] for pool in (DISTRACTORS, tuple(COLOURS)))
    return Distractor(shape, colour, side, (float(x), float(y)), velocity)


def _track(side: int, size: int) -> tuple[float, float]:
    """Lowest and highest centre of a sprite of ``side`` that stays whole within ``size`` pixels."""
    half = side / 2 + 1
    return half, size - half


# --- Drawing ----------------------------------------------------------------------------------------------------------


def _shape(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether the points (u right, v down, both -1..1) lie in the shape ``name``."""
    box = np.maximum(abs(u), abs(v))
    radius = np.hypot(u, v)
    if name == "cross":
        return np.minimum(abs(u), abs(v)) <= 0.34
    if name == "ring":
        return (radius <= 1) & (radius >= 0.5)
    if name == "hourglass":
        return abs(u) <= abs(v) * 0.92 + 0.06
    if name == "arch":
        return (abs(u) >= 0.42) | (v <= -0.35)
    if name == "circle":
        return radius <= 1
    if name == "square":
        return box <= 0.92
    if name == "triangle":
        return abs(u) <= (v + 1) / 2
    raise AssertionError(f"no shape {name!r}")


@lru_cache(maxsize=1024)
def sprite(name: str, colour: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A shape ``side`` pixels wide with a black outline of one pixel: colours (s, s, 3) uint8, mask (s, s, 1) bool."""
    fine = (np.arange(side * 4) + 0.5) / (side * 2) - 1
    inside = _shape(name, *np.meshgrid(fine, fine)).reshape(side, 4, side, 4).mean(axis=(1, 3)) >= 0.5
    body = np.pad(inside, 1)
    mask = np.zeros_like(body)
    for dy, dx in np.ndindex(3, 3):
        mask[dy : dy + side, dx : dx + side] |= inside
    pixels = np.where(body[..., None], np.array(COLOURS[colour], np.uint8), np.uint8(0))
    return pixels, mask[..., None]


def _corner(centre: np.ndarray | tuple[float, float], side: int, size: int) -> np.ndarray:
    """Left and top pixel of the sprites of ``side`` around ``centre`` (..., 2), kept within the frame."""
    corner = np.rint(np.asarray(centre) - (side + 2) / 2).astype(int)
    return np.clip(corner, 0, size - side - 2)


def _path(distractor: Distractor, num_frames: int, size: int) -> np.ndarray:
    """(T, 2) left and top pixel in each frame of its scene."""
    low, high = _track(distractor.side, size)
    straight = np.asarray(distractor.centre) + np.arange(num_frames)[:, None] * np.asarray(distractor.velocity) - low
    folded = (high - low) - abs(straight % (2 * (high - low)) - (high - low))
    return _corner(folded + low, distractor.side, size)


def _background(scene: Scene, size: int) -> np.ndarray:
    """(H, W, 3) uint8: the bilinear gradient of the corners plus noise that does not move."""
    corners = np.asarray(scene.corners, np.float32).reshape(2, 2, 3)
    t = np.linspace(0, 1, size, dtype=np.float32)
    rows = corners[0] + (corners[1] - corners[0]) * t[:, None, None]  # (H, 2, 3)
    gradient = rows[:, :1] + (rows[:, 1:] - rows[:, :1]) * t[None, :, None]
    noise = np.random.default_rng(scene.noise_seed).normal(0, 2.5, size=(size, size, 1))
    return np.clip(gradient + noise, 0, 255).astype(np.uint8)


def render_scene(spec: VideoSpec, scene: Scene) -> np.ndarray:
    """(T, H, W, 3) uint8: the frames of one scene."""
    num_frames = scene.stop - scene.start
    frames = np.repeat(_background(scene, spec.size)[None], num_frames, axis=0)
    for distractor in scene.distractors:
        pixels, mask = sprite(distractor.shape, distractor.colour, distractor.side)
        for frame, (x, y) in zip(frames, _path(distractor, num_frames, spec.size).tolist(), strict=True):
            np.copyto(frame[y : y + len(mask), x : x + len(mask)], pixels, where=mask)
    for event in spec.events:
        first, last = max(event.start - scene.start, 0), max(event.stop - scene.start, 0)
        for name, colour, side in event.parts:
            pixels, mask = sprite(name, colour, side)
            x, y = _corner(event.centre, side, spec.size).tolist()
            np.copyto(frames[first:last, y : y + len(mask), x : x + len(mask)], pixels, where=mask)
    return frames


def render(spec: VideoSpec) -> np.ndarray:
    """(T, H, W, 3) uint8: the whole video."""
    return np.concatenate([render_scene(spec, scene) for scene in spec.scenes])


def visible_shapes(spec: VideoSpec, frame: int) -> list[str]:
    """Captions ("red circle top left") of all shapes in ``frame``, by quadrant and from left to right in it.

    Distractors of which less than half is seen, the rest being behind other shapes, are left out.
    """
    scene = next(scene for scene in spec.scenes if scene.start <= frame < scene.stop)
    drawn = []
    for d in scene.distractors:
        x, y = _path(d, scene.stop - scene.start, spec.size)[frame - scene.start].tolist()
        drawn.append((d.colour, d.shape, d.side, x, y))
    for e in spec.events:
        if e.start <= frame < e.stop:
            drawn.append((e.colour, e.symbol, e.side, *_corner(e.centre, e.side, spec.size).tolist()))
    owner = np.full((spec.size, spec.size), -1)
    for i, (colour, name, side, x, y) in enumerate(drawn):
        owner[y : y + side + 2, x : x + side + 2][sprite(name, colour, side)[1][..., 0]] = i
    captions = []
    for i, (colour, name, side, x, y) in enumerate(drawn):
        if (owner == i).sum() * 2 >= sprite(name, colour, side)[1].sum():
            centre = x + side / 2 + 1, y + side / 2 + 1
            quadrant = 2 * (centre[1] >= spec.size / 2) + (centre[0] >= spec.size / 2)
            captions.append((quadrant, x, f"{colour} {name} {PLACES[quadrant]}"))
    return [caption for *_, caption in sorted(captions)]


def write_video(spec: VideoSpec, path: Path) -> None:
    """Encodes ``spec`` as H.264 (yuv420p, a keyframe every 16 frames) to ``path``, which appears only when complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with av.open(str(partial), "w", format="mp4") as container:
        options = {"preset": "ultrafast", "crf": "18", "g": "16", "keyint_min": "16", "threads": "1"}
        stream = container.add_stream("libx264", rate=spec.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = spec.size, spec.size, "yuv420p"
        for scene in spec.scenes:
            for frame in render_scene(spec, scene):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial, path)


# --- Questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ask:
    """A question before its options are put in order. ``events`` are those one has to see."""

    category: str
    text: str
    right: str
    wrong: tuple[str, ...]
    events: tuple[Event, ...]


def _ask(rng: np.random.Generator, spec: VideoSpec, category: str, event: Event) -> _Ask:
    """One question of ``category`` on ``event`` (the first of a chain), with wrong options in random order."""
    others = [other for other in spec.events if other is not event]
    if category == CHAIN:
        seen = tuple(chain_from(spec.events, event))
        where = bool(rng.integers(2))
        asked = "where on the screen is the last symbol?" if where else "which symbol is the last?"
        text = f"A dot has the colour of the next symbol. From the {event.colour} symbol on, {asked}"
        right, pool = (seen[-1].place, PLACES) if where else (seen[-1].symbol, SYMBOLS)
    elif category == "first":
        text, right, pool, seen = "Which symbol appears first?", spec.events[0].symbol, SYMBOLS, spec.events
    elif category == "colour":
        text, right, pool, seen = f"What colour is the {event.symbol}?", event.colour, tuple(COLOURS), (event,)
    elif category == "where":
        text, right, pool, seen = f"Where on the screen is the {event.symbol}?", event.place, PLACES, (event,)
    else:
        text, right, pool, seen = f"Which symbol is {event.colour}?", event.symbol, SYMBOLS, (event,)
    # Only colours are more than there are options; the other events' must be among the wrong ones.
    wanted = [other.colour for other in others] if category == "colour" else []
    return _Ask(category, text, right, _wrong(rng, pool, right, wanted), seen)


def _wrong(rng: np.random.Generator, pool: tuple[str, ...], right: str, wanted: list[str]) -> tuple[str, ...]:
    """Three values of ``pool`` other than ``right``, the ``wanted`` ones among them, in random order."""
    rest = [value for value in pool if value != right and value not in wanted]
    chosen = [*wanted, *rng.permutation(rest).tolist()][: NUM_OPTIONS - 1]
    return tuple(rng.permutation(chosen).tolist())


class Needle(Benchmark):
    """Short events in long videos; see the file's head."""

    generated = True

    @dataclass(kw_only=True)
    class Config:
        """Options. The video files depend on all but ``num_videos`` and those on questions."""

        split: str = "test"  # train, validation or test: never the same video twice
        num_videos: int = 100  # videos that are drawn
        seconds: float = 64.0  # length of every video ...
        lengths: list[float] = field(default_factory=list)  # ... or, if given, lengths to draw from for each video
        event_seconds: float = 2.0  # how long an event lasts; as long as the video or longer: events at the same time
        num_events: int = 2  # in every video ...
        event_counts: list[int] = field(default_factory=list)  # ... or, if given, counts to draw from for each video
        hops: int = 0  # events of the chain that one question follows, each naming the next by a dot; 0: no chains
        distractors: int = 3  # most distractor shapes in a scene, which has at least one; 0: none at all
        size: int = NATIVE_SIZE  # pixels, even
        fps: int = 8  # frames a second
        seed: int = 0  # of everything that is drawn; other splits draw other videos
        questions_per_video: int | None = None  # None: one of each category
        categories: list[str] = field(
            default_factory=list
        )  # of colour, where, what, first, chain; empty: all that apply
        answers: str = "letter"  # how to answer: by an option's letter, or in the option's words (for small models)
        root: str = "runs/needle"  # videos are written to <root>/<split>-<hash of the options>/

        def __post_init__(self) -> None:
            _check(self)

        @property
        def durations(self) -> list[float]:
            """The lengths in seconds that videos of the set can have."""
            return [float(seconds) for seconds in self.lengths or [self.seconds]]

        def simultaneous(self, num_frames: int) -> bool:
            """Whether events fill a video of ``num_frames``, so that none comes before another."""
            return _num_frames(self.event_seconds, self.fps) >= num_frames

        @property
        def counts(self) -> list[int]:
            """The numbers of events that videos of the set can have."""
            return self.event_counts or [self.num_events]

        def kinds(self, num_frames: int, num_events: int) -> tuple[str, ...]:
            """The categories asked of a video of ``num_frames`` with ``num_events``."""
            known = (*CATEGORIES, CHAIN) if self.hops else CATEGORIES
            ordered = num_events > 1 and not self.simultaneous(num_frames)
            return tuple(kind for kind in self.categories or known if kind != "first" or ordered)

        def most_questions(self, num_frames: int, num_events: int) -> int:
            """How many different questions a video of ``num_frames`` with ``num_events`` has."""
            return sum(1 if kind in ONCE else num_events for kind in self.kinds(num_frames, num_events))

    @property
    def folder(self) -> Path:
        """Where the videos lie: named after every option that decides a frame, so sets never mix."""
        config = self.config
        names = ("event_seconds", "num_events", "distractors", "size", "fps", "seed")
        options = {name: float(getattr(config, name)) for name in names}
        options |= {"lengths": config.durations, "version": WORLD_VERSION}
        options |= {"event_counts": config.event_counts} if config.event_counts else {}
        options |= {"hops": config.hops} if config.hops else {}
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:10]
        return Path(config.root) / f"{config.split}-{digest}"

    def path(self, index: int) -> Path:
        """The file of video ``index``."""
        return self.folder / f"{index:05d}.mp4"

    def specs(self) -> list[VideoSpec]:
        """What happens in each video. Writes nothing."""
        return [make_spec(self.config, index) for index in range(self.config.num_videos)]

    def generate(self) -> list[VideoSpec]:
        """Writes the videos that are missing, and last the manifest; returns what happens in each video."""
        specs = self.specs()
        missing = [spec for spec in specs if not self.path(spec.index).exists()]
        manifest = self.folder / "manifest.json"
        if not missing and manifest.exists():
            return specs
        self.folder.mkdir(parents=True, exist_ok=True)
        for spec in missing:
            write_video(spec, self.path(spec.index))
        _write_manifest(manifest, self.config, specs)
        return specs

    def questions(self) -> list[Question]:
        """All questions, video by video. Writes missing videos."""
        return [question for spec in self.generate() for question in self.video_questions(spec)]

    def video_questions(self, spec: VideoSpec) -> list[Question]:
        """The questions on one video. A second one of the same category is on another event."""
        rng = _generator(self.config, 1, spec.index)
        kinds = self.config.kinds(spec.num_frames, len(spec.events))
        order = {kind: rng.permutation(len(spec.events)).tolist() for kind in kinds}
        if CHAIN in kinds:
            order[CHAIN] = [i for i in order[CHAIN] if self._starts_chain(spec, spec.events[i])]
        questions = []
        for turn in range(len(spec.events)):
            for kind in rng.permutation(kinds).tolist():
                if turn == 0 or kind not in ONCE:
                    ask = _ask(rng, spec, kind, spec.events[order[kind][turn]])
                    questions.append(self._question(spec, ask, turn))
        return questions[: self.config.questions_per_video or len(kinds)]

    def _starts_chain(self, spec: VideoSpec, event: Event) -> bool:
        """Whether a chain of ``hops`` events begins here: no dot leads to it, and it leads on."""
        led_to = {other.dot for other in spec.events}
        return event.colour not in led_to and len(chain_from(spec.events, event)) == self.config.hops

    def _question(self, spec: VideoSpec, ask: _Ask, turn: int) -> Question:
        slot = self._slot(spec.index, ask.category, turn)
        options = (*ask.wrong[:slot], ask.right, *ask.wrong[slot:])
        name = f"needle-{self.config.split}-{spec.index:05d}-{ask.category}" + (f"-{turn + 1}" if turn else "")
        spans = tuple(spec.span(event) for event in ask.events)
        meta = {"seconds": spec.seconds, "events": _event_records(spec)}
        path = str(self.path(spec.index))
        return Question(name, path, ask.text, options, slot, category=ask.category, events=spans, meta=meta)

    def _slot(self, index: int, category: str, turn: int) -> int:
        """The right option's position: within each four videos in a row, every position once a category."""
        kind = (*CATEGORIES, CHAIN).index(category)
        rng = _generator(self.config, 2, index // NUM_OPTIONS, kind, turn)
        return int(rng.permutation(NUM_OPTIONS)[index % NUM_OPTIONS])

    def prompt(self, question: Question) -> str:
        if self.config.answers == "letter":
            return super().prompt(question)
        return words_prompt(question.question, question.options)

    def continuations(self, question: Question) -> tuple[str, ...]:
        return super().continuations(question) if self.config.answers == "letter" else question.options

    def parse(self, text: str, question: Question) -> int | None:
        """The option whose words are the answer; with letters, also the one whose letter it names."""
        parse = parse_option if self.config.answers == "letter" else parse_words
        return parse(text, question.options)

    def training_records(self, tasks: tuple[str, ...] = ("describe", "open", "choice")) -> list[dict[str, Any]]:
        """Conversations about the videos, in the record format of instruction data. Writes missing videos.

        ``describe`` names all events in the order of time, ``open`` asks the questions without options, ``choice``
        with options and for the right one, ``dialogue`` asks those of a video one after the other in one conversation,
        and ``list`` asks for all shapes visible in the middle of the video.
        """
        for task in tasks:
            _require(task in TASKS, f"tasks: {task!r} is not one of {', '.join(TASKS)}")
        return [record for spec in self.generate() for task in tasks for record in self._records(spec, task)]

    def _records(self, spec: VideoSpec, task: str) -> list[dict[str, Any]]:
        head = f"needle-{self.config.split}-{spec.index:05d}-{task}"
        if task == "describe":
            answer = ", ".join(event.caption for event in spec.events)
            return [self._record(spec, head, task, ("Describe the video.", answer))]
        if task == "list":
            answer = ", ".join(visible_shapes(spec, spec.num_frames // 2)) or "nothing"
            return [self._record(spec, head, task, ("List the shapes.", answer))]
        questions = self.video_questions(spec)
        turns = [self._turn(question, task) for question in questions]
        if task == "dialogue":
            return [self._record(spec, head, task, *turns)]
        names = [f"{head}-{question.id.split('-', 3)[3]}" for question in questions]
        return [self._record(spec, name, task, turn) for name, turn in zip(names, turns, strict=True)]

    def _turn(self, question: Question, task: str) -> tuple[str, str]:
        if task == "open":
            return question.question, question.options[question.answer]
        right = question.answer
        return self.prompt(question), LETTERS[right] if self.config.answers == "letter" else question.options[right]

    def _record(self, spec: VideoSpec, name: str, task: str, *dialogue: tuple[str, str]) -> dict[str, Any]:
        turns = []
        for i, (question, answer) in enumerate(dialogue):
            turns.append({"from": "human", "value": question if i else f"<image>\n{question}"})
            turns.append({"from": "gpt", "value": answer})
        video = str(self.path(spec.index))
        return {"id": name, "video": video, "conversations": turns, "seconds": spec.seconds, "task": task}


def _event_records(spec: VideoSpec) -> list[dict[str, Any]]:
    """The events as plain data, in seconds."""
    fields = ("symbol", "colour", "place", "dot")
    spans = ({"start": start, "end": end} for start, end in map(spec.span, spec.events))
    found = zip(spec.events, spans, strict=True)
    return [{n: getattr(e, n) for n in fields if getattr(e, n) is not None} | span for e, span in found]


def _write_manifest(path: Path, config: Needle.Config, specs: list[VideoSpec]) -> None:
    """Lists the set's videos and events. Nothing is read back from it: its presence says that the set is complete."""
    videos = [{"file": f"{s.index:05d}.mp4", "seconds": s.seconds, "events": _event_records(s)} for s in specs]
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps({"version": WORLD_VERSION, "options": asdict(config), "videos": videos}, indent=1))
    os.replace(partial, path)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"needle: {message}")


def _check(config: Needle.Config) -> None:
    """Refuses options out of range. Raises ValueError naming the option, its value and what it can be."""
    ranges = {"num_videos": (1, 99999), "num_events": (1, 4), "distractors": (0, 16), "size": (32, 1024)}
    for name, (low, high) in (ranges | {"fps": (1, 120), "seed": (0, 2**63)}).items():
        value = getattr(config, name)
        _require(isinstance(value, int) and low <= value <= high, f"{name}={value!r} must be an integer {low}..{high}")
    _require(config.size % 2 == 0, f"size={config.size} must be even, as H.264 stores colour at half resolution")
    _require(config.answers in ("letter", "words"), f"answers={config.answers!r} is not letter or words")
    _require(config.split in SPLITS, f"split={config.split!r} is not one of {', '.join(SPLITS)}")
    for category in config.categories:
        known = (*CATEGORIES, CHAIN)
        _require(category in known, f"categories: {category!r} is not one of {', '.join(known)}")
    _require(isinstance(config.hops, int) and config.hops >= 0, f"hops={config.hops!r} must be an integer from 0")
    fits = config.hops == 0 or 2 <= config.hops <= min(config.counts)
    few = f"every video must have so many events (num_events, event_counts), which are {min(config.counts)}"
    _require(fits, f"hops={config.hops} must be 0 or from 2, and {few}")
    _require(config.hops or CHAIN not in config.categories, "category 'chain' needs hops, from 2")
    _require(len(set(config.categories)) == len(config.categories), f"categories={config.categories} has one twice")
    for name, value in (("event_seconds", config.event_seconds), *(("seconds", s) for s in config.durations)):
        _require(math.isfinite(value), f"{name}={value} must be a number of seconds")
        _require(_num_frames(value, config.fps) >= 1, f"{name}={value} is less than a frame at {config.fps} fps")
    low, high = ranges["num_events"]
    for count in config.counts:
        _require(low <= count <= high, f"event_counts={config.event_counts} must be integers {low}..{high}")
    for seconds in config.durations:
        _check_length(config, seconds)


def _check_length(config: Needle.Config, seconds: float) -> None:
    """Refuses videos of ``seconds`` that cannot hold the events or answer the questions asked for."""
    frames, length = (_num_frames(s, config.fps) for s in (seconds, config.event_seconds))
    count = max(config.counts)
    fits = length >= frames or count * length <= frames
    _require(fits, f"{count} events of {config.event_seconds} s do not fit into a video of {seconds} s")
    ordered = count > 1 and length < frames
    _require(ordered or "first" not in config.categories, "category 'first' needs two events, one after the other")
    asked, most = config.questions_per_video, config.most_questions(frames, count)
    _require(asked is None or 1 <= asked <= most, f"questions_per_video={asked}: a video has 1..{most} questions")

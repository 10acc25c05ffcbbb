"""The needle benchmark: the same everywhere, balanced, and showing what its questions ask about."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from xcomp.benchmark import Question
from xcomp.benchmarks.needle import (
    CATEGORIES,
    COLOURS,
    DISTRACTORS,
    PLACES,
    SYMBOLS,
    Needle,
    VideoSpec,
    frame_times,
    render,
    sprite,
    visible_shapes,
)
from xcomp.video import Video


def needle(root: Path | str = "unused", **options) -> Needle:
    return Needle(Needle.Config(**{"num_videos": 3, "seconds": 6.0, "root": str(root)} | options))


def all_questions(benchmark: Needle) -> list[Question]:
    """Questions from the specs alone: no video is written."""
    return [question for spec in benchmark.specs() for question in benchmark.video_questions(spec)]


def decode(path: Path | str) -> np.ndarray:
    with Video(path) as video:
        return video.frames(range(video.num_frames)).numpy()


def truth(spec: VideoSpec, question: Question) -> str:
    """The right answer, worked out from the events alone."""
    if question.category == "first":
        assert question.events == tuple(map(spec.span, spec.events))
        return min(spec.events, key=lambda event: event.start).symbol
    words = question.question.removesuffix("?").split()
    event = next(event for event in spec.events if event.symbol in words or event.colour in words)
    assert question.events == (spec.span(event),)
    return {"colour": event.colour, "where": event.place, "what": event.symbol}[question.category]


# --- Determinism and splits -------------------------------------------------------------------------------------------


def test_same_options_give_same_videos_and_questions(tmp_path: Path) -> None:
    one, two = needle(tmp_path / "a"), needle(tmp_path / "b")
    first, second = one.questions(), two.questions()
    for i in range(3):
        assert one.path(i) != two.path(i)
        np.testing.assert_array_equal(decode(one.path(i)), decode(two.path(i)))
    assert [replace(question, video="") for question in first] == [replace(question, video="") for question in second]
    assert len({q.id for q in first}) == len(first) == 12


def test_more_videos_extend_the_set(tmp_path: Path) -> None:
    small = needle(tmp_path, num_videos=2)
    few = small.questions()
    written = small.path(0).stat().st_mtime_ns
    large = needle(tmp_path, num_videos=3)
    assert large.questions()[: len(few)] == few
    assert large.path(0).stat().st_mtime_ns == written
    assert len(json.loads((large.folder / "manifest.json").read_text())["videos"]) == 3
    small.generate()  # the larger set stays whole
    assert len(json.loads((large.folder / "manifest.json").read_text())["videos"]) == 3


def test_a_broken_off_set_is_completed(tmp_path: Path) -> None:
    benchmark = needle(tmp_path)
    benchmark.generate()
    names = sorted(path.name for path in benchmark.folder.iterdir())
    assert names == ["00000.mp4", "00001.mp4", "00002.mp4", "manifest.json"]  # and nothing half-written
    benchmark.path(1).unlink()
    benchmark.generate()
    assert benchmark.path(1).exists()


def test_splits_and_seeds_share_no_video() -> None:
    chosen = [(split, seed) for split in ("train", "validation", "test") for seed in (0, 1)]
    sets = [needle(split=split, seed=seed, num_videos=40) for split, seed in chosen]
    worlds = [repr((spec.events, spec.scenes)) for benchmark in sets for spec in benchmark.specs()]
    assert len(set(worlds)) == len(worlds) == 240
    assert len({benchmark.folder for benchmark in sets}) == 6


def test_folder_depends_on_frames_only() -> None:
    assert needle(seconds=6).folder == needle(seconds=6.0, num_videos=9, categories=["what"]).folder
    assert needle(distractors=2).folder != needle().folder


# --- Balance ----------------------------------------------------------------------------------------------------------


def test_events_are_uniform_over_the_video_and_do_not_overlap() -> None:
    benchmark = needle(num_videos=600, seconds=64.0)
    starts = []
    for spec in benchmark.specs():
        first, second = spec.events
        assert 0 <= first.start and first.stop <= second.start and second.stop <= spec.num_frames == 512
        assert first.stop - first.start == second.stop - second.start == 16
        assert first.symbol != second.symbol and first.colour != second.colour and first.place != second.place
        starts += [first.start, second.start]
    counts, _ = np.histogram(starts, bins=8, range=(0, 512 - 16 + 1))
    expected = len(starts) / 8
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_questions_are_right_and_balanced() -> None:
    benchmark = needle(num_videos=200)
    specs = {str(benchmark.path(spec.index)): spec for spec in benchmark.specs()}
    questions = all_questions(benchmark)
    assert Counter(q.category for q in questions) == dict.fromkeys(CATEGORIES, 200)
    assert set(Counter((q.category, q.answer) for q in questions).values()) == {50}
    for question in questions:
        spec = specs[question.video]
        assert question.options[question.answer] == truth(spec, question)
        assert len(set(question.options)) == 4
        pool = {"colour": tuple(COLOURS), "where": PLACES}.get(question.category, SYMBOLS)
        assert set(question.options) <= set(pool)
        values = {"colour": "colour", "where": "place"}.get(question.category, "symbol")
        assert all(getattr(event, values) in question.options for event in spec.events)
    answers = Counter(q.options[q.answer] for q in questions)
    assert set(answers) == {*SYMBOLS, *COLOURS, *PLACES}
    assert max(answers[symbol] for symbol in SYMBOLS) < 1.4 * min(answers[symbol] for symbol in SYMBOLS)


def test_more_questions_ask_about_the_other_event() -> None:
    benchmark = needle(questions_per_video=7)
    for spec in benchmark.specs():
        questions = benchmark.video_questions(spec)
        assert len({q.id for q in questions}) == len({q.question for q in questions}) == 7
        assert all(q.options[q.answer] == truth(spec, q) for q in questions)


def test_categories_can_be_chosen() -> None:
    questions = all_questions(needle(categories=["where", "first"], num_videos=4))
    assert Counter(q.category for q in questions) == {"where": 4, "first": 4}
    assert len(all_questions(needle(questions_per_video=1, num_videos=4))) == 4


# --- What is seen -----------------------------------------------------------------------------------------------------


def test_files_are_h264(tmp_path: Path) -> None:
    benchmark = needle(tmp_path, seconds=6.0, fps=8, size=96)
    benchmark.generate()
    with av.open(str(benchmark.path(0))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        keys = [packet.pts for packet in container.demux(stream) if packet.size and packet.is_keyframe]
        assert len(keys) >= 3  # of 48 frames
    with Video(benchmark.path(0)) as video:
        assert (video.num_frames, video.fps, video.reader) == (48, 8.0, "av")
        assert video.frames([0]).shape == (1, 96, 96, 3)


def symbol_seen(frame: np.ndarray, event) -> float:
    """The part of the symbol's body that has the event's colour."""
    pixels, mask = sprite(event.symbol, event.colour, event.side)
    body = mask[..., 0] & pixels.any(axis=-1)
    last = len(frame) - len(mask)  # a symbol stays whole within the frame
    x, y = (min(max(int(np.rint(c - (event.side + 2) / 2)), 0), last) for c in event.centre)
    patch = frame[y : y + len(mask), x : x + len(mask)].astype(float)
    near = np.linalg.norm(patch - np.array(COLOURS[event.colour]), axis=-1) < 60
    return float(near[body].mean())


def test_events_are_visible_exactly_in_their_time(tmp_path: Path) -> None:
    benchmark = needle(tmp_path, num_videos=6, distractors=0)
    for spec in benchmark.generate():
        frames = decode(benchmark.path(spec.index))
        assert len(frames) == spec.num_frames
        for event in spec.events:
            column, row = "right" in event.place, "bottom" in event.place
            assert max(abs(event.centre[0] - 16 - 32 * column), abs(event.centre[1] - 16 - 32 * row)) <= 3
            seen = np.array([symbol_seen(frame, event) for frame in frames])
            assert (seen[event.start : event.stop] > 0.6).all()  # the rest: edges, where yuv420p blurs the colour
            assert (np.delete(seen, np.arange(event.start, event.stop)) < 0.2).all()
            start, end = spec.span(event)
            times = frame_times(spec)
            assert ((times >= start) & (times < end)).sum() == event.stop - event.start


def test_files_show_what_render_draws(tmp_path: Path) -> None:
    benchmark = needle(tmp_path, num_videos=1)
    spec = benchmark.generate()[0]
    drawn, decoded = render(spec), decode(benchmark.path(0))
    assert drawn.shape == decoded.shape == (48, 64, 64, 3) and drawn.dtype == np.uint8
    assert abs(drawn.astype(int) - decoded).mean() < 4


def test_distractors_move_and_stay_inside() -> None:
    spec = needle(seconds=20.0, num_events=1, event_seconds=0.2, distractors=1).specs()[0]
    for scene in spec.scenes:
        assert len(scene.distractors) == 1 and scene.distractors[0].shape in DISTRACTORS
    moved = abs(np.diff(render(spec).astype(int), axis=0)).max(axis=(1, 2, 3)) > 60
    assert moved.mean() > 0.2


def test_symbols_stay_apart_at_half_size() -> None:
    """A symbol differs from any other shape in an eighth of its box or more when the 64-pixel frame is seen at 32."""
    masks = {}
    for name in (*SYMBOLS, *DISTRACTORS):
        body = sprite(name, "white", 18)[0][..., 0].astype(float) / 248
        masks[name] = body.reshape(10, 2, 10, 2).mean(axis=(1, 3))
    for symbol in SYMBOLS:
        for other in masks.keys() - {symbol}:
            assert abs(masks[symbol] - masks[other]).mean() > 1 / 8, (symbol, other)


# --- Chains -----------------------------------------------------------------------------------------------------------


def followed(spec: VideoSpec, question: Question) -> list:
    """The chain that a question names, looked up by the colours alone."""
    (start,) = [e for e in spec.events if f"From the {e.colour} symbol on" in question.question]
    by_colour, chain = {event.colour: event for event in spec.events}, [start]
    while chain[-1].dot:
        chain.append(by_colour[chain[-1].dot])
    return chain


@pytest.mark.parametrize(("hops", "num_events"), [(2, 2), (2, 3), (2, 4), (3, 4), (4, 4)])
def test_a_chain_leads_from_the_named_symbol_to_the_answer(hops: int, num_events: int) -> None:
    benchmark = needle(hops=hops, num_events=num_events, num_videos=60, seconds=20.0, categories=["chain"])
    specs = {str(benchmark.path(spec.index)): spec for spec in benchmark.specs()}
    questions = all_questions(benchmark)
    assert len(questions) == 60 and Counter(q.answer for q in questions) == dict.fromkeys(range(4), 15)
    times, asked = set(), set()
    for question in questions:
        spec = specs[question.video]
        chain, last = followed(spec, question), followed(spec, question)[-1]
        assert len(chain) == hops and question.events == tuple(map(spec.span, chain))
        where = question.question.endswith("where on the screen is the last symbol?")
        assert question.options[question.answer] == (last.place if where else last.symbol)
        assert set(question.options) == set(PLACES if where else SYMBOLS)
        rest = [event for event in spec.events if event not in chain]
        assert sum(event.dot is not None for event in rest) == max(0, len(rest) - 1)  # a chain of their own
        asked.add(where)
        times.add(chain[0].start < chain[1].start)
    assert asked == times == {False, True}  # and in any order of time


def test_chains_change_nothing_else(tmp_path: Path) -> None:
    """Scenes and events are those without chains, but for the dots; without chains, all is as it was before."""
    plain, chained = (needle(num_events=3, seconds=12.0, hops=hops) for hops in (0, 2))
    for a, b in zip(plain.specs(), chained.specs(), strict=True):
        assert a.scenes == b.scenes and a.events == tuple(replace(event, dot=None) for event in b.events)
        assert all(event.dot is None for event in a.events)
        assert sum(event.dot is not None for event in b.events) == 1
    assert plain.folder != chained.folder and needle().folder.name == "test-3fb5b373f4"
    assert [q.category for q in all_questions(plain)].count("chain") == 0
    assert Counter(q.category for q in all_questions(chained)) == dict.fromkeys((*CATEGORIES, "chain"), 3)


def test_dots_are_seen_in_their_time(tmp_path: Path) -> None:
    benchmark = needle(tmp_path, num_videos=4, distractors=0, hops=3, num_events=4, seconds=12.0)
    dots = 0
    for spec in benchmark.generate():
        frames = decode(benchmark.path(spec.index)).astype(float)
        for event in spec.events:
            x, y = event.centre
            near = frames[:, y - 1 : y + 2, x - 1 : x + 2].mean(axis=(1, 2))
            if event.dot:
                inside = np.linalg.norm(near - np.array(COLOURS[event.dot]), axis=-1) < 60
                assert inside[event.start : event.stop].all()
                assert not np.delete(inside, np.arange(event.start, event.stop)).any()
                dots += 1
    assert dots == 4 * 2


def test_chains_are_trained_on_like_other_questions(tmp_path: Path) -> None:
    benchmark = needle(tmp_path, hops=2, num_videos=2, split="train", answers="words")
    records = benchmark.training_records(("describe", "dialogue"))
    assert [len(record["conversations"]) for record in records] == [2, 10, 2, 10]
    for spec, record in zip(benchmark.specs(), records[::2]):
        (pointing,) = [event for event in spec.events if event.dot]
        assert f"{pointing.caption}" in record["conversations"][1]["value"]
        assert pointing.caption.endswith(f" and {pointing.dot} dot")
    recorded = json.loads((benchmark.folder / "manifest.json").read_text())["videos"][0]["events"]
    assert [event.get("dot") for event in recorded] == [event.dot for event in benchmark.specs()[0].events]


# --- Training records -------------------------------------------------------------------------------------------------


def test_a_dialogue_asks_all_questions_of_a_video(tmp_path: Path) -> None:
    benchmark = needle(tmp_path, num_videos=2, split="train", answers="words")
    records = benchmark.training_records(("dialogue",))
    assert [record["task"] for record in records] == ["dialogue"] * 2
    for record, asked in zip(records, (benchmark.questions()[:4], benchmark.questions()[4:])):
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * 4
        assert [turn["value"] for turn in turns[1::2]] == [q.options[q.answer] for q in asked]
        prompts = [benchmark.prompt(q) for q in asked]
        assert [turn["value"] for turn in turns[::2]] == [f"<image>\n{prompts[0]}", *prompts[1:]]


def test_training_records(tmp_path: Path) -> None:
    benchmark = needle(tmp_path, num_videos=2, split="train")
    records = benchmark.training_records()
    assert Counter(record["task"] for record in records) == {"describe": 2, "open": 8, "choice": 8}
    assert len({record["id"] for record in records}) == len(records)
    spec, questions = benchmark.specs()[0], {q.question: q for q in benchmark.questions()[:4]}
    for record in records[:9]:
        human, gpt = record["conversations"]
        assert record["video"] == str(benchmark.path(0)) and record["seconds"] == 6.0
        assert (human["from"], gpt["from"]) == ("human", "gpt") and human["value"].startswith("<image>\n")
        text = human["value"].removeprefix("<image>\n")
        if record["task"] == "describe":
            first, second = spec.events
            names = (f"{event.colour} {event.symbol} {event.place}" for event in (first, second))
            assert (text, gpt["value"]) == ("Describe the video.", ", ".join(names))
        elif record["task"] == "open":
            question = questions[text]
            assert gpt["value"] == question.options[question.answer]
        else:
            question = questions[text.split("\n")[0]]
            assert text == benchmark.prompt(question)
            assert benchmark.parse(gpt["value"], question) == question.answer


def test_short_clips_list_their_shapes(tmp_path: Path) -> None:
    benchmark = needle(tmp_path, num_videos=20, seconds=0.5, split="train")
    records = benchmark.training_records(("list",))
    for spec, record in zip(benchmark.specs(), records, strict=True):
        assert spec.num_frames == 4 and {(e.start, e.stop) for e in spec.events} == {(0, 4)}
        listed = record["conversations"][1]["value"].split(", ")
        assert {event.caption for event in spec.events} <= set(listed)
        places = [next(i for i, place in enumerate(PLACES) if caption.endswith(place)) for caption in listed]
        assert places == sorted(places)
        assert 2 <= len(listed) <= 2 + len(spec.scenes[0].distractors)
    assert {q.category for q in benchmark.questions()} == {"colour", "where", "what"}  # no event is first


def test_nothing_to_list() -> None:
    benchmark = needle(num_events=1, distractors=0, seconds=20.0, num_videos=5)
    empty = [spec for spec in benchmark.specs() if not visible_shapes(spec, spec.num_frames // 2)]
    assert empty
    assert benchmark._records(empty[0], "list")[0]["conversations"][1]["value"] == "nothing"


def test_mixed_lengths() -> None:
    specs = needle(lengths=[0.5, 4.0, 16.0], num_videos=60).specs()
    assert set(Counter(spec.seconds for spec in specs)) == {0.5, 4.0, 16.0}


def test_numbers_of_events_can_differ(tmp_path: Path) -> None:
    benchmark = needle(tmp_path, event_counts=[1, 2], num_videos=40)
    specs = benchmark.specs()
    assert set(Counter(len(spec.events) for spec in specs)) == {1, 2}
    assert needle(tmp_path, num_videos=40).folder != benchmark.folder
    for spec in specs[:10]:
        asked = [question.category for question in benchmark.video_questions(spec)]
        assert sorted(asked) == sorted(CATEGORIES if len(spec.events) == 2 else ("colour", "where", "what"))


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split='dev' is not one of train"),
        ({"num_videos": 0}, "num_videos=0 must be an integer 1.."),
        ({"num_events": 5}, "num_events=5"),
        ({"distractors": -1}, "distractors=-1"),
        ({"size": 65}, "size=65 must be even"),
        ({"size": 16}, "size=16"),
        ({"fps": 0}, "fps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seconds": 0.0}, "seconds=0.0 is less than a frame"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"event_seconds": 0.01}, "event_seconds=0.01"),
        ({"seconds": 3.0}, "2 events of 2.0 s do not fit into a video of 3.0 s"),
        ({"lengths": [8.0, 3.0]}, "do not fit"),
        ({"event_counts": [1, 5]}, r"event_counts=\[1, 5\] must be integers 1..4"),
        ({"event_counts": [1], "categories": ["first"]}, "'first' needs two events"),
        ({"event_counts": [1, 3], "seconds": 5.0}, "3 events of 2.0 s do not fit"),
        ({"categories": ["color"]}, "'color' is not one of colour"),
        ({"categories": ["what", "what"]}, "twice"),
        ({"categories": ["first"], "num_events": 1}, "'first' needs two events"),
        ({"categories": ["first"], "seconds": 1.0}, "'first' needs two events"),
        ({"questions_per_video": 8}, "questions_per_video=8: a video has 1..7"),
        ({"questions_per_video": 0}, "questions_per_video=0"),
        ({"hops": 1}, "hops=1 must be 0 or from 2, and every video must have so many events"),
        ({"hops": -2}, "hops=-2 must be an integer from 0"),
        ({"hops": 3}, r"hops=3 must be .* \(num_events, event_counts\), which are 2"),
        ({"hops": 2, "event_counts": [1, 2]}, "hops=2 must be .*which are 1"),
        ({"categories": ["chain"]}, "category 'chain' needs hops, from 2"),
        ({"hops": 2, "questions_per_video": 9}, "questions_per_video=9: a video has 1..8 questions"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        needle(**options)
    assert "\n" not in str(caught.value)


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="'sing' is not one of describe"):
        needle().training_records(("sing",))


def test_options_come_from_yaml() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    node = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.structured(Needle.Config), {"seconds": 8, "lengths": [4, 8]})
    config = omegaconf.OmegaConf.to_object(node)
    assert isinstance(config, Needle.Config) and config.durations == [4.0, 8.0]


def test_answers_in_words_and_by_letter(tmp_path):
    by_words = Needle(Needle.Config(num_videos=1, seconds=8.0, answers="words", root=str(tmp_path)))
    by_letter = Needle(Needle.Config(num_videos=1, seconds=8.0, root=str(tmp_path)))
    question = by_words.questions()[0]
    right = question.options[question.answer]
    assert all(option in by_words.prompt(question) for option in question.options)
    assert "(A)" not in by_words.prompt(question) and "(A)" in by_letter.prompt(question)
    assert by_words.parse(f" {right.upper()}. ", question) == by_letter.parse(right, question) == question.answer
    assert by_words.parse("B", question) is None
    assert by_letter.parse("(B)", question) == 1
    records = by_words.training_records(("choice",))
    assert {r["conversations"][1]["value"] for r in records} <= {o for q in by_words.questions() for o in q.options}
    with pytest.raises(ValueError, match="answers='essay' is not letter or words"):
        Needle(Needle.Config(answers="essay"))

"""What a benchmark owns: how its answers are read and scored, how long they may get, what records tell of it."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import lightning as L
import pytest
from comparison_runs import read
from torch.utils.data import DataLoader

import xcomp
from xcomp.answering import Query
from xcomp.benchmark import Benchmark, Question, exact_match, normalise
from xcomp.compare.forecast import dry_run
from xcomp.compare.runner import compare
from xcomp.config import Generation, Sampling, build_component, parse_config
from xcomp.contract import ContractError
from xcomp.model import VideoQA
from xcomp.scoring import judge, query_of, read_questions
from xcomp.tiny import tiny_backbone

# The answer's number of words is the chosen option, and what an open question is scored by.
COUNTS = """
from dataclasses import dataclass
import xcomp
from xcomp.benchmark import Benchmark, Question


class Counts(Benchmark):
    max_new_tokens = 5
    axes = ("part",)

    @dataclass
    class Config:
        root: str

    def questions(self):
        first, second = xcomp.load_benchmark("needle", num_videos=2, seconds=4, root=self.config.root).questions()[:2]
        labels, meta = {"part": ("one", "two"), "level": ("L1",)}, {"from": "here", "url": None}
        return [
            Question("none right", first.video, "What?", ("a", "b"), None, labels=labels, meta=meta),
            Question("open", second.video, "Say?", references=("ring", "a ring")),
        ]

    def parse(self, text, question):
        return None

    def score(self, text, question):
        return {"words": min(1.0, len(text.split()) / 10), "empty": float(not text)}
"""


@pytest.fixture
def counts(tmp_path, tiny_run, needle_videos):
    """A comparison on the benchmark above, that says nothing of how long answers may get."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "counts.py").write_text(COUNTS)
    run = {
        **tiny_run,
        "plugins": [str(tmp_path / "mine")],
        "benchmark": {"name": "counts", "root": needle_videos["root"]},
    }
    return {key: value for key, value in run.items() if key != "generation"}


def lengths(monkeypatch):
    """How many tokens each call of ``Decoder.generate`` was allowed from here on."""
    from xcomp.decoder import Decoder

    allowed, real = [], Decoder.generate

    def generate(self, state, **options):
        allowed.append(options["max_new_tokens"])
        return real(self, state, **options)

    monkeypatch.setattr(Decoder, "generate", generate)
    return allowed


@pytest.mark.parametrize("said, expected", [({}, 5), ({"max_new_tokens": 3}, 3), ({"max_new_tokens": None}, 5)])
def test_a_benchmark_says_how_long_answers_get_unless_the_file_does(counts, monkeypatch, said, expected):
    allowed = lengths(monkeypatch)
    compare(parse_config({**counts, "generation": said}, "x"))
    assert allowed[0] == 2 and set(allowed[1:]) == {expected}  # warming up comes first


def test_without_a_benchmark_answers_have_16_tokens(monkeypatch, needle_videos):
    video = xcomp.load_benchmark("needle", **needle_videos).questions()[0].video
    sampling, allowed = Sampling(rate=1, min_frames=4, max_frames=8, multiple=4), lengths(monkeypatch)
    VideoQA(tiny_backbone(), sampling=sampling).ask(video, "What?")
    VideoQA(tiny_backbone(), sampling=sampling, generation=Generation(max_new_tokens=2)).ask(video, "What?")
    assert allowed == [16, 2]


def test_a_forecast_counts_answers_of_the_length_that_the_benchmark_allows(counts, capsys, monkeypatch):
    from xcomp.compare import forecast

    written = []
    real = forecast.question_cost

    def question_cost(*args):
        written.append(real(*args).writing_macs)
        return real(*args)

    monkeypatch.setattr(forecast, "question_cost", question_cost)
    for said in ({}, {"max_new_tokens": 5}, {"max_new_tokens": 1}, {"max_new_tokens": 9}):
        assert dry_run(parse_config({**counts, "generation": said}, "x"))
    assert written[0] == written[1] > written[2] == 0 and 2 * written[0] < written[3] < 2.1 * written[0]


def test_records_tell_the_question_and_its_score(counts):
    folder = compare(parse_config(counts, "x"))
    choice, opened = read(folder)
    assert choice["question"] == "What?" and choice["options"] == ["a", "b"] and choice["answer"] is None
    assert choice["labels"] == {"part": ["one", "two"], "level": ["L1"]} and choice["meta"] == {
        "from": "here",
        "url": None,
    }
    # Neither the model nor the benchmark names an option: that is not the same as being right.
    assert (choice["prediction"], choice["correct"], choice["score"], choice["metrics"]) == (None, False, 0.0, {})
    assert opened["options"] == [] and opened["references"] == ["ring", "a ring"] and opened["prediction"] is None
    words = min(1.0, len(opened["text"].split()) / 10)
    assert opened["metrics"] == {"words": words, "empty": float(not opened["text"])} and opened["score"] == words
    assert opened["correct"] == (words >= 1) and opened["mode"] == "generate" and opened["option_scores"] is None
    shown = json.dumps(["Say?", [], ["ring", "a ring"]])
    assert opened["prompt_sha"] == hashlib.sha256(shown.encode()).hexdigest()[:16]
    assert len({choice["prompt_sha"], opened["prompt_sha"]}) == 2
    figures = xcomp.registry.load_class("benchmark", "counts", counts["plugins"]).metrics(read(folder))
    assert figures == {"accuracy": 0.0, "words": 100 * words, "empty": 100.0 * (not opened["text"])}


def test_lightning_tests_by_the_benchmarks_own_rules(counts, needle_videos):
    config = parse_config(counts, "x")
    model = VideoQA.from_config(config).eval()
    benchmark = build_component("benchmark", config.benchmark, config.plugins)
    items = [(q, query_of(benchmark, q)) for q in benchmark.questions()]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (found,) = trainer.test(model, DataLoader(items, batch_size=2, collate_fn=list), verbose=False)
    scores = [r["score"] for r in read(compare(config))]
    assert found["test/accuracy"] == pytest.approx(sum(scores) / 2)


class Fixed(Benchmark):
    """Gives what it is told to."""

    def __init__(self, parsed=None, scored=None):
        super().__init__(None)
        self.parsed, self.scored = parsed, scored

    def parse(self, text, question):
        return self.parsed

    def score(self, text, question):
        return self.scored


CHOICE = Question("1", "v", "What?", ("a", "b"), 1)
OPEN = Question("2", "v", "What?", references=("ring",))


@pytest.mark.parametrize("parsed, score", [(1, 1.0), (0, 0.0), (None, 0.0)])
def test_a_choice_is_right_or_wrong(parsed, score):
    verdict = judge(Fixed(parsed), CHOICE, "text")
    assert (verdict.prediction, verdict.score, verdict.metrics) == (parsed, score, {})


def test_an_open_question_has_its_first_metric_for_a_score():
    verdict = judge(Fixed(scored={"f1": 0.5, "length": 1}), OPEN, "text")
    assert (verdict.prediction, verdict.score, verdict.metrics) == (None, 0.5, {"f1": 0.5, "length": 1.0})


@pytest.mark.parametrize(
    "benchmark, question, clause",
    [
        (Fixed(2), CHOICE, r"parse\(\) must return an option's number or None, not 2"),
        (Fixed(True), CHOICE, r"parse\(\) must return an option's number or None, not True"),
        (Fixed("B"), CHOICE, r"parse\(\) must return an option's number or None, not 'B'"),
        (Fixed(scored=1.0), OPEN, r"score\(\) must return at least one metric, name → 0..1, not 1.0"),
        (Fixed(scored={}), OPEN, r"score\(\) must return at least one metric"),
        (Fixed(scored={"f1": float("nan")}), OPEN, r"score\(\) must return at least one metric"),
        (Fixed(scored={"f1": 50}), OPEN, r"score\(\) must return at least one metric"),
    ],
)
def test_what_a_benchmark_must_not_give_is_its_error(benchmark, question, clause):
    with pytest.raises(ContractError, match=f"benchmark 'Fixed': {clause}"):
        judge(benchmark, question, "text")


def test_questions_are_checked_when_they_are_read():
    benchmark = Fixed()
    benchmark.questions = lambda: [CHOICE, Question("3", "v", "What?", ("a", "b"), 2)]
    with pytest.raises(ContractError, match="question '3': answer must be an option's index, 0..1, or None"):
        read_questions(benchmark)


def test_a_query_is_the_question_as_the_benchmark_puts_it():
    question = Question("1", "v.mp4", "What?", events=((1.0, 2.0),), references=("x",))
    assert query_of(Benchmark(None), question) == Query("v.mp4", "What?", "What?", "1", ((1.0, 2.0),))


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Ring.", "ring"), ("a  ring\n", "ring"), ("An hour", "hour"), ("ｒｉｎｇ", "ring"), ("Straße", "strasse"),
        ("3.5", "35"), ("«Ring»", "ring"), ("theatre", "theatre"), ("", ""), ("the", ""), ("リング。", "リング"),
        ("x+y=2", "xy2"),
    ],
)  # fmt: skip
def test_what_exact_match_compares(text, normal):
    assert normalise(text) == normal


def test_exact_match_is_with_any_reference():
    assert exact_match("A ring!", ["cross", "The ring"]) == 1.0 and exact_match("rings", ["ring"]) == 0.0


def test_default_figures_count_what_could_not_be_asked():
    line = SimpleNamespace(choice={"options": ["a", "b"], "metrics": {}}, open={"options": []})
    records = [
        {**line.choice, "score": 1.0}, {**line.choice, "score": 0.0}, {**line.choice, "score": 0.0},
        {**line.open, "score": 0.5, "metrics": {"f1": 0.5, "length": 1.0}}, {**line.open, "score": 0.0, "metrics": {}},
    ]  # fmt: skip
    assert Benchmark.metrics(records) == {"accuracy": pytest.approx(100 / 3), "f1": 25.0, "length": 50.0}
    assert Benchmark.metrics([]) == {}

"""Every benchmark against its contract, and the contract check against benchmarks that break it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
from contracts.plugin_options import benchmark_options, names_of

import xcomp
from xcomp.benchmark import Question
from xcomp.registry import load_class
from xcomp.testing import ContractError, check_benchmark


@pytest.mark.parametrize("name", names_of("benchmark"))
def test_contract(name, tmp_path):
    check_benchmark(load_class("benchmark", name), **benchmark_options(name, tmp_path))


# --- broken in one way each -------------------------------------------------------------------------------------------

GOOD = Question("1", __file__, "Which symbol?", ("cross", "ring", "arch"), 1, events=((0.0, 2.0),))


class Asks(xcomp.Benchmark):
    """A sound one: two questions about a file that is there."""

    @dataclass
    class Config:
        pass

    change: dict = {}

    def questions(self):
        return [GOOD, dataclasses.replace(GOOD, **{"id": "2", **self.change})]


class NoQuestions(Asks):
    questions = xcomp.Benchmark.questions


class Empty(Asks):
    def questions(self):
        return []


class Mappings(Asks):
    def questions(self):
        return [{"id": "1"}]


class Shuffles(Asks):
    turn = 0

    def questions(self):
        self.turn += 1
        return super().questions()[:: 1 if self.turn % 2 else -1]


class DependsOnTheRun(Asks):
    runs = 0

    def __init__(self, config):
        super().__init__(config)
        type(self).runs += 1
        self.change = {"question": f"Which of {type(self).runs}?"}


class TwiceTheSameId(Asks):
    change = {"id": "1"}


class NoText(Asks):
    change = {"question": ""}


class OneOption(Asks):
    change = {"options": ("cross",), "answer": 0}


class OptionsInAList(Asks):
    change = {"options": ["cross", "ring"]}


class AnswerBeyond(Asks):
    change = {"answer": 3}


class AnswerIsALetter(Asks):
    change = {"answer": "B"}


class AnswerWithoutOptions(Asks):
    change = {"options": ()}


class ReferencesInAList(Asks):
    change = {"options": (), "answer": None, "references": ["a cross"]}


class NoReferences(Asks):
    change = {"options": (), "answer": None}


class LabelIsText(Asks):
    change = {"labels": {"duration": "long"}}


class SpanBackwards(Asks):
    change = {"span": (2.0, 2.0)}


class SubtitlesAreMany(Asks):
    change = {"subtitles": ["a.srt"]}


class MetaIsNoJson(Asks):
    change = {"meta": {"tags": {"a"}}}


class Opens(Asks):
    """Open questions, with right answers in words."""

    def questions(self):
        return [dataclasses.replace(GOOD, options=(), answer=None, references=("a cross", "the cross"))]


class ScoresBeyondOne(Opens):
    def score(self, text, question):
        return {"f1": 100}


class ScoresWithoutName(Opens):
    def score(self, text, question):
        return {}


class ScoresUnevenly(Opens):
    def score(self, text, question):
        return {"f1": 0.0, "length": 1.0} if text else {"f1": 0.0}


class ScoresNothingBest(Opens):
    def score(self, text, question):
        return {"brevity": 1 / (1 + len(text))}


class SharesNotPerCent(Asks):
    @classmethod
    def metrics(cls, records):
        return {"accuracy": 101}


class AxisNobodyHas(Asks):
    axes = ("duration",)


class NoVideo(Asks):
    change = {"video": "nowhere.mp4"}


class EventsBackwards(Asks):
    change = {"events": ((2.0, 1.0),)}


class NothingForAnOption(Asks):
    def continuations(self, question):
        return ("A", "B", "")


class AnotherOrder(Asks):
    def continuations(self, question):
        return ("C", "B", "A")


class PromptsWithoutOptions(Asks):
    def prompt(self, question):
        return question.question


class ParsesNothing(Asks):
    def parse(self, text, question):
        return None


class ParsesEverything(Asks):
    def parse(self, text, question):
        found = super().parse(text, question)
        return 0 if found is None else found


class WritesNothing(Asks):
    max_new_tokens = 0


class TrainsOnNothing(Asks):
    def training_records(self):
        return [{"conversations": []}]


BROKEN = {
    NoQuestions: r"questions\(\) is missing",
    Empty: r"questions\(\) must return a list of at least one Question",
    Mappings: r"questions\(\) must return a list of at least one Question",
    Shuffles: r"questions\(\) must give the same for the same inputs",
    DependsOnTheRun: r"questions\(\) must be the same, in the same order, in every run",
    TwiceTheSameId: r"the id of every question must be its own; these occur more than once: \['1'\]",
    NoText: "a question must have an id and a text",
    OneOption: "question '2': there must be 2 to 26 options, or none for an open question, not 1",
    OptionsInAList: r"question '2': options must be a tuple of text, not \['cross', 'ring'\]",
    AnswerBeyond: r"question '2': answer must be an option's index, 0\.\.2, or None if none is right; not 3",
    AnswerIsALetter: r"question '2': answer must be an option's index, 0\.\.2, or None if none is right; not 'B'",
    AnswerWithoutOptions: r"question '2': answer must be None, as there are no options; not 1",
    ReferencesInAList: r"question '2': references must be a tuple of text",
    NoReferences: r"an open question must have references, or score\(\) must do without; none in \['2'\]",
    LabelIsText: r"question '2': labels must map an axis to a tuple of labels, not {'duration': 'long'}",
    SpanBackwards: r"question '2': span must be \(start, end\) in seconds or None, not \(2\.0, 2\.0\)",
    SubtitlesAreMany: r"question '2': subtitles must be the path of a file or None, not \['a\.srt'\]",
    MetaIsNoJson: r"question '2': meta must be what JSON can hold: .*set",
    ScoresBeyondOne: r"score\(\) must return at least one metric, name → 0..1, not {'f1': 100}",
    ScoresWithoutName: r"score\(\) must return at least one metric, name → 0..1, not {}",
    ScoresUnevenly: r"score\(\) must give every answer the same metrics",
    ScoresNothingBest: r"score\(\) must not rate an empty answer to '1' above a right one",
    SharesNotPerCent: r"metrics\(\) must return name → per cent, 0..100, not {'accuracy': 101}",
    AxisNobodyHas: r"axes must be a tuple of axes that questions have labels of, not \('duration',\)",
    NoVideo: "question '2' names a video that is not there: 'nowhere.mp4'",
    EventsBackwards: r"question '2': events must be \(start, end\) in seconds",
    NothingForAnOption: r"continuations\(\) must return a tuple of 3 texts, one an option, not \('A', 'B', ''\)",
    AnotherOrder: r"parse\(\) must find option 0 of '1' in what continuations\(\) has for it, 'C'",
    PromptsWithoutOptions: r"prompt\(\) must contain the question and every option; '1' lacks \['cross'\]",
    ParsesNothing: r"parse\(\) must find option 0 of '1' in what continuations\(\) has for it, 'A'",
    ParsesEverything: r"parse\(\) must give None for an empty answer, not 0",
    WritesNothing: "max_new_tokens must be at least 1, not 0",
    TrainsOnNothing: r"training_records\(\) must not fail; .*turns must alternate between human and gpt",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda c: c.__name__)
def test_a_broken_benchmark_is_caught(broken):
    with pytest.raises(ContractError, match=f"benchmark '{broken.__name__}': {BROKEN[broken]}"):
        check_benchmark(broken)


def test_a_sound_benchmark_passes():
    check_benchmark(Asks)
    check_benchmark(Asks(None))
    check_benchmark(Opens)

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


class NoVideo(Asks):
    change = {"video": "nowhere.mp4"}


class EventsBackwards(Asks):
    change = {"events": ((2.0, 1.0),)}


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
    OneOption: "question '2' must have 2 to 26 options, in a tuple",
    OptionsInAList: "question '2' must have 2 to 26 options, in a tuple",
    AnswerBeyond: r"question '2': answer must be an index, 0\.\.2, not 3",
    AnswerIsALetter: r"question '2': answer must be an index, 0\.\.2, not 'B'",
    NoVideo: "question '2' names a video that is not there: 'nowhere.mp4'",
    EventsBackwards: r"question '2': events must be \(start, end\)",
    PromptsWithoutOptions: r"prompt\(\) must contain the question and every option; '1' lacks \['cross'\]",
    ParsesNothing: r"parse\(\) must find option 0 of '1'",
    ParsesEverything: r"parse\(\) must give None for an empty answer, not 0",
    WritesNothing: "max_new_tokens must be at least 1, not 0",
    TrainsOnNothing: r"training_records\(\) must not fail; .*'video' must be a path",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda c: c.__name__)
def test_a_broken_benchmark_is_caught(broken):
    with pytest.raises(ContractError, match=f"benchmark '{broken.__name__}': {BROKEN[broken]}"):
        check_benchmark(broken)


def test_a_sound_benchmark_passes():
    check_benchmark(Asks)
    check_benchmark(Asks(None))

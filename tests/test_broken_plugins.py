"""A plugin that breaks its contract in a run is told so by its name and the clause, in one line."""

import re

import pytest
import yaml

import xcomp
from xcomp.cli import main

HEAD = """
from dataclasses import dataclass
import torch
import xcomp
from xcomp.benchmark import Question
from xcomp.registry import load_class
"""
CONFIG = """
    @dataclass
    class Config:
        pass
"""
SELECTOR = "    def score_frames(self, backbone, pixels, *args, **kwargs):\n        return {}"
SELECT = SELECTOR.format("torch.rand(len(pixels))") + "\n    def select(self, scores, budget):\n        return {}"
COMPRESSOR = "    def {}(self, {}):\n        return {}"
BEFORE = COMPRESSOR.format("before_llm", "tokens", "{}")
PLAN = COMPRESSOR.format("plan", "num_layers, tokens_per_frame", "{}")
AFTER = PLAN.format("None") + "\n" + COMPRESSOR.format("after_layer", "output", "{}")
BENCHMARK = "    def questions(self):\n        return {}"
QUESTION = "Question('1', VIDEO, 'What?', ('a', 'b'), 0)"

BROKEN = {
    "no scores": ("selector", "    pass", r"score_frames\(\) is missing"),
    "one score": ("selector", SELECTOR.format("torch.rand(1)"),
                  r"score_frames\(\) must return one floating-point score a frame, \(8,\), not torch.float32 \(1,\)"),
    "a list of scores": ("selector", SELECTOR.format("[0.5] * len(pixels)"), r"score_frames\(\) must return .* list"),
    "no finite scores": ("selector", SELECTOR.format("torch.full((len(pixels),), torch.nan)"), "a finite score"),
    "too few frames": ("selector", SELECT.format("[0, 1, 2]"), r"select\(\) must meet the budget: 4 of 8, not"),
    "frames that are not there": ("selector", SELECT.format("[5, 6, 7, 8]"), r"select\(\) must name frames within"),
    "a tensor of frames": ("selector", SELECT.format("torch.arange(4)"), r"select\(\) must return a list of int"),
    "frames out of order": ("selector", SELECT.format("[3, 2, 1, 0]"), r"select\(\) must be ascending"),
    "no questions": ("benchmark", "    pass", r"questions\(\) is missing"),
    "an empty list": ("benchmark", BENCHMARK.format("[]"), r"questions\(\) must return a list of at least"),
    "mappings": ("benchmark", BENCHMARK.format("[{}]"), r"questions\(\) must return a list of at least"),
    "ids that repeat": ("benchmark", BENCHMARK.format(f"[{QUESTION}, {QUESTION}]"), "the id of every question .*'1'"),
    "an answer in words": (
        "benchmark",
        BENCHMARK.format(f"[{QUESTION}]") + "\n    def parse(self, text, question):\n        return 'a'",
        r"parse\(\) must return an option's number or None, not 'a'",
    ),
    "tokens in a row": ("compressor", BEFORE.format("tokens[0]"), r"before_llm\(\) must turn .* not \(16, 32\)"),
    "narrower tokens": ("compressor", BEFORE.format("tokens[..., :8]"), r"before_llm\(\) must turn .* 16, 8\)"),
    "nothing": ("compressor", BEFORE.format("None"), r"before_llm\(\) must turn .* not NoneType"),
    "tokens added": ("compressor", BEFORE.format("tokens.repeat(1, 2, 1)"), r"before_llm\(\) must .* add none"),
    "too few layers": ("compressor", PLAN.format("[(0, 1)]"), "plan names 1 layers, but the language model has 2"),
    "a number a layer": ("compressor", PLAN.format("[4] * num_layers"), r"plan must return the slots .* not \[4, 4\]"),
    "no plan at all": ("compressor", PLAN.format("'all'"), "plan must return the slots .* not 'all'"),
    "places to keep": ("compressor", AFTER.format("[0, 1]"), r"after_layer\(\) must return None, .* bool, not list"),
    "another width": ("compressor", AFTER.format("output.layout.real[:, 1:]"), r"after_layer\(\) must return None, "),
    "an empty video": ("compressor", AFTER.format("~output.layout.real"), r"after_layer\(\) must keep a visual token"),
    "no tokens": ("backbone", "    encode = xcomp.Backbone.encode", r"encode\(\) is missing"),
    "too few tokens": (
        "backbone",
        "    def encode(self, pixels):\n        return super().encode(pixels)[:, 1:]",
        r"encode\(\) must return \(T, N, D\) = \(4, 16, 32\), not \(4, 15, 32\)",
    ),
    "pixels of its own": (
        "backbone",
        "    def preprocess(self, frames):\n        return frames.permute(0, 3, 1, 2)",
        r"preprocess\(\) follows from pixel_format and must not be overridden",
    ),
}  # fmt: skip
BASES = {
    "compressor": "xcomp.Compressor",
    "selector": "xcomp.FrameSelector",
    "benchmark": "xcomp.Benchmark",
    "backbone": 'load_class("backbone", "videochat_flash")',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_contract_is_one_line(tmp_path, tiny_run, capsys, needle_videos, name):
    kind, method, message = BROKEN[name]
    (tmp_path / "mine" / f"{kind}s").mkdir(parents=True)
    config = "" if kind == "backbone" else CONFIG  # a backbone's options are needed
    body = f"\nclass Broken({BASES[kind]}):{config}\n{method}\n"
    video = xcomp.load_benchmark("needle", **needle_videos).questions()[0].video
    (tmp_path / "mine" / f"{kind}s" / "my_own.py").write_text(f"{HEAD}VIDEO = {video!r}\n{body}")
    node = {**tiny_run[kind], "name": "my_own"} if kind == "backbone" else "my_own"
    tiny_run |= {"plugins": [str(tmp_path / "mine")], "limit": 1, kind: node}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_run))
    assert main(["compare", str(tmp_path / "run.yaml")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(rf"^xcomp: error: {kind} 'my_own'.*{message}", err), err

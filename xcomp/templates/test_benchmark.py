"""skeleton keeps the contract of a benchmark."""

import json
from pathlib import Path

from xcomp.registry import load_class
from xcomp.testing import check_benchmark

FOLDER = Path(__file__).parents[1]


def test_contract(tmp_path):
    (tmp_path / "a.mp4").touch()  # the check wants every video to be there; it does not open them
    question = {"video": "a.mp4", "question": "What is it?", "options": ["a cup", "a key"], "answer": 1}
    open_question = {"video": "a.mp4", "question": "What is it?", "answers": ["a key", "a small key"]}
    (tmp_path / "questions.json").write_text(json.dumps([question, open_question]))
    check_benchmark(load_class("benchmark", "skeleton", [FOLDER]), file=str(tmp_path / "questions.json"))

"""The likeliest option: against whole passes, one an option; in comparisons; in MACs; and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from comparison_runs import read
from test_continuations import RULES, compressor

import xcomp
from xcomp.answering import Query
from xcomp.backbone import QuestionError, ShownVideo
from xcomp.benchmark import Question
from xcomp.cli import main
from xcomp.config import ConfigError, Generation, Sampling, parse_config
from xcomp.contract import ContractError
from xcomp.cost import count_macs
from xcomp.decoder import Decoder
from xcomp.model import VideoQA
from xcomp.scoring import query_of
from xcomp.tiny import tiny_backbone

OPTIONS = ("A", "a much longer answer", "B", "a dog")
HIDING = {"name": "dycoke", "decoding_layer": 2, "decoding_drop": 0.5}


@pytest.fixture
def make(make_backbone):
    def make(rule="lp_comp", batch_size=1, **generation):
        part = xcomp.load_compressor(**rule) if isinstance(rule, dict) else compressor(rule)
        options = {"sampling": Sampling(rate=2, min_frames=8, max_frames=8), "frames": 4, "batch_size": batch_size}
        generation = Generation(mode="loglikelihood", **generation)
        return VideoQA(make_backbone(), part, xcomp.load_selector("uniform"), generation=generation, **options).eval()

    return make


@pytest.fixture(scope="module")
def video(needle_videos):
    return xcomp.load_benchmark("needle", **needle_videos).questions()[0].video


def whole_passes(model, opened, query):
    """Log-probability of each token of each option, from a pass over video, question and option; nothing is stored."""
    backbone, found = model.backbone, []
    (choice,) = model.answerer.choose(opened, [query])
    times = opened.times(choice.frames)
    prompt = backbone.prompt(query.text, ShownVideo(opened.info.duration, len(times), tuple(times)))
    for text in query.continuations:
        ids = torch.tensor(backbone.tokenizer(text)["input_ids"])
        suffix = torch.cat([prompt.suffix_ids, ids[:-1]])
        visual = opened.visual(choice.frames)
        logits = model.decoder.logits([visual], [prompt.prefix_ids], [suffix], [len(ids)], [prompt.frame_texts])
        found.append(logits.log_softmax(-1)[torch.arange(len(ids)), ids])
    return found


@torch.no_grad()
@pytest.mark.parametrize("normalise", ["none", "length"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_options_are_as_likely_as_in_passes_of_their_own(make, video, rule, normalise):
    """With and without a compressor, planned or looking at question or data."""
    model = make(rule, normalise=normalise)
    texts = ("What?", "Where is it, and when?", "Why?")
    queries = [Query(video, text, text, continuations=OPTIONS[: n + 2]) for n, text in enumerate(texts)]
    with model.open(video) as opened:
        for query, answer in zip(queries, model.answerer.answer(opened, queries)):
            tokens = whole_passes(model, opened, query)
            expected = [float(t.mean() if normalise == "length" else t.sum()) for t in tokens]
            assert answer.option_scores == pytest.approx(expected, rel=1e-5, abs=1e-5)
            best = max(range(len(expected)), key=expected.__getitem__)
            assert answer.choice == best and answer.text == query.continuations[best]


@torch.no_grad()
def test_one_pass_scores_what_single_steps_do(make_backbone):
    """Unequal lengths are padded, and the padding is seen by none."""
    backbone = make_backbone()
    state = Decoder(backbone).prefill(backbone.encode(torch.rand(2, 3, 2, 2)), [1, 2], [3, 4])
    ids = [[5], [6, 7, 8, 9], [10, 11], [5, 6, 7]]
    passes = []
    decoder = Decoder(backbone)
    run, decoder._append = decoder._append, lambda *args, **options: (passes.append(1), run(*args, **options))[1]
    found = decoder.score(state.repeat(4), ids)
    assert len(passes) == 1
    for (scores, _), tokens in zip(found, ids):
        alone, expected = state.fork(), []
        for token in tokens:
            expected.append(float(alone.logits.log_softmax(-1)[0, token]))
            Decoder(backbone).decode(alone, [token])
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_a_rule_that_looks_on_while_answers_are_written_is_asked_at_every_token(make, video):
    """What it hides from an answer's tokens it hides from an option's."""
    hiding, plain = make(HIDING), make({"name": "dycoke"})
    query = Query(video, "What?", "What?", continuations=OPTIONS)
    with hiding.open(video) as opened:
        (answer,) = hiding.answerer.answer(opened, [query])
        (choice,) = hiding.answerer.choose(opened, [query])
        prompt = hiding.backbone.prompt(
            "What?", ShownVideo(opened.info.duration, 4, tuple(opened.times(choice.frames)))
        )
        visual, expected = opened.visual(choice.frames), []
        for text in OPTIONS:
            ids = hiding.backbone.tokenizer(text)["input_ids"]
            state, total = hiding.decoder.prefill(visual, prompt.prefix_ids, prompt.suffix_ids, prompt.frame_texts), 0.0
            for token in ids:
                total += float(state.logits.log_softmax(-1)[0, token])
                hiding.decoder.decode(state, [token])
            expected.append(total)
    assert answer.option_scores == pytest.approx(expected, abs=1e-4)
    with plain.open(video) as opened:
        (other,) = plain.answerer.answer(opened, [query])
    assert other.option_scores != pytest.approx(expected, abs=1e-4) and other.option_scores[0] == pytest.approx(
        expected[0]
    )


@torch.no_grad()
def test_the_video_is_stored_once_and_copied_only_for_longer_options(make, video, monkeypatch):
    passes, copies = [], []
    prefill, repeat = Decoder.prefill_video, xcomp.decoder.State.repeat
    monkeypatch.setattr(Decoder, "prefill_video", lambda *a, **k: (passes.append(1), prefill(*a, **k))[1])
    monkeypatch.setattr(xcomp.decoder.State, "repeat", lambda s, n: (copies.append(n), repeat(s, n))[1])
    model = make()
    letters = [Query(video, str(n), str(n), continuations=("A", "B", "C")) for n in range(3)]
    with model.open(video) as opened:
        model.answerer.answer(opened, letters)
        assert len(passes) == 1 and set(copies) == {1}
        model.answerer.answer(opened, [Query(video, "?", "?", continuations=OPTIONS)])
    assert len(passes) == 1 and set(copies) == {1, 4}


@torch.no_grad()
@pytest.mark.parametrize("rule", ["none", "lp_comp"])
def test_macs_are_those_of_one_pass(rule):
    """One token behind is a decoding step; of more, all but the pairs of attention as torch counts them."""
    backbone = tiny_backbone(layers=3)
    decoder = Decoder(backbone, compressor(rule))
    tokens = backbone.encode(torch.rand(8, 3, 2, 2))
    stored = decoder.prefill_video(tokens, [1, 2])
    state = decoder.extend(stored.repeat(1), [[3, 4, 5]])
    step = decoder.append_macs(stored, 3, 1) - decoder.append_macs(stored, 3)
    assert decoder.score_macs(stored, 3, [2]) == step and decoder.score_macs(stored, 3, [1, 1]) == 0
    assert decoder.score_macs(stored, 3, [2, 1, 2]) == 2 * step
    _, counted = count_macs(lambda: decoder.score(state.fork(), [[5, 6, 7, 8]]))
    shape = xcomp.cost.LLMShape.from_config(backbone.text_config)
    sizes = [int(layout.counts[0]) + 3 for layout in stored.prefilled]
    in_full = 2 * shape.query_width * sum(3 * (n + 3) for n in sizes)  # torch counts pairs that causality leaves out
    causal = 2 * shape.query_width * sum(3 * n + 6 for n in sizes)
    assert decoder.score_macs(stored, 3, [4]) == counted - in_full + causal


@torch.no_grad()
def test_an_answer_costs_the_question_and_its_options(make, video):
    model = make()
    asked = [Query(video, "?", "?", continuations=c) for c in (("A", "B"), ("A", "B longer"), ("A", "B longer", "C!"))]
    with model.open(video) as opened:
        answers = model.answerer.answer(opened, asked)
    macs = [sum(work.macs for work in answer.work.all() if work.stage == "answer") for answer in answers]
    assert 0 < macs[0] < macs[1] < macs[2]


def test_a_script_asks_for_the_likeliest_option(make, video):
    model = make()
    answer = model.ask(video, "What?", ["red", "green", "blue"])
    assert answer.choice == max(range(3), key=answer.option_scores.__getitem__) and answer.text == "ABC"[answer.choice]
    with pytest.raises(QuestionError, match="chooses among options, and the question has none"):
        model.ask(video, "What?")


# --- comparisons ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", ["letter", "words"])
def test_a_comparison_records_the_scores(tiny_run, tmp_path, answers, capsys):
    run = {**tiny_run, "benchmark": {**tiny_run["benchmark"], "answers": answers}, "limit": 3}
    run["generation"] = {"mode": "loglikelihood", "normalise": "length"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["evaluate", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    assert main(["evaluate", str(tmp_path / "run.yaml")]) == 0
    for record in read(parse_config(run, "x").folder):
        scores, best = record["option_scores"], record["prediction"]
        assert record["mode"] == "loglikelihood" and len(scores) == len(record["options"]) == 4
        assert best == scores.index(max(scores)) and record["correct"] == (best == record["answer"])
        assert record["text"] == ("ABCD"[best] if answers == "letter" else record["options"][best])


def test_open_questions_are_refused_before_the_run_begins(tiny_run, tmp_path, video, capsys):
    rows = [
        {"video": video, "question": "?", "options": ["a", "b"], "answer": 0},
        {"video": video, "question": "?", "answer": "x"},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = {**tiny_run, "benchmark": {"name": "questions", "file": str(tmp_path / "mine.jsonl")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run, "generation": {"mode": "loglikelihood"}}))
    for more in ([], ["--dry-run"]):
        assert main(["evaluate", str(tmp_path / "run.yaml"), *more]) == 2
        said = capsys.readouterr().err
        assert "loglikelihood chooses among options, and 1 of the benchmark's questions are open, e.g. 'mine-2'" in said
    assert not parse_config(run, "x").folder.exists()


@pytest.mark.parametrize(
    "generation, message",
    [
        ({"mode": "loglikelyhood"}, "generation.mode is 'loglikelyhood'; did you mean 'loglikelihood'"),
        ({"mode": "loglikelihood", "normalise": "words"}, "generation.normalise is 'words'; .*one of none, length"),
        ({"normalise": "length"}, "generation.normalise: length is for mode: loglikelihood"),
        ({"mode": "loglikelihood", "num_beams": 2}, "generation.num_beams is about written answers"),
        ({"mode": "loglikelihood", "max_new_tokens": 4}, "generation.max_new_tokens is about written answers"),
    ],
)
def test_options_that_would_not_be_read_are_refused(tiny_run, generation, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**tiny_run, "generation": generation}, "x")


@pytest.mark.parametrize("found", [("A",), ["A", "B"], ("A", ""), None])
def test_a_benchmark_says_what_stands_for_each_option(found):
    class Says(xcomp.Benchmark):
        def continuations(self, question):
            return found

    with pytest.raises(ContractError, match=r"continuations\(\) must return a tuple of 2 texts, one an option"):
        query_of(Says(None), Question("1", "v", "What?", ("a", "b"), 0))

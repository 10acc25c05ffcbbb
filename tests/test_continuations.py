"""Given answers scored behind a stored video: against whole passes, one for each, and against greedy search."""

import pytest
import torch

import xcomp
from xcomp.answering import Answerer, Query
from xcomp.backbone import QuestionError, ShownVideo
from xcomp.compressor import Chain
from xcomp.config import Sampling
from xcomp.model import VideoQA

RULES = ["none", "lp_comp", "avg_pool", "fastv", "cdpruner", ["evs", "lp_comp"]]
TEXTS = ("A", "a much longer answer than the others", " B", "A\n")


def compressor(rule):
    return Chain([xcomp.load_compressor(r) for r in rule]) if isinstance(rule, list) else xcomp.load_compressor(rule)


@pytest.fixture
def make(make_backbone):
    def make(rule="lp_comp", selector="uniform", batch_size=3, **options):
        options = {"sampling": Sampling(rate=2, min_frames=8, max_frames=8), "frames": 4, **options}
        parts = compressor(rule), xcomp.load_selector(selector)
        return VideoQA(make_backbone(), *parts, batch_size=batch_size, **options).eval()

    return make


@pytest.fixture(scope="module")
def video(needle_videos):
    return xcomp.load_benchmark("needle", **needle_videos).questions()[0].video


def whole_pass(model, opened, query, text):
    """Log-probability of each of a text's tokens, from one pass over everything, and whether each is the best."""
    backbone = model.backbone
    (choice,) = model.answerer.choose(opened, [query])
    times = opened.times(choice.frames)
    prompt = backbone.prompt(query.text, ShownVideo(opened.info.duration, len(times), tuple(times)))
    ids = torch.tensor(backbone.tokenizer(text)["input_ids"])
    suffix = torch.cat([prompt.suffix_ids, ids[:-1]])
    visual = opened.visual(choice.frames)
    logits = model.decoder.logits([visual], [prompt.prefix_ids], [suffix], [len(ids)], [prompt.frame_texts])
    return logits.log_softmax(-1)[torch.arange(len(ids)), ids], logits.argmax(-1) == ids


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_continuation_scores_as_in_a_pass_of_its_own(make, video, rule):
    model = make(rule)
    queries = [Query(video, "What?", "What?"), Query(video, "Where?", "Where is it, and when?")]
    with model.open(video) as opened:
        found = model.answerer.score(opened, queries, [TEXTS, TEXTS[:2]])
        for query, outcome in zip(queries, found):
            for text, scored in zip(TEXTS, outcome):
                expected, best = whole_pass(model, opened, query, text)
                assert (scored.text, scored.num_tokens, scored.greedy) == (text, len(text), bool(best.all()))
                assert scored.logprob == pytest.approx(float(expected.sum()), abs=1e-4)
                assert scored.logprob / scored.num_tokens == pytest.approx(float(expected.mean()), abs=1e-5)
    assert [len(outcome) for outcome in found] == [4, 2]


@torch.no_grad()
def test_what_greedy_search_writes_is_greedy(make, video):
    model = make("fastv")
    query = Query(video, "What?", "What?")
    with model.open(video) as opened:
        (answer,) = model.answerer.answer(opened, [query])
        ((same, other),) = model.answerer.score(opened, [query], [(answer.text[:6], "~" + answer.text[1:6])])
    assert len(answer.text) >= 6 and same.greedy and not other.greedy and same.logprob > other.logprob


@torch.no_grad()
def test_the_video_is_run_once_for_all_questions(make, video, monkeypatch):
    passes, prefill_video = [], xcomp.Decoder.prefill_video
    monkeypatch.setattr(
        xcomp.Decoder, "prefill_video", lambda *args, **more: (passes.append(1), prefill_video(*args, **more))[1]
    )
    model = make("lp_comp")
    with model.open(video) as opened:
        model.answerer.score(opened, [Query(video, str(n), str(n)) for n in range(5)], [TEXTS] * 5)
    assert len(passes) == 1


@torch.no_grad()
def test_refused_questions_leave_the_others(make, video):
    model = make("lp_comp")
    queries = [Query(video, text, text) for text in ("What?", "\ud800", "Where?")]
    with model.open(video) as opened:
        first, second, third = model.answerer.score(opened, queries, [("A",), ("A",), ("",)])
    assert first[0].text == "A" and isinstance(second, QuestionError)
    assert isinstance(third, QuestionError) and "has no token" in str(third)


def test_continuations_of_another_number_are_refused(make_backbone):
    answerer = Answerer(make_backbone())
    backbone = answerer.backbone
    state = answerer.decoder.prefill(backbone.encode(torch.rand(2, 3, 2, 2)), [1, 2], [3, 4])
    for continuations in ([], [[1], [2]], [[]]):
        with pytest.raises(ValueError, match="continuations of at least one token"):
            answerer.decoder.score(state, continuations)

"""VideoQA: the loss and its gradients, a model that learns, and answers alone, in batches and from broken videos."""

import copy

import lightning as L
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import xcomp
from xcomp.benchmark import Question, multiple_choice_prompt
from xcomp.config import ConfigError, Generation, Sampling, Tune, parse_config
from xcomp.data.module import ConversationDataset
from xcomp.data.records import IGNORED, Conversation
from xcomp.model import Query, VideoQA
from xcomp.video import VideoError

OPTIONS = ("cross", "ring", "arch")
SAMPLING = Sampling(rate=2, min_frames=8, max_frames=8)
LESSONS = {"What colour is it?": 0, "Where?": 2}  # question → option that the trained model learns to give


@pytest.fixture(scope="module")
def backbone(tiny_checkpoint):
    return xcomp.load_backbone("videochat_flash", checkpoint=str(tiny_checkpoint))


@pytest.fixture(scope="module")
def videos(needle_videos):
    return sorted({q.video for q in xcomp.load_benchmark("needle", **needle_videos).questions()})


@pytest.fixture
def make(backbone):
    """A VideoQA on a copy of the backbone."""

    def make(compressor="lp_comp", selector="uniform", frames=4, **options):
        parts = xcomp.load_compressor(compressor), xcomp.load_selector(selector)
        options = {"sampling": SAMPLING, "generation": Generation(max_new_tokens=4), **options}
        return VideoQA(copy.deepcopy(backbone), *parts, frames=frames, **options).eval()

    return make


@pytest.fixture(scope="module")
def samples(backbone, videos):
    """Three training samples with unequal videos, prompts and answers, one of two turns."""
    conversations = [
        Conversation(videos[0], (("What colour is it?", "red"),), (4,)),
        Conversation(videos[1], (("Where is the ring, and when?", "top left, at the end"), ("Sure?", "yes")), (12,)),
        Conversation(videos[0], (("What?", "A"),), (8,)),
    ]
    dataset = ConversationDataset(conversations, backbone)
    return [dataset[i] for i in range(3)]


# --- training ---------------------------------------------------------------------------------------------------------


def own_loss(model, sample):
    """One sample's summed cross-entropy, its answer tokens and those predicted right, from the logits everywhere."""
    tokens = model.backbone.encode(model.backbone.pixel_format.normalise(sample.pixels))
    suffix, labels = sample.text.suffix_ids, sample.text.labels
    logits = model.decoder.logits(tokens, sample.text.prefix_ids, suffix, [len(suffix)])
    predicted, wanted = logits[:-1], labels[1:]  # each position predicts the next
    answer = wanted != IGNORED
    right = (predicted.argmax(-1) == wanted)[answer].sum()
    return cross_entropy(predicted[answer], wanted[answer], reduction="sum"), int(answer.sum()), int(right)


@pytest.mark.parametrize("compressor", ["none", "lp_comp"])
def test_the_loss_of_a_batch_is_the_mean_over_its_answer_tokens(make, samples, compressor):
    model = make(compressor)
    with torch.no_grad():
        losses, counts, _ = zip(*(own_loss(model, sample) for sample in samples))
        assert len(set(counts)) == 3
        expected = sum(losses) / sum(counts)
        torch.testing.assert_close(model._loss(samples)[0], expected, rtol=1e-5, atol=0)
        assert abs(expected - torch.stack(losses).div(torch.tensor(counts)).mean()) > 0.01  # it is no mean of means


@pytest.mark.parametrize("train", [["llm"], ["projector"], ["vision"], ["llm", "projector"], []])
def test_only_the_parts_named_get_gradients(make, samples, train):
    model = make(tune=Tune(train=train))
    model.freeze_untrained()
    trained = {id(p) for part in train for module in model.backbone.parts()[part] for p in module.parameters()}
    assert bool(trained) == bool(train)
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    if train:
        model._loss(samples)[0].backward()
    got = {id(p) for p in model.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got <= trained and len(got) >= 0.9 * len(trained)
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


def test_parts_together_are_the_whole_model(backbone):
    parts = backbone.parts()
    found = {id(p) for modules in parts.values() for module in modules for p in module.parameters()}
    assert set(parts) == {"llm", "projector", "vision"} and found == {id(p) for p in backbone.parameters()}


def test_the_learning_rate_rises_and_falls(make):
    made = make(tune=Tune(steps=8, warmup_ratio=0.25, learning_rate=1.0)).configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0, 0.5, 1.0] and rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-6) and made["lr_scheduler"]["interval"] == "step"


@pytest.fixture(scope="module")
def trained(backbone, videos):
    """A model that has learnt to answer two questions with letters, its losses on the way, and what it learnt from."""
    tune = Tune(steps=60, learning_rate=5e-3, warmup_ratio=0.1)
    lp_comp = xcomp.load_compressor("lp_comp")
    model = VideoQA(copy.deepcopy(backbone), lp_comp, sampling=SAMPLING, generation=Generation(4), tune=tune)
    model.freeze_untrained()
    turns = [((multiple_choice_prompt(q, OPTIONS), "ABC"[option]),) for q, option in LESSONS.items()]
    dataset = ConversationDataset([Conversation(videos[0], t) for t in turns], backbone, sampling=SAMPLING)
    batch = [dataset[i] for i in range(len(dataset))]
    made = model.configure_optimizers()
    losses = []
    for _ in range(tune.steps):
        loss = model.training_step(batch, 0)
        made["optimizer"].zero_grad()
        loss.backward()
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
        losses.append(loss.item())
    return model.eval(), losses, batch


def test_a_few_steps_lower_the_loss(trained):
    losses = trained[1]
    assert losses[10] < 0.7 * losses[0] and losses[-1] < 0.05 * losses[0]


def test_token_accuracy_is_the_share_of_answer_tokens(trained, samples):
    model, _, lessons = trained
    batch = [*lessons, *samples]
    with torch.no_grad():
        _, counts, right = zip(*(own_loss(model, sample) for sample in batch))
        assert model._loss(lessons)[1] == 1
        assert model._loss(batch)[1].item() == pytest.approx(sum(right) / sum(counts)) and sum(right) < sum(counts)


def test_ask_with_options_returns_the_choice(trained, videos):
    for question, option in LESSONS.items():
        answer = trained[0].ask(videos[0], question, OPTIONS)
        assert answer.choice == option and answer.text == "ABC"[option]
        assert trained[0].ask(videos[0], question).choice is None


@pytest.mark.parametrize("options", [["one"], [str(i) for i in range(27)]])
def test_ask_refuses_options_it_cannot_letter(trained, videos, options):
    with pytest.raises(ValueError, match=rf"has {len(options)} options; it must have 2..26"):
        trained[0].ask(videos[0], "What?", options)


def test_lightning_tests_it(trained, videos):
    """Two of three answers are right by how the model was trained."""
    asked = [(q, option) for q, option in LESSONS.items()] + [("Where?", 1)]
    questions = [Question(str(i), videos[0], q, OPTIONS, option) for i, (q, option) in enumerate(asked)]
    items = [(q, Query(q.video, q.question, multiple_choice_prompt(q.question, q.options))) for q in questions]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (metrics,) = trainer.test(trained[0], DataLoader(items, batch_size=2, collate_fn=list), verbose=False)
    assert metrics == {"test/accuracy": pytest.approx(2 / 3)}


# --- answering --------------------------------------------------------------------------------------------------------


def queries(videos):
    texts = ["What?", "Which symbol appears first, and which one after it?", "Where is the ring?", "Describe it."]
    return [Query(videos[i % 2], text, text) for i, text in enumerate(texts)]


def test_sampled_answers_follow_the_seed_and_leave_other_random_numbers_alone(make, videos):
    def texts(**options):
        model = make(generation=Generation(max_new_tokens=8, do_sample=True, temperature=3.0, **options))
        return [answer.text for answer in model.answer(queries(videos))]

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = texts(seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert first == texts(seed=1) != texts(seed=2)
    assert texts(seed=1, top_k=1) == [answer.text for answer in make(generation=Generation(8)).answer(queries(videos))]
    beams = make(generation=Generation(max_new_tokens=8, num_beams=3)).answer(queries(videos)[:2])
    assert len(beams) == 2


@pytest.mark.parametrize("selector", ["uniform", "qc_comp"])
def test_answers_of_a_batch_are_those_of_each_alone(make, videos, selector):
    model = make(selector=selector)
    asked = queries(videos)
    together = model.answer(asked)
    assert len({answer.text for answer in together}) > 1
    for query, answer in zip(asked, together):
        (alone,) = model.answer([query])
        for name in ("text", "frames", "times", "duration", "tokens_per_layer", "tokens_in", "scores"):
            assert getattr(alone, name) == getattr(answer, name), name
        assert alone.share.macs == answer.share.macs
        assert selector == "uniform" or len(alone.scores) == 8


def test_videos_of_unequal_length_are_answered_together(make, videos, tmp_path):
    options = {"split": "validation", "num_videos": 1, "seconds": 12, "root": str(tmp_path)}
    long = xcomp.load_benchmark("needle", **options).questions()[0].video
    model = make(frames=None, sampling=Sampling(rate=2, min_frames=8, max_frames=24))
    asked = [Query(videos[0], "What?", "What?"), Query(long, "What?", "What?")]
    together = model.answer(asked)
    assert [len(answer.frames) for answer in together] == [8, 24]
    assert [answer.text for answer in together] == [model.answer([query])[0].text for query in asked]
    assert together[0].duration == 4 and together[1].duration == 12


def test_an_answer_says_what_was_shown_and_what_it_cost(make, videos):
    answer = make(frames=4).ask(videos[0], "What?")
    assert answer.frames == sorted(answer.frames) and len(answer.frames) == 4
    assert answer.times == [frame / 8 for frame in answer.frames]  # the videos have 8 frames a second
    assert answer.tokens_in == 4 * 9 and answer.tokens_per_layer == [4 * 9, 4 * 1]
    assert min(answer.share.macs[stage] for stage in ("vision", "prefill", "answer")) > 0 == answer.share.macs["select"]
    assert answer.share.seconds["decode"] > 0 and answer.share.seconds["select"] == 0 and answer.scores is None
    uncompressed = make("none", frames=4).ask(videos[0], "What?")
    assert uncompressed.tokens_per_layer == [64, 64]
    assert uncompressed.share.macs["prefill"] > answer.share.macs["prefill"]


def test_the_budget_decides_what_the_selector_is_asked_for(make, videos):
    assert len(make(frames=None).ask(videos[0], "What?").frames) == 8
    assert len(make(frames=16).ask(videos[0], "What?").frames) == 8  # there are no more candidates
    chosen = make(selector="qc_comp", frames=4).ask(videos[0], "What?")
    best = sorted(range(8), key=lambda i: -chosen.scores[i])[:4]
    assert [chosen.candidate_times[i] for i in sorted(best)] == chosen.times


def test_a_broken_video_is_the_outcome_of_its_own_query_only(make, videos, tmp_path):
    (tmp_path / "broken.mp4").write_text("no video")
    model = make()
    good = queries(videos)[:2]
    batch = [(None, good[0]), (None, Query(str(tmp_path / "broken.mp4"), "What?", "What?")), (None, good[1])]
    first, broken, second = model.predict_step(batch)
    assert isinstance(broken, VideoError) and "broken.mp4" in str(broken)
    assert [first.text, second.text] == [answer.text for answer in model.answer(good)]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_budget_that_cuts_clips_is_refused(make):
    with pytest.raises(ValueError, match="a budget of 6 frames does not divide into encoder clips of 4; take 4"):
        make(frames=6)
    with pytest.raises(ValueError, match="a budget of 3 frames does not divide into encoder clips of 4; take 4"):
        make(frames=3)


@pytest.mark.parametrize("option", [{"multiple": 2}, {"min_frames": 6}])
def test_sampling_that_cuts_clips_is_refused(make, option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"sampling.{name} is {option[name]}; it must be a multiple of 4"):
        make(sampling=Sampling(**option))


def test_several_budgets_are_refused_where_one_is_needed(backbone):
    with pytest.raises(ConfigError, match=r"frames is \[4, 8\]; several budgets are for a comparison"):
        VideoQA.from_config(parse_config({"frames": [4, 8]}, "x"), backbone)


def test_a_configuration_names_the_parts(backbone):
    config = parse_config({"compressor": {"name": "avg_pool", "tokens": 2}, "frames": 8, "batch_size": 2}, "x")
    model = VideoQA.from_config(config, backbone)
    assert type(model.compressor).__name__ == "AvgPool" and model.compressor.config.tokens == 2
    assert model.answerer.budget == 8 and model.answerer.batch_size == 2
    assert model.backbone is backbone and model.decoder.compressor is model.answerer.compressor is model.compressor

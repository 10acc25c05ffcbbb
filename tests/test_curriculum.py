"""Compression that grows while a model is tuned, and a teacher that sees every token."""

import math
from functools import partial

import pytest
import torch
from tuning_runs import logged, same, tuning_config, weights

import xcomp
from xcomp.config import ConfigError, Curriculum, Distillation, Lora, Tune, parse_config
from xcomp.curriculum import distillation_loss, end_at
from xcomp.data.module import Sample
from xcomp.data.records import TokenisedConversation
from xcomp.decoder import Decoder
from xcomp.model import VideoQA
from xcomp.tiny import TinyBackbone, tiny_backbone
from xcomp.tuning import tune


@pytest.fixture
def make(tiny_run, needle_videos):
    return partial(tuning_config, tiny_run, needle_videos)


def run(content):
    return tune(parse_config(content, "x"))


def sample(seed=0, frames=4):
    noise = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (frames, 3, 2, 2), dtype=torch.uint8, generator=noise)
    suffix = torch.tensor([9, 8, 7, 20, 21, 0])
    labels = torch.tensor([-100, -100, -100, 20, 21, 0])
    return Sample(pixels, TokenisedConversation(torch.tensor([1, 2, 3]), suffix, labels))


@pytest.mark.parametrize(
    "options",
    [{"curriculum": {"share": 0.8}}, {"distillation": {"weight": 0.3, "temperature": 2}}, {"lora": {"rank": 2}}],
)
def test_a_stopped_run_goes_on_to_the_same_bits(make, stop_before, options):
    options = {"distillation": {}, **options, "save_every": 1}
    whole = run(make("whole", {"trainer": {"accumulate_grad_batches": 2}}, **options))
    restore = stop_before(7)  # in the middle of the fourth step
    with pytest.raises(RuntimeError, match="power cut"):
        run(make("run", {"trainer": {"accumulate_grad_batches": 2}}, **options))
    restore()
    torch.manual_seed(99)
    resumed = run(make("run", {"trainer": {"accumulate_grad_batches": 2}}, **options))
    for column in ("train/loss", "train/distillation"):
        assert logged(resumed.parent, column) == logged(whole.parent, column) and len(logged(whole.parent, column)) == 6
    name = "adapter_model.safetensors" if "lora" in options else "model.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


# --- curriculum -------------------------------------------------------------------------------------------------------


def test_the_end_falls_in_equal_parts():
    found = [end_at(Curriculum(0.5), step, 20, 16, 1) for step in range(20)]
    assert found == [16, 15, 13, 12, 10, 9, 7, 6, 4, 3] + [1] * 10  # 16 - 1.5 a step, halves up
    assert [end_at(Curriculum(1), step, 4, 8, 2) for step in range(5)] == [8, 7, 5, 4, 2]


def test_compression_grows_while_a_model_is_tuned_and_is_whole_in_validation(make, monkeypatch):
    seen, plan = [], Decoder.plan

    def noticing(self, tokens_per_frame):
        found = plan(self, tokens_per_frame)
        seen.append((torch.is_grad_enabled(), len(found[-1])))
        return found

    monkeypatch.setattr(Decoder, "plan", noticing)
    model = run(make("run", curriculum={"share": 0.5}, validation=True, steps=4))
    assert [end for trains, end in seen if trains] == [16, 9, 1, 1]
    assert {end for trains, end in seen if not trains} == {1}
    assert xcomp.recorded.recorded_compressor({"name": "x", "checkpoint": str(model)})["end"] == 1
    monkeypatch.undo()
    assert logged(run(make("none", {"compressor": "none"}, steps=4)).parent)[0] == logged(model.parent)[0]


@pytest.mark.parametrize(
    "compressor, options, line",
    [
        ("avg_pool", {"curriculum": {}}, "moves the end of a planned schedule .*, which compressor 'avg_pool' has not"),
        (
            {"name": "lp_comp", "schedule": "steps", "steps": {1: 4}},
            {"curriculum": {}},
            "'lp_comp' with schedule 'steps' has",
        ),
        ("lp_comp", {"curriculum": {"share": 0}}, "tune.curriculum.share is 0.0; it must be above 0"),
        ("lp_comp", {"curriculum": {"shar": 1}}, "tune.curriculum' has no key 'shar'; did you mean 'share'"),
        (
            "lp_comp",
            {"distillation": {"weight": 2}},
            "tune.distillation.weight is 2.0; it must be above 0 and at most 1",
        ),
        ("lp_comp", {"distillation": {"temperature": 0}}, "tune.distillation.temperature is 0.0; it must be above 0"),
    ],
)
def test_what_cannot_be_is_one_line(make, compressor, options, line):
    with pytest.raises(ConfigError, match=line):
        run(make("run", {"compressor": compressor}, **options))


# --- distillation -----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_divergence_written_out():
    noise = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=noise) for _ in range(2))
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist()):
        p = [math.exp(x / 3) for x in t]
        q = [math.exp(x / 3) for x in s]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q))
    assert float(distillation_loss(student, teacher, 3.0)) == pytest.approx(9 * total / 5, rel=1e-5)
    assert float(distillation_loss(teacher, teacher, 1.0)) == pytest.approx(0, abs=1e-6)


def tuned(**options):
    backbone = tiny_backbone()
    backbone.config = TinyBackbone.Config()
    model = VideoQA(backbone, xcomp.load_compressor("lp_comp"), tune=Tune(**options))
    model.prepare_tuning()
    return model


def test_a_step_learns_from_labels_and_from_the_model_at_the_start():
    """Loss and gradients as written out with two models; the teacher stays what it was and learns nothing."""
    model = tuned(train=["llm", "projector"], distillation=Distillation(weight=0.25, temperature=2))
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.01)  # some steps later
    batch = [sample(0), sample(1, frames=6)]
    loss = model.training_step(batch, 0)
    loss.backward()

    start, now = tiny_backbone(), tiny_backbone()
    with torch.no_grad():
        for parameter in now.parameters():
            parameter.mul_(1.01)

    def logits(backbone, compressor):
        rows = []
        for one in batch:  # each alone
            pixels = backbone.pixel_format.normalise(one.pixels, torch.float32)
            tokens, text = backbone.encode(pixels), one.text
            rows.append(Decoder(backbone, compressor).logits([tokens], [text.prefix_ids], [text.suffix_ids[:-1]], [3]))
        return torch.cat(rows)

    with torch.no_grad():
        p = (logits(start, None) / 2).softmax(-1)
    ours = logits(now, xcomp.load_compressor("lp_comp"))
    labels = torch.tensor([20, 21, 0] * 2)
    cross = -ours.log_softmax(-1)[torch.arange(6), labels].mean()
    apart = (p * (p.log() - (ours / 2).log_softmax(-1))).sum(-1).mean()
    expected = 0.75 * cross + 0.25 * 4 * apart
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (step,) = model._of_step
    assert step["loss"].item() == pytest.approx(cross.item(), rel=1e-5)
    assert step["distillation"].item() == pytest.approx(4 * apart.item(), rel=1e-4)
    for (name, mine), theirs in zip(model.backbone.named_parameters(), now.parameters()):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4), name
    assert same(dict(model.teacher.backbone.named_parameters()), dict(start.named_parameters()))
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.parameters())
    assert not any(name.startswith("teacher") for name in model.state_dict())


@pytest.mark.parametrize(
    "options, own",
    [
        ({}, "projector and llm"),
        ({"train": ["projector"]}, "projector"),
        ({"lora": Lora(merge=True), "train": ["llm"]}, ""),
    ],
)
def test_the_teacher_holds_copies_of_what_changes_alone(options, own):
    model = tuned(distillation=Distillation(), **options)
    students = {id(p) for p in model.backbone.parameters()}
    copied = {name for name, p in model.teacher.backbone.named_parameters() if id(p) not in students}
    parts = {"projector": {n for n, _ in model.teacher.backbone.named_parameters() if n.startswith("projector")}}
    parts["llm"] = {n for n, _ in model.teacher.backbone.named_parameters()} - parts["projector"]
    assert copied == set().union(*(names for part, names in parts.items() if part in own))


def test_runs_without_them_are_as_they_were(make):
    plain = run(make("plain", steps=2, warmup_ratio=0))
    assert not same(weights(plain), weights(run(make("taught", steps=2, distillation={"weight": 1.0}, warmup_ratio=0))))
    assert not logged(plain.parent, "train/distillation")

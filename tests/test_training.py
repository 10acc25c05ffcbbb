"""How a model is trained: learning rates and their schedules, and what else `tune` says of a step."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn import Linear
from tuning_runs import checkpoints, logged, same, tuning_config, weights

import xcomp
from xcomp.config import ConfigError, Tune, load_config, parse_config
from xcomp.data.module import Sample
from xcomp.data.records import TokenisedConversation
from xcomp.model import VideoQA
from xcomp.tiny import tiny_backbone
from xcomp.tuning import tune


def tuned(compressor=None, **options):
    model = xcomp.VideoQA(tiny_backbone(), compressor, tune=Tune(**options))
    model.freeze_untrained()
    return model


def rates(model, steps):
    """Learning rate of the first group at each step."""
    made = model.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.fixture
def make(tiny_run, needle_videos):
    return partial(tuning_config, tiny_run, needle_videos)


def run(content):
    return tune(parse_config(content, "x"))


SHAPES = {
    "cosine": lambda share, step: (1 + math.cos(math.pi * share)) / 2,
    "linear": lambda share, step: 1 - share,
    "constant": lambda share, step: 1,
    "inverse_sqrt": lambda share, step: (step / 3) ** -0.5,
}


@pytest.mark.parametrize("schedule", SHAPES)
def test_a_schedule_rises_and_falls_as_its_name_says(schedule):
    found = rates(tuned(steps=20, warmup_ratio=0.15, learning_rate=0.5, schedule=schedule), 20)
    expected = [0, 0.5 / 3, 1 / 3] + [0.5 * SHAPES[schedule]((s - 3) / 17, s) for s in range(3, 20)]
    assert found == pytest.approx(expected)


def test_the_warm_up_is_rounded_up():
    """As in the released run: 68 of 2,247 steps at a ratio of 0.03, which is 67.41."""
    found = rates(tuned(steps=2247, warmup_ratio=0.03), 70)
    assert found[67] == pytest.approx(67 / 68 * 1e-5) and found[68] == 1e-5 > found[69]


def test_each_part_has_its_rate():
    class Own(xcomp.Compressor):
        def build(self, width):
            self.layer = Linear(width, 2)

    model = tuned(Own(None), train=["llm", "projector", "compressor"], learning_rate=1e-5,
                  learning_rates={"projector": 2e-4, "compressor": 1e-3})  # fmt: skip
    optimizer = model.configure_optimizers()["optimizer"]
    parts = {"llm": [model.backbone.language_model, model.backbone.lm_head], "projector": [model.backbone.projector],
             "compressor": [model.compressor]}  # fmt: skip
    found = {group["name"]: (group["initial_lr"], {id(p) for p in group["params"]}) for group in optimizer.param_groups}
    assert found == {
        part: (rate, {id(p) for module in parts[part] for p in module.parameters()})
        for part, rate in (("llm", 1e-5), ("projector", 2e-4), ("compressor", 1e-3))
    }


@pytest.mark.parametrize(
    "options, line",
    [
        ({"schedule": "cosin"}, "tune.schedule is 'cosin'; did you mean 'cosine'"),
        (
            {"learning_rates": {"vision": 1e-6}},
            "tune.learning_rates names 'vision', which is not trained; tune.train: ",
        ),
        ({"learning_rates": {"lm": 1e-6}}, "tune.learning_rates names 'lm', which is not trained; did you mean 'llm'"),
        ({"learning_rates": {"llm": 0}}, "tune.learning_rates.llm is 0.0; it must be above 0"),
    ],
)
def test_what_cannot_be_is_one_line(options, line):
    with pytest.raises(ConfigError, match=line):
        parse_config({"tune": options}, "x")


# --- callbacks --------------------------------------------------------------------------------------------------------


class Noticing(Callback):
    """A callback of a user's own, which logs a metric."""

    def __init__(self, value: float = 1.0):
        self.value = value

    def on_train_batch_end(self, trainer, module, *_):
        module.log("mine", self.value * trainer.global_step)


class Remembering(Callback):
    """A callback whose state no checkpoint can hold."""

    def state_dict(self):
        return {"where": Path("/tmp")}


def test_a_callback_whose_state_could_not_be_read_again_is_refused_at_once(make):
    with pytest.raises(ConfigError, match="callback Remembering has a state of more than tensors, numbers and text"):
        run(make("run", callbacks=[{"name": "test_training:Remembering"}]))


def test_early_stopping_ends_a_run_whose_model_is_the_best_one(make, capsys):
    callbacks = [{"name": "EarlyStopping", "monitor": "mine", "patience": 1, "mode": "min"},
                 {"name": "test_training:Noticing", "value": 2.0},
                 {"name": "ModelCheckpoint", "monitor": "validation/loss", "save_weights_only": True}]  # fmt: skip
    options = {"validation": True, "validate_every": 4, "steps": 40, "learning_rate": 0.05, "callbacks": callbacks}
    model = run(make("run", **options, export="best"))
    folder, err = model.parent, capsys.readouterr().err
    assert sorted(logged(folder)) == list(range(8))  # epochs of 4 steps: 4 was the best, 8 is no better
    losses = {int(step) + 1: float(loss) for step, loss in logged(folder, "validation/loss").items()}
    step = min(losses, key=losses.get)
    (best,) = (folder / "checkpoints").glob("best-*.ckpt")
    assert sorted(losses) == [4, 8] and best.name == f"best-step={step}-loss={losses[step]:.6g}.ckpt"
    best = torch.load(best, weights_only=True)["state_dict"]
    state = torch.load(folder / "checkpoints" / "step=8.ckpt", weights_only=True)
    loaded = dict(xcomp.load_backbone("videochat_flash", checkpoint=str(model)).named_parameters())
    assert same(loaded, {name: best[f"backbone.{name}"] for name in loaded})
    assert same(loaded, {n: state["state_dict"][f"backbone.{n}"] for n in loaded}) == (step == 8)
    assert len(list((folder / "checkpoints" / "named").glob("*.ckpt"))) == 1
    assert "xcomp: a callback ended the run after step 8\n" in err
    assert (f"the model is that of step {step}, with the lowest validation loss" in err) == (step != 8)
    assert json.loads((model / "xcomp.json").read_text())["tuned"]["steps"] == step
    assert run(make("run", **options, export="last")) == model
    assert same(dict(xcomp.load_backbone("videochat_flash", checkpoint=str(model)).named_parameters()),
                {n: state["state_dict"][f"backbone.{n}"] for n in loaded})  # fmt: skip


@pytest.mark.parametrize(
    "node, line",
    [
        ("EarlyStopping", r"tune.callbacks\[0\] is 'EarlyStopping'; it must be a mapping with 'name'"),
        ({"name": "EarlyStoping"}, "has no 'EarlyStoping'; did you mean 'EarlyStopping'"),
        ({"name": "EarlyStopping", "patiance": 2}, "has no argument 'patiance'; did you mean 'patience'"),
        ({"name": "EarlyStopping"}, "EarlyStopping: .*monitor"),
        ({"name": "EarlyStopping", "monitor": "val_loss"}, "monitor is 'val_loss'; did you mean 'validation/loss'"),
        (
            {"name": "EarlyStopping", "monitor": "validation/loss"},
            "monitors 'validation/loss', but tune.validation is em",
        ),
        ({"name": "EarlyStopping", "monitor": "train/loss", "mode": "least"}, "EarlyStopping: `mode` can be"),
        ({"name": "nowhere:Mine"}, "'nowhere:Mine' cannot be imported: No module named 'nowhere'"),
        ({"name": "math:pi"}, "'math:pi' is no class derived from"),
        ({"name": "GradientAccumulationScheduler", "scheduling": {0: 2}}, "set trainer.accumulate_grad_batches"),
        ({"name": "EMAWeightAveraging"}, "tune.export=best chooses the weights"),
        ({"name": "lightning.pytorch.callbacks:EMAWeightAveraging"}, "tune.export=best chooses the weights"),
        ({"name": "EarlyStopping", "monitor": "train/distillation"}, "monitor is 'train/distillation'; .*metrics: "),
    ],
)
def test_a_callback_that_cannot_be_is_refused_before_anything_is_loaded(make, tmp_path, node, line):
    content = make("run", {"backbone": {"name": "videochat_flash", "checkpoint": "/nowhere"}}, callbacks=[node])
    with pytest.raises(ConfigError, match=line):
        run(content)
    assert not (tmp_path / "runs").exists()


# --- what a run leaves and tells --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep, left", [(1, [6]), (3, [4, 5, 6])])
def test_as_many_checkpoints_are_kept_as_asked(make, keep, left):
    folder = run(make("run", keep=keep, save_every=1)).parent
    assert checkpoints(folder) == [f"step={step}.ckpt" for step in left]
    run(make("run", keep=keep, save_every=1, steps=7))
    assert checkpoints(folder) == [f"step={step}.ckpt" for step in [*left, 7][-keep:]]


def test_speed_memory_and_time_left_are_told(make, capsys):
    bar = {"trainer": {"enable_progress_bar": True, "accumulate_grad_batches": 2}}
    folder = run(make("run", bar, frames=[8], steps=3)).parent
    names = ("tokens_per_second", "frames_per_second", "peak_memory_gb", "seconds_left")
    tokens, frames, peak, left = ({s: float(v) for s, v in logged(folder, name).items()} for name in names)
    assert all(sorted(values) == [0, 1, 2] and min(values.values()) >= 0 for values in (tokens, frames, peak, left))
    assert 16 < tokens[2] / frames[2] < 60  # 16 of each frame, and the texts of a video of 8
    assert 0.05 < peak[2] < 20 and left[2] == 0 < left[0]
    assert re.search(r"3/3 .* loss \d\.\d+ +[\d,]+ tok/s +[\d,.]+ f", capsys.readouterr().out)
    assert json.loads((folder / "run.json").read_text())["tuned"] == {"steps": 3, "save_dtype": None, "export": "last"}


def test_the_best_needs_a_validation_and_checkpoints(make):
    with pytest.raises(ConfigError, match="tune.export is best, but tune.validation is empty"):
        run(make("run", export="best"))
    with pytest.raises(ConfigError, match="tune.export is best, but trainer.enable_checkpointing is false"):
        run(make("run", {"trainer": {"enable_checkpointing": False}}, export="best", validation=True))


# --- what the released training does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, quirks, learns", [(510, True, True), (512, True, False), (512, False, True)])
def test_long_videos_may_teach_the_language_model_alone(frames, quirks, learns):
    quirks = ["no_vision_gradient_from_512_frames"] if quirks else []
    options = Tune(train=["llm", "projector"], quirks=quirks)
    model = xcomp.VideoQA(tiny_backbone(tokens_per_frame=4), xcomp.load_compressor("lp_comp"), tune=options)
    model.freeze_untrained()
    pixels = torch.randint(0, 256, (frames, 3, 2, 2), dtype=torch.uint8)
    prefix, suffix = torch.tensor([1, 2]), torch.tensor([3, 4, 5, 0])
    sample = Sample(pixels, TokenisedConversation(prefix, suffix, torch.tensor([-100, -100, 5, 0])))
    model.training_step([sample], 0).backward()
    assert bool(model.backbone.projector.weight.grad.any()) == learns
    assert model.backbone.language_model.embed_tokens.weight.grad is not None


@pytest.mark.parametrize(
    "options, line",
    [
        ({"quirks": ["no_gradients"]}, "tune.quirks names 'no_gradients'; did you mean 'no_vision_gradient"),
        (
            {"quirks": ["no_vision_gradient_from_512_frames"], "train": ["projector"]},
            "leave nothing to learn without 'llm' in tune.train",
        ),
    ],
)
def test_quirks_are_named_and_leave_something_to_learn(options, line):
    with pytest.raises(ConfigError, match=line):
        parse_config({"tune": options}, "x")


def test_the_papers_settings_are_those_of_its_table():
    config = load_config("videochat_flash_2b/tune")
    tune, sampling = config.tune, config.sampling
    assert tune.train == ["llm"] and (tune.learning_rate, tune.weight_decay, tune.warmup_ratio) == (1e-5, 0, 0.03)
    assert tune.schedule == "cosine" and tune.num_workers == 1 and config.backbone["clip_frames"] == 8
    assert (sampling.rate, sampling.min_frames, sampling.max_frames) == (8, 128, 1024)
    assert len(sampling.candidates(60, 30.0)) == 56  # of a video of 60 frames whole eights, none of them twice
    assert tune.steps * tune.batch_size * config.trainer["accumulate_grad_batches"] == 71_904  # of 71,927


# --- through Lightning ------------------------------------------------------------------------------------------------


def test_half_precision_and_clipping_are_the_trainers(make):
    plain = run(make("plain", {"trainer": {"gradient_clip_val": 0}}, steps=2, warmup_ratio=0)).parent
    half = run(make("half", {"trainer": {"gradient_clip_val": 0, "precision": "bf16-mixed"}}, steps=2, warmup_ratio=0))
    losses = [[float(loss) for loss in logged(folder).values()] for folder in (plain, half.parent)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert {tensor.dtype for tensor in weights(half).values()} == {torch.float32}
    before = weights(Path(make("x")["backbone"]["checkpoint"]))
    # AdamW takes the first step whatever a gradient's size, unless ε outweighs it.
    clipped = weights(run(make("clipped", {"trainer": {"gradient_clip_val": 1e-9}}, steps=1, warmup_ratio=0)))
    moved, free = (
        max((found[name] - before[name]).abs().max().item() for name in before)
        for found in (
            clipped,
            weights(run(make("free", {"trainer": {"gradient_clip_val": 0}}, steps=1, warmup_ratio=0))),
        )
    )
    assert free == pytest.approx(1e-3, rel=0.01) and moved < 0.2 * free


def test_a_stopped_run_that_accumulates_over_a_record_it_left_out_goes_on_to_the_same_bits(make, tmp_path, monkeypatch):
    good = make("x")["tune"]["data"][0]
    turns = [{"from": "human", "value": "<video>Q"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "records.json").write_text(json.dumps([{"video": "broken.mp4", "conversations": turns}] * 3))
    data = [good, {"records": str(tmp_path / "records.json"), "root": str(tmp_path)}]
    options = {"data": data, "max_skipped": 0.5, "batch_size": 1, "save_every": 1}
    top = {"trainer": {"accumulate_grad_batches": 2}}
    whole = run(make("whole", top, **options))
    for stop in (3, 4, 5):
        train, batches = VideoQA.training_step, []

        def training_step(self, batch, batch_idx, train=train, batches=batches, stop=stop):
            batches.append(batch_idx)
            if len(batches) > stop:
                raise RuntimeError("power cut")
            return train(self, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(VideoQA, "training_step", training_step)
            with pytest.raises(RuntimeError, match="power cut"):
                run(make("run", top, **options))
    resumed = run(make("run", top, **options))
    assert same(weights(resumed), weights(whole)) and logged(resumed.parent) == logged(whole.parent)
    assert all("broken.mp4" in (model.parent / "skipped.jsonl").read_text() for model in (whole, resumed))


def test_what_was_best_on_other_records_is_not_best_any_more(make, capsys):
    folder = run(make("run", validation=True, steps=4, learning_rate=0.05)).parent
    (before,) = (folder / "checkpoints").glob("best-*")
    other = make("run", validation=True, steps=8, learning_rate=0.05)
    other["tune"]["validation"] = [{**other["tune"]["validation"][0], "repeat": 2}]
    capsys.readouterr()
    run(other)
    assert f"xcomp: tune.validation has changed: {before.name} is the best no longer\n" in capsys.readouterr().err
    (best,) = (folder / "checkpoints").glob("best-*")
    assert best.name.startswith("best-step=8-")

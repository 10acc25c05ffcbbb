"""How a model is trained: learning rates and their schedules, and what else `tune` says of a step."""

import math

import pytest
from torch.nn import Linear

import xcomp
from xcomp.config import ConfigError, Tune, parse_config
from xcomp.tiny import tiny_backbone


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

"""LoRA: what it trains, what its checkpoints and models hold, and that merged weights compute the same."""

import json
from functools import partial

import pytest
import torch
from conftest import relative_error
from torch.nn.functional import linear
from tuning_runs import checkpoints, logged, same, tuning_config, weights

import xcomp
from xcomp.adapters import add_adapters, merge_adapters
from xcomp.compare.forecast import skeleton
from xcomp.compare.stand_in import missing_weights
from xcomp.config import ConfigError, Lora, parse_config
from xcomp.decoder import Decoder
from xcomp.model import VideoQA
from xcomp.tiny import tiny_backbone
from xcomp.tuning import tune

PREFIX, SUFFIX = torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10, 11, 12])


@pytest.fixture
def make(tiny_run, needle_videos):
    return partial(tuning_config, tiny_run, needle_videos)


def run(content):
    return tune(parse_config(content, "x"))


def backbone_of(checkpoint):
    return xcomp.load_backbone("videochat_flash", checkpoint=str(checkpoint))


@torch.no_grad()
def logits(backbone):
    noise = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, backbone.tokens_per_frame, backbone.text_config.hidden_size, generator=noise)
    return Decoder(backbone, xcomp.load_compressor("lp_comp")).prefill(tokens, PREFIX, SUFFIX).logits


@pytest.fixture
def adapted():
    """A tiny backbone with adapters that change something."""
    backbone = tiny_backbone()
    backbone.config = xcomp.tiny.TinyBackbone.Config()
    add_adapters(backbone, Lora(rank=2, alpha=6, targets=["q_proj", "down_proj"], merge=True), seed=0)
    noise = torch.Generator().manual_seed(1)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=noise)
    return backbone


def test_an_adapted_layer_is_its_own_plus_the_scaled_product(adapted):
    layer = adapted.language_model.layers[1].self_attn.q_proj
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    parts = {name.split(".")[0]: p for name, p in layer.named_parameters() if "lora" in name}
    expected = linear(x, layer.weight, layer.bias) + 6 / 2 * linear(linear(x, parts["lora_A"]), parts["lora_B"])
    assert parts["lora_A"].shape == (2, 32) and relative_error(layer(x), expected) < 1e-6


def test_merged_weights_give_the_logits_of_the_adapters(adapted):
    before, plain = logits(adapted), logits(tiny_backbone())
    assert relative_error(before, plain) > 0.01  # or nothing is shown
    merge_adapters(adapted.language_model)
    assert relative_error(logits(adapted), before) < 1e-6
    names = [name for name, _ in adapted.named_parameters()]
    assert names == [name for name, _ in tiny_backbone().named_parameters()]


def test_a_run_writes_adapters_that_read_as_the_merged_model(make, tiny_checkpoint):
    lora = {"rank": 4, "dropout": 0.1}
    model = run(make("run", lora=lora))
    files = {path.name for path in model.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "trained.safetensors", "xcomp.json"}
    state = torch.load(model.parent / "checkpoints" / "step=6.ckpt", weights_only=True)["state_dict"]
    assert state and all(".lora_" in name or ".projector." in name for name in state)
    assert sum(t.numel() for t in state.values()) < 0.5 * sum(p.numel() for p in backbone_of(model).parameters())
    before = (model / "adapter_model.safetensors").read_bytes()

    merged = run(make("run", lora={**lora, "merge": True}))  # the same run, written anew
    assert {"config.json", "model.safetensors"} < {path.name for path in merged.iterdir()}
    base = weights(tiny_checkpoint)
    changed = {name for name, tensor in weights(merged).items() if not torch.equal(tensor, base[name])}
    assert changed == {
        n for n in base if "mm_projector" in n or (".layers." in n and "proj.weight" in n and "vision" not in n)
    }
    again = run(make("again", lora=lora))
    assert (again / "adapter_model.safetensors").read_bytes() == before
    assert relative_error(logits(backbone_of(again)), logits(backbone_of(merged))) < 1e-6
    assert xcomp.VideoQA.from_config(
        parse_config({"backbone": {"name": "videochat_flash", "checkpoint": str(again)}, "compressor": "recorded"}, "x")
    ).compressor.plugin_name == "lp_comp"  # fmt: skip


def test_a_stopped_run_with_adapters_goes_on_to_the_same_bits(make, monkeypatch):
    options = {"lora": {"rank": 2, "dropout": 0.2}, "train": ["llm"]}
    whole = run(make("whole", {"trainer": {"accumulate_grad_batches": 2}}, **options))
    train, batches = VideoQA.training_step, []

    def training_step(self, batch, batch_idx):
        batches.append(batch_idx)
        if len(batches) == 8:  # in the middle of the fourth step
            raise RuntimeError("power cut")
        return train(self, batch, batch_idx)

    monkeypatch.setattr(VideoQA, "training_step", training_step)
    with pytest.raises(RuntimeError, match="power cut"):
        run(make("run", {"trainer": {"accumulate_grad_batches": 2}}, **options))
    torch.manual_seed(7)
    resumed = run(make("run", {"trainer": {"accumulate_grad_batches": 2}}, **options))
    assert checkpoints(resumed.parent) == ["step=4.ckpt", "step=6.ckpt"]
    names = ("adapter_model.safetensors",)
    assert all((resumed / name).read_bytes() == (whole / name).read_bytes() for name in names)
    assert logged(resumed.parent) == logged(whole.parent) and not (whole / "trained.safetensors").exists()


def test_a_model_of_adapters_may_be_tuned_further(make):
    first = run(make("first", lora={"rank": 2}, steps=2))
    further = make("further", {"backbone": {"name": "videochat_flash", "checkpoint": str(first)}}, steps=1)
    further["tune"]["learning_rate"] = 1e-12
    model = run(further)
    own = dict(backbone_of(first).named_parameters())
    assert same(
        {n: own[n].round(decimals=5) for n in own},
        {n: p.round(decimals=5) for n, p in backbone_of(model).named_parameters()},
    )


def test_adapters_can_be_forecast(make, tiny_checkpoint, tmp_path):
    """Their shapes, and whether their weights are there, are those of what they were tuned from."""
    model = run(make("run", lora={"rank": 2}, steps=1))
    node = {"name": "videochat_flash", "checkpoint": str(model)}
    assert missing_weights(node) is None
    shapes, own = skeleton(node, []), backbone_of(tiny_checkpoint)
    assert {n: p.shape for n, p in shapes.named_parameters()} == {n: p.shape for n, p in own.named_parameters()}
    record = json.loads((model / "xcomp.json").read_text())
    (model / "xcomp.json").write_text(json.dumps({**record, "base": str(tmp_path / "gone")}))
    missing_weights.__globals__["_missing"].cache_clear()
    assert "gone" in missing_weights(node)


def test_adapters_on_adapters_are_read_to_the_ground(make):
    first = run(make("first", lora={"rank": 2}, steps=2))
    ground = {"backbone": {"name": "videochat_flash", "checkpoint": str(first)}}
    further = make("second", ground, lora={"rank": 2}, steps=3)
    further["tune"]["learning_rate"] = 0.01
    second = run(further)
    own, base = dict(backbone_of(second).named_parameters()), dict(backbone_of(first).named_parameters())
    changed = {name for name in own if not torch.equal(own[name], base[name])}
    assert any(name.endswith("layers.0.self_attn.q_proj.weight") for name in changed)


@pytest.mark.parametrize(
    "lora, tune, line",
    [
        ({"rnk": 2}, {}, "has no key 'rnk'; did you mean 'rank'"),
        ({"rank": 0}, {}, "tune.lora.rank is 0; it must be at least 1"),
        ({"targets": []}, {}, "tune.lora.targets is empty"),
        ({"targets": ["qproj"]}, {}, "tune.lora.targets names 'qproj'; did you mean 'q_proj'"),
        ({}, {"train": ["projector"]}, "tune.lora adapts the language model, but tune.train does not name 'llm'"),
    ],
)
def test_what_cannot_be_is_one_line(make, lora, tune, line):
    with pytest.raises(ConfigError, match=line):
        run(make("run", lora=lora, **tune))


def test_without_peft_it_says_what_to_install(make, monkeypatch):
    find = xcomp.adapters.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(ConfigError, match=r"tune.lora needs the package peft: pip install xcomp\[lora\]"):
        run(make("run", lora={}))


def test_adapters_that_do_not_fit_are_named(make, tmp_path):
    model = run(make("run", lora={"rank": 2}, steps=1, train=["llm"]))
    (model / "xcomp.json").unlink()
    with pytest.raises(ValueError, match="holds adapters, but no xcomp.json that names the checkpoint"):
        backbone_of(model)

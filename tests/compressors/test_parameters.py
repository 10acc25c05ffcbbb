"""A compressor with parameters of its own: tuned, saved with the model, resumed, loaded again, refused elsewhere."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tuning_runs import same, tuning_config, weights

import xcomp
from xcomp.cli import main
from xcomp.config import build_component, parse_config
from xcomp.model import VideoQA
from xcomp.stopping import Stopped
from xcomp.tuning import tune

FILE = "model.compressor.safetensors"
# Leaves in a file what its parameters are whenever it is asked.
GATE = """
import json
from dataclasses import dataclass
import torch
from torch import nn
from xcomp.compressor import Compressor


class Gate(Compressor):
    @dataclass
    class Config:
        keep: int = 4
        log: str = ""

    def build(self, width):
        self.score = nn.Linear(width, 1)

    def before_llm(self, tokens):
        if self.config.log:
            with open(self.config.log, "a") as file:
                file.write(json.dumps(self.score.weight.flatten().tolist()) + "\\n")
        scores = self.score(tokens.float()).sigmoid()
        index = scores[..., 0].topk(self.config.keep).indices.sort().values
        rows = torch.arange(len(tokens)).unsqueeze(1)
        return (tokens * scores.to(tokens.dtype))[rows, index]
"""


@pytest.fixture
def plugins(tmp_path):
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "gate.py").write_text(GATE)
    (folder / "other_gate.py").write_text(GATE.replace("class Gate", "class OtherGate"))
    (folder / "wide_gate.py").write_text(GATE.replace("nn.Linear(width, 1)", "nn.Linear(width, 2)"))
    return [str(folder)]


@pytest.fixture
def make(tiny_run, needle_videos, plugins):
    top = {"plugins": plugins, "compressor": "gate"}
    return partial(tuning_config, tiny_run, needle_videos, top=top, train=["compressor"])


def run(content):
    return tune(parse_config(content, "x"))


@pytest.fixture
def model(make):
    return run(make("tuned"))


def asked_with(run, model, compressor="gate", **options):
    """A configuration that uses the tuned model."""
    node = compressor if isinstance(compressor, list) else {"name": compressor, **options}
    return {**run, "backbone": {"name": "videochat_flash", "checkpoint": str(model)}, "compressor": node}


def test_tuning_trains_the_compressor_alone_and_saves_it(make, model, tiny_checkpoint):
    torch.manual_seed(0)
    tuned = load_file(model / FILE)
    assert {name: list(t.shape) for name, t in tuned.items()} == {"score.weight": [1, 32], "score.bias": [1]}
    with safe_open(model / FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "compressor": "gate"}
    assert same(weights(model), weights(tiny_checkpoint))
    longer = load_file(run(make("longer", steps=8)) / FILE)
    assert not same(tuned, longer) and all(t.isfinite().all() for t in longer.values())
    both = run(make("both", train=["llm", "compressor"]))
    assert not same(weights(both), weights(tiny_checkpoint)) and not same(load_file(both / FILE), tuned)


def test_it_is_loaded_again_wherever_the_model_is(make, model, plugins, tmp_path, needle_videos):
    """By compare, evaluate, ask and from Python; a compressor without parameters uses the model all the same."""
    log, tuned = tmp_path / "log", load_file(model / FILE)["score.weight"].flatten()
    content = asked_with(make("asked"), model, log=str(log))
    content.pop("tune")
    loaded = VideoQA.from_config(parse_config(content, "x"))
    assert same(dict(loaded.compressor.state_dict()), load_file(model / FILE))
    video = xcomp.load_benchmark("needle", **needle_videos).questions()[0].video
    content |= {"limit": 2, "sampling": {"rate": 2, "min_frames": 8, "max_frames": 8}}
    arms = [{"compressor": content["compressor"], "name": "gate"}, {"compressor": "none", "name": "none"}]
    for name, command in (
        ("evaluate", lambda path: ["evaluate", path]),
        ("compare", lambda path: ["compare", path]),
        ("ask", lambda path: ["ask", video, "Which colour?", "--config", path]),
    ):
        path = tmp_path / f"{name}.yaml"
        more = {"arms": arms} if name == "compare" else {}
        path.write_text(yaml.safe_dump({**content, "name": name, **more}))
        log.unlink(missing_ok=True)
        assert main(command(str(path))) == 0
        seen = [json.loads(line) for line in log.read_text().splitlines()]
        assert seen and all(torch.equal(torch.tensor(weight), tuned) for weight in seen)


def test_a_resumed_run_ends_with_the_same_bits(make, monkeypatch):
    whole = run(make("whole"))
    train, batches = VideoQA.training_step, []

    def training_step(self, batch, batch_idx):
        batches.append(batch_idx)
        if len(batches) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(self, batch, batch_idx)

    monkeypatch.setattr(VideoQA, "training_step", training_step)
    with pytest.raises(Stopped):
        run(make("stopped"))
    resumed = run(make("stopped"))
    assert len(batches) == 6
    assert same(load_file(resumed / FILE), load_file(whole / FILE)) and same(weights(resumed), weights(whole))


def test_a_list_of_compressors_keeps_its_parameters(make, tiny_run, plugins):
    node = [{"name": "avg_pool", "tokens": 8}, {"name": "gate", "keep": 2}, "lp_comp"]
    model = run({**make("list"), "compressor": node})
    assert set(load_file(model / FILE)) == {"parts.1.score.weight", "parts.1.score.bias"}
    content = {**asked_with(tiny_run, model, node), "plugins": plugins}
    loaded = VideoQA.from_config(parse_config(content, "x"))
    assert same(dict(loaded.compressor.state_dict()), load_file(model / FILE))
    content["compressor"] = "gate"
    with pytest.raises(ValueError, match="of compressor 'avg_pool .* gate .* lp_comp', not of 'gate'"):
        VideoQA.from_config(parse_config(content, "x"))


@pytest.mark.parametrize("name", ["other_gate", "wide_gate"])
def test_another_compressors_file_is_refused_in_one_line(name, model, tiny_run, plugins, tmp_path, capfd):
    content = {**asked_with(tiny_run, model, name), "plugins": plugins}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    assert main(["evaluate", str(tmp_path / "run.yaml")]) == 2
    told, line = capfd.readouterr().err.splitlines()
    assert f"was tuned with gate, not so: {name}" in told
    assert f"{FILE}' holds parameters of compressor 'gate', not of '{name}'; tune one of its own" in line


def test_tensors_that_do_not_fit_are_refused_in_one_line(model, tiny_run, plugins, tmp_path):
    def message():
        content = {**asked_with(tiny_run, tmp_path / "model"), "plugins": plugins}
        with pytest.raises(ValueError) as error:
            VideoQA.from_config(parse_config(content, "x"))
        assert "\n" not in str(error.value) and FILE in str(error.value)
        return str(error.value)

    shutil.copytree(model, tmp_path / "model")
    path, about = tmp_path / "model" / FILE, {"format": "pt", "compressor": "gate"}
    tuned = load_file(path)
    save_file({**tuned, "score.weight": torch.zeros(2, 32)}, path, about)
    assert "score.weight is [2, 32], should be [1, 32]" in message()
    save_file({"score.weight": tuned["score.weight"], "more": torch.zeros(1)}, path, about)
    assert "missing score.bias [1]" in message() and "unexpected more [1]" in message()
    save_file({**tuned, "score.bias": torch.tensor([torch.nan])}, path, about)
    assert "score.bias" in message() and "NaN" in message()
    save_file(tuned, path)
    assert "of compressor 'None'" in message()
    path.write_bytes(path.read_bytes()[:40])
    assert "cannot be read" in message()


@pytest.mark.parametrize("compressor", ["lp_comp", "none", ["evs", "lp_comp"]])
def test_nothing_to_train_is_said_in_one_line(make, compressor, tmp_path, capfd):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**make("nothing"), "compressor": compressor}))
    assert main(["tune", str(tmp_path / "run.yaml")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    name = " + ".join(compressor) if isinstance(compressor, list) else compressor
    assert line == f"xcomp: error: tune.train names 'compressor', but compressor '{name}' has no parameters"


def test_it_follows_the_models_width_and_is_made_once(plugins, make_backbone):
    rule = build_component("compressor", "gate", plugins)
    assert not list(rule.parameters())
    decoder = xcomp.Decoder(make_backbone(), rule)
    before = rule.score.weight
    xcomp.Decoder(decoder.backbone, rule)
    assert rule.score.weight is before and before.shape == (1, 32)
    assert Path(plugins[0]).is_dir()


def test_random_parameters_are_not_passed_over_in_silence(tiny_run, plugins, model, recwarn):
    VideoQA.from_config(parse_config({**asked_with(tiny_run, model), "plugins": plugins}, "x"))
    assert not [w for w in recwarn if "random parameters" in str(w.message)]
    with pytest.warns(UserWarning, match=f"compressor 'gate' begins with random parameters, as .* holds no {FILE}"):
        VideoQA.from_config(parse_config({**tiny_run, "compressor": "gate", "plugins": plugins}, "x"))


def test_what_it_costs_is_told_without_weights(model, tiny_run, plugins, tmp_path, capfd):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**asked_with(tiny_run, model), "plugins": plugins}))
    assert main(["cost", str(tmp_path / "run.yaml"), "--seconds", "8"]) == 0
    assert "gate" in capfd.readouterr().out

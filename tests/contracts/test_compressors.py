"""Every compressor against its contract, with every selector, and the contract check against rules that break it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from contracts.plugin_options import names_of, selector_names, selector_options

import xcomp
from xcomp.checkpoint import DTYPES
from xcomp.config import Generation, Sampling
from xcomp.decoder import QuestionNeeded
from xcomp.registry import load_class
from xcomp.testing import ContractError, check_compressor, tiny_backbone


@pytest.mark.device
@pytest.mark.parametrize("name", names_of("compressor"))
def test_contract(name, device, dtype):
    check_compressor(load_class("compressor", name), backbone=tiny_backbone().to(device, DTYPES[dtype]))


@pytest.mark.device
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", names_of("compressor"))
def test_contract_with_another_language_model(name, family, device, dtype):
    backbone = tiny_backbone(family=family, tokens_per_frame=16, layers=6).to(device, DTYPES[dtype])
    check_compressor(load_class("compressor", name), backbone=backbone)


def test_without_a_backbone_a_tiny_one_serves():
    check_compressor(load_class("compressor", "lp_comp"))


@pytest.fixture(scope="module")
def selectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selectors")
    return {name: xcomp.load_selector(name, **selector_options(name, folder)) for name in selector_names()}


@pytest.mark.device
@pytest.mark.parametrize("selector", selector_names())
@pytest.mark.parametrize("compressor", names_of("compressor"))
def test_every_pair_answers_a_question(compressor, selector, selectors, needle_videos, device, dtype):
    backbone, rule = tiny_backbone().to(device, DTYPES[dtype]), xcomp.load_compressor(compressor)
    question = xcomp.load_benchmark("needle", **needle_videos).questions()[0]
    sampling, generation = Sampling(rate=4, min_frames=8, max_frames=16), Generation(max_new_tokens=3)
    qa = xcomp.VideoQA(backbone, rule, selectors[selector], frames=6, sampling=sampling, generation=generation)
    answer = qa.ask(question.video, question.question, question.options)
    assert len(set(answer.frames)) == 6 and answer.frames == sorted(answer.frames)
    assert len(answer.tokens_per_layer) == 4 and min(answer.tokens_per_layer) >= 1
    assert (answer.scores is not None) == selectors[selector].scores_frames
    # the same by hand, from the frames that it says it saw
    with torch.no_grad(), xcomp.video.Video(question.video) as video:
        pixels = backbone.preprocess(video.frames(answer.frames))
        tokens = backbone.visual(pixels.to(backbone.device, backbone.dtype), rule.needs)
        text = xcomp.benchmark.multiple_choice_prompt(question.question, question.options)
        prompt = backbone.prompt(text, xcomp.backbone.ShownVideo(answer.duration, 6))
        decoder = xcomp.Decoder(backbone, rule)
        state = decoder.prefill(tokens, prompt.prefix_ids, prompt.suffix_ids)
        assert state.tokens_per_layer == answer.tokens_per_layer and answer.tokens_in == answer.tokens_per_layer[0]
        written = decoder.generate(state, max_new_tokens=3)[0]
    assert answer.text == backbone.tokenizer.decode(written).strip()


# --- broken in one way each -------------------------------------------------------------------------------------------


class Rule(xcomp.Compressor):
    @dataclass
    class Config:
        pass


class NoConfig(xcomp.Compressor):
    pass


class Fails(Rule):
    def before_llm(self, tokens):
        raise KeyError("no key")


class Flattens(Rule):
    def before_llm(self, tokens):
        return tokens.flatten(0, 1)


class Widens(Rule):
    def before_llm(self, tokens):
        return torch.cat([tokens, tokens], -1)


class Repeats(Rule):
    def before_llm(self, tokens):
        return tokens.repeat(1, 2, 1)


class KeepsNothing(Rule):
    def before_llm(self, tokens):
        return tokens[:, :0]


class TurnsToFloat(Rule):
    def before_llm(self, tokens):
        return tokens.float()


class TurnsToHalf(Rule):
    def before_llm(self, tokens):
        return tokens.half()


class WritesIntoTokens(Rule):
    def before_llm(self, tokens):
        return tokens.mul_(0.5)


class DropsAtRandom(Rule):
    def before_llm(self, tokens):
        return tokens[:, torch.randperm(tokens.shape[1])[:4]]


class PlansTooFewLayers(Rule):
    def plan(self, num_layers, tokens_per_frame):
        return [(0,)] * (num_layers - 1)


class PlansNothingLeft(Rule):
    def plan(self, num_layers, tokens_per_frame):
        return [(0,)] * (num_layers - 1) + [()]


class PlansSlotsBeyond(Rule):
    def plan(self, num_layers, tokens_per_frame):
        return [(tokens_per_frame,)] * num_layers


class BringsBack(Rule):
    def plan(self, num_layers, tokens_per_frame):
        return [(0,)] * (num_layers - 1) + [(0, 1)]


class PlansAtRandom(Rule):
    def plan(self, num_layers, tokens_per_frame):
        return [tuple(sorted(torch.randperm(tokens_per_frame)[:4].tolist()))] * num_layers


class FromTheData(Rule):
    """Keeps the longer half after the first layer."""

    def plan(self, num_layers, tokens_per_frame):
        return None

    def after_layer(self, output):
        return self.keep(output) if output.layer == 0 else None

    def keep(self, output):
        length = output.hidden.norm(dim=-1).masked_fill(~output.layout.visual, -1)
        counts = output.layout.visual.sum(1, keepdim=True) // 2
        return length.argsort(1, descending=True).argsort(1) < counts


class ReturnsIndices(FromTheData):
    def keep(self, output):
        return output.hidden.norm(dim=-1).argsort(1)


class ReturnsFramesOnly(FromTheData):
    def keep(self, output):
        return torch.ones(output.hidden.shape[0], 3, dtype=torch.bool)


class KeepsNoVisualToken(FromTheData):
    def keep(self, output):
        return ~output.layout.visual


class WritesIntoHidden(FromTheData):
    def keep(self, output):
        output.hidden.zero_()


class CountsPadding(FromTheData):
    """Half of the width of the batch, whatever a sample's own length."""

    def keep(self, output):
        length = output.hidden.norm(dim=-1).masked_fill(~output.layout.visual, -1)
        return length.argsort(1, descending=True).argsort(1) < output.hidden.shape[1] // 2


class LooksAtTheFirstSample(FromTheData):
    def keep(self, output):
        return super().keep(output) & (output.hidden.mean(-1) > output.hidden[0, 4].mean())


class ChangesItsMind(FromTheData):
    calls = 0

    def keep(self, output):
        self.calls += 1
        return super().keep(output) if self.calls % 2 else None


class StopsTheGradient(Rule):
    def before_llm(self, tokens):
        return tokens.detach()


class BreaksTraining(Rule):
    def before_llm(self, tokens):
        return torch.from_numpy(tokens.numpy()) if tokens.dtype == torch.float32 else tokens


BROKEN = {
    NoConfig: "must have a Config dataclass",
    Fails: r"before_llm\(\) must not fail; KeyError: 'no key'",
    Flattens: r"before_llm\(\) must turn \(T, N, D\) = \(2, 8, 32\) into \(T', N', D\)",
    Widens: r"before_llm\(\) must turn",
    Repeats: r"before_llm\(\) must keep at least 1 token and add none: \(2, 8, 32\) became \(2, 16, 32\)",
    KeepsNothing: r"before_llm\(\) must keep at least 1 token",
    TurnsToFloat: r"before_llm\(\) must keep the type: bfloat16 became torch.float32",
    TurnsToHalf: r"before_llm\(\) must turn .* of the same type",
    WritesIntoTokens: r"before_llm\(\) must leave its inputs as they are",
    DropsAtRandom: r"before_llm\(\) must give the same for the same inputs",
    PlansTooFewLayers: r"plan\(\) must not fail; .*names 3 layers, but the language model has 4",
    PlansNothingLeft: r"plan\(\) must not fail; .*keeps no token of a frame at layer 4",
    PlansSlotsBeyond: r"plan\(\) must not fail; .*names slot 8 at layer 1",
    BringsBack: r"plan\(\) must not fail; .*brings back slots dropped earlier, at layer 4",
    PlansAtRandom: r"plan\(\) must give the same for the same inputs",
    ReturnsIndices: r"after_layer\(\) must return None, a Reduction or \(B, S\) = \(1, 25\) bool",
    ReturnsFramesOnly: r"after_layer\(\) must return None, a Reduction or \(B, S\) = \(1, 25\) bool",
    KeepsNoVisualToken: r"after_layer\(\) must keep a visual token of every sample",
    WritesIntoHidden: r"after_layer\(\) must leave its inputs as they are",
    CountsPadding: "a batch must give what each sample gives alone .*tokens kept differ",
    LooksAtTheFirstSample: "a batch must give what each sample gives alone",
    ChangesItsMind: "a pass must give the same when it is repeated",
    StopsTheGradient: "a gradient must flow from the logits through the compressor to the visual tokens",
    BreaksTraining: r"compress\(\) must not fail; RuntimeError",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda c: c.__name__)
def test_a_broken_compressor_is_caught(broken):
    torch.manual_seed(0)
    with pytest.raises(ContractError, match=f"compressor '{broken.__name__}': .*{BROKEN[broken]}"):
        check_compressor(broken)


def test_a_sound_rule_of_each_sort_passes():
    check_compressor(Rule)
    check_compressor(FromTheData)
    check_compressor(Rule(None))
    with pytest.raises(ValueError, match="compressor 'Rule' has no option 'tokens'"):
        check_compressor(Rule, tokens=3)


# --- what a newcomer would write --------------------------------------------------------------------------------------


class OnlyAfterLayer(xcomp.Compressor):
    """No plan of its own: a rule that is defined is asked."""

    @dataclass
    class Config:
        pass

    def after_layer(self, output):
        return output.layout.frame >= 1


class Asks(xcomp.Compressor):
    """Notes the questions that it is shown."""

    uses_question = True

    @dataclass
    class Config:
        pass

    def compress(self, visual, question):
        assert len(question.ids) == len(question.embeddings)
        self.__dict__.setdefault("seen", []).append(len(question.ids))
        return visual


@torch.no_grad()
def test_a_rule_that_is_defined_is_asked():
    backbone = tiny_backbone()
    decoder = xcomp.Decoder(backbone, OnlyAfterLayer(None))
    state = decoder.prefill(backbone.encode(torch.rand(4, 3, 2, 2)), torch.arange(1, 4), torch.arange(1, 5))
    assert state.tokens_per_layer == [4 * 8, 3 * 8, 3 * 8, 3 * 8]
    with pytest.raises(QuestionNeeded):
        decoder.prefill_video(backbone.encode(torch.rand(4, 3, 2, 2)), torch.arange(1, 4))


def test_the_question_is_the_whole_question_and_nothing_behind_it(needle_videos):
    backbone, rule = tiny_backbone(), Asks(None)
    question = xcomp.load_benchmark("needle", **needle_videos).questions()[0]
    qa = xcomp.VideoQA(backbone, rule, sampling=Sampling(rate=2, min_frames=8, max_frames=8))
    qa.ask(question.video, "Why is that so?")
    asked = len(backbone.prompt("Why is that so?", xcomp.backbone.ShownVideo(4.0, 8)).suffix_ids)
    assert set(rule.seen) == {asked}
    rule.seen.clear()  # a tuning step: three answer tokens stand behind a question of five
    tokens = backbone.encode(torch.rand(4, 3, 2, 2))
    xcomp.Decoder(backbone, rule).logits([tokens], [torch.arange(1, 4)], [torch.arange(1, 9)], [4])
    assert rule.seen == [5]


@torch.no_grad()
def test_a_list_whose_order_cannot_be_is_refused_when_it_is_set_up():
    chain = xcomp.compressor.Chain([xcomp.load_compressor(name) for name in ("divprune", "evs")])
    with pytest.raises(ValueError, match="compressors 'divprune . evs': 'evs' cannot stand there: .* must come first"):
        xcomp.Decoder(tiny_backbone(), chain)
    xcomp.Decoder(tiny_backbone(), xcomp.compressor.Chain([*reversed(chain.parts)]))


@pytest.mark.parametrize(
    "text, message",
    [
        ("use_question = True", "use_question is nobody's; did you mean uses_question"),
        ("needs = 'attention'", "needs must be a tuple of names, not the text 'attention'"),
        ("def after_layers(self, output): pass", r"after_layers\(\) is nobody's; did you mean after_layer\(\)"),
    ],
)
def test_names_that_nobody_reads_are_refused(tmp_path, text, message):
    head = "from dataclasses import dataclass\nfrom xcomp import Compressor\nclass Own(Compressor):\n"
    (tmp_path / "own.py").write_text(f"{head}    @dataclass\n    class Config:\n        pass\n    {text}\n")
    with pytest.raises(xcomp.registry.PluginError, match=message):
        load_class("compressor", "own", [tmp_path])


def test_an_error_of_a_plugin_is_one_line_that_names_it():
    class Breaks(xcomp.Compressor):
        def compress(self, visual, question):
            return {}["no such key"]

    backbone = tiny_backbone()
    with pytest.raises(
        ContractError, match=r"'Breaks': compress\(\) must not fail; KeyError: .*\.py, line \d+\)"
    ) as found:
        xcomp.Decoder(backbone, Breaks(None)).compress(torch.zeros(2, 8, 32))
    assert "\n" not in str(found.value)

"""Every backbone against its contract, and the contract check against backbones that break it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import FAMILIES
from contracts.plugin_options import backbone_options, names_of, selector_names, selector_options

from xcomp.answering import Answerer, Query
from xcomp.backbone import Backbone, FrameText, Prompt
from xcomp.checkpoint import DTYPES
from xcomp.registry import load_class
from xcomp.testing import (
    ContractError,
    check_backbone,
    check_compressor,
    check_selector,
    tiny_backbone,
    video_of,
)
from xcomp.tiny import TinyBackbone


@pytest.mark.device
@pytest.mark.parametrize("name", names_of("backbone"))
def test_contract(name, tiny_tokenizer, device, dtype):
    options = backbone_options(name, tiny_tokenizer)
    check_backbone(load_class("backbone", name), **options, device=device, dtype=dtype)


@pytest.mark.device
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_backbone_keeps_it_too(family, device, dtype):
    check_backbone(tiny_backbone(family=family, layers=1).to(device, DTYPES[dtype]))  # one that is there


@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_and_a_function_are_checked_too(family):
    check_backbone(TinyBackbone, family=family, layers=2)
    check_backbone(tiny_backbone, family=family, layers=1, tokens_per_frame=1)


# --- broken in one way each -------------------------------------------------------------------------------------------


class NoPixelFormat(TinyBackbone):
    pixel_format = None


class NoFollowUp(TinyBackbone):
    follow_up = Backbone.follow_up


class NoConfig(TinyBackbone):
    Config = None


class NoTokens(TinyBackbone):
    def __init__(self, config):
        super().__init__(config)
        self.tokens_per_frame = 0


class HalfAClip(TinyBackbone):
    clip_frames = 0.5


class PixelsOfItsOwn(TinyBackbone):
    def preprocess(self, frames):
        return super().preprocess(frames) / 2


class OneTokenLess(TinyBackbone):
    def encode(self, pixels):
        return super().encode(pixels)[:, 1:]


class OtherType(TinyBackbone):
    def encode(self, pixels):
        return super().encode(pixels).double()


class NotFinite(TinyBackbone):
    def encode(self, pixels):
        return super().encode(pixels) / 0


class Random(TinyBackbone):
    def encode(self, pixels):
        return super().encode(pixels) + torch.rand(1)


class WritesIntoPixels(TinyBackbone):
    def encode(self, pixels):
        return super().encode(pixels.mul_(2))


class MixesClips(TinyBackbone):
    def encode(self, pixels):
        return super().encode(pixels - pixels.mean())


class PrefixHasTheQuestion(TinyBackbone):
    def prompt(self, question, video):
        return Prompt(self._ids(question), self._ids(question), torch.tensor([4]))


class QuestionIsIgnored(TinyBackbone):
    def prompt(self, question, video):
        return super().prompt("What?", video)


class HeaderHasTheQuestion(TinyBackbone):
    def prompt(self, question, video):
        return Prompt(torch.tensor([4]), self._ids(question), self._ids(question))


class IdsBeyondTheVocabulary(TinyBackbone):
    def prompt(self, question, video):
        return Prompt(torch.tensor([97]), self._ids(question), torch.tensor([4]))


class WithStamps(TinyBackbone):
    """A sound one: writes the time before each frame, and closes some with a token."""

    def prompt(self, question, video):
        times = video.times or [0.0] * video.num_frames
        texts = [FrameText(self._ids(f"{time:.0f}:"), torch.arange(i % 2)) for i, time in enumerate(times)]
        return dataclasses.replace(super().prompt(question, video), frame_texts=tuple(texts))


class TextOfTooFewFrames(WithStamps):
    def prompt(self, question, video):
        prompt = super().prompt(question, video)
        return dataclasses.replace(prompt, frame_texts=prompt.frame_texts[1:])


class TextBeforeFramesOnly(WithStamps):
    def prompt(self, question, video):
        prompt = super().prompt(question, video)
        return dataclasses.replace(prompt, frame_texts=tuple(text.before for text in prompt.frame_texts))


class TextOfNoType(WithStamps):
    """An empty list makes a tensor of floats."""

    def prompt(self, question, video):
        texts = [FrameText(torch.tensor([1]), torch.tensor([]))] * video.num_frames
        return dataclasses.replace(super().prompt(question, video), frame_texts=tuple(texts))


class TextHasTheQuestion(WithStamps):
    def prompt(self, question, video):
        texts = [FrameText(self._ids(question), self._ids("."))] * video.num_frames
        return dataclasses.replace(super().prompt(question, video), frame_texts=tuple(texts))


class BatchedIds(TinyBackbone):
    def follow_up(self, question):
        return super().follow_up(question)[None]


class NeverStops(TinyBackbone):
    stop_ids = ()


class SkipsANorm(TinyBackbone):
    def add_mlp(self, layer, hidden):
        return hidden + self.language_model.layers[layer].mlp(hidden)


class SeesPadding(TinyBackbone):
    def add_mlp(self, layer, hidden):
        out = super().add_mlp(layer, hidden)
        return out + 0.1 * out[0, -1] if hidden.shape[0] > 1 else out


class RandomPass(TinyBackbone):
    def head(self, hidden):
        return super().head(hidden) + 1e-6 * torch.rand(1)


class UnknownParts(TinyBackbone):
    def parts(self):
        return {"llm": [self.language_model]}


class NoGradient(TinyBackbone):
    @torch.no_grad()
    def encode(self, pixels):
        return super().encode(pixels)


class LosesWeights(TinyBackbone):
    @dataclasses.dataclass
    class Config(TinyBackbone.Config):
        checkpoint: str | None = None

    def save_pretrained(self, folder, dtype=None):
        pass


class CannotSave(LosesWeights):
    save_pretrained = Backbone.save_pretrained


BROKEN = {
    NoPixelFormat: "pixel_format must be a PixelFormat, not None",
    PixelsOfItsOwn: r"preprocess\(\) follows from pixel_format and must not be overridden",
    NoFollowUp: r"follow_up\(\) is missing",
    NoConfig: "must have a Config dataclass",
    NoTokens: "tokens_per_frame must be a whole number from 1, not 0",
    HalfAClip: "clip_frames must be a whole number from 1, not 0.5",
    OneTokenLess: r"encode\(\) must return \(T, N, D\) = \(4, 8, 32\), not \(4, 7, 32\)",
    OtherType: r"encode\(\) must return finite torch.float32, .* not torch.float64",
    NotFinite: r"encode\(\) must return finite",
    Random: r"encode\(\) must give the same for the same inputs",
    WritesIntoPixels: r"encode\(\) must leave its inputs as they are",
    MixesClips: r"encode\(\) must take each clip on its own",
    PrefixHasTheQuestion: r"prompt\(\).prefix_ids must not depend on the question",
    QuestionIsIgnored: r"prompt\(\).question_ids must depend on the question",
    HeaderHasTheQuestion: r"prompt\(\).header_ids must not depend on the question",
    IdsBeyondTheVocabulary: r"1-D long ids, 0\.\.96, at least one, not tensor\(\[97\]\)",
    TextOfTooFewFrames: r"frame_texts must be None or hold a \(before, behind\) of ids for each of the 4 frames",
    TextBeforeFramesOnly: r"frame_texts must be None or hold a \(before, behind\)",
    TextOfNoType: r"frame_texts must hold 1-D long ids, 0\.\.96, not tensor\(\[\]\)",
    TextHasTheQuestion: r"prompt\(\).frame_texts must not depend on the question",
    BatchedIds: "1-D long ids",
    NeverStops: "stop_ids must hold at least one id",
    SkipsANorm: "the opened-up layers must compute what the model's own forward does; they differ by",
    SeesPadding: "a batch must give what each sample gives alone",
    RandomPass: "a pass must give the same when it is repeated",
    UnknownParts: r"parts\(\) must name llm, projector, vision, not llm",
    NoGradient: r"a gradient must reach parts\(\)\['projector'\]",
    LosesWeights: r"what save_pretrained\(\) writes must load",
    CannotSave: r"save_pretrained\(\) is missing",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda c: c.__name__)
def test_a_broken_backbone_is_caught(broken):
    torch.manual_seed(0)
    with pytest.raises(ContractError, match=f"backbone '{broken.__name__}': .*{BROKEN[broken]}"):
        check_backbone(broken)


@pytest.mark.parametrize("compressor", names_of("compressor"))
def test_a_backbone_that_writes_between_frames_passes(compressor):
    torch.manual_seed(0)
    backbone = WithStamps(WithStamps.Config()).eval()
    check_backbone(backbone)
    check_compressor(load_class("compressor", compressor), backbone=backbone)


@pytest.mark.parametrize("selector", selector_names())
def test_selectors_choose_for_a_backbone_that_writes_between_frames(selector, tmp_path):
    torch.manual_seed(0)
    backbone = WithStamps(WithStamps.Config()).eval()
    check_selector(load_class("selector", selector), backbone=backbone, **selector_options(selector, tmp_path))


@pytest.mark.parametrize("broken", [TextOfTooFewFrames, TextBeforeFramesOnly])
def test_a_run_names_the_backbone_whose_texts_are_of_other_frames(broken):
    backbone = broken(broken.Config()).eval()
    frames = torch.zeros(6, 4, 4, 3, dtype=torch.uint8)
    with video_of(frames, backbone) as video, pytest.raises(ContractError, match=f"'{broken.__name__}': prompt"):
        Answerer(backbone).answer(video, [Query("", "Why?", "Why?")])


def test_what_is_no_backbone_is_refused():
    with pytest.raises(ContractError, match="backbone 'dict': must be a subclass of Backbone"):
        check_backbone(dict)
    with pytest.raises(ContractError, match="backbone '<lambda>': must be a Backbone"):
        check_backbone(lambda: 3)

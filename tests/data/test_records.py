"""From instruction records to token ids: what is read, what is refused, and which tokens are supervised."""

from collections import Counter

import pytest
import torch

import xcomp
from xcomp.backbone import ShownVideo
from xcomp.config import ConfigError
from xcomp.data.records import IGNORED, Conversation, parse_record, tokenise

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cross."}]
RECORD = {"video": "a/b.mp4", "conversations": TURNS}


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_is_cleaned():
    parsed = parse_record({**RECORD, "id": "extra keys are fine"}, "/data", "here")
    turns = (("What is it?", "A cross."),)
    assert parsed == Conversation("/data/a/b.mp4", turns, texts=("", "\nWhat is it?"), where="here")
    assert parsed.kind == "video" and parsed.media == ("/data/a/b.mp4",)
    assert parse_record({**RECORD, "video": "/else/b.mp4"}, "/data", "here").video == "/else/b.mp4"
    assert parse_record(RECORD, "", "here").video == "a/b.mp4"


def test_roles_may_be_called_as_in_chats():
    turns = [{"role": "user", "content": "<image>Q1"}, {"role": "assistant", "content": "A1"}]
    turns += [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
    for key in ("conversations", "messages"):
        assert parse_record({"video": "v", key: turns}, "", "here").turns == (("Q1", "A1"), ("Q2", "A2"))


def turns(*texts, names=("human", "gpt"), **media):
    media = media or {"video": "v.mp4"}
    return {**media, "conversations": [{"from": names[i % 2], "value": t} for i, t in enumerate(texts)]}


@pytest.mark.parametrize(
    "record, kind, media, texts",
    [
        (turns("<image>\nQ", "A", image="i.png"), "image", ("/d/i.png",), ("", "\nQ")),
        (turns("<image>\nQ", "A", image=["i.png"]), "image", ("/d/i.png",), ("", "\nQ")),
        (turns("Q <image>", "A", image="i.png"), "image", ("/d/i.png",), ("", "\nQ")),  # it is moved to the front
        (turns("<image> Q", "A", image="i.png"), "image", ("/d/i.png",), ("", " Q")),  # but only if it must be
        (turns("Q <video>\n", "A", video="v.mp4"), "video", ("/d/v.mp4",), ("", "\nQ")),
        (turns("<video>Q", "A", video="v.mp4"), "video", ("/d/v.mp4",), ("", "Q")),
        (turns("a<image>b<image> c", "A", image=["i", "j"]), "images", ("/d/i", "/d/j"), ("a", "b", " c")),
        (turns("a<image>b<image> c", "A", images=["i", "j"]), "images", ("/d/i", "/d/j"), ("a", "b", " c")),
        (turns("Q", "A", video=None), "text", (), ("Q",)),
        (turns("Q", "A", image=None, video=None), "text", (), ("Q",)),
    ],
)
def test_kinds_of_records_and_where_their_media_stand(record, kind, media, texts):
    found = parse_record(record, "/d", "here")
    assert (found.kind, found.media, found.texts) == (kind, media, texts)


def test_media_types_decide_what_is_joined_and_taken():
    record = turns("<image>Q", "A", image="i.png")
    for media_type, path in ((None, "/d/i.png"), ("image", "/d/i.png"), ("mix", "i.png"), ("text", "i.png")):
        assert parse_record(record, "/d", "here", media_type=media_type).images == (path,)
    with pytest.raises(ConfigError, match="here: it names 'image', but the data set's media_type is 'video'"):
        parse_record(record, "/d", "here", media_type="video")


def test_spans_reading_and_lengths_are_kept():
    record = {**turns("<image>Q", "A"), "start": 1, "end": 2.5, "video_read_type": "gif", "duration": 30}
    found = parse_record(record, "", "here")
    assert (found.span, found.read_type, found.duration) == ((1, 2.5), "gif", 30)
    assert parse_record(record, "", "here", read_type="img").read_type == "img"  # the data set's comes first
    assert parse_record({**turns("<image>Q", "A"), "end": 2}, "", "here").span == (None, 2)
    assert parse_record({**turns("<image>Q", "A"), "start": None, "end": None}, "", "here").span is None


def test_what_the_released_training_takes_away_is_taken_away_and_told():
    notes = Counter()
    record = turns("<image>\nQ QA_GT_caption_based_noisy", "A")
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    found = parse_record({**record, "source": "x"}, "", "here", notes=notes)
    assert found.texts == ("", "\nQ ") and found.turns == (("Q", "A"),)
    assert notes == {"first turn from 'system' is dropped": 1, "key 'source' is not read": 1}


@pytest.mark.parametrize(
    "record, message",
    [
        ("v.mp4", "must be a mapping with 'conversations' and what they are about, not 'v.mp4'"),
        ({"video": ["a", "b"], "conversations": TURNS}, "'video' must be a path"),
        ({"video": "", "conversations": TURNS}, "'video' must be a path, not ''"),
        ({"image": [], "conversations": TURNS}, r"'image' must be a path or a list of paths, not \[\]"),
        ({"image": [3], "conversations": TURNS}, "'image' must be a path or a list of paths"),
        ({"video": "v", "image": "i", "conversations": TURNS}, "it names 'video' and 'image'; a record is about one"),
        ({"video": "v.mp4"}, "'conversations' must be a list of turns, not None"),
        ({"video": "v.mp4", "conversations": "Q"}, "'conversations' must be a list of turns, not 'Q'"),
        ({"video": "v.mp4", "conversations": ["Q", "A"]}, "'conversations' must be a list of turns"),
        ({"video": "v", "conversations": TURNS, "messages": TURNS}, "it has 'conversations' and 'messages'; give one"),
        ({"video": "v.mp4", "conversations": []}, "turns must alternate between human and gpt and .*, not be none"),
        (turns("<image>Q"), "turns must alternate .* and end with an answer, not be human"),
        (turns("<image>Q", "A", "Q"), "turns must alternate"),
        (turns("A", "Q", names=("gpt", "human")), "turns must alternate"),
        (turns("A", "Q", "A", names=("system", "gpt")), "turns must alternate .*, not be system, gpt"),
        (turns("Q", None), "every turn must have a text, not an empty one, in 'value'"),
        (turns("Q", ""), "every turn must have a text, not an empty one, in 'value'"),
        (turns(3, "A"), "every turn must have a text, not an empty one, in 'value'"),
        (
            {"conversations": [{"from": "human", "role": "assistant", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            "a turn's 'from' and 'role' differ; give one of them",
        ),
        (turns("<image>Q", " \n"), "an answer is blank, so there is nothing to learn from it"),
        (turns("<image>Q", "QA_GT_caption_based_noisy"), "an answer is blank"),
        (turns("Q", "A"), "it has 1 video and no placeholder; write <image> or <video> once for each"),
        (turns("<image><video>Q", "A"), "it has 1 video and 2 placeholders"),
        (turns("<image>Q", "A", image=["i", "j"]), "it has 2 pictures and 1 placeholder; write <image> once"),
        (turns("<image>Q", "A", video=None), "it has no picture and 1 placeholder"),
        (turns("<video>Q", "A", image="i"), "'<video>' stands for a picture; write <image>"),
        (turns("Q", "A", "<image>Q", "A"), "turn 3 holds a placeholder; media must stand in the first question"),
        (turns("<image>Q", "<image>A"), "turn 2 holds a placeholder"),
        ({**RECORD, "start": "1"}, "'start' must be seconds, not '1'"),
        ({**RECORD, "start": -1}, "'start' must be seconds, not -1"),
        ({**RECORD, "end": float("nan")}, "'end' must be seconds"),
        ({**RECORD, "start": 3, "end": 3}, "the span ends at 3 s, where it begins \\(3 s\\) or before"),
        (
            {**turns("<image>Q", "A", image="i"), "start": 1},
            "'start' and 'end' are seconds of a video, and there is none",
        ),
        ({**RECORD, "video_read_type": "imgs"}, "video_read_type is 'imgs'; did you mean 'img'"),
        ({"vidoe": "v", "conversations": TURNS}, "key 'vidoe' is unknown; did you mean 'video'"),
        ({**RECORD, "strat": 1}, "key 'strat' is unknown; did you mean 'start'"),
        ({**RECORD, "Start": 1}, "key 'Start' is unknown; did you mean 'start'"),
        ({**RECORD, "audio": "a.wav"}, "key 'audio' is not supported; keys that are read: video, image"),
        ({"video": "v", "conversations": [{**TURNS[0], "weight": 0}, TURNS[1]]}, "a turn's 'weight' is not supported"),
    ],
)
def test_a_bad_record_is_refused_by_name(record, message):
    with pytest.raises(ConfigError, match=f"^record 7:? {message}"):
        parse_record(record, "", "record 7")


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tiny_checkpoint):
    return xcomp.load_backbone("videochat_flash", checkpoint=str(tiny_checkpoint))


SHOWN = ShownVideo(4.0, 8)
TIME = "The video lasts for 4.00 seconds, and 8 frames are uniformly sampled from it."


def test_the_answer_and_its_stop_token_are_supervised_and_nothing_else(backbone):
    text = tokenise(backbone, Conversation("v", (("What is it?", "A cross."),)), SHOWN)
    ids = backbone.tokenizer("A cross.")["input_ids"] + [backbone.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    prompt = backbone.prompt("What is it?", SHOWN)
    assert torch.equal(text.prefix_ids, prompt.prefix_ids)
    assert text.suffix_ids.tolist() == prompt.suffix_ids.tolist() + ids
    assert text.labels.tolist() == [IGNORED] * len(prompt.suffix_ids) + ids


def test_every_turn_of_a_conversation_is_supervised(backbone):
    conversation = Conversation("v", (("What is it?", "A cross."), ("Where?", "top left"), ("And now?", "gone")))
    text = tokenise(backbone, conversation, SHOWN)
    decode = backbone.tokenizer.decode
    assert decode(text.prefix_ids) == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert decode(text.suffix_ids) == (
        f"\n{TIME} What is it?<|im_end|>\n<|im_start|>assistant\nA cross.<|im_end|>"
        "\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\ntop left<|im_end|>"
        "\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\ngone<|im_end|>"
    )
    supervised = text.labels != IGNORED
    assert torch.equal(text.labels[supervised], text.suffix_ids[supervised])
    assert decode(text.labels[supervised]) == "A cross.<|im_end|>top left<|im_end|>gone<|im_end|>"
    starts = (supervised & ~supervised.roll(1)).nonzero().flatten().tolist()
    header = backbone.tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert len(starts) == 3
    assert all(text.suffix_ids[start - len(header) : start].tolist() == header for start in starts)


def test_no_special_token_is_added_to_an_answer(backbone, monkeypatch):
    """Tokenizers of the Llama family begin every text with one of their own unless told not to."""
    plain = backbone.tokenizer

    def adding(text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + plain(text)["input_ids"]}

    expected = tokenise(backbone, Conversation("v", (("Q", "A"), ("Q", "A"))), SHOWN)
    prompts = {"prompt": backbone.prompt("Q", SHOWN), "follow_up": backbone.follow_up("Q")}
    monkeypatch.setattr(type(backbone), "stop_ids", backbone.stop_ids)
    for method, ids in prompts.items():
        monkeypatch.setattr(backbone, method, lambda *_, ids=ids: ids)
    monkeypatch.setattr(backbone, "tokenizer", adding)
    text = tokenise(backbone, Conversation("v", (("Q", "A"), ("Q", "A"))), SHOWN)
    assert torch.equal(text.labels, expected.labels) and torch.equal(text.suffix_ids, expected.suffix_ids)

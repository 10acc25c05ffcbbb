"""From instruction records to token ids: what is read, what is refused, and which tokens are supervised."""

import json

import pytest
import torch

import xcomp
from xcomp.backbone import ShownVideo
from xcomp.config import ConfigError
from xcomp.data.records import IGNORED, Conversation, load_conversations, parse_record, tokenise

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cross."}]
RECORD = {"video": "a/b.mp4", "conversations": TURNS}


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_is_cleaned():
    parsed = parse_record({**RECORD, "id": "extra keys are fine"}, "/data", "here")
    assert parsed == Conversation("/data/a/b.mp4", (("What is it?", "A cross."),))
    assert parse_record({**RECORD, "video": "/else/b.mp4"}, "/data", "here").video == "/else/b.mp4"
    assert parse_record(RECORD, "", "here").video == "a/b.mp4"


def test_roles_may_be_called_as_in_chats():
    turns = [{"role": "user", "content": "<image>Q1"}, {"role": "assistant", "content": "A1"}]
    turns += [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
    assert parse_record({"video": "v", "conversations": turns}, "", "here").turns == (("Q1", "A1"), ("Q2", "A2"))


def turns(*texts, names=("human", "gpt")):
    return {"video": "v.mp4", "conversations": [{"from": names[i % 2], "value": t} for i, t in enumerate(texts)]}


@pytest.mark.parametrize(
    "record, message",
    [
        ("v.mp4", "must be a mapping with 'video' and 'conversations', not 'v.mp4'"),
        ({"conversations": TURNS}, "'video' must be a path, not None"),
        ({"video": ["a", "b"], "conversations": TURNS}, "'video' must be a path"),
        ({"video": "", "conversations": TURNS}, "'video' must be a path, not ''"),
        ({"video": "v.mp4"}, "'conversations' must be a list of turns, not None"),
        ({"video": "v.mp4", "conversations": "Q"}, "'conversations' must be a list of turns, not 'Q'"),
        ({"video": "v.mp4", "conversations": ["Q", "A"]}, "'conversations' must be a list of turns"),
        ({"video": "v.mp4", "conversations": []}, "turns must alternate between human and gpt, not \\[\\]"),
        (turns("Q"), "turns must alternate between human and gpt, not \\['user'\\]"),
        (turns("Q", "A", "Q"), "turns must alternate"),
        (turns("A", "Q", names=("gpt", "human")), "turns must alternate"),
        (turns("Q", "A", names=("system", "gpt")), "turns must alternate .*'system'"),
        (turns("Q", None), "every turn must have a text in 'value'"),
        (turns("Q", ""), "every turn must have a text in 'value'"),
        (turns(3, "A"), "every turn must have a text in 'value'"),
        (turns("<image>Q", "A", "<image>Q", "A"), "'<image>' must stand for the one video"),
    ],
)
def test_a_bad_record_is_refused_by_name(record, message):
    with pytest.raises(ConfigError, match=f"^record 7:? {message}"):
        parse_record(record, "", "record 7")


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """Writes a records file and names it as a source."""

    def write(content, name="records.json", **options):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return {"records": str(path), **options}

    return write


def test_json_and_jsonl_hold_the_same(source):
    odd = turns("line\u2028separator", "a\u0085b")  # line ends to splitlines, but not to JSON
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in (RECORD, odd)) + "\n\n"
    from_json, from_lines = (load_conversations([s]) for s in (source([RECORD, odd]), source(lines, "records.jsonl")))
    assert from_json == from_lines and len(from_json) == 2
    assert from_json[1].turns == (("line\u2028separator", "a\u0085b"),)


def test_sources_are_joined_repeated_and_rooted(source):
    first = source([RECORD], root="/one", repeat=2, frames=[8, 16])
    second = source([turns("Q", "A")], "second.json")
    found = load_conversations([first, second])
    assert [c.video for c in found] == ["/one/a/b.mp4", "/one/a/b.mp4", "v.mp4"]
    assert [c.frames for c in found] == [(8, 16), (8, 16), ()]


def test_a_benchmark_with_training_records_is_a_source(needle_videos):
    needle = {"name": "needle", "split": "train", **needle_videos}
    found = load_conversations([{"benchmark": needle, "tasks": ["describe", "choice"]}])
    assert len(found) == 2 * (1 + 4) and len({c.video for c in found}) == 2
    assert sum(question == "Describe the video." for c in found for question, _ in c.turns) == 2
    assert all(answer in "ABCD" for c in found for question, answer in c.turns if question != "Describe the video.")


@pytest.mark.parametrize(
    "given, message",
    [
        ("file.json", r"tune.data\[0\] must be a mapping with either 'records' \(a file\) or 'benchmark'"),
        ({}, "must be a mapping with either"),
        ({"records": "a", "benchmark": "needle"}, "must be a mapping with either"),
        ({"records": "a", "rot": "/"}, r"tune.data\[0\] has no key 'rot'; did you mean 'root'\? keys: records, root"),
        ({"records": "a", 3: "/"}, "has no key '3'"),
        ({"records": ["a"]}, r"records is \['a'\]; it must be a file"),
        ({"records": "nowhere.json"}, "records file 'nowhere.json' cannot be read: No such file"),
        ({"benchmark": "nedle"}, "unknown benchmark 'nedle'; did you mean 'needle'"),
        ({"benchmark": "needle", "tasks": "open"}, "tasks is 'open'; it must be a list"),
        ({"benchmark": "needle", "tasks": ["opn"]}, "tasks: 'opn' is not one of"),
        ({"records": "a", "repeat": 0}, "repeat is 0; it must be a whole number of at least 1"),
        ({"records": "a", "repeat": 1.5}, "repeat is 1.5"),
        ({"records": "a", "repeat": True}, "repeat is True"),
        ({"records": "a", "frames": 8}, "frames is 8; it must be a list of whole numbers of at least 1"),
        ({"records": "a", "frames": [8, 0]}, r"frames is \[8, 0\]"),
    ],
)
def test_a_bad_source_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        load_conversations([given])


@pytest.mark.parametrize(
    "content, name, message",
    [
        ("[{", "records.json", "records file '.*records.json' is not JSON"),
        ("{}\n{", "records.jsonl", "records file '.*records.jsonl' is not JSON"),
        (RECORD, "records.json", "must hold a list of records, not a dict"),
        ([], "records.json", "there are no records; 'tune.data' lists where they come from"),
        ([RECORD, "v.mp4"], "records.json", r"tune.data\[0\], record 1 must be a mapping"),
    ],
)
def test_a_bad_file_is_refused(source, content, name, message):
    with pytest.raises(ConfigError, match=message):
        load_conversations([source(content, name)])


def test_errors_name_the_list_the_source_stands_in():
    with pytest.raises(ConfigError, match=r"tune.validation\[0\] must be a mapping"):
        load_conversations(["x"], where="tune.validation")


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

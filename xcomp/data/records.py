"""Instruction records: one video and a conversation about it.

The format of the VideoChat-Flash and LLaVA mixtures: ``{"video": "a/b.mp4", "conversations": [{"from": "human",
"value": "<image>\\nWhat …?"}, {"from": "gpt", "value": "…"}]}``. Turns may use ``role``/``content`` instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xcomp.backbone import Backbone, FrameText, ShownVideo
from xcomp.config import ConfigError, build_component
from xcomp.contract import check_frame_texts, name_of
from xcomp.messages import nearest

IGNORED = -100
_SOURCE_KEYS = ("records", "root", "benchmark", "tasks", "frames", "repeat")


@dataclass(frozen=True)
class Conversation:
    """A video's path and (question, answer) turns, the image placeholder taken out; ``frames`` to draw counts from."""

    video: str
    turns: tuple[tuple[str, str], ...]
    frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenisedConversation:
    """``prefix | video | suffix`` with labels for the suffix: −100 where nothing is to be learnt.

    ``frame_texts``: text between the video's frames, as in :class:`xcomp.backbone.Prompt`.
    """

    prefix_ids: Tensor
    suffix_ids: Tensor
    labels: Tensor
    frame_texts: tuple[FrameText, ...] | None = None


def load_conversations(
    sources: Sequence[Any], plugins: Sequence[str] = (), where: str = "tune.data"
) -> list[Conversation]:
    """All conversations of a list of sources; errors call the list ``where``.

    A source is ``{records: FILE.json|.jsonl, root: DIR}`` or ``{benchmark: …, tasks: […]}``. ``frames: [8, 16]`` are
    the frame counts its videos are shown with (default: the run's); ``repeat: n`` takes it n times an epoch.
    """
    found = []
    for number, source in enumerate(sources):
        name = f"{where}[{number}]"
        _check_source(source, name)
        records = _read_file(Path(source["records"])) if "records" in source else _of_benchmark(source, plugins)
        root = str(source.get("root") or "")
        parsed = [parse_record(r, root, f"{name}, record {i}") for i, r in enumerate(records)]
        frames = tuple(source.get("frames") or ())
        found += [replace(c, frames=frames) for c in parsed] * source.get("repeat", 1)
    if not found:
        raise ConfigError(f"there are no records; '{where}' lists where they come from")
    return found


def _check_source(source: Any, where: str) -> None:
    if not isinstance(source, Mapping) or ("records" in source) == ("benchmark" in source):
        raise ConfigError(f"{where} must be a mapping with either 'records' (a file) or 'benchmark'")
    for key in source:
        if key not in _SOURCE_KEYS:
            known = ", ".join(_SOURCE_KEYS)
            raise ConfigError(f"{where} has no key '{key}';{nearest(str(key), _SOURCE_KEYS)} keys: {known}")
    if not isinstance(source.get("records", ""), str):
        raise ConfigError(f"{where}: records is {source['records']!r}; it must be a file")
    if not isinstance(source.get("tasks", []), list):
        raise ConfigError(f"{where}: tasks is {source['tasks']!r}; it must be a list")
    repeat, frames = source.get("repeat", 1), source.get("frames") or []
    if not _is_count(repeat):
        raise ConfigError(f"{where}: repeat is {repeat!r}; it must be a whole number of at least 1")
    if not isinstance(frames, list) or not all(map(_is_count, frames)):
        raise ConfigError(f"{where}: frames is {frames!r}; it must be a list of whole numbers of at least 1")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _of_benchmark(source: Mapping[str, Any], plugins: Sequence[str]) -> list[dict[str, Any]]:
    benchmark = build_component("benchmark", source["benchmark"], plugins)
    if not hasattr(benchmark, "training_records"):
        raise ConfigError(f"benchmark {source['benchmark']} has no training records")
    return benchmark.training_records(**({"tasks": tuple(source["tasks"])} if "tasks" in source else {}))


def _read_file(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":  # not splitlines: it also breaks at characters that JSON strings may hold
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        records = json.loads(text)
    except OSError as error:
        raise ConfigError(f"records file '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"records file '{path}' is not JSON: {error}") from error
    if not isinstance(records, list):
        raise ConfigError(f"records file '{path}' must hold a list of records, not a {type(records).__name__}")
    return records


def parse_record(record: Mapping[str, Any], root: str, where: str) -> Conversation:
    """A record checked and cleaned; ValueError says what is wrong with which."""
    if not isinstance(record, Mapping):
        raise ConfigError(f"{where} must be a mapping with 'video' and 'conversations', not {record!r}")
    video, conversations = record.get("video"), record.get("conversations")
    if not isinstance(video, str) or not video:
        raise ConfigError(f"{where}: 'video' must be a path, not {video!r}")
    if not isinstance(conversations, list) or not all(isinstance(turn, Mapping) for turn in conversations):
        raise ConfigError(f"{where}: 'conversations' must be a list of turns, not {conversations!r}")
    turns = [(t.get("from") or t.get("role"), t.get("value") or t.get("content")) for t in conversations]
    roles = [{"human": "user", "gpt": "assistant"}.get(role, role) for role, _ in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ConfigError(f"{where}: turns must alternate between human and gpt, not {roles}")
    texts = [text for _, text in turns]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{where}: every turn must have a text in 'value', not {texts}")
    if sum(text.count("<image>") for text in texts) > 1:
        raise ConfigError(f"{where}: '<image>' must stand for the one video, but occurs more than once")
    questions = [text.replace("<image>", "").strip() for text in texts[::2]]
    return Conversation(str(Path(root) / video), tuple(zip(questions, texts[1::2])))


def tokenise(backbone: Backbone, conversation: Conversation, video: ShownVideo) -> TokenisedConversation:
    """Token ids and labels; only answers and the stop token after each are supervised."""
    (question, answer), *more = conversation.turns
    prompt = backbone.prompt(question, video)
    check_frame_texts(name_of("backbone", backbone), prompt.frame_texts, video.num_frames // backbone.merged_frames)
    ids, labels = [prompt.suffix_ids], [torch.full_like(prompt.suffix_ids, IGNORED)]

    def add(answer: str) -> None:
        answer_ids = backbone.tokenizer(answer, add_special_tokens=False)["input_ids"]
        answer_ids = torch.tensor([*answer_ids, backbone.stop_ids[0]])
        ids.append(answer_ids)
        labels.append(answer_ids)

    add(answer)
    for question, answer in more:
        ids.append(backbone.follow_up(question))
        labels.append(torch.full_like(ids[-1], IGNORED))
        add(answer)
    return TokenisedConversation(prompt.prefix_ids, torch.cat(ids), torch.cat(labels), prompt.frame_texts)

"""Instruction records: a conversation about a video, a picture, several pictures, or about nothing but text.

The format of the VideoChat-Flash and LLaVA mixtures: ``{"video": "a/b.mp4", "start": 1.5, "end": 9, "conversations":
[{"from": "human", "value": "<image>\\nWhat …?"}, {"from": "gpt", "value": "…"}]}``, or ``image`` (a path or a list of
them), or neither. ``messages`` with ``role`` and ``content`` say the same as ``conversations``. ``<image>`` and
``<video>`` stand where the media do, once for each.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from xcomp.backbone import Backbone, FrameText, ShownVideo
from xcomp.config import ConfigError, Sampling
from xcomp.contract import check_frame_texts, name_of
from xcomp.messages import nearest

IGNORED = -100
KINDS = ("video", "image", "images", "text")
READ_TYPES = ("decord", "av", "img", "frame", "gif", "fake")
# Of a record: keys that are read, and those that name media or spans of other formats, which would be left out.
_KEYS = ("video", "image", "images", "conversations", "messages", "start", "end", "video_read_type", "duration")
_FOREIGN = ("videos", "audio", "audios", "depth", "clip", "clips", "start_time", "end_time", "timestamps", "system")
_WEIGHTS = ("weight", "loss", "loss_weight", "train", "mask")  # of a turn: what would change how it is learnt from
_ROLES = {"human": "user", "gpt": "assistant"}
_PLACE = re.compile("<image>|<video>")
_NOISE = "QA_GT_caption_based_noisy"  # the released training takes it out


@dataclass(frozen=True)
class Conversation:
    """(question, answer) turns about a ``video``, ``images``, or neither; placeholders are taken out of the questions.

    ``texts`` is the first question as it is written, cut where the media stand. ``span`` are seconds of the video,
    either of which may be open. ``frames`` to draw counts from, ``sampling`` in place of the run's. ``duration`` is
    what the record says of it, in seconds. ``where`` tells the record from all others.
    """

    video: str | None
    turns: tuple[tuple[str, str], ...]
    frames: tuple[int, ...] = ()
    images: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    span: tuple[float | None, float | None] | None = None
    read_type: str = "decord"
    sampling: Sampling | None = None
    duration: float | None = None
    where: str = ""

    def __post_init__(self) -> None:
        if not self.texts:
            question, places = self.turns[0][0], len(self.images) + (self.video is not None)
            object.__setattr__(self, "texts", ("",) * places + ((f"\n{question}" if places else question),))

    @property
    def kind(self) -> str:
        if self.video is not None:
            return "video"
        return ("text", "image")[len(self.images)] if len(self.images) < 2 else "images"

    @property
    def media(self) -> tuple[str, ...]:
        """Paths of the video or the pictures."""
        return self.images if self.video is None else (self.video,)


@dataclass(frozen=True)
class TokenisedConversation:
    """``prefix | pictures | suffix`` with labels: −100 where nothing is to be learnt.

    ``labels`` are the suffix's, ``prefix_labels`` the prefix's where some of it is supervised. ``prompt_length``: ids
    of the suffix that stand before the first answer. ``frame_texts``: text between the frames, as in
    :class:`xcomp.backbone.Prompt`.
    """

    prefix_ids: Tensor
    suffix_ids: Tensor
    labels: Tensor
    frame_texts: tuple[FrameText, ...] | None = None
    prefix_labels: Tensor | None = None
    prompt_length: int | None = None

    @property
    def num_labels(self) -> int:
        """Supervised tokens."""
        return sum(int((labels != IGNORED).sum()) for labels in (self.labels, self.prefix_labels) if labels is not None)


# --- records ----------------------------------------------------------------------------------------------------------


def parse_record(
    record: Mapping[str, Any],
    root: str,
    where: str,
    *,
    media_type: str | None = None,
    read_type: str | None = None,
    notes: Counter[str] | None = None,
) -> Conversation:
    """A record checked and cleaned; ConfigError says what is wrong with which.

    ``root`` is joined in front of paths, ``media_type`` and ``read_type`` are the data set's. ``notes`` counts what the
    format lets pass: keys that are not read, first turns that are not the user's.
    """
    notes = Counter() if notes is None else notes
    if not isinstance(record, Mapping):
        raise ConfigError(
            f"{where} must be a mapping with 'conversations' and what they are about, not {record!r:.200}"
        )
    _check_keys(record, where, notes)
    video, images = _media(record, where, media_type)
    turns = _turns(record, where, notes)
    texts = _opening(turns, where, video, images)
    span = _span(record, where, video)
    duration = record.get("duration")
    if duration is not None and not (_is_number(duration) and duration > 0):
        notes["'duration' is not a number above 0, and not read"] += 1
        duration = None
    joined = "" if media_type in ("text", "mix") else root
    questions = [_PLACE.sub("", turns[0][0]).strip(), *(question for question, _ in turns[1:])]
    return Conversation(
        None if video is None else os.path.join(joined, video),
        tuple(zip(questions, (answer for _, answer in turns))),
        images=tuple(os.path.join(joined, image) for image in images),
        texts=texts,
        span=span,
        read_type=_read_type(read_type or record.get("video_read_type") or "decord", where),
        duration=duration,
        where=where,
    )


def _check_keys(record: Mapping[str, Any], where: str, notes: Counter[str]) -> None:
    for key in record:
        if key in _KEYS or key == "id":
            continue
        if key in _FOREIGN:
            raise ConfigError(f"{where}: key '{key}' is not supported; keys that are read: {', '.join(_KEYS)}")
        meant = _meant(str(key))
        if meant is not None and meant not in record:
            keys = ", ".join(_KEYS)
            raise ConfigError(f"{where}: key '{key}' is unknown; did you mean '{meant}'? keys that are read: {keys}")
        notes[f"key '{key}' is not read"] += 1


@lru_cache(maxsize=1024)
def _meant(key: str) -> str | None:
    """The key that is read of which this one is a slip."""
    return next((known for known in _KEYS if _one_slip(key, known)), None)


def _one_slip(word: str, known: str) -> bool:
    """Whether they differ by one letter more, less or other, or by two that changed places."""
    if sorted(word) == sorted(known) or word.lower() == known:
        return True
    long, short = sorted((word, known), key=len, reverse=True)
    if len(long) == len(short):
        return sum(a != b for a, b in zip(long, short)) == 1
    return len(long) == len(short) + 1 and any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


def _media(record: Mapping[str, Any], where: str, media_type: str | None) -> tuple[str | None, list[str]]:
    video, image, several = (record.get(key) for key in ("video", "image", "images"))
    given = [key for key in ("video", "image", "images") if record.get(key) is not None]
    if len(given) > 1:
        raise ConfigError(f"{where}: it names '{given[0]}' and '{given[1]}'; a record is about one of them")
    if media_type in ("image", "video") and given and (given[0] == "video") != (media_type == "video"):
        raise ConfigError(f"{where}: it names '{given[0]}', but the data set's media_type is '{media_type}'")
    if video is not None and (not isinstance(video, str) or not video):
        raise ConfigError(f"{where}: 'video' must be a path, not {video!r:.200}")
    images = image if several is None else several
    images = [] if images is None else [images] if isinstance(images, str) else images
    if (
        not isinstance(images, list)
        or not all(isinstance(path, str) and path for path in images)
        or (given and not (video or images))
    ):
        raise ConfigError(f"{where}: '{given[0]}' must be a path or a list of paths, not {images!r:.200}")
    return video, images


def _turns(record: Mapping[str, Any], where: str, notes: Counter[str]) -> list[tuple[str, str]]:
    """(question, answer) pairs, as written."""
    names = [key for key in ("conversations", "messages") if record.get(key) is not None]
    if len(names) > 1:
        raise ConfigError(f"{where}: it has 'conversations' and 'messages'; give one of them")
    name = names[0] if names else "conversations"
    turns = record.get(name)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ConfigError(f"{where}: '{name}' must be a list of turns, not {turns!r:.200}")
    for turn in turns:
        for key in turn:
            if key in _WEIGHTS:
                raise ConfigError(f"{where}: a turn's '{key}' is not supported; every answer counts alike")
            if key not in ("from", "value", "role", "content"):
                notes[f"a turn's key '{key}' is not read"] += 1
        for pair in (("from", "role"), ("value", "content")):
            if len({_ROLES.get(turn[key], turn[key]) for key in pair if isinstance(turn.get(key), str)}) > 1:
                raise ConfigError(f"{where}: a turn's '{pair[0]}' and '{pair[1]}' differ; give one of them")
    written = [t.get("from") or t.get("role") for t in turns]
    said = [
        (_ROLES.get(r, r) if isinstance(r, str) else r, t.get("value") or t.get("content"))
        for r, t in zip(written, turns)
    ]
    if said and said[0][0] != "user":
        notes[f"first turn from {said[0][0]!r} is dropped"] += 1
        said = said[1:]
    roles, texts = [role for role, _ in said], [text for _, text in said]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        given = ", ".join(map(str, written)) or "none"
        raise ConfigError(f"{where}: turns must alternate between human and gpt and end with an answer, not be {given}")
    if not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"{where}: every turn must have a text, not an empty one, in 'value' or 'content'")
    texts = [text.replace(_NOISE, "") for text in texts]
    if not all(answer.strip() for answer in texts[1::2]):
        raise ConfigError(f"{where}: an answer is blank, so there is nothing to learn from it")
    return list(zip(texts[::2], texts[1::2]))


def _opening(turns: list[tuple[str, str]], where: str, video: str | None, images: Sequence[str]) -> tuple[str, ...]:
    """The first question cut at its placeholders; ConfigError unless they stand there, one for each of the media."""
    first, *others = [text for turn in turns for text in turn]
    media, what = len(images) + (video is not None), "video" if video is not None else "picture"
    found, elsewhere = _PLACE.findall(first), [i for i, text in enumerate(others, 2) if _PLACE.search(text)]
    if elsewhere:
        raise ConfigError(f"{where}: turn {elsewhere[0]} holds a placeholder; media must stand in the first question")
    if len(found) != media:
        names = "<image> or <video>" if what == "video" else "<image>"
        has = f"{_count(media, what)} and {_count(len(found), 'placeholder')}"
        raise ConfigError(f"{where}: it has {has}; write {names} once for each")
    if images and "<video>" in found:
        raise ConfigError(f"{where}: '<video>' stands for a picture; write <image>")
    text = first.replace("<video>", "<image>")
    if media == 1 and not text.startswith("<image>"):
        text = f"<image>\n{text.replace('<image>', '').strip()}".strip()
    return tuple(text.split("<image>"))


def _count(number: int, name: str) -> str:
    return f"no {name}" if not number else f"{number} {name}" if number == 1 else f"{number} {name}s"


def _span(record: Mapping[str, Any], where: str, video: str | None) -> tuple[float | None, float | None] | None:
    span = tuple(record.get(key) for key in ("start", "end"))
    if span == (None, None):
        return None
    if video is None:
        raise ConfigError(f"{where}: 'start' and 'end' are seconds of a video, and there is none")
    for key, value in zip(("start", "end"), span):
        if value is not None and not (_is_number(value) and value >= 0):
            raise ConfigError(f"{where}: '{key}' must be seconds, not {value!r}")
    if None not in span and not span[0] < span[1]:
        raise ConfigError(f"{where}: the span ends at {span[1]:g} s, where it begins ({span[0]:g} s) or before")
    return span


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read_type(name: Any, where: str) -> str:
    if name not in READ_TYPES:
        hint = nearest(str(name), READ_TYPES)
        raise ConfigError(f"{where}: video_read_type is {name!r};{hint} known: {', '.join(READ_TYPES)}")
    return name


# --- tokens -----------------------------------------------------------------------------------------------------------


def tokenise(
    backbone: Backbone, conversation: Conversation, video: ShownVideo | None = None, format: str = "answers"
) -> TokenisedConversation:
    """Token ids and labels.

    ``answers``: the prompts that questions are asked with; answers and the stop token after each are supervised.
    ``released``: text and labels of the training code of the model's authors (``Backbone.training_text``).
    """
    if format == "released":
        return _as_released(backbone, conversation, video)
    (question, answer), *more = conversation.turns
    if video is None:
        prompt, groups = backbone.image_prompt(conversation.texts), len(conversation.images)
    else:
        prompt, groups = backbone.prompt(question, video), video.num_frames // backbone.merged_frames
    check_frame_texts(name_of("backbone", backbone), prompt.frame_texts, groups)
    ids, labels = [prompt.suffix_ids], [torch.full_like(prompt.suffix_ids, IGNORED)]

    def add(answer: str) -> None:
        answer_ids = backbone.tokenizer(answer, add_special_tokens=False)["input_ids"]
        answer_ids = torch.tensor([*answer_ids, backbone.stop_ids[0]])
        ids.append(answer_ids)
        labels.append(answer_ids)

    add(answer)
    for question, answer in more:
        ids.append(backbone.follow_up(question.strip()))
        labels.append(torch.full_like(ids[-1], IGNORED))
        add(answer)
    return TokenisedConversation(prompt.prefix_ids, torch.cat(ids), torch.cat(labels), prompt.frame_texts)


def _as_released(backbone: Backbone, conversation: Conversation, video: ShownVideo | None) -> TokenisedConversation:
    text = backbone.training_text(conversation.texts, conversation.turns, video)
    labels = [
        torch.where(mask, ids, IGNORED)
        for ids, mask in ((text.prefix_ids, text.prefix_mask), (text.suffix_ids, text.suffix_mask))
    ]
    labels[0][:1] = IGNORED  # nothing stands before it that could predict it
    return TokenisedConversation(
        text.prefix_ids, text.suffix_ids, labels[1], text.frame_texts, labels[0], text.prompt_length
    )

"""Chat formats: the text around a video and its questions, from a tokenizer's chat template or by hand, and its ids.

A prompt is cut where the video stands: one token of the tokenizer, the placeholder, marks the place in a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from xcomp.backbone import Prompt
from xcomp.checkpoint import read_json


class Format(NamedTuple):
    """Text ``before`` the video, ``between`` it and the question, ``after`` the question, and ``again``: what stands
    between an answer's stop token and a further question."""

    before: str
    between: str
    after: str
    again: str


def chatml(opening: str = "", closing: str = "\n") -> Format:
    """ChatML as the Qwen family was tuned with it; ``opening`` and ``closing`` stand around the video."""
    return Format(
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{opening}",
        closing,
        "<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\n",
    )


def chat_format(tokenizer: Any, placeholder: str, usual: Format, *, around: tuple[str, str] = ("", "\n")) -> Format:
    """The format of a tokenizer's chat template, else the ``usual`` one.

    ``around`` is what stands around the placeholder where a template takes a message as one string.
    """
    # Older folders keep the processor's template in a file of its own.
    folder = Path(tokenizer.name_or_path)
    if (folder / "chat_template.json").is_file() and not (folder / "chat_template.jinja").is_file():
        content = read_json(folder / "chat_template.json")
        tokenizer.chat_template = content.get("chat_template") or tokenizer.chat_template
    return read_format(tokenizer, placeholder, around) if tokenizer.chat_template else usual


def read_format(tokenizer: Any, placeholder: str, around: tuple[str, str] = ("", "\n")) -> Format:
    """The text that a tokenizer's chat template puts around a video and its questions.

    A template may take a message as typed parts, with or without videos, or as one string: the first form that it
    renders with the video's placeholder in it is used.
    """
    first, answer, second = "(first-question)", "(its-answer)", "(second-question)"
    opening, closing = around
    written = f"{opening}{placeholder}{closing}{first}"

    def parts(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text}]

    forms = (
        ([{"type": "video"}, *parts(first)], parts(answer), parts(second), ".*?"),
        (parts(written), parts(answer), parts(second), re.escape(closing)),
        (written, answer, second, re.escape(closing)),
    )
    for *contents, between in forms:
        turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), contents)]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError):  # not the form that this template takes
            continue
        literal = [re.escape(part) for part in (placeholder, first, answer, second)]
        pattern = "(.*?){}({between}){}.*?{}(.*?){}(.*)".format(*literal, between=between)
        if text.count(placeholder) == 1 and (found := re.fullmatch(pattern, text, re.DOTALL)):
            before, between, again, after = found.groups()
            return Format(before, between, after, again.removeprefix(tokenizer.eos_token or ""))
    raise ValueError(
        f"the tokenizer's chat template renders no question with one {placeholder} before it; put one that does into "
        "its chat_template.jinja, or remove the template for the language model's usual format"
    )


def check_token(tokenizer: Any, place: Any, token: str, wanted: int, key: str) -> None:
    """ValueError unless ``token`` has the id that config.json's ``key`` gives it; ``place`` is the tokenizer's."""
    if (found := tokenizer.convert_tokens_to_ids(token)) != wanted:
        raise ValueError(
            f"tokenizer '{place}' has the id {found} for {token}, config.json's {key} is {wanted}; "
            "give the tokenizer of this checkpoint"
        )


def check_known(tokenizer: Any, place: Any, tokens: Sequence[str]) -> None:
    """ValueError unless each of ``tokens`` is one token of the tokenizer in ``place``."""
    if missing := [t for t in tokens if tokenizer(t, add_special_tokens=False).input_ids != [_id_of(tokenizer, t)]]:
        raise ValueError(
            f"tokenizer '{place}' does not know {', '.join(missing)} as one token; give the tokenizer of this "
            "checkpoint"
        )


def _id_of(tokenizer: Any, token: str) -> int | None:
    found = tokenizer.convert_tokens_to_ids(token)
    return None if found == tokenizer.unk_token_id else found


def ids_behind(tokenizer: Any, text: str, behind: str) -> list[int]:
    """Ids of a text as it reads behind another: a tokenizer may write a text's first word differently."""
    whole, start, alone = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (behind + text, behind, text))
    return whole[len(start) :] if whole[: len(start)] == start else alone  # where a token reaches over both


class Chat:
    """Prompts of one format in a tokenizer's ids."""

    def __init__(self, tokenizer: Any, format: Format, placeholder: str):
        self.tokenizer, self.format, self.placeholder = tokenizer, format, placeholder
        prefix = tokenizer(format.before + placeholder).input_ids  # with what the tokenizer puts before a text
        prefix = prefix[: prefix.index(tokenizer.convert_tokens_to_ids(placeholder))]
        if len(prefix) > 1 and prefix[0] == prefix[1] == tokenizer.bos_token_id:
            prefix = prefix[1:]  # the template wrote one too
        self.prefix_ids = torch.tensor(prefix, dtype=torch.long)
        self.header_ids = self._ids(format.after, f"{placeholder}{format.between}?")
        self.message_tokens = len(self._ids(format.between, placeholder))

    def prompt(self, question: str) -> Prompt:
        asked = self._ids(self.format.between + question, self.placeholder)
        return Prompt(self.prefix_ids.clone(), asked, self.header_ids.clone())

    def follow_up(self, question: str) -> Tensor:
        return self._ids(self.format.again + question + self.format.after, self.tokenizer.eos_token or "")

    def _ids(self, text: str, behind: str) -> Tensor:
        return torch.tensor(ids_behind(self.tokenizer, text, behind), dtype=torch.long)

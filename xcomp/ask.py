"""``xcomp ask``: its words on the command line, and what is told of an answer, in words and as JSON."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xcomp.config import ConfigError, RunConfig
from xcomp.messages import nearest
from xcomp.shipped import is_toy

if TYPE_CHECKING:
    from xcomp.answering import Answer

KEYS = tuple(field.name for field in dataclasses.fields(RunConfig) if not field.name.startswith("_"))
_OVERRIDE = re.compile(rf"(?:{'|'.join(KEYS)})(?:[.\[][^=\s]*)?=")
_LIKE_ONE = re.compile(r"([A-Za-z_]\w*)(?:[.\[][^=\s]*)?=\S*")
SHOWN = 6  # frames told one by one; of more, the first and the last


def split_words(words: Sequence[str], question: str | None = None) -> tuple[str | None, list[str]]:
    """The question and the overrides among the words behind a video's name.

    A word ``key=value`` whose key is one of a configuration's is an override; one other word is the question.
    ``question`` is what ``--question`` gave, which may look like anything.

    Raises:
        ConfigError: for a second question, and for ``key=value`` with an unknown key.
    """
    overrides = [word for word in words if _OVERRIDE.match(word)]
    for word in words:
        if word in overrides:
            continue
        if like := _LIKE_ONE.fullmatch(word):
            hint = nearest(like[1], KEYS)
            raise ConfigError(f"a configuration has no key '{like[1]}';{hint} a question '{word}': --question '{word}'")
        if question is not None:
            raise ConfigError(f"'{word}' stands beside the question '{question}'; put a question into quotes")
        question = word
    return question, overrides


def check_options(options: Sequence[str] | None) -> None:
    """ConfigError for an answer to choose that is given twice, or is an override that stands too far behind."""
    for number, option in enumerate(options or ()):
        if _OVERRIDE.match(option):
            raise ConfigError(f"'{option}' stands among --options; key=value stands before them")
        if option in options[:number]:
            raise ConfigError(f"option '{option}' is given twice")


def toy(config: RunConfig) -> str | None:
    """The name of the shipped checkpoint that a configuration asks, if it asks one."""
    node = config.backbone
    checkpoint = node.get("checkpoint") if isinstance(node, Mapping) else None
    return checkpoint if is_toy(checkpoint) else None


def as_json(
    question: str,
    options: Sequence[str] | None,
    span: tuple[float, float] | None,
    answer: Answer,
    config: RunConfig,
    name: str,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """One answer as JSON can hold it; names are those of a run's records where both have a thing.

    ``choice`` is the index of the option chosen and ``chosen`` its text, both None where none fits or there are none;
    ``option_scores`` are there where options were scored (``generation.mode: loglikelihood``). ``span`` is the part of
    the video that was asked about, None for all. ``frames`` are numbers within the file, ``times`` their seconds;
    ``macs`` and ``seconds`` are by stage, of the question alone on a fresh video.
    """
    return {
        "question": question,
        "options": list(options or ()),
        "text": answer.text,
        "choice": answer.choice,
        "chosen": None if answer.choice is None else options[answer.choice],
        "option_scores": answer.option_scores,
        "span": None if span is None else list(span),
        "frames": answer.frames,
        "times": answer.times,
        "duration": answer.duration,
        "scores": answer.scores,
        "candidate_times": answer.candidate_times,
        "tokens_given": answer.tokens_given,
        "tokens_in": answer.tokens_in,
        "tokens_out": answer.tokens_per_layer[-1],
        "tokens_per_layer": answer.tokens_per_layer,
        "macs": answer.share.macs,
        "seconds": answer.share.seconds,
        "model": config.backbone,
        "compressor": config.compressor,
        "selector": config.selector,
        "config": name,
        "overrides": list(overrides),
    }


def in_words(answer: Answer) -> list[str]:
    """Which frames an answer is from, and what it took alone on a fresh video, in three lines."""
    shown = [f"{frame} ({time:.1f} s)" for frame, time in zip(answer.frames, answer.times)]
    if len(shown) > SHOWN:
        shown = [*shown[: SHOWN - 2], "…", *shown[-2:]]
    share, given = answer.share, answer.tokens_given
    macs = {stage: f"{count / 1e9:.3g}" for stage, count in share.macs.items() if count}
    seconds = {stage: f"{value:.2f}" for stage, value in share.seconds.items() if value >= 0.005}
    return [
        f"{len(answer.frames)} frames: {', '.join(shown)}; the video has {answer.duration:.1f} s",
        f"visual tokens: {given} given, {answer.tokens_in} into the language model, {answer.tokens_per_layer[-1]} in "
        "its last layer",
        f"{sum(share.macs.values()) / 1e9:.3g} GMACs ({_listed(macs)}), {sum(share.seconds.values()):.2f} s "
        f"({_listed(seconds)})",
    ]


def _listed(parts: Mapping[str, str]) -> str:
    return ", ".join(f"{stage} {value}" for stage, value in parts.items())

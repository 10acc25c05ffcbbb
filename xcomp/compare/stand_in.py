"""Backbones of known shapes in place of checkpoints that are not at hand, so that a forecast can count them.

``shapes:`` of a configuration names what is counted: an architecture that ships (``xcomp/architectures``) or a
config.json. A stand-in has no weights and no tokenizer, so text is counted by its letters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from xcomp.adapters import base_checkpoint
from xcomp.backbone import Backbone, Prompt, ShownVideo
from xcomp.checkpoint import find_folder, read_json, weight_files
from xcomp.config import ConfigError, build_component, split_component
from xcomp.messages import nearest
from xcomp.shipped import built_in

LETTERS_A_TOKEN = 4  # of English text, in tokens of Qwen2 and Llama
PREFIX, TIME, HEADER = 14, 27, 5  # tokens of ChatML's head, of VideoChat-Flash's sentence on time, of an answer's head


def missing_weights(node: Any) -> str | None:
    """Why the weights of a backbone's ``checkpoint`` cannot be loaded here; None where they can, or none are named."""
    checkpoint = split_component("backbone", node)[1].get("checkpoint")
    return _missing(checkpoint) if isinstance(checkpoint, str) else None


@lru_cache(maxsize=64)  # asking the hub takes seconds
def _missing(checkpoint: str) -> str | None:
    try:
        if (base := base_checkpoint(checkpoint)) is not None:  # adapters
            return _missing(base)
        folder = find_folder(checkpoint, weights=False)
        if os.path.exists(checkpoint):  # of the hub's only the description was fetched
            weight_files(folder)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def architecture_of(shapes: str) -> dict[str, Any]:
    """The content of a config.json, by path or the name of one that ships.

    Raises:
        ConfigError: if it is neither.
    """
    known = built_in("architectures", "*.json")
    if shapes not in known and not os.path.isfile(shapes):
        hint = nearest(shapes, known)
        raise ConfigError(f"shapes is '{shapes}', no config.json;{hint} architectures that ship: {', '.join(known)}")
    content = read_json(known.get(shapes, Path(shapes)))
    if not isinstance(content, Mapping):
        raise ConfigError(f"shapes: '{shapes}' must be a model's config.json, not {content!r:.40}")
    return dict(content)


def stand_in(node: Any, plugins: Sequence[str], shapes: str) -> Backbone:
    """A backbone of the architecture ``shapes``, with the options of a node whose checkpoint is not here."""
    name, options = split_component("backbone", node)
    options = {key: value for key, value in options.items() if key not in ("checkpoint", "tokenizer")}
    options |= {"architecture": architecture_of(shapes), "device": "meta"}
    backbone = build_component("backbone", {"name": name, **options}, plugins).eval()
    backbone.prompt = _counted_prompt
    return backbone


def _counted_prompt(question: str, video: ShownVideo) -> Prompt:
    """A prompt of about as many tokens as the question has, all alike."""
    count = TIME + math.ceil(len(question) / LETTERS_A_TOKEN)
    return Prompt(*(torch.ones(length, dtype=torch.long) for length in (PREFIX, count, HEADER)))

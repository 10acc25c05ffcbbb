"""The least that a plugin needs for a tiny form. A plugin that is not listed is checked with its defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_annotations
import tiny_llava
import tiny_qwen
import tiny_smolvlm
from conftest import ARCHITECTURE
from tiny_clip import save_tiny_clip

from xcomp.registry import plugins

TINY = {
    "llava_next_video": (tiny_llava, {}),
    "qwen2_5_vl": (tiny_qwen, tiny_qwen.SIZE),
    "smolvlm": (tiny_smolvlm, {}),
}


def names_of(kind: str) -> list[str]:
    """All plugins of a kind. None at all is an error: a test over them would check nothing."""
    found = list(plugins(kind))
    assert found, f"the registry finds no {kind}"
    return found


def backbone_options(name: str, tokenizer: Path, layers: int = 2) -> dict[str, Any]:
    """``tokenizer`` is the folder of one of Qwen2's form; backbones that need a video's placeholder make their own."""
    if name == "videochat_flash":
        return {"architecture": ARCHITECTURE | {"num_hidden_layers": layers}, "tokenizer": str(tokenizer)}
    if name not in TINY:
        return {}
    module, more = TINY[name]
    architecture = module.architecture()
    architecture["text_config"]["num_hidden_layers"] = layers
    return {"architecture": architecture, "tokenizer": module.save_tokenizer(tokenizer.with_name(name)), **more}


PICKERS = ("top_k", "aks", "bolt", "focus", "q_frame", "mdp3")
TOLD = ("oracle", "frames_file")  # they are told about single questions; tests of their own tell them


def selector_names() -> list[str]:
    """Selectors that choose frames for any question about any video."""
    return [name for name in names_of("selector") if name not in TOLD]


def selector_options(name: str, folder: Path) -> dict[str, Any]:
    """A picker's scorer is a tiny CLIP, in place of what its authors ran; a frame is shown once."""
    if name != "clip_similarity" and name not in PICKERS:
        return {}
    clip = {"checkpoint": save_tiny_clip(folder / "clip")}
    if name == "clip_similarity":
        return clip
    more = {"q_frame": {"one_resolution": True}, "bolt": {"unique": True}}
    return {"scorer": {"name": "clip_similarity", **clip}} | more.get(name, {})


def benchmark_options(name: str, folder: Path) -> dict[str, Any]:
    if name in ("lvbench", "longvideobench", "mlvu", "videomme", "niah"):
        return made_annotations.make(name, folder)
    if name == "questions":
        asked = [
            {"video": "a.mp4", "question": "What is it?", "options": ["a cup", "a key"], "answer": 1, "part": "one"},
            {"video": "a.mp4", "question": "Who?", "answer": ["Ann", "Anna"], "start": 1, "end": 2, "part": "two"},
        ]
        (folder / "a.mp4").touch()
        (folder / "questions.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in asked))
        return {"file": str(folder / "questions.jsonl"), "labels": ["part"]}
    return {"num_videos": 3, "seconds": 4.0, "size": 32, "root": str(folder)} if name == "needle" else {}

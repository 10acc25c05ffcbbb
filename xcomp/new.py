"""``xcomp new``: a plugin that works, and the test of its contract, to start one's own from.

What is written are the files of ``xcomp/templates`` under another name.
"""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from xcomp.messages import nearest
from xcomp.registry import KINDS, PluginError, plugins

TEMPLATES = Path(__file__).parent / "templates"
# What a plugin's node in YAML needs beside its name.
OPTIONS = {"benchmark": ", file: questions.json"}


def write_plugin(kind: str, name: str, folder: str | Path) -> list[Path]:
    """Write plugin and test below ``folder``; returns both paths. Nothing is written if anything is in the way."""
    if kind not in KINDS:
        raise PluginError(f"unknown kind '{kind}';{nearest(kind, KINDS)} kinds: {', '.join(KINDS)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise PluginError(f"'{name}' cannot name a plugin; take lower-case words joined by '_', e.g. every_other")
    folder = Path(folder)
    known = plugins(kind, [folder] if folder.is_dir() else [])
    if name in known:
        raise PluginError(f"there is a {kind} '{name}' already: {known[name].origin}; choose another name")
    sources = {
        folder / KINDS[kind][0] / f"{name}.py": (TEMPLATES / f"{kind}.py").read_text(encoding="utf-8"),
        folder / "tests" / f"test_{name}.py": (TEMPLATES / f"test_{kind}.py").read_text(encoding="utf-8"),
    }
    class_name = _class_name(kind, name, *sources.values())
    for path in sources:
        there = next(p for p in (path, *path.parents) if p.exists())
        if not there.is_dir():
            raise PluginError(f"'{path}' is not written: '{there}' is there already; choose another name or --folder")
    for path in sources:
        path.parent.mkdir(parents=True, exist_ok=True)
    for path, text in sources.items():
        path.write_text(text.replace("Skeleton", class_name).replace("skeleton", name), encoding="utf-8")
    return list(sources)


def _class_name(kind: str, name: str, *sources: str) -> str:
    """``every_other`` → ``EveryOther``; with the contract's name behind it where Python or a template uses it."""
    camel = "".join(word.capitalize() for word in name.split("_"))
    used = any(re.search(rf"\b{camel}\b", text) for text in sources)
    return camel + KINDS[kind][2] if used or keyword.iskeyword(camel) else camel


def next_steps(kind: str, name: str, folder: str | Path, files: list[Path]) -> str:
    """What to do with the files that were written."""
    plugin, test = files
    return f"""wrote {plugin}
wrote {test}

check it:       pytest {test}
name it (YAML): plugins: [{folder}]
                {kind}: {{name: {name}{OPTIONS.get(kind, "")}}}
find it:        xcomp plugins {folder}"""

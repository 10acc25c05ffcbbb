"""What a plugin's source says of it, read without running it: what it does, and its options.

An option is a field of the plugin's ``Config``; the comment behind it, on the same line, is what is said of it. Bases
are followed into the files that they come from. ``xcomp plugins`` and ``xcomp plugins NAME`` print what is found.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from xcomp.registry import KINDS, Plugin, is_of_kind, module_file

WIDTH = 120  # of text where the terminal's is not known


@dataclass(frozen=True)
class Option:
    """One option. ``default`` is as YAML has it, where it is computed as Python has it; None: it must be given."""

    name: str
    type: str
    default: str | None
    text: str


@dataclass(frozen=True)
class Description:
    """What is known of a plugin. ``text`` is its docstring's first paragraph; ``unread`` are the classes whose options
    show only when they are run."""

    plugin: Plugin
    source: Path | None
    text: str = ""
    options: tuple[Option, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def example(self) -> str:
        """A line of YAML that names it, with the options that must be given, or else the first."""
        needed = [o for o in self.options if o.default is None] or self.options[:1]
        given = [f"{o.name}: {o.name.upper() if o.default in (None, 'null') else o.default}" for o in needed]
        node = f"{{{', '.join([f'name: {self.plugin.name}', *given])}}}" if given else self.plugin.name
        return f"{self.plugin.kind}: {node}"


def describe(plugin: Plugin) -> Description:
    """What a plugin's source says; of a file that is not there or no Python, nothing."""
    name, path = plugin.module, plugin.path or module_file(plugin.module)
    module = _read(name, path) if path else None
    if module is None:
        return Description(plugin, path)
    wanted = plugin.entry_point.attr if plugin.entry_point else None
    found = _find(module, wanted) if wanted else _only_plugin(module, plugin.kind)
    own, whole = (_paragraph(node) for node in (found.node if found else None, module.tree))
    text = (own or whole) if wanted else (whole or own)  # a package's module may hold several, a file is one
    unread: list[str] = []
    config = _config(found, unread) if found else None
    options = _options(config, unread) if config else {}
    return Description(plugin, path, text, tuple(options.values()), tuple(unread))


def lines_of(found: Description, width: int | None = None) -> list[str]:
    """What ``xcomp plugins NAME`` prints of one plugin."""
    width, plugin = width or WIDTH, found.plugin
    lines = [f"{plugin.kind} {plugin.name}", *wrapped(found.text, width, "  "), ""]
    options = [*found.options]
    if plugin.kind == "compressor":  # what every compressor can be asked for (xcomp.registry.configure)
        budget = _find(_read("xcomp.budgets", Path(__file__).parent / "budgets.py"), "Budget")
        text = "; ".join(f"{option.name}: {option.text}" for option in _options(budget, []).values())
        options.append(Option("budget", "mapping", "null", text))
    for option in options:
        default = "must be given" if option.default is None else option.default
        lines += wrapped(f"{option.name}: {option.type} = {default}", width, "      ", "  ")
        lines += wrapped(option.text, width, "      ")
    if found.unread:
        lines += wrapped(f"options of {', '.join(found.unread)} show only when it is run", width, "  ")
    elif not options:
        lines.append("  no options")
    return [*lines, "", f"from     {plugin.origin}", f"source   {found.source}", f"example  {found.example}"]


def table(rows: Iterable[tuple[Plugin, str]], width: int | None = None) -> list[str]:
    """What ``xcomp plugins`` prints: kind, name, origin and a sentence a plugin; without ``width``, a line each."""
    rows = [(plugin.kind, plugin.name, plugin.origin, said) for plugin, said in rows]
    widths = [max([len(row[i]) for row in rows], default=0) for i in range(3)]
    lines = []
    for row in rows:
        head = "  ".join(cell.ljust(size) for cell, size in zip(row, widths))
        if width is None:
            lines.append(f"{head}  {row[3]}".rstrip())
        elif len(head) + 30 <= width:
            lines += wrapped(row[3], width, " " * (len(head) + 2), f"{head}  ") or [head.rstrip()]
        else:
            lines += [head.rstrip(), *wrapped(row[3], width, "    ")]
    return lines


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, or all of it."""
    head, stop, _ = text.partition(". ")
    return head + stop.strip()


def wrapped(text: str, width: int, indent: str, first: str | None = None) -> list[str]:
    """Lines of at most ``width`` characters; ``first`` begins the first of them in place of ``indent``."""
    keep = dict(break_long_words=False, break_on_hyphens=False)
    text, first = text.replace("``", "`"), indent if first is None else first
    return textwrap.wrap(text, max(width, 40), initial_indent=first, subsequent_indent=indent, **keep)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    name: str
    tree: ast.Module
    comments: dict[int, str]  # line → comment on it


@dataclass(frozen=True)
class _Class:
    module: _Module
    node: ast.ClassDef


@cache
def _read(name: str, path: Path) -> _Module | None:
    try:
        text = path.read_bytes()
        tree = ast.parse(text)
        tokens = list(tokenize.tokenize(io.BytesIO(text).readline))
    except (SyntaxError, ValueError, OSError, tokenize.TokenError):
        return None
    comments = {t.start[0]: t.string.lstrip("#").strip() for t in tokens if t.type == tokenize.COMMENT}
    return _Module(name, tree, comments)


def _paragraph(node: ast.Module | ast.ClassDef | None) -> str:
    """The first paragraph of a docstring, as one line."""
    text = inspect.cleandoc(ast.get_docstring(node) or "") if node else ""
    return " ".join(text.partition("\n\n")[0].split())


def _only_plugin(module: _Module, kind: str) -> _Class | None:
    """The public class of the kind that a plugin's file defines; of several, which no run takes, the last."""
    classes = [_Class(module, node) for node in module.tree.body if isinstance(node, ast.ClassDef)]
    public = [found for found in classes if not found.node.name.startswith("_") and _is_of_kind(found, kind)]
    return public[-1] if public else None


def _is_of_kind(found: _Class, kind: str) -> bool:
    for base in map(ast.unparse, found.node.bases):
        if is_of_kind(_full_name(found.module, base) or base, kind):
            return True
        if (above := _find(found.module, base)) and _is_of_kind(above, kind):
            return True
    return False


def _full_name(module: _Module, name: str) -> str | None:
    """A name as it is written in a module → the dotted name of what was imported; None if it was not."""
    for node in module.tree.body:
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            known, full = alias.asname or alias.name, alias.name
            if isinstance(node, ast.ImportFrom):
                asked, package = "." * node.level + (node.module or ""), module.name.rpartition(".")[0]
                full = f"{resolve_name(asked, package) if node.level and package else asked}.{alias.name}"
            if name == known or name.startswith(f"{known}."):
                return full + name[len(known) :]
    return None


def _find(module: _Module | None, name: str) -> _Class | None:
    """A class by its name in a module, or ``Outer.Inner``, wherever it comes from; None if it cannot be read."""
    if module is None:
        return None
    outer, _, inner = name.partition(".")
    node = next((n for n in module.tree.body if isinstance(n, ast.ClassDef) and n.name == outer), None)
    if node is not None:
        return _inside(_Class(module, node), inner)
    full = _full_name(module, name) or ""
    for at in [at for at, character in enumerate(full) if character == "."][::-1]:  # the longest that is a module
        if full[:at] != module.name and (path := module_file(full[:at])):
            return _find(_read(full[:at], path), full[at + 1 :])
    return None


def _inside(outer: _Class, name: str) -> _Class | None:
    """``name``, a class within the class itself or what it inherits; itself for an empty name."""
    if not name:
        return outer
    for node in outer.node.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _Class(outer.module, node)
    bases = (_find(outer.module, ast.unparse(base)) for base in outer.node.bases)
    return next((found for base in bases if base and (found := _inside(base, name))), None)


def _config(plugin: _Class, unread: list[str]) -> _Class | None:
    """The ``Config`` of a plugin's class: its own, or that of the first base that has one."""
    if found := _inside(plugin, "Config"):
        return found
    contracts = [contract for *_, contract in KINDS.values()]
    if ast.unparse(plugin.node.bases[0]).split(".")[-1] not in contracts or _assigns(plugin.node, "Config"):
        unread.append(plugin.node.name)
    return None


def _assigns(node: ast.ClassDef, name: str) -> bool:
    return any(isinstance(n, ast.Assign) and any(ast.unparse(t) == name for t in n.targets) for n in node.body)


def _options(config: _Class, unread: list[str]) -> dict[str, Option]:
    """The fields of a dataclass in order, those of its bases first; a field that is there keeps its place."""
    options: dict[str, Option] = {}
    for base in reversed(config.node.bases):
        if inherited := _find(config.module, ast.unparse(base)):
            options |= _options(inherited, unread)
        else:
            unread.append(ast.unparse(base))
    for node in config.node.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind = ast.unparse(node.annotation)
        if kind.split("[")[0].split(".")[-1] == "ClassVar":
            continue
        comments = config.module.comments
        text = comments.get(node.end_lineno, comments.get(node.lineno, ""))
        options[node.target.id] = Option(node.target.id, kind, _default(config.module, node.value), text)
    return options


def _default(module: _Module, node: ast.expr | None) -> str | None:
    """A field's default as text; None where it has none."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "field":
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        node = given.get("default")
        if (factory := given.get("default_factory")) is not None:
            if not isinstance(factory, ast.Lambda):
                return {"list": "[]", "dict": "{}"}.get(ast.unparse(factory), f"{ast.unparse(factory)}()")
            node = factory.body
    if node is None:
        return None
    for known in module.tree.body:
        if isinstance(node, ast.Name) and isinstance(known, ast.Assign) and ast.unparse(known.targets[0]) == node.id:
            node = known.value
    try:
        return _as_yaml(ast.literal_eval(node))
    except ValueError:  # arithmetic
        return ast.unparse(node)


def _as_yaml(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()

"""Finding plugins and building them from options.

A plugin is one Python file with one class of its kind; its name is the file's name. It is found in three places:
the framework's own folder of that kind, an installed package's entry point (group ``xcomp.compressors`` and so on),
and folders the user names (``plugins: [./my_plugins]``). Listing reads names only; a file is imported when asked for.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha1
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import xcomp

# kind → (folder below xcomp and entry-point group, module of the contract, contract class)
KINDS = {
    "backbone": ("backbones", "xcomp.backbone", "Backbone"),
    "compressor": ("compressors", "xcomp.compressor", "Compressor"),
    "selector": ("selectors", "xcomp.selector", "FrameSelector"),
    "benchmark": ("benchmarks", "xcomp.benchmark", "Benchmark"),
}


class PluginError(ValueError):
    """A plugin that does not exist, exists twice, does not load, or was given options it does not have."""


@dataclass(frozen=True)
class Plugin:
    """Where a plugin comes from; nothing of it is imported yet."""

    kind: str
    name: str
    origin: str
    path: Path | None = None
    entry_point: EntryPoint | None = None


def nearest(word: str, known: Iterable[str]) -> str:
    """`` did you mean 'x'?`` for the known word nearest to ``word``, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" did you mean '{found[0]}'?" if found else ""


def plugins(kind: str, folders: Iterable[str | Path] = ()) -> dict[str, Plugin]:
    """All plugins of a kind by name. Two of one name are an error that names both origins."""
    found: dict[str, Plugin] = {}
    for plugin in [*_built_in(kind), *_installed(kind), *_in_folders(kind, folders)]:
        if plugin.name in found:
            raise PluginError(
                f"two {kind}s are called '{plugin.name}': {found[plugin.name].origin} and {plugin.origin}; rename one"
            )
        found[plugin.name] = plugin
    return dict(sorted(found.items()))


def _python_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.py") if not p.name.startswith("_"))


def _built_in(kind: str) -> list[Plugin]:
    folder = KINDS[kind][0]
    files = [f for root in xcomp.__path__ for f in _python_files(Path(root) / folder)]
    return [Plugin(kind, f.stem, "built-in", path=f) for f in files]


def _installed(kind: str) -> list[Plugin]:
    points = entry_points(group=f"xcomp.{KINDS[kind][0]}")
    return [Plugin(kind, p.name, f"{p.dist.name} {p.dist.version}", entry_point=p) for p in points]


def _in_folders(kind: str, folders: Iterable[str | Path]) -> list[Plugin]:
    """Files of ``kind`` in each folder (told by the base that a class names), and in its sub-folder of that kind."""
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise PluginError(f"plugin folder '{folder}' does not exist; 'plugins' lists folders of Python files")
        files = [f for f in _python_files(folder) if _kind_of(f) == kind] + _python_files(folder / KINDS[kind][0])
        found += [Plugin(kind, f.stem, str(folder), path=f.resolve()) for f in files]
    return found


def _kind_of(file: Path) -> str | None:
    """The kind of a plugin file, read from the bases of its classes without running it."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise PluginError(f"plugin file '{file}' is not valid Python: {error}") from error
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    bases = [imported.get(name, name) for node in classes for name in map(ast.unparse, node.bases)]
    return next((kind for kind in KINDS if any(_is_of_kind(base, kind) for base in bases)), None)


def _is_of_kind(base: str, kind: str) -> bool:
    """Whether a base class, as a dotted name, is the kind's contract, or from its module or a built-in plugin."""
    folder, module, contract = KINDS[kind]
    return base.split(".")[-1] == contract or base.startswith((f"{module}.", f"xcomp.{folder}."))


def find(kind: str, name: str, folders: Iterable[str | Path] = ()) -> Plugin:
    """The plugin of that name; an unknown name is an error that lists what exists and suggests the nearest."""
    known = plugins(kind, folders)
    if name not in known:
        raise PluginError(f"unknown {kind} '{name}';{nearest(name, known)} known: {', '.join(known)}")
    return known[name]


def load_class(kind: str, name: str, folders: Iterable[str | Path] = ()) -> type:
    """Import a plugin and return its class."""
    plugin = find(kind, name, folders)
    try:
        if plugin.entry_point:
            target = plugin.entry_point.load()
            return target if inspect.isclass(target) else _class_in(target, kind, plugin)
        return _class_in(_import(plugin), kind, plugin)
    except PluginError:
        raise
    except Exception as error:  # whatever a plugin file raises on import is reported against that plugin
        raise PluginError(
            f"{kind} '{name}' ({plugin.origin}) failed to import: {type(error).__name__}: {error}"
        ) from error


def _import(plugin: Plugin) -> Any:
    if plugin.origin == "built-in":
        return importlib.import_module(f"xcomp.{KINDS[plugin.kind][0]}.{plugin.name}")
    module_name = f"xcomp_user_{sha1(str(plugin.path).encode()).hexdigest()[:8]}_{plugin.name}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, plugin.path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while the file runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _class_in(module: Any, kind: str, plugin: Plugin) -> type:
    """The one class of the kind that the module itself defines."""
    contract = getattr(importlib.import_module(KINDS[kind][1]), KINDS[kind][2])
    classes = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, contract) and c.__module__ == module.__name__ and not c.__name__.startswith("_")
    ]
    if len(classes) != 1:
        names = ", ".join(c.__name__ for c in classes) or "none"
        raise PluginError(
            f"{kind} '{plugin.name}' ({plugin.origin}) must define one public {contract.__name__} class; found: {names}"
        )
    return classes[0]


def make_config(config_class: type, options: Mapping[str, Any], what: str) -> Any:
    """Options checked against a ``Config`` dataclass: names, types, then the class's own range checks.

    Raises PluginError naming the option, what is wrong with it and the nearest right name.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = [f.name for f in dataclasses.fields(config_class)]
    for key in options:
        if key not in known:
            raise PluginError(
                f"{what} has no option '{key}';{nearest(str(key), known)} options: {', '.join(known) or 'none'}"
            )
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), dict(options)))
    except OmegaConfBaseException as error:
        key = f" option '{error.full_key}'" if getattr(error, "full_key", None) else ""
        raise PluginError(f"{what}{key}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise PluginError(f"{what}: {error}") from error


def configure(
    kind: str, name: str, options: Mapping[str, Any] | None = None, folders: Iterable[str | Path] = ()
) -> tuple[type, Any]:
    """Import the plugin and check its options, without making it: (class, its Config)."""
    plugin_class = load_class(kind, name, folders)
    config_class = getattr(plugin_class, "Config", None)
    if not dataclasses.is_dataclass(config_class):
        raise PluginError(f"{kind} '{name}' breaks its contract: {plugin_class.__name__}.Config must be a dataclass")
    return plugin_class, make_config(config_class, options or {}, f"{kind} '{name}'")


def build(kind: str, name: str, options: Mapping[str, Any] | None = None, folders: Iterable[str | Path] = ()) -> Any:
    """Import the plugin, check its options, make it."""
    plugin_class, config = configure(kind, name, options, folders)
    return plugin_class(config)


def load_backbone(name: str, *, plugins: Iterable[str | Path] = (), **options: Any) -> Any:
    """A backbone by name, e.g. ``load_backbone("videochat_flash", checkpoint=DIR, dtype="float32", device="cpu")``."""
    return build("backbone", name, options, plugins)


def load_compressor(name: str, *, plugins: Iterable[str | Path] = (), **options: Any) -> Any:
    """A compressor by name, e.g. ``load_compressor("lp_comp", rounding="ceil")``."""
    return build("compressor", name, options, plugins)


def load_selector(name: str, *, plugins: Iterable[str | Path] = (), **options: Any) -> Any:
    """A frame selector by name, e.g. ``load_selector("qc_comp", n_repeat=2)``."""
    return build("selector", name, options, plugins)


def load_benchmark(name: str, *, plugins: Iterable[str | Path] = (), **options: Any) -> Any:
    """A benchmark by name, e.g. ``load_benchmark("needle", split="test", num_videos=10)``."""
    return build("benchmark", name, options, plugins)

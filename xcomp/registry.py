"""Finding plugins and building them from options.

A plugin is one Python file with one class of its kind; its name is the file's name. It is found in three places:
the framework's own folder of that kind, an installed package's entry point (group ``xcomp.compressors`` and so on),
and folders the user names (``plugins: [./my_plugins]``). Listing reads names only; a file is imported when asked for.
A broken plugin is an error for whoever asks for it, and for nobody else.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha1
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import xcomp
from xcomp.messages import nearest

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

    @property
    def who(self) -> str:
        return f"{self.kind} '{self.name}' ({self.origin})"

    @property
    def module(self) -> str:
        """By which it is imported; of a file in a folder of the user's, which is in no package, its name."""
        if self.entry_point:
            return self.entry_point.module
        return f"xcomp.{KINDS[self.kind][0]}.{self.name}" if self.origin == "built-in" else self.name


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
        if not os.path.isdir(folder):  # Path.is_dir fails on a name that is too long
            raise PluginError(f"plugin folder '{folder}' does not exist; 'plugins' lists folders of Python files")
        flat = [f for f in _python_files(folder) if not _syntax_error(f) and _kind_of(f) == kind]
        files = [*flat, *_python_files(folder / KINDS[kind][0])]
        found += [Plugin(kind, f.stem, str(f.parent), path=f.resolve()) for f in files]
    return found


def unreadable(folders: Iterable[str | Path] = ()) -> dict[Path, str]:
    """The files straight in ``folders`` that are not valid Python, so that nobody knows their kind, and why."""
    errors = {f: _syntax_error(f) for folder in folders for f in _python_files(Path(folder))}
    return {file: error for file, error in errors.items() if error}


def _syntax_error(file: Path) -> str | None:
    try:
        compile(file.read_bytes(), file.name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OSError) as error:
        return _one_line(error)
    return None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _kind_of(file: Path) -> str | None:
    """The kind of a plugin file, read from the bases of its classes without running it."""
    tree = ast.parse(file.read_bytes())
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    bases = [imported.get(name, name) for node in classes for name in map(ast.unparse, node.bases)]
    return next((kind for kind in KINDS if any(is_of_kind(base, kind) for base in bases)), None)


def is_of_kind(base: str, kind: str) -> bool:
    """Whether a base class, as a dotted name, is the kind's contract, or from its module or a built-in plugin."""
    folder, module, contract = KINDS[kind]
    return base.split(".")[-1] == contract or base.startswith((f"{module}.", f"xcomp.{folder}."))


def problem(plugin: Plugin, *, check: bool = False) -> str | None:
    """What is wrong with a plugin; unless ``check``, only what shows without importing it: syntax, a missing module."""
    if check:
        try:
            load(plugin)
        except PluginError as error:
            return str(error).removeprefix(f"{plugin.who} ")
        return None
    if plugin.path:
        return _syntax_error(plugin.path)
    module = plugin.entry_point.module
    return None if _spec(module) else f"ModuleNotFoundError: No module named '{module}'"


def _spec(module: str) -> ModuleSpec | None:
    """Where a module is. ``importlib.util.find_spec`` would import the packages that it is in."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for depth, _ in enumerate(rest, start=2):
        if spec is None or spec.submodule_search_locations is None:
            return None
        places = xcomp.__path__ if spec.name == "xcomp" else spec.submodule_search_locations  # also a checkout's own
        spec = PathFinder.find_spec(".".join(module.split(".")[:depth]), places)
    return spec


def module_file(module: str) -> Path | None:
    """The Python file of a module, found without importing it; None if there is none."""
    spec = _spec(module)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin.endswith(".py") else None


def find(kind: str, name: str, folders: Iterable[str | Path] = ()) -> Plugin:
    """The plugin of that name; an unknown name is an error that lists what exists and suggests the nearest."""
    folders = list(folders)
    known = plugins(kind, folders)
    if name in known:
        return known[name]
    for file, error in unreadable(folders).items():
        if file.stem == name:
            raise PluginError(f"{kind} '{name}' ({file.parent}) failed to import: {error}")
    own = "" if folders else "; one of your own is found where 'plugins' names its folder"
    raise PluginError(f"unknown {kind} '{name}';{nearest(name, known)} known: {', '.join(known)}{own}")


def load_class(kind: str, name: str, folders: Iterable[str | Path] = ()) -> type:
    """Import a plugin and return its class."""
    return load(find(kind, name, folders))


def load(plugin: Plugin) -> type:
    """Import a plugin and return its class. Whatever is wrong with it is a PluginError that names it."""
    who = plugin.who
    try:
        found = _import(plugin)
    except (Exception, SystemExit) as error:  # whatever a plugin file raises on import is reported against that plugin
        raise PluginError(f"{who} failed to import: {_one_line(error)}") from error
    contract = getattr(importlib.import_module(KINDS[plugin.kind][1]), KINDS[plugin.kind][2])
    plugin_class = found if inspect.isclass(found) else _class_in(found, contract, who)
    if not issubclass(plugin_class, contract):
        clause = f"{plugin_class.__name__} must be a subclass of {contract.__name__}"
        raise PluginError(f"{who} breaks its contract: {clause}")
    if not dataclasses.is_dataclass(getattr(plugin_class, "Config", None)):
        clause = "must have a nested dataclass Config with its options, empty if there are none"
        raise PluginError(f"{who} breaks its contract: {plugin_class.__name__} {clause}")
    _check_parameters(plugin_class, contract, who)
    _check_names(plugin_class, contract, who)
    return plugin_class


def _check_names(plugin_class: type, contract: type, who: str) -> None:
    """A method that is nearly one of the contract's would never be called."""
    known = [name for name, value in vars(contract).items() if inspect.isfunction(value) and not name.startswith("_")]
    for method, value in vars(plugin_class).items():
        if inspect.isfunction(value) and not method.startswith("_") and method not in dir(contract):
            if close := difflib.get_close_matches(method, known, n=1, cutoff=0.9):
                clause = f"{method}() is nobody's; did you mean {close[0]}()?"
                raise PluginError(f"{who} breaks its contract: {clause}")
    attributes = [name for name in (*vars(contract), *vars(contract).get("__annotations__", {})) if name[0] != "_"]
    for name, value in vars(plugin_class).items():
        if not callable(value) and not name.startswith("_") and not hasattr(contract, name):
            if name not in attributes and (close := difflib.get_close_matches(name, attributes, n=1, cutoff=0.9)):
                clause = f"{name} is nobody's; did you mean {close[0]}?"
                raise PluginError(f"{who} breaks its contract: {clause}")
    if isinstance(getattr(plugin_class, "needs", ()), str):
        clause = f"needs must be a tuple of names, not the text {plugin_class.needs!r}: a comma is missing"
        raise PluginError(f"{who} breaks its contract: {clause}")


def _check_parameters(plugin_class: type, contract: type, who: str) -> None:
    """What the plugin overrides must be callable as the contract's own: by position, and what has a default by name."""
    for method, declared in vars(contract).items():
        own = inspect.getattr_static(plugin_class, method)
        if method.startswith("_") or own is declared or not (inspect.isfunction(declared) and inspect.isfunction(own)):
            continue
        parameters = list(inspect.signature(declared).parameters.values())
        by_name = {p.name: None for p in parameters if p.default is not p.empty or p.kind is p.KEYWORD_ONLY}
        try:
            inspect.signature(own).bind(*(p for p in parameters if p.name not in by_name), **by_name)
        except TypeError as error:
            names = ", ".join(p.name for p in parameters[1:])
            raise PluginError(f"{who} breaks its contract: {method}() must take ({names}), but {error}") from error


def _import(plugin: Plugin) -> Any:
    """The plugin's module, or what its entry point names."""
    if plugin.entry_point:
        return plugin.entry_point.load()
    if plugin.origin == "built-in":
        return importlib.import_module(plugin.module)
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


def _class_in(module: Any, contract: type, who: str) -> type:
    """The one class of the contract that the module itself defines."""
    classes = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, contract) and c.__module__ == module.__name__ and not c.__name__.startswith("_")
    ]
    if len(classes) != 1:
        names = ", ".join(c.__name__ for c in classes) or "none"
        raise PluginError(f"{who} must define one public {contract.__name__} class; found: {names}")
    return classes[0]


def make_config(config_class: type, options: Mapping[str, Any], what: str) -> Any:
    """Options checked against a ``Config`` dataclass: names, types, then the class's own range checks.

    Raises PluginError naming the option, what is wrong with it and the nearest right name.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    known = [f.name for f in dataclasses.fields(config_class)]
    for key in options:
        if key not in known:
            raise PluginError(
                f"{what} has no option '{key}';{nearest(str(key), known)} options: {', '.join(known) or 'none'}"
            )
    try:
        defaults = OmegaConf.structured(config_class)
        for field in dataclasses.fields(config_class):
            if field.name in options and field.type in (Any, "Any"):
                defaults[field.name] = None  # a component's node: one that is given keeps nothing of the default
        return OmegaConf.to_object(OmegaConf.merge(defaults, dict(options)))
    except MissingMandatoryValue as error:
        raise PluginError(f"{what}: option '{error.key}' must be given; options: {', '.join(known)}") from error
    except OmegaConfBaseException as error:
        key = f" option '{error.full_key}'" if getattr(error, "full_key", None) else ""
        raise PluginError(f"{what}{key}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise PluginError(f"{what}: {error}") from error


def split_node(kind: str, node: Any) -> tuple[str, dict[str, Any]]:
    """``name`` or ``{name: …, option: …}`` → (name, options)."""
    if isinstance(node, str):
        return node, {}
    if isinstance(node, Mapping) and isinstance(node.get("name"), str):
        return node["name"], {key: value for key, value in node.items() if key != "name"}
    raise PluginError(f"{kind} is {node!r}; it must be a plugin's name or a mapping with 'name' and its options")


def configure(
    kind: str, name: str, options: Mapping[str, Any] | None = None, folders: Iterable[str | Path] = ()
) -> tuple[type, Any]:
    """Import the plugin and check its options, without making it: (class, its Config)."""
    plugin_class, what = load_class(kind, name, folders), f"{kind} '{name}'"
    options, _ = _budget(kind, plugin_class, options or {}, what)
    config = make_config(plugin_class.Config, options, what)
    if kind == "selector" and getattr(config, "scorer", None) is not None:
        configure(kind, *split_node("scorer", config.scorer), folders)
    return plugin_class, config


def _budget(kind: str, plugin_class: type, options: Mapping[str, Any], what: str) -> tuple[Mapping[str, Any], Any]:
    """A compressor's own options, and the share that every compressor can be asked for beside them."""
    if kind != "compressor" or "budget" not in options:
        return options, None
    from xcomp.budgets import Budget

    given = options["budget"]
    if not isinstance(given, Mapping):
        raise PluginError(
            f"{what}: budget is {given!r}; it must be a mapping: keep (a share), of (input, final, layers)"
        )
    return {key: value for key, value in options.items() if key != "budget"}, make_config(Budget, given, what)


def build(kind: str, name: str, options: Mapping[str, Any] | None = None, folders: Iterable[str | Path] = ()) -> Any:
    """Import the plugin, check its options, make it."""
    adapters: list[Any] = []  # folders, each tuned on the one behind it
    if kind == "backbone" and options:
        checkpoint = options.get("checkpoint")
        while checkpoint not in adapters and (base := _base(checkpoint)) is not None:
            adapters.append(checkpoint)
            checkpoint = base
        options = {**options, "checkpoint": checkpoint} if adapters else options
    plugin_class, config = configure(kind, name, options, folders)
    try:
        inspect.signature(plugin_class).bind(config)
    except TypeError as error:
        clause = f"{plugin_class.__name__}(config) must make one, but {error}"
        raise PluginError(f"{kind} '{name}' breaks its contract: {clause}") from error
    made = plugin_class(config)
    made.plugin_name = name  # by which a run speaks of it, should it break its contract
    for folder in reversed(adapters):
        _adapt(made, folder)
    if kind == "selector":
        made.set_up(list(folders))
    if kind == "compressor":
        made.budget = _budget(kind, plugin_class, options or {}, f"{kind} '{name}'")[1]
    return made


def _base(checkpoint: Any) -> str | None:
    """The checkpoint that a folder of adapters was tuned from, if it is one."""
    if not isinstance(checkpoint, str) or not os.path.isfile(os.path.join(checkpoint, "adapter_config.json")):
        return None
    from xcomp.adapters import base_checkpoint

    return base_checkpoint(checkpoint)


def _adapt(backbone: Any, checkpoint: str) -> None:
    """Make of the backbone that was read the one that ``checkpoint``, a folder of adapters, stands for."""
    from xcomp.adapters import load_adapters

    if backbone.device.type != "meta":
        load_adapters(backbone, Path(checkpoint))
    backbone.config = dataclasses.replace(backbone.config, checkpoint=checkpoint)


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

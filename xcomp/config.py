"""RunConfig: the typed form of a YAML file, with ``key=value`` overrides.

A component (backbone, compressor, selector, benchmark) is a name or a mapping with ``name`` and options; its options
are checked against the plugin's own ``Config`` when it is built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xcomp
from xcomp.registry import build, configure, nearest

TRAINABLE = ("llm", "projector", "vision")
DTYPES = ("float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A run configuration that cannot be read or does not fit its types."""


@dataclass
class Sampling:
    """Which frames of a video are candidates: ``rate`` a second within bounds, in multiples of ``multiple``."""

    rate: float = 1.0
    min_frames: int = 64
    max_frames: int = 512
    multiple: int = 8
    style: str = "videochat_flash"  # or xcomp: how videos with too few frames are filled
    reader: str = "auto"  # auto, decord, av, torchcodec


@dataclass
class Generation:
    """How an answer is written: greedily unless ``do_sample`` or ``num_beams`` say otherwise.

    The names are those of transformers' GenerationConfig.
    """

    max_new_tokens: int = 16
    repetition_penalty: float = 1.0  # over generated tokens only
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0  # this and the next two: with do_sample
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int = 0  # every batch of questions starts its draws from it

    def options(self) -> dict[str, Any]:
        """What ``Decoder.generate`` is given."""
        names = ["max_new_tokens", "repetition_penalty", "num_beams", "do_sample"]
        names += ["temperature", "top_p", "top_k"] if self.do_sample else []
        return {name: getattr(self, name) for name in names}


@dataclass
class Tune:
    """Supervised compression tuning. The loss is the mean cross-entropy over answer tokens."""

    data: list[Any] = field(default_factory=list)  # {records: FILE, root: DIR} or {benchmark: …, tasks: […]}
    validation: list[Any] = field(default_factory=list)
    train: list[str] = field(default_factory=lambda: ["llm", "projector"])  # of llm, projector, vision
    frames: list[int] = field(default_factory=list)  # frames shown, drawn from these; default by sampling
    steps: int = 1000
    batch_size: int = 1
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    num_workers: int = 1
    gradient_checkpointing: bool = False
    save_every: int = 200  # steps between checkpoints one can resume from
    save_dtype: str | None = None  # dtype of the checkpoint folder that is written at the end; default as computed


@dataclass
class Arm:
    """One row of a comparison; what is left out is taken from the run."""

    name: str | None = None
    backbone: Any = None
    compressor: Any = None
    selector: Any = None
    frames: Any = None  # a number, or a list: one arm each


@dataclass
class RunConfig:
    """Everything a command needs."""

    name: str = "run"
    output: str = "runs"  # the run folder is <output>/<name>
    plugins: list[str] = field(default_factory=list)  # folders of the user's own plugin files
    seed: int = 0
    backbone: Any = None
    compressor: Any = "none"
    selector: Any = "uniform"
    benchmark: Any = None
    frames: Any = None  # frames shown to the model; default all candidates
    batch_size: int = 1  # questions answered together
    limit: int | None = None  # first questions of the benchmark only
    sampling: Sampling = field(default_factory=Sampling)
    generation: Generation = field(default_factory=Generation)
    arms: list[Arm] = field(default_factory=list)
    tune: Tune = field(default_factory=Tune)
    trainer: dict[str, Any] = field(default_factory=dict)  # passed to lightning.Trainer

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def built_in(folder: str, pattern: str) -> dict[str, Path]:
    """What ships in ``configs`` or ``checkpoints``, by name relative to it and without ``.yaml``."""
    found = {}
    for root in xcomp.__path__:
        for path in sorted((Path(root) / folder).glob(pattern)):
            found[path.relative_to(Path(root) / folder).with_suffix("").as_posix()] = path
    return found


def find_config(name: str) -> Path:
    """A YAML file by path, or a built-in one by name (``demo``)."""
    if Path(name).is_file():
        return Path(name)
    known = built_in("configs", "**/*.yaml")
    if name in known:
        return known[name]
    raise ConfigError(f"config '{name}' does not exist;{nearest(name, known)} built-in configs: {', '.join(known)}")


def find_checkpoint(name: str) -> str:
    """A checkpoint folder: a path as it is, a shipped one by name (``tiny``), else the name as a hub id."""
    known = built_in("checkpoints", "*")
    if not Path(name).exists() and name in known:
        return str(known[name])
    return name


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (path or built-in name) and ``key=value`` overrides into a checked RunConfig."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = find_config(str(name))
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override '{override}' is not of the form key=value")
    try:
        given = OmegaConf.load(path)
        given.merge_with_dotlist(list(overrides))
        content = OmegaConf.to_container(given, resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config '{path}' cannot be read: {' '.join(str(error).split())}") from error
    except (TypeError, IndexError) as error:
        raise ConfigError(f"config '{path}' does not take the overrides {list(overrides)}: {error}") from error
    return parse_config(content, str(path))


def parse_config(content: Any, where: str) -> RunConfig:
    """A mapping checked against RunConfig's keys and types."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(content, Mapping):
        raise ConfigError(f"config '{where}' must be a mapping of keys, not {type(content).__name__}")
    _check_keys(RunConfig, content, where)
    for part, node in (("sampling", Sampling), ("generation", Generation), ("tune", Tune)):
        _check_keys(node, content.get(part, {}), f"{where}: {part}")
    arms = content.get("arms") or []
    if not isinstance(arms, list):
        raise ConfigError(f"config '{where}': arms must be a list of mappings, not {arms!r}")
    for number, arm in enumerate(arms):
        _check_keys(Arm, arm, f"{where}: arms[{number}]")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), content))
    except (OmegaConfBaseException, TypeError) as error:
        key = f", key '{error.full_key}'" if getattr(error, "full_key", None) else ""
        raise ConfigError(f"config '{where}'{key}: {str(error).splitlines()[0]}") from error
    _check_ranges(config, where)
    return config


def _check_keys(node: type, content: Any, where: str) -> None:
    if not isinstance(content, Mapping):
        raise ConfigError(f"config '{where}' must be a mapping of keys, not {content!r}")
    known = [f.name for f in dataclasses.fields(node)]
    for key in content:
        if key not in known:
            hint = nearest(str(key), known)
            raise ConfigError(f"config '{where}' has no key '{key}';{hint} keys: {', '.join(known)}")


def _check_ranges(config: RunConfig, where: str) -> None:
    rules = [
        (config.batch_size >= 1, f"batch_size is {config.batch_size}; it must be at least 1"),
        (config.tune.batch_size >= 1, f"tune.batch_size is {config.tune.batch_size}; it must be at least 1"),
        (config.tune.steps >= 1, f"tune.steps is {config.tune.steps}; it must be at least 1"),
        (config.tune.save_every >= 1, f"tune.save_every is {config.tune.save_every}; it must be at least 1"),
        (config.tune.learning_rate > 0, f"tune.learning_rate is {config.tune.learning_rate}; it must be above 0"),
        (0 <= config.seed < 2**32, f"seed is {config.seed}; it must be 0..{2**32 - 1}"),
        (config.limit is None or config.limit >= 1, f"limit is {config.limit}; it must be at least 1"),
        (config.sampling.rate > 0, f"sampling.rate is {config.sampling.rate}; it must be above 0 frames a second"),
        *_generation_rules(config.generation),
        (config.tune.weight_decay >= 0, f"tune.weight_decay is {config.tune.weight_decay}; it must be at least 0"),
        (0 <= config.tune.warmup_ratio <= 1, f"tune.warmup_ratio is {config.tune.warmup_ratio}; it must be 0..1"),
        (config.tune.num_workers >= 0, f"tune.num_workers is {config.tune.num_workers}; it must be at least 0"),
        (
            config.tune.save_dtype in (None, *DTYPES),
            f"tune.save_dtype is '{config.tune.save_dtype}'; it must be one of {', '.join(DTYPES)}",
        ),
        (
            config.name not in ("", "..") and Path(config.name).name == config.name,
            f"name is '{config.name}'; it must be a plain name",
        ),
        *(
            (part in TRAINABLE, f"tune.train names '{part}';{nearest(part, TRAINABLE)} parts: {', '.join(TRAINABLE)}")
            for part in config.tune.train
        ),
        *((n >= 1, f"frames is {n}; it must be at least 1") for n in frame_budgets(config.frames, where) if n),
        *((n >= 1, f"tune.frames holds {n}; it must be at least 1") for n in config.tune.frames),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(f"config '{where}': {message}")
    _check_sampling(config.sampling, where)


def _generation_rules(g: Generation) -> list[tuple[bool, str]]:
    """(whether it holds, what to say if not) for each option."""
    return [
        (g.max_new_tokens >= 1, f"generation.max_new_tokens is {g.max_new_tokens}; it must be at least 1"),
        (g.repetition_penalty > 0, f"generation.repetition_penalty is {g.repetition_penalty}; it must be above 0"),
        (g.num_beams >= 1, f"generation.num_beams is {g.num_beams}; it must be at least 1"),
        (g.temperature > 0, f"generation.temperature is {g.temperature}; it must be above 0"),
        (0 < g.top_p <= 1, f"generation.top_p is {g.top_p}; it must be above 0 and at most 1"),
        (g.top_k >= 0, f"generation.top_k is {g.top_k}; it must be at least 0 (0: all tokens)"),
    ]


def _check_sampling(sampling: Sampling, where: str) -> None:
    from xcomp.readers import READERS
    from xcomp.sampling import sample_indices

    if sampling.reader not in READERS:
        raise ConfigError(f"config '{where}': sampling.reader is '{sampling.reader}'; readers: {', '.join(READERS)}")
    rule = {key: value for key, value in dataclasses.asdict(sampling).items() if key != "reader"}
    try:
        sample_indices(1000, 25.0, **rule)
    except ValueError as error:
        raise ConfigError(f"config '{where}', sampling: {error}") from error


def frame_budgets(frames: Any, where: str) -> list[int | None]:
    """``frames`` of a run or an arm as a list: a number, several, or None for all candidates."""
    values = frames if isinstance(frames, (list, tuple)) else [frames]
    if not values:
        raise ConfigError(f"config '{where}': frames is an empty list; leave it out for all candidate frames")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"config '{where}': frames is {value!r}; it must be a number of frames of at least 1")
    return list(values)


def split_component(kind: str, node: Any) -> tuple[str, dict[str, Any]]:
    """``name`` or ``{name: …, option: …}`` → (name, options)."""
    if isinstance(node, str):
        return node, {}
    if isinstance(node, Mapping) and isinstance(node.get("name"), str):
        return node["name"], {k: v for k, v in node.items() if k != "name"}
    raise ConfigError(f"{kind} is {node!r}; it must be a plugin's name or a mapping with 'name' and its options")


def check_component(kind: str, node: Any, folders: Sequence[str] = ()) -> None:
    """Raise what building the node's plugin would raise for its name or options; nothing is made."""
    name, options = split_component(kind, node)
    configure(kind, name, options, folders)


def build_component(kind: str, node: Any, folders: Sequence[str] = ()) -> Any:
    """Build the plugin that a component node names."""
    name, options = split_component(kind, node)
    return build(kind, name, options, folders)

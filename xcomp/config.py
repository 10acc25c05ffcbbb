"""RunConfig: the typed form of a YAML file, with ``key=value`` overrides.

A component (backbone, compressor, selector, benchmark) is a name or a mapping with ``name`` and options; its options
are checked against the plugin's own ``Config`` when it is built. Where one is given over another (an override over the
file, an arm over the run), a mapping of the same plugin merges its options into the other's; another plugin, or a plain
name, replaces it. What the run's backbone says of ``device``, ``dtype`` and ``attn_implementation`` holds for every arm
that says nothing else.

Folders in ``plugins`` are relative to the file that lists them, in an override to the working directory. Interpolations
(``${oc.env:DATA}``) are resolved for the run; what is recorded of it holds them as they are written.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from xcomp.messages import nearest
from xcomp.registry import KINDS, PluginError, build, configure, split_node
from xcomp.shipped import built_in

# What arms can have an equal budget in, with the words for it.
BUDGETS = {"frames": "frames", "tokens_in": "tokens in", "kv_tokens": "KV tokens", "macs": "MACs"}
TRAINABLE = ("llm", "projector", "vision", "compressor")
TEXT_FORMATS = ("answers", "released")
ANSWER_MODES = ("generate", "loglikelihood")
NORMALISATIONS = ("none", "length")
DTYPES = ("float32", "bfloat16", "float16")
EXPORTS = ("last", "best")
# no_vision_gradient_from_512_frames: vision tower and projector learn nothing from a batch of 512 frames or more.
QUIRKS = ("no_vision_gradient_from_512_frames",)
# Schedules of the learning rate, after a warm-up, as transformers calls them.
LR_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "inverse_sqrt": "inverse_sqrt",
}
MAX_DEPTH = 32  # OmegaConf gives up below 100, and a YAML parser that recurses much further ends the process
MAX_NAME = 255  # bytes; what file systems take


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

    def candidates(self, num_frames: int, fps: float) -> list[int]:
        """The candidate frames of a video (:func:`xcomp.sampling.sample_indices`)."""
        from xcomp.sampling import sample_indices

        return sample_indices(num_frames, fps, **{k: v for k, v in vars(self).items() if k != "reader"})


@dataclass
class Decoding:
    """How videos are decoded beside the model. None of it changes a record."""

    workers: int | None = None  # processes; default half of a rank's cores, at most 4; 0: in the process of the model
    threads: int | None = None  # of each worker's decoder; default the cores divided among the workers
    chunk: int = 16  # frames in one piece of work
    seconds: float = 300.0  # a piece of work that takes longer is given up, and its worker replaced
    memory: float = 4.0  # GB that a worker may take beyond what it starts with


@dataclass
class Memory:
    """What is kept of one video, in GB; the rest is computed again. None of it changes a record."""

    pixels: float = 2.0  # resized frames, uint8, in host memory (shared with the frames that are decoded ahead)
    tokens: float = 2.0  # visual tokens and selectors' features, where the model is
    states: float = 2.0  # key-value caches of a video that is asked further questions (`xcomp ask`)


@dataclass
class Generation:
    """How an answer comes about.

    ``generate``: it is written, greedily unless ``do_sample`` or ``num_beams`` say otherwise, by options with the names
    of transformers' GenerationConfig. ``loglikelihood``: nothing is written; the option that is most likely as an
    answer is taken, by the sum of its tokens' log-probabilities or (``normalise: length``) their mean.
    """

    max_new_tokens: int | None = None  # default the benchmark's own, 16 without one
    repetition_penalty: float = 1.0  # over generated tokens only
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0  # this and the next two: with do_sample
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int = 0  # every batch of questions starts its draws from it
    mode: str = "generate"  # or loglikelihood
    normalise: str = "none"  # or length: with loglikelihood

    def limited(self, tokens: int) -> Generation:
        """The same; where it does not say how long an answer may get, at most so many tokens."""
        return self if self.max_new_tokens is not None else dataclasses.replace(self, max_new_tokens=tokens)

    def options(self) -> dict[str, Any]:
        """What ``Decoder.generate`` is given."""
        names = ["max_new_tokens", "repetition_penalty", "num_beams", "do_sample"]
        names += ["temperature", "top_p", "top_k"] if self.do_sample else []
        return {name: getattr(self, name) for name in names}


@dataclass
class Lora:
    """Low-rank adapters in place of the language model's own weights (:mod:`xcomp.adapters`)."""

    rank: int = 16
    alpha: float = 32.0  # what the adapters give is scaled by alpha / rank
    dropout: float = 0.0
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    merge: bool = False  # write whole weights at the end, not adapters alone


@dataclass
class Curriculum:
    """Compression that grows: the schedule's end falls from all tokens a frame to the compressor's own."""

    share: float = 0.5  # of the steps, after which the compressor is as configured


@dataclass
class Distillation:
    """A teacher beside the labels: the model as it was at the start of the run, without compression."""

    weight: float = 0.5  # loss = (1 - weight) · cross-entropy + weight · temperature² · KL(teacher ‖ student)
    temperature: float = 1.0


@dataclass
class Tune:
    """Supervised compression tuning. The loss is the mean cross-entropy over answer tokens."""

    data: list[Any] = field(default_factory=list)  # {records: FILE, root: DIR}, {mixture: FILE, root: DIR}, …
    validation: list[Any] = field(default_factory=list)
    train: list[str] = field(default_factory=lambda: ["llm", "projector"])  # of llm, projector, vision, compressor
    frames: list[int] = field(default_factory=list)  # frames shown, drawn from these; default by sampling
    steps: int = 1000
    batch_size: int = 1
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    num_workers: int = 1
    group_by_length: bool | None = None  # batches of samples of like length; default where a batch has several
    format: str = "answers"  # text and labels: as questions are asked, or `released`, as the model's authors trained it
    max_skipped: float = 0.01  # share of the records that may be left out because they, or their media, are no good
    gradient_checkpointing: bool = False
    save_every: int = 200  # steps between checkpoints one can resume from
    validate_every: int | None = None  # steps between validations; default save_every, or once if there are fewer
    save_dtype: str | None = None  # dtype of the checkpoint folder that is written at the end; default as computed
    keep: int = 2  # newest checkpoints that are kept
    export: str = "last"  # the weights that are written at the end: last, or best by validation loss
    # {name: EarlyStopping, monitor: validation/loss}: one of lightning.pytorch.callbacks, or module:Class
    callbacks: list[Any] = field(default_factory=list)
    # How it is trained.
    lora: Lora | None = None
    curriculum: Curriculum | None = None
    distillation: Distillation | None = None
    quirks: list[str] = field(default_factory=list)  # what the released training does and the paper does not say
    learning_rates: dict[str, float] = field(default_factory=dict)  # part → rate, where it is not learning_rate
    schedule: str = "cosine"  # of the rate, after the warm-up: cosine, linear (both to 0), constant, inverse_sqrt

    @property
    def steps_between_validations(self) -> int | None:
        """None where there is nothing to validate on."""
        return (self.validate_every or min(self.save_every, self.steps)) if self.validation else None


@dataclass
class Arm:
    """One row of a comparison; what is left out is taken from the run.

    A component that names the run's own plugin in a mapping takes the options it leaves out from the run's; another
    plugin, or a plain name, stands for itself. A backbone always takes ``device``, ``dtype`` and
    ``attn_implementation`` from the run's where it leaves them out, so ``backbone.device=cuda`` reaches every arm.
    """

    name: str | None = None
    backbone: Any = None
    compressor: Any = None
    selector: Any = None
    frames: Any = None  # a number, or a list: one arm each
    seed: Any = None  # in place of the run's, and of `{seed}` in strings; a list: one arm each, one group in reports
    published: dict[str, float] = field(default_factory=dict)  # what a paper says of this arm; shown beside ours


@dataclass
class RunConfig:
    """Everything a command needs."""

    name: str = "run"
    output: str = "runs"  # the run folder is <output>/<name>
    plugins: list[str] = field(default_factory=list)  # folders of the user's own plugin files, relative to this file
    seed: int = 0
    backbone: Any = None
    compressor: Any = "none"
    selector: Any = "uniform"
    benchmark: Any = None
    frames: Any = None  # frames shown to the model; default all candidates
    batch_size: int = 1  # questions answered together
    limit: int | None = None  # first questions of the benchmark only
    allow_missing: bool = False  # go on where videos are missing, without their questions
    reference: str | None = None  # the arm that reports hold the others against; default the first
    hard: str | None = None  # the arm whose wrong answers make the hard part; default plain down-sampling, if there
    equal: str | None = None  # what budgets must be equal in: frames, tokens_in, kv_tokens or macs
    export_frames: str | None = None  # file to which the frames that arms chose are written, for `frames_file`
    sampling: Sampling = field(default_factory=Sampling)
    decoding: Decoding = field(default_factory=Decoding)
    memory: Memory = field(default_factory=Memory)
    generation: Generation = field(default_factory=Generation)
    arms: list[Arm] = field(default_factory=list)
    tune: Tune = field(default_factory=Tune)
    trainer: dict[str, Any] = field(default_factory=dict)  # passed to lightning.Trainer
    shapes: str | None = None  # forecasts count this architecture (a config.json) where a checkpoint is not here
    published: dict[str, dict[str, float]] = field(default_factory=dict)  # rows of a paper's table that are no arms
    # (path of keys, text) of what was an interpolation in the file; no key of one
    _interpolations: list[Any] = field(default_factory=list, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if not key.startswith("_")}

    def written(self) -> dict[str, Any]:
        """``to_dict`` with interpolations as they are written, for what is recorded: a value of the environment may be
        a secret, and differs from machine to machine."""
        content = self.to_dict()
        for path, text in self._interpolations:
            try:
                reduce(getitem, path[:-1], content)[path[-1]] = text
            except (KeyError, IndexError, TypeError):  # of a part that was replaced since, as ``evaluate`` does arms
                continue
        return content


def find_config(name: str) -> Path:
    """A YAML file by path, or a built-in one by name (``demo``)."""
    if os.path.isfile(name):  # Path.is_file fails on a name that is too long
        return Path(name)
    known = built_in("configs", "**/*.yaml")
    if name in known:
        return known[name]
    raise ConfigError(f"config '{name}' does not exist;{nearest(name, known)} built-in configs: {', '.join(known)}")


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
        written = _override(_read(path), overrides)
        content = OmegaConf.to_container(OmegaConf.create(written), resolve=True)
    except ConfigError:
        raise
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"config '{path}' cannot be read: {reason}") from error
    except (TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"config '{path}' does not take the overrides {list(overrides)}: {error}") from error
    config = parse_config(content, str(path))
    return dataclasses.replace(config, _interpolations=list(_interpolations(written, content)))


def _read(path: Path) -> Any:
    """A YAML file's content with interpolations as they are written, and folders of plugins as seen from here."""
    from omegaconf import OmegaConf

    _check_depth(path.read_text(encoding="utf-8"))
    content = OmegaConf.to_container(OmegaConf.load(path))
    folders = content.get("plugins") if isinstance(content, dict) else None
    if isinstance(folders, list):
        # One that opens with an interpolation (${oc.env:PLUGINS}) is given from outside, as in an override.
        own = [isinstance(folder, str) and not folder.startswith("${") for folder in folders]
        content["plugins"] = [os.path.normpath(path.parent / f) if is_own else f for f, is_own in zip(folders, own)]
    return content


def _check_depth(text: str) -> None:
    """ValueError where YAML nests deeper than a configuration may; told without building what it describes."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"line {event.start_mark.line + 1} is nested deeper than {MAX_DEPTH} levels")


def _override(content: Any, overrides: Sequence[str]) -> Any:
    """``content`` with ``key=value`` overrides merged in.

    A component that gets another plugin keeps nothing of the one before: beside the merged content stands one in which
    components were empty to begin with, so it holds what overrides say of them and no more.
    """
    if not isinstance(content, Mapping) or not overrides:
        return content
    for override in overrides:
        _check_override(override)
    before = _components(content)
    named = {path: {"name": node} if _is_plain_name(node) else node for path, node in before.items()}
    lists = dict.fromkeys(_of_another_form(before, overrides))
    named |= lists
    merged = _merged(_with_components(content, named), overrides)
    said = _components(_merged(_with_components(content, dict.fromkeys(before, {}) | lists), overrides))
    changed = {}
    for path, node in _components(merged).items():
        old = named.get(path)
        if path in before and said.get(path) == {}:  # no override speaks of it
            changed[path] = before[path]
        elif isinstance(old, Mapping) and isinstance(node, Mapping):
            if node.get("name") != old.get("name"):
                changed[path] = said[path]
            elif (scorer := said[path].get("scorer")) is not None:
                changed[path] = node | {"scorer": _nested(old.get("scorer"), scorer, node["scorer"])}
    return _with_components(merged, changed)


def _nested(old: Any, said: Any, merged: Any) -> Any:
    """A selector's scorer, of which overrides say ``said``: another plugin keeps nothing of the old one's options."""
    if isinstance(merged, Mapping) and "name" not in merged and _is_plain_name(old):
        return {"name": old, **merged}
    same = isinstance(old, Mapping) and isinstance(merged, Mapping) and old.get("name") == merged.get("name")
    return merged if same else said


def _check_override(override: str) -> None:
    """ConfigError unless the value of a ``key=value`` is YAML that can be read."""
    from yaml import YAMLError

    try:
        _check_depth(override.partition("=")[2])
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"override {_short(override)} cannot be read: {' '.join(str(error).split())}") from error


def _of_another_form(before: Mapping[tuple[str | int, ...], Any], overrides: Sequence[str]) -> list[tuple]:
    """Places where an override puts a list of components over one, or anything over a list: nothing of it stays."""
    import yaml

    keys = {".".join(map(str, path)): path for path in before}
    found = []
    for override in overrides:
        key, _, value = override.partition("=")
        path = keys.get(key.replace("[", ".").replace("]", ""))
        if path is not None and (isinstance(before[path], list) or isinstance(yaml.safe_load(value), list)):
            found.append(path)
    return found


def _is_plain_name(node: Any) -> bool:
    return isinstance(node, str) and "${" not in node


def _merged(content: Any, overrides: Sequence[str]) -> Any:
    from omegaconf import OmegaConf

    given = OmegaConf.create(content)
    given.merge_with_dotlist(list(overrides))
    return OmegaConf.to_container(given)


def _components(content: Mapping[str, Any]) -> dict[tuple[str | int, ...], Any]:
    """Path of keys → node, for every place of a configuration that names a plugin and is there."""
    tune = content.get("tune")
    tune = tune if isinstance(tune, Mapping) else {}
    holders = [((), content)]
    for path, rows in (
        (("arms",), content.get("arms")),
        *((("tune", part), tune.get(part)) for part in ("data", "validation")),
    ):
        holders += [((*path, i), row) for i, row in enumerate(rows if isinstance(rows, list) else [])]
    return {
        (*path, kind): row[kind]
        for path, row in holders
        for kind in KINDS
        if isinstance(row, Mapping) and row.get(kind) is not None
    }


def _with_components(content: Mapping[str, Any], nodes: Mapping[tuple[str | int, ...], Any]) -> Any:
    """A copy of the configuration in which ``nodes`` stand at their paths."""
    content = copy.deepcopy(content)
    for path, node in nodes.items():
        reduce(getitem, path[:-1], content)[path[-1]] = copy.deepcopy(node)
    return content


def _interpolations(written: Any, resolved: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, str]]:
    """(path of keys, text as written) wherever resolving made a difference."""
    if isinstance(written, str):
        if written != resolved:
            yield path, written
    elif isinstance(written, (Mapping, list)):
        for key in written if isinstance(written, Mapping) else range(len(written)):
            yield from _interpolations(written[key], resolved[key], (*path, key))


def parse_config(content: Any, where: str) -> RunConfig:
    """A mapping checked against RunConfig's keys and types."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(content, Mapping):
        raise ConfigError(f"config '{where}' must be a mapping of keys, not {type(content).__name__}")
    _check_values(content, where)
    _check_keys(RunConfig, content, where)
    for part, node in (
        ("sampling", Sampling),
        ("decoding", Decoding),
        ("memory", Memory),
        ("generation", Generation),
        ("tune", Tune),
    ):
        _check_keys(node, content.get(part, {}), f"{where}: {part}")
    for part, node in (("lora", Lora), ("curriculum", Curriculum), ("distillation", Distillation)):
        if (given := (content.get("tune") or {}).get(part)) is not None:
            _check_keys(node, given, f"{where}: tune.{part}")
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
    _check_values(config.to_dict(), where)  # also what was text and became a number, like "nan"
    _check_ranges(config, where)
    return config


def _check_values(value: Any, where: str, path: str = "", depth: int = 0) -> None:
    """ConfigError for what no run can be made of or recorded with, wherever it stands; ``path`` says where."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"config '{where}' is nested deeper than {MAX_DEPTH} levels, at {_short(path)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"config '{where}': {path} is {value}; it must be a finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"config '{where}': {path} is {_short(value)}; a number must fit into 64 bits")
    if isinstance(value, str) and (wrong := _unwritable(value)):
        raise ConfigError(f"config '{where}': {path} is {_short(value)}, which holds {wrong}")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if wrong := _unwritable(str(key)):
                raise ConfigError(f"config '{where}': the key {_short(key)} holds {wrong}")
            _check_values(item, where, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_values(item, where, f"{path}[{i}]", depth + 1)
    elif not isinstance(value, (str, int, float, type(None))):
        raise ConfigError(f"config '{where}': {path} is a {type(value).__name__}, not text, number, list or mapping")


def _unwritable(text: str) -> str | None:
    """What in a text keeps it from being written to a file or naming one, in words."""
    if "\0" in text:
        return "a null character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair: write the character itself"
    return None


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:60]} … ({len(text)} characters)"


def _check_keys(node: type, content: Any, where: str) -> None:
    if not isinstance(content, Mapping):
        raise ConfigError(f"config '{where}' must be a mapping of keys, not {content!r}")
    known = [f.name for f in dataclasses.fields(node) if not f.name.startswith("_")]
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
        (
            config.tune.validate_every is None or 1 <= config.tune.validate_every <= config.tune.steps,
            f"tune.validate_every is {config.tune.validate_every}; it must be at least 1, and at most tune.steps "
            f"({config.tune.steps})",
        ),
        (
            config.tune.validate_every is None or bool(config.tune.validation),
            f"tune.validate_every is {config.tune.validate_every}, but tune.validation is empty; list its records",
        ),
        (config.tune.learning_rate > 0, f"tune.learning_rate is {config.tune.learning_rate}; it must be above 0"),
        (0 <= config.seed < 2**32, f"seed is {config.seed}; it must be 0..{2**32 - 1}"),
        (config.limit is None or config.limit >= 1, f"limit is {config.limit}; it must be at least 1"),
        (config.sampling.rate > 0, f"sampling.rate is {config.sampling.rate}; it must be above 0 frames a second"),
        *_generation_rules(config.generation),
        *_training_rules(config.tune),
        *_decoding_rules(config.decoding, config.memory),
        (config.tune.weight_decay >= 0, f"tune.weight_decay is {config.tune.weight_decay}; it must be at least 0"),
        (0 <= config.tune.warmup_ratio <= 1, f"tune.warmup_ratio is {config.tune.warmup_ratio}; it must be 0..1"),
        (0 <= config.tune.max_skipped <= 1, f"tune.max_skipped is {config.tune.max_skipped}; it must be 0..1"),
        (
            config.tune.format in TEXT_FORMATS,
            f"tune.format is '{config.tune.format}';{nearest(config.tune.format, TEXT_FORMATS)} formats: "
            f"{', '.join(TEXT_FORMATS)}",
        ),
        (config.tune.num_workers >= 0, f"tune.num_workers is {config.tune.num_workers}; it must be at least 0"),
        (
            config.tune.save_dtype in (None, *DTYPES),
            f"tune.save_dtype is '{config.tune.save_dtype}'; it must be one of {', '.join(DTYPES)}",
        ),
        (
            config.name not in ("", "..") and Path(config.name).name == config.name,
            f"name is '{config.name}'; it must be a plain name",
        ),
        (
            len(os.fsencode(config.name)) <= MAX_NAME,
            f"name is {_short(config.name)}; file systems take at most {MAX_NAME} bytes",
        ),
        (bool(config.tune.train), f"tune.train is empty; name at least one of {', '.join(TRAINABLE)}"),
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


def _training_rules(t: Tune) -> list[tuple[bool, str]]:
    """As ``_generation_rules``."""
    schedules = ", ".join(LR_SCHEDULES)
    return [
        (t.keep >= 1, f"tune.keep is {t.keep}; it must be at least 1"),
        (t.export in EXPORTS, f"tune.export is '{t.export}';{nearest(t.export, EXPORTS)} it must be last or best"),
        (t.export == "last" or t.validation, "tune.export is best, but tune.validation is empty; list records for it"),
        (
            t.schedule in LR_SCHEDULES,
            f"tune.schedule is '{t.schedule}';{nearest(t.schedule, LR_SCHEDULES)} schedules: {schedules}",
        ),
        *(
            (
                part in t.train,
                f"tune.learning_rates names '{part}', which is not trained;{nearest(part, t.train)} tune.train: "
                f"{', '.join(t.train)}",
            )
            for part in t.learning_rates
        ),
        *_lora_rules(t),
        *(
            (0 < c.share <= 1, f"tune.curriculum.share is {c.share}; it must be above 0 and at most 1")
            for c in [t.curriculum]
            if c
        ),
        *(
            (0 < d.weight <= 1, f"tune.distillation.weight is {d.weight}; it must be above 0 and at most 1")
            for d in [t.distillation]
            if d
        ),
        *(
            (d.temperature > 0, f"tune.distillation.temperature is {d.temperature}; it must be above 0")
            for d in [t.distillation]
            if d
        ),
        *((q in QUIRKS, f"tune.quirks names '{q}';{nearest(q, QUIRKS)} quirks: {', '.join(QUIRKS)}") for q in t.quirks),
        (
            not t.quirks or "llm" in t.train,
            f"tune.quirks {t.quirks} leave nothing to learn without 'llm' in tune.train",
        ),
        *((rate > 0, f"tune.learning_rates.{k} is {rate}; it must be above 0") for k, rate in t.learning_rates.items()),
    ]


def _lora_rules(t: Tune) -> list[tuple[bool, str]]:
    """As ``_generation_rules``."""
    if (lora := t.lora) is None:
        return []
    return [
        ("llm" in t.train, "tune.lora adapts the language model, but tune.train does not name 'llm'"),
        (lora.rank >= 1, f"tune.lora.rank is {lora.rank}; it must be at least 1"),
        (lora.alpha > 0, f"tune.lora.alpha is {lora.alpha}; it must be above 0"),
        (0 <= lora.dropout < 1, f"tune.lora.dropout is {lora.dropout}; it must be at least 0 and below 1"),
        (bool(lora.targets), "tune.lora.targets is empty; leave it out for all projections"),
    ]


def _decoding_rules(d: Decoding, m: Memory) -> list[tuple[bool, str]]:
    """As ``_generation_rules``."""
    counts = (("workers", d.workers, 0), ("threads", d.threads, 1), ("chunk", d.chunk, 1))
    return [
        *((n is None or n >= low, f"decoding.{k} is {n}; it must be at least {low}") for k, n, low in counts),
        (d.seconds > 0, f"decoding.seconds is {d.seconds}; it must be above 0"),
        (d.memory > 0, f"decoding.memory is {d.memory}; it must be above 0 GB"),
        *((v >= 0, f"memory.{k} is {v}; it must be at least 0 GB") for k, v in vars(m).items()),
    ]


def _generation_rules(g: Generation) -> list[tuple[bool, str]]:
    """(whether it holds, what to say if not) for each option."""
    plain = Generation(mode=g.mode, normalise=g.normalise)
    written = [name for name, value in vars(g).items() if value != getattr(plain, name)]
    writes = f"generation.{written[0]} is about written answers" if written else ""
    modes, kinds = ", ".join(ANSWER_MODES), ", ".join(NORMALISATIONS)
    scores = g.mode == "loglikelihood"
    hint, kind = nearest(g.mode, ANSWER_MODES), nearest(g.normalise, NORMALISATIONS)
    return [
        (g.mode in ANSWER_MODES, f"generation.mode is '{g.mode}';{hint} it must be one of {modes}"),
        (g.normalise in NORMALISATIONS, f"generation.normalise is '{g.normalise}';{kind} it must be one of {kinds}"),
        (scores or g.normalise == "none", f"generation.normalise: {g.normalise} is for mode: loglikelihood"),
        (not (scores and written), f"{writes}; with mode: loglikelihood nothing is written"),
        (
            g.max_new_tokens is None or g.max_new_tokens >= 1,
            f"generation.max_new_tokens is {g.max_new_tokens}; it must be at least 1",
        ),
        (g.repetition_penalty > 0, f"generation.repetition_penalty is {g.repetition_penalty}; it must be above 0"),
        (g.num_beams >= 1, f"generation.num_beams is {g.num_beams}; it must be at least 1"),
        (g.temperature > 0, f"generation.temperature is {g.temperature}; it must be above 0"),
        (0 < g.top_p <= 1, f"generation.top_p is {g.top_p}; it must be above 0 and at most 1"),
        (g.top_k >= 0, f"generation.top_k is {g.top_k}; it must be at least 0 (0: all tokens)"),
    ]


def _check_sampling(sampling: Sampling, where: str) -> None:
    from xcomp.readers import READERS

    if sampling.reader not in READERS:
        raise ConfigError(f"config '{where}': sampling.reader is '{sampling.reader}'; readers: {', '.join(READERS)}")
    try:
        sampling.candidates(1000, 25.0)
    except ValueError as error:
        raise ConfigError(f"config '{where}', sampling: {error}") from error


def merged_sampling(base: Sampling, given: Any, where: str) -> Sampling:
    """``base`` with the keys that a data set gives replaced; ConfigError says what is wrong with which."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_keys(Sampling, given, where)
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base), given))
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    _check_sampling(merged, where)
    return merged


def frame_budgets(frames: Any, where: str) -> list[int | None]:
    """``frames`` of a run or an arm as a list: a number, several, or None for all candidates."""
    values = frames if isinstance(frames, (list, tuple)) else [frames]
    if not values:
        raise ConfigError(f"config '{where}': frames is an empty list; leave it out for all candidate frames")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"config '{where}': frames is {value!r}; it must be a number of frames of at least 1")
    return list(values)


def arm_seeds(seed: Any, where: str) -> list[int | None]:
    """``seed`` of an arm as a list: a number, several, or None for the run's."""
    values = seed if isinstance(seed, (list, tuple)) else [seed]
    if not values:
        raise ConfigError(f"config '{where}': seed is an empty list; leave it out for the run's seed")
    for value in values:
        number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
        if not (number or seed is None):
            raise ConfigError(f"config '{where}': seed is {value!r}; it must be a number of 0..{2**32 - 1}")
        if values.count(value) > 1:
            raise ConfigError(f"config '{where}': seed names {value} twice")
    return list(values)


def check_equal(kind: str) -> None:
    """ConfigError where ``equal`` names no kind of budget."""
    if kind not in BUDGETS:
        raise ConfigError(f"equal is '{kind}';{nearest(str(kind), BUDGETS)} budgets are equal in {', '.join(BUDGETS)}")


def split_component(kind: str, node: Any) -> tuple[str, dict[str, Any]]:
    """``name`` or ``{name: …, option: …}`` → (name, options)."""
    try:
        return split_node(kind, node)
    except PluginError as error:
        raise ConfigError(str(error)) from error


def check_component(kind: str, node: Any, folders: Sequence[str] = ()) -> None:
    """Raise what building the node's plugin would raise for its name or options; nothing is made."""
    for part in component_parts(kind, node):
        name, options = split_component(kind, part)
        configure(kind, name, options, folders)


def build_component(kind: str, node: Any, folders: Sequence[str] = ()) -> Any:
    """Build the plugin that a component node names."""
    parts = [build(kind, *split_component(kind, part), folders) for part in component_parts(kind, node)]
    if len(parts) == 1:
        return parts[0]
    from xcomp.compressor import Chain

    try:
        return Chain(parts)
    except ValueError as error:
        raise ConfigError(f"compressor: {error}") from error


def component_parts(kind: str, node: Any) -> list[Any]:
    """The node itself, or the nodes of a list: compressors that act one after the other."""
    if not isinstance(node, (list, tuple)):
        return [node]
    if kind != "compressor" or not node:
        raise ConfigError(f"{kind} is {node!r}; it must be a plugin's name or a mapping with 'name' and its options")
    return list(node)

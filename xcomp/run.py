"""The run folder: what a command was asked to do, with which versions and hardware, so that it can be resumed and read.

A folder belongs to one configuration; running another one into it is an error, not a mixture.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import xcomp
from xcomp.config import ConfigError, RunConfig
from xcomp.messages import nearest
from xcomp.stopping import end_with_parent

if TYPE_CHECKING:
    from lightning import Trainer

SCHEMA = 2
_PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "omegaconf", "decord", "av", "numpy")
REPORT_KEYS = ("equal", "hard", "reference")  # how results are read, not what they are
# What may change between a run and its continuation without changing what it computes, by command; with a key, all
# that is below it. Tuning: what it does not read, and what leaves each step's mathematics alone.
FREE_KEYS = {
    "tune": (
        *("allow_missing", "arms", "batch_size", "benchmark", "decoding", "export_frames", "frames", "generation"),
        *("limit", "memory", "selector", *REPORT_KEYS),
        *("tune.gradient_checkpointing", "tune.num_workers", "tune.save_dtype", "tune.save_every", "tune.steps"),
        *("tune.export", "tune.keep", "tune.lora.merge", "tune.max_skipped"),
        *("tune.validation", "tune.validate_every", "trainer.limit_val_batches", "trainer.num_sanity_val_steps"),
        # Refused by now; of runs that were begun before.
        *("trainer.val_check_interval", "trainer.check_val_every_n_epoch", "trainer.max_time"),
        *("trainer.max_steps", "trainer.min_steps", "trainer.max_epochs", "trainer.min_epochs"),
        *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.logger", "trainer.log_every_n_steps"),
        *("trainer.enable_checkpointing", "trainer.default_root_dir", "trainer.profiler"),
        *("trainer.accelerator", "backbone.device"),
        # As long as a step takes as many batches, which the checkpoint knows.
        *("trainer.accumulate_grad_batches", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    ),
    "compare": ("allow_missing", "batch_size", "export_frames", "trainer", "decoding", "memory", "tune", *REPORT_KEYS),
    "evaluate": ("arms", "allow_missing", "batch_size", "export_frames", "trainer", "decoding", "memory", "tune")
    + REPORT_KEYS,
}
# What no command computes with.
NOTES = re.compile(r"(shapes|(arms\[\d+\]\.)?published)\b")
_LAUNCHER = "XCOMP_LAUNCHER"
# Of the Trainer: the others cast whole models, and with them what must stay exact.
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
# Options of components that say where something is computed and how much of it at once.
FREE_OPTIONS = ("device", "clip_batch", "frame_batch", "batch_size", "store")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into that takes its place once it is whole and on the disk; before that, what was there stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have a folder's entries on the disk, so that a power cut does not take a new name back."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:  # some network file systems have no such thing
            pass
        finally:
            os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is either whole or not there."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


class RunInUse(ConfigError):
    """Another process holds the run folder."""


@contextmanager
def hold_run(folder: Path) -> Iterator[None]:
    """Keep every other process out of a run folder.

    The folder is made if it is not there, and taken away again if nothing was put into it. The operating system ends
    the hold with the process, however that ends; files that such a process was writing are taken away by the next.

    Raises:
        RunInUse: if another process holds it; the message says which one, and since when.
    """
    from filelock import FileLock, Timeout

    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / ".lock", mode=0o666), folder / ".holder.json"  # 666: for whoever may write there
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunInUse(f"run folder '{folder}' is in use by {_holder(holder)}") from error
    try:
        about = {"host": socket.gethostname(), "process": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        write_atomically(holder, json.dumps(about))
        for half_written in folder.glob("*.tmp"):
            half_written.unlink(missing_ok=True)
        yield
    finally:
        with suppress(OSError):  # the folder itself may have been deleted
            holder.unlink()
            if made and [entry.name for entry in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()
                for place in made:
                    place.rmdir()
        lock.release()


def _holder(path: Path) -> str:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f"process {about['process']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just taken the folder, or lets go of it
        return "another process"


def open_run(config: RunConfig, command: str, **extra: Any) -> Path:
    """Create or reopen the run folder of a configuration and return it.

    Raises:
        ConfigError: as ``check_run`` does.
    """
    check_run(config, command)
    folder, written = config.folder, config.written()
    if "benchmark" in extra and extra["benchmark"]["name"] == config.benchmark:  # which may hold an interpolation
        extra["benchmark"] = {**extra["benchmark"], "name": written["benchmark"]}
    description = {
        "schema": SCHEMA,
        "kind": command,
        "name": config.name,
        "config": _plain(written),
        **extra,
        "versions": versions(),
        "hardware": hardware(),
        "git_commit": git_commit(),
    }
    path = folder / "run.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(description, indent=1))
    else:
        changing = {key: description[key] for key in ("config", "arms", "benchmark") if key in description}
        note_run(folder, **changing)  # with what may change
    return folder


def note_run(folder: Path, **facts: Any) -> None:
    """Add facts to a run's description, in place of those of the same name."""
    before = noted(folder)
    if {**before, **facts} != before:
        write_atomically(folder / "run.json", json.dumps({**before, **facts}, indent=1))


def noted(folder: Path) -> dict[str, Any]:
    """A run's description; empty where there is none."""
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def check_run(config: RunConfig, command: str) -> None:
    """Writes nothing. Commands call it first, so that a folder they cannot use costs no time and leaves no files.

    Raises:
        ConfigError: if the run folder cannot be written, or belongs to a different configuration or command; the
            message names the first difference.
    """
    folder = config.folder
    try:
        there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    except OSError as error:  # a part of it is too long for the file system
        raise ConfigError(f"run folder '{folder}' cannot be made: {error.strerror}; choose another 'output'") from error
    if not there.is_dir() or not os.access(there, os.W_OK):
        problem = "is not writable" if there.is_dir() else "is a file"
        raise ConfigError(f"run folder '{folder}' cannot be made: '{there}' {problem}; choose another 'output'")
    if (folder / "run.json").is_file():
        _check_same(folder / "run.json", command, _plain(config.written()))


def _check_same(path: Path, command: str, config: dict[str, Any]) -> None:
    way_out = "choose another 'name', or delete the folder"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"'{path}' is not JSON ({error}); {way_out}") from error
    if not isinstance(before, dict) or not isinstance(before.get("config"), dict):
        raise ConfigError(f"'{path}' describes no run; {way_out}")
    if before.get("schema") != SCHEMA:
        raise ConfigError(
            f"run folder '{path.parent}' was made by another version of xcomp (schema {before.get('schema')!r}, this "
            f"one has {SCHEMA}); {way_out}"
        )
    if before.get("kind") != command:
        raise ConfigError(f"run folder '{path.parent}' belongs to 'xcomp {before.get('kind')}'; {way_out}")
    old, new = flat(before["config"]), flat(config)
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key) and not _is_free(key, command):
            raise ConfigError(
                f"run folder '{path.parent}' belongs to a different config: {key} was {old.get(key)!r}, "
                f"now {new.get(key)!r}; {way_out}"
            )


def _is_free(key: str, command: str) -> bool:
    if NOTES.match(key):
        return True
    if key == "trainer.precision":  # which answers depend on
        return False
    free = ("output", *FREE_KEYS.get(command, ()))
    if command in ("compare", "evaluate") and key.rpartition(".")[2] in FREE_OPTIONS:
        return True
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in free)


def make_trainer(given: Mapping[str, Any], **defaults: Any) -> Trainer:
    """Lightning's Trainer with ``defaults`` overridden by ``given``, the ``trainer`` of a configuration.

    Raises:
        ConfigError: if Lightning does not know an option, or refuses its value.
    """
    from lightning import Trainer
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    # Not callbacks: they are objects, which a YAML file cannot name.
    known = [name for name in inspect.signature(Trainer).parameters if name != "callbacks"]
    for key in given:
        if key not in known:
            raise ConfigError(f"trainer has no option '{key}';{nearest(str(key), known)} see lightning.Trainer")
    _check_nodes(given.get("num_nodes", 1))
    _end_with_launcher()
    try:
        trainer = Trainer(**{**defaults, **given})
    except (MisconfigurationException, TypeError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    if trainer.precision not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision is '{trainer.precision}'; it must be one of {', '.join(PRECISIONS)}: "
            "what weights are held in is the backbone's dtype"
        )
    return trainer


def _end_with_launcher() -> None:
    """Tie the processes that Lightning starts to the one that starts them.

    Alone they would go on with their share for hours, and write into a run folder that nobody holds any more.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # also where a command is started by one that ran before
    if not is_first and os.environ.get(_LAUNCHER) == str(os.getppid()):
        end_with_parent()
    elif is_first:
        os.environ[_LAUNCHER] = str(os.getpid())  # which those that it starts inherit


def _check_nodes(num_nodes: Any) -> None:
    """ConfigError where several nodes are asked for and none says which this is: Lightning would wait for the others
    without an end."""
    from lightning.fabric.plugins.environments import LSFEnvironment, MPIEnvironment, SLURMEnvironment
    from lightning.fabric.plugins.environments import TorchElasticEnvironment as Torchrun

    if not isinstance(num_nodes, int) or num_nodes < 2 or {"NODE_RANK", "GROUP_RANK"} & os.environ.keys():
        return
    if not any(launcher.detect() for launcher in (Torchrun, SLURMEnvironment, LSFEnvironment, MPIEnvironment)):
        raise ConfigError(
            f"trainer.num_nodes is {num_nodes}, but this process was started by no launcher that says which node it is "
            "on; start it by torchrun, srun (SLURM), jsrun (LSF) or mpirun, or set MASTER_ADDR and NODE_RANK everywhere"
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as ``a.b[0].c`` keys."""
    if isinstance(value, dict):
        return {k: v for key, x in value.items() for k, v in flat(x, f"{prefix}.{key}" if prefix else key).items()}
    if isinstance(value, list):
        return {k: v for i, x in enumerate(value) for k, v in flat(x, f"{prefix}[{i}]").items()}
    return {prefix: value}


def versions() -> dict[str, str]:
    """Versions of Python, xcomp and the libraries that results depend on."""
    found = {"python": platform.python_version(), "xcomp": xcomp.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerators."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git_commit() -> str | None:
    """The checkout's commit, with ``+`` if it has changes; None outside one."""
    root = Path(xcomp.__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    if not (root / ".git").exists():
        return None
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None

"""The command line; every command reads a YAML file or plain arguments.

Nothing heavy is imported before a command needs it. What a user can get wrong ends as one line and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import xcomp
from xcomp.messages import nearest, printable
from xcomp.registry import KINDS, Plugin, PluginError, plugins, problem, unreadable
from xcomp.stopping import Stopped, raise_stopped, signals

if TYPE_CHECKING:
    from pathlib import Path

    from xcomp.answering import Answer
    from xcomp.inflight import VideoInFlight
    from xcomp.model import VideoQA

STDOUT = 1  # its file descriptor


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit status."""
    try:
        try:
            options = _parse(arguments)
            _quiet()
            with signals(signal.SIGTERM, handler=raise_stopped):
                return options.run(options) or 0
        finally:
            print(end="", flush=True)  # not as Python exits, where what goes wrong could not be caught
    except Stopped as stop:
        if stop.line:
            print(f"xcomp: {stop.line}", file=sys.stderr)
        return stop.code
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        print("xcomp: interrupted; the same command resumes", file=sys.stderr)  # Lightning exits by itself
        return 130
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_unread(STDOUT):
            os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # for what is still to be written
            return 128 + signal.SIGPIPE  # what a shell reports of programs that end so
        text = str(error)
        if "Original Traceback" in text:  # of an error in a worker process; its last line is the error itself
            text = text.splitlines()[-1]
        print(f"xcomp: error: {' '.join(text.split())}", file=sys.stderr)
        return 2


def _is_unread(output: int) -> bool:
    """Whether a file descriptor is that of a pipe whose reader has gone, as ``head`` does."""
    poll = select.poll()
    poll.register(output, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; words and overrides may stand behind flags too, which argparse alone does not take."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    where = next((name for name in ("words", "overrides") if hasattr(options, name)), None)
    if rest and (not where or any(r.startswith("-") or (where == "overrides" and "=" not in r) for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        setattr(options, where, [*getattr(options, where), *rest])
    return options


def _quiet() -> None:
    """Hold back what Lightning says about hardware, products and itself; its other warnings are shown."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    of_itself = r"`isinstance\(treespec, LeafSpec\)`", "You have overridden `transfer_batch_to_device`"
    # A resumed run's folder is not empty, and a run is counted in steps, not in batches of an epoch.
    expected = "Checkpoint directory .* exists and is not empty", r"The number of training batches \(\d+\) is smaller"
    for message in (*of_itself, *expected):
        warnings.filterwarnings("ignore", message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xcomp", description=xcomp.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"xcomp {xcomp.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("compare", _compare, "run the arms of a config side by side; table, plots, report"),
        ("tune", _tune, "tune a model with its compressor on; resumes where it stopped"),
        ("evaluate", _evaluate, "one backbone, compressor and selector on a benchmark"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", help="a YAML file, or the name of a built-in config")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. benchmark.num_videos=10")
        if name != "tune":
            text = "ask nothing: print what there is, what it costs and how long it may take"
            command.add_argument("--dry-run", action="store_true", help=text)
        command.set_defaults(run=run)
    cost = commands.add_parser("cost", help="multiply-accumulates and memory of a config's arms, from shapes alone")
    cost.add_argument("config", nargs="?", help="a YAML file, or the name of a built-in config")
    cost.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. frames=512")
    cost.add_argument("--seconds", type=float, default=600.0, help="length of the video (default: %(default)s)")
    cost.add_argument("--question", help="the question that is counted")
    cost.add_argument("--table-e", action="store_true", help="the paper's Table E beside ours")
    cost.set_defaults(run=_cost)
    text = "the tables and report of a run, also while it goes on, or of several together"
    report = commands.add_parser("report", help=text)
    report.add_argument("folders", nargs="+", metavar="RUN", help="a run folder, or several whose arms are merged")
    report.add_argument("--out", metavar="DIR", help="where the report goes; default: the folder of a single run")
    report.add_argument("--reference", metavar="ARM", help="hold the others against this arm; default: the first")
    report.add_argument("--hard", metavar="ARM", help="the arm whose wrong answers make the hard part")
    report.add_argument("--equal", metavar="BUDGET", help="frames, tokens_in, kv_tokens or macs: compare equals in it")
    report.add_argument("--all-pairs", action="store_true", help="every arm against every other")
    text = "compare accuracies although versions of xcomp differ"
    report.add_argument("--allow-versions", action="store_true", help=text)
    report.set_defaults(run=_report)
    ask = commands.add_parser("ask", help="ask a question about a video file, or any number of them")
    ask.add_argument("video")
    text = (
        "the question, in quotes, and overrides of the config (frames=64); without a question, questions are read line "
        "by line, and the video is kept"
    )
    ask.add_argument("words", nargs="*", metavar="[QUESTION] [key=value]", help=text)
    ask.add_argument("--question", help="a question that looks like key=value")
    ask.add_argument("--options", nargs="+", metavar="OPTION", help="answers to choose from")
    for place in ("start", "end"):
        text = f"{place} of the part of the video that is asked about: 65.5 or 1:05.5 (default: the video's)"
        ask.add_argument(f"--{place}", metavar="TIME", help=text)
    ask.add_argument("--config", default="ask", help="a YAML file, or the name of a built-in config (default: ask)")
    ask.add_argument("--set", nargs="+", default=[], metavar="key=value", help="the same as key=value without it")
    text = "a line of JSON a question: answer, frames, tokens and cost"
    ask.add_argument("--json", action="store_true", help=text)
    text = "write nothing to stderr but errors, and that no option fits"
    ask.add_argument("--quiet", "-q", action="store_true", help=text)
    text = "write why these frames: scores over time and thumbnails, as one HTML file"
    ask.add_argument("--explain", metavar="FILE", help=text)
    ask.set_defaults(run=_ask)
    listing = commands.add_parser("plugins", help="list backbones, compressors, selectors and benchmarks; tell of one")
    text = (
        "a kind, to list it alone; a plugin's name, to be told what it does and all its options; folders of your own "
        "plugin files (one that is called like a kind or a plugin: ./compressors)"
    )
    listing.add_argument("words", nargs="*", metavar="[KIND] [NAME] [FOLDER]", help=text)
    listing.add_argument("--check", action="store_true", help="import them all; exit status 1 if any is broken")
    listing.set_defaults(run=_plugins)
    new = commands.add_parser("new", help="write a plugin of your own that works, and its test, to change as you like")
    new.add_argument("kind", metavar="KIND", help=", ".join(KINDS))
    new.add_argument("name", metavar="NAME", help="by which YAML files name it, e.g. every_other")
    new.add_argument("--folder", default="plugins", metavar="DIR", help="folder of your plugins (default: %(default)s)")
    new.set_defaults(run=_new)
    return parser


def _load(options: argparse.Namespace):
    from xcomp.config import load_config

    return load_config(options.config, options.overrides)


def _compare(options: argparse.Namespace) -> int | None:
    config = _load(options)
    if options.dry_run:
        from xcomp.compare.forecast import dry_run

        return int(not dry_run(config))
    from xcomp.compare.runner import compare

    return _whether_all_asked(compare(config))


def _whether_all_asked(folder: Path) -> int:
    """Exit status of a run that came to its end: 1 if some questions could not be asked."""
    from lightning.pytorch.utilities import rank_zero_only

    from xcomp.compare.records import read_run_records
    from xcomp.compare.runner import num_failed

    # The first process tells for all: launchers take another's status for a failure of the launch.
    return int(rank_zero_only.rank == 0 and num_failed(read_run_records(folder)) > 0)


def _cost(options: argparse.Namespace) -> None:
    from xcomp.compare.forecast import QUESTION, print_cost, print_table_e

    if options.table_e:
        print_table_e()
    if options.config is not None:
        if not 0 < options.seconds < float("inf"):
            raise ValueError(f"--seconds is {options.seconds}; it must be above 0")
        print_cost(_load(options), seconds=options.seconds, question=options.question or QUESTION)
    elif not options.table_e:
        raise ValueError("name a config, or give --table-e")


def _report(options: argparse.Namespace) -> None:
    from pathlib import Path

    from xcomp.compare.analysis import Options
    from xcomp.compare.runner import report

    given = Options(options.reference, options.hard, options.equal, options.all_pairs, options.allow_versions)
    report([Path(folder) for folder in options.folders], None if options.out is None else Path(options.out), given)


def _tune(options: argparse.Namespace) -> None:
    config = _load(options)
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from xcomp.tuning import tune

    folder = tune(config)
    if rank_zero_only.rank == 0:
        print(f"tuned model: {folder}")


def _evaluate(options: argparse.Namespace) -> int | None:
    config = _load(options)
    if options.dry_run:
        from xcomp.compare.arms import single
        from xcomp.compare.forecast import dry_run

        return int(not dry_run(single(config), "evaluate"))
    from xcomp.compare.runner import evaluate

    return _whether_all_asked(evaluate(config))


def _ask(options: argparse.Namespace) -> None:
    from xcomp.ask import as_json, check_options, in_words, split_words, toy

    asked, options.overrides = split_words(options.words, options.question)
    options.overrides += options.set
    check_options(options.options)
    config = _load(options)
    span = _span(options, config.sampling.reader)  # before a large model is loaded for nothing
    if options.explain is not None and not os.path.isdir(os.path.dirname(options.explain) or "."):
        raise ValueError(f"--explain {printable(options.explain)}: there is no such folder")
    questions = _questions(asked)
    first = next(questions, None)
    if first is None:
        raise ValueError("no question; put one behind the video, before --options, or give it by --question")
    from xcomp.model import VideoQA
    from xcomp.recorded import resolved_compressor, tell_others

    say = (lambda line: None) if options.quiet else _say
    compressor = resolved_compressor(config.compressor, config.backbone, "the run")
    tell_others([("this question", config.backbone, compressor)], config.plugins)
    model, told = VideoQA.from_config(config).eval(), []
    if name := toy(config):
        say(f"'{name}' is a toy, trained on generated videos: of a real one its answers mean nothing; see --config")
    with model.open(options.video, span) as video:
        for question in chain([first], questions):
            try:
                answer = _answer(model, video, question, options.options, stream=not options.json)
            except ValueError as error:
                if asked is not None:
                    raise
                line = " ".join(str(error).split())
                _say(f"error: {line}")  # the next may do
                if options.json:
                    print(json.dumps({"question": question, "error": line}), flush=True)
                continue
            if options.json:
                line = as_json(question, options.options, span, answer, config, options.config, options.overrides)
                print(json.dumps(line), flush=True)
            if options.options and answer.choice is None:
                _say(f"none of the options: the model wrote '{printable(answer.text)}'")
            for line in [] if options.json else in_words(answer):
                say(line)
            if options.explain is not None:
                from xcomp.compare.explain import of_answer

                told.append(of_answer(options.video, question, config.selector, answer, config.sampling.reader))
    if options.explain is not None:
        from xcomp.compare.explain import write_page

        write_page(options.explain, options.video, told)


def _span(options: argparse.Namespace, reader: str) -> tuple[float, float] | None:
    """The seconds that are asked about, None for all; the video and they are there."""
    from xcomp.sampling import span_frames
    from xcomp.video import Video, VideoError

    start, end = (_seconds(f"--{place}", getattr(options, place)) for place in ("start", "end"))
    with Video(options.video, reader=reader) as video:
        if start is None and end is None:
            return None
        try:
            span_frames(video.num_frames, video.fps, start, end)
        except VideoError as error:
            raise VideoError(f"{printable(options.video)}: {error}") from error
        return start or 0.0, video.num_frames / video.fps if end is None else end


def _seconds(option: str, time: str | None) -> float | None:
    from xcomp.subtitles import seconds

    try:
        return None if time is None else seconds(time)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _say(line: str) -> None:
    print(f"xcomp: {line}", file=sys.stderr, flush=True)


def _questions(given: str | None) -> Iterator[str]:
    """The question given, or those typed in, one a line, up to an empty line or the end."""
    if given is not None:
        yield given
        return
    prompt = "? " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while line := _line(prompt):
        yield line


def _line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def _answer(
    model: VideoQA, video: VideoInFlight, question: str, options: Sequence[str] | None, *, stream: bool
) -> Answer:
    """The answer; with ``stream`` it is printed, word by word where it can be, and of options the one chosen."""
    from transformers import TextStreamer

    if stream and not options and model.answerer.generation.num_beams == 1:
        streamer = TextStreamer(model.backbone.tokenizer, skip_special_tokens=True)
        return model.ask(video, question, streamer=streamer)
    answer = model.ask(video, question, options)
    if stream and not (options and answer.choice is None):
        print(answer.text if answer.choice is None else options[answer.choice], flush=True)
    return answer


def _plugins(options: argparse.Namespace) -> int:
    from xcomp.describe import describe, first_sentence, lines_of, table

    kinds, names, folders = _words(options.words)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if kinds == ["compressor"] and not names and not options.check:
        from xcomp.catalogue import compressor_rows, plain

        print(plain(compressor_rows(folders), width))
        return 0
    found = [p for kind in kinds for p in plugins(kind, folders).values() if not names or p.name in names]
    problems = [problem(plugin, check=options.check) for plugin in found]
    if names and not options.check:
        told = [[*lines_of(describe(p), width), *([f"broken   {e}"] if e else [])] for p, e in zip(found, problems)]
        print("\n\n".join("\n".join(lines) for lines in told))
        return 0
    said = [f"broken: {e}" if e else first_sentence(describe(p).text) for p, e in zip(found, problems)]
    torn = {} if names else unreadable(folders)
    rows = list(zip(found, said))
    rows += [(Plugin("?", file.stem, str(file.parent)), f"broken: {error}") for file, error in torn.items()]
    print("\n".join(table(rows, width)))
    return int(options.check and any([*problems, *torn]))


def _words(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The kinds, plugins' names and folders that are asked for; a kind, ``compressor`` or ``compressors``, is first."""
    named = {word: kind for kind, (folder, *_) in KINDS.items() for word in (kind, folder)}
    kinds = [named[words[0]]] if words and words[0] in named else list(KINDS)
    words = words[1:] if words and words[0] in named else words
    shipped = {name for kind in kinds for name in plugins(kind)}
    folders = [word for word in words if os.path.isdir(word) and word not in shipped]
    known = {name for kind in kinds for name in plugins(kind, folders)}
    names = [word for word in words if word not in folders]
    for name in names:
        if name not in known:
            what = f"{kinds[0]} or folder" if len(kinds) == 1 else "plugin, kind or folder"
            hint = nearest(name, [*known, *named])
            raise PluginError(f"no {what} is called '{name}';{hint} 'xcomp plugins' lists what there is")
    return kinds, names, folders


def _new(options: argparse.Namespace) -> None:
    from xcomp.new import next_steps, write_plugin

    files = write_plugin(options.kind, options.name, options.folder)
    print(next_steps(options.kind, options.name, options.folder, files))


if __name__ == "__main__":
    sys.exit(main())

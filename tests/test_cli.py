"""The command line as a user meets it: real processes, what they print, and one line for every mistake."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import xcomp
from xcomp.ask import split_words, toy
from xcomp.cli import main
from xcomp.config import load_config, parse_config
from xcomp.model import VideoQA
from xcomp.registry import KINDS, plugins
from xcomp.run import open_run

XCOMP = [sys.executable, "-m", "xcomp.cli"]
# Every command is a process of its own, forked from one that has the libraries loaded, and left without taking the
# interpreter down: that saves seconds each.
SERVER = """
import json, os, sys, traceback
import xcomp.compare.runner, xcomp.tuning
from xcomp.cli import main
from xcomp.config import load_config
xcomp.VideoQA.from_config(load_config("run.yaml"))
for line in sys.stdin:
    arguments, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, out), (2, err)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        try:
            status = main(arguments)
        except BaseException:
            status = traceback.print_exc() or 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_checkpoint, needle_videos):
    """A folder to work in: a configuration, files that are no videos, and runs of another configuration."""
    folder = tmp_path_factory.mktemp("place")
    run = {
        "name": "tiny",
        "backbone": {"name": "videochat_flash", "checkpoint": str(tiny_checkpoint)},
        "compressor": {"name": "lp_comp"},
        "benchmark": {"name": "needle", **needle_videos},
        "frames": 4,
        "limit": 3,
        "decoding": {"workers": 0},
        "sampling": {"rate": 2, "min_frames": 8, "max_frames": 8},
        "generation": {"max_new_tokens": 3},
        "tune": {"data": [{"benchmark": {"name": "needle", "split": "train", **needle_videos}}], "steps": 1},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "torn.yaml").write_text("name: [a\n")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video at all\n" * 20)
    (folder / "text.avi").write_text("no video at all\n" * 20)
    for command in ("evaluate", "tune"):
        open_run(parse_config({**run, "output": str(folder / "runs"), "name": f"old-{command}"}, "x"), command)
    return folder


@pytest.fixture(scope="module")
def video(needle_videos):
    return xcomp.load_benchmark("needle", **needle_videos).questions()[0].video


@pytest.fixture(scope="module")
def run_cli(place, tmp_path_factory):
    """Runs one command in ``place`` → (exit status, stdout, stderr)."""
    out, err = (tmp_path_factory.mktemp("streams") / name for name in ("out", "err"))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", SERVER], cwd=place, **pipes) as server:

        def run(*arguments):
            server.stdin.write(json.dumps([list(map(str, arguments)), str(out), str(err)]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline()), out.read_text(), err.read_text()

        yield run
        server.stdin.close()


def listing(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


# --- what it prints ---------------------------------------------------------------------------------------------------


def test_help_names_every_command():
    done = subprocess.run([*XCOMP, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert all(command in done.stdout for command in ("compare", "tune", "evaluate", "ask", "plugins"))


def test_version():
    done = subprocess.run([*XCOMP, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"xcomp {xcomp.__version__}\n")


def test_plugins_lists_all_of_them_without_loading_torch(tmp_path):
    (tmp_path / "mine.py").write_text("from xcomp import Compressor\nclass Mine(Compressor): pass\n")
    script = "import sys; from xcomp.cli import main; s = main(sys.argv[1:]); sys.exit(s or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, "plugins", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    listed = [re.split(" {2,}", line) for line in done.stdout.splitlines()]
    known = [[kind, p.name, p.origin] for kind in KINDS for p in plugins(kind, [tmp_path]).values()]
    assert sorted(row[:3] for row in listed) == sorted(known) and ["compressor", "mine", str(tmp_path)] in listed
    assert all(len(row) == 4 and row[3][-1] == "." for row in listed if row[1] != "mine")  # what it does, in a sentence


@pytest.mark.parametrize("arguments", [["plugins"], ["plugins", "lp_comp"], ["--help"]], ids=" ".join)
def test_a_reader_that_leaves_early_ends_it_quietly(arguments):
    """As ``xcomp plugins | head`` does; the pipe has no reader from the start, so that timing plays no part."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([*XCOMP, *arguments], stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch, capsys):
    def broken(options):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("xcomp.cli._plugins", broken)
    assert main(["plugins"]) == 2 and capsys.readouterr().err == "xcomp: error: [Errno 32] Broken pipe\n"


def test_ask_answers_on_stdout_and_nothing_else(video):
    question, options = "Which symbol appears first?", ["cross", "ring", "arch"]
    command = [*XCOMP, "ask", video, question, "frames=8", "--options", *options, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    answer = VideoQA.from_config(load_config("ask", ["frames=8"])).eval().ask(video, question, options)
    assert answer.choice is not None and done.stdout == f"{options[answer.choice]}\n"


@needs_fork
@pytest.mark.parametrize(
    "words",
    [
        "frames=8 compressor=none QUESTION --config run.yaml",
        "QUESTION --config run.yaml frames=8 compressor=none",
        "--config run.yaml --set frames=8 compressor=none --question QUESTION",
    ],
)
def test_ask_tells_what_the_answer_is_from(run_cli, place, video, words):
    question = "Is x=3 on the screen?"
    answer = VideoQA.from_config(load_config(place / "run.yaml", ["frames=8", "compressor=none"])).eval()
    answer = answer.ask(video, question)
    command = [word.replace("QUESTION", question) for word in words.split()]
    status, out, err = run_cli("ask", video, *command)
    assert status == 0 and out.strip() == answer.text
    frames, tokens, cost = err.splitlines()
    assert frames.startswith(f"xcomp: 8 frames: {answer.frames[0]} ({answer.times[0]:.1f} s), ")
    assert f"…, {answer.frames[-2]} (" in frames and f" has {answer.duration:.1f} s" in frames
    assert tokens.endswith("128 given, 128 into the language model, 128 in its last layer")
    assert f"{sum(answer.share.macs.values()) / 1e9:.3g} GMACs" in cost and "prefill" in cost

    status, out, err = run_cli("ask", video, *command, "--json", "--quiet")
    assert (status, err, out.count("\n")) == (0, "", 1)
    told = json.loads(out)
    for name in ("text", "frames", "times", "duration", "tokens_given", "tokens_in", "tokens_per_layer", "scores"):
        assert told[name] == getattr(answer, name), name
    assert told["macs"] == answer.share.macs and set(told["seconds"]) == set(answer.share.seconds)
    assert told["question"] == question and told["options"] == [] and told["choice"] is told["chosen"] is None
    assert told["config"] == "run.yaml" and told["overrides"] == ["frames=8", "compressor=none"]
    assert (told["model"]["name"], told["compressor"], told["selector"]) == ("videochat_flash", "none", "uniform")
    assert told["tokens_out"] == 128


@needs_fork
def test_ask_about_a_part(run_cli, place, video):
    command = ("ask", video, "What?", "--config", "run.yaml", "--json", "-q")
    status, out, _ = run_cli(*command, "--start", "1", "--end", "3")
    told = json.loads(out)
    assert status == 0 and told["span"] == [1, 3] and all(1 <= time <= 3 for time in told["times"])
    assert json.loads(run_cli(*command, "--start", "0:01", "--end", "0:00:03.0")[1])["frames"] == told["frames"]
    status, out, _ = run_cli(*command, "--start", "2")
    told = json.loads(out)
    assert status == 0 and told["span"] == [2, told["duration"]] and min(told["times"]) >= 2
    assert json.loads(run_cli(*command)[1])["span"] is None


@needs_fork
def test_ask_by_scores(run_cli, video):
    options = ["a thing", "nothing"]
    command = ("ask", video, "What?", "generation.mode=loglikelihood", "-q", "--options", *options)
    status, out, err = run_cli(*command)
    assert (status, err) == (0, "") and out.strip() in options
    told = json.loads(run_cli(*command, "--json")[1])
    assert told["chosen"] == out.strip() and max(told["option_scores"]) == told["option_scores"][told["choice"]]


@needs_fork
def test_ask_says_where_no_option_fits(run_cli, place, video):
    command = ("ask", video, "What?", "--config", "run.yaml", "--quiet", "--options", "a thing", "nothing")
    status, out, err = run_cli(*command)
    model = VideoQA.from_config(load_config(place / "run.yaml")).eval()
    answer = model.ask(video, "What?", ["a thing", "nothing"])
    assert answer.choice is None, "these weights choose nothing"
    assert (status, out) == (0, "") and err.startswith("xcomp: none of the options: the model wrote '")
    status, out, err = run_cli(*command, "--json")
    assert status == 0 and json.loads(out)["choice"] is None and json.loads(out)["text"] == answer.text
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--options", "a", "b", "What?"], "no question; put one behind the video, before --options"),
        (["What?", "--explain", "/no/such/folder/x.html"], "--explain /no/such/folder/x.html: there is no such folder"),
    ],
)
def test_ask_says_what_is_missing_before_a_model_is_loaded(video, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.setattr("xcomp.model.VideoQA.from_config", None)
    assert main(["ask", str(video), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ask_says_that_the_shipped_model_is_a_toy(video, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\n\n"))
    assert main(["ask", video, "frames=8", "--json", "--options", "cross", "ring"]) == 0
    out, err = capsys.readouterr()
    assert "'tiny_lp_comp' is a toy" in err and json.loads(out)["question"] == "What?"
    assert toy(load_config("ask", ["backbone.checkpoint=/a/folder"])) is None
    assert toy(load_config("videochat_flash_2b/evaluate")) is None


def test_the_words_of_ask():
    assert split_words([]) == (None, [])
    assert split_words(["frames=8", "sampling.rate=2", "arms[0].frames=2"])[0] is None
    assert split_words(["What is x=3?", "name=a b"]) == ("What is x=3?", ["name=a b"])
    assert split_words(["x = 3"]) == ("x = 3", [])
    assert split_words(["frames=8"], "frames=9") == ("frames=9", ["frames=8"])


def test_ask_writes_words_as_they_come(video, monkeypatch, capsys):
    """What is on stdout when a token is computed is what was written before it."""
    seen, decode = [], xcomp.Decoder.decode
    monkeypatch.setattr(xcomp.Decoder, "decode", lambda *args: (seen.append(capsys.readouterr().out), decode(*args))[1])
    question = "Where on the screen is the cross?\ntop left, top right, bottom left or bottom right"
    assert main(["ask", video, question]) == 0
    text = "".join([*seen, capsys.readouterr().out])
    answer = VideoQA.from_config(load_config("ask")).eval().ask(video, question).text
    assert text.strip() == answer and text.endswith("\n")
    assert len(answer.split()) > 1 and any(seen)  # a word at a time


@needs_fork
def test_ask_without_options(run_cli, place, video):
    status, out, err = run_cli("ask", video, "What?", "--config", "run.yaml", "-q")
    assert (status, err) == (0, "")
    assert out.strip() == VideoQA.from_config(load_config(place / "run.yaml")).eval().ask(video, "What?").text


@needs_fork
def test_evaluate_prints_a_table_and_resumes(run_cli, place):
    status, out, err = run_cli("evaluate", "run.yaml", "name=evaluated")
    assert (status, err) == (0, "") and "lp_comp + uniform" in out and "3 questions" in out
    records = (place / "runs" / "evaluated" / "records.jsonl").read_text()
    assert run_cli("evaluate", "run.yaml", "name=evaluated")[0] == 0
    assert (place / "runs" / "evaluated" / "records.jsonl").read_text() == records


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown plugin": ("evaluate run.yaml compressor=lp_cmp", "unknown compressor 'lp_cmp'; did you mean 'lp_comp'?"),
    "unknown benchmark": ("evaluate run.yaml benchmark=nedle", "unknown benchmark 'nedle'; did you mean 'needle'?"),
    "mistyped option": (
        "evaluate run.yaml backbone.chekpoint=x",
        "backbone 'videochat_flash' has no option 'chekpoint'; did you mean 'checkpoint'?",
    ),
    "mistyped key": ("evaluate run.yaml bach_size=2", "has no key 'bach_size'; did you mean 'batch_size'?"),
    "mistyped arm key": ("compare run.yaml arms=[{frame:\\ 8}]", "arms[0]' has no key 'frame'; did you mean 'frames'?"),
    "value out of range": ("tune run.yaml tune.steps=0", "tune.steps is 0; it must be at least 1"),
    "option out of range": ("evaluate run.yaml benchmark.fps=0", "fps=0 must be an integer 1..120"),
    "wrong type": ("evaluate run.yaml frames=many", "frames is 'many'; it must be a number of frames"),
    "budget that cuts clips": (
        "evaluate run.yaml frames=6",
        "a budget of 6 frames does not divide into encoder clips of 4",
    ),
    "a later arm's budget": ("compare run.yaml frames=[4,6]", "a budget of 6 frames does not divide"),
    "sampling that cuts clips": (
        "evaluate run.yaml sampling.multiple=2",
        "sampling.multiple is 2; it must be a multiple of 4",
    ),
    "tuning budget": ("tune run.yaml tune.frames=[4,6]", "a budget of 6 frames does not divide"),
    "several budgets to ask": ("ask VIDEO What? --config run.yaml --set frames=[4,8]", "frames is [4, 8]; several"),
    "missing video": ("ask nothing.mp4 What? --config run.yaml", "nothing.mp4: no such file or folder"),
    "text for a video": ("ask text.mp4 What? --config run.yaml", "text.mp4: not a readable video"),
    "text for an AVI": ("ask text.avi What? --config run.yaml", "text.avi: not a readable video"),
    "text, by decord": (
        "ask text.mp4 What? --config run.yaml --set sampling.reader=decord",
        "text.mp4: not a readable video",
    ),
    "empty video": ("ask empty.mp4 What? --config run.yaml", "empty.mp4: not a readable video"),
    "folder without images": ("ask runs What? --config run.yaml", "runs: folder has no frames: no images named"),
    "a part that is none": ("ask VIDEO What? --start 3 --end 2 --config run.yaml", "the span from 3 to 2 s is none"),
    "a part outside": ("ask VIDEO What? --start 300 --end 301 --config run.yaml", "is outside the video, which lasts"),
    "a minute outside": ("ask VIDEO What? --start 1:02:03 --config run.yaml", "the span from 3723 to "),
    "no time": ("ask VIDEO What? --start 1:x --config run.yaml", "--start: '1:x' is no time like 62.5 or 00:01:02.5"),
    "no override": ("ask VIDEO What? frmes=8", "has no key 'frmes'; did you mean 'frames'?"),
    "no question": ("ask VIDEO frmes=8", "a question 'frmes=8': --question 'frmes=8'"),
    "two questions": ("ask VIDEO What is it?", "'is' stands beside the question 'What'; put a question into quotes"),
    "an override for an option": ("ask VIDEO What? --options a b frames=8", "'frames=8' stands among --options"),
    "an option twice": ("ask VIDEO What? --options a b a", "option 'a' is given twice"),
    "one option": ("ask VIDEO What? --options A --config run.yaml", "a question has 1 options; it must have 2..26"),
    "missing config": ("tune rum.yaml", "config 'rum.yaml' does not exist"),
    "config that is no YAML": ("tune torn.yaml", "config 'torn.yaml' cannot be read: while parsing a flow sequence"),
    "video for a config": ("tune empty.mp4/x", "config 'empty.mp4/x' does not exist"),
    "another run's folder": (
        "evaluate run.yaml name=old-evaluate frames=8",
        "belongs to a different config: frames was 4, now 8; choose another 'name', or delete the folder",
    ),
    "another tuning's folder": (
        "tune run.yaml name=old-tune tune.batch_size=2",
        "belongs to a different config: tune.batch_size was 1, now 2; choose another 'name'",
    ),
    "another command's folder": (
        "tune run.yaml name=old-evaluate",
        "belongs to 'xcomp evaluate'; choose another 'name'",
    ),
    "unknown trainer option": (
        "tune run.yaml trainer.max_stps=1",
        "trainer has no option 'max_stps'; did you mean 'max_steps'?",
    ),
    "refused trainer option": ("tune run.yaml trainer.precision=7", "trainer: Precision 7 is invalid"),
    "no logger": ("tune run.yaml trainer.logger=3", "trainer.logger is 3; loggers: csv, tensorboard"),
    "no number of batches": (
        "tune run.yaml trainer.accumulate_grad_batches=x",
        "trainer.accumulate_grad_batches is 'x'; it must be a whole number, at least 1",
    ),
    "unknown logger": ("tune run.yaml trainer.logger=wandbb", "trainer.logger is 'wandbb'; did you mean 'wandb'?"),
    "unknown trainer option, evaluating": ("evaluate run.yaml trainer.acelerator=cpu", "did you mean 'accelerator'?"),
    "refused trainer option, evaluating": (
        "evaluate run.yaml trainer.strategy=none",
        "trainer: You selected an invalid",
    ),
    "callbacks": ("evaluate run.yaml trainer.callbacks=[]", "trainer has no option 'callbacks'"),
    "output below a file": ("evaluate run.yaml output=run.yaml/runs", "cannot be made: 'PLACE/run.yaml' is a file"),
    "output below a file, tuning": ("tune run.yaml output=empty.mp4", "cannot be made: 'PLACE/empty.mp4' is a file"),
    "missing checkpoint": (
        "evaluate run.yaml backbone.checkpoint=/nowhere",
        "checkpoint '/nowhere' is neither a folder",
    ),
    "folder without a checkpoint": ("evaluate run.yaml backbone.checkpoint=runs", "config.json"),
    "missing device": ("evaluate run.yaml backbone.device=cuda:99", "device 'cuda:99' cannot be used here"),
    "missing plugin folder": ("evaluate run.yaml plugins=[none]", "plugin folder 'none' does not exist"),
    "no benchmark": ("evaluate run.yaml benchmark=null", "no benchmark; name one"),
    "no training data": ("tune run.yaml tune.data=[]", "tune.data is empty"),
    "mistyped data key": (
        "tune run.yaml tune.data[0].task=[open]",
        "tune.data[0] has no key 'task'; did you mean 'tasks'?",
    ),
    "missing records": (
        "tune run.yaml tune.data=[{records:\\ none.json}]",
        "'none.json' does not exist",
    ),
    "records that are no JSON": (
        "tune run.yaml tune.data=[{records:\\ text.mp4}]",
        "records file 'text.mp4' is not JSON",
    ),
}


@needs_fork
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(run_cli, place, video, name):
    command, message = MISTAKES[name]
    arguments = shlex.split(command.replace("VIDEO", video))
    before = listing(place)
    status, out, err = run_cli(*arguments)
    assert status == 2 and out == ""
    assert err.startswith("xcomp: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert message.replace("PLACE", str(place)) in err
    assert listing(place) == before


@needs_fork
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_that_is_read_only(run_cli, tmp_path):
    tmp_path.chmod(0o500)
    status, _, err = run_cli("evaluate", "run.yaml", f"output={tmp_path}")
    assert status == 2 and err.count("\n") == 1 and f"'{tmp_path}' is not writable" in err


def test_a_mistake_in_a_process_started_from_nothing(place):
    """The libraries' own imports and the loading of a model write nothing to stderr either."""
    command = [*XCOMP, "evaluate", "run.yaml", "frames=6"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "xcomp: error: a budget of 6 frames does not divide into encoder clips of 4; take 4\n"


@needs_fork
def test_an_interrupted_run_says_that_it_resumes(run_cli, place):
    (place / "stopping.py").write_text(
        "from dataclasses import dataclass\n"
        "from pathlib import Path\n"
        "from xcomp.selector import FrameSelector\n"
        "class Stopping(FrameSelector):\n"
        "    @dataclass\n"
        "    class Config: pass\n"
        "    uses_video, asked = False, 0\n"
        "    def select(self, scores, budget):\n"
        "        self.asked += 1\n"
        "        if self.asked == 4 and not Path('asked').exists():\n"  # two videos decoded ahead, then each is asked
        "            Path('asked').touch()\n"
        "            raise KeyboardInterrupt\n"  # as Ctrl-C does
        "        return list(range(budget))\n"
    )
    command = ("evaluate", "run.yaml", "plugins=[.]", "selector=stopping", "name=stopped", "limit=6")
    status, _, err = run_cli(*command)
    assert (status, err) == (130, "xcomp: interrupted; the same command resumes\n")
    records = place / "runs" / "stopped" / "records.jsonl"
    assert len(records.read_text().splitlines()) == 4  # those of the first video, and then the interruption
    assert run_cli(*command)[0] == 0
    assert len({json.loads(line)["question_id"] for line in records.open()}) == 6

"""Comparisons on a tiny model: a record a question, resumed without gaps or doubles, and broken videos counted."""

import json

import pytest
import yaml
from comparison_runs import ARMS, read, untimed

import xcomp
from xcomp.cli import main
from xcomp.compare import runner
from xcomp.compare.analysis import Run, analyse, read_run
from xcomp.compare.arms import resolve_arms
from xcomp.compare.records import read_run_records
from xcomp.compare.runner import compare, evaluate
from xcomp.config import ConfigError, build_component, parse_config

MIXED = """
from dataclasses import dataclass
import xcomp
from xcomp.benchmark import Benchmark, Question


class Mixed(Benchmark):
    @dataclass
    class Config:
        root: str
        broken: str
        only_broken: bool = False

    def questions(self):
        needle = xcomp.load_benchmark("needle", num_videos=2, seconds=4, root=self.config.root).questions()
        broken = [Question("broken", self.config.broken, "What?", ("red", "blue"), 0)]
        return broken if self.config.only_broken else [*broken, needle[0], needle[5]]
"""


@pytest.fixture
def make(tiny_run):
    def make(**options):
        return parse_config({**tiny_run, "limit": 3, "arms": ARMS, **options}, "x")

    return make


@pytest.fixture
def broken(tmp_path, needle_videos):
    """Options of a run on a benchmark whose first question is on a file that is no video."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mixed.py").write_text(MIXED)
    (tmp_path / "broken.mp4").write_text("no video")
    benchmark = {"name": "mixed", "root": needle_videos["root"], "broken": str(tmp_path / "broken.mp4")}
    return {"plugins": [str(tmp_path / "mine")], "benchmark": benchmark, "limit": None}


# --- records ----------------------------------------------------------------------------------------------------------


def test_every_arm_answers_every_question_once(make, needle_videos, capsys):
    folder = compare(make())
    records = read(folder)
    questions = {q.id: q for q in xcomp.load_benchmark("needle", **needle_videos).questions()[:3]}
    assert [(r["arm"], r["question_id"]) for r in records] == [(a["name"], q) for a in ARMS for q in questions]
    for record in records:
        question = questions[record["question_id"]]
        assert record["video"] == question.video and record["answer"] == question.answer and record["error"] is None
        assert record["correct"] == (record["prediction"] == question.answer)
        assert record["events"] == [list(span) for span in question.events]
        stages = {"decode", "vision", "select", "compress", "prefill", "answer"}
        assert record["macs"].keys() == record["seconds"].keys() == record["seconds_amortised"].keys() == stages
        assert all(record["seconds"][s] >= record["seconds_amortised"][s] >= 0 for s in stages)
        assert all(record["macs"][stage] > 0 for stage in ("vision", "prefill", "answer"))
        assert (record["macs"]["select"] > 0) == (record["seconds"]["select"] > 0) == (record["arm"] == "half")
        assert record["peak_memory"]["host"] > 1e8 and 0 <= record["seconds_harness"] < 5
    first, second = records[0], records[-1]
    assert first["tokens_given"] == 8 * 16 and second["tokens_given"] == 4 * 16
    assert first["num_frames"] == 8 and first["tokens_per_layer"] == [8 * 16] * 2 and first["scores"] is None
    assert second["num_frames"] == 4 and second["tokens_in"] == 4 * 8 and second["tokens_per_layer"] == [4 * 8] * 2
    assert len(second["scores"]) == len(second["candidate_times"]) == 8
    assert {p.name for p in folder.iterdir()} >= {"run.json", "summary.json", "report.html", "accuracy.png"}
    out = capsys.readouterr().out
    assert all(arm["name"] in out for arm in ARMS) and "report.html" in out


def test_the_run_file_describes_the_arms(make):
    run = read_run(compare(make())).about
    assert [arm["name"] for arm in run["arms"]] == ["whole", "half"] and run["kind"] == "compare"
    assert run["arms"][1]["compressor"] == {"name": "avg_pool", "tokens": 8} and run["benchmark"]["num_questions"] == 3
    assert run["config"] == make().to_dict()
    assert {"torch", "python", "xcomp"} <= run["versions"].keys() and run["hardware"]["cores"] >= 1


def test_a_batch_gives_the_records_of_single_questions(make):
    single, batched = (read(compare(make(name=f"by-{size}", batch_size=size))) for size in (1, 2))
    for one, other in zip(single, batched, strict=True):
        assert one["text"] == other["text"] and one["frames"] == other["frames"] and one["macs"] == other["macs"]


def test_evaluate_is_one_arm_and_takes_no_notice_of_others(make):
    folder = evaluate(make())
    records, run = read(folder), read_run(folder).about
    assert {r["arm"] for r in records} == {"lp_comp + uniform"} and len(records) == 3
    assert run["kind"] == "evaluate" and len(run["arms"]) == 1
    with pytest.raises(ConfigError, match="belongs to 'xcomp evaluate'"):
        compare(make())


def test_arms_that_name_the_same_backbone_share_it(make, tiny_checkpoint, monkeypatch):
    other = {"name": "videochat_flash", "checkpoint": str(tiny_checkpoint), "clip_batch": 2}
    config = make(arms=[*ARMS, {"name": "other", "backbone": other}])
    built = []
    monkeypatch.setattr(runner, "build_component", lambda kind, *a: built.append(kind) or build_component(kind, *a))
    compare(config)
    assert built.count("backbone") == 3  # the first group's, the other's once to check it and once to ask
    assert len(read(config.folder)) == 9


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines, more", [(0, 0), (1, 0), (1, 30), (3, 0), (4, 200), (5, 1)])
def test_a_cut_file_is_completed_without_gaps_or_doubles(make, lines, more):
    """``more``: bytes of the next record that were written before the run ended."""
    folder = compare(make())
    whole = (folder / "records.jsonl").read_text()
    kept = "".join(whole.splitlines(keepends=True)[:lines])
    (folder / "records.jsonl").write_text(whole[: len(kept) + more])
    assert compare(make()) == folder
    assert (folder / "records.jsonl").read_text().startswith(kept)  # what was answered is not asked again
    again = read(folder)
    assert [untimed(r) for r in again] == [untimed(json.loads(line)) for line in whole.splitlines()]


def test_a_finished_run_asks_nothing(make, monkeypatch):
    folder = compare(make())
    before = (folder / "records.jsonl").read_bytes()
    monkeypatch.setattr(runner.Answerer, "answer", lambda *_: pytest.fail("a question was asked"))
    (folder / "report.html").unlink()
    compare(make())
    assert (folder / "records.jsonl").read_bytes() == before and (folder / "report.html").is_file()


def test_a_dry_run_refuses_what_the_run_would(make, tiny_run, tmp_path, capsys):
    compare(make(arms=[]))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tiny_run, "limit": 3, "reference": "none"}))
    assert main(["compare", str(tmp_path / "run.yaml"), "reference=null", "frames=2", "--dry-run"]) == 2
    assert "belongs to a different config: frames was 4, now 2" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run.yaml"), "name=other", "--dry-run"]) == 0  # which is about one arm


def test_a_question_that_changed_since_it_was_answered_is_refused(tiny_run, needle_videos, tmp_path):
    file = tmp_path / "mine.jsonl"
    row = {"id": "a", "video": xcomp.load_benchmark("needle", **needle_videos).questions()[0].video}
    row |= {"question": "Which colour?", "options": ["red", "blue"], "answer": "red"}
    file.write_text(json.dumps(row) + "\n")
    benchmark = {"name": "questions", "file": str(file), "videos": str(tmp_path)}
    config = parse_config({**tiny_run, "benchmark": benchmark}, "x")
    before = (compare(config) / "records.jsonl").read_bytes()
    for change in ({"answer": "blue"}, {"question": "Which shape?"}, {"options": ["red", "green"]}):
        file.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(ConfigError, match="question 'a' is not the one that run folder .* has an answer to"):
            compare(config)
    file.write_text(json.dumps(row) + "\n")
    assert (compare(config) / "records.jsonl").read_bytes() == before


def test_a_line_that_is_not_json_is_named(tmp_path):
    line = json.dumps({"arm": "a", "question_id": "q", "video": "v", "correct": True, "error": None})
    for wrong, what in (("nonsense", "is not JSON"), ('{"arm": "b"}', "is no record"), ("[]", "is no record")):
        (tmp_path / "records.jsonl").write_text(f"{line}\n{wrong}\n{line}\n")
        with pytest.raises(ConfigError, match=f"records.jsonl', line 2, {what}"):
            read_run_records(tmp_path)
    assert read_run_records(tmp_path / "nothing") == []


# --- broken videos ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_a_broken_video_is_an_error_record_and_counts_as_wrong(make, broken, capsys, size):
    records = read(compare(make(**broken, batch_size=size)))
    assert len(records) == 6
    for arm in ("whole", "half"):
        first, *rest = [r for r in records if r["arm"] == arm]
        assert first["question_id"] == "broken" and "broken.mp4: not a readable video" in first["error"]
        assert first["correct"] is False and first["prediction"] is None
        assert all(r["error"] is None and "text" in r for r in rest) and len(rest) == 2
    summary = analyse(
        [Run(make().folder, {}, [{**r, "score": float(r["error"] is None)} for r in records])]
    ).summary.arms[0]
    assert (summary.errors, summary.accuracy.correct, summary.accuracy.n) == (1, 2, 3)
    assert "2 questions could not be asked" in capsys.readouterr().out


def test_a_run_on_broken_videos_only_ends_in_a_report_and_an_error(make, broken):
    broken["benchmark"]["only_broken"] = True
    folder = make(**broken).folder
    with pytest.raises(ConfigError, match="no question could be asked; the first: .*broken.mp4: not a readable video"):
        compare(make(**broken))
    assert [r["error"] is None for r in read(folder)] == [False, False] and (folder / "report.html").is_file()


def test_the_runs_other_errors_are_not_taken_for_broken_videos(make, tmp_path):
    """More frames than the model takes is the configuration's fault."""
    wide = {"rate": 8, "min_frames": 8, "max_frames": 512, "multiple": 8, "style": "xcomp"}
    config = make(arms=[{"compressor": "none", "frames": None}], frames=None, sampling={**wide, "min_frames": 512})
    with pytest.raises(ValueError, match="512 frames make a sequence of .* at most"):
        compare(config)


# --- arms -------------------------------------------------------------------------------------------------------------


def test_frame_budgets_make_an_arm_each(make):
    arms = resolve_arms(make(arms=[{"name": "a", "frames": [4, 8]}, {"name": "b"}], frames=4))
    assert [(arm.name, arm.group, arm.frames) for arm in arms] == [
        ("a, 4 frames", "a", 4), ("a, 8 frames", "a", 8), ("b", "b", 4),
    ]  # fmt: skip
    assert [arm.frames for arm in resolve_arms(make(arms=[], frames=[4, 8]))] == [4, 8]


def test_seeds_make_an_arm_each_and_a_group(make):
    draws = {"selector": "random", "frames": 4, "compressor": "none"}
    run = make(arms=[{"name": "drawn", "seed": [0, 1], **draws}, {"name": "own {seed}", "seed": 7, **draws}])
    assert [(arm.name, arm.group, arm.seed) for arm in resolve_arms(run)] == [
        ("drawn, seed 0", "drawn", 0), ("drawn, seed 1", "drawn", 1), ("own 7", "own {seed}", 7),
    ]  # fmt: skip
    folder = compare(run)
    described = read_run(folder).about["arms"]
    assert [(arm["group"], arm["seed"]) for arm in described] == [("drawn", 0), ("drawn", 1), ("own {seed}", 7)]
    frames = [[r["frames"] for r in read(folder) if r["arm"] == arm["name"]] for arm in described]
    assert frames[0] != frames[1] != frames[2]  # each draws its own, though they share a video
    summary = analyse([read_run(folder)]).summary
    assert [(group.name, group.seeds) for group in summary.groups] == [("drawn", [0, 1])]
    alone = compare(make(name="alone", seed=1, arms=[{"name": "one", **draws}]))
    assert [r["frames"] for r in read(alone)] == frames[1]


@pytest.mark.parametrize(
    "arms",
    [
        [{"name": "lp", "seed": [0, 1]}, {"name": "lp", "compressor": "none"}],
        [{"seed": [0, 1], "compressor": {"name": "lp_comp", "end": 2}}, {"seed": [2, 3], "compressor": "lp_comp"}],
    ],
)
def test_seeds_and_other_arms_cannot_have_one_name(make, arms):
    with pytest.raises(ConfigError, match="two arms are called '(lp|lp_comp . uniform)'"):
        resolve_arms(make(arms=arms))


def test_a_run_of_nothing_but_seeds_ends_in_a_report(make):
    folder = compare(make(arms=[{"name": "drawn", "seed": [0, 1], "selector": "random", "frames": 4}]))
    assert ", the mean of 2 seeds (" in json.loads((folder / "summary.json").read_text())["verdict"]


def test_an_answer_that_cannot_be_judged_costs_no_other(tiny_run, needle_videos, tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    rows = [{"id": "open", "question": "How many?", "answer": "3"}]
    rows += [{"id": "choice", "question": "Which?", "options": ["red", "blue"], "answer": "red"}]
    video = xcomp.load_benchmark("needle", **needle_videos).questions()[0].video
    file.write_text("".join(json.dumps({"video": video, **row}) + "\n" for row in rows))
    (tmp_path / "m.py").write_text("def number(text, references):\n    return float(float(text) == 3)\n")
    benchmark = {
        "name": "questions",
        "file": str(file),
        "videos": str(tmp_path),
        "metrics": [f"{tmp_path}/m.py:number"],
    }
    with pytest.raises(ValueError, match="score.. must not fail on an answer; question 'open', answer .*: ValueError"):
        compare(parse_config({**tiny_run, "benchmark": benchmark}, "x"))
    assert [r["question_id"] for r in read(tmp_path / "runs" / "tiny")] == ["choice"]


@pytest.mark.parametrize(
    "arms, message",
    [
        ([{"seed": []}], r"arms\[0\]': seed is an empty list"),
        ([{"seed": [1, 1]}], r"arms\[0\]': seed names 1 twice"),
        ([{"seed": "one"}], r"arms\[0\]': seed is 'one'; it must be a number of 0"),
        ([{"name": "a {seed}"}], r"arms\[0\]: 'a \{seed\}' names \{seed\}, but the arm has no 'seed'"),
        ([{"name": "a"}, {"name": "a", "frames": 8}], "two arms are called 'a'; give each a 'name' of its own"),
        ([{}, {"frames": 8}], r"two arms are called 'lp_comp \+ uniform'"),
        ([{"frames": [4, 4]}], r"two arms are called 'lp_comp \+ uniform, 4 frames'"),
        ([{"compressor": "lp_cmp"}], "unknown compressor 'lp_cmp'; did you mean 'lp_comp'"),
        ([{"selector": {"name": "qc_comp", "windw": 1}}], "selector 'qc_comp' has no option 'windw'"),
        ([{"frames": 0}], r"arms\[0\]': frames is 0"),
        ([{"frames": []}], r"arms\[0\]': frames is an empty list"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(make, arms, message):
    with pytest.raises(ValueError, match=message):
        compare(make(arms=arms))
    assert not make().folder.exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reference": "hole"}, "reference is 'hole', which is no arm; did you mean 'whole'. arms: whole, half"),
        ({"hard": "none"}, "hard is 'none', which is no arm; arms: whole, half"),
        (
            {"equal": "kv_token"},
            "equal is 'kv_token'; did you mean 'kv_tokens'. budgets are equal in frames, ",
        ),
    ],
)
def test_reports_that_cannot_be_made_are_refused_before_anything_runs(make, options, message):
    with pytest.raises(ConfigError, match=message):
        compare(make(**options))
    assert not make().folder.exists()


def test_a_finished_run_is_read_against_another_arm(make, monkeypatch):
    """What reports ask for changes no record, so it may change."""
    folder = compare(make())
    monkeypatch.setattr(runner.Answerer, "answer", lambda *_: pytest.fail("a question was asked"))
    compare(make(reference="half", equal="frames"))
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["reference"], summary["equal_budget"]) == ("half", "frames")
    assert [(d["a"], d["b"]) for d in summary["differences"]] == [("whole", "half")]


def test_what_is_missing_is_asked_for(make):
    with pytest.raises(ConfigError, match="no benchmark; name one, e.g. benchmark: needle"):
        compare(make(benchmark=None))
    with pytest.raises(ConfigError, match=r"arms\[0\]: no backbone; name one for the run or the arm"):
        compare(make(backbone=None))


def test_the_command_compares(make, tiny_run, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps({**tiny_run, "arms": ARMS}))  # JSON is YAML
    assert main(["compare", str(tmp_path / "run.yaml"), "limit=1", "arms[0].name=all"]) == 0
    assert [r["arm"] for r in read(tmp_path / "runs" / "tiny")] == ["all", "half"]
    assert "all" in capsys.readouterr().out

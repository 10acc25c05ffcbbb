"""From records to a summary: what is compared with what, in which budget, and what is refused and why."""

import json
import random

import numpy as np
import pytest
from made_runs import ARMS, analysed, make_record, make_run, write_run

from xcomp.cli import main
from xcomp.compare.analysis import SUMMARY_SCHEMA, Options, Run, analyse, read_run, read_runs, score
from xcomp.compare.records import event_recall, frames_in_events
from xcomp.compare.report import write_report
from xcomp.compare.statistics import accuracy, paired
from xcomp.config import ConfigError

FIRST = "uniform+none@4"


def wide_run(name="wide", chances=(0.4, 0.8), videos=40, questions=3, seed=0, **facts):
    """A run of plain records: arm i answers rightly with chances[i], harder videos less often."""
    rng, arms, records = random.Random(seed), [], []
    tilt = [rng.uniform(-0.2, 0.2) for _ in range(videos)]
    for i, chance in enumerate(chances):
        arms.append({"name": f"arm {i}", "group": f"arm {i}", "selector": "qc_comp", "compressor": "lp_comp"})
        for video in range(videos):
            for q in range(questions):
                right = rng.random() < chance + tilt[video]
                parts = {"selector": "uniform", "compressor": "none", "frames": 4}
                record = make_record(f"arm {i}", video, 0, correct=right, **parts)
                record |= {"question_id": f"v{video}-q{q}", "category": ""}
                records.append(record)
    run = {"schema": 2, "name": name, "arms": arms, "config": {}, "versions": {"xcomp": "1", "torch": "2"}}
    return {**run, "hardware": {"processor": "P", "system": "one"}, "benchmark": {"name": "needle"}, **facts}, records


def run_of(folder, content):
    run, records = content
    return Run(folder, run, [{**record} for record in records])


# --- one run ---------------------------------------------------------------------------------------------------------


def test_summary_json_is_typed_and_complete(tmp_path):
    run, records = make_run()
    write_report([write_run(tmp_path, run, records)])
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["schema"] == SUMMARY_SCHEMA == 3 and summary["reference"] == FIRST
    assert [arm["name"] for arm in summary["arms"]] == [arm["name"] for arm in run["arms"]]
    first = summary["arms"][0]
    assert first["description"]["selector"] == "uniform" and first["frames"] == 4
    assert first["accuracy"]["value"] == 0.4 and first["accuracy"]["num_videos"] == 5
    assert first["seconds"] == {"vision": 0.5, "prefill": 2.5} and first["total_seconds"] == 3
    assert first["seconds_amortised"] == {"vision": 0.125, "prefill": 0.25}
    assert first["macs"] == {"vision": 2e9, "prefill": 4e9} and first["total_macs"] == 6e9
    assert first["peak_memory"] == {"host": 2_000_000_004} and first["harness"] == pytest.approx(0.02)
    assert first["harness_share"] == pytest.approx(0.02 / (0.02 + 0.375))
    assert set(summary["metrics"]) <= set(first)
    assert [d["a"] for d in summary["differences"]] == [arm["name"] for arm in run["arms"][1:]]
    last = summary["differences"][-1]
    assert (last["b"], last["difference"], last["wins"], last["losses"]) == (FIRST, 0.4, 4, 0)
    assert last["mcnemar"] == pytest.approx(0.125) and last["mcnemar_holm"] == pytest.approx(5 * 0.125)
    assert summary["runs"][0]["git_commit"] == "abc1234" and summary["runs"][0]["config"]["seed"] == 3


def test_numbers_equal_a_loop_over_records():
    run, records = make_run()
    summary = analysed(run, records).summary
    for arm in summary.arms:
        own = [r for r in records if r["arm"] == arm.name]
        assert arm.accuracy == accuracy([score(r) for r in own], [r["video"] for r in own])
        assert arm.tokens_per_layer == [np.mean([r["tokens_per_layer"][i] for r in own]) for i in range(3)]
        assert arm.kv_tokens == pytest.approx(np.mean([np.mean(r["tokens_per_layer"]) for r in own]))
    for d in summary.differences:
        a, b = ([score(r) for r in records if r["arm"] == name] for name in (d.a, d.b))
        expected = paired(a, b, [r["video"] for r in records if r["arm"] == d.b])
        assert {k: getattr(d, k) for k in vars(expected)} == vars(expected)


def test_tokens_given_by_the_vision_path_and_entering_the_model_are_told_apart():
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    arm = analysed(run, records).summary.arms[0]
    assert (arm.tokens_given, arm.tokens_in, arm.tokens_out) == (64, 16, 16)
    for record in records:  # as earlier versions wrote them
        del record["tokens_given"]
        record["kept"] = {"input": 0.25, "final": 0.25, "layers": 0.25}
    assert analysed(run, records).summary.arms[0].tokens_given == 64


@pytest.mark.parametrize(
    "times, events, frames, recall",
    [
        ([1.0, 2.0, 4.0, 4.5], [[2.0, 3.0], [4.0, 5.0], [8.0, 9.0]], 3, 2 / 3),
        ([2.5], [[2.0, 3.0], [1.0, 2.5]], 1, 1.0),  # one frame in both
        ([0.0], [[2.0, 3.0]], 0, 0.0),
        ([], [[2.0, 3.0]], 0, 0.0),
        ([2.5], [], None, None),
    ],
)
def test_frames_in_events_and_events_with_a_frame(times, events, frames, recall):
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    for record in records:
        record |= {"times": times, "events": events}
    assert (frames_in_events(records[0]), event_recall(records[0])) == (frames, recall)
    assert analysed(run, records).summary.arms[0].event_recall == pytest.approx(recall)


def test_errors_score_nothing_and_stay_out_of_costs():
    run, records = make_run(budgets=(4,), methods=ARMS[2:])
    for record in records[:2]:  # claim to be right: an error never is
        record |= {"error": "cannot decode", "prediction": None, "seconds": None, "macs": None, "num_frames": 0}
    records[2]["prediction"] = None
    arm = analysed(run, records).summary.arms[0]
    assert (arm.errors, arm.unanswered, arm.accuracy.correct, arm.accuracy.n) == (2, 1, 2, 10)
    assert (arm.accuracy_asked.n, arm.frames, arm.total_macs) == (8, 4, 6e9)
    assert analysed(run, records).summary.remarks == [
        "Questions that failed to run (counted as wrong): qc_comp+lp_comp@4: 2.",
        "Answers that named no option (counted as wrong): qc_comp+lp_comp@4: 1.",
    ]


def test_open_questions_count_their_scores():
    run, records = make_run(budgets=(4,), methods=ARMS[:2])
    for i, record in enumerate(records):
        record |= {"options": [], "answer": None, "references": ["red"], "prediction": None, "score": (i % 7) / 6}
        record["metrics"], record["correct"] = {"f1": record["score"]}, record["score"] >= 1
    summary = analysed(run, records).summary
    assert summary.arms[0].accuracy.value == pytest.approx(np.mean([(i % 7) / 6 for i in range(10)]))
    assert summary.arms[0].unanswered == 0 and summary.differences[0].mcnemar is None
    assert summary.arms[0].official == {"f1": pytest.approx(100 * summary.arms[0].accuracy.value)}


def test_labels_by_axis_with_several_labels_a_question():
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    for i, record in enumerate(records):
        record["labels"] = {"task": ["count", "order"] if i % 2 else ["count"], "length": ["short"]}
    summary = analysed(run, records).summary
    assert summary.axes == ["task", "length"]
    assert {k: v.n for k, v in summary.arms[0].labels["task"].items()} == {"count": 10, "order": 5}


def test_what_a_run_lacks_is_said():
    run, records = make_run(budgets=(4,))
    facts = {"missing": ["/videos/a.mp4", "/videos/b.mp4"], "defects": {"no right option": 3, "none": 0}}
    run["benchmark"] = {"name": "no_such_benchmark", "num_questions": 12, "num_videos": 7, **facts}
    summary = analysed(run, records).summary
    assert summary.cautions[0] == "2 of 9 videos are missing, their questions not asked: a.mp4, b.mp4."
    assert summary.cautions[1] == "Defects of the benchmark's questions: no right option 3."
    assert "official metrics of benchmark 'no_such_benchmark' are left out" in summary.remarks[0]
    assert summary.remarks[1].startswith("Not all 12 questions are answered yet (uniform+none@4: 10, ")
    assert all(arm.official is None for arm in summary.arms)


def test_arms_of_a_run_that_goes_on_are_compared_when_they_have_the_same_questions():
    run, records = make_run(budgets=(4,))
    run["benchmark"] |= {"num_questions": 10}
    summary = analysed(run, records[:-3]).summary
    assert [d.a for d in summary.differences] == ["uniform+lp_comp@4"]
    assert [(r.a, r.reason) for r in summary.refused] == [
        ("qc_comp+lp_comp@4", "not all of their questions are answered yet")
    ]


def test_a_question_answered_twice_is_refused():
    run, records = make_run(budgets=(4,))
    with pytest.raises(ConfigError, match=r"arm 'uniform\+none@4' answers question 'v0-q0' twice"):
        analysed(run, [*records, records[0]])


# --- reference and pairs ---------------------------------------------------------------------------------------------


def test_the_reference_is_named_in_the_configuration_or_the_command():
    run, records = make_run()
    run["config"]["reference"] = "qc_comp+lp_comp@4"
    assert analysed(run, records).summary.reference == "qc_comp+lp_comp@4"
    chosen = analysed(run, records, Options(reference="uniform+lp_comp@8")).summary
    assert {d.b for d in chosen.differences} == {"uniform+lp_comp@8"} and len(chosen.differences) == 5
    with pytest.raises(ConfigError, match="reference is 'uniform', which is no arm; did you mean 'uniform.none@8'"):
        analysed(run, records, Options(reference="uniform"))


def test_all_pairs_are_adjusted_together():
    run, records = make_run(budgets=(4,))
    every = analysed(run, records, Options(all_pairs=True)).summary
    none, lp_comp, qc_comp = (arm["name"] for arm in run["arms"])
    assert [(d.a, d.b) for d in every.differences] == [(lp_comp, none), (qc_comp, none), (qc_comp, lp_comp)]
    assert max(d.mcnemar_holm for d in every.differences) == 1
    assert every.differences[1].mcnemar_holm == pytest.approx(3 * 0.125)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda r: r.pop(), "different questions: 1 that 'b' was not asked, 'v4-q1' for one"),
        (
            lambda r: r[0].update(question_id="own"),
            "different questions: 1 that 'a' was not asked and 1 that 'b' was not asked, 'own' for one",
        ),
        (
            lambda r: [x.update(question_id=x["question_id"] + "x") for x in r],
            "they have no question in common (by 'id')",
        ),
        (lambda r: r[3].update(answer=0), "different right answers of 1 questions, 'v1-q1' for one"),
        (lambda r: [x.update(prompt_sha="0") for x in r], "different prompts of 10 questions, 'v0-q0' for one"),
        (lambda r: [x.update(video="other.mp4") for x in r], "different videos of 10 questions, 'v0-q0' for one"),
        (lambda r: [x.update(span=[5, 8]) for x in r], "different spans of 10 questions, 'v0-q0' for one"),
    ],
)
def test_arms_that_were_asked_something_else_are_refused_by_name(change, reason):
    run, records = make_run(budgets=(4,), methods=ARMS[:2])
    for arm, name in zip(run["arms"], "ab", strict=True):
        for record in records:
            record["arm"] = name if record["arm"] == arm["name"] else record["arm"]
        arm["name"] = name
    theirs = [r for r in records if r["arm"] == "b"]
    change(theirs)
    summary = analysed(run, [*(r for r in records if r["arm"] == "a"), *theirs]).summary
    assert summary.differences == [] and [(r.a, r.b, r.reason) for r in summary.refused] == [("b", "a", reason)]
    assert summary.verdict == f"No arm can be compared with a: {reason}."


def test_the_verdict_says_what_beats_the_reference_and_at_what_price():
    run, records = wide_run(chances=(0.4, 0.75, 0.42, 0.05))
    for record in records:
        record["macs"] = {"prefill": 460 if record["arm"] == "arm 1" else 1000}
    summary = analysed(run, records).summary
    best = summary.differences[0]
    points = f"{100 * best.difference:.1f} points ({100 * best.low:.1f}–{100 * best.high:.1f})"
    assert summary.verdict.startswith(f"arm 1 beats arm 0 by {points} at 0.46 of its MACs; arm 0 beats arm 3 by ")
    assert "; arm 2 cannot be told apart from arm 0 (a difference below " in summary.verdict
    assert [d.told_apart for d in summary.differences] == [True, False, True]
    alone = analysed(*wide_run(chances=(0.5,))).summary
    assert alone.verdict.startswith("arm 0 scores ") and "on 120 questions about 40 videos." in alone.verdict


# --- budgets, the hard part ------------------------------------------------------------------------------------------


def test_arms_of_equal_budgets_are_found():
    summary = analysed(*make_run()).summary
    by_kind = {kind: [g.arms for g in summary.equal if g.kind == kind] for kind in ("frames", "kv_tokens", "macs")}
    four = ["uniform+none@4", "uniform+lp_comp@4", "qc_comp+lp_comp@4"]
    assert by_kind["frames"][0] == by_kind["macs"][0] == four and by_kind["kv_tokens"][0] == four[1:]
    assert summary.arm(FIRST).equal["tokens_in"] == four[1:] and "kv_tokens" not in summary.arm(FIRST).equal
    assert summary.differences[1].equal == ("frames", "tokens_in", "macs")


def test_the_verdict_keeps_to_a_named_budget():
    run, records = make_run()
    run["config"]["equal"] = "macs"
    summary = analysed(run, records).summary
    assert summary.equal_budget == "macs"
    assert summary.verdict.endswith("and qc_comp+lp_comp@8 have another budget of MACs.")
    with pytest.raises(ConfigError, match="equal is 'mac'; did you mean 'macs'"):
        analysed(run, records, Options(equal="mac"))


def test_the_hard_part_is_what_plain_down_sampling_gets_wrong():
    run, records = make_run()
    summary = analysed(run, records).summary
    assert (summary.hard.arm, summary.hard.n, summary.hard.found) == (FIRST, 6, "by its description")
    assert summary.arm(FIRST).hard is None and summary.arm("qc_comp+lp_comp@4").hard.value == pytest.approx(4 / 6)
    named = analysed(run, records, Options(hard="uniform+lp_comp@4")).summary
    assert (named.hard.n, named.hard.found) == (4, "named") and named.arm(FIRST).hard.value == 0
    run, records = make_run(methods=ARMS[1:])
    assert analysed(run, records).summary.hard is None


def test_fronts_hold_what_no_other_arm_beats():
    fronts = {front.cost: front.arms for front in analysed(*make_run()).summary.pareto}
    assert fronts["macs"] == ["qc_comp+lp_comp@4"] and fronts["kv_tokens"] == ["qc_comp+lp_comp@4"]
    assert set(fronts) == {"frames", "tokens_in", "kv_tokens", "macs", "seconds"}


# --- seeds -----------------------------------------------------------------------------------------------------------


def seeded(seeds=(0, 1, 2), gains=(0.0, 0.25)):
    run, records, arms = wide_run(chances=())[0], [], []
    for i, gain in enumerate(gains):
        for seed in seeds if i == 0 else seeds[-2:] if len(seeds) > 2 else seeds:
            _, own = wide_run(chances=(0.5 + gain,), seed=10 * i + seed)
            name = f"method {i}, seed {seed}"
            arms.append({"name": name, "group": f"method {i}", "seed": seed, "frames": 4})
            records += [{**record, "arm": name} for record in own]
    return {**run, "arms": arms}, records


def test_arms_of_several_seeds_are_one():
    run, records = seeded()
    summary = analysed(run, records).summary
    first, second = summary.groups
    assert (first.name, first.seeds, second.seeds) == ("method 0", [0, 1, 2], [1, 2])
    means = [summary.arm(name).accuracy.value for name in first.arms]
    assert first.accuracy.value == pytest.approx(np.mean(means))
    assert first.deviation == pytest.approx(np.std(means, ddof=1))
    (difference,) = summary.group_differences
    assert (difference.a, difference.b, difference.num_seeds) == ("method 1", "method 0", 2)
    scores = {arm: [score(r) for r in records if r["arm"] == arm] for arm in first.arms + second.arms}
    gains = [np.mean(scores[f"method 1, seed {s}"]) - np.mean(scores[f"method 0, seed {s}"]) for s in (1, 2)]
    assert difference.difference == pytest.approx(np.mean(gains)) and difference.mcnemar is None
    assert "method 1" in summary.verdict and "seed" not in summary.verdict
    assert analysed(run, records, Options(reference="method 1")).summary.group_differences[0].b == "method 1"


def test_a_seed_alone_or_twice_is_no_group():
    run, records = seeded(seeds=(0,))
    assert analysed(run, records).summary.groups == []
    run, records = seeded(seeds=(0, 1), gains=(0.0,))
    run["arms"][1]["seed"] = 0
    summary = analysed(run, records).summary
    assert summary.groups == []
    assert "The seeds of method 0 are not taken together: a seed is there twice." in summary.remarks


# --- several runs ----------------------------------------------------------------------------------------------------


def test_runs_are_merged_and_arms_that_clash_get_the_runs_name(tmp_path):
    one, other = wide_run("monday"), wide_run("tuesday", chances=(0.4,), seed=3)
    analysis = analyse([run_of(tmp_path / "a", one), run_of(tmp_path / "b", other)])
    summary = analysis.summary
    assert [arm.name for arm in summary.arms] == ["arm 0 (monday)", "arm 1", "arm 0 (tuesday)"]
    assert [(arm.run, arm.name_in_run) for arm in summary.arms][2] == ("tuesday", "arm 0")
    assert len(summary.differences) == 2 and not summary.refused and summary.seconds_comparable
    assert {r["arm"] for r in analysis.records} == {arm.name for arm in summary.arms}
    twins = analyse([run_of(tmp_path / "a", one), run_of(tmp_path / "b", wide_run("monday"))]).summary
    assert [run.name for run in twins.runs] == [f"monday in {tmp_path / 'a'}", f"monday in {tmp_path / 'b'}"]


def test_accuracies_of_other_versions_are_compared_only_if_asked_for(tmp_path):
    runs = [run_of(tmp_path / "a", wide_run("a")),
            run_of(tmp_path / "b", wide_run("b", chances=(0.5,), versions={"xcomp": "2", "torch": "3"}))]  # fmt: skip
    refused = analyse(runs).summary
    assert [(r.a, r.reason) for r in refused.refused] == [
        ("arm 0 (b)", "made by xcomp 2 and 1; --allow-versions compares them all the same")
    ]
    allowed = analyse(runs, Options(allow_versions=True)).summary
    assert not allowed.refused and len(allowed.differences) == 2
    assert "Runs differ in the version of torch: 2, 3." in allowed.remarks


def test_seconds_of_other_hardware_are_never_put_side_by_side(tmp_path):
    same = wide_run("a"), wide_run("b", hardware={"processor": "P", "system": "another kernel"})
    other = wide_run("a"), wide_run("b", chances=(0.5,), hardware={"processor": "Q", "system": "one"})
    assert analyse([run_of(tmp_path / "x", r) for r in same]).summary.seconds_comparable
    summary = analyse([run_of(tmp_path / "x", r) for r in other]).summary
    assert not summary.seconds_comparable
    assert [front.run for front in summary.pareto if front.cost == "seconds"] == ["a", "b"]


def test_the_command_merges_runs(tmp_path, capsys):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, chances in zip(folders, ((0.4, 0.5), (0.8,))):
        folder.mkdir()
        write_run(folder, *wide_run(folder.name, chances=chances))
    names = [str(folder) for folder in folders]
    assert main(["report", *names]) == 2
    assert "a report of several runs needs a folder of its own: name one with --out" in capsys.readouterr().err
    assert main(["report", names[0], names[0], "--out", str(tmp_path / "out")]) == 2
    assert "one is given twice" in capsys.readouterr().err
    assert main(["report", *names, "--out", str(tmp_path / "out"), "--reference", "arm 0 (one)", "--all-pairs"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [run["name"] for run in summary["runs"]] == ["one", "two"] and len(summary["differences"]) == 3
    assert (tmp_path / "out" / "report.html").is_file() and not (folders[0] / "report.html").exists()
    assert "arm 0 (two) beats arm 0 (one) by" in " ".join(capsys.readouterr().out.split())


def test_read_runs(tmp_path):
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    records[0]["text"] = "one\u2028two\x85three"
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    write_run(tmp_path, run, [])
    (tmp_path / "records.jsonl").write_text(lines + "\n", encoding="utf-8")
    assert read_run(tmp_path).records == records and len(read_runs([tmp_path])) == 1
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="run.json is not JSON"):
        read_run(tmp_path)


def test_a_toy_and_a_mix_of_questions_are_said():
    run, records = make_run(budgets=(4,))
    for number, record in enumerate(records):
        record |= {"options": ["a", "b"]} if number % 2 else {"options": [], "metrics": {"f1": 0.5}, "score": 0.5}
    run["arms"][0]["checkpoint"] = "tiny"
    run["benchmark"] |= {"name": "questions"}
    summary = analysed(run, records).summary
    assert any(line.startswith("'tiny': trained on generated videos alone") for line in summary.cautions)
    assert "Accuracy is the mean score of 5 choices and 5 open questions (of these by f1)." in summary.remarks
    run["benchmark"] |= {"name": "needle"}
    assert not any("tiny" in line for line in analysed(run, records).summary.cautions)

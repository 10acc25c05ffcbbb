"""The report of made-up runs: what is in the files, and that odd runs are reported or refused, never garbled."""

import io
import json
import math
import re

import pytest
from rich.console import Console

from xcomp.compare import plots
from xcomp.compare.plots import Legend
from xcomp.compare.report import analyse, markdown_table, read_run, table, write_report

ARMS = [("uniform", "none"), ("uniform", "lp_comp"), ("qc_comp", "lp_comp")]
PLOTS = {"accuracy.png", "tokens_per_layer.png", "selected_frames.png"}


def make_record(arm, video, question, *, selector, compressor, frames, correct):
    tokens = [4 * frames, 4 * frames, (1 if compressor == "lp_comp" else 4) * frames]
    candidates = [i / 2 for i in range(40)]
    times = candidates[:: 40 // frames] if selector == "uniform" else candidates[10 : 10 + frames]
    return {
        "arm": arm,
        "question_id": f"v{video}-q{question}",
        "video": f"/videos/{video}.mp4",
        "category": ["order", "needle"][question],
        "answer": 1,
        "prediction": 1 if correct else 0,
        "correct": correct,
        "text": "(B)",
        "frames": [int(2 * t) for t in times],
        "times": times,
        "events": [[5.0, 7.0]],
        "duration": 20.0,
        "num_frames": frames,
        "tokens_in": tokens[0],
        "tokens_out": tokens[-1],
        "tokens_per_layer": tokens,
        "macs": {"vision": 500_000_000 * frames, "prefill": 1_000_000_000 * frames},
        "seconds": {"vision": 0.5, "prefill": 0.5 + video},
        "seconds_amortised": {"vision": 0.125, "prefill": 0.25},
        "seconds_waiting": 0.0,
        "peak_memory": {"host": 2_000_000_000 + video},
        "scores": [math.exp(-((t - 6) ** 2)) for t in candidates] if selector == "qc_comp" else None,
        "candidate_times": candidates if selector == "qc_comp" else None,
        "error": None,
    }


def make_run(budgets=(4, 8), methods=ARMS, videos=5):
    """run.json's content, and records in which method m gets the first 2 + m of 5 videos right."""
    arms, records = [], []
    for m, (selector, compressor) in enumerate(methods):
        for frames in budgets:
            name = f"{selector}+{compressor}@{frames}"
            parts = {"selector": selector, "compressor": compressor, "frames": frames}
            group = f"{selector} and {compressor}"
            arms.append({"name": name, "group": group, "backbone": "tiny", "checkpoint": None, **parts})
            records += [
                make_record(name, video, question, correct=video < 2 + m, **parts)
                for video in range(videos)
                for question in range(2)
            ]
    run = {
        "schema": 2,
        "name": "toy",
        "config": {"seed": 3, "arms": arms},
        "versions": {"torch": "2.9.9"},
        "hardware": {"name": "A Very Fast Machine", "dtype": "float32"},
        "git_commit": "abc1234",
        "arms": arms,
        "benchmark": {"name": "needle", "seed": 0},
    }
    return run, records


def write_run(folder, run, records):
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def written(folder):
    return {path.name for path in folder.iterdir()} - {"run.json", "records.jsonl"}


def test_report_has_all_files_and_numbers(tmp_path):
    page = write_report(write_run(tmp_path, *make_run()))
    assert page == tmp_path / "report.html"
    assert written(tmp_path) == PLOTS | {"results.json", "report.html"}
    for name in PLOTS:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    for expected in ("A Very Fast Machine", "torch 2.9.9", "abc1234", "6 arms compared on 10 questions about 5 videos",
                     "32 → 8", "40.0 <small>(", "60.0 <small>(", "+40.0 <small>(", "xcomp compare toy.yaml",
                     "seed: 3"):  # fmt: skip
        assert expected in text
    assert text.count("data:image/png;base64,") == 3


def test_page_loads_nothing_from_outside(tmp_path):
    text = write_report(write_run(tmp_path, *make_run())).read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"<(script|link|iframe)|url\(|@import|href=", text)
    assert re.findall(r'src="(.{10})', text) == ["data:image"] * 3


def test_page_escapes_everything(tmp_path):
    run, records = make_run(budgets=(4,))
    bad = "<script>alert('$x$')</script>"
    for index, (arm, name) in enumerate((arm, arm["name"]) for arm in run["arms"]):
        arm["name"] = f"{bad}{index}"
        arm["selector"] = f"{bad}{arm['selector']}"
        for record in records:
            record["arm"] = arm["name"] if record["arm"] == name else record["arm"]
    for record in records:
        record |= {"category": f"{bad}{record['category']}", "question_id": f"{bad}{record['question_id']}"}
    records[0]["error"] = bad
    run |= {"name": bad, "git_commit": bad, "hardware": {bad: bad}, "benchmark": [bad], "versions": {"x": bad}}
    run["config"] = {"note": bad}
    text = write_report(write_run(tmp_path, run, records)).read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 20


def test_results_are_typed_and_complete(tmp_path):
    run, records = make_run()
    write_report(write_run(tmp_path, run, records))
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["schema"] == 2
    assert [arm["name"] for arm in results["arms"]] == [arm["name"] for arm in run["arms"]]
    first = results["arms"][0]
    assert first["selector"] == "uniform"
    assert first["summary"]["accuracy"]["value"] == 0.4
    assert first["summary"]["seconds"] == {"vision": 0.5, "prefill": 2.5}
    assert first["summary"]["seconds_amortised"] == {"vision": 0.125, "prefill": 0.25}
    assert first["summary"]["macs"] == {"vision": 2e9, "prefill": 4e9} and first["summary"]["num_frames"] == 4
    assert first["summary"]["peak_memory"] == {"host": 2_000_000_004}
    assert results["metrics"]["accuracy"]["direction"] == "higher"
    assert set(results["metrics"]) <= set(first["summary"])
    assert [pair["a"] for pair in results["paired"]] == [arm["name"] for arm in run["arms"][1:]]
    last = results["paired"][-1]
    assert (last["b"], last["difference"], last["a_only"], last["b_only"]) == ("uniform+none@4", 0.4, 4, 0)
    assert last["p_holm"] >= last["p"] == pytest.approx(0.125)


def test_report_is_the_same_twice_and_follows_the_order_of_arms(tmp_path):
    run, records = make_run()
    first = write_report(write_run(tmp_path, run, records)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    results = analyse(run, records[::-1])
    assert [summary.arm for summary in results.summaries] == [arm["name"] for arm in run["arms"]]


def test_one_arm_one_budget_no_scores_no_events(tmp_path):
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    for record in records:
        record |= {"events": [], "category": "", "scores": None}
    text = write_report(write_run(tmp_path, run, records)).read_text(encoding="utf-8")
    assert written(tmp_path) == PLOTS | {"results.json", "report.html"}
    assert "Differences" not in text
    assert "by category" not in text


def test_errors_are_wrong_answers_and_counted(tmp_path):
    run, records = make_run(budgets=(4,))
    for record in records[:3]:
        record |= {"error": "OSError: no such video", "prediction": None, "times": None, "tokens_per_layer": None,
                   "macs": None, "seconds": None, "num_frames": None}  # fmt: skip
    text = write_report(write_run(tmp_path, run, records)).read_text(encoding="utf-8")
    assert "counted as wrong, but for those asked): uniform+none@4: 3." in text
    assert "OSError: no such video" in text
    summary = analyse(run, records).summaries[0]
    assert (summary.errors, summary.accuracy.correct) == (3, 1)


def test_nothing_but_errors_still_reports_and_drops_old_pictures(tmp_path):
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    write_report(write_run(tmp_path, run, records))
    failed = {"error": "no memory", "times": None, "tokens_per_layer": None, "macs": None, "seconds": None}
    write_run(tmp_path, run, [record | failed for record in records])
    write_report(tmp_path)
    assert written(tmp_path) == {"accuracy.png", "results.json", "report.html"}
    assert json.loads((tmp_path / "results.json").read_text())["arms"][0]["summary"]["macs"] == {}


def test_arms_without_common_questions_are_named(tmp_path):
    run, records = make_run(budgets=(4,))
    for record in records[-10:]:
        record["question_id"] += "-other"
    results = analyse(run, records)
    assert results.unpaired == ["qc_comp+lp_comp@4"]
    text = write_report(write_run(tmp_path, run, records)).read_text(encoding="utf-8")
    assert "No question in common with uniform+none@4: qc_comp+lp_comp@4." in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "run.json").unlink(), "run.json is missing"),
        (lambda folder: (folder / "records.jsonl").unlink(), "has no records"),
        (lambda folder: (folder / "records.jsonl").write_text("\n"), "has no records"),
        (lambda folder: (folder / "records.jsonl").write_text('{}\n{"arm": "a'), "line 1, is no record"),
        (lambda folder: (folder / "records.jsonl").write_text('{"arm": "a\n'), "line 1, is not JSON"),
        (lambda folder: (folder / "run.json").write_text('{"schema": 9}'), "has schema 9; this version reads 2"),
    ],
)
def test_damaged_runs_are_refused_in_one_line(tmp_path, change, message):
    change(write_run(tmp_path, *make_run(budgets=(4,))))
    with pytest.raises(ValueError, match=message) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not written(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    write_report(write_run(tmp_path, *make_run(budgets=(4,))))
    before = (tmp_path / "accuracy.png").read_bytes()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path)
    assert (tmp_path / "accuracy.png").read_bytes() == before
    assert written(tmp_path) == PLOTS | {"results.json", "report.html"}


def test_tables_for_terminal_and_markdown():
    run, records = make_run()
    records[0]["error"] = "failed"
    records[1]["prediction"] = None
    summaries = analyse(run, records).summaries
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(summaries))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    lines = markdown_table(summaries).splitlines()
    assert lines[0].startswith("| arm | frames | accuracy %")
    assert lines[1] == "| :-- | --: | --: | --: | --: | --: | --: |"
    assert lines[2].split(" | ")[3] == "33.3" and " | 40.0 (" not in lines[2]  # 3 of 10, one of which failed
    assert lines[4].startswith("| uniform+lp_comp@4 | 4 | 60.0 (")
    assert lines[4].endswith(" | 16 → 4 | 6.00 | 3.00 (0.375) |")
    for text in ("GMACs", "16 → 4", "60.0 (", "12.0", "uniform+none@4"):
        assert text in shown
        assert text in "\n".join(lines)
    assert "failed to run (counted as wrong, but for those asked): uniform+none@4: 1." in lines[-1]
    assert "named no option (counted as wrong): uniform+none@4: 1." in lines[-1]


def test_markup_in_a_name_is_shown_as_it_is():
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    for record in records:
        record["arm"] = "[red]a|b[/red]"
    summaries = analyse(run | {"arms": []}, records).summaries
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(summaries))
    assert "[red]a|b[/red]" in console.export_text()
    assert r"| [red]a\|b[/red] |" in markdown_table(summaries)


def test_read_run_keeps_line_separators_inside_strings(tmp_path):
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    records[0]["text"] = "one\u2028two\x85three"
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    write_run(tmp_path, run, [])
    (tmp_path / "records.jsonl").write_text(lines + "\n", encoding="utf-8")
    assert read_run(tmp_path)[1] == records


# --- what the pictures show --------------------------------------------------------------------------------------


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_accuracy_plot_has_a_line_a_method():
    run, records = make_run()
    results = analyse(run, records)
    figure = plots.accuracy_plot(results.summaries, results.arms)
    assert legend(figure) == ["uniform and none", "uniform and lp_comp", "qc_comp and lp_comp"]
    (axes,) = figure.axes
    assert [list(line.lines[0].get_ydata()) for line in axes.containers] == [[0.4, 0.4], [0.6, 0.6], [0.8, 0.8]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "8"]
    assert "accuracy (%)" in axes.get_ylabel()


def test_accuracy_plot_keeps_groups_apart_that_differ_only_by_name():
    run, records = make_run(methods=ARMS[:2])
    for arm in run["arms"]:
        arm["compressor"] = "lp_comp"
    results = analyse(run, records)
    assert legend(plots.accuracy_plot(results.summaries, results.arms)) == ["uniform and none", "uniform and lp_comp"]
    for arm in run["arms"]:
        del arm["group"]
    results = analyse(run, records)
    figure = plots.accuracy_plot(results.summaries, results.arms)  # four arms without groups: a row each
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [arm["name"] for arm in run["arms"]]


def test_tokens_plot_shares_a_line_between_equal_curves():
    run, records = make_run()
    results = analyse(run, records)
    figure = plots.tokens_plot(results.records, results.arms)
    assert legend(figure) == ["no compression", "lp_comp"]
    assert [list(line.get_ydata()) for line in figure.axes[0].get_lines()] == [[4, 4, 4], [4, 4, 1]]
    assert plots.tokens_plot([record | {"tokens_per_layer": []} for record in records], results.arms) is None


def test_selection_example_prefers_questions_that_all_selectors_have():
    run, records = make_run()
    missing = [r for r in records if not (r["question_id"] == "v0-q0" and r["arm"].startswith("qc"))]
    results = analyse(run, missing)
    rows = plots.selection_example(results.records, results.arms)
    assert [row.label for row in rows] == ["uniform and none", "qc_comp and lp_comp"]
    assert {row.record["question_id"] for row in rows} == {"v0-q1"}
    assert {len(row.record["times"]) for row in rows} == {4}
    assert plots.selection_example([record | {"times": None} for record in records], results.arms) == []


def test_selection_plot_of_a_long_video_with_gaps_in_its_scores():
    run, records = make_run(budgets=(4,))
    for record in records:
        record |= {"duration": 3600.0, "times": [180.0 * t for t in record["times"]], "events": [[1000.0, 1001.0]]}
        record["candidate_times"] = record["candidate_times"] and [180.0 * t for t in record["candidate_times"]]
        record["scores"] = record["scores"] and [None, math.nan, *record["scores"][2:]]
    results = analyse(run, records)
    figure = plots.selection_plot(plots.selection_example(results.records, results.arms))
    axes = figure.axes[0]
    assert axes.get_xlabel() == "time in the video (min)"
    assert axes.get_xlim() == (0, 60)
    (curve,) = axes.get_lines()
    assert len(curve.get_xdata()) == 40
    assert plots.png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("part", "label"),
    [
        (None, "none"),
        ("lp_comp", "lp_comp"),
        ({"name": "avg_pool", "tokens": 4}, "avg_pool (tokens=4)"),
        ({"name": "avg_pool", "options": {"tokens": 4}}, "avg_pool (tokens=4)"),
        ({"name": "avg_pool", "options": None}, "avg_pool"),
    ],
)
def test_parts_with_options_have_their_own_label(part, label):
    assert Legend.from_dict({"name": "a", "compressor": part}).compressor == label

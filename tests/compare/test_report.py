"""The report of made-up runs: what is in the files, and that odd runs are reported or refused, never garbled."""

import json
import math

import numpy as np
import pytest
from made_runs import ARMS, analysed, make_run, write_run

from xcomp.compare import plots
from xcomp.compare.report import write_report

PLOTS = {"accuracy.png", "cost.png", "tokens_per_layer.png", "selected_frames.png"}
FILES = {"summary.json", "table.csv", "table.md", "table.tex", "report.html"}


def report(folder):
    """Writes the report of a run; the path of its page."""
    write_report([folder])
    return folder / "report.html"


def written(folder):
    return {path.name for path in folder.iterdir()} - {"run.json", "records.jsonl"}


def test_report_has_all_files_and_numbers(tmp_path):
    page = report(write_run(tmp_path, *make_run()))
    assert page == tmp_path / "report.html"
    assert written(tmp_path) == PLOTS | FILES
    for name in PLOTS:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "6 arms compared on 10 questions about 5 videos" in page.read_text(encoding="utf-8")


def test_report_is_the_same_twice_and_follows_the_order_of_arms(tmp_path):
    run, records = make_run()
    first = report(write_run(tmp_path, run, records)).read_bytes()
    assert report(tmp_path).read_bytes() == first
    assert [arm.name for arm in analysed(run, records[::-1]).summary.arms] == [arm["name"] for arm in run["arms"]]


def test_one_arm_one_budget_no_scores_no_events(tmp_path):
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    for record in records:
        record |= {"events": [], "category": "", "scores": None}
    report(write_run(tmp_path, run, records))
    assert written(tmp_path) == PLOTS - {"cost.png"} | FILES  # one point is no picture


def test_errors_are_wrong_answers_and_counted(tmp_path):
    run, records = make_run(budgets=(4,))
    for record in records[:3]:
        record |= {"error": "OSError: no such video", "prediction": None, "times": None, "tokens_per_layer": None,
                   "macs": None, "seconds": None, "num_frames": None}  # fmt: skip
    text = report(write_run(tmp_path, run, records)).read_text(encoding="utf-8")
    assert "Questions that failed to run (counted as wrong): uniform+none@4: 3." in text
    assert "OSError: no such video" in text
    summary = analysed(run, records).summary.arms[0]
    assert (summary.errors, summary.accuracy.correct) == (3, 1)


def test_nothing_but_errors_still_reports_and_drops_old_pictures(tmp_path):
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    report(write_run(tmp_path, run, records))
    failed = {"error": "no memory", "times": None, "tokens_per_layer": None, "macs": None, "seconds": None}
    write_run(tmp_path, run, [record | failed for record in records])
    report(tmp_path)
    assert written(tmp_path) == {"accuracy.png"} | FILES
    assert json.loads((tmp_path / "summary.json").read_text())["arms"][0]["macs"] == {}


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
        report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not written(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    report(write_run(tmp_path, *make_run(budgets=(4,))))
    before = (tmp_path / "accuracy.png").read_bytes()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report(tmp_path)
    assert (tmp_path / "accuracy.png").read_bytes() == before
    assert written(tmp_path) == PLOTS | FILES


# --- what the pictures show --------------------------------------------------------------------------------------


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_accuracy_plot_has_a_line_a_method():
    run, records = make_run()
    results = analysed(run, records)
    figure = plots.accuracy_plot(results.summary)
    assert legend(figure) == ["uniform and none", "uniform and lp_comp", "qc_comp and lp_comp"]
    (axes,) = figure.axes
    assert [list(line.lines[0].get_ydata()) for line in axes.containers] == [[40, 40], [60, 60], [80, 80]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "8"]
    assert "accuracy (%)" in axes.get_ylabel()


@pytest.mark.parametrize("spread, scale", [(2, "linear"), (20, "log")])
def test_cost_plot_has_a_point_an_arm_where_its_cost_is(spread, scale):
    run, records = make_run()
    for record in records:
        more = spread if record["num_frames"] == 8 else 1
        record["macs"] = {stage: 3e9 * more for stage in record["macs"]}
    summary = analysed(run, records).summary
    figure = plots.cost_plot(summary)
    assert legend(figure) == ["uniform and none", "uniform and lp_comp", "qc_comp and lp_comp"]
    (axes,) = figure.axes
    costs = sorted({arm.total_macs / 1e9 for arm in summary.arms})
    for line in axes.containers:
        assert np.allclose(line.lines[0].get_xdata(), costs, rtol=0.02)
    assert axes.get_xscale() == scale and "GMACs" in axes.get_xlabel()


def test_accuracies_have_round_ticks_evenly_spaced():
    run, records = make_run(videos=100)  # two to four videos of a hundred are right
    figure = plots.accuracy_plot(analysed(run, records).summary)
    figure.canvas.draw()
    labels = [float(label.get_text()) for label in figure.axes[0].get_yticklabels()]
    gaps = {round(b - a, 9) for a, b in zip(labels, labels[1:])}
    assert len(gaps) == 1 and f"{gaps.pop():.0e}"[0] in "125"


def test_accuracy_plot_keeps_groups_apart_that_differ_only_by_name():
    run, records = make_run(methods=ARMS[:2])
    for arm in run["arms"]:
        arm["compressor"] = "lp_comp"
    results = analysed(run, records)
    assert legend(plots.accuracy_plot(results.summary)) == ["uniform and none", "uniform and lp_comp"]
    for arm in run["arms"]:
        del arm["group"]
    results = analysed(run, records)
    figure = plots.accuracy_plot(results.summary)  # four arms without groups: a row each
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [arm["name"] for arm in run["arms"]]


def test_tokens_plot_shares_a_line_between_equal_curves():
    run, records = make_run()
    results = analysed(run, records)
    figure = plots.tokens_plot(results.summary)
    assert legend(figure) == ["no compression", "lp_comp"]
    assert [list(line.get_ydata()) for line in figure.axes[0].get_lines()] == [[4, 4, 4], [4, 4, 1]]
    unknown = analysed(run, [record | {"tokens_per_layer": []} for record in records])
    assert plots.tokens_plot(unknown.summary) is None


def test_selection_example_prefers_questions_that_all_selectors_have():
    run, records = make_run()
    missing = [r for r in records if not (r["question_id"] == "v0-q0" and r["arm"].startswith("qc"))]
    results = analysed(run, missing)
    rows = plots.selection_example(results.records, results.summary)
    assert [row.label for row in rows] == ["uniform and none", "qc_comp and lp_comp"]
    assert {row.record["question_id"] for row in rows} == {"v0-q1"}
    assert {len(row.record["times"]) for row in rows} == {4}
    assert plots.selection_example([record | {"times": None} for record in records], results.summary) == []


def test_selection_plot_of_a_long_video_with_gaps_in_its_scores():
    run, records = make_run(budgets=(4,))
    for record in records:
        record |= {"duration": 3600.0, "times": [180.0 * t for t in record["times"]], "events": [[1000.0, 1001.0]]}
        record["candidate_times"] = record["candidate_times"] and [180.0 * t for t in record["candidate_times"]]
        record["scores"] = record["scores"] and [None, math.nan, *record["scores"][2:]]
    results = analysed(run, records)
    figure = plots.selection_plot(plots.selection_example(results.records, results.summary))
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
    assert plots.part_label(part) == label

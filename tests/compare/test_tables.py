"""Tables as text: what is in them, that they fit a terminal, and that no name breaks them."""

import csv
import io
import re

import pytest
from made_runs import ARMS, analysed, make_run
from rich.console import Console
from test_analysis import run_of, seeded, wide_run

from xcomp.compare import tables
from xcomp.compare.analysis import Options, analyse


def shown(summary, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    tables.print_summary(summary, console)
    return console.export_text()


def rows_of(summary, title):
    grid = next(grid for grid in tables.grids(summary) if grid.title == title)
    return [dict(zip(grid.columns, row, strict=True)) for row in grid.rows]


def test_a_terminal_of_80_columns_shows_tables_verdict_and_differences():
    run, records = make_run()
    records[0]["error"] = "failed"
    records[1]["prediction"] = None
    run["benchmark"] |= {"missing": ["/v/gone.mp4"], "num_videos": 6, "defects": {"no text": 2}}
    summary = analysed(run, records).summary
    text = shown(summary)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for expected in ("60.0 (", "GMACs", "3.00 (0.375)", "Paired differences", "wins/", "0.020 (5.1\u00a0%)", "seen",
                     "Questions that failed to run (counted as wrong): uniform+none@4: 1."):  # fmt: skip
        assert expected.replace("\u00a0", " ") in words.replace("\u00a0", " "), expected
    assert summary.verdict in words
    assert not re.search(r"…", text)  # no number is cut off
    missing = "1 of 7 videos are missing, their questions not asked: gone.mp4."
    assert words.count(missing) == words.count("Defects of the benchmark's questions: no text 2.")
    assert words.count(missing) == len(tables.grids(summary, brief=True))  # under every table


def test_results_tell_tokens_apart():
    summary = analysed(*make_run()).summary
    row = rows_of(summary, "Results")[2]
    assert row["arm"] == "uniform+lp_comp@4" and row["total GMACs"] == "6.00"
    assert [row[key] for key in ("tokens given", "in", "last layer", "KV mean")] == ["64", "16", "4", "12"]
    assert row["s/question alone\u00a0(shared)"] == "3.00 (0.375)"


def test_differences_have_their_counts_and_caveats():
    summary = analysed(*make_run()).summary
    row = rows_of(summary, "Paired differences")[-1]
    assert row["arm"] == "qc_comp+lp_comp@8" and row["wins/ ties/ losses"] == "4/6/0" and row["equal in"] == "–"
    assert row["points (95\u00a0%)"].startswith("+40.0 (−28.0 to ")
    note = next(grid for grid in tables.grids(summary) if grid.title == "Paired differences").notes[0]
    assert "uniform+none@4" in note and "10 questions in 5 videos (clusters)" in note and "McNemar" in note


def test_all_pairs_name_both_arms():
    rows = rows_of(analysed(*make_run(budgets=(4,)), Options(all_pairs=True)).summary, "Paired differences")
    assert [(row["arm"], row["minus"]) for row in rows][-1] == ("qc_comp+lp_comp@4", "uniform+lp_comp@4")


def test_refused_pairs_are_named_with_the_reason():
    run, records = make_run(budgets=(4,))
    for record in records[-10:]:
        record["question_id"] += "-other"
    text = tables.markdown(analysed(run, records).summary)
    assert "Not compared with uniform+none@4: qc_comp+lp_comp@4 (they have no question in common (by 'id'))." in text


def test_published_official_and_hard_numbers_stand_beside_ours():
    run, records = make_run(budgets=(4,))
    run["arms"][1]["published"] = {"accuracy": 46.2}
    for record in records:
        record |= {"options": [], "metrics": {"f1": 0.5}}
    rows = rows_of(analysed(run, records).summary, "Other numbers")
    assert [row["accuracy (published)"] for row in rows] == ["–", "46.2", "–"]
    assert [row["f1 (official)"] for row in rows] == ["50.0"] * 3 and rows[2]["hard part\u00a0%"] == "66.7"


def test_labels_have_counts_and_stand_in_the_files():
    run, records = make_run(budgets=(4,))
    for i, record in enumerate(records):
        places = [f"place {i % 10}", *(f"more {j}" for j in range(5))]
        record["labels"] = {"task": [f"task{i % 10}"], "place": places, "size": ["big"]}
    summary = analysed(run, records).summary
    assert "By task, place, size, and by budget: in table.md and the report." in shown(summary)
    text = tables.markdown(summary)
    assert "## By place" in text and "task3 (1)" in text


def test_seconds_of_other_hardware_stand_in_tables_of_their_own(tmp_path):
    other = {"processor": "Q"}
    runs = [run_of(tmp_path, wide_run("a")), run_of(tmp_path, wide_run("b", chances=(0.5,), hardware=other))]
    summary = analyse(runs).summary
    titles = {grid.title: grid for grid in tables.grids(summary)}
    assert not any("s/question" in column for column in titles["Results"].columns)
    assert [row[0] for row in titles["Seconds by stage: a"].rows] == ["arm 0 (a)", "arm 1"]
    assert [row[0] for row in titles["Seconds by stage: b"].rows] == ["arm 0 (b)"]
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(summary))))
    assert "total_seconds" not in rows[0]
    assert [row["total_seconds on b"] == "" for row in rows] == [True, True, False]


def test_seeds_have_tables_of_their_own():
    summary = analysed(*seeded()).summary
    assert [row["seeds"] for row in rows_of(summary, "Over seeds")] == ["3", "2"]
    assert rows_of(summary, "Paired differences over seeds")[0]["paired seeds"] == "2"


def test_csv_holds_every_number_in_full():
    summary = analysed(*make_run()).summary
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(summary))))
    assert [row["arm"] for row in rows] == [arm.name for arm in summary.arms]
    last, arm = rows[-1], summary.arms[-1]
    assert float(last["accuracy_low"]) == arm.accuracy.low and float(last["total_macs"]) == arm.total_macs
    assert float(last["minus_reference_p_holm"]) == summary.differences[-1].p_holm
    assert float(last["kv_tokens"]) == 24 and float(last["macs_vision"]) == 4e9 and rows[0]["minus_reference_p"] == ""


@pytest.mark.parametrize("name", ["[red]a|b[/red]", "50 % of {a}_b & #1 ~ ^ \\x $y$ <z>"])
def test_no_name_breaks_a_table(name):
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    for record in records:
        record["arm"] = name
    summary = analysed(run | {"arms": []}, records).summary
    assert name in shown(summary, width=120)
    assert f"| {name} |".replace("a|b", r"a\|b") in tables.markdown(summary)
    latex = next(line for line in tables.latex(summary).splitlines() if line.endswith(r" \\") and "40.0" in line)
    assert not re.search(r"(?<!\\)[%#_{}](?!\})", latex.replace(r"{}", "").replace("$", ""))
    columns = re.split(r"(?<!\\)&", latex)
    assert len(columns) == len(next(g for g in tables.grids(summary) if g.title == "Results").columns)


def test_one_kind_of_number():
    """Costs are means, and every table that shows them says so."""
    for grid in tables.grids(analysed(*make_run()).summary):
        if any(word in " ".join(grid.columns) for word in ("s/question", "vision", "MACs", "given")):
            assert any("means a question" in note.lower() or "mean" in note.lower() for note in grid.notes), grid.title
            assert not any("median" in note.lower() for note in grid.notes)

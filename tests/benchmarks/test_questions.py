"""One's own questions: the four kinds of files, every field, and what is wrong with a file, told in one go."""

from __future__ import annotations

import csv
import io
import json

import pytest

import xcomp
from xcomp.tables import from_json

GOOD = {"video": "a.mp4", "question": "What is it?", "options": ["a cup", "a key"], "answer": "a key"}
OPEN = {"video": "b.mp4", "question": "What is it?", "answer": ["a cup", "cup"]}


@pytest.fixture
def make(tmp_path):
    """A benchmark of rows, or of a file's own content, as ``name``."""

    def make(content, name="mine.jsonl", **options):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return xcomp.load_benchmark("questions", file=str(path), **options)

    return make


def only(benchmark):
    (question,) = benchmark.questions()
    return question


# --- the four kinds of files ------------------------------------------------------------------------------------------

ROWS = [
    {"id": "first", "video": "ä/a.mp4", "question": 'Was, "das"?', "options": ["ein Krug", "日本\u2028語"], "answer": 0,
     "category": "what", "start": 1.5, "end": 3.0, "event": [1.0, 2.0], "source": "web"},
    {"video": "/abs/b.mp4", "question": "Who?", "answer": ["Ann", "Anna"]},
    {"video": "c.mp4", "question": "Which\nof them?", "options": ["1", "2", "30"], "answer": "30", "source": "tv"},
]  # fmt: skip


def as_csv(rows, **options):
    text = io.StringIO()
    writer = csv.writer(text, **options)
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name) for name in names]
        writer.writerow([json.dumps(cell) if isinstance(cell, list) else cell for cell in cells])
    return text.getvalue()


def as_parquet(rows, folder):
    import pyarrow
    import pyarrow.parquet

    rows = [row | ({"answer": json.dumps(row["answer"])} if isinstance(row["answer"], list) else {}) for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in names} | {"answer": str(row["answer"])} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return (folder / "rows.parquet").read_bytes()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl with other line ends", "json", "csv", "parquet"])
def test_all_kinds_of_files_hold_the_same_questions(make, tmp_path, kind, mark):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    content = {
        "jsonl": lambda: "\n".join([lines[0], "", lines[1], "  ", lines[2]]).encode(),
        "jsonl with other line ends": lambda: "\r\n".join([lines[0], "", lines[1], "", lines[2], ""]).encode(),
        "json": lambda: json.dumps(ROWS, indent=1).encode(),
        "csv": lambda: as_csv(ROWS).encode(),
        "parquet": lambda: as_parquet(ROWS, tmp_path),
    }[kind]()
    content = content if kind == "parquet" else mark + content
    benchmark = make(content, f"mine.{kind.split()[0]}", videos="films", meta=["source"])
    first, second, third = benchmark.questions()
    assert (first.id, first.video, first.category) == ("first", "films/ä/a.mp4", "what")
    assert first.question == 'Was, "das"?' and first.options == ("ein Krug", "日本\u2028語") and first.answer == 0
    assert first.span == (1.5, 3.0) and first.events == ((1.0, 2.0),) and first.meta == {"source": "web"}
    assert (second.video, second.options, second.answer, second.references) == ("/abs/b.mp4", (), None, ("Ann", "Anna"))
    assert second.meta == {"source": None} and second.span is None and second.events == () and second.subtitles is None
    assert (third.options, third.answer, third.question) == (("1", "2", "30"), 2, "Which\nof them?")
    numbers = {"json": (2, 3), "parquet": (2, 3), "csv": (3, 4)}.get(kind, (3, 5))
    assert (second.id, third.id) == tuple(f"mine-{n}" for n in numbers)


def test_options_in_columns_of_their_own(make):
    text = "video,question,A,B,C,answer\r\na.mp4,What?,x,y,,b\r\nb.mp4,What?,x,y,z,C\r\nc.mp4,Say?,,,,x\r\n"
    first, second, third = make(text, "mine.csv").questions()
    assert (first.options, first.answer) == (("x", "y"), 1) and (second.options, second.answer) == (("x", "y", "z"), 2)
    assert (third.options, third.references) == ((), ("x",))


def test_videos_are_beside_the_file_unless_a_folder_is_named(make, tmp_path):
    assert only(make([GOOD])).video == str(tmp_path / "a.mp4")
    assert only(make([GOOD], videos="there")).video == "there/a.mp4"


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, answer, how, index",
    [
        (["a", "b c"], 1, "auto", 1), (["x", "y"], "1", "auto", 1), (["x", "y"], "B", "auto", 1),
        (["x", "y"], "b", "auto", 1),
        (["x", "y"], "(B)", "auto", 1), (["x", "y"], "B.", "auto", 1), (["X", "y"], " x ", "auto", 0),
        (["x", "y"], 1.0, "auto", 1),
        (["10", "20"], "20", "auto", 1), (["10", "20"], 20, "auto", 1), (["10", "20"], 1, "auto", 1),
        ([10, 2.5], "2.5", "auto", 1),
        (["0", "1"], 1, "auto", 1), (["0", "1"], "1", "auto", 1), (["A", "B"], "B", "auto", 1),
        (["a", "B"], "A", "auto", 0),
        (["1", "0"], 1, "index", 1), (["1", "0"], 1, "text", 0), (["B", "A"], "A", "letter", 0),
        (["B", "A"], "A", "text", 1),
        (["x", "X"], "X", "auto", 1),
    ],
)  # fmt: skip
def test_an_answer_is_an_index_a_letter_or_a_text(make, options, answer, how, index):
    assert only(make([GOOD | {"options": options, "answer": answer}], answers=how)).answer == index


@pytest.mark.parametrize(
    "options, answer, how, message",
    [
        (["1", "0"], 1, "auto",
         "'answer' is 1, by index option '0' and text option '1'; say which is meant with answers: index or"),
        (["B", "A"], "A", "auto",
         "by letter option 'B' and text option 'A'; say which is meant with answers: letter or"),
        (["x", "y"], 2, "auto",
         r"'answer' is 2, which is none of the options by index \(from 0\), letter or text"),
        (["x", "y"], "C", "auto", "'answer' is 'C', which is none of the options"),
        (["x", "y"], "z", "auto", "'answer' is 'z', which is none of the options"),
        (["x", "y"], -1, "auto", "'answer' is -1, which is none of the options"),
        (["x", "y"], "x", "letter", "'answer' is 'x', which is none of the options by letter"),
        (["x", "y"], "A", "index", "'answer' is 'A', which is none of the options by index"),
        (["x", "y"], True, "auto", "'answer' must be an option's index, letter or text, not True"),
        (["x", "y"], ["x"], "auto", r"'answer' must be an option's index, letter or text, not \['x'\]"),
        (["x", "y"], None, "auto", "'answer' is missing"),
        (["x", "y", "x"], 0, "auto", "the right option 'x' stands there twice"),
        (["x", "y", "x"], 2, "auto", "the right option 'x' stands there twice"),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_option_or_two_is_refused(make, options, answer, how, message):
    with pytest.raises(ValueError, match=f"mine.jsonl' has 1 bad line: line 1: .*{message}"):
        make([GOOD | {"options": options, "answer": answer}], answers=how).questions()


def test_wrong_options_that_repeat_are_counted(make):
    benchmark = make([GOOD | {"options": ["x", "y", "x"], "answer": 1}, GOOD])
    assert len(benchmark.questions()) == 2 and benchmark.defects == {"options that repeat": 1}


# --- bad files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"video": None}, "'video' is missing"), ({"video": 5}, "'video' must be text, not 5"),
        ({"question": " "}, "'question' must be text"),
        ({"question": "\ud800"}, "'question' holds half of a surrogate pair"),
        ({"options": "x"}, "'options' must be a list, not 'x'"),
        ({"options": ["x"]}, "there must be 2 to 26 options, or none for an open question, not 1"),
        ({"options": ["a key", ""]}, "option 1 must be text or a number, not ''"),
        ({"options": ["a key", None]}, "option 1 must be text"),
        ({"A": "x"}, "'options' and 'A' are both given"), ({"id": 1.5}, "'id' must be text or a whole number"),
        ({"options": None, "A": "x", "C": "a key"}, "option 'B' is missing before 'C'"),
        ({"options": None, "answer": []}, "'answer' must be a text or a list of at least one"),
        ({"optoins": 1},
         r"'optoins' is not read; did you mean 'options'\? a field of your own is kept where .* meta: \[optoins\]"),
        ({"category": ["x"]}, "'category' must be text"), ({"start": 1}, "'start' is given, but not 'end'"),
        ({"start": 2, "end": 2}, r"the span ends at 2 s, where it begins \(2 s\) or before"),
        ({"end": -1}, "'end' must be a number of seconds, not -1"),
        ({"end": "soon"}, "'end': 'soon' is no time like"),
        ({"event": 5}, r"an event must be \[start, end\] in seconds"),
        ({"event": [1, 2, 3]}, r"an event must be \[start, end\]"),
        ({"events": [[2, 1]]}, "an event ends at 1 s, before it begins at 2 s"),
        ({"event": [1, 2], "events": []}, "'event' and 'events' are both given"),
        ({"subtitles": "no.srt"}, r"no\.srt' cannot be read: No such file"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(make, change, message):
    row = {key: value for key, value in (GOOD | change).items() if value is not None}
    text = f"\n{json.dumps(row)}\n{json.dumps(GOOD)}\n"
    with pytest.raises(ValueError, match=f"mine.jsonl' has 1 bad line: line 2: .*{message}") as error:
        make(text).questions()
    assert "\n" not in str(error.value)


def test_all_bad_lines_are_told_in_one_go(make):
    bad = ["{", "5", '{"video": "a", "video": "b"}', '{"start": NaN}']
    lines = [*bad, json.dumps(GOOD), *(json.dumps(GOOD | {"answer": f"none {n}"}) for n in range(12))]
    with pytest.raises(ValueError) as error:
        make("\n".join(lines)).questions()
    said = str(error.value)
    assert "has 16 bad lines: line 1: not JSON (" in said and "; line 2: not an object of fields but 5; " in said
    assert "line 3: not JSON ('video' stands twice); line 4: not JSON (NaN is no JSON); line 6: 'answer' is " in said
    assert said.endswith("; … and 6 more problems") and "\n" not in said


def test_what_is_wrong_with_many_lines_is_told_once(make):
    with pytest.raises(ValueError, match=r"has 20 bad lines: line 1 and 19 more: 'where' is not read"):
        make([GOOD | {"where": "x"} for _ in range(20)]).questions()


def test_ids_are_used_once(make):
    rows = [GOOD | {"id": name} for name in ("x", "mine-3", "x")] + [GOOD | {"id": 7}, GOOD | {"id": "7"}]
    with pytest.raises(
        ValueError, match=r"2 bad lines: line 3: the id 'x' is that of line 1 too; line 5: the id '7' is"
    ):
        make(rows).questions()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("mine.txt", "", r"mine.txt' is of an unknown kind; known: .jsonl, .json, .csv, .parquet"),
        ("mine.jsonl", "", "mine.jsonl' is empty"), ("mine.csv", "video,question\n", "mine.csv' is empty"),
        ("mine.json", "[]", "mine.json' is empty"),
        ("mine.json", "{}", "must hold a list of objects; of one object a line, the file's name ends in .jsonl"),
        ("mine.json", "[", "mine.json' is not JSON"),
        ("mine.json", "[5]", "has 1 bad record: record 1: not an object of fields but 5"),
        ("mine.jsonl", b"\xff\xfe", r"is not UTF-8 \(invalid start byte at byte 0\); save it as UTF-8"),
        ("mine.parquet", "no", "mine.parquet' is not parquet"),
        ("mine.csv", "video,video\na,b\n", "the column 'video' stands twice"),
        ("mine.csv", "video,question,answer\na,b,c,d\n",
         "line 2: 4 cells for 3 columns; commas within one need quotes"),
        ("mine.csv", 'video,question,answer\na,"b,c\n', r"line 2: not CSV \("),
        ("mine.csv", "video;question;answer\na;b;c\n", "'video;question;answer' is not read"),
        ("mine.csv", 'video,question,options,answer\na.mp4,b,"[1, 2",0\n', r"line 2: 'options' is not a list \("),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read(make, name, content, message):
    with pytest.raises(ValueError, match=message):
        make(content, name).questions()


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"no\.jsonl' cannot be read: No such file"):
        xcomp.load_benchmark("questions", file=str(tmp_path / "no.jsonl")).questions()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": "letter"}, "prompts is 'letter'; did you mean 'letters'"),
        ({"answers": "number"}, "answers is 'number'"),
        ({"meta": ["video"]}, "labels and meta name further fields, but 'video' is read as it is"),
        ({"meta": ["x"], "labels": ["x"]}, "'x' is named twice"), ({"metrics": ["f1"]}, "metric 'f1' is not known"),
        ({"metrics": ["exact_match", "exact_match"]}, "metrics names 'exact_match' twice"),
        ({"metrics": ["nowhere.py:f"]}, "metric 'nowhere.py:f': nowhere.py failed to import: FileNotFoundError"),
        ({"metrics": ["json:dunp"]}, r"json has no function 'dunp'; did you mean 'dump"),
    ],
)  # fmt: skip
def test_options_are_refused_by_name(make, options, message):
    with pytest.raises(ValueError, match=message):
        make([GOOD], **options)


def test_a_further_field_that_nobody_has_is_refused(make):
    with pytest.raises(ValueError, match="no line of .* has the field 'sorce'; did you mean 'source'"):
        make([GOOD | {"source": "web"}], meta=["sorce"]).questions()


def test_labels_break_results_down(make):
    benchmark = make([GOOD | {"kind": ["a", "b"], "year": 2020}, GOOD | {"kind": "a"}], labels=["kind", "year"])
    first, second = benchmark.questions()
    assert benchmark.axes == ("kind", "year")
    assert first.labels == {"kind": ("a", "b"), "year": ("2020",)} and second.labels == {"kind": ("a",)}


# --- prompts, subtitles, metrics --------------------------------------------------------------------------------------


def test_prompts(make):
    question = only(make([GOOD]))
    assert make([GOOD]).prompt(question) == (
        "What is it?\n(A) a cup\n(B) a key\nAnswer with the option's letter from the given choices directly."
    )
    assert make([GOOD], prompts="words").prompt(question) == "What is it?\na cup or a key"
    assert make([OPEN]).prompt(only(make([OPEN]))) == "What is it?"
    assert make([GOOD]).parse("the key, a key", question) == 1 and make([GOOD]).parse("(A)", question) == 0


def test_subtitles_of_what_is_shown_stand_before_the_question(make, tmp_path):
    (tmp_path / "a.srt").write_text(
        "1\n00:00:00,000 --> 00:00:02,000\nHello\n\n2\n00:00:05,000 --> 00:00:06,000\nthere,\nyou\n\n"
        "3\n00:00:07,000 --> 00:00:08,000\n\n"
    )
    whole = OPEN | {"subtitles": "a.srt"}
    rows = [whole, whole | {"start": 0, "end": 3}, whole | {"start": 2, "end": 5.5}, whole | {"start": 2, "end": 4}]
    benchmark = make([*rows, whole | {"start": "0:06.5", "end": 9}])
    head = "This video's subtitles are listed below:\n"
    assert [benchmark.prompt(question) for question in benchmark.questions()] == [
        f"{head}Hello\nthere, you\nWhat is it?",
        f"{head}Hello\nWhat is it?",
        f"{head}there, you\nWhat is it?",
        "What is it?",
        "What is it?",
    ]


def test_open_questions_are_scored_by_exact_match_or_functions_of_ones_own(make, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def share(text, references):\n    return max(len(set(text) & set(r)) / len(set(r)) for r in references)\n"
    )
    assert make([OPEN]).score("The Cup.", only(make([OPEN]))) == {"exact_match": 1.0}
    assert make([OPEN]).score("a mug", only(make([OPEN]))) == {"exact_match": 0.0}
    benchmark = make([OPEN], metrics=[f"{tmp_path}/mine.py:share", "exact_match"])
    assert benchmark.score("u", only(benchmark)) == {"share": pytest.approx(1 / 3), "exact_match": 0.0}


@pytest.mark.parametrize(
    "body, message",
    [
        ("1 / 0", "the metric 'f' failed on a right answer: ZeroDivisionError"),
        ("100", "the metric 'f' must give a number from 0 to 1, not 100"),
        ("None", "must give a number from 0 to 1, not None"),
        ("float('nan')", "must give a number from 0 to 1, not nan"),
    ],
)  # fmt: skip
def test_a_metric_that_fails_does_so_before_anything_is_asked(make, tmp_path, body, message):
    (tmp_path / "bad.py").write_text(f"def f(text, references):\n    return {body}\n")
    with pytest.raises(ValueError, match=message):
        make([OPEN], metrics=[f"{tmp_path}/bad.py:f"]).questions()
    with pytest.raises(ValueError, match="metrics are for open questions, and .* has none"):
        make([GOOD], metrics=[f"{tmp_path}/bad.py:f"]).questions()


def test_json_without_what_is_usually_not_said():
    assert from_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    for text, message in (('{"a": 1, "a": 2}', "'a' stands twice"), ("[Infinity]", "Infinity is no JSON")):
        with pytest.raises(ValueError, match=message):
            from_json(text)
    with pytest.raises(ValueError, match="nested too deep"):
        from_json("[" * 100_000)

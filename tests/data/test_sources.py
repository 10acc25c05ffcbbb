"""Where records come from: files, mixtures, the strategies that take parts of them, what is missing or no good."""

import json
import math
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from xcomp.config import ConfigError, Sampling
from xcomp.data.sources import MissingData, amount, read_records


def turns(*texts, **media):
    return {**media, "conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]}


def texts(number, name=""):
    """Records without media."""
    return [turns(f"Q{name}{i}", "A") for i in range(number)]


def questions(records):
    return [conversation.turns[0][0] for conversation in records.conversations]


@pytest.fixture
def write(tmp_path):
    """Writes a file of records, or of anything else, and names it."""

    def write(content, name="records.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def mixture(tmp_path, write):
    """Writes a mixture of (entry, records) and names it as a source."""

    def make(*entries, **options):
        rows = []
        for number, (entry, records) in enumerate(entries):
            name = entry.get("json_path", f"{number}.json")
            if records is not None:
                write(records, f"annotations/{name}")
            rows.append({"json_path": f"annotations/{name}"} | {k: v for k, v in entry.items() if k != "json_path"})
        file = write(yaml.safe_dump({"datasets": rows}), "mixture.yaml")
        return {"mixture": file, "root": str(tmp_path), **options}

    return make


# --- files ------------------------------------------------------------------------------------------------------------


def test_json_and_jsonl_hold_the_same(write):
    odd = turns("line\u2028separator", "a\u0085b")  # line ends to splitlines, but not to JSON
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in (turns("Q", "A"), odd)) + "\n\n"
    files = write([turns("Q", "A"), odd]), write(lines, "records.jsonl")
    from_json, from_lines = (read_records([{"records": file}]).conversations for file in files)
    assert [replace(c, where="") for c in from_json] == [replace(c, where="") for c in from_lines]
    assert [c.where for c in from_json + from_lines] == [
        f"records file '{file}', {place}" for file, place in zip(
            (files[0], files[0], files[1], files[1]), ("record 0", "record 1", "line 1", "line 2")
        )
    ]  # fmt: skip
    assert from_json[1].turns == (("line\u2028separator", "a\u0085b"),)


def test_sources_are_joined_repeated_and_rooted(write, tmp_path):
    write("", "one/a/b.mp4"), write("", "v.mp4")
    first = {"records": write([turns("<image>Q", "A", video="a/b.mp4")]), "root": str(tmp_path / "one"), "repeat": 2}
    second = {"records": write([turns("<image>Q", "A", video=f"{tmp_path}/v.mp4")], "2.json"), "root": "/else"}
    sampling = {"rate": 2, "max_frames": 64}
    found = read_records([{**first, "frames": [8, 16]}, {**second, "sampling": sampling}]).conversations
    assert [c.video for c in found] == [f"{tmp_path}/one/a/b.mp4"] * 2 + [f"{tmp_path}/v.mp4"]
    assert [c.frames for c in found] == [(8, 16), (8, 16), ()]
    assert [c.sampling for c in found] == [None, None, Sampling(rate=2, max_frames=64)]
    found = read_records([{**second, "sampling": sampling}], sampling=Sampling(min_frames=8)).conversations
    assert found[0].sampling == Sampling(rate=2, max_frames=64, min_frames=8)  # the rest is the run's


def test_lengths_that_records_do_not_tell_may_be_told_of_all(mixture):
    rows = [{**texts(1)[0], "duration": 4}, texts(1)[0]]
    found = read_records([mixture(({"seconds": 10}, rows), ({}, rows), seconds=30)]).conversations
    assert [c.duration for c in found] == [4, 10, 4, 30]


def test_a_benchmark_with_training_records_is_a_source(needle_videos):
    needle = {"name": "needle", "split": "train", **needle_videos}
    found = read_records([{"benchmark": needle, "tasks": ["describe", "choice"]}]).conversations
    assert len(found) == 2 * (1 + 4) and len({c.video for c in found}) == 2
    assert sum(question == "Describe the video." for c in found for question, _ in c.turns) == 2
    assert all(answer in "ABCD" for c in found for question, answer in c.turns if question != "Describe the video.")


def test_kinds_of_records_can_be_left_out_and_that_is_told(write):
    file = write([*texts(3), turns("<image>Q", "A", image="i.png"), turns("<image>Q", "A", video="v.mp4")])
    found = read_records([{"records": file, "kinds": ["text"]}])
    assert found.kinds == {"text": 3}
    assert found.notes == ["left out as of other kinds: 2 records in 1 data sets"]


@pytest.mark.parametrize(
    "given, message",
    [
        (
            "file.json",
            r"tune.data\[0\] must be a mapping with either 'records' \(a file\), 'mixture' \(a YAML file\) or",
        ),
        ({}, "must be a mapping with either"),
        ({"records": "a", "benchmark": "needle"}, "must be a mapping with either"),
        ({"records": "a", "rot": "/"}, r"tune.data\[0\] has no key 'rot'; did you mean 'root'\? keys: records, frames"),
        ({"records": "a", "tasks": []}, "has no key 'tasks'"),
        ({"records": "a", 3: "/"}, "has no key '3'"),
        ({"records": ["a"]}, r"records is \['a'\]; it must be a file"),
        ({"records": "nowhere.json"}, r"tune.data\[0\]: 'nowhere.json' does not exist; 'root' and 'roots' say where"),
        ({"mixture": "nowhere.yaml"}, "mixture 'nowhere.yaml' cannot be read: No such file"),
        ({"benchmark": "nedle"}, "unknown benchmark 'nedle'; did you mean 'needle'"),
        ({"benchmark": "needle", "tasks": "open"}, "tasks is 'open'; it must be a list"),
        ({"benchmark": "needle", "tasks": ["opn"]}, "tasks: 'opn' is not one of"),
        ({"records": "a", "repeat": 0}, "repeat is 0; it must be a whole number of at least 1"),
        ({"records": "a", "repeat": 1.5}, "repeat is 1.5"),
        ({"records": "a", "repeat": True}, "repeat is True"),
        ({"records": "a", "frames": 8}, "frames is 8; it must be a list of whole numbers of at least 1"),
        ({"records": "a", "frames": [8, 0]}, r"frames is \[8, 0\]"),
        (
            {"records": "a", "kinds": ["videos"]},
            r"kinds is \['videos'\]; it must be a list of video, image, images, text",
        ),
        ({"records": "a", "rule": "paper"}, "rule is 'paper'; known: videochat_flash, xcomp"),
        ({"records": "a", "share": [0, 0.5]}, "share is part of the rule 'xcomp'"),
        ({"records": "a", "rule": "xcomp", "share": [0.5, 0.5]}, r"share is \[0.5, 0.5\]; it must be two numbers"),
        ({"records": "a", "seed": -1}, "seed is -1; it must be a whole number"),
        ({"records": "a", "roots": {"a": 3}}, "roots is .*; it must map beginnings of paths to folders"),
        ({"records": "a", "allow_missing": "yes"}, "allow_missing is 'yes'; it must be true or false"),
        ({"records": "a", "media_type": "vidoe"}, "media_type is 'vidoe'; did you mean 'video'"),
        ({"records": "a", "video_read_type": "opencv"}, "video_read_type is 'opencv';.* known: decord, av, img"),
        (
            {"records": "a", "sampling_strategy": "frist:10"},
            "sampling_strategy is 'frist:10'; it must be all, or first",
        ),
    ],
)
def test_a_bad_source_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_records([given])


@pytest.mark.parametrize(
    "content, name, message",
    [
        ("[{", "records.json", "records file '.*records.json' is not JSON"),
        (json.dumps(texts(1)[0]) + "\n{", "records.jsonl", "records file '.*records.jsonl', line 2 is not JSON"),
        ("[" * 100_000, "records.json", "is not JSON"),
        (turns("Q", "A"), "records.json", "must hold a list of records, not a dict"),
        ([], "records.json", "there are no records; 'tune.data' lists where they come from"),
        ([*texts(1), "v.mp4"], "records.json", "records file '.*records.json', record 1 must be a mapping"),
        (
            [turns("<image>Q", "A", video="gone.mp4")] * 9,
            "a.json",
            "none of its first 3 media is there: 'gone.mp4' does",
        ),
    ],
)
def test_a_bad_file_is_refused(write, content, name, message):
    with pytest.raises(ConfigError, match=message):
        read_records([{"records": write(content, name)}])


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "records.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="is no text in UTF-8"):
        read_records([{"records": str(tmp_path / "records.jsonl")}])


def test_errors_name_the_list_the_source_stands_in():
    with pytest.raises(ConfigError, match=r"tune.validation\[0\] must be a mapping"):
        read_records(["x"], where="tune.validation")


def test_a_share_of_bad_records_is_passed_over_by_name(write):
    lines = [json.dumps(record) for record in texts(98)]
    lines[10:10], lines[50:50] = ["{broken"], [json.dumps(turns("Q"))]
    source = {"records": write("\n".join(lines), "records.jsonl")}
    found = read_records([source], max_skipped=0.02)
    assert len(found.conversations) == 98
    assert [refused.where.rsplit("', ")[1] for refused in found.refused] == ["line 11", "line 51"]
    assert "is not JSON: Expecting property name" in found.refused[0].reason
    assert "turns must alternate" in found.refused[1].reason
    with pytest.raises(ConfigError, match=r"line 11 is not JSON.* \(1 more of 100 records are refused; tune.max_skipp"):
        read_records([source], max_skipped=0.019)


# --- mixtures ---------------------------------------------------------------------------------------------------------


def test_a_mixture_is_its_data_sets_in_turn(mixture, write, tmp_path):
    write("", "media/v.mp4"), write("", "gifs/v.gif")
    found = read_records(
        [
            mixture(
                ({"sampling_strategy": "first:2"}, texts(5, "a")),
                ({"json_path": "b.jsonl", "sampling_strategy": "end:20%"}, "\n".join(map(json.dumps, texts(5, "b")))),
                ({"data_root": "media/", "frames": [8]}, [turns("<image>\nQv", "A", video="v.mp4")]),
                ({"data_root": "gifs", "video_read_type": "gif"}, [turns("<image>\nQg", "A", video="v.gif")]),
                ({"data_root": str(tmp_path / "media"), "repeat": 2}, [turns("<image>\nQr", "A", video="v.mp4")]),
            )
        ]
    )
    assert questions(found) == ["Qa0", "Qa1", "Qb4", "Qv", "Qg", "Qr", "Qr"]
    assert [c.video for c in found.conversations[3:]] == [
        str(tmp_path / name) for name in ("media/v.mp4", "gifs/v.gif", "media/v.mp4", "media/v.mp4")
    ]
    assert [c.read_type for c in found.conversations] == ["decord"] * 4 + ["gif"] + ["decord"] * 2
    assert found.conversations[3].frames == (8,)


def test_a_part_of_a_mixture_is_taken_by_names(mixture):
    entries = [({"json_path": f"video/{name}.json"}, texts(1, name)) for name in ("a_2_3_m", "b_0_30_s", "c_1_2_m")]
    long = ["*_2_3_m*", "*_1_2_m*"]
    assert questions(read_records([mixture(*entries, only=long)])) == ["Qa_2_3_m0", "Qc_1_2_m0"]
    assert questions(read_records([mixture(*entries, without=long)])) == ["Qb_0_30_s0"]
    assert questions(read_records([mixture(*entries, only=long, without=["*/c*"])])) == ["Qa_2_3_m0"]
    with pytest.raises(ConfigError, match=r"^tune.data\[0\]: no json_path of mixture '.*' is like '\*_3_4_m\*'$"):
        read_records([mixture(*entries, only=[*long, "*_3_4_m*"])])
    for bad in ("*", [], [3]):
        with pytest.raises(ConfigError, match=r"^tune.data\[0\]: without is .*; it must be a list of names"):
            read_records([mixture(*entries, without=bad)])


def test_missing_data_sets_are_all_told_with_the_path_that_was_tried(mixture, write, tmp_path):
    write("", "there/3.mp4")
    entries = [
        ({"json_path": "gone.json"}, None),
        ({"data_root": "no_media"}, [turns("<image>Q", "A", video=f"{i}.mp4") for i in range(5)]),
        ({"data_root": "https://example.org/media"}, [turns("<image>Q", "A", video="v.mp4")]),
        ({"data_root": "there"}, [turns("<image>Q", "A", video=f"{i}.mp4") for i in range(5)]),  # not the first three
        ({"data_root": "no_media", "video_read_type": "fake"}, [turns("<image>Q", "A", video="v.mp4")]),
        ({}, texts(2)),
    ]
    expected = [
        f"data set 1 (gone.json): '{tmp_path}/annotations/gone.json' does not exist",
        f"data set 2 (1.json): none of its first 3 media is there: '{tmp_path}/no_media/0.mp4' does not exist",
        "data set 3 (2.json): its media are under the address 'https://example.org/media'; fetch them, and say with "
        "'roots' where they lie",
        f"data set 4 (3.json): none of its first 3 media is there: '{tmp_path}/there/0.mp4' does not exist",
    ]
    with pytest.raises(
        MissingData, match="4 data sets of tune.data are missing, as listed; .*'allow_missing: true'"
    ) as e:
        read_records([mixture(*entries)])
    assert [line.split(", ", 1)[1] for line in e.value.lines] == expected
    found = read_records([mixture(*entries, allow_missing=True)])
    assert len(found.missing) == 4 and len(found.conversations) == 3
    roots = {"https://example.org": str(tmp_path / "there"), str(tmp_path / "no_media"): "", "no_media": "there"}
    write("", "there/media/v.mp4")
    found = read_records([mixture(*entries[2:3], roots=roots)])
    assert found.conversations[0].video == f"{tmp_path}/there/media/v.mp4"


def test_what_is_missing_of_a_mixture_altogether_is_an_error_even_if_it_may_be_missing(mixture):
    with pytest.raises(MissingData, match="there are no records") as e:
        read_records([mixture(({"json_path": "gone.json"}, None), allow_missing=True)])
    assert len(e.value.lines) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("datasets: [{json_path: a.json, sampling: all", "is not YAML"),
        ("- a", "must be a mapping with 'datasets', a list"),
        ("datasets: []\nsets: []", "has no key 'sets'; did you mean 'datasets'"),
        ("datasets: [a.json]", r"data set 1 must be a mapping with 'json_path', a file of records, not 'a.json'"),
        ("datasets: [{data_root: x}]", "data set 1 must be a mapping with 'json_path'"),
        (
            "datasets: [{json_path: x/a.json}, {json_path: b.json, sampling_stategy: all}]",
            r"data set 2 \(b.json\) has no key 'sampling_stategy'; did you mean 'sampling_strategy'",
        ),
        ("datasets: [{json_path: a, data_root: 3}]", "data_root is 3; it must be a folder"),
        (
            "datasets: [{json_path: a, data_root: b, data_root: c}]",
            "line 1: 'data_root' stands twice, with 'b' and 'c'",
        ),
        ("datasets: [{json_path: a, frames: [0]}]", r"data set 1 \(a\): frames is \[0\]"),
        ("datasets: [{json_path: a, sampling_strategy: 'first:'}]", r"data set 1 \(a\): sampling_strategy is 'first:'"),
    ],
)
def test_a_bad_mixture_is_refused_by_file_data_set_and_key(write, content, message):
    file = write(content, "mixture.yaml")
    with pytest.raises(ConfigError, match=f"mixture '{file}'.*{message}"):
        read_records([{"mixture": file}])


def test_a_bad_sampling_of_a_data_set_is_named(mixture):
    for given, message in (
        ({"rat": 2}, "has no key 'rat'; did you mean 'rate'"),
        ({"max_frames": 60}, "multiple of 8"),
    ):
        with pytest.raises(ConfigError, match=rf"data set 1 \(0.json\): sampling.*{message}"):
            read_records([mixture(({"sampling": given}, texts(1)))])


# --- strategies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy, total, expected",
    [
        ("all", 7, 7),
        ("first:3", 7, 3),
        ("first2:10%", 41, 5),  # 4.1
        ("first2:2.5%", 40, 1),  # exactly
        ("first:2.5%", 41, 2),
        ("end:0.1%", 1000, 1),
        ("random:100%", 3, 3),
        ("first6:7%", 300, 21),  # 0.07 * 300 is a little more in floating point
        ("first:29%", 100, 29),
    ],
)
def test_amounts_are_rounded_up(strategy, total, expected):
    assert amount(strategy, total, "x") == (strategy.partition(":")[0], expected)


@pytest.mark.parametrize("strategy", ["first", "first:", "first1:3", "first7:3", "first:-3", "end:1e3", "first:101%"])
def test_other_strategies_are_refused(strategy):
    with pytest.raises(ConfigError, match=f"x: sampling_strategy is '{strategy}'; "):
        amount(strategy, 10, "x")


@pytest.mark.parametrize(
    "strategy, expected",
    [
        ("first:3", range(3)),
        ("first2:3", range(3, 6)),
        ("first3:40%", range(8, 10)),
        ("first4:3", range(9, 10)),
        ("end:3", range(7, 10)),
        ("end:30", range(10)),
        ("first:30", range(10)),
    ],
)
def test_what_strategies_take(mixture, strategy, expected):
    found = read_records([mixture(({"sampling_strategy": strategy}, texts(10)))])
    assert questions(found) == [f"Q{i}" for i in expected]


def test_random_records_follow_from_the_seed(mixture):
    def drawn(**options):
        return questions(read_records([mixture(({"sampling_strategy": "random:10%"}, texts(100)), **options)]))

    assert len(drawn()) == 10 == len(set(drawn())) and drawn() == drawn(seed=42) != drawn(seed=1)


def slow_subset(total, percentage, part, seed=42, start=0.0, end=0.25):
    """The released subset, step by step: shuffle, slice, shuffle, quarter."""
    numbers = list(range(total))
    n = math.ceil(percentage * total / 100)
    random.seed(12345)
    random.shuffle(numbers)
    numbers = numbers[(part - 1) * n : part * n]
    random.seed(seed)
    random.shuffle(numbers)
    return numbers[int(len(numbers) * start) : int(len(numbers) * end)]


@pytest.mark.parametrize("options", [{}, {"seed": 7}, {"share": [0.25, 0.75]}])
def test_the_papers_subset(mixture, tmp_path, write, options):
    write("", "v.mp4")
    records = [[turns(f"<image>\nQ{i}", "A", video="v.mp4") for i in range(total)] for total in (1000, 37)]
    entries = [({"sampling_strategy": "first2:10%"}, records[0]), ({"sampling_strategy": "first2:2.5%"}, records[1])]
    found = read_records([mixture(*entries, rule="xcomp", **options)])
    start, end = options.get("share", (0, 0.25))
    expected = [slow_subset(len(r), p, 2, options.get("seed", 42), start, end) for r, p in zip(records, (10, 2.5))]
    assert questions(found) == [f"Q{i}" for numbers in expected for i in numbers]
    assert len(expected[0]) == (50 if options.get("share") else 25) and len(expected[1]) <= 1


def test_the_papers_subset_holds_one_medium_a_record(mixture, write):
    write("", "v.mp4"), write("", "i.png")
    rows = [
        turns("<image>\nQ0", "A", video="v.mp4"),
        turns("<image>\nQ1", "A", image="i.png", video=None),
        turns("Q2", "A"),
        turns("<image><image>\nQ3", "A", image=["i.png", "i.png"]),
        turns("<image>\nQ4", "A", image=["i.png"]),
        turns("<image>\nQ5", "A", image="i.png", video="v.mp4"),
    ]
    found = read_records([mixture(({}, rows), rule="xcomp", share=[0, 1])])
    assert sorted(questions(found)) == ["Q0", "Q1"]
    left = "left out by the rule 'xcomp' (text alone, several pictures, or a picture and a video)"
    assert found.notes == [f"{left}: 4 records in 1 data sets"]


def test_keys_that_nobody_reads_are_told_once_for_all_data_sets(mixture):
    rows = [{**record, "source": "x"} for record in texts(3)]
    found = read_records([mixture(({}, rows), ({}, texts(2)), ({}, rows + [{**rows[0], "task": "y", "id": 3}]))])
    expected = [
        "key 'source' is not read: 7 records in 2 data sets",
        "key 'task' is not read: 1 records in 1 data sets",
    ]
    assert found.notes == expected


# --- the released mixtures --------------------------------------------------------------------------------------------

RELEASED = Path(os.environ.get("XCOMP_MIXTURES", "absent"))


@pytest.mark.skipif(not RELEASED.is_dir(), reason="XCOMP_MIXTURES names no folder of released mixtures")
@pytest.mark.parametrize(
    "file, entries, strategies",
    [
        ("stage3_short-long_mix_sft_mid2.yaml", 84, {"first2:10%": 74, "first2:2.5%": 9, "first2:1%": 1}),
        ("stage3_short-long_mix_sft.yaml", 104, {"all": 88, "first:25%": 13, "first:10%": 2, "first:20%": 1}),
    ],
)
def test_the_released_mixtures_are_read(file, entries, strategies, tmp_path):
    """All their data sets are missing here, and told one by one; with empty files in their places, none is."""
    source = {
        "mixture": str(RELEASED / file),
        "root": str(tmp_path),
        "roots": {"https://huggingface.co": str(tmp_path)},
    }
    with pytest.raises(MissingData, match=f"{entries} data sets of tune.data are missing") as e:
        read_records([source])
    assert len(e.value.lines) == entries and all(f"'{tmp_path}/" in line for line in e.value.lines)
    content = yaml.safe_load((RELEASED / file).read_text())["datasets"]
    for entry in content:
        path = tmp_path / entry["json_path"].removeprefix("https://huggingface.co/")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = texts(80)
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    shares = {"10%": 8, "2.5%": 2, "1%": 1, "25%": 20, "20%": 16, "all": 80}
    expected = sum(count * shares[name.rpartition(":")[2]] for name, count in strategies.items())
    assert len(read_records([source]).conversations) == expected


@pytest.mark.skipif(not RELEASED.is_dir(), reason="XCOMP_MIXTURES names no folder of released mixtures")
def test_the_released_mixture_comes_apart_into_short_and_long():
    """By the names in docs/tuning.md."""
    guide = (Path(__file__).resolve().parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")
    long = yaml.safe_load(re.search(r"only: (\[\"\*_1_2_m_.*\])", guide)[1])
    counts = {}
    for part in ({}, {"only": long}, {"without": long}):
        with pytest.raises(MissingData) as e:
            read_records([{"mixture": str(RELEASED / "stage3_short-long_mix_sft_mid2.yaml"), "root": "absent", **part}])
        counts[(*part, "full")[0]] = len(e.value.lines)
    assert counts["only"] + counts["without"] == counts["full"] == 84
    told = re.search(r"the long ones \((\d+) of the 84 .* no marked length \((\d+)\)", guide)
    assert [counts["only"], counts["without"]] == [int(told[1]), int(told[2])]

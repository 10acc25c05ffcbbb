"""Subtitle files: what players and the formats' authors read, and what is refused."""

from __future__ import annotations

import json
import math
import re

import pytest

from xcomp.subtitles import Cue, overlapping, read_subtitles, seconds

SRT = """1
00:00:01,000 --> 00:00:02,500
Hello,
<i>you</i> there

2
00:01:00,5 --> 01:00:00.25 X1:40 X2:600
{\\an8}Three is 1 < 2 and "3 > 2"

00:02:00,000 --> 00:02:00,000

4
00:03:00,000 --> 00:03:01,000
one

42

last
"""
SRT_CUES = [
    Cue(1.0, 2.5, "Hello, you there"),
    Cue(60.5, 3600.25, 'Three is 1 < 2 and "3 > 2"'),
    Cue(120.0, 120.0, ""),
    Cue(180.0, 181.0, "one 42 last"),
]
VTT = """WEBVTT - a title
Kind: captions

NOTE 00:00 --> 00:01 is no cue here
either

STYLE
::cue { color: red }

intro
00:01.000 --> 00:02.500 align:start position:0%
<v Bob>Tom &amp; <c.yellow>Jerry</c> &lt;3

01:00:00.000 --> 100:00:00.000
<00:00:01.000>late<i></i>
two

00:05.000 --> 00:06.000
"""
VTT_CUES = [Cue(1.0, 2.5, "Tom & Jerry <3"), Cue(3600.0, 360000.0, "late two"), Cue(5.0, 6.0, "")]


@pytest.fixture
def read(tmp_path):
    def read(name, content, **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_subtitles(path, **options)

    return read


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
@pytest.mark.parametrize("name, text, cues", [("a.srt", SRT, SRT_CUES), ("a.VTT", VTT, VTT_CUES)])
def test_text_files(read, name, text, cues, mark, ends):
    assert read(name, mark + text.replace("\n", ends).encode()) == cues


def test_json_in_both_forms(read):
    first = [{"timestamp": [0, 2.5], "text": "a\nb"}, {"timestamp": [3.0, None], "text": ""}]
    assert read("a.json", json.dumps(first)) == [Cue(0.0, 2.5, "a\nb"), Cue(3.0, math.inf, "")]
    second = [{"start": "0:1:2.5", "end": "1:00:00", "line": "x"}, {"start": "00:00:07.0", "end": 9, "line": "é"}]
    assert read("a.json", json.dumps(second)) == [Cue(62.5, 3600.0, "x"), Cue(7.0, 9.0, "é")]


def test_a_whole_number_may_be_no_end(read):
    cues = json.dumps([{"timestamp": [1.0, 5], "text": "a"}, {"timestamp": [1, 5.0], "text": "b"}])
    assert [cue.end for cue in read("a.json", cues)] == [5.0, 5.0]
    assert [cue.end for cue in read("a.json", cues, whole_ends=False)] == [math.inf, 5.0]


@pytest.mark.parametrize("name, text", [("a.srt", ""), ("a.srt", "\n \n"), ("a.vtt", "WEBVTT"), ("a.json", "[]")])
def test_none_at_all(read, name, text):
    assert read(name, text) == []


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", r"a\.txt' are of an unknown kind; known: \.srt, \.vtt, \.json"),
        ("a.srt", b"\xff\xfe1\x00", r"a\.srt' are not UTF-8 \(invalid start byte at byte 0\)"),
        ("a.srt", "just text", r"a\.srt', line 1: no cue, which has a line like"),
        ("a.srt", "1\n00:00:01 --> soon\nx", r"a\.srt', line 2: '00:00:01 --> soon' is no pair of times"),
        ("a.srt", "1\n00:00:02,0 --> 00:00:01,0\nx", r"a\.srt', line 2: .* ends before it begins"),
        ("a.vtt", "00:01.000 --> 00:02.000\nx", r"a\.vtt', line 1: a WebVTT file must begin with WEBVTT"),
        ("a.vtt", "WEBVTT\n\n1 --> 2\nx", r"a\.vtt', line 3: '1 --> 2' is no pair of times"),
        ("a.json", "[", r"a\.json', not JSON"),
        ("a.json", "{}", r"a\.json', not a list of cues"),
        ("a.json", '[{"text": "x"}]', r"cue 0 \(from 0\): it must have 'timestamp' and 'text', or 'start', 'end'"),
        ("a.json", '[{"timestamp": [1], "text": "x"}]', r"cue 0 .*timestamp is \[1\]; it must be \[start, end\]"),
        (
            "a.json",
            '[{"timestamp": ["a", 1.0], "text": "x"}]',
            "timestamp begins at 'a'; it must be a number of seconds",
        ),
        ("a.json", '[{"timestamp": [2.0, 1.0], "text": "x"}]', "it ends at 1 s, before it begins at 2 s"),
        ("a.json", '[{"start": "x", "end": "1", "line": "x"}]', "'x' is no time like 62.5 or 00:01:02.5"),
        ("a.json", '[{"timestamp": [1.0, 2.0], "text": 5}]', "its text is 5"),
    ],
)
def test_what_cannot_be_read_is_one_line(read, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read(name, content)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no\.srt' cannot be read: No such file"):
        read_subtitles(tmp_path / "no.srt")


@pytest.mark.parametrize(
    "time, expected",
    [("0:05", 5), ("1:02:03", 3723), ("00:01:02,5", 62.5), (" 7 ", 7), ("90.25", 90.25), ("5.", 5), (".5", 0.5)],
)
def test_times(time, expected):
    assert seconds(time) == expected


@pytest.mark.parametrize("time", ["", ".", "-1", "1:", ":5", "1:2:3:4", "1.5:00", "1e2", "nan", "inf", "5 s"])
def test_what_is_no_time(time):
    with pytest.raises(ValueError, match=f"^{re.escape(repr(time))} is no time like"):
        seconds(time)


def test_which_cues_a_span_overlaps():
    cues = [Cue(0, 1, "a"), Cue(1, 2, "b"), Cue(1.5, 1.5, "c"), Cue(2, math.inf, "d"), Cue(3, 3, "e")]
    assert [c.text for c in overlapping(cues)] == ["a", "b", "c", "d", "e"]
    assert [c.text for c in overlapping(cues, 1, 2)] == ["b", "c"]
    assert [c.text for c in overlapping(cues, 2.5, 3)] == ["d"]
    assert [c.text for c in overlapping(cues, 0.5, 1.2)] == ["a", "b"]

"""report.html: sound HTML that holds everything, loads nothing, escapes everything and keeps its bounds."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import ARMS, analysed, make_run

import xcomp
from xcomp.compare import charts, page
from xcomp.compare.analysis import Run, analyse
from xcomp.compare.explain import HEIGHT
from xcomp.compare.page import render_page

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
HOSTILE = "</script><script>alert('$x$')</script><b>\u202eشعر\u2066&amp;"


class Page(HTMLParser):
    """A page taken apart; what is opened must be closed, in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.ids, self.scripts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "wbr":
            self.text.append("\0")
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>"
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text.append(data)

    @property
    def shown(self):
        return " ".join(" ".join(self.text).replace(" \0 ", "").split())

    @property
    def data(self):
        """What the script is given."""
        return json.loads(self.scripts[0])

    def count(self, tag, kind=None):
        classes = [(values.get("class") or "").split() for name, values in self.tags if name == tag]
        return sum(kind is None or kind in given for given in classes)


def render(run, records):
    found = analysed(run, records)
    return render_page(found.summary, found.records)


@pytest.fixture(scope="module")
def question(needle_videos):
    return xcomp.load_benchmark("needle", **needle_videos).questions()[0]


def on_video(run, records, video):
    """The run with frames that the video has, to be read here."""
    run["config"]["decoding"] = {"workers": 0}
    for record in records:
        record |= {"video": video, "frames": record["frames"][:4], "times": record["times"][:4], "duration": 20.0}
    return run, records


def test_everything_is_on_the_page():
    run, records = make_run()
    run["benchmark"] |= {"num_questions": 10, "num_videos": 5, "missing": ["gone.mp4"], "defects": {"no answer": 2}}
    run["arms"][0]["published"] = {"accuracy": 46.2}
    run["config"]["published"] = {"Somebody's model": {"accuracy": 51.3}}
    text = render(run, records)
    found = Page(text)
    assert len(found.ids) == len(set(found.ids))
    for arm in run["arms"]:
        assert arm["name"] in found.shown
    for name in {record["question_id"] for record in records}:
        assert name in found.shown and name in {q["i"] for q in found.data["questions"]}
    for expected in (
        "6 arms compared on 10 questions about 5 videos.", analysed(run, records).summary.verdict, "abc1234",
        "A Very Fast Machine", "torch 2.9.9", "gone.mp4", "no answer 2", "46.2", "64 → 16 → 4", "40.0 (", "+40.0 (",
        "xcomp compare toy.yaml", "seed: 3", "published accuracy", "Somebody's model", "51.3", "What of 1?",
        "(B) blue ✓",
    ):  # fmt: skip
        assert expected in found.shown, expected
    # Five costs; stages as bars for seconds and MACs; a table with bars for the one axis of labels.
    assert found.count("figure", "plot") == 5 + 2 + 1
    assert found.count("table", "labels") == 1


def test_the_page_loads_nothing_from_outside(question):
    run, records = make_run(budgets=(4,))
    found = Page(text := render(*on_video(run, records, question.video)))
    assert "://" not in text and not re.search(r"url\(|@import", text)
    assert not {name for name, _ in found.tags} & {"link", "iframe", "object", "embed", "base", "form"}
    references = [values[key] for _, values in found.tags for key in ("src", "href") if key in values]
    assert {r[:16] for r in references if not r.startswith("#")} == {"data:image/jpeg;"}
    assert {r[1:] for r in references if r.startswith("#")} <= set(found.ids)
    assert len(found.scripts) == 2


def test_hostile_text_stays_text():
    run, records = make_run(budgets=(4,))
    for index, (arm, name) in enumerate((arm, arm["name"]) for arm in run["arms"]):
        arm |= {"name": f"{HOSTILE}{index}", "group": HOSTILE, "selector": f"{HOSTILE}{arm['selector']}"}
        arm["published"] = {HOSTILE: HOSTILE}
        for record in records:
            record["arm"] = arm["name"] if record["arm"] == name else record["arm"]
    for record in records:
        record |= {"category": f"{HOSTILE}{record['category']}", "question_id": f"{HOSTILE}{record['question_id']}"}
        record |= {"question": HOSTILE, "options": [HOSTILE, "x"], "text": HOSTILE, "labels": {HOSTILE: [HOSTILE, "b"]}}
        record |= {"references": [HOSTILE], "video": f"{HOSTILE}{record['video']}"}
    records[0]["error"] = HOSTILE
    run |= {"name": HOSTILE, "git_commit": HOSTILE, "hardware": {HOSTILE: HOSTILE}, "versions": {"x": HOSTILE}}
    run |= {"benchmark": [HOSTILE], "config": {"note": HOSTILE}}
    text = render(run, records)
    found = Page(text)
    assert text.count("<script") == 2 and text.count("</script") == 2 and "<b>\u202e" not in text
    assert found.shown.count("alert('$x$')") > 50
    assert found.data["questions"][0]["q"] == HOSTILE and found.data["arms"][0] == f"{HOSTILE}0"


def test_halves_of_surrogate_pairs_do_not_stop_a_report():
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    records[0]["text"] = "\ud800 broken"
    assert "? broken" in Page(render(run, records)).shown


def test_frames_scores_and_evidence_of_each_choice(question):
    run, records = make_run(budgets=(4,))
    found = Page(render(*on_video(run, records, question.video)))
    # Two methods show the same frames and share a row, in each of ten questions; the third has scores.
    assert found.count("div", "choice") == 20
    assert found.count("path", "curve") == 10 + 2  # and the curves of the tokens
    assert found.count("rect", "event") == 20
    frames = {record["frames"][i] for record in records for i in range(4)}
    pictures = [values for tag, values in found.tags if tag == "image"]
    assert len(pictures) == len(frames)  # each once, though many questions show it
    assert {values["height"] for values in pictures} == {str(HEIGHT)}
    assert "Frames stand under every question, as thumbnails" in found.shown


def test_videos_that_are_gone_leave_ticks_and_a_word():
    found = Page(render(*make_run(budgets=(4,))))
    assert found.count("image") == 0 and found.count("path", "shown") == 20
    assert "without thumbnails. 5 videos could not be read again." in found.shown


def test_one_arm_without_frames_scores_or_events():
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    for record in records:
        record |= {"events": [], "category": "", "scores": None, "frames": [], "times": []}
    found = Page(render(run, records))
    headings = re.findall(r"<h2[^>]*>([^<]*)", render(run, records))
    assert headings == ["Results", "Cost by stage", "Tokens through the layers", "Questions", "Run it again"]
    assert found.count("div", "frames") == 0 and "Frames stand" not in found.shown


def test_nothing_but_errors():
    run, records = make_run(budgets=(4,))
    gone = dict.fromkeys(("times", "frames", "tokens_per_layer", "macs", "seconds", "num_frames", "text", "prediction"))
    failed = [record | gone | {"error": "OSError: no such video", "correct": False, "score": 0.0} for record in records]
    found = Page(render(run, failed))
    assert "Questions that failed to run" in found.shown and "OSError: no such video" in found.shown
    assert {q["m"] for q in found.data["questions"]} == {"eee"}
    assert found.count("figure") == 0


def test_open_questions_show_scores_and_references():
    run, records = make_run(budgets=(4,), methods=ARMS[:2])
    for record in records:
        record |= {"options": [], "answer": None, "references": ["a red cup"], "prediction": None, "text": "a cup"}
        record |= {"score": 0.25, "correct": False, "metrics": {"rouge": 0.25}}
    found = Page(render(run, records))
    assert "Right: a red cup" in found.shown and "partly right 0.25" in found.shown
    assert found.data["questions"][0]["s"] == [0.25, 0.25] and found.data["questions"][0]["m"] == "pp"


def test_a_question_without_a_right_option_says_so():
    run, records = make_run(budgets=(4,), methods=ARMS[:1])
    for record in records:
        record |= {"answer": None, "correct": False, "score": 0.0}
    assert "None of the options is right." in Page(render(run, records)).shown


def test_every_axis_of_labels_has_its_table():
    run, records = make_run(budgets=(4,))
    for number, record in enumerate(records):
        record["labels"] = {"task_type": [f"task {number % 40}"], "duration": [["short", "long"][number % 2]]}
    found = Page(render(run, records))
    assert found.count("table", "labels") == 2
    assert "task type: task 7" in found.shown and "duration: long" in found.shown


def test_forty_arms():
    methods = [(f"selector {n}", "lp_comp") for n in range(40)]
    run, records = make_run(budgets=(4,), methods=methods, videos=3)
    found = Page(render(run, records))
    assert len(found.data["arms"]) == 40 and "40 arms" in found.shown
    looks = {(view.colour, view.marker) for view in page._views(analysed(run, records).summary).values()}
    assert len(looks) == 40  # each told from all others


def test_seeds_stand_in_the_table_and_as_one():
    run, records = make_run(budgets=(4,), methods=ARMS[:1] * 2 + ARMS[1:2])
    for seed, arm in enumerate(run["arms"][:2], start=7):
        arm |= {"name": f"uniform s{seed}", "seed": seed}
    for place, record in enumerate(records[:20]):
        record["arm"] = run["arms"][place // 10]["name"]
    found = Page(render(run, records))
    assert "Arms with several seeds, as one" in found.shown and "7, 8" in found.shown
    assert found.count("figure") == 8 and "seed" in [text.strip() for text in found.text]


def test_seconds_of_different_machines_stand_apart():
    runs = []
    for name in ("slow", "fast"):
        run, records = make_run(budgets=(4,))
        runs.append(Run(Path(name), run | {"name": name, "hardware": {"name": f"a {name} one"}}, records))
    found = analyse(runs)
    shown = Page(render_page(found.summary, found.records)).shown
    assert "s alone (shared)" not in shown and "against seconds" not in shown
    for name in ("slow", "fast"):
        assert f"seconds a question, alone on a fresh video ({name})" in shown and f"a {name} one" in shown
    assert "are not put beside each other" in shown


def test_a_large_run_keeps_its_bounds_and_says_so():
    run, records = make_run(budgets=(4,), methods=ARMS, videos=2500)
    for record in records:
        record |= {"question": f"{record['question_id']}: {'why ' * 120}?", "category": ""}
    found = analysed(run, records)
    started = time.monotonic()
    text = render_page(found.summary, found.records)
    assert time.monotonic() - started < 30
    data = Page(text).data
    listed = len(data["questions"])
    assert 2000 < listed < 5000
    assert f"The page lists the {listed:,} of 5,000 questions on which arms disagree most" in text
    assert len(text.encode()) < page.LISTED_BYTES + page.DETAILED_BYTES + page.PICTURE_BYTES
    marks = [question["m"] for question in data["questions"]]
    assert marks[0] in ("001", "011") and marks.count("111") < 5  # those all got right are left out first


def test_thumbnails_keep_their_bound(question, monkeypatch):
    monkeypatch.setattr(page, "PICTURE_BYTES", 20_000)
    run, records = make_run(budgets=(8,), videos=3)
    run["config"]["decoding"] = {"workers": 0}
    for record in records:
        shift = int(record["question_id"][1]) + 3 * int(record["question_id"][-1])
        record |= {"video": question.video, "frames": [shift + n for n in range(8)], "times": [n / 8 for n in range(8)]}
    text = render(run, records)
    sizes = [len(values["href"]) for tag, values in Page(text).tags if tag == "image"]
    assert sizes and sum(sizes) <= 20_000
    assert re.search(r"as thumbnails \(at most \d+ a row\) under [1-5] of them", text)


# --- where the marks of a chart go ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0.02, 0.13), (0, 13), (23, 100), (86.1, 100), (1, 1), (0, 0), (1e9, 3e9), (-73.8, 14.2)]
)
def test_ticks_are_round_and_evenly_spaced(low, high):
    steps = charts.round_steps(low, high)
    gaps = [b - a for a, b in zip(steps, steps[1:])]
    assert 2 <= len(steps) <= 6 and steps[0] <= low and steps[-1] >= high
    assert max(gaps) == pytest.approx(min(gaps))
    assert f"{gaps[0]:.0e}"[0] in "125"


def test_a_cost_over_magnitudes_has_a_logarithmic_axis():
    axis = charts.spread([4, 8, 16, 32], str)
    assert axis.log and [tick.label for tick in axis.ticks] == ["4", "8", "16", "32"]
    places = [axis.place(value) for value in (4, 8, 16, 32)]
    assert [b - a for a, b in zip(places, places[1:])] == pytest.approx([places[1] - places[0]] * 3, abs=0.02)
    assert not charts.spread([10, 20], str).log and charts.spread([10, 20], str).low == 0
    assert [tick.label for tick in charts.spread([0.173, 0.9, 3.0], lambda v: f"{v:g}").ticks] == [
        "0.2",
        "0.5",
        "1",
        "2",
    ]


def test_points_of_one_cost_stand_side_by_side():
    x, y = charts.spread([4, 32], str), charts.linear([0, 100], str)
    placed = charts.points([(n, 32, 50, 40, 60) for n in range(5)] + [(5, 4, 50, 40, 60)], x, y)
    lefts = [point.x for point in placed[:5]]
    gaps = [b - a for a, b in zip(lefts, lefts[1:])]
    assert min(gaps) == pytest.approx(max(gaps)) and min(gaps) > 1
    assert sum(lefts) / 5 == pytest.approx(x.place(32), abs=0.01)
    assert placed[5].x == x.place(4) and (placed[5].high, placed[5].y, placed[5].low) == (40, 50, 60)

"""xcomp in lmms-eval: its requests, as a stand-in of the interface makes them, and where it is installed, itself."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import yaml

import xcomp
from xcomp.answering import Query
from xcomp.config import ConfigError, Generation
from xcomp.video import VideoError

INSTALLED = importlib.util.find_spec("lmms_eval") is not None


class Lmms:
    """What is used of lmms_eval.api.model.lmms."""

    rank = 0

    def __init__(self):
        self.task_dict = {}


@dataclass
class GenerationResult:
    text: object


@dataclass
class Request:
    """What is used of lmms_eval.api.instance.Instance."""

    args: tuple
    task_name: str = "mini"
    doc_id: int = 0
    seen: list = field(default_factory=list)


@pytest.fixture
def adapter(monkeypatch):
    """The module, with a stand-in for lmms-eval."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.instance", "lmms_eval.models")
    modules = {name: ModuleType(name) for name in (*names, "lmms_eval.models.registry_v2")}
    modules["lmms_eval.api.model"].lmms = Lmms
    modules["lmms_eval.api"].instance = modules["lmms_eval.api.instance"]
    modules["lmms_eval.api.instance"].GenerationResult = GenerationResult
    modules["lmms_eval.models.registry_v2"].ModelManifest = lambda name, **paths: {"name": name, **paths}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "xcomp.lmms_eval", raising=False)
    yield importlib.import_module("xcomp.lmms_eval")
    sys.modules.pop("xcomp.lmms_eval", None)
    vars(xcomp).pop("lmms_eval", None)


@pytest.fixture
def place(tmp_path, tiny_run):
    tiny_run |= {"frames": 4, "generation": {"max_new_tokens": 3}, "benchmark": {"name": "nothing_of_this_name"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_run))
    return str(tmp_path / "run.yaml")


@pytest.fixture(scope="module")
def documents(needle_videos):
    questions = xcomp.load_benchmark("needle", **needle_videos).questions()
    return [{"video": q.video, "question": q.question, "options": list(q.options)} for q in questions[:6]]


@pytest.fixture
def make(adapter, place, documents):
    def make(simple=False, **options):
        model = (adapter.XCompSimple if simple else adapter.XComp)(config=place, **options)
        model.task_dict = {"mini": {"test": documents}}
        return model

    return make


def message(document, *, text=None, **more):
    content = [
        {"type": "video", "url": document["video"], **more},
        {"type": "text", "text": text or document["question"]},
    ]
    return [{"role": "user", "content": content}]


def chat(number, options=None, messages=message, **more):
    return Request(("context", messages, options or {}, number, "mini", "test"), doc_id=number, **more)


def simple(number, options=None, visuals=lambda document: [document["video"]], context="Where?"):
    return Request((context, options or {}, visuals, number, "mini", "test"), doc_id=number)


def score(number, continuation, visuals=lambda document: [document["video"]], context="Where?"):
    return Request((context, continuation, visuals, number, "mini", "test"), doc_id=number)


def test_the_entry_point_names_both_classes(adapter):
    manifest = adapter.manifest()
    assert manifest.pop("name") == "xcomp"
    classes = [
        getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in manifest.values()
    ]
    assert {c.is_simple for c in classes} == {True, False} and all(issubclass(c, Lmms) for c in classes)


def test_answers_are_those_of_the_model_and_videos_are_read_once(make, documents, monkeypatch):
    model, opened, open_video = make(batch_size=2), [], xcomp.VideoQA.open
    monkeypatch.setattr(xcomp.VideoQA, "open", lambda self, *a: (opened.append(a[0]), open_video(self, *a))[1])
    order = [3, 0, 5, 1, 4, 2]
    answers = model.generate_until([chat(number) for number in order])
    assert len(opened) == len({document["video"] for document in documents}) < len(documents)
    asked = [Query(documents[n]["video"], documents[n]["question"], documents[n]["question"]) for n in order]
    assert answers == [answer.text for answer in model.model.answer(asked)]
    assert model.model.answerer.batch_size == 2 and model.config.benchmark is None
    assert make(simple=True).generate_until([simple(n, context=documents[n]["question"]) for n in order]) == answers


def test_generation_options_of_each_request(make):
    model = make()
    texts = model.generate_until([chat(0), chat(0, {"max_new_tokens": 9}), chat(0, {"max_new_tokens": 9, "until": []})])
    short, long, same = texts
    assert long.startswith(short) and len(long) > len(short) and long == same
    end = long[2:4]
    assert model.generate_until([chat(0, {"max_new_tokens": 9, "until": end})]) == [long[: long.index(end)]]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, Generation(max_new_tokens=128)),
        ({"max_new_tokens": 7, "temperature": 0, "top_p": 0, "do_sample": False}, Generation(max_new_tokens=7)),
        ({"temperature": 0, "do_sample": True, "top_k": 5}, Generation(max_new_tokens=128)),
        ({"temperature": 0.5}, Generation(max_new_tokens=128, temperature=0.5, do_sample=True)),
        ({"temperature": 0.5, "do_sample": False, "num_beams": 2}, Generation(max_new_tokens=128, num_beams=2)),
        ({"top_p": None, "temperature": None, "num_beams": None}, Generation(max_new_tokens=128)),
    ],
)
def test_generation_options(adapter, options, expected):
    assert adapter.writing_of(options, Generation(), "task mini").generation == expected


def test_what_the_configuration_says_holds_where_a_task_says_nothing(adapter):
    usual = Generation(max_new_tokens=5, repetition_penalty=1.1)
    written = adapter.writing_of({"num_beams": 3, "until": "\n\n"}, usual, "task mini")
    assert written.generation == Generation(max_new_tokens=5, repetition_penalty=1.1, num_beams=3)
    assert written.cut("a\nb\n\nc") == "a\nb" and adapter.writing_of({"until": ["c", "b"]}, usual, "").cut("abc") == "a"


@pytest.mark.parametrize(
    "options, error",
    [
        ({"max_new_token": 4}, "task mini: generation' has no key 'max_new_token'; did you mean 'max_new_tokens'?"),
        ({"image_aspect_ratio": "pad"}, "no key 'image_aspect_ratio'"),
        ({"mode": "loglikelihood"}, "generation.mode is 'loglikelihood', but the task has its answers written"),
        ({"num_beams": 0}, "generation.num_beams is 0; it must be at least 1"),
        ({"until": [3]}, r"until is \(3,\); it must be texts"),
        ({"until": ""}, "it must be texts"),
    ],
)
def test_generation_options_that_are_refused(adapter, options, error):
    with pytest.raises(ConfigError, match=error):
        adapter.writing_of(options, Generation(), "task mini")


VIDEO = {"type": "video", "url": "a.mp4"}
TEXT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    "messages, error",
    [
        ([{"role": "user", "content": [TEXT]}], "no videos; xcomp answers a question about one"),
        ([{"role": "user", "content": [VIDEO, VIDEO, TEXT]}], "2 videos; xcomp answers a question about one"),
        ([{"role": "user", "content": [TEXT, VIDEO]}], "text stands before the video; xcomp shows the video first"),
        ([{"role": "user", "content": [{"type": "image", "url": "a.png"}, TEXT]}], "a visual of type 'image'"),
        ([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}, TEXT]}], "a visual of type 'audio'"),
        (
            [{"role": "system", "content": "Be."}, {"role": "user", "content": [VIDEO]}],
            r"messages of \['system', 'user'\]",
        ),
        ([{"role": "user", "content": [{**VIDEO, "fps": 2}]}], "a video has no key 'fps'"),
        (
            [{"role": "user", "content": [{**VIDEO, "start_time": 2}]}],
            "needs both its start and its end; it has 2 and None",
        ),
        ([{"role": "user", "content": [{"type": "video", "url": "https://a/b.mp4"}]}], "is no local file"),
        ([{"role": "user", "content": [{"type": "video", "url": [1, 2]}]}], "a visual is a builtins list"),
        (["What?"], r"messages of \[None\]"),
    ],
)
def test_messages_that_are_refused(adapter, messages, error):
    with pytest.raises(adapter.RequestError, match=error) as raised:
        adapter.asked_by_messages(messages, "task mini, document 3")
    assert str(raised.value).startswith("task mini, document 3: ")


def test_messages_that_are_read(adapter):
    for url in ("a.mp4", "file://a.mp4", {"path": "a.mp4", "video_start": 1, "video_end": 2.5}):
        content = [{"type": "video", "url": url}, TEXT, {"type": "text", "text": " Why?"}]
        asked = adapter.asked_by_messages([{"role": "user", "content": content}], "here")
        assert asked == adapter.Asked("a.mp4", "What? Why?", (1.0, 2.5) if isinstance(url, dict) else None)
    spanned = adapter.asked_by_messages(message({"video": "a.mp4"}, text="What?", start_time=3, end_time=4), "here")
    assert spanned.span == (3.0, 4.0)
    assert adapter.asked_by_messages([{"role": "user", "content": "And?"}], "here", spanned).video == "a.mp4"


@pytest.mark.parametrize(
    "visuals, error",
    [
        (None, "no videos"),
        ([], "no videos"),
        (["a.mp4", "b.mp4"], "2 videos"),
        (["a.PNG"], "'a.PNG' is an image"),
        ([3], "a visual is a builtins int"),
    ],
)
def test_visuals_that_are_refused(adapter, visuals, error):
    with pytest.raises(adapter.RequestError, match=error):
        adapter.asked_simply("What?", visuals, "task mini, document 3")
    assert adapter.asked_simply("What?", "a.mp4", "here") == adapter.Asked("a.mp4", "What?")


@pytest.mark.parametrize("is_simple", [False, True])
def test_continuations_are_scored_behind_one_pass(make, documents, is_simple, monkeypatch):
    model, passes, prefill_video = make(simple=is_simple), [], xcomp.Decoder.prefill_video
    monkeypatch.setattr(
        xcomp.Decoder, "prefill_video", lambda *a, **more: (passes.append(1), prefill_video(*a, **more))[1]
    )
    requests = [score(n, text, context=context) for n in (0, 1) for context in ("What?", "Where?") for text in "AB"]
    losses = model.loglikelihood([*requests, score(0, lambda document: "A", context="What?")])
    videos = {documents[n]["video"] for n in (0, 1)}
    assert len(passes) == len(videos)
    (first, second), *_ = expected = [
        model.model.answerer.score(opened, [Query(opened.path, c, c) for c in ("What?", "Where?")], ["AB", "AB"])
        for n in (0, 1)
        for opened in [model.model.open(documents[n]["video"]).__enter__()]
    ]
    flat = [scored for outcome in expected for scores in outcome for scored in scores]
    assert losses[:-1] == [(-s.logprob, s.greedy) for s in flat]  # the least is the most likely
    assert losses[-1] == (first[0].logprob, first[0].greedy) and first != second


def test_a_score_reaches_a_task_as_it_is(make, adapter, monkeypatch):
    instance = sys.modules["lmms_eval.api.instance"]
    unwrap = lambda x: (x.text, None) if isinstance(x, GenerationResult) else (str(x), None)  # noqa: E731, as 0.7 has it
    monkeypatch.setattr(instance, "unwrap_generation_output", unwrap, raising=False)
    (found,) = make().loglikelihood([score(0, "A")])
    value, greedy = unwrap(found)[0]
    assert value > 0 and isinstance(greedy, bool)


def test_continuations_that_are_refused(make, adapter):
    with pytest.raises(adapter.RequestError, match="document 0: a continuation without a video"):
        make().loglikelihood([Request(("", "A"))])
    with pytest.raises(adapter.RequestError, match="the continuation is 3; it must be a text"):
        make().loglikelihood([score(0, lambda document: 3)])


def rounds(document, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    """A task of two rounds for even documents and three for others; the last shows nothing."""
    if round_idx == (2 if document["even"] else 3):
        return None, None, True, previous_output, None
    shown = [document["video"]] if round_idx == 1 else None
    return shown, f"{round_idx} {previous_output[-1]} {previous_round_info}", False, previous_output, round_idx


def chat_rounds(document, round_idx=None, previous_output=None, previous_round_info=None):
    if round_idx is None:
        return message(document)
    shown, text, over, *handed = rounds(document, None, round_idx, previous_output, previous_round_info)
    content = [{"type": "video", "url": v} for v in shown or ()] + [{"type": "text", "text": text}]
    return (None if over else [{"role": "user", "content": content}], over, *handed)


@pytest.mark.parametrize("is_simple", [False, True])
def test_rounds(make, documents, is_simple):
    model = make(simple=is_simple)
    docs = [{**document, "even": n % 2 == 0} for n, document in enumerate(documents)]
    model.task_dict["mini"]["test"] = docs
    requests = []
    for n in (0, 1, 4):
        more = (lambda d: [d["video"]], rounds) if is_simple else ()
        first = (docs[n]["question"], {}, *more) if is_simple else ("context", chat_rounds, {})
        requests.append(Request((*first, n, "mini", "test"), doc_id=n))
    found = model.generate_until_multi_round(requests)
    assert [len(answers) for answers in found] == [2, 3, 2]
    for n, answers in zip((0, 1, 4), found):
        texts = [docs[n]["question"], f"1 {answers[0]} None", f"2 {answers[1]} 1"][: len(answers)]
        alone = [model.model.answer([Query(docs[n]["video"], text, text)])[0].text for text in texts]
        assert answers == alone


def test_a_round_of_another_form_is_refused(make, adapter):
    request = chat(0, messages=lambda document, **_: message(document))
    with pytest.raises(adapter.RequestError, match="document 0, round 2: the task gives list in place of a round"):
        make().generate_until_multi_round([request])


def test_a_video_that_cannot_be_read(make, adapter, caplog):
    requests = [chat(0), chat(1, messages=lambda document: message({"video": "gone.mp4"}, text="What?"))]
    with pytest.raises(adapter.RequestError, match="task mini, document 1: gone.mp4: no such file"):
        make().generate_until(requests)
    model = make(errors="empty")
    good, bad = model.generate_until(requests)
    assert good and bad == "" and "document 1: gone.mp4" in caplog.text
    gone = score(1, "A", visuals=lambda document: ["gone.mp4"])
    assert [v for v, _ in model.loglikelihood([score(0, "A"), gone])][1] == float("inf")
    with pytest.raises(adapter.RequestError, match="gone.mp4") as raised:
        make().loglikelihood([gone])
    assert isinstance(raised.value.__cause__, VideoError)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"config": None}, "names no configuration; give config=FILE.yaml"),
        ({"config": "asc"}, "config 'asc' does not exist; did you mean 'ask'?"),
        ({"frmes": 8}, "has no key 'frmes'; did you mean 'frames'?"),
        ({"errors": "rais"}, "errors is 'rais'; did you mean 'raise'?"),
        ({"batch_size": "auto"}, "--batch_size is 'auto'; it must be a number"),
        ({"max_batch_size": 4}, "--max_batch_size is for --batch_size auto"),
        ({"config": "demo"}, "config 'demo' has .* arms; lmms-eval runs one model"),
        ({"frames": 6}, "6 frames does not divide"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
    ],
)
def test_arguments_that_are_refused(make, place, adapter, options, error):
    with pytest.raises(ValueError, match=error):
        adapter.XComp(**{"config": place, **options})


def test_arguments(adapter, place, monkeypatch):
    given = {"frames": 8, "sampling.rate": 1.5, "compressor": "{name: lp_comp, end: 2}", "batch_size": "3"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    config = adapter.read_config(place, given.pop("batch_size"), None, "cuda", given)
    assert (config.frames, config.sampling.rate, config.batch_size) == (8, 1.5, 3)
    assert config.compressor == {"name": "lp_comp", "end": 2} and config.backbone["device"] == "cuda:1"


# --- lmms-eval itself -------------------------------------------------------------------------------------------------

UTILS = """
def doc_to_visual(doc):
    return [doc["video"]]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + lmms_eval_specific_kwargs["post_prompt"]

def process_results(doc, results):
    return {"said": results[0]}

def listed(results):
    print("SAID", results)
    return float(len(results))
"""


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
@pytest.mark.parametrize("output_type", ["generate_until", "multiple_choice"])
def test_lmms_eval_runs_a_task(tmp_path, place, documents, output_type):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({**d, "gold": 0}) + "\n" for d in documents))
    task = {
        "task": "mini",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": output_type,
        "lmms_eval_specific_kwargs": {"default": {"post_prompt": " default"}, "xcomp": {"post_prompt": " ours"}},
        "metadata": [{"version": 0.0}],
    }
    functions = "doc_to_visual: !function utils.doc_to_visual\ndoc_to_text: !function utils.doc_to_text\n"
    if output_type == "generate_until":
        task |= {"doc_to_target": "question", "generation_kwargs": {"max_new_tokens": 3, "temperature": 0}}
        functions += "process_results: !function utils.process_results\nmetric_list:\n"
        functions += "  - {metric: said, aggregation: !function utils.listed, higher_is_better: true}\n"
    else:
        task |= {"doc_to_choice": "options", "doc_to_target": "gold", "target_delimiter": ""}
        task["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(task) + functions)
    (tmp_path / "utils.py").write_text(UTILS)
    command = [sys.executable, "-m", "lmms_eval", "eval", "--model", "xcomp", "--model_args", f"config={place}"]
    command += ["--tasks", "mini", "--include_path", str(tmp_path)]
    command += ["--log_samples", "--output_path", str(tmp_path / "out")]
    command += ["--force_simple"] if output_type == "multiple_choice" else []
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "|mini" in done.stdout, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("*_samples_mini.jsonl")
    rows = sorted((json.loads(line) for line in samples.open()), key=lambda row: row["doc_id"])
    model = xcomp.VideoQA.from_config(xcomp.load_config(place, ["benchmark=null"])).eval()
    for row, document in zip(rows, documents, strict=True):
        text = f"{document['question']} ours"
        query = Query(document["video"], text, text)
        if output_type == "generate_until":
            assert row["filtered_resps"] == model.answer([query])[0].text
        else:
            with model.open(document["video"]) as opened:
                (scores,) = model.answerer.score(opened, [query], [document["options"]])
            best = max(range(len(scores)), key=lambda i: scores[i].logprob)
            assert row["acc"] == float(best == 0)

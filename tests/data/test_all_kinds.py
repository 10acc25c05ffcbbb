"""A mixture of records of every kind: frames, ids and labels of each, written out, and a training on all of them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn.functional import cross_entropy
from tuning_runs import logged, same, weights

import xcomp
from xcomp.cli import main
from xcomp.compressor import Compressor
from xcomp.config import parse_config
from xcomp.data.module import ConversationData
from xcomp.data.records import IGNORED
from xcomp.model import VideoQA
from xcomp.video import Video, VideoError


def turns(*texts):
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]}


def picture(path, seed, size=(40, 30)):
    noise = np.random.default_rng(seed).integers(0, 255, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


@pytest.fixture
def video(needle_videos):
    """Of four seconds, 8 frames a second."""
    return xcomp.load_benchmark("needle", split="train", **needle_videos).training_records(("describe",))[0]["video"]


@pytest.fixture
def mixture(tmp_path, video):
    """The file of a mixture, and its root: a data set for each kind of record."""
    for i, name in enumerate(("a.png", "b.png", "c.jpg")):
        picture(tmp_path / "pictures" / name, i)
    for i in range(20):
        picture(tmp_path / "folders" / "walk" / f"walk_{i + 1}.jpg", 10 + i)
    frames = [picture(tmp_path / "x.png", 40 + i) for i in range(9)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    human = {"role": "user", "content": "Look: <video>"}
    records = {
        "videos": [
            {"video": video, **turns("<image>\nWhat is it?", "A cross.")},
            {"video": video, "start": 1.0, "end": 3.5, **turns("<image>\nWhat is it?", "A\nring.", "Sure? ", "Yes.")},
            {"video": video, "messages": [human, {"role": "assistant", "content": "red"}]},
        ],
        "folders": [
            {"video": "walk", **turns("<video>\nWho?", "I.")},
            {"video": "walk", "start": 2.0, "end": 15.0, **turns("<video>\nWho?", "I.")},
        ],
        "gifs": [{"video": "moving.gif", **turns("<image>Who?", "You.")}],
        "pictures": [
            {"image": "a.png", **turns("What?<image>", "Noise.")},
            {"image": ["a.png", "b.png", "c.png"], **turns("One <image>\ntwo<image>, <image> three?", "No.", "Q", "A")},
        ],
        "text": [turns("What is red?", "A colour."), turns("1?", "2.", "3?", "4.")],
    }
    entries = []
    for name, rows in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        root = {"folders": {"data_root": "folders", "video_read_type": "img"}, "pictures": {"data_root": "pictures"}}
        entries.append({"json_path": f"{name}.json", **root.get(name, {})})
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    return {"mixture": str(tmp_path / "mixture.yaml"), "root": str(tmp_path)}


SAMPLING = {"rate": 4, "min_frames": 4, "max_frames": 12, "multiple": 4, "style": "xcomp_training"}


def slow_rule(num_frames, fps, first=0):
    """Frames in the middle of equal parts of a span, of which there are 4, 8 or 12, 4 a second."""
    count = min(12, 4 * max(1, int(4 * num_frames / fps // 4)), num_frames // 4 * 4)
    bounds = [int(i * num_frames / count) for i in range(count + 1)]
    return [first + (a + b - 1) // 2 for a, b in zip(bounds, bounds[1:])]


@pytest.fixture
def backbone(tiny_checkpoint):
    return xcomp.load_backbone("videochat_flash", checkpoint=str(tiny_checkpoint))


@pytest.fixture
def samples(mixture, backbone, tmp_path):
    """All samples of the mixture, in either format of text."""

    def make(format):
        tune = {"data": [mixture], "format": format}
        data = ConversationData(parse_config({"output": str(tmp_path), "sampling": SAMPLING, "tune": tune}, "x"))
        data.attach(backbone, Compressor(None))
        return [data.datasets["train"][i] for i in range(10)]

    return make


def seconds(number, frames):
    return f"The video lasts for {number:.2f} seconds, and {frames} frames are uniformly sampled from it."


PICTURE = None  # stands where visual tokens do
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
# Of each sample the user's first turn up to the question's end, as the released training has it, in pieces that
# are split into tokens one by one; and what follows it, in turns.
FIRST = [
    (PICTURE, f"\n{seconds(4, 12)} \nWhat is it?"),
    (PICTURE, f"\n{seconds(2.5, 8)} \nWhat is it?"),
    (PICTURE, f"\n{seconds(4, 12)} \nLook:"),
    (PICTURE, f"\n{seconds(20, 12)} \nWho?"),
    (PICTURE, f"\n{seconds(13, 12)} \nWho?"),
    (PICTURE, f"\n{seconds(9, 8)} Who?"),
    (PICTURE, "\nWhat?"),
    ("One ", PICTURE, "\ntwo", PICTURE, ", ", PICTURE, " three?"),
    ("What is red?",),
    ("1?",),
]
FURTHER = [["A cross."], ["A\nring.", "Sure? ", "Yes."], ["red"], ["I."], ["I."], ["You."], ["Noise."]]
FURTHER += [["No.", "Q", "A"], ["A colour."], ["2.", "3?", "4."]]


def released(tokenizer, first, further):
    """Ids and labels of the released training, in the pieces between pictures."""
    special = {tokenizer(text)["input_ids"][0] for text in ("<|im_start|>", "<|im_end|>", "\n")}
    pieces = [[SYSTEM, False]]
    user = "<|im_start|>user\n"
    for text in first:
        if text is PICTURE:
            pieces += [[user, False], [PICTURE, None]] if user else [[PICTURE, None]]
            user = ""
        else:
            pieces.append([user + text, False])
            user = ""
    pieces[-1][0] += "<|im_end|>\n"
    for number, text in enumerate(further):
        role = "user" if number % 2 else "assistant"
        pieces.append([f"<|im_start|>{role}\n{text}<|im_end|>\n", not number % 2])
    parts = [([], [])]
    for text, answer in pieces:
        if text is PICTURE:
            parts.append(([], []))
            continue
        ids = tokenizer(text)["input_ids"]
        parts[-1][0].extend(ids)
        parts[-1][1].extend(i if answer or i in special else IGNORED for i in ids)
    parts[0][1][0] = IGNORED
    return parts


def asked(tokenizer, first, further):
    """Ids and labels where text is as questions are asked, with answers and the token after each supervised."""
    parts = [(tokenizer(f"{SYSTEM}<|im_start|>user\n")["input_ids"], [])]
    for text in first:
        if text is PICTURE:
            parts.append(([], []))
        else:
            parts[-1][0].extend(tokenizer(text.replace("it. \n", "it. "))["input_ids"])
    (stop,) = tokenizer("<|im_end|>")["input_ids"]
    header = "<|im_end|>\n<|im_start|>assistant\n"
    parts[-1][0].extend(tokenizer(header)["input_ids"])
    for ids, labels in parts:
        labels.extend([IGNORED] * len(ids))
    for number, text in enumerate(further):
        ids = tokenizer(f"\n<|im_start|>user\n{text.strip()}{header}" if number % 2 else text)["input_ids"]
        parts[-1][0].extend(ids if number % 2 else [*ids, stop])
        parts[-1][1].extend([IGNORED] * len(ids) if number % 2 else [*ids, stop])
    return parts


@pytest.mark.parametrize("format, written", [("released", released), ("answers", asked)])
def test_ids_and_labels_of_every_kind(samples, backbone, format, written):
    for sample, first, further in zip(samples(format), FIRST, FURTHER, strict=True):
        parts = written(backbone.tokenizer, first, further)
        if len(parts) == 1:  # text alone may be cut anywhere
            parts = [([], []), *parts] if format == "answers" else [([], []), *parts]
            got = torch.cat([sample.text.prefix_ids, sample.text.suffix_ids]).tolist()
            known = torch.full_like(sample.text.prefix_ids, IGNORED)
            known = known if sample.text.prefix_labels is None else sample.text.prefix_labels
            assert got == parts[1][0] and torch.cat([known, sample.text.labels]).tolist() == parts[1][1]
            continue
        assert sample.text.prefix_ids.tolist() == parts[0][0]
        if format == "released":
            assert sample.text.prefix_labels.tolist() == parts[0][1]
        assert (sample.text.suffix_ids.tolist(), sample.text.labels.tolist()) == parts[-1]
        between = [] if sample.text.frame_texts is None else sample.text.frame_texts
        assert [text.behind.tolist() for text in between[:-1]] == [ids for ids, _ in parts[1:-1]]
        assert all(not len(text.before) for text in between) and not any(len(text.behind) for text in between[-1:])
        if format == "released":  # the prompt ends with the assistant's header
            header = backbone.tokenizer("<|im_start|>assistant\n")["input_ids"]
            end = sample.text.prompt_length
            assert sample.text.suffix_ids[end - len(header) : end].tolist() == header
            answer = backbone.tokenizer(further[0])["input_ids"]
            assert sample.text.suffix_ids[end : end + len(answer)].tolist() == answer


def test_frames_of_every_kind(samples, backbone, video, tmp_path):
    def resized(path, indices):
        with Video(path) as opened:
            return backbone.pixel_format.resize(opened.frames(indices))

    def pictures(*names):
        images = [np.array(Image.open(tmp_path / "pictures" / name).convert("RGB")) for name in names]
        return torch.cat([backbone.pixel_format.resize(torch.from_numpy(image)[None]) for image in images])

    walk = tmp_path / "folders" / "walk"
    expected = [
        resized(video, slow_rule(32, 8)),
        resized(video, slow_rule(20, 8, first=8)),
        resized(video, slow_rule(32, 8)),
        resized(walk, slow_rule(20, 1)),
        resized(walk, slow_rule(13, 1, first=2)),
        resized(tmp_path / "moving.gif", slow_rule(9, 1)),
        pictures("a.png"),
        pictures("a.png", "b.png", "c.jpg"),  # in place of the .png that is not there
        None,
        None,
    ]
    for sample, frames in zip(samples("answers"), expected, strict=True):
        assert (frames is None and sample.pixels is None) or torch.equal(sample.pixels, frames)


def test_a_span_of_a_folder_is_read_a_frame_a_second(samples, tmp_path, backbone):
    """However many a second the rule takes elsewhere: 13 seconds are 12 frames, in fours."""
    assert [len(sample.pixels) for sample in samples("answers")[3:5]] == [12, 12]
    tune = {"data": [{"records": str(tmp_path / "folders.json"), "root": str(tmp_path / "folders")}]}
    sampling = {**SAMPLING, "max_frames": 8, "rate": 0.5}
    data = ConversationData(parse_config({"output": str(tmp_path), "sampling": sampling, "tune": tune}, "x"))
    data.attach(backbone, Compressor(None))
    assert [len(data.datasets["train"][i].pixels) for i in range(2)] == [8, 8]


def test_a_folders_length_may_be_told_beside_it(samples, tmp_path, backbone):
    (tmp_path / "folders" / "walk.json").write_text('{"duration": 61.5}')
    sample = samples("answers")[3]
    assert seconds(61.5, 12) in backbone.tokenizer.decode(sample.text.suffix_ids)
    (tmp_path / "folders" / "walk.json").write_text('{"length": 61.5}')
    with pytest.raises(VideoError, match="walk.json: it holds no 'duration' in seconds"):
        samples("answers")


def slow_loss(model, sample):
    """One sample's loss, token by token, from the logits everywhere and without a compressor: summed, and its count."""
    backbone, text = model.backbone, sample.text
    pieces = [backbone.embed(text.prefix_ids)]
    labels = [torch.full_like(text.prefix_ids, IGNORED) if text.prefix_labels is None else text.prefix_labels]
    if sample.pixels is not None:
        pixels = backbone.pixel_format.normalise(sample.pixels)
        frames = backbone.encode_images(pixels) if sample.images else backbone.encode(pixels)
        for i, frame in enumerate(frames):
            behind = text.frame_texts[i].behind if text.frame_texts else text.prefix_ids[:0]
            pieces += [frame, backbone.embed(behind)]
            labels.append(torch.full((len(frame) + len(behind),), IGNORED))
    pieces.append(backbone.embed(text.suffix_ids))
    labels.append(text.labels)
    hidden = backbone.language_model(inputs_embeds=torch.cat(pieces)[None]).last_hidden_state[0]
    logits, labels = backbone.lm_head(hidden)[:-1], torch.cat(labels)[1:]
    return cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), int((labels != IGNORED).sum())


@pytest.mark.parametrize("format", ["answers", "released"])
def test_the_loss_of_a_batch_of_every_kind(samples, backbone, format):
    """All in one batch, pictures and text beside videos; each token is predicted by the one before it."""
    batch, model = samples(format), VideoQA(backbone.eval(), sampling=None)
    with torch.no_grad():
        losses, counts = zip(*(slow_loss(model, sample) for sample in batch))
        assert counts == tuple(sample.text.num_labels for sample in batch)
        torch.testing.assert_close(model._loss(batch)[0], sum(losses) / sum(counts), rtol=1e-4, atol=0)


@pytest.mark.parametrize("compressor", ["lp_comp", {"name": "fastv", "layer": 1}, "tome"])
def test_a_mixture_of_every_kind_trains(mixture, tiny_run, tmp_path, compressor):
    """Whatever compresses, however its samples are batched, and to the same bits with a process that reads ahead."""
    tune = {"data": [mixture], "steps": 6, "batch_size": 3, "learning_rate": 1e-3, "format": "released"}
    content = {**tiny_run, "sampling": SAMPLING, "compressor": compressor}
    content["trainer"] = {**tiny_run["trainer"], "log_every_n_steps": 1}
    folders = []
    for name, workers in (("here", 0), ("ahead", 1))[: 2 if compressor == "lp_comp" else 1]:
        file = tmp_path / "tune.yaml"
        file.write_text(yaml.safe_dump({**content, "name": name, "tune": {**tune, "num_workers": workers}}))
        assert main(["tune", str(file)]) == 0
        folders.append(tmp_path / "runs" / name)
    losses = [float(loss) for loss in logged(folders[0]).values()]
    assert len(losses) == 6 and all(0 < loss < 20 for loss in losses)
    assert not (folders[0] / "skipped.jsonl").exists()
    assert same(weights(folders[0] / "model"), weights(folders[-1] / "model"))


def test_ranks_that_hold_the_model_in_pieces_may_have_different_kinds(mixture, tiny_run, tmp_path):
    """Of a step's two records one may be text alone, where the vision path is not asked: the steps are those of one
    process, and no rank waits for another without an end."""
    tune = {"data": [mixture], "steps": 5, "learning_rate": 1e-3, "format": "released", "num_workers": 0}
    for name, options in (("one", {"accumulate_grad_batches": 2}), ("two", {"devices": 2, "strategy": "fsdp2"})):
        trainer = {**tiny_run["trainer"], "log_every_n_steps": 1, **options}
        content = {**tiny_run, "name": name, "sampling": SAMPLING, "tune": tune, "trainer": trainer}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    assert main(["tune", str(tmp_path / "one.yaml")]) == 0
    command = [sys.executable, "-m", "xcomp.cli", "tune", str(tmp_path / "two.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = ([float(loss) for loss in logged(tmp_path / "runs" / name).values()] for name in ("one", "two"))
    assert len(one) == 5 and one == pytest.approx(two, rel=1e-5)

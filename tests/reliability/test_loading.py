"""What stands in a folder or a configuration is read as it is meant, or refused in one line: never a traceback, never
silently something else.

The seeded mutations are a small version of longer runs, in which every value of every JSON file of a checkpoint was
replaced by values of other types, sizes and signs.
"""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_llava
import tiny_qwen
import tiny_smolvlm
import torch
from damage import cut, drop_tensors, edit, edit_tensors
from safetensors.torch import load_file, save_file
from tiny_clip import save_tiny_clip

import xcomp
from xcomp.checkpoint import one_line, within
from xcomp.cli import main

FLASH, LLAVA, QWEN, SMOL, CLIP = "videochat_flash", "llava_next_video", "qwen2_5_vl", "smolvlm", "clip_similarity"
PLUGINS = (FLASH, LLAVA, QWEN, SMOL, CLIP)


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tiny_checkpoint):
    """A sound folder for each plugin."""
    place = tmp_path_factory.mktemp("sound")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"architecture": tiny_llava.architecture(), "tokenizer": tiny_llava.save_tokenizer(place / "words")}
        xcomp.load_backbone(LLAVA, **options).save_pretrained(str(place / LLAVA))
        options = {"architecture": tiny_qwen.architecture(), "tokenizer": tiny_qwen.save_tokenizer(place / "more")}
        xcomp.load_backbone(QWEN, **options, **tiny_qwen.SIZE).save_pretrained(str(place / QWEN))
        words = tiny_smolvlm.save_tokenizer(place / "small")
        smol = xcomp.load_backbone(SMOL, architecture=tiny_smolvlm.architecture(), tokenizer=words)
        smol.save_pretrained(str(place / SMOL))
    save_tiny_clip(place / CLIP)
    shutil.copytree(tiny_checkpoint, place / FLASH)
    return place


@pytest.fixture
def damaged(sound, tmp_path):
    """Copies a plugin's folder and damages the copy; returns that."""

    def damaged(plugin: str, *damages) -> Path:
        folder = shutil.copytree(sound / plugin, tmp_path / "damaged")
        for damage in damages:
            damage(folder)
        return folder

    return damaged


def load(plugin: str, folder: Path, **options: Any):
    maker = xcomp.load_selector if plugin == CLIP else xcomp.load_backbone
    return maker(plugin, checkpoint=str(folder), **options)


def refusal(plugin: str, folder: Path, **options: Any) -> str:
    """What is said of a folder that is refused: one line that names the place."""
    with pytest.raises(ValueError) as caught:
        load(plugin, folder, **options)
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text and len(text) < 1500, text
    return text


# --- weights ----------------------------------------------------------------------------------------------------------


def largest(tensors: dict[str, torch.Tensor]) -> str:
    return max(tensors, key=lambda name: tensors[name].numel())


def one_number(value: float):
    """Sets one number in the middle of the largest tensor."""

    def change(tensors: dict) -> None:
        flat = tensors[largest(tensors)].view(-1)
        flat[len(flat) // 2] = value

    return edit_tensors(change)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("plugin", PLUGINS)
def test_one_number_that_is_not_finite_is_refused(plugin, value, damaged, sound):
    end = ".".join(largest(load_file(sound / plugin / "model.safetensors")).split(".")[-2:])  # what all names share
    text = refusal(plugin, damaged(plugin, one_number(value)))
    assert "1 tensors hold NaN or infinite numbers in float32: " in text and f"{end}; copy the weights" in text


@pytest.mark.parametrize("plugin", [FLASH, LLAVA, QWEN, SMOL])
def test_a_number_beyond_the_type_it_is_read_in_is_refused(plugin, damaged):
    folder = damaged(plugin, one_number(1e30))
    load(plugin, folder)
    assert "infinite numbers in float16" in refusal(plugin, folder, dtype="float16")


@pytest.mark.parametrize("plugin", PLUGINS)
def test_tensors_that_lack_are_not_made_up(plugin, damaged, sound):
    part = {FLASH: "layers.", LLAVA: "vision_tower", QWEN: "visual", SMOL: "vision_model", CLIP: "bias"}[plugin]
    count = sum(part in name for name in load_file(sound / plugin / "model.safetensors"))
    text = refusal(plugin, damaged(plugin, drop_tensors(part)))
    assert f"{count} tensors do not fit its config.json: missing " in text and count > 20 and "; and " in text


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected extra"),
        (lambda t: t.update({largest(t): t[largest(t)][:-1].contiguous()}), ", should be "),
        (lambda t: t.update({largest(t): t[largest(t)].to(torch.int8)}), " is I8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(plugin, change, message, damaged):
    assert message in refusal(plugin, damaged(plugin, edit_tensors(change)))


def test_numbers_of_positions_that_older_checkpoints_store_are_passed_over(damaged):
    more = {f"{tower}.embeddings.position_ids": torch.arange(8)[None] for tower in ("text_model", "vision_model")}
    load(CLIP, damaged(CLIP, edit_tensors(lambda tensors: tensors.update(more))))


def test_a_head_that_is_tied_and_stored_must_be_the_embedding(damaged):
    def store(scale: float):
        return edit_tensors(lambda t: t.update({"lm_head.weight": scale * t["model.embed_tokens.weight"]}))

    folder = damaged(FLASH, store(1.0))
    load(FLASH, folder)
    store(2.0)(folder)
    assert "says tie_word_embeddings, but lm_head.weight is stored" in refusal(FLASH, folder)


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "damages, message",
    [
        ([cut], "model.safetensors' is cut off"),
        ([as_pickle], "pytorch_model.bin' is a pickle, which may run code"),
        ([as_pickle, lambda f: (f / "pytorch_model.bin").write_bytes(b"PK\3\4")], "is a pickle"),
        ([lambda f: (f / "preprocessor_config.json").unlink()], "holds no preprocessor_config.json"),
        ([lambda f: [p.unlink() for p in f.glob("tokenizer*")]], "holds no tokenizer files"),
        ([edit("config.json", lambda c: c["text_config"].update(eos_token_id=3))], "closes a text with 0"),
    ],
)
def test_a_clip_that_is_broken_is_refused(damages, message, damaged):
    text = refusal(CLIP, damaged(CLIP, *damages))
    assert text.startswith("clip_similarity: ") and message in text


# --- an index of shards -----------------------------------------------------------------------------------------------


SHARD = "model-0000{}-of-00002.safetensors"


def in_shards(folder: Path) -> None:
    """Two files and their index in place of one."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: SHARD.format(1 + i % 2) for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        part = {name: tensors[name].contiguous() for name in tensors if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def point(name: Any):
    """Has the index name another file for its first tensor."""
    return edit("model.safetensors.index.json", lambda c: c["weight_map"].update({next(iter(c["weight_map"])): name}))


def written(text: str):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_shards_are_read_by_their_index(plugin, damaged):
    load(plugin, damaged(plugin, in_shards))


@pytest.mark.parametrize("plugin", [FLASH, CLIP])
@pytest.mark.parametrize(
    "damage, message",
    [
        (written("[]"), "must hold a JSON object, not a list"),
        (written("{"), "is not valid JSON"),
        (written("{}"), "must hold a weight_map"),
        (written('{"weight_map": ["a"]}'), "must hold a weight_map"),
        (written('{"weight_map": {"a": {"b": "c"}}}'), "must hold a weight_map"),
        (written('{"a":' * 5000 + "1" + "}" * 5000), "nests deeper than 32 levels"),
        (point(None), "must hold a weight_map"),
        (point("gone.safetensors"), "lists 3 shards, missing: gone.safetensors"),
        (point("/etc/passwd"), "lists '/etc/passwd'; shards must be plain names"),
        (point("../model.safetensors"), "lists '../model.safetensors'; shards must be plain names"),
        (point(".."), "lists '..'; shards must be plain names"),
        (lambda f: shutil.copy(f / SHARD.format(1), f / SHARD.format(2)), "both hold"),
    ],
)
def test_a_broken_index_is_refused(plugin, damage, message, damaged):
    assert message in refusal(plugin, damaged(plugin, in_shards, damage))


# --- config.json ------------------------------------------------------------------------------------------------------


def text_value(plugin: str, **changes):
    """Changes what config.json says of the language model."""
    return edit("config.json", lambda c: (c if plugin == FLASH else c["text_config"]).update(changes))


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be a whole number, 1 to 1,000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number, 1 to 1,000"),
        ({"hidden_size": -32}, "hidden_size is -32; it must be a whole number"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; it must be a whole number"),
        ({"intermediate_size": 3.5}, "intermediate_size is 3.5; it must be a whole number"),
        ({"vocab_size": 10**30}, "vocab_size is 1000000000000000000000000000000; it must be a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads is True; it must be a whole number"),
        ({"num_attention_heads": [4]}, "num_attention_heads is [4]; it must be a whole number"),
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, "multiple of "),
        ({"hidden_act": "gelux"}, "hidden_act is 'gelux'; known: gelu, "),
        ({"hidden_act": None}, "hidden_act is None; known: gelu, "),
    ],
)
def test_what_config_json_cannot_say(plugin, changes, message, damaged):
    text = refusal(plugin, damaged(plugin, text_value(plugin, **changes)))
    assert message in text and "config.json'" in text


ROPE = {"rope_theta": 1e4, "mrope_section": [2, 3, 3]}


@pytest.mark.parametrize("plugin", [FLASH, LLAVA, QWEN, SMOL])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a number above 0 and below 1"),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a number above 0"),
        ({"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 0.0}}, "rope_parameters give frequencies"),
        ({"rope_parameters": {**ROPE, "rope_type": "spiral"}}, "'spiral'"),
        ({"num_attention_heads": 2, "num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": None}, "looks back 64 tokens only"),
    ],
)
def test_what_config_json_cannot_say_of_a_language_model(plugin, changes, message, damaged):
    if plugin in (LLAVA, SMOL) and "sliding_window" in changes:
        changes = {"model_type": "mistral", "sliding_window": 64}  # Llama has none
    assert message in refusal(plugin, damaged(plugin, text_value(plugin, **changes)))


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 5000 + "]" * 5000, "nests deeper than 32 levels"),
        ('{"model_type": ' + '{"a":' * 40 + "1" + "}" * 41, "nests deeper than 32 levels"),
        ('{"a":' * 200_000, "config.json'"),
        ('{"rms_norm_eps": NaN}', "NaN is no finite number"),
        ('{"rms_norm_eps": 1e999}', "1e999 is no finite number"),
        ("{}", "describes model_type 'None'"),
        ('{"model_type": {}}', "describes model_type '{}'"),
        ("\ufeff{}", "is not valid JSON"),
    ],
)
def test_text_that_is_no_config_json(plugin, text, message, damaged):
    folder = damaged(plugin, lambda folder: (folder / "config.json").write_text(text, encoding="utf-8"))
    assert message in refusal(plugin, folder)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_model_much_larger_than_its_weights_is_not_built(plugin, damaged):
    """Layers that no tensor is for would be made up, in memory."""
    started = time.perf_counter()
    wide = {"hidden_size": 4096, "num_hidden_layers": 100, "head_dim": None, "layer_types": None}
    wide |= {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [512, 256, 256]}} if plugin == QWEN else {}
    folder = damaged(plugin, text_value(plugin, **wide))
    if plugin == QWEN:
        edit("config.json", lambda c: c["vision_config"].update(out_hidden_size=4096))(folder)
    text = refusal(plugin, folder)
    assert ("describes " in text and " weights, but its folder holds " in text) or "tensors do not fit" in text
    assert time.perf_counter() - started < 20  # 80 GB would take longer, or all there is


@pytest.mark.parametrize(
    "damage, message",
    [
        (edit("config.json", lambda c: c["vision_config"].update(kind="other")), "kind is 'other'; it must be umt or"),
        (edit("config.json", lambda c: c.update(mm_projector_type="tome0_mlp_hd64")), "unsupported mm_projector_type"),
        (edit("config.json", lambda c: c.update(mm_vision_select_layer="x")), "must count from the end"),
        (edit("config.json", lambda c: c.update(vision_config=[1])), r"vision_config is [1]"),
        (edit("config.json", lambda c: c.update(architectures=5)), "architectures 5; needed"),
        (edit("config.json", lambda c: c["vision_config"].update(mlp_ratio=-1)), "mlp_ratio is -1"),
    ],
)
def test_what_config_json_cannot_say_of_videochat_flash(damage, message, damaged):
    assert message in refusal(FLASH, damaged(FLASH, damage))


@pytest.mark.parametrize("layer", [0, 4, -4, 10**9, [1, 9]])
def test_a_layer_of_the_tower_that_is_not_there(layer, damaged):
    folder = damaged(LLAVA, edit("config.json", lambda c: c.update(vision_feature_layer=layer)))
    assert "is none of the tower's 1..3" in refusal(LLAVA, folder)


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("vision_config", {"fullatt_block_indexes": [3]}, "fullatt_block_indexes [3] are none of the tower's 3 blocks"),
        ("vision_config", {"window_size": 4}, "a window of window_size 4 holds no token of 8 pixels"),
        ("vision_config", {"num_heads": 3}, "no multiple of 4 times its num_heads 3"),
        ("vision_config", {"tokens_per_second": 0}, "tokens_per_second is 0"),
        ("xcomp", {"height": 24.5}, "height is 24.5; it must be a multiple of 8"),
        ("xcomp", {"second_per_grid": "2"}, "second_per_grid is '2'; it must be above 0"),
    ],
)
def test_what_config_json_cannot_say_of_qwen(part, changes, message, damaged):
    folder = damaged(QWEN, edit("config.json", lambda c: c[part].update(changes)))
    assert message in refusal(QWEN, folder)


# --- tokenizers, processors, settings of generation -------------------------------------------------------------------


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize(
    "file, damage, message",
    [
        ("tokenizer.json", lambda p: p.write_text("{}"), "cannot be read"),
        ("tokenizer.json", lambda p: p.write_bytes(p.read_bytes()[:500]), "cannot be read"),
        ("tokenizer.json", lambda p: p.write_text("[" * 5000), "cannot be read"),
        ("tokenizer_config.json", lambda p: p.write_text("[]"), "must hold a JSON object"),
        ("tokenizer_config.json", lambda p: p.write_text('{"model_max_length": "long"}'), "tokenizer"),
        ("tokenizer_config.json", lambda p: p.write_text('{"tokenizer_class": 5}'), "cannot be read"),
    ],
)
def test_a_broken_tokenizer_is_refused(plugin, file, damage, message, damaged):
    folder = damaged(plugin, lambda folder: damage(folder / file))
    assert message in refusal(plugin, folder)


def test_a_tokenizer_without_a_vocabulary_is_refused(damaged):
    """transformers makes an empty one, and the question would not be read."""
    folder = damaged(FLASH, lambda folder: (folder / "tokenizer.json").unlink())
    assert "holds no vocabulary" in refusal(FLASH, folder)


@pytest.mark.parametrize("plugin", [FLASH, LLAVA, QWEN, SMOL])
def test_a_tokenizer_of_another_model_is_refused(plugin, damaged, sound, tmp_path):
    words = json.loads((sound / FLASH / "tokenizer.json").read_text())
    words["model"]["vocab"]["far"] = 10**6
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match=rf"tokenizer '{other}' uses the id 1000000, but the language model knows \d+"):
        load(plugin, sound / plugin, tokenizer=str(other))


@pytest.mark.parametrize("plugin", [LLAVA, QWEN, SMOL])
@pytest.mark.parametrize("ids", ["x", -1, 1e30, [1, "x"], {"a": 1}, 10**30])
def test_what_ends_an_answer_must_be_ids(plugin, ids, damaged):
    damage = edit("generation_config.json", lambda c: c.update(eos_token_id=ids))
    assert "eos_token_id" in refusal(plugin, damaged(plugin, damage))


@pytest.mark.parametrize("plugin", [LLAVA, QWEN, SMOL, CLIP])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_mean": [0.5, 0.5]}, "image_mean is [0.5, 0.5]; it must be 3 numbers"),
        ({"image_mean": "grey"}, "image_mean is 'grey'; it must be 3 numbers"),
        ({"image_std": [0, 0, 0]}, "image_std is [0, 0, 0]; it must be 3 numbers of 1e-06"),
        ({"rescale_factor": -1}, "rescale_factor is -1; it must be a number"),
        ({"resample": [3]}, "resample is [3]; it must be 1 (lanczos), 2 (bilinear) or 3 (bicubic)"),
    ],
)
def test_numbers_of_pixels_that_cannot_be(plugin, changes, message, damaged):
    name = "preprocessor_config.json" if plugin == CLIP else "video_preprocessor_config.json"
    text = refusal(plugin, damaged(plugin, edit(name, lambda c: c.update(changes))))
    assert message in text and name in text


@pytest.mark.parametrize("size", [0, 10**9, -48, {"shortest_edge": None}, {"height": "48", "width": 48}, [48, 48]])
def test_pictures_of_a_size_that_cannot_be(size, damaged):
    damage = edit("video_preprocessor_config.json", lambda c: c.update(size=size))
    assert "size" in refusal(LLAVA, damaged(LLAVA, damage))


def test_errors_of_other_libraries_are_one_line():
    with pytest.raises(ValueError, match="^place: 'x' is missing or not known$"), within("place"):
        {}["x"]
    with pytest.raises(ValueError, match="^place: two lines of it$"), within("place"):
        raise RuntimeError("two lines\n  \x1b[1mof it\x1b[0m")
    with pytest.raises(ValueError, match="^AssertionError$"), within("AssertionError"):
        raise AssertionError
    with pytest.raises(KeyboardInterrupt), within("place"):
        raise KeyboardInterrupt
    assert one_line(RuntimeError("long " * 1000)).endswith(" …")


# --- mutations --------------------------------------------------------------------------------------------------------

MUTATIONS = 3  # of each file; longer runs took thousands
VALUES = [None, True, -1, 0, 3, 10**9, 10**30, -0.5, 1e30, math.nan, math.inf, "", "x", "../x", "\ud800", "a\0b", [],
          [1, 2], [None], {}, {"a": 1}]  # fmt: skip


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a JSON file's content; of a long list its first three."""
    yield path
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(min(len(content), 3)):
            yield from places(content[key], (*path, key))


def replaced(content: Any, path: tuple, value: Any) -> Any:
    content = copy.deepcopy(content)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return content


@pytest.mark.parametrize("plugin", PLUGINS)
def test_mutated_files_are_read_or_refused_in_one_line(plugin, damaged):
    draw = random.Random(0)
    folder = damaged(plugin)
    for file in sorted(folder.glob("*.json")):
        before = file.read_text()
        content = json.loads(before)
        for path in draw.choices([path for path in places(content) if path], k=MUTATIONS):
            value = draw.choice(VALUES)
            file.write_text(json.dumps(replaced(content, path, value)))
            try:
                load(plugin, folder)
            except ValueError as error:
                told = str(error)
                assert "\n" not in told and str(folder) in told, f"{file.name} {path} {value!r}: {told}"
            except BaseException as error:
                pytest.fail(f"{file.name}, {path} = {value!r}: {type(error).__name__}: {error}")
        file.write_text(before)
    load(plugin, folder)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_mutated_bytes_are_read_or_refused_in_one_line(plugin, damaged):
    draw = random.Random(0)
    folder = damaged(plugin)
    for file in sorted(folder.iterdir()):
        before = file.read_bytes()
        for kind in ("cut", "flip", "noise"):
            after = bytearray(before)
            if kind == "flip":
                for _ in range(3):
                    after[draw.randrange(min(len(after), 4000))] = draw.randrange(256)
            sizes = {"cut": draw.randrange(len(before))}
            noise = bytes(draw.randrange(256) for _ in range(200))
            file.write_bytes(noise if kind == "noise" else after[: sizes.get(kind, len(after))])
            try:
                load(plugin, folder)
            except ValueError as error:
                assert "\n" not in str(error) and str(folder) in str(error), f"{file.name}, {kind}: {error}"
            except BaseException as error:
                pytest.fail(f"{file.name}, {kind}: {type(error).__name__}: {error}")
        file.write_bytes(before)


# --- configurations, as commands meet them ----------------------------------------------------------------------------


@pytest.fixture
def command(tiny_run, tmp_path, monkeypatch, capsys):
    """Runs a command on the tiny run's YAML file with text added to it → (status, what it printed, its errors)."""
    monkeypatch.chdir(tmp_path)

    def command(name: str, *overrides: str, text: str = "") -> tuple[int, str, str]:
        (tmp_path / "run.yaml").write_text(
            json.dumps(tiny_run)[:-1] + ", " + text + "}" if text else json.dumps(tiny_run)
        )
        status = main([name, "run.yaml", *overrides])
        return status, *capsys.readouterr()

    return command


DEEP = "[" * 5000 + "]" * 5000
REFUSED = {
    "deep YAML": ([], f'"extra": {DEEP}', "config 'run.yaml' cannot be read: line 1 is nested deeper than 32 levels"),
    "deeper YAML": ([], '"extra": ' + "[" * 1_000_000, "nested deeper than 32 levels"),
    "deep override": ([f"name={DEEP}"], "", "override 'name=[[["),
    "deep key": ([f"{'a.' * 5000}b=1"], "", "config 'run.yaml' cannot be read: it is nested too deep"),
    "infinite": (["sampling.rate=.inf"], "", "config 'run.yaml': sampling.rate is inf; it must be a finite number"),
    "not a number": (["benchmark.seconds=.nan"], "", "benchmark.seconds is nan; it must be a finite number"),
    "infinite of the trainer": (["trainer.gradient_clip_val=-.inf"], "", "trainer.gradient_clip_val is -inf"),
    "infinite option": (["selector={name: qc_comp, first_layer: .inf}"], "", "selector.first_layer is inf"),
    "beyond 64 bits": ([f"limit={10**30}"], "", "limit is 1000000000000000000000000000000; a number must fit into 64"),
    "digits": ([f"limit={'9' * 6000}"], "", "cannot be read: "),
    "long name": ([f"name={'n' * 300}"], "", "name is 'nnnn"),
    "long output": ([f"output={'n' * 300}"], "", "cannot be made: File name too long; choose another 'output'"),
    "long checkpoint": ([f"backbone.checkpoint={'n' * 300}"], "", "is neither a folder nor a hub id"),
    "long folder of plugins": ([f"plugins=[{'n' * 300}]"], "", "does not exist"),
    "surrogate": (["name=a\udcffb"], "", "override 'name=a\\udcffb' cannot be read"),
    "null": (['output="a\\0b"'], "", "output is 'a\\x00b', which holds a null character"),
    "casting precision": (["trainer.precision=16-true"], "", "trainer.precision is '16-true'; it must be one of 32-t"),
    "two nodes": (["trainer.num_nodes=2"], "", "trainer.num_nodes is 2, but this process was started by no launcher"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["evaluate", "tune"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_cannot_be_is_one_line_and_writes_nothing(case, name, command, tmp_path, tmp_path_factory):
    overrides, text, message = REFUSED[case]
    data = tmp_path_factory.mktemp("data") / "text.json"
    data.write_text('[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]')
    more = [f"tune.data=[{{records: {data}}}]"] if name == "tune" else []
    status, out, err = command(name, *overrides, *more, text=text)
    assert (status, out) == (2, "") and message in err, err
    assert err.startswith("xcomp: error: ") and err.count("\n") == 1 and len(err) < 1200
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_brackets_in_names_and_places_are_printed_as_they_are(command, tmp_path):
    """rich would take ``[/b]`` for the end of a style."""
    arms = "arms=[{name: '[/red] a'}, {name: '[b]', compressor: none}]"
    status, out, err = command("compare", "output=a[/b]c", "name=x[bold]y", "limit=1", arms)
    assert (status, err) == (0, "") and "report: a[/b]c/x[bold]y/report.html" in out and "[/red] a" in out

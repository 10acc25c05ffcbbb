"""Every configuration that ships is runnable, and what a user can get wrong in one is explained."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import xcomp
from xcomp.ask import split_words
from xcomp.checkpoint import find_folder
from xcomp.cli import _parser
from xcomp.compare.arms import resolve_arms
from xcomp.config import (
    Arm,
    ConfigError,
    Generation,
    RunConfig,
    Sampling,
    Tune,
    check_component,
    find_config,
    load_config,
    parse_config,
    split_component,
)
from xcomp.shipped import built_in

CONFIGS = Path(xcomp.__file__).resolve().parent.parent / "configs"
SHIPPED = {p.relative_to(CONFIGS).with_suffix("").as_posix(): p for p in sorted(CONFIGS.rglob("*.yaml"))}


def header(path):
    """The lines of the comment at the head of a file, without their ``#``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]


# --- what ships -------------------------------------------------------------------------------------------------------


def test_there_are_configs_and_they_are_found_by_name():
    assert SHIPPED and built_in("configs", "**/*.yaml") == SHIPPED
    for name, path in SHIPPED.items():
        assert find_config(name) == path


@pytest.mark.parametrize("name", SHIPPED)
def test_the_header_says_what_it_does_needs_and_how_it_runs(name):
    lines = header(SHIPPED[name])
    assert len(lines[0]) > 20 and any(line.startswith("Needs:") for line in lines)
    (command,) = [line.removeprefix("Run:").strip() for line in lines if line.startswith("Run:")]
    program, *arguments = shlex.split(command)
    assert program == "xcomp"
    options = _parser().parse_args(arguments)  # exits on a command or option that does not exist
    assert find_config(options.config) == SHIPPED[name]
    overrides = split_words(options.words)[1] if arguments[0] == "ask" else options.overrides
    config = load_config(options.config, overrides)
    assert {"tune": config.tune.data, "ask": True}.get(arguments[0], config.benchmark)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_parses_and_names_components_that_exist(name):
    config = load_config(name)
    assert config.backbone is not None
    for kind in ("backbone", "compressor", "selector"):
        check_component(kind, getattr(config, kind), config.plugins)
    for source in [*config.tune.data, *config.tune.validation]:
        if "benchmark" in source:
            check_component("benchmark", source["benchmark"], config.plugins)
    if config.benchmark is not None:
        check_component("benchmark", config.benchmark, config.plugins)
    if config.arms:
        assert len(resolve_arms(config)) >= len(config.arms) >= 2


def test_names_of_configs_differ():
    """The name is the run folder's: two configs of one name would refuse each other's."""
    names = [load_config(name).name for name in SHIPPED]
    assert sorted(set(names)) == sorted(names)


# --- keys and values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        ({"bakbone": "x"}, "config 'x' has no key 'bakbone'; did you mean 'backbone'. keys: name, output"),
        ({"sampling": {"rat": 1}}, "config 'x: sampling' has no key 'rat'; did you mean 'rate'"),
        ({"generation": {"max_tokens": 1}}, "config 'x: generation' has no key .*did you mean 'max_new_tokens'"),
        ({"tune": {"step": 1}}, "config 'x: tune' has no key 'step'; did you mean 'steps'"),
        ({"arms": [{}, {"frame": 1}]}, r"config 'x: arms\[1\]' has no key 'frame'; did you mean 'frames'"),
        ({7: 1}, "has no key '7'; keys:"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(content, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(content, "x")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"batch_size": "many"}, "key 'batch_size': .*'many'.*could not be converted to Integer"),
        ({"batch_size": True}, "key 'batch_size'"),
        ({"batch_size": None}, "key 'batch_size'"),
        ({"limit": 0}, "limit is 0"),
        ({"seed": -1}, "seed is -1; it must be 0.."),
        ({"frames": 0}, "frames is 0; it must be a number of frames of at least 1"),
        ({"frames": "8"}, "frames is '8'"),
        ({"frames": True}, "frames is True"),
        ({"frames": {"a": 1}}, "frames is {'a': 1}"),
        ({"frames": [8, 0]}, "frames is 0"),
        ({"frames": []}, "frames is an empty list"),
        ({"plugins": "folder"}, "key 'plugins'"),
        ({"trainer": 3}, "key 'trainer'"),
        ({"arms": 3}, "arms must be a list of mappings, not 3"),
        ({"arms": {"name": "a"}}, "arms must be a list of mappings"),
        ({"arms": [None]}, r"arms\[0\]' must be a mapping of keys, not None"),
        ({"name": ""}, "name is ''; it must be a plain name"),
        ({"name": ".."}, "name is '..'"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"sampling": None}, "sampling' must be a mapping of keys, not None"),
        ({"sampling": []}, "sampling' must be a mapping"),
        ({"sampling": {"rate": 0}}, "sampling.rate is 0.0; it must be above 0"),
        ({"sampling": {"max_frames": 12}}, "sampling: max_frames=12 must be a multiple of 8"),
        ({"sampling": {"min_frames": 1024}}, "sampling: min_frames=1024 must be between 0 and max_frames=512"),
        ({"sampling": {"style": "newest"}}, "sampling: style='newest' is not one of videochat_flash, xcomp"),
        ({"sampling": {"reader": "vlc"}}, "sampling.reader is 'vlc'; readers: auto, decord, av, torchcodec"),
        ({"generation": {"max_new_tokens": 0}}, "generation.max_new_tokens is 0"),
        ({"generation": {"repetition_penalty": 0}}, "generation.repetition_penalty is 0.0; it must be above 0"),
        ({"generation": {"num_beams": 0}}, "generation.num_beams is 0"),
        ({"generation": {"temperature": 0}}, "generation.temperature is 0.0; it must be above 0"),
        ({"generation": {"top_p": 1.5}}, "generation.top_p is 1.5"),
        ({"generation": {"top_k": -1}}, "generation.top_k is -1"),
        ({"tune": {"steps": 0}}, "tune.steps is 0"),
        ({"tune": {"save_every": 0}}, "tune.save_every is 0"),
        ({"tune": {"batch_size": 0}}, "tune.batch_size is 0"),
        ({"tune": {"num_workers": -1}}, "tune.num_workers is -1"),
        ({"tune": {"learning_rate": 0}}, "tune.learning_rate is 0.0; it must be above 0"),
        ({"tune": {"learning_rate": "nan"}}, "tune.learning_rate is nan"),
        ({"tune": {"weight_decay": -1}}, "tune.weight_decay is -1"),
        ({"tune": {"warmup_ratio": 2}}, "tune.warmup_ratio is 2"),
        ({"tune": {"save_dtype": "half"}}, "tune.save_dtype is 'half'; it must be one of float32, bfloat16, float16"),
        ({"tune": {"train": ["lm"]}}, "tune.train names 'lm'; did you mean 'llm'. parts: llm, projector, vision"),
        ({"tune": {"train": "llm"}}, "key 'tune.train'"),
        ({"tune": {"frames": [8, 0]}}, "tune.frames holds 0"),
        ({"tune": {"data": {"records": "a"}}}, "config 'x'"),
        ([1], "config 'x' must be a mapping of keys, not list"),
        (None, "config 'x' must be a mapping of keys, not NoneType"),
    ],
)
def test_a_bad_value_is_named_with_its_constraint(content, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(content, "x")


def test_defaults_and_types():
    config = parse_config({"tune": {"learning_rate": 1, "frames": [4, 8]}, "arms": [{"frames": [8, 16]}]}, "x")
    assert config == RunConfig(tune=Tune(learning_rate=1.0, frames=[4, 8]), arms=[Arm(frames=[8, 16])])
    assert isinstance(config.tune.learning_rate, float)
    assert parse_config({}, "x") == RunConfig(sampling=Sampling(), generation=Generation())
    assert config.folder == Path("runs/run")


@pytest.mark.parametrize("node", [None, 3, {}, {"rounding": "ceil"}, {"name": 3}, ["lp_comp"]])
def test_a_component_must_have_a_name(node):
    with pytest.raises(ConfigError, match="compressor is .*; it must be a plugin's name or a mapping with 'name'"):
        split_component("compressor", node)


def test_a_component_is_a_name_or_a_mapping():
    assert split_component("compressor", "lp_comp") == ("lp_comp", {})
    assert split_component("compressor", {"name": "lp_comp", "end": 2}) == ("lp_comp", {"end": 2})


# --- files and overrides ----------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_overrides_reach_every_level(write):
    text = "backbone: {name: videochat_flash, checkpoint: old}\narms: [{name: a}, {name: b}]\ntune: {frames: [4]}\n"
    path = write(text)
    overrides = ["name=new", "backbone.checkpoint=there", "backbone.dtype=bfloat16", "tune.learning_rate=1e-3"]
    overrides += ["tune.frames=[8,16]", "arms[1].frames=32", "trainer.max_time=00:01:00:00", "compressor=none"]
    config = load_config(path, overrides)
    assert config.name == "new" and config.tune.learning_rate == 1e-3 and config.tune.frames == [8, 16]
    assert config.backbone == {"name": "videochat_flash", "checkpoint": "there", "dtype": "bfloat16"}
    assert [(arm.name, arm.frames) for arm in config.arms] == [("a", None), ("b", 32)]
    assert config.trainer == {"max_time": "00:01:00:00"} and config.compressor == "none"


POOLED = "{name: avg_pool, tokens: 4}"
REPLACED = [
    (["={name: other}"], {"name": "other"}),
    ([".name=other"], {"name": "other"}),
    (["[name]=other"], {"name": "other"}),
    (["={name: other, end: 2}"], {"name": "other", "end": 2}),
    ([".name=other", ".end=2"], {"name": "other", "end": 2}),
    ([".end=2", ".name=other"], {"name": "other", "end": 2}),
    (["=other"], "other"),
    (["=avg_pool"], "avg_pool"),
    # The same plugin: options merge.
    (["={name: avg_pool}"], {"name": "avg_pool", "tokens": 4}),
    (["={name: avg_pool, tokens: 5}"], {"name": "avg_pool", "tokens": 5}),
    ([".tokens=5", ".end=2"], {"name": "avg_pool", "tokens": 5, "end": 2}),
    (["={tokens: 5}"], {"name": "avg_pool", "tokens": 5}),
]


@pytest.mark.parametrize("overrides, expected", REPLACED, ids=lambda x: str(x))
@pytest.mark.parametrize("place", ["compressor", "benchmark", "arms[1].selector", "arms.0.backbone"])
def test_another_plugin_keeps_nothing_of_the_one_before(write, place, overrides, expected):
    path = write(
        f"compressor: {POOLED}\nbenchmark: {POOLED}\n"
        f"arms: [{{name: a, backbone: {POOLED}}}, {{name: b, selector: {POOLED}}}]\n"
    )
    before, config = load_config(path), load_config(path, [place + override for override in overrides])
    parts = lambda c: {  # noqa: E731
        "compressor": c.compressor,
        "benchmark": c.benchmark,
        "arms[1].selector": c.arms[1].selector,
        "arms.0.backbone": c.arms[0].backbone,
    }
    assert parts(config) == {**parts(before), place: expected}


def test_another_plugin_in_a_nested_override(write):
    text = f"arms: [{{name: a, compressor: {POOLED}}}]\ntune: {{data: [{{benchmark: {POOLED}, repeat: 2}}]}}\n"
    config = load_config(write(text), ["arms[0]={compressor: {name: other}}", "tune.data[0].benchmark.name=other"])
    assert config.arms == [Arm(name="a", compressor={"name": "other"})]
    assert config.tune.data == [{"benchmark": {"name": "other"}, "repeat": 2}]
    config = load_config(write(text), ["arms=[{compressor: {name: other}}]"])
    assert config.arms == [Arm(compressor={"name": "other"})]


CLIP = "{name: clip_similarity, similarity: dot}"


@pytest.mark.parametrize(
    "override, scorer",
    [
        ("=qc_comp", "qc_comp"),
        ("={name: qc_comp, n_repeat: 1}", {"name": "qc_comp", "n_repeat": 1}),
        (".name=qc_comp", {"name": "qc_comp"}),
        (".batch_size=8", {"name": "clip_similarity", "similarity": "dot", "batch_size": 8}),
        ("={name: clip_similarity, batch_size: 8}", {"name": "clip_similarity", "similarity": "dot", "batch_size": 8}),
    ],
)
def test_another_scorer_keeps_nothing_of_the_one_before(write, override, scorer):
    path = write(f"selector: {{name: aks, t1: 0.5, scorer: {CLIP}}}\n")
    assert load_config(path, [f"selector.scorer{override}"]).selector == {"name": "aks", "t1": 0.5, "scorer": scorer}


def test_options_can_be_given_to_a_scorer_by_plain_name(write):
    path = write("selector: {name: aks, scorer: clip_similarity}\n")
    scorer = {"name": "clip_similarity", "similarity": "dot"}
    assert load_config(path, ["selector.scorer.similarity=dot"]).selector == {"name": "aks", "scorer": scorer}


def test_options_can_be_given_to_a_plain_name(write):
    path = write("compressor: lp_comp\nselector: uniform\narms: [{compressor: avg_pool}]\n")
    config = load_config(path, ["compressor.end=2", "arms[0].compressor.tokens=4"])
    assert config.compressor == {"name": "lp_comp", "end": 2} and config.selector == "uniform"
    assert config.arms[0].compressor == {"name": "avg_pool", "tokens": 4}
    assert load_config(path, ["compressor.name=none", "compressor.end=2"]).compressor == {"name": "none", "end": 2}


@pytest.mark.parametrize(
    "override, message",
    [
        ("frames", "override 'frames' is not of the form key=value"),
        ("nmae=x", "has no key 'nmae'; did you mean 'name'"),
        ("tune.step=3", "tune' has no key 'step'; did you mean 'steps'"),
        ("tune=4", "tune' must be a mapping of keys, not 4"),
        ("name=[", "cannot be read: .*did not find expected node"),
        ("arms[1].frames=8", "list index out of range"),
        ("batch_size=x", "key 'batch_size': .*'x'"),
    ],
)
def test_a_bad_override_is_refused(write, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write("arms: [{name: a}]\n"), [override])


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [b\n", r"config '.*run.yaml' cannot be read: while parsing a flow sequence"),
        ("name: a\nname: b\n", "cannot be read: .*duplicate key name"),
        ("- a\n- b\n", "must be a mapping of keys, not list"),
        ("just words\n", "has no key 'just words'"),
        ("5\n", "cannot be read"),
        ("name: !!binary aGk=\n", "name is a bytes, not text, number, list or mapping"),
        ("name: ${nothing}\n", "cannot be read: Interpolation key 'nothing' not found"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_config_is_refused(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(text))


def test_an_empty_file_is_all_defaults(write):
    assert load_config(write("# nothing\n")) == RunConfig()


def test_interpolation_and_paths_work(write):
    assert load_config(write("name: a\noutput: runs/${name}\n")).output == "runs/a"


def test_folders_of_plugins_are_relative_to_the_file_that_lists_them(write, tmp_path, monkeypatch):
    (tmp_path / "sub" / "mine").mkdir(parents=True)
    (tmp_path / "sub" / "mine" / "pooled.py").write_text(
        "from dataclasses import dataclass\nfrom xcomp import Compressor\n"
        "class Pooled(Compressor):\n    @dataclass\n    class Config: pass\n"
    )
    path = write("plugins: [./mine]\ncompressor: pooled\n", "sub/run.yaml")
    config = load_config(path)
    check_component("compressor", config.compressor, config.plugins)
    assert config.plugins == config.written()["plugins"] == [str(tmp_path / "sub" / "mine")]
    monkeypatch.chdir(tmp_path)
    config = load_config("sub/run.yaml")
    check_component("compressor", config.compressor, config.plugins)
    assert config.plugins == ["sub/mine"]
    assert load_config("sub/run.yaml", ["plugins=[./mine]"]).plugins == ["./mine"]  # relative to where one is
    monkeypatch.setenv("MINE", str(tmp_path / "sub" / "mine"))
    write("plugins: ['${oc.env:MINE}', 'x/${oc.env:MINE}', /elsewhere]\n", "sub/run.yaml")
    config = load_config("sub/run.yaml")
    assert config.plugins == [str(tmp_path / "sub" / "mine"), f"sub/x/{tmp_path / 'sub' / 'mine'}", "/elsewhere"]
    assert config.written()["plugins"] == ["${oc.env:MINE}", "sub/x/${oc.env:MINE}", "/elsewhere"]


def test_interpolations_are_kept_as_they_are_written(write, monkeypatch):
    monkeypatch.setenv("PLACE", "/secret")
    monkeypatch.setenv("COUNT", "3")
    text = "name: a\noutput: runs/${name}\nbatch_size: ${oc.decode:${oc.env:COUNT}}\n"
    text += "backbone: {name: b, checkpoint: '${oc.env:PLACE}/m'}\narms: [{backbone: '${backbone}', frames: [4, 8]}]\n"
    config = load_config(write(text), ["benchmark.root=${oc.env:PLACE}", "benchmark.name=needle"])
    assert (config.output, config.batch_size, config.backbone["checkpoint"]) == ("runs/a", 3, "/secret/m")
    assert config.arms[0].backbone == config.backbone and config.benchmark == {"name": "needle", "root": "/secret"}
    written = config.written()
    assert (written["output"], written["batch_size"]) == ("runs/${name}", "${oc.decode:${oc.env:COUNT}}")
    assert written["backbone"] == {"name": "b", "checkpoint": "${oc.env:PLACE}/m"}
    assert written["arms"][0] == {**vars(Arm(backbone="${backbone}", frames=[4, 8]))}
    assert "/secret" not in str(written) and "/secret" in str(config.to_dict())
    assert replace(config, arms=[]).written()["arms"] == [] and parse_config(config.to_dict(), "x") == config


def test_a_config_that_does_not_exist_suggests_the_nearest():
    name = next(iter(SHIPPED))
    with pytest.raises(ConfigError, match=f"config '{name}s' does not exist; did you mean '{name}'") as error:
        load_config(name + "s")
    assert all(re.search(rf"\b{known}\b", str(error.value)) for known in SHIPPED)
    with pytest.raises(ConfigError, match="config 'nowhere.yaml' does not exist"):
        load_config("nowhere.yaml")


def test_a_checkpoint_is_a_path_a_shipped_name_or_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "small").mkdir(parents=True)
    monkeypatch.setattr(xcomp, "__path__", [str(tmp_path)])
    assert find_folder("small") == tmp_path / "checkpoints" / "small"
    assert find_folder(str(tmp_path)) == tmp_path and find_folder(None) is None
    asked = []
    monkeypatch.setattr("xcomp.checkpoint.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert find_folder("owner/name", weights=False) == tmp_path and asked[0][0] == ("owner/name",)
    assert "*.safetensors" not in asked[0][1]["allow_patterns"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert find_folder("small") == Path("small")  # what lies here comes before what ships


@pytest.mark.parametrize("given", ["lp_comp", {"name": "avg_pool", "tokens": 4}, ["evs", "lp_comp"], None])
@pytest.mark.parametrize(
    "override, expected",
    [
        ("[evs, {name: avg_pool, tokens: 2}]", ["evs", {"name": "avg_pool", "tokens": 2}]),
        ("none", "none"),
        ("{name: avg_pool, tokens: 2}", {"name": "avg_pool", "tokens": 2}),
    ],
)
def test_lists_of_compressors_replace_and_are_replaced(write, given, override, expected):
    run = {"backbone": "videochat_flash"} | ({} if given is None else {"compressor": given})
    config = load_config(write(yaml.safe_dump(run)), [f"compressor={override}"])
    found = config.compressor
    assert found == expected or found == {"name": expected} or list(found) == expected

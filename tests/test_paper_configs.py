"""configs/paper: every table of the paper can be forecast without weights, annotations or videos, which are told."""

from ast import literal_eval
from functools import cache

import pytest

from xcomp.cli import main
from xcomp.compare import forecast, stand_in
from xcomp.compare.arms import resolve_arms
from xcomp.config import ConfigError, load_config, parse_config
from xcomp.run import open_run
from xcomp.shipped import built_in

PAPER = [name for name in built_in("configs", "**/*.yaml") if name.startswith("paper/")]
TABLES = ("table_1", "table_2", "table_3", "table_4", "table_5", "table_6", "table_7", "table_d", "table_e", "table_f")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No hub is asked, and a backbone of one kind is built once for all tables."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(forecast, "stand_in", lambda node, plugins, shapes: built(repr(node), shapes))


@cache
def built(node, shapes):
    return stand_in.stand_in(literal_eval(node), (), shapes)


def test_every_table_and_figure_has_one():
    for name in (*TABLES, "figure_1", "figure_a"):
        assert any(paper.startswith(f"paper/{name}") for paper in PAPER), name


@pytest.mark.parametrize("name", PAPER)
def test_it_is_forecast_without_anything(name, capsys):
    """The weights do not exist here; the arms are counted all the same, and the status says that nothing can begin."""
    assert main(["compare", name, "--dry-run"]) == 1
    out = capsys.readouterr().out
    assert "not ready: what is missing stands above" in out
    assert "cannot be read: No such file" in out or "must be a folder or one of the files" in out  # the annotations
    assert "could it be downloaded" in out and "counted with the shapes of" in out
    rows = [line for line in out.split("MACs as run")[0].splitlines() if "→" in line and "in → out" not in line]
    assert len(rows) == len(resolve_arms(load_config(name))) and not any("?" in row for row in rows)
    published = out.split("published", 1)[1]
    for arm in load_config(name).arms:
        assert all(f"{number:g}" in published for number in arm.published.values())


@pytest.mark.parametrize("name", PAPER)
def test_it_quotes_the_paper(name):
    config = load_config(name)
    assert any(arm.published for arm in config.arms) and config.shapes in built_in("architectures", "*.json")
    assert all(set(row) <= set(config.arms[-1].published) for row in config.published.values())


def test_the_main_table():
    published = {}
    for benchmark in ("longvideobench", "mlvu", "videomme", "lvbench"):
        arms = resolve_arms(load_config(f"paper/table_1_{benchmark}"))
        published[benchmark] = [arm.published["accuracy"] for arm in arms]
        assert [arm.name for arm in arms] == ["VideoChat-Flash-2B", "XComp"]
    assert published == {
        "longvideobench": [58.3, 59.7],
        "mlvu": [65.7, 66.7],
        "videomme": [44.9, 45.6],
        "lvbench": [42.9, 46.2],
    }


# --- published numbers and shapes -------------------------------------------------------------------------------------

RUN = {
    "name": "x",
    "backbone": {"name": "videochat_flash", "checkpoint": "nowhere/model"},
    "shapes": "videochat_flash_2b",
    "benchmark": {"name": "needle", "num_videos": 1, "seconds": 4},
    "arms": [{"name": "a", "published": {"accuracy": 46.2}}, {"name": "b", "compressor": "lp_comp"}],
}


def test_published_numbers_are_in_an_arms_description():
    first, second = resolve_arms(parse_config(RUN, "x"))
    assert first.description["published"] == {"accuracy": 46.2} and "published" not in second.description


@pytest.mark.parametrize(
    "content, message",
    [
        ({"arms": [{"name": "a", "published": {"accuracy": "much"}}]}, "'much'.*could not be converted to Float"),
        ({"arms": [{"name": "a", "publish": {}}]}, "no key 'publish'; did you mean 'published'"),
        ({"published": {"GPT": 3.0}}, "key 'published"),
        ({"shapes": ["a"]}, "key 'shapes'"),
    ],
)
def test_bad_ones_are_refused(content, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(RUN | content, "x")


def test_notes_may_change_in_a_run(tmp_path):
    """What is quoted beside results, or counted before them, changes none."""
    config = parse_config(RUN | {"output": str(tmp_path)}, "x")
    open_run(config, "compare")
    arms = [{**RUN["arms"][0], "published": {"accuracy": 1.0, "more": 2.0}}, RUN["arms"][1]]
    other = RUN | {"output": str(tmp_path), "shapes": None, "published": {"GPT": {"accuracy": 3.0}}, "arms": arms}
    open_run(parse_config(other, "x"), "compare")
    with pytest.raises(ConfigError, match="belongs to a different config: seed"):
        open_run(parse_config(other | {"seed": 1}, "x"), "compare")


def test_unknown_shapes_suggest_the_nearest(capsys):
    with pytest.raises(
        ConfigError, match="shapes is 'videochat_flash', no config.json; did you mean 'videochat_flash_2b'"
    ):
        stand_in.architecture_of("videochat_flash")


def test_a_config_json_of_ones_own_gives_shapes(tmp_path, monkeypatch):
    import json

    from conftest import ARCHITECTURE

    (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURE))
    node = {"name": "videochat_flash", "checkpoint": "nowhere/model", "tokenizer": "nowhere"}
    backbone = stand_in.stand_in(node, (), str(tmp_path / "config.json"))
    assert backbone.num_layers == ARCHITECTURE["num_hidden_layers"] and backbone.tokenizer is None
    assert {parameter.device.type for parameter in backbone.parameters()} == {"meta"}
    assert len(backbone.prompt("x" * 40, None).suffix_ids) == 27 + 10 + 5


def test_a_checkpoint_without_weights_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    node = {"name": "videochat_flash", "checkpoint": str(tmp_path)}
    assert "holds no model.safetensors" in stand_in.missing_weights(node)
    assert stand_in.missing_weights({"name": "videochat_flash", "checkpoint": "tiny"}) is None
    assert stand_in.missing_weights("videochat_flash") is None
